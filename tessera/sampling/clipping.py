"""Limits of the predicted x0: clipping, and dynamic thresholding.

Both belong to pixels in -1..1; latents have no such range. x0 alone is limited: the predicted noise stays as it is, as
in diffusers' schedulers. Shapes: B rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveFloat
from torch import Tensor

from tessera.diffusion.process import Prediction
from tessera.settings import Settings, expand_kind


class NoClipping(Settings):
    """x0 as predicted."""

    kind: Literal["none"] = "none"

    def limit(self, x0: Tensor) -> Tensor:
        return x0


class RangeClipping(Settings):
    """x0 between -range and range (Ho et al. 2020; diffusers' clip_sample)."""

    kind: Literal["range"] = "range"
    range: PositiveFloat = 1.0

    def limit(self, x0: Tensor) -> Tensor:
        return x0.clamp(-self.range, self.range)


class DynamicThresholding(Settings):
    """x0 between -s and s, divided by s: a quantile of each row's absolute values, from 1 to max_value.

    Saharia et al. 2022, "Imagen", section 2.3; diffusers' thresholding.
    """

    kind: Literal["dynamic"] = "dynamic"
    quantile: float = Field(default=0.995, gt=0, le=1, description="of the absolute values of a row")
    max_value: float = Field(default=1.0, ge=1, description="upper limit of s; 1 is the same as range")

    def limit(self, x0: Tensor) -> Tensor:
        ranked = x0.abs().flatten(1).float().sort(dim=1).values  # torch.quantile refuses more than 2^24 values
        position = self.quantile * (ranked.shape[1] - 1)
        low = int(position)
        s = torch.lerp(ranked[:, low], ranked[:, min(low + 1, ranked.shape[1] - 1)], position - low)
        s = s.clamp(1, self.max_value).to(x0.dtype).view(-1, *(1,) * (x0.ndim - 1))
        return x0.clamp(-s, s) / s


AnyClipping = Annotated[
    NoClipping | RangeClipping | DynamicThresholding, BeforeValidator(expand_kind), Field(discriminator="kind")
]


def clipped(prediction: Prediction, clipping: Sequence[AnyClipping]) -> Prediction:
    """A prediction with x0 limited as each row asks for. clipping [B]"""
    if all(isinstance(each, NoClipping) for each in clipping):
        return prediction
    x0 = prediction.x0
    if all(each == clipping[0] for each in clipping):
        return replace(prediction, x0=clipping[0].limit(x0))
    return replace(prediction, x0=torch.cat([each.limit(x0[row : row + 1]) for row, each in enumerate(clipping)]))
