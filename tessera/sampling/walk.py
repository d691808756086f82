"""The one loop that draws: a step over given times, yielding every state.

Shapes: B batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tessera.sampling.denoiser import Denoise, Noise

Step = Callable[[Denoise, Tensor, Tensor, Tensor, Any, Noise], tuple[Tensor, Any]]


@dataclass(frozen=True)
class State:
    """Where a drawing stands: x [B, ...] at time t, after `done` of `total` steps."""

    x: Tensor
    t: float
    done: int
    total: int


def walk(step: Step, denoise: Denoise, x: Tensor, times: Tensor, noise: Noise) -> Iterator[State]:
    """Loop a step over falling times [n + 1] from x [B, ...] at times[0]; yields the start and every state after it.

    Keep the last state for the picture, wrap it in a progress bar, or stream it as a preview.
    """
    memory, total = None, len(times) - 1
    yield State(x, float(times[0]), 0, total)
    for done in range(1, total + 1):
        t, s = times[done - 1].expand(len(x)), times[done].expand(len(x))
        x, memory = step(denoise, x, t, s, memory, noise)
        yield State(x, float(times[done]), done, total)
