"""Base classes of all codecs: raw moments of an image, and latents of about unit variance computed from them.

Raw moments do not depend on scale and shift, so stored moments stay valid when either changes.

Shapes: B batch, C latent channels, H W height and width of the pixels, h w those of the latents: H = h f, W = w f.
"""

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from tessera.checkpoint_files import find_weight_files
from tessera.errors import TesseraError
from tessera.settings import Settings, as_tuple

Method = TypeVar("Method", bound=Callable[..., Tensor])
Numbers = float | tuple[float, ...]  # one for all channels, or one for each


class StoredConfig(Settings):
    """A codec whose weights are in a folder or on a hub: latents = (raw - shift) * scale."""

    source: str = Field(description="a folder, or a hub id such as stabilityai/sd-vae-ft-ema")
    subfolder: str | None = None
    revision: str | None = None
    scale: Numbers | None = Field(
        default=None, description="of the latents: a number, or one per channel; null: as in the source"
    )
    shift: Numbers | None = Field(
        default=None, description="subtracted before scaling: a number, or one per channel; null: as in the source"
    )

    def build(self) -> "StoredCodec":
        """Load the codec with its weights. Raises TesseraError."""
        raise NotImplementedError

    @field_validator("scale")
    @classmethod
    def _positive(cls, scale: Numbers | None) -> Numbers | None:
        if scale is not None and not all(number > 0 for number in as_tuple(scale)):
            raise ValueError("a scale must be greater than 0")
        return scale

    @property
    def folder(self) -> Path | None:
        """The local folder of the weights; None if they are on a hub."""
        folder = Path(self.source).expanduser() / (self.subfolder or "")
        return folder if folder.is_dir() else None


class Codec(ABC):
    """Pixels in -1 .. 1 to latents of about unit variance, and back. A codec is not trained with the network.

    Clips have an axis of T frames before H and W. A codec of images encodes and decodes each frame by itself.
    """

    pixel_channels: int
    latent_channels: int
    factor: int  # pixels per latent, along height and width
    frame_factor: int = 1  # frames of pixels per frame of latents, after the first
    stochastic: bool = False  # whether the moments have a deviation, so that training samples from a posterior
    scale: float | Tensor = 1.0  # a number, or [C, 1, 1]
    shift: float | Tensor = 0.0

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Move all tensors to a device."""

    @abstractmethod
    def moments(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> [B, 2C, h, w]: mean and standard deviation of the posterior, neither scaled nor
        shifted; the deviation of a deterministic codec is 0."""

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """moments [B, 2C, h, w], of any precision -> latents float32 [B, C, h, w].

        The latents are the mean of the posterior, or a sample of it if noise (standard normal, shaped like the latents)
        is passed, as in training. Means alone [B, C, h, w] are enough where there is no deviation.
        """
        mean, deviation = moments[:, : self.latent_channels].float(), moments[:, self.latent_channels :]
        raw = mean if noise is None or not self.stochastic else mean + deviation.float() * noise
        return (raw - match_axes(self.shift, raw)) * match_axes(self.scale, raw)

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """pixels [B, 3, H, W] -> latents [B, C, h, w]"""
        return self.latents(self.moments(pixels), noise)

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w] -> pixels [B, 3, H, W], about -1 .. 1"""

    def latent_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """The size of the latents of an image (H, W) or a clip (T, H, W) in pixels. Raises TesseraError if it has none.

        The first frame of a clip is one frame of latents, and each frame_factor frames after it are another one.
        """
        *frames, height, width = size
        if height % self.factor or width % self.factor:
            raise TesseraError(f"size {height} x {width} is not a multiple of {self.factor}, as the codec needs")
        if frames and (frames[0] - 1) % self.frame_factor:
            raise TesseraError(
                f"frames {frames[0]} is not one more than a multiple of {self.frame_factor}, as the codec needs"
            )
        frames = [(count - 1) // self.frame_factor + 1 for count in frames]
        return *frames, height // self.factor, width // self.factor

    def pixel_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """The size in pixels of the image or clip that latents of a size are decoded to."""
        *frames, height, width = size
        frames = [(count - 1) * self.frame_factor + 1 for count in frames]
        return *frames, height * self.factor, width * self.factor

    @abstractmethod
    def fingerprint(self) -> str:
        """A hexadecimal sha256 of everything beside the pixels that raw moments depend on: not the decoder, scale or
        shift."""


def match_axes(number: float | Tensor, x: Tensor) -> float | Tensor:
    """A number for each channel [C, 1, 1] shaped to be combined with x [B, C, H, W] or [B, C, T, H, W]."""
    return number.view(-1, *(1,) * (x.ndim - 2)) if isinstance(number, Tensor) and number.ndim else number


def by_frame(method: Method) -> Method:
    """A method of a codec of images x [B, C, H, W], applied to each frame of a clip [B, C, T, H, W] by itself."""

    @functools.wraps(method)
    def apply(self: Any, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return method(self, x)
        frames = method(self, x.movedim(2, 1).flatten(0, 1))
        return frames.unflatten(0, (x.shape[0], x.shape[2])).movedim(1, 2)

    return apply  # pyright: ignore[reportReturnType]


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
        """Write the weights as a folder that `source` can name, with scale and shift if its format can hold them."""

    def _set_normalization(self, config: StoredConfig, scale: Numbers, shift: Numbers) -> None:
        """Set scale and shift, from the settings if they have them, else from the source. Raises TesseraError."""
        self.scale = self._per_channel("codec.scale", scale if config.scale is None else config.scale)
        self.shift = self._per_channel("codec.shift", shift if config.shift is None else config.shift)

    def _per_channel(self, name: str, value: Numbers) -> float | Tensor:
        if isinstance(value, int | float):
            return float(value)
        if len(value) != self.latent_channels:
            raise TesseraError(
                f"{name} has {len(value)} numbers, but the latents have {self.latent_channels} channels: "
                f"give one number, or {self.latent_channels}"
            )
        return torch.tensor(value, dtype=torch.float32)[:, None, None]


def pretrained(network: Any, config: StoredConfig) -> Any:
    """A diffusers network of a class, with the weights of a source. Raises TesseraError if they cannot be read."""
    options = {"subfolder": config.subfolder, "revision": config.revision}
    # Older folders hold only a pickle; diffusers reads it with weights_only, so it cannot run a program.
    folder = config.folder
    files = None if folder is None else find_weight_files(folder)
    pickled = files is not None and files.files[0].suffix == ".bin"
    options["variant"] = None if files is None else files.variant
    source = str(Path(config.source).expanduser()) if folder else config.source
    try:
        # Autoencoders are small: without low_cpu_mem_usage diffusers does not warn that accelerate is missing.
        options = {name: value for name, value in options.items() if value}
        return network.from_pretrained(source, use_safetensors=not pickled, low_cpu_mem_usage=False, **options)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise TesseraError(
            f"cannot load the autoencoder '{config.source}': {reason}\n"
            f"give a folder written by diffusers' {network.__name__}.save_pretrained, or a hub id this machine can "
            "reach"
        ) from None


def digest(facts: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The hexadecimal sha256 of settings and tensors, in the order of their names."""
    sha256 = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        sha256.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def listed_numbers(number: float | Tensor) -> float | list[float]:
    """A scale or shift, as JSON and YAML store it."""
    return number.flatten().tolist() if isinstance(number, Tensor) else number
