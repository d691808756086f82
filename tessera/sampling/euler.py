"""Euler's method: a straight step to where the prediction says x will be."""

from typing import Literal

import torch
from torch import Tensor

from tessera.diffusion import DiffusionProcess
from tessera.diffusion.prediction import Prediction, expand
from tessera.sampling.denoiser import Denoise, Noise
from tessera.sampling.solver import Solver


def ddim_update(process: DiffusionProcess, predicted: Prediction, s: Tensor, spread: Tensor | None = None) -> Tensor:
    """The predicted picture with the predicted noise of time s: alpha(s) x0 + sigma(s) eps. s [B] -> [B, ...]

    spread [B]: the part of sigma(s) that is left out, because as much noise is drawn anew (Song et al. 2021, equation
    12, without its last term).
    """
    sigma = process.sigma(s)
    kept = sigma if spread is None else (sigma**2 - spread**2).clamp(min=0).sqrt()
    x0, eps = predicted.x0, predicted.eps
    return torch.addcmul(expand(process.alpha(s), x0) * x0, expand(kept, x0), eps)


class Euler(Solver):
    """First order; one call of the denoiser a step. The same as ddim without noise, for every process.

    For flow matching on a linear path it is the classical Euler step along the velocity.
    """

    kind: Literal["euler"] = "euler"

    def __call__(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: None, noise: Noise
    ) -> tuple[Tensor, None]:
        """One step from t to s. x [B, ...], t and s [B]."""
        return ddim_update(denoise.process, denoise(x, t), s), memory
