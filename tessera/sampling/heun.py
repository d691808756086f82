"""Heun's method: an Euler step, then a step along the mean of the directions at both of its ends."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from tessera.diffusion import DiffusionProcess
from tessera.sampling.denoiser import Noise
from tessera.sampling.euler import ddim_update
from tessera.sampling.solver import Solver, Step
from tessera.times import expand


class Heun(Solver):
    """Second order; two calls of the denoiser per step, one in the step that ends at the data.

    On any path dx = x0 d(alpha) + eps d(sigma). The trapezoid rule is applied to both integrals, so no derivative of
    alpha or sigma is needed and no division by them. On the linear path of flow matching this is the classical method
    along the velocity (Karras et al. 2022, algorithm 1; Ma et al. 2024, "SiT").
    """

    kind: Literal["heun"] = "heun"
    calls_per_step: ClassVar[int] = 2

    @property
    def convergence_order(self) -> float:
        return 2

    def step(
        self, diffusion: DiffusionProcess, x: Tensor, t: Tensor, s: Tensor, memory: None, noise: Noise
    ) -> Step[None]:
        """One step from t to s. x [B, ...], t and s [B] or [B, T]; rows at s = 0 take the Euler step."""
        prediction_t = yield x, t
        x = ddim_update(diffusion, prediction_t, s)
        inside = s > 0
        if not inside.any():
            return x, memory
        prediction_s = yield x, torch.where(inside, s, t)  # networks are not trained at time 0
        half_d_alpha = 0.5 * inside * (diffusion.alpha(s) - diffusion.alpha(t))
        half_d_sigma = 0.5 * inside * (diffusion.sigma(s) - diffusion.sigma(t))
        x = x + expand(half_d_alpha, x) * (prediction_s.x0 - prediction_t.x0)
        return x + expand(half_d_sigma, x) * (prediction_s.eps - prediction_t.eps), memory
