"""DDIM: deterministic steps, or steps with a fraction of the ancestral noise (Song et al. 2021, equation 12)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from tessera.diffusion import DiffusionProcess
from tessera.sampling.denoiser import Noise
from tessera.sampling.euler import ddim_update
from tessera.sampling.solver import Solver, Step
from tessera.times import expand


class DDIM(Solver):
    """First order; one call of the denoiser per step. eta 0 adds no noise, eta 1 as much as ancestral sampling."""

    kind: Literal["ddim"] = "ddim"
    eta: float = Field(default=0.0, ge=0, le=1)

    def step(
        self, diffusion: DiffusionProcess, x: Tensor, t: Tensor, s: Tensor, memory: None, noise: Noise
    ) -> Step[None]:
        """One step from t to s. x [B, ...], t and s [B] or [B, T]."""
        prediction = yield x, t
        if not self.eta:
            return ddim_update(diffusion, prediction, s), memory
        # Equation 16: eta times the standard deviation of the ancestral step, in a form for any alpha and sigma.
        sigma = diffusion.sigma(s)
        noise_ratio = diffusion.alpha(t) * sigma / (diffusion.alpha(s) * diffusion.sigma(t))
        std = self.eta * sigma * (1 - noise_ratio**2).clamp(min=0).sqrt()
        return ddim_update(diffusion, prediction, s, std) + expand(std, x) * noise(), memory
