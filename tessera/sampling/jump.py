"""One network call for a whole step: the average velocity over it.

The network is given the length of the step, too, and was trained to predict the average of the velocity along the path
of the probability flow (Geng et al. 2025, "Mean Flows for One-step Generative Modeling", equation 12). So a step has no
error of discretization, and one or a few are enough. `tessera distill` makes such a network of a trained one.
"""

from typing import ClassVar, Literal

from torch import Tensor

from tessera.diffusion import DiffusionProcess
from tessera.errors import TesseraError
from tessera.sampling.denoiser import Noise
from tessera.sampling.euler import ddim_update
from tessera.sampling.solver import Solver, Step


def check_step_size(sampler: Solver, takes_step_size: bool) -> None:
    """Raise TesseraError if a solver needs the average velocity, and the network does not predict it."""
    if sampler.needs_step_size and not takes_step_size:
        raise TesseraError(
            f"the sampler {getattr(sampler, 'kind', '')} needs a network that predicts the average velocity over a "
            "step, and this one predicts it at a time: make one with `tessera distill MODEL --to RUN`, or use another "
            "sampler"
        )


class Jump(Solver):
    """x_s = x_t - (t - s) u(x_t, t, s), for a network of the average velocity u; one call per step."""

    needs_step_size: ClassVar[bool] = True
    kind: Literal["jump"] = "jump"

    def step(
        self, diffusion: DiffusionProcess, x: Tensor, t: Tensor, s: Tensor, memory: None, noise: Noise
    ) -> Step[None]:
        """One step from t to s. x [B, ...], t and s [B] or [B, T]."""
        prediction = yield x, t, s  # whose eps - x0 is u: then the update is that of Euler's method
        return ddim_update(diffusion, prediction, s), memory
