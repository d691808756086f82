"""The identity codec: the network works on pixels.

Shapes: B batch, C channels, H W height and width.
"""

from typing import Literal

import torch
from torch import Tensor

from tessera.codecs.codec import Codec, digest
from tessera.settings import Settings


class PixelsConfig(Settings):
    """Latents are the pixels themselves, in -1 .. 1."""

    kind: Literal["pixels"] = "pixels"
    channels: Literal[1, 3] = 3

    def build(self) -> "Pixels":
        return Pixels(self)


class Pixels(Codec):
    """The identity on [B, C, H, W] or [B, C, T, H, W] in -1 .. 1, one (gray) or three (RGB) channels."""

    def __init__(self, config: PixelsConfig) -> None:
        self.config = config
        self.pixel_channels = self.latent_channels = config.channels
        self.factor = 1  # pixels per latent, along each axis

    def to(self, device: torch.device | str) -> "Pixels":
        return self

    def moments(self, pixels: Tensor) -> Tensor:
        """pixels [B, C, H, W] -> [B, 2C, H, W]: the pixels, and deviations of 0"""
        return torch.cat((pixels, torch.zeros_like(pixels)), dim=1)

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """pixels [B, C, H, W], unchanged"""
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, H, W], unchanged"""
        return latents

    def fingerprint(self) -> str:
        """Of the kind and the number of channels."""
        return digest({"kind": self.config.kind, "channels": self.config.channels}, [])
