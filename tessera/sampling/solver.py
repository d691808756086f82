"""The base class of all solvers: settings with one pure step."""

from collections.abc import Generator
from dataclasses import replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from tessera.diffusion import DiffusionProcess
from tessera.diffusion.process import Prediction
from tessera.sampling.denoiser import Denoise, Noise
from tessera.settings import Settings
from tessera.times import expand

Memory = TypeVar("Memory")
# Where a step needs a prediction: (x, t), or (x, t, s) of a network that predicts the average over the times s to t.
Point = tuple[Tensor, ...]
# A step that asks for predictions: it yields points, is sent the prediction there, and returns (x, memory).
Step = Generator[Point, Prediction, tuple[Tensor, Memory]]


class Solver(Settings):
    """One step from t to s < t, both per row.

    The step is a generator, so that a caller can evaluate the network for several solvers at once: it yields each
    point where it needs a prediction. `solver(denoise, x, t, s, memory, noise)` runs a step with a denoiser.
    """

    calls_per_step: ClassVar[int] = 1  # predictions
    uses_history: ClassVar[bool] = False  # predictions of earlier steps
    needs_step_size: ClassVar[bool] = False  # a network that predicts the average over a step

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
        return run_step(start_step(self, denoise.diffusion, x, t, s, memory, noise), denoise)


class Stepper(Protocol):
    """A solver, or a solver that does more in each step."""

    @property
    def kind(self) -> str: ...

    def step(
        self, diffusion: DiffusionProcess, x: Tensor, t: Tensor, s: Tensor, memory: Any, noise: Noise
    ) -> Step[Any]:
        """See `Solver.step`."""
        ...


def start_step(
    solver: Solver | Stepper, diffusion: DiffusionProcess, x: Tensor, t: Tensor, s: Tensor, memory: Any, noise: Noise
) -> Step[Any]:
    """A step of a solver. Where it begins in pure noise (alpha = 0) and the network predicts epsilon, x0 is taken from
    the middle of the step.

    At alpha = 0 epsilon is x itself and does not determine x0. At the middle time m, the same noise sigma(m) x has an
    x0 that is right to the second order of the step's length, and an error of epsilon in it is multiplied by
    sigma(m) / alpha(m), which the step's alpha(s) makes about 2. A fixed lower limit of alpha would either bias all
    steps or multiply errors without limit.
    """
    step = solver.step(diffusion, x, t, s, memory, noise)
    if diffusion.config.prediction != "epsilon" or (diffusion.alpha(t) > 0).all():
        return step
    return _with_x0(step, diffusion, s)


def _with_x0(step: Step[Memory], diffusion: DiffusionProcess, s: Tensor) -> Step[Memory]:
    """A step to s whose predictions have an x0 also at alpha = 0. See `start_step`."""
    prediction: Any = None
    while True:
        try:
            x, t, *end = step.send(prediction)
        except StopIteration as result:
            return result.value
        noise_only = diffusion.alpha(t) == 0
        middle = torch.where(noise_only, (t + s) / 2, t)
        prediction = yield expand(torch.where(noise_only, diffusion.sigma(middle), 1.0), x) * x, middle, *end
        eps = torch.where(expand(noise_only, x).bool(), x, prediction.eps)
        prediction = replace(prediction, eps=eps)


def run_step(step: Step[Memory], denoise: Denoise) -> tuple[Tensor, Memory]:
    """Run a step to its end."""
    try:
        point = next(step)
        while True:
            point = step.send(denoise(*point))
    except StopIteration as end:
        return end.value
