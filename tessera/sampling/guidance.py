"""How much of the guidance counts at which time (Wang et al. 2024, "Analysis of Classifier-Free Guidance Weight
Schedulers").

A schedule is `share(t)`: guidance at t is 1 + (guidance - 1) share, so that a scale of 1 stays 1 at every time. Times
run from 0 (data) to 1 (noise); all schedules grow towards the data, as the paper found best.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from tessera.settings import Settings, by_kind


class ConstantGuidance(Settings):
    """The same at every time."""

    kind: Literal["constant"] = "constant"

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class LinearGuidance(Settings):
    """From nothing in the noise to twice as much at the data; the mean over all times is the guidance asked for."""

    kind: Literal["linear"] = "linear"
    least: NonNegativeFloat = Field(default=0.0, description="a share below this counts as this (clamp-linear)")

    def weight(self, t: Tensor) -> Tensor:
        return (2 * (1 - t)).clamp(min=self.least)


class CosineGuidance(Settings):
    """As linear, flat at both ends."""

    kind: Literal["cosine"] = "cosine"
    least: NonNegativeFloat = Field(default=0.0, description="a share below this counts as this (clamp-cosine)")

    def weight(self, t: Tensor) -> Tensor:
        return (1 + torch.cos(math.pi * t)).clamp(min=self.least)


class PoweredCosineGuidance(Settings):
    """From nothing in the noise to all of it at the data, the later the higher the power (the paper's pcs)."""

    kind: Literal["powered-cosine"] = "powered-cosine"
    power: PositiveFloat = 2.0

    def weight(self, t: Tensor) -> Tensor:
        return (1 - torch.cos(math.pi * (1 - t) ** self.power)) / 2


AnyGuidanceSchedule = Annotated[
    ConstantGuidance | LinearGuidance | CosineGuidance | PoweredCosineGuidance,
    BeforeValidator(by_kind),
    Field(discriminator="kind"),
]
