"""The one loop that draws: a step over given times, yielding every state.

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
    """Where a drawing stands: x [B, ...] at time t, after `done` of `total` steps."""

    x: Tensor
    t: float
    step: int
    num_steps: int


def sample_loop(step: Step, denoise: Denoise, x: Tensor, times: Tensor, noise: Noise) -> Iterator[SampleState]:
    """Loop a step over falling times [n + 1] from x [B, ...] at times[0]; yields the start and every state after it.

    Keep the last state for the picture, wrap it in a progress bar, or stream it as a preview. Raises TesseraError in
    place of the last state if a number in it is not finite.
    """
    memory, total = None, len(times) - 1
    sums = [_sums(x)]
    yield SampleState(x, float(times[0]), 0, total)
    for done in range(1, total + 1):
        t, s = times[done - 1].expand(len(x)), times[done].expand(len(x))
        x, memory = step(denoise, x, t, s, memory, noise)
        sums.append(_sums(x))
        if done == total:
            _check(torch.stack(sums), times, step)
        yield SampleState(x, float(times[done]), done, total)


def _sums(x: Tensor) -> Tensor:
    """A number for each row that is finite where all of its numbers are; [B] on x's device, which is not waited for."""
    return x.flatten(1).sum(dim=1)


def _check(sums: Tensor, times: Tensor, step: Step) -> None:
    """Raise TesseraError if rows of the last state are not finite; sums [n + 1, B], looked at once a drawing."""
    finite = sums.cpu().isfinite()
    spoilt = ~finite[-1]
    if not spoilt.any():
        return
    first = int((~finite[:, spoilt]).any(dim=1).nonzero()[0])
    name, total = getattr(step, "kind", "the sampler"), len(times) - 1
    where = f"after step {first} of {total} (time {float(times[max(first - 1, 0)]):.3g})" if first else "in the noise"
    raise TesseraError(
        f"{int(spoilt.sum())} of {len(spoilt)} pictures hold numbers that are not finite, for the first time {where} "
        f"of {name}; try --precision float32, less guidance, ddim or more steps; if it fails without guidance too, the "
        "model's weights are spoilt: use an earlier checkpoint"
    )
