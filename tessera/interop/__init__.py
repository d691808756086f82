"""Models in the formats of other projects: official DiT and SiT checkpoints, and diffusers folders."""
