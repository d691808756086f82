"""The KL autoencoder of latent diffusion (Rombach et al. 2022), through diffusers' AutoencoderKL.

Shapes: B batch, C latent channels, H W height and width of the pixels, f the factor between the two (8 for most).
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tessera.errors import TesseraError
from tessera.settings import Settings


class AutoencoderConfig(Settings):
    """A folder that diffusers saved, or a hub id; scale and shift come from its own configuration."""

    kind: Literal["autoencoder-kl"] = "autoencoder-kl"
    source: str = Field(description="a folder, or a hub id such as stabilityai/sd-vae-ft-ema")
    subfolder: str | None = None
    revision: str | None = None
    tile_above: int = Field(default=1024, ge=64, description="work in tiles of so many pixels a side, if one has more")

    def build(self) -> "Autoencoder":
        return Autoencoder(self)


class Autoencoder:
    """encode: pixels in -1 .. 1 to latents of about unit variance; decode: the way back."""

    def __init__(self, config: AutoencoderConfig) -> None:
        self.config = config
        self.vae = _load(config).eval().requires_grad_(False)
        self.scale = float(self.vae.config.scaling_factor)
        self.shift = float(self.vae.config.shift_factor or 0.0)
        self.pixel_channels = int(self.vae.config.in_channels)
        self.latent_channels = int(self.vae.config.latent_channels)
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        # Tiles as large as what is worked on whole, not as small as its training pictures (256 for most): group norms
        # take their statistics tile by tile, so that small tiles differ in colour and contrast.
        self.vae.tile_latent_min_size = config.tile_above // self.factor
        self.vae.tile_sample_min_size = self.vae.tile_latent_min_size * self.factor
        self.vae.enable_tiling()

    def to(self, device) -> "Autoencoder":
        self.vae.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """pixels [B, 3, H, W] -> latents [B, C, H / f, W / f]: the posterior's mean, or with standard normal noise of
        the latents' shape a draw from it, as in training."""
        posterior = self.vae.encode(pixels).latent_dist
        raw = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return (raw - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, H / f, W / f] -> pixels [B, 3, H, W], about -1 .. 1"""
        return self.vae.decode(latents / self.scale + self.shift).sample

    def save(self, folder: Path) -> None:
        """Write the autoencoder as a diffusers folder, which `AutoencoderConfig(source=folder)` reads."""
        self.vae.save_pretrained(folder, safe_serialization=True)


def _load(config: AutoencoderConfig) -> Any:
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError:
        raise TesseraError("an autoencoder needs diffusers: pip install 'tessera[diffusers]'") from None
    place = {"subfolder": config.subfolder} if config.subfolder else {}
    if config.revision:
        place["revision"] = config.revision
    folder = Path(config.source) / (config.subfolder or "")
    # Older folders hold a pickle alone; diffusers reads it with weights_only, so that it cannot run a program.
    pickled = any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))
    try:
        return AutoencoderKL.from_pretrained(config.source, use_safetensors=not pickled, **place)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise TesseraError(
            f"cannot load the autoencoder '{config.source}': {reason}\n"
            "give a folder written by diffusers' AutoencoderKL.save_pretrained, or a hub id this machine can reach"
        ) from None
