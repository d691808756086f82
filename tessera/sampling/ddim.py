"""DDIM: deterministic steps, or any amount of the ancestral noise (Song et al. 2021, equation 12)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from tessera.diffusion.prediction import expand
from tessera.sampling.denoiser import Denoise, Noise
from tessera.sampling.euler import ddim_update
from tessera.sampling.solver import Solver


class DDIM(Solver):
    """First order; one call of the denoiser a step. eta 0 draws no noise, eta 1 as much as ancestral sampling."""

    kind: Literal["ddim"] = "ddim"
    eta: float = Field(default=0.0, ge=0, le=1)

    def __call__(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: None, noise: Noise
    ) -> tuple[Tensor, None]:
        """One step from t to s. x [B, ...], t and s [B]."""
        process, predicted = denoise.process, denoise(x, t)
        if not self.eta:
            return ddim_update(process, predicted, s), memory
        # Equation 16: the standard deviation of the ancestral step, times eta; in a form for any alpha and sigma.
        sigma = process.sigma(s)
        kept = process.alpha(t) * sigma / (process.alpha(s) * process.sigma(t))
        spread = self.eta * sigma * (1 - kept**2).clamp(min=0).sqrt()
        return ddim_update(process, predicted, s, spread) + expand(spread, x) * noise(), memory
