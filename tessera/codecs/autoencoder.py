"""The KL autoencoder of latent diffusion (Rombach et al. 2022), through diffusers' AutoencoderKL.

Shapes: B batch, C latent channels, H W height and width of the pixels, f the factor between the two (8 for most).
"""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from tessera.codecs.codec import Numbers, StoredCodec, StoredConfig, by_frame, digest, listed_numbers, pretrained
from tessera.errors import TesseraError
from tessera.settings import Settings

# The keys of a folder's configuration that raw moments depend on.
ENCODER = ("in_channels", "down_block_types", "block_out_channels", "layers_per_block", "act_fn", "latent_channels")
ENCODER += ("norm_num_groups", "use_quant_conv", "mid_block_add_attention")


class AutoencoderConfig(StoredConfig):
    """A folder that diffusers saved, or a hub id. Scale and shift default to those in its configuration."""

    kind: Literal["autoencoder-kl"] = "autoencoder-kl"
    tile_above: int = Field(
        default=1024, ge=64, description="larger images are processed in tiles of this many pixels a side"
    )

    def build(self) -> "Autoencoder":
        return Autoencoder(self)


class Autoencoder(StoredCodec):
    """diffusers' AutoencoderKL. The posterior is a normal distribution, independent for each latent."""

    stochastic = True

    def __init__(self, config: AutoencoderConfig) -> None:
        self.config = config
        self.network = self.vae = pretrained(_autoencoder_kl(), config).eval().requires_grad_(False)
        self.pixel_channels = int(self.vae.config.in_channels)
        self.latent_channels = int(self.vae.config.latent_channels)
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._set_normalization(config, *_scale_and_shift(self.vae.config))
        # Tiles are as large as the largest image processed whole, not as the images it was trained on (256 for most):
        # group norms compute statistics per tile, so small tiles would differ in color and contrast.
        self.vae.tile_latent_min_size = config.tile_above // self.factor
        self.vae.tile_sample_min_size = self.vae.tile_latent_min_size * self.factor
        self.vae.enable_tiling()

    @torch.no_grad()
    @by_frame
    def moments(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> [B, 2C, h, w]: mean and standard deviation of the posterior"""
        posterior = self.vae.encode(pixels).latent_dist
        return torch.cat((posterior.mean, posterior.std), dim=1)

    @torch.no_grad()
    @by_frame
    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] -> pixels [B, 3, H, W], about -1 .. 1"""
        return self.vae.decode(latents / self.scale + self.shift).sample

    def fingerprint(self) -> str:
        """A hash of the encoder, its configuration and the tile size."""
        facts = {name: self.vae.config.get(name) for name in ENCODER}
        facts |= {"kind": self.config.kind, "tile_above": self.config.tile_above}
        encoder = [pair for pair in self.vae.state_dict().items() if pair[0].startswith(("encoder.", "quant_conv."))]
        return digest(facts, encoder)

    def save(self, folder: Path) -> None:
        """Write the autoencoder as a diffusers folder, for `AutoencoderConfig(source=folder)`."""
        write(self.vae, folder, self.scale, self.shift)


class AutoencoderShape(Settings):
    """The architecture of a KL autoencoder to train."""

    channels: tuple[PositiveInt, ...] = Field(
        default=(16, 32, 64),
        min_length=1,
        description="of the layers at each resolution; each resolution is half the one before",
    )
    latent_channels: PositiveInt = 4
    layers: PositiveInt = Field(default=1, description="residual blocks at each resolution; the decoder has one more")
    groups: PositiveInt = Field(default=8, description="of the group norms")
    attention: Literal["none", "middle"] = Field(default="none", description="middle: at the lowest resolution")

    @model_validator(mode="after")
    def _divisible(self) -> "AutoencoderShape":
        if indivisible := [width for width in self.channels if width % self.groups]:
            raise ValueError(f"channels {indivisible[0]} is not a multiple of groups {self.groups}")
        return self

    @property
    def factor(self) -> int:
        """Pixels per latent, along each axis."""
        return 2 ** (len(self.channels) - 1)

    def build(self, pixel_channels: int) -> Any:
        """diffusers' AutoencoderKL, with initial weights from torch's global generator. Raises TesseraError."""
        return _autoencoder_kl()(
            in_channels=pixel_channels,
            out_channels=pixel_channels,
            down_block_types=("DownEncoderBlock2D",) * len(self.channels),
            up_block_types=("UpDecoderBlock2D",) * len(self.channels),
            block_out_channels=self.channels,
            layers_per_block=self.layers,
            latent_channels=self.latent_channels,
            norm_num_groups=self.groups,
            mid_block_add_attention=self.attention == "middle",
        )


def write(network: Any, folder: Path, scale: float | Tensor, shift: float | Tensor) -> None:
    """Write diffusers' AutoencoderKL as a folder, with the scale and shift of its latents (numbers, or [C, 1, 1])."""
    network.register_to_config(**_diffusers_config(scale, shift, network.config.latent_channels))
    network.save_pretrained(folder, safe_serialization=True)


def _scale_and_shift(config: Any) -> tuple[Numbers, Numbers]:
    """From diffusers' configuration: statistics per channel, where there are any, and the factor."""
    scale, shift = float(config.scaling_factor), float(config.get("shift_factor") or 0.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return scale, shift
    return tuple(scale / float(number) for number in std), tuple(float(number) for number in mean)


def _diffusers_config(scale: float | Tensor, shift: float | Tensor, channels: int) -> dict[str, Any]:
    """A scale and a shift, as diffusers' configuration stores them."""
    if isinstance(scale, float) and isinstance(shift, float):
        return {"scaling_factor": scale, "shift_factor": shift or None, "latents_mean": None, "latents_std": None}
    ones = torch.ones(channels, 1, 1, dtype=torch.float64)
    return {
        "scaling_factor": 1.0,
        "shift_factor": None,
        "latents_mean": listed_numbers((ones * 0 + shift).cpu()),
        "latents_std": listed_numbers((ones / scale).cpu()),
    }


def _autoencoder_kl() -> Any:
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError:
        raise TesseraError("an autoencoder needs diffusers: pip install 'tessera[diffusers]'") from None
    return AutoencoderKL
