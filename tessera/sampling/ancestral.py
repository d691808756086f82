"""Ancestral sampling from the learned reverse process (Ho et al. 2020, algorithm 2)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tessera.diffusion import DiffusionProcess, GaussianDiffusion
from tessera.errors import TesseraError
from tessera.sampling.denoiser import Noise
from tessera.sampling.solver import Solver, Step
from tessera.times import expand


class Ancestral(Solver):
    """One call of the denoiser and one noise tensor per step, over any subset of the trained timesteps.

    On a subset the betas are those of the longer steps (Nichol & Dhariwal 2021, section 4).
    """

    kind: Literal["ancestral"] = "ancestral"
    variance: Literal["posterior", "beta"] | None = Field(
        default=None, description="a fixed variance of the steps instead of that of the diffusion process"
    )

    def check(self, diffusion: DiffusionProcess) -> None:
        if not isinstance(diffusion, GaussianDiffusion):
            raise TesseraError(
                f"ancestral sampling needs a Gaussian diffusion process, but this one is {diffusion.config.summary()}; "
                "ddim with eta=1 adds as much noise"
            )

    def step(
        self, diffusion: DiffusionProcess, x: Tensor, t: Tensor, s: Tensor, memory: None, noise: Noise
    ) -> Step[None]:
        """One step from t to s. x [B, ...], t and s [B] or [B, T]; rows at s = 0 take the mean."""
        assert isinstance(diffusion, GaussianDiffusion)
        prediction = yield x, t
        mean, log_variance = diffusion.p_mean_variance(x, prediction, t, s, self.variance)
        std = torch.exp(0.5 * log_variance) * expand((s > 0).to(x.dtype), x)
        return mean + std * noise(), memory
