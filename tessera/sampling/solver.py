"""The base class of all solvers: settings with one pure step."""

from collections.abc import Generator
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from tessera.diffusion import DiffusionProcess
from tessera.diffusion.process import Prediction
from tessera.sampling.denoiser import Denoise, Noise
from tessera.settings import Settings

Memory = TypeVar("Memory")
# A step that asks for predictions: it yields (x, t), is sent the prediction there, and returns (x, memory).
Step = Generator[tuple[Tensor, Tensor], Prediction, tuple[Tensor, Memory]]


class Solver(Settings):
    """One step from t to s < t, both per row.

    The step is a generator, so that a caller can evaluate the network for several solvers at once: it yields each
    (x, t) where it needs a prediction. `solver(denoise, x, t, s, memory, noise)` runs a step with a denoiser.
    """

    calls_per_step: ClassVar[int] = 1  # predictions

    @property
    def convergence_order(self) -> float:
        """The error falls like num_steps ** -order; of stochastic solvers, the error of the distribution."""
        return 1

    def check(self, diffusion: DiffusionProcess) -> None:
        """Raise TesseraError if this solver cannot sample from a diffusion process."""

    def step(
        self, diffusion: DiffusionProcess, x: Tensor, t: Tensor, s: Tensor, memory: Any, noise: Noise
    ) -> Step[Any]:
        """x [B, C, ...], t and s [B], or [B, T] for frames with their own times.

        memory: None before the first step, and what the solver returned after it; a `Rows`, so that rows can leave and
        join between steps. noise() returns a new standard normal tensor.
        """
        raise NotImplementedError

    def __call__(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Any, noise: Noise
    ) -> tuple[Tensor, Any]:
        """(x, memory) after a step."""
        return run_step(self.step(denoise.diffusion, x, t, s, memory, noise), denoise)


def run_step(step: Step[Memory], denoise: Denoise) -> tuple[Tensor, Memory]:
    """Run a step to its end."""
    try:
        point = next(step)
        while True:
            point = step.send(denoise(*point))
    except StopIteration as end:
        return end.value
