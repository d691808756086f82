"""Guidance schedules (Wang et al. 2024, "Analysis of Classifier-Free Guidance Weight Schedulers").

The guidance scale at time t is 1 + (guidance_scale - 1) weight(t), so a scale of 1 stays 1 at every time. Time runs
from 0 (data) to 1 (noise). All schedules grow towards the data, as the paper found best.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from tessera.settings import Settings, expand_kind


class ConstantGuidance(Settings):
    """The same scale at every time."""

    kind: Literal["constant"] = "constant"

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class LinearGuidance(Settings):
    """From weight 0 at the noise to 2 at the data; the mean over all times is the guidance scale."""

    kind: Literal["linear"] = "linear"
    min_weight: NonNegativeFloat = Field(default=0.0, description="lower bound of the weight (clamp-linear)")

    def weight(self, t: Tensor) -> Tensor:
        return (2 * (1 - t)).clamp(min=self.min_weight)


class CosineGuidance(Settings):
    """Like linear, but flat at both ends."""

    kind: Literal["cosine"] = "cosine"
    min_weight: NonNegativeFloat = Field(default=0.0, description="lower bound of the weight (clamp-cosine)")

    def weight(self, t: Tensor) -> Tensor:
        return (1 + torch.cos(math.pi * t)).clamp(min=self.min_weight)


class PoweredCosineGuidance(Settings):
    """From weight 0 at the noise to 1 at the data; a higher power rises later (the paper's pcs)."""

    kind: Literal["powered-cosine"] = "powered-cosine"
    power: PositiveFloat = 2.0

    def weight(self, t: Tensor) -> Tensor:
        return (1 - torch.cos(math.pi * (1 - t) ** self.power)) / 2


AnyGuidanceSchedule = Annotated[
    ConstantGuidance | LinearGuidance | CosineGuidance | PoweredCosineGuidance,
    BeforeValidator(expand_kind),
    Field(discriminator="kind"),
]
