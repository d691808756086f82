"""What a diffusion process is, and what it returns.

Shapes: B batch, C channels, O raw output channels.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tessera.rows import Rows
from tessera.times import expand


@dataclass(frozen=True)
class Prediction(Rows):
    """The meaning of a raw output at (x, t). Every target, velocity and score is linear in x0 and eps."""

    x0: Tensor  # [B, C, ...] the clean image
    eps: Tensor  # [B, C, ...] the noise in x
    var_fraction: Tensor | None = None  # [B, C, ...] learned log-variance, 0: the posterior's, 1: log beta


@dataclass(frozen=True)
class Losses:
    """Training losses of each sample [B]; `total` is minimized."""

    total: Tensor
    mse: Tensor
    vb: Tensor | None = None
    alignment: Tensor | None = None  # of features, see `tessera.training.alignment`


class DiffusionProcess(Protocol):
    """x_t = alpha(t) x0 + sigma(t) eps, from the data at t = 0 to noise at t = 1.

    Times t are [B], or [B, T] where the frames of a clip have their own, on the CPU. Images or clips and noise are
    [B, C, ...] and raw outputs [B, O, ...], on any device.
    """

    config: Any  # GaussianDiffusionConfig or FlowMatchingConfig

    @property
    def num_timesteps(self) -> int | None:
        """The number of times used in training; None if time is continuous."""

    def out_channels(self, channels: int) -> int:
        """Raw output channels O of a network for an input of C channels."""
        ...

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """Training times from uniform numbers in [0, 1): [B] -> [B]"""
        ...

    def model_time(self, t: Tensor) -> Tensor:
        """t in the units the network was trained in: float32 [B]"""
        ...

    def time_from_nsr(self, ratio: Tensor) -> Tensor:
        """The time at which sigma / alpha is ratio: [B] -> float64 [B]"""
        ...

    def alpha(self, t: Tensor) -> Tensor:
        """The factor of the data in x_t, float64 [B]"""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """The factor of the noise in x_t, float64 [B]"""
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, a sample of q(x_t | x0)"""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise

    def predict(self, raw: Tensor, x: Tensor, t: Tensor) -> Prediction:
        """A raw output at x and t, converted to x0 and eps"""
        ...

    def training_target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The target of the first C channels of a raw output"""
        ...

    def loss(self, raw: Tensor, x0: Tensor, noise: Tensor, t: Tensor, frames: Tensor | None = None) -> Losses:
        """The training losses of a raw output at x_t. frames: those of clips that have a loss, bool [B, T], for times
        [B, T]; None: all"""
        ...
