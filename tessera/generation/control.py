"""Control images of a request: which of the model's controls they are for, and how strong.

Shapes: B rows, K controls of the network, C channels, H W height and width of the pixels, h w those of the latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tessera.adapters import ControlConfig
from tessera.errors import TesseraError
from tessera.model import Model
from tessera.settings import unknown_name, validate


@dataclass(frozen=True)
class ControlInput:
    """images: uint8 [B, H, W, C], one for each row, or [H, W, C] for all. The model makes its control images of them,
    as in training. is_map: they are such control images already, for example a sketch of edges. strength: 1 is that of
    training; one number, or one for each row."""

    images: np.ndarray
    strength: float | Sequence[float] = 1.0
    is_map: bool = False

    @property
    def rows(self) -> np.ndarray:
        """[B, H, W, C]"""
        images = np.asarray(self.images)
        return images[None] if images.ndim == 3 else images

    @property
    def strengths(self) -> Tensor:
        """float32 [B], or [1] for all rows"""
        return torch.as_tensor(self.strength, dtype=torch.float32).reshape(-1)


def encode_controls(
    model: Model, controls: Mapping[str, ControlInput], size: Sequence[int], num_rows: int, always: bool = False
) -> tuple[Tensor, Tensor] | None:
    """The control latents [B, K, C, h, w] of a request, NaN where it has none, and their strengths [B, K].

    size: (H, W) of the generated image. always: if it has none at all, too. Raises TesseraError.
    """
    names = list(model.network.controls)
    if unknown := [name for name in controls if name not in names]:
        if not names:
            raise TesseraError(
                f"this model has no control '{unknown[0]}': attach one, as in --adapter {unknown[0]}=PATH"
            )
        raise TesseraError(unknown_name("control", unknown[0], names))
    if not names or not (controls or always):
        return None
    codec, network = model.codec, model.config.network
    height, width = size[-2:]
    shape = (num_rows, len(names), network.in_channels, height // codec.factor, width // codec.factor)
    latents, strengths = torch.full(shape, torch.nan), torch.ones(shape[:2])
    for name, control in controls.items():
        images, number = control.rows, names.index(name)
        expected = (height, width, codec.pixel_channels)
        if images.dtype != np.uint8 or images.shape[1:] != expected:
            raise TesseraError(
                f"control {name} is {images.dtype} {list(images.shape[1:])} for each image; expected uint8 "
                f"{list(expected)}, the size of the generated image"
            )
        pixels = np.ascontiguousarray(np.moveaxis(images, -1, 1))
        if not control.is_map:
            pixels = _conversion(model, name).image(pixels)
        encoded = codec.encode(torch.from_numpy(pixels).to(model.device, torch.float32) / 127.5 - 1)
        latents[:, number] = encoded.cpu()  # one for all rows, or one for each
        strengths[:, number] = control.strengths
    if not strengths.isfinite().all():
        raise TesseraError("the strength of a control is a finite number")
    return latents, strengths


def _conversion(model: Model, name: str) -> ControlConfig:
    """The settings of a control, which state how its images are made."""
    info = model.adapters.get(name)
    if info is None or info.settings is None:
        raise TesseraError(
            f"how the images of control {name} are made is not recorded: give a control image itself (--control-map, "
            "or is_map=True)"
        )
    return validate(ControlConfig, info.settings, f"adapter {name}")
