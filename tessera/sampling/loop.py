"""The sampling loop: one solver over a grid of times, yielding every state.

Shapes: B batch, T frames.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.errors import TesseraError
from tessera.sampling.denoiser import Denoise, Noise
from tessera.sampling.solver import Stepper, run_step, start_step


@dataclass(frozen=True)
class SampleState:
    """x [B, ...] at time t (of the noisiest frame), after `step` of `num_steps` steps."""

    x: Tensor
    t: float
    step: int
    num_steps: int


def sample_loop(
    solver: Stepper, denoise: Denoise, x: Tensor, times: Tensor, noise: Noise, memory: Any = None
) -> Iterator[SampleState]:
    """Apply a solver along decreasing times from x [B, ...] at times[0]; yields the start and every state.

    times: [n + 1], or [n + 1, T] if frames have their own. memory: of the solver before the first step.
    The last state holds the samples. Raises TesseraError instead of yielding it if a number in it is not finite.
    """
    num_steps = len(times) - 1
    # Sums are finite where all numbers of a row are; on x's device, which is not waited for.
    row_sums = [x.flatten(1).sum(dim=1)]
    yield SampleState(x, float(times[0].max()), 0, num_steps)
    for number in range(1, num_steps + 1):
        t, s = (times[index].expand(len(x), *times.shape[1:]) for index in (number - 1, number))
        x, memory = run_step(start_step(solver, denoise.diffusion, x, t, s, memory, noise), denoise)
        row_sums.append(x.flatten(1).sum(dim=1))
        if number == num_steps:
            _check_finite(torch.stack(row_sums), times, solver)
        yield SampleState(x, float(times[number].max()), number, num_steps)


def _check_finite(row_sums: Tensor, times: Tensor, solver: Stepper) -> None:
    """Raise TesseraError if rows of the last state are not finite. row_sums [n + 1, B], copied from the device once."""
    finite = row_sums.cpu().isfinite()
    bad = ~finite[-1]
    if not bad.any():
        return
    first, num_steps = int((~finite[:, bad]).any(dim=1).nonzero()[0]), len(times) - 1
    time = float(times[max(first - 1, 0)].max())
    where = f"after step {first} of {num_steps} (time {time:.3g})" if first else "in the noise"
    raise not_finite(f"{int(bad.sum())} of {len(bad)} images contain", f"first {where} of {solver.kind}")


def not_finite(subject: str, where: str) -> TesseraError:
    """The error about numbers that are not finite, with the remedies."""
    return TesseraError(
        f"{subject} numbers that are not finite, {where}; try --precision float32, a smaller guidance scale, ddim or "
        "more steps; if it fails without guidance too, the model's weights are damaged: use an earlier checkpoint"
    )
