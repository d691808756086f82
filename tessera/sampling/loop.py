"""The sampling loop: one solver over a grid of times, yielding every state.

Shapes: B batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.errors import TesseraError
from tessera.sampling.denoiser import Denoise, Noise

Step = Callable[[Denoise, Tensor, Tensor, Tensor, Any, Noise], tuple[Tensor, Any]]


@dataclass(frozen=True)
class SampleState:
    """x [B, ...] at time t, after `step` of `num_steps` steps."""

    x: Tensor
    t: float
    step: int
    num_steps: int


def sample_loop(step: Step, denoise: Denoise, x: Tensor, times: Tensor, noise: Noise) -> Iterator[SampleState]:
    """Apply a step along decreasing times [n + 1] from x [B, ...] at times[0]; yields the start and every state.

    The last state holds the samples. Raises TesseraError instead of yielding it if a number in it is not finite.
    """
    memory, num_steps = None, len(times) - 1
    row_sums = [
        x.flatten(1).sum(dim=1)
    ]  # finite where all numbers of a row are; on x's device, which is not waited for
    yield SampleState(x, float(times[0]), 0, num_steps)
    for number in range(1, num_steps + 1):
        t, s = times[number - 1].expand(len(x)), times[number].expand(len(x))
        x, memory = step(denoise, x, t, s, memory, noise)
        row_sums.append(x.flatten(1).sum(dim=1))
        if number == num_steps:
            _check_finite(torch.stack(row_sums), times, step)
        yield SampleState(x, float(times[number]), number, num_steps)


def _check_finite(row_sums: Tensor, times: Tensor, step: Step) -> None:
    """Raise TesseraError if rows of the last state are not finite. row_sums [n + 1, B], copied from the device once."""
    finite = row_sums.cpu().isfinite()
    bad = ~finite[-1]
    if not bad.any():
        return
    first = int((~finite[:, bad]).any(dim=1).nonzero()[0])
    name, num_steps = getattr(step, "kind", "the sampler"), len(times) - 1
    where = f"after step {first} of {num_steps} (time {float(times[max(first - 1, 0)]):.3g})"
    raise TesseraError(
        f"{int(bad.sum())} of {len(bad)} images contain numbers that are not finite, first "
        f"{where if first else 'in the noise'} of {name}; try --precision float32, a smaller guidance scale, ddim or "
        "more steps; if it fails without guidance too, the model's weights are damaged: use an earlier checkpoint"
    )
