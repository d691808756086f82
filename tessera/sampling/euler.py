"""Euler's method: a straight step along the prediction."""

from typing import Literal

import torch
from torch import Tensor

from tessera.diffusion import DiffusionProcess
from tessera.diffusion.process import Prediction
from tessera.sampling.denoiser import Noise
from tessera.sampling.solver import Solver, Step
from tessera.times import expand


def ddim_update(
    diffusion: DiffusionProcess, prediction: Prediction, s: Tensor, noise_std: Tensor | None = None
) -> Tensor:
    """alpha(s) x0 + sigma(s) eps: the predicted image with the predicted noise at time s. s [B] -> [B, ...]

    noise_std [B]: the standard deviation of the new noise that the caller adds. The predicted noise is reduced by as
    much (Song et al. 2021, equation 12, without its last term).
    """
    sigma = diffusion.sigma(s)
    eps_scale = sigma if noise_std is None else (sigma**2 - noise_std**2).clamp(min=0).sqrt()
    x0, eps = prediction.x0, prediction.eps
    return torch.addcmul(expand(diffusion.alpha(s), x0) * x0, expand(eps_scale, x0), eps)


class Euler(Solver):
    """First order; one call of the denoiser per step. The same as ddim with eta 0, for every diffusion process.

    For flow matching on a linear path this is the classical Euler step along the velocity.
    """

    kind: Literal["euler"] = "euler"

    def step(
        self, diffusion: DiffusionProcess, x: Tensor, t: Tensor, s: Tensor, memory: None, noise: Noise
    ) -> Step[None]:
        """One step from t to s. x [B, ...], t and s [B] or [B, T]."""
        prediction = yield x, t
        return ddim_update(diffusion, prediction, s), memory
