"""What every codec has: raw moments of a picture, and latents of about unit variance made of them.

Raw moments know nothing of scale and shift, so that what was stored of them outlives a change of either.

Shapes: B batch, C latent channels, H W height and width of the pixels, h w those of the latents: H = h f, W = w f.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor

from tessera.errors import TesseraError
from tessera.settings import Settings

Numbers = float | tuple[float, ...]  # one for all channels, or one for each


class StoredConfig(Settings):
    """A codec whose weights lie in a folder or on a hub: latents = (raw - shift) * scale."""

    source: str = Field(description="a folder, or a hub id such as stabilityai/sd-vae-ft-ema")
    subfolder: str | None = None
    revision: str | None = None
    scale: Numbers | None = Field(
        default=None, description="of the latents: a number, or one per channel; null: what the source says"
    )
    shift: Numbers | None = Field(
        default=None, description="taken off before scaling: a number, or one per channel; null: what the source says"
    )

    def build(self) -> "StoredCodec":
        """The codec, its weights read. Raises TesseraError."""
        raise NotImplementedError

    @field_validator("scale")
    @classmethod
    def _positive(cls, scale: Numbers | None) -> Numbers | None:
        if scale is not None and not all(number > 0 for number in _several(scale)):
            raise ValueError("a scale is greater than 0")
        return scale

    @property
    def folder(self) -> Path | None:
        """Where the weights lie on this machine; None: on a hub."""
        folder = Path(self.source).expanduser() / (self.subfolder or "")
        return folder if folder.is_dir() else None


class Codec(ABC):
    """Pixels in -1 .. 1 to latents of about unit variance, and back. Nothing of it is trained."""

    pixel_channels: int
    latent_channels: int
    factor: int  # pixels per latent, along each axis
    stochastic: bool = False  # whether the moments have a deviation, so that training draws from a posterior
    scale: float | Tensor = 1.0  # a number, or [C, 1, 1]
    shift: float | Tensor = 0.0

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Move everything there."""

    @abstractmethod
    def moments(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> [B, 2C, h, w]: mean and standard deviation of the posterior, neither scaled nor
        shifted; the deviation is 0 where latents follow from pixels."""

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """moments [B, 2C, h, w], of any precision -> latents float32 [B, C, h, w]: of the mean, or with standard normal
        noise of the latents' shape of a draw from the posterior, as in training. Means alone [B, C, h, w] will do,
        where there is no deviation."""
        mean, deviation = moments[:, : self.latent_channels].float(), moments[:, self.latent_channels :]
        raw = mean if noise is None or not self.stochastic else mean + deviation.float() * noise
        return (raw - self.shift) * self.scale

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """pixels [B, 3, H, W] -> latents [B, C, h, w]"""
        return self.latents(self.moments(pixels), noise)

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] -> pixels [B, 3, H, W], about -1 .. 1"""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash, as hexadecimal sha256, of all that raw moments depend on beside the pixels; not of the decoder, and
        not of scale and shift."""


class StoredCodec(Codec):
    """A codec with weights."""

    network: Any  # an nn.Module with all the weights, of encoder and decoder

    def to(self, device: torch.device | str) -> Self:
        self.network.to(device)
        self.scale, self.shift = (
            number.to(device) if isinstance(number, Tensor) else number for number in (self.scale, self.shift)
        )
        return self

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the weights, with scale and shift where the format has a place for them, as a `source` to read."""

    def _normalise(self, told: StoredConfig, scale: Numbers, shift: Numbers) -> None:
        """Take scale and shift from the settings, else as the source has them. Raises TesseraError."""
        self.scale = self._per_channel("codec.scale", scale if told.scale is None else told.scale)
        self.shift = self._per_channel("codec.shift", shift if told.shift is None else told.shift)

    def _per_channel(self, name: str, told: Numbers) -> float | Tensor:
        if isinstance(told, int | float):
            return float(told)
        if len(told) != self.latent_channels:
            raise TesseraError(
                f"{name} has {len(told)} numbers, but the latents have {self.latent_channels} channels: "
                f"give one number, or {self.latent_channels}"
            )
        return torch.tensor(told, dtype=torch.float32)[:, None, None]


def pretrained(network: Any, config: StoredConfig) -> Any:
    """A network of diffusers (its class) with the weights of a source. Raises TesseraError if they cannot be read."""
    place = {"subfolder": config.subfolder} if config.subfolder else {}
    if config.revision:
        place["revision"] = config.revision
    # Older folders hold a pickle alone; diffusers reads it with weights_only, so that it cannot run a program.
    folder = config.folder
    pickled = folder is not None and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))
    source = str(Path(config.source).expanduser()) if folder else config.source
    try:
        # Such networks are small: no need of accelerate, of whose absence diffusers would warn.
        return network.from_pretrained(source, use_safetensors=not pickled, low_cpu_mem_usage=False, **place)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise TesseraError(
            f"cannot load the autoencoder '{config.source}': {reason}\n"
            f"give a folder written by diffusers' {network.__name__}.save_pretrained, or a hub id this machine can "
            "reach"
        ) from None


def digest(facts: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A sha256 over settings and tensors, in the order of their names, as hexadecimal."""
    whole = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def listed_numbers(number: float | Tensor) -> float | list[float]:
    """A scale or shift as JSON and YAML hold it."""
    return number.flatten().tolist() if isinstance(number, Tensor) else number


def _several(told: Numbers) -> tuple[float, ...]:
    return (told,) if isinstance(told, int | float) else told
