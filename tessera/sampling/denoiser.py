"""The one thing a sampler asks: what are x0 and eps at (x, t)? Guidance is folded in here.

Shapes: B batch, C channels.
"""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from tessera.conditions import Condition
from tessera.process import Process
from tessera.process.prediction import Prediction

Network = Callable[[Tensor, Tensor, Condition], Tensor]
Noise = Callable[[], Tensor]  # a fresh standard normal tensor shaped like x at every call


class Denoise(Protocol):
    """What a step may ask for. process gives alpha, sigma and the reverse distribution at any time."""

    process: Process

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        """x [B, C, ...], t [B] -> Prediction"""
        ...


class Denoiser:
    """A network under its process, told a condition, with classifier-free guidance (Ho & Salimans 2022).

    guidance: uncond + guidance (cond - uncond), one number or one per row [B]; 1 is off and costs nothing.
    channels: guide the first so many mean channels only; "all" is right for any model, 3 repeats the official code.
    The variance comes from the conditional half.
    """

    def __init__(
        self,
        network: Network,
        process: Process,
        condition: Condition,
        guidance: float | Tensor = 1.0,
        channels: int | Literal["all"] = "all",
    ) -> None:
        self.network = network
        self.process = process
        self.condition = condition
        self.guidance = torch.as_tensor(guidance, dtype=torch.float32)
        self.guided = bool((self.guidance != 1).any())
        self.channels = channels
        self._both = Condition.cat((condition, condition.null())) if self.guided else condition

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        """x [B, C, ...], t [B] -> Prediction"""
        return self.process.predict(self.raw(x, t), x, t)

    def raw(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's raw output [B, outputs, ...], guided."""
        time = self.process.network_time(t).to(x.device, non_blocking=x.is_cuda)
        if not self.guided:
            return self.network(x, time, self.condition).to(x.dtype)
        told, untold = self.network(torch.cat((x, x)), torch.cat((time, time)), self._both).to(x.dtype).chunk(2)
        count = x.shape[1] if self.channels == "all" else min(self.channels, x.shape[1])
        scale = self.guidance.to(told).view(-1, *(1,) * (x.ndim - 1))
        mixed = torch.lerp(untold[:, :count], told[:, :count], scale)
        return torch.cat((mixed, told[:, count:]), dim=1)
