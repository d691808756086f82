"""What happens after each step, and how the time between two log records is divided."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from tessera.training.recipe import Recipe


@dataclass(frozen=True)
class Due:
    """The actions after a step."""

    last: bool  # it is the last step of the run
    health: bool
    log: bool
    snapshot: bool  # of averages from which others are computed
    save: bool
    score: bool
    sample: bool


def due_after(recipe: Recipe, step: int, stopping: bool) -> Due:
    """The actions after a step. A run that is stopping only saves."""
    config = recipe.training
    last = step == config.steps
    score = recipe.evaluation.due(step, config.steps) and not stopping
    return Due(
        last=last,
        health=config.health_every is not None and step % config.health_every == 0,
        log=step % config.log_every == 0 or last,
        snapshot=config.ema.num_snapshots(step, config.steps) > config.ema.num_snapshots(step - 1, config.steps),
        save=step % config.checkpoint_every == 0 or score or last or stopping,
        score=score,
        sample=config.sample_every is not None and ((step % config.sample_every == 0 and not stopping) or last),
    )


class Stopwatch:
    """Time between two log records. Paused time is not training; waiting time is spent on the data."""

    def __init__(self) -> None:
        self._start, self._seconds = time.perf_counter(), {"paused": 0.0, "waiting": 0.0}

    @contextmanager
    def measure(self, kind: Literal["paused", "waiting"]) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[kind] += time.perf_counter() - start

    def lap(self) -> tuple[float, float]:
        """Seconds of training since the last lap, and how many of them waited for data."""
        seconds, waited = time.perf_counter() - self._start - self._seconds["paused"], self._seconds["waiting"]
        self.__init__()
        return max(seconds, 1e-9), waited
