"""Guidance of each row of a batch: how outputs are combined, how much at which time.

Guidance leads away from one or more weaker predictions. With the conditional output `cond` and, for each of K terms, a
weak output and a scale,

    guided = cond + sum over k of (scale_k - 1) (cond - weak_k)

With one term whose weak output has no condition, this is classifier-free guidance (Ho & Salimans 2022), usually written
weak + scale (cond - weak). A term for each condition, whose weak output lacks that condition alone, gives each a scale
of its own (as Brooks et al. 2023, "InstructPix2Pix", section 3.2, in other terms). A weak output of a weaker network is
autoguidance (Karras et al. 2024, "Guiding a diffusion model with a bad version of itself").

With a schedule (Wang et al. 2024, "Analysis of Classifier-Free Guidance Weight Schedulers"), the scale at time t is
1 + (guidance_scale - 1) weight(t), so a scale of 1 stays 1 at every time. Time runs from 0 (data) to 1 (noise). All
schedules grow towards the data, as the paper found best. Shapes: B rows, T frames, C channels, K terms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from tessera.rows import Rows, pad
from tessera.settings import Settings, expand_kind
from tessera.times import expand

NO_LIMIT = 2**31  # more channels than any output has


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


@dataclass(frozen=True)
class Guidance(Rows):
    """The guidance of each row. Tensors are on the CPU, so no decision waits for the device."""

    scale: Tensor = field(metadata=pad(1))  # [B, K] of each term; 1 is off
    interval: Tensor  # float64 [B, 2] lowest and highest time with guidance
    rescale: Tensor  # [B] from 0 to 1: how far a guided output gets the standard deviation of the conditional one
    channels: Tensor  # int64 [B] guided are only the first so many
    schedule: list[AnyGuidanceSchedule]  # [B]

    @staticmethod
    def build(
        num_rows: int,
        scale: float | Tensor = 1.0,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
        channels: int | Literal["all"] = "all",
        schedule: AnyGuidanceSchedule | None = None,
    ) -> "Guidance":
        """The same for all rows. scale: one number, one for each row [B], or one for each row and term [B, K]"""
        scales = torch.as_tensor(scale, dtype=torch.float32).cpu()
        scales = scales.expand(num_rows)[:, None] if scales.ndim < 2 else scales.expand(num_rows, -1)
        return Guidance(
            scales,
            torch.tensor(interval or (0.0, 1.0), dtype=torch.float64).expand(num_rows, 2),
            torch.full((num_rows,), rescale, dtype=torch.float32),
            torch.full((num_rows,), NO_LIMIT if channels == "all" else channels, dtype=torch.int64),
            [schedule or ConstantGuidance()] * num_rows,
        )

    def scales_at(self, t: Tensor) -> list[Tensor]:
        """The scale of each term at times t [B] or [B, T] on the CPU: K tensors, float32 like t"""
        times = t.to(torch.float32)
        first = self.schedule[0]
        if all(schedule is first or schedule == first for schedule in self.schedule):
            weight = first.weight(times)
        else:
            weight = torch.stack([schedule.weight(time) for schedule, time in zip(self.schedule, times)])
        low, high = (bound.view(-1, *(1,) * (t.ndim - 1)) for bound in self.interval.unbind(1))
        weight = torch.where((t >= low) & (t <= high), weight, 0)
        scales = (scale.view(-1, *(1,) * (t.ndim - 1)) for scale in self.scale.unbind(1))
        return [torch.lerp(torch.ones_like(weight), scale, weight) for scale in scales]  # exact at weights 0 and 1

    def combine(self, cond: Tensor, weak: Sequence[Tensor], scales: Sequence[Tensor], channels: int) -> Tensor:
        """The guided output, like cond [B, O, ...]. scales: see `scales_at`, of the terms of weak

        Guided are the first `channels` of O, which predict the mean; those of the variance are conditional.
        """
        mean, factors = cond[:, :channels], [expand(scale, cond) for scale in scales]
        guided = torch.lerp(weak[0][:, :channels], mean, factors[0])
        for output, factor in zip(weak[1:], factors[1:]):
            guided = guided + (factor - 1) * (mean - output[:, :channels])
        if int(self.channels.min()) < channels:
            index = torch.arange(channels).view(-1, *(1,) * (cond.ndim - 2))
            limit = self.channels.view(-1, *(1,) * (cond.ndim - 1))
            guided = torch.where((index < limit).to(cond.device), guided, mean)
        if bool((self.rescale > 0).any()):
            guided = self._rescaled(guided, mean, factors)
        return torch.cat((guided, cond[:, channels:]), dim=1)

    def _rescaled(self, guided: Tensor, mean: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", section 3.4"""
        std = guided.flatten(1).std(dim=1)
        # A new network outputs zeros: there is nothing to rescale.
        ratio = torch.where(std > 0, mean.flatten(1).std(dim=1) / std, 1)
        factor = torch.lerp(torch.ones_like(ratio), ratio, self.rescale.to(ratio.device, ratio.dtype))
        unguided = torch.stack([scale == 1 for scale in torch.broadcast_tensors(*factors)]).all(dim=0)
        return torch.where(unguided, mean, expand(factor, mean) * guided)
