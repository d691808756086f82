"""The reverse stochastic differential equation with any amount of noise (Ma et al. 2024, "SiT", section 2.4)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tessera.diffusion.prediction import expand
from tessera.sampling.denoiser import Denoise, Noise
from tessera.sampling.euler import ddim_update
from tessera.sampling.solver import Solver


class SDE(Solver):
    """dx = (v + w eps / (2 sigma)) dt + sqrt(w) dB, from the noise down; w = 2 strength diffusion(t). First order.

    Every w has the same distributions at every time: more noise mends more of the errors made before, and costs more
    steps. Given x0 the noise in x is an Ornstein-Uhlenbeck process, whose step is known: it is taken as it is, so that
    long steps near the data stay stable where Euler-Maruyama, of which it has the limit, would not. Of the noise
    exp(-integral of w / sigma^2 / 2) is kept, and a fresh one fills it up to sigma; the step to 0 takes the mean. With
    diffusion constant the order is a half only: near the data it exchanges the noise many times in a step.
    """

    kind: Literal["sde"] = "sde"
    diffusion: Literal["sigma", "linear", "constant"] = Field(
        default="sigma", description="how much noise is drawn at time t, times strength: sigma(t), t or 1"
    )
    strength: float = Field(default=1.0, ge=0)

    def __call__(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: None, noise: Noise
    ) -> tuple[Tensor, None]:
        """One step from t to s. x [B, ...], t and s [B]."""
        process, predicted = denoise.process, denoise(x, t)
        sigma_t, sigma_s = process.sigma(t), process.sigma(s)
        # The integral by the geometric mean of both ends: exact for constant on the linear path, infinite at s = 0.
        here, there = {"sigma": (sigma_t, sigma_s), "linear": (t, s)}.get(self.diffusion, (sigma_t**0, sigma_s**0))
        exchanged = 2 * self.strength * (t - s).double() * (here * there).double().sqrt() / (sigma_t * sigma_s)
        share = -torch.expm1(-exchanged) if self.strength else torch.zeros_like(sigma_s)
        spread = torch.where(s > 0, sigma_s * share.sqrt(), 0)
        return ddim_update(process, predicted, s, spread) + expand(spread, x) * noise(), memory
