"""The codec that is none: the network sees pixels.

Shapes: B batch, C channels, H W height and width.
"""

from typing import Literal

from torch import Tensor

from tessera.settings import Settings


class PixelsConfig(Settings):
    """Latents are the pixels themselves, in -1 .. 1."""

    kind: Literal["pixels"] = "pixels"
    channels: Literal[1, 3] = 3

    def build(self) -> "Pixels":
        return Pixels(self)


class Pixels:
    """The identity on [B, C, H, W] in -1 .. 1, one (grey) or three (RGB) channels."""

    def __init__(self, config: PixelsConfig) -> None:
        self.config = config
        self.pixel_channels = self.latent_channels = config.channels
        self.factor = 1  # pixels per latent, along each axis

    def to(self, device) -> "Pixels":
        return self

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """pixels [B, C, H, W] -> the same"""
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, H, W] -> the same"""
        return latents
