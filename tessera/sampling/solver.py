"""The base class of all solvers: settings with one pure step."""

from typing import ClassVar

from tessera.diffusion import DiffusionProcess
from tessera.settings import Settings


class Solver(Settings):
    """`solver(denoise, x, t, s, memory, noise) -> (x, memory)`: one step from t to s < t, both per row.

    memory is None before the first step, and what the solver returned after it. noise() returns a new standard normal
    tensor.
    """

    calls_per_step: ClassVar[int] = 1  # calls of the denoiser

    @property
    def convergence_order(self) -> float:
        """The error falls like num_steps ** -order; of stochastic solvers, the error of the distribution."""
        return 1

    def check(self, diffusion: DiffusionProcess) -> None:
        """Raise TesseraError if this solver cannot sample from a diffusion process."""
