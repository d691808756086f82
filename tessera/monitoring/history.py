"""What a run has written down, and what its losses are held against.

Two answers need no network, so that a run can be judged without having seen another: zero, which is what a fresh
network says, and the best guess of each number by itself, from the noisy number alone. A network that knows pictures
is below both.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from tessera.diffusion import DiffusionProcess
from tessera.errors import TesseraError
from tessera.monitoring.health import BINS
from tessera.monitoring.logger import HEALTH, read_log
from tessera.monitoring.spikes import read_skipped_steps
from tessera.settings import read_yaml, validate
from tessera.training.recipe import Recipe

Record = dict[str, Any]
LATE = 1 / 3  # of the steps so far: "late", where a run shows what it has come to


@dataclass(frozen=True)
class History:
    """All that `tessera doctor` looks at. Series are (step, value) pairs, oldest first, of what is finite."""

    folder: Path
    recipe: Recipe
    log: list[Record]  # of the steps, without scores
    health: list[Record]
    passed: list[Record]
    unusable: list[str]  # images, with the reason

    @property
    def step(self) -> int:
        return max((int(record["step"]) for record in (*self.log, *self.health)), default=0)

    def last(self, name: str) -> float:
        """The last value in the log; 0 if there is none."""
        found = series(self.log, name)
        return found[-1][1] if found else 0.0

    def late(self, records: Sequence[Record], name: str) -> list[float]:
        """The values of the last third of the steps so far."""
        return [value for step, value in series(records, name) if step > self.step * (1 - LATE)]

    @cached_property
    def loss(self) -> list[tuple[int, float]]:
        """The mean squared error in the log."""
        return series(self.log, "mse")

    @cached_property
    def late_loss(self) -> float | None:
        found = self.late(self.log, "mse")
        return mean(found) if found else None

    @cached_property
    def process(self) -> DiffusionProcess:
        network = self.recipe.network
        return self.recipe.diffusion.resolved(network.in_channels, network.input_size).build()

    @cached_property
    def guesses(self) -> "Guesses":
        """For data like those of the probes; of mean 0 and variance 1 where there were none."""

        def typical(name: str, otherwise: float) -> float:
            found = [value for _, value in series(self.health, name)]
            return median(found) if found else otherwise

        return Guesses.of(self.process, typical("data_mean", 0), typical("data_std", 1), typical("data_spread", 1))


@dataclass(frozen=True)
class Guesses:
    """Mean squared errors of answers that need no network, over the times of training and in each part of time."""

    nothing: float  # of zero
    linear: float  # of each number by itself: the best linear guess from the noisy number, its mean being known
    nothing_by_time: list[float | None]
    linear_by_time: list[float | None]

    @staticmethod
    def of(process: DiffusionProcess, average: float, std: float, spread: float) -> "Guesses":
        """For data of such a mean and standard deviation in all, and such a one between samples.

        With x = alpha x0 + sigma eps and the target a x0 + b eps, the linear guess has the error
        spread^2 (a sigma - b alpha)^2 / (alpha^2 spread^2 + sigma^2).
        """
        t = process.sample_timesteps((torch.arange(10_000) + 0.5) / 10_000)
        one = torch.ones(len(t), 1, dtype=torch.float64)
        a, b = process.training_target(one, 0 * one, t)[:, 0], process.training_target(0 * one, one, t)[:, 0]
        alpha, sigma = process.alpha(t), process.sigma(t)
        nothing = a**2 * (average**2 + std**2) + b**2
        linear = spread**2 * (a * sigma - b * alpha) ** 2 / (alpha**2 * spread**2 + sigma**2).clamp(min=1e-12)
        parts = [(t * BINS).long().clamp(max=BINS - 1) == part for part in range(BINS)]

        def by_time(values: torch.Tensor) -> list[float | None]:
            return [values[part].mean().item() if part.any() else None for part in parts]

        return Guesses(nothing.mean().item(), linear.mean().item(), by_time(nothing), by_time(linear))


def read(run: Path) -> History:
    """The files of a run. Raises TesseraError if the folder holds none."""
    if not (run / "recipe.yaml").exists():
        raise TesseraError(
            f"{run} holds no run: there is no recipe.yaml in it. Give the folder that `tessera train` made"
        )
    skipped = run / "skipped.txt"
    return History(
        folder=run,
        recipe=validate(Recipe, read_yaml(run / "recipe.yaml"), str(run / "recipe.yaml")),
        log=[record for record in _dated(read_log(run)) if "mse" in record or "loss" in record],
        health=_dated(read_log(run, HEALTH)),
        passed=_dated(read_skipped_steps(run)),
        unusable=skipped.read_text(encoding="utf-8").splitlines() if skipped.exists() else [],
    )


def _dated(records: Iterable[Any]) -> list[Record]:
    """The records that say of which step they are: a damaged file may hold others."""
    return [record for record in records if isinstance(record, dict) and isinstance(record.get("step"), int)]


def series(records: Iterable[Record], name: str) -> list[tuple[int, float]]:
    """The finite values of a number in records, with their steps."""
    found = ((record["step"], record.get(name)) for record in records)
    return [(int(step), value) for step, value in found if isinstance(value, int | float) and math.isfinite(value)]


def largest(records: Iterable[Record], name: str) -> list[tuple[int, float]]:
    """As `series`, of a list of numbers: the largest of each record."""
    pairs = ((record["step"], finite(record.get(name))) for record in records)
    return [(int(step), max(values)) for step, values in pairs if values]


def finite(values: Iterable[Any] | None) -> list[float]:
    """The finite numbers among values."""
    return [value for value in values or () if isinstance(value, int | float) and math.isfinite(value)]
