"""Ancestral sampling: draw from the learned reverse process (Ho et al. 2020, algorithm 2)."""

from typing import Literal

import torch
from torch import Tensor

from tessera.diffusion import DiffusionProcess, GaussianDiffusion
from tessera.diffusion.prediction import expand
from tessera.errors import TesseraError
from tessera.sampling.denoiser import Denoise, Noise
from tessera.sampling.solver import Solver


class Ancestral(Solver):
    """One call of the denoiser and one draw of noise a step, over any subset of the trained times.

    On a subset the betas are those of the longer steps (Nichol & Dhariwal 2021, section 4).
    """

    kind: Literal["ancestral"] = "ancestral"

    def check(self, process: DiffusionProcess) -> None:
        if not isinstance(process, GaussianDiffusion):
            raise TesseraError(
                f"ancestral sampling belongs to Gaussian processes, and this one is {process.config.summary()}; "
                "ddim with eta=1 draws with as much noise"
            )

    def __call__(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: None, noise: Noise
    ) -> tuple[Tensor, None]:
        """One step from t to s. x [B, ...], t and s [B]; a row at s = 0 takes the mean."""
        assert isinstance(denoise.process, GaussianDiffusion)
        mean, log_variance = denoise.process.p_mean_variance(x, denoise(x, t), t, s)
        spread = torch.exp(0.5 * log_variance) * expand((s > 0).to(x.dtype), x)
        return mean + spread * noise(), memory
