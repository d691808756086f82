"""The reverse stochastic differential equation with any amount of noise (Ma et al. 2024, "SiT", section 2.4)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tessera.diffusion import DiffusionProcess
from tessera.sampling.denoiser import Noise
from tessera.sampling.euler import ddim_update
from tessera.sampling.solver import Solver, Step
from tessera.times import expand


class SDE(Solver):
    """dx = (v + w eps / (2 sigma)) dt + sqrt(w) dB, from noise to data, with w = 2 strength diffusion(t). First order.

    Every w gives the same distribution at every time. More noise corrects more of the earlier errors and needs more
    steps. Given x0, the noise in x is an Ornstein-Uhlenbeck process, whose step is known in closed form. That step is
    stable near the data, where long Euler-Maruyama steps (its limit) are not. It scales the noise by
    exp(-integral of w / sigma^2 / 2) and adds new noise up to sigma; the step to 0 takes the mean. With constant
    diffusion the order is only 1/2: near the data one step replaces the noise many times.
    """

    kind: Literal["sde"] = "sde"
    diffusion: Literal["sigma", "linear", "constant"] = Field(
        default="sigma", description="how much noise is added at time t, times strength: sigma(t), t or 1"
    )
    strength: float = Field(default=1.0, ge=0)

    @property
    def convergence_order(self) -> float:
        return 0.5 if self.diffusion == "constant" and self.strength else 1

    def step(
        self, diffusion: DiffusionProcess, x: Tensor, t: Tensor, s: Tensor, memory: None, noise: Noise
    ) -> Step[None]:
        """One step from t to s. x [B, ...], t and s [B] or [B, T]."""
        prediction = yield x, t
        sigma_t, sigma_s = diffusion.sigma(t), diffusion.sigma(s)
        # The integral, by the geometric mean of both ends: exact for constant on the linear path, infinite at s = 0.
        rate_t, rate_s = {"sigma": (sigma_t, sigma_s), "linear": (t, s)}.get(self.diffusion, (sigma_t**0, sigma_s**0))
        integral = 2 * self.strength * (t - s).double() * (rate_t * rate_s).double().sqrt() / (sigma_t * sigma_s)
        new_fraction = -torch.expm1(-integral) if self.strength else torch.zeros_like(sigma_s)
        std = torch.where(s > 0, sigma_s * new_fraction.sqrt(), 0)
        return ddim_update(diffusion, prediction, s, std) + expand(std, x) * noise(), memory
