"""The denoiser that a solver calls: x0 and eps at (x, t), with guidance applied.

Shapes: B batch, C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tessera.conditioning import Condition, NetworkFunction
from tessera.diffusion import DiffusionProcess
from tessera.diffusion.process import Prediction
from tessera.sampling.guidance import AnyGuidanceSchedule, ConstantGuidance

Noise = Callable[[], Tensor]  # returns a new standard normal tensor shaped like x at every call


class Denoise(Protocol):
    """What a solver needs. diffusion gives alpha, sigma and the reverse distribution at any time."""

    diffusion: DiffusionProcess

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        """x [B, C, ...], t [B] -> Prediction"""
        ...


@dataclass(frozen=True)
class GuidanceModel:
    """The network that guidance leads away from, and its condition.

    The same network without its condition is classifier-free guidance (Ho & Salimans 2022). A weaker network with the
    same condition is autoguidance (Karras et al. 2024, "Guiding a diffusion model with a bad version of itself").
    """

    network: NetworkFunction
    condition: Condition


class Denoiser:
    """A network under its diffusion process, with a condition and guidance.

    guidance_scale: weak + scale (cond - weak), one number or one per row [B]; 1 is off and costs nothing.
    guidance_channels: guide only the first so many mean channels; "all" suits any model, 3 repeats the official code.
    guidance_model: by default the network itself, unconditional, evaluated in one batch with the conditional half.
    guidance_interval: guide only at times low <= t <= high, and skip the guidance model elsewhere (Kynkaanniemi et al.
    2024, "Applying guidance in a limited interval").
    guidance_schedule: how the guidance scale changes over time.
    guidance_rescale: 0 to 1, how far each guided output gets the standard deviation of the conditional one (Lin et al.
    2024, "Common diffusion noise schedules and sample steps are flawed", section 3.4).
    The variance is that of the conditional output. Times are CPU tensors, so no decision waits for the device.
    """

    def __init__(
        self,
        network: NetworkFunction,
        diffusion: DiffusionProcess,
        condition: Condition,
        guidance_scale: float | Tensor = 1.0,
        guidance_channels: int | Literal["all"] = "all",
        *,
        guidance_model: GuidanceModel | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_schedule: AnyGuidanceSchedule | None = None,
        guidance_rescale: float = 0.0,
    ) -> None:
        self.network = network
        self.diffusion = diffusion
        self.condition = condition
        self.guidance_scale = torch.as_tensor(guidance_scale, dtype=torch.float32).cpu()
        self.guided = bool((self.guidance_scale != 1).any())
        self.guidance_channels = guidance_channels
        self.guidance_model = guidance_model
        self.guidance_interval = guidance_interval
        self.guidance_schedule = guidance_schedule or ConstantGuidance()
        self.guidance_rescale = guidance_rescale
        if self.guided and guidance_model is None:
            self._cond_and_null = Condition.cat((condition, condition.null()))

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        """x [B, C, ...], t [B] -> Prediction"""
        return self.diffusion.predict(self.raw(x, t), x, t)

    def scale(self, t: Tensor) -> Tensor:
        """The guidance scale of each row at its time. t [B] on the CPU -> float32 [B]"""
        weight = self.guidance_schedule.weight(t.to(torch.float32))
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            weight = torch.where((t >= low) & (t <= high), weight, 0)
        return torch.lerp(torch.ones_like(self.guidance_scale), self.guidance_scale, weight)  # exact at weights 0 and 1

    def raw(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's raw output [B, out_channels, ...], guided."""
        model_time = self.diffusion.model_time(t).to(x.device, non_blocking=x.is_cuda)
        scale = self.scale(t) if self.guided else None
        if scale is None or bool((scale == 1).all()):
            return self.network(x, model_time, self.condition).to(x.dtype)
        cond, weak = self._cond_and_weak(x, model_time)
        channels = x.shape[1]
        count = channels if self.guidance_channels == "all" else min(self.guidance_channels, channels)
        scale = scale.to(cond.device, cond.dtype, non_blocking=x.is_cuda).view(-1, *(1,) * (x.ndim - 1))
        guided = torch.cat((torch.lerp(weak[:, :count], cond[:, :count], scale), cond[:, count:channels]), dim=1)
        if self.guidance_rescale:
            guided = self._rescaled(guided, cond[:, :channels], scale)
        return torch.cat((guided, cond[:, channels:]), dim=1)

    def _rescaled(self, guided: Tensor, cond: Tensor, scale: Tensor) -> Tensor:
        std = guided.flatten(1).std(dim=1)
        # A new network outputs zeros: there is nothing to rescale.
        ratio = torch.where(std > 0, cond.flatten(1).std(dim=1) / std, 1)
        factor = torch.lerp(torch.ones_like(ratio), ratio, self.guidance_rescale).view_as(scale)
        return torch.where(scale == 1, cond, factor * guided)

    def _cond_and_weak(self, x: Tensor, model_time: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the network with its condition, and of the guidance model."""
        if self.guidance_model is None:
            raw = self.network(torch.cat((x, x)), torch.cat((model_time, model_time)), self._cond_and_null)
            cond, weak = raw.to(x.dtype).chunk(2)
            return cond, weak
        cond = self.network(x, model_time, self.condition).to(x.dtype)
        return cond, self.guidance_model.network(x, model_time, self.guidance_model.condition).to(x.dtype)
