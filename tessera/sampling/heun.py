"""Heun's method: an Euler step, and then the mean of the directions at its two ends."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from tessera.diffusion.prediction import expand
from tessera.sampling.denoiser import Denoise, Noise
from tessera.sampling.euler import ddim_update
from tessera.sampling.solver import Solver


class Heun(Solver):
    """Second order; two calls of the denoiser a step, and one in the step that ends in the data.

    On any path dx = x0 d(alpha) + eps d(sigma), and the trapezoid rule is taken of both integrals: no rate of alpha or
    sigma is needed, and nothing is divided by them. On the linear path of flow matching this is the classical method
    along the velocity (Karras et al. 2022, algorithm 1; Ma et al. 2024, "SiT").
    """

    kind: Literal["heun"] = "heun"
    calls: ClassVar[int] = 2

    def __call__(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: None, noise: Noise
    ) -> tuple[Tensor, None]:
        """One step from t to s. x [B, ...], t and s [B]; a row at s = 0 takes the Euler step."""
        process, here = denoise.process, denoise(x, t)
        x = ddim_update(process, here, s)
        inside = s > 0
        if not inside.any():
            return x, memory
        there = denoise(x, torch.where(inside, s, t))  # no network is asked about the data itself
        of_x0 = 0.5 * inside * (process.alpha(s) - process.alpha(t))
        of_eps = 0.5 * inside * (process.sigma(s) - process.sigma(t))
        return x + expand(of_x0, x) * (there.x0 - here.x0) + expand(of_eps, x) * (there.eps - here.eps), memory
