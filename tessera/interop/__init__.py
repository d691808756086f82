"""Other people's files and a Model: official DiT checkpoints, diffusers folders, and telling them apart."""
