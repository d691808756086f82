"""The one thing a sampler asks: what are x0 and eps at (x, t)? Guidance is folded in here.

Shapes: B batch, C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tessera.conditioning import Condition, NetworkFunction
from tessera.diffusion import DiffusionProcess
from tessera.diffusion.prediction import Prediction
from tessera.sampling.guidance import AnyGuidanceSchedule, ConstantGuidance

Noise = Callable[[], Tensor]  # a fresh standard normal tensor shaped like x at every call


class Denoise(Protocol):
    """What a step may ask for. process gives alpha, sigma and the reverse distribution at any time."""

    process: DiffusionProcess

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        """x [B, C, ...], t [B] -> Prediction"""
        ...


@dataclass(frozen=True)
class GuidanceModel:
    """What guidance leads away from: a network, and what it is told.

    The same network told nothing is classifier-free guidance (Ho & Salimans 2022); a worse network told the same is
    autoguidance (Karras et al. 2024, "Guiding a diffusion model with a bad version of itself").
    """

    network: NetworkFunction
    condition: Condition


class Denoiser:
    """A network under its process, told a condition, guided away from what a guide says.

    guidance: guide + guidance (told - guide), one number or one per row [B]; 1 is off and costs nothing.
    channels: guide the first so many mean channels only; "all" is right for any model, 3 repeats the official code.
    guide: by default the network itself, told nothing, asked in one batch with the told half.
    interval: guide at times low <= t <= high only, and ask the guide nowhere else (Kynkaanniemi et al. 2024, "Applying
    guidance in a limited interval").
    schedule: how much of the guidance counts at which time.
    rescale: 0 to 1, how far each guided picture gets the standard deviation of the told half (Lin et al. 2024, "Common
    diffusion noise schedules and sample steps are flawed", section 3.4).
    The variance comes from the told half. Times are CPU tensors: what a step asks for is decided without waiting for
    the device.
    """

    def __init__(
        self,
        network: NetworkFunction,
        process: DiffusionProcess,
        condition: Condition,
        guidance: float | Tensor = 1.0,
        channels: int | Literal["all"] = "all",
        *,
        guide: GuidanceModel | None = None,
        interval: tuple[float, float] | None = None,
        schedule: AnyGuidanceSchedule | None = None,
        rescale: float = 0.0,
    ) -> None:
        self.network = network
        self.process = process
        self.condition = condition
        self.guidance = torch.as_tensor(guidance, dtype=torch.float32).cpu()
        self.guided = bool((self.guidance != 1).any())
        self.channels = channels
        self.guide = guide
        self.interval = interval
        self.schedule = schedule or ConstantGuidance()
        self.rescale = rescale
        self._both = Condition.cat((condition, condition.null())) if self.guided and guide is None else condition

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        """x [B, C, ...], t [B] -> Prediction"""
        return self.process.predict(self.raw(x, t), x, t)

    def scale(self, t: Tensor) -> Tensor:
        """The guidance of each row at its time. t [B] on the CPU -> float32 [B]"""
        share = self.schedule.weight(t.to(torch.float32))
        if self.interval is not None:
            share = torch.where((t >= self.interval[0]) & (t <= self.interval[1]), share, 0)
        return torch.lerp(torch.ones_like(self.guidance), self.guidance, share)  # exact at shares of 0 and 1

    def raw(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's raw output [B, outputs, ...], guided."""
        time = self.process.model_time(t).to(x.device, non_blocking=x.is_cuda)
        scale = self.scale(t) if self.guided else None
        if scale is None or bool((scale == 1).all()):
            return self.network(x, time, self.condition).to(x.dtype)
        told, guide = self._halves(x, time)
        count = x.shape[1] if self.channels == "all" else min(self.channels, x.shape[1])
        scale = scale.to(told.device, told.dtype, non_blocking=x.is_cuda).view(-1, *(1,) * (x.ndim - 1))
        mixed = torch.lerp(guide[:, :count], told[:, :count], scale)
        if not self.rescale:
            return torch.cat((mixed, told[:, count:]), dim=1)
        mixed, before = torch.cat((mixed, told[:, count : x.shape[1]]), dim=1), told[:, : x.shape[1]]
        spread = mixed.flatten(1).std(dim=1)
        # A fresh network says zeros: there is nothing to rescale.
        ratio = torch.where(spread > 0, before.flatten(1).std(dim=1) / spread, 1)
        factor = torch.lerp(torch.ones_like(ratio), ratio, self.rescale).view_as(scale)
        return torch.cat((torch.where(scale == 1, before, factor * mixed), told[:, x.shape[1] :]), dim=1)

    def _halves(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """What the network says, and what its guide says."""
        if self.guide is None:
            told, untold = self.network(torch.cat((x, x)), torch.cat((time, time)), self._both).to(x.dtype).chunk(2)
            return told, untold
        told = self.network(x, time, self.condition).to(x.dtype)
        return told, self.guide.network(x, time, self.guide.condition).to(x.dtype)
