"""The files of a run, and baselines for its losses.

Two predictions need no network, so a run can be judged by itself: zero, which is the output of a newly initialized
network, and the best linear prediction of each value from its noisy value alone. A network that has learned something
about images is better than both.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from tessera.diffusion import AnyDiffusionConfig, DiffusionProcess
from tessera.errors import TesseraError
from tessera.monitoring.health import BINS
from tessera.monitoring.logger import HEALTH, read_log
from tessera.monitoring.spikes import read_skipped_steps
from tessera.settings import Settings, read_yaml, validate

Record = dict[str, Any]
LATE = 1 / 3  # "late" is the last third of the steps so far


@dataclass(frozen=True)
class History:
    """Everything that `tessera doctor` reads. Series are (step, value) pairs of the finite values, oldest first."""

    run_dir: Path
    recipe: "Section"
    log: list[Record]  # of steps, without scores
    health: list[Record]
    skipped_steps: list[Record]
    invalid_samples: list[str]  # "name<TAB>reason"

    @property
    def step(self) -> int:
        return max((int(record["step"]) for record in (*self.log, *self.health)), default=0)

    def last(self, name: str) -> float:
        """The last value in the log; 0 if there is none."""
        values = series(self.log, name)
        return values[-1][1] if values else 0.0

    def late(self, records: Sequence[Record], name: str) -> list[float]:
        """The values of the last third of the steps so far."""
        return [value for step, value in series(records, name) if step > self.step * (1 - LATE)]

    @cached_property
    def loss(self) -> list[tuple[int, float]]:
        """The mean squared error in the log."""
        return series(self.log, "mse")

    @cached_property
    def late_loss(self) -> float | None:
        values = self.late(self.log, "mse")
        return mean(values) if values else None

    @cached_property
    def diffusion(self) -> DiffusionProcess:
        config = validate(_DiffusionSection, {"diffusion": self.recipe["diffusion"]}, str(self.run_dir / "recipe.yaml"))
        network = self.recipe.network
        return config.diffusion.resolve(network.in_channels, tuple(network.input_size)).build()

    @cached_property
    def baselines(self) -> "Baselines":
        """For data with the statistics of the probes; without probes, of mean 0 and variance 1."""

        def typical(name: str, default: float) -> float:
            values = [value for _, value in series(self.health, name)]
            return median(values) if values else default

        return Baselines.compute(
            self.diffusion, typical("data_mean", 0), typical("data_std", 1), typical("data_spread", 1)
        )


@dataclass(frozen=True)
class Baselines:
    """Mean squared errors of predictions without a network, over the timesteps of training and by timestep bin."""

    zero: float
    linear: float  # the best linear prediction of each value from its noisy value, with its mean known
    zero_by_timestep: list[float | None]
    linear_by_timestep: list[float | None]

    @staticmethod
    def compute(diffusion: DiffusionProcess, data_mean: float, data_std: float, spread: float) -> "Baselines":
        """For data of this mean and standard deviation, and this standard deviation between samples.

        With x = alpha x0 + sigma eps and the target a x0 + b eps, the linear prediction has the error
        spread^2 (a sigma - b alpha)^2 / (alpha^2 spread^2 + sigma^2).
        """
        t = diffusion.sample_timesteps((torch.arange(10_000) + 0.5) / 10_000)
        one = torch.ones(len(t), 1, dtype=torch.float64)
        a, b = diffusion.training_target(one, 0 * one, t)[:, 0], diffusion.training_target(0 * one, one, t)[:, 0]
        alpha, sigma = diffusion.alpha(t), diffusion.sigma(t)
        zero = a**2 * (data_mean**2 + data_std**2) + b**2
        linear = spread**2 * (a * sigma - b * alpha) ** 2 / (alpha**2 * spread**2 + sigma**2).clamp(min=1e-12)
        bins = [(t * BINS).long().clamp(max=BINS - 1) == index for index in range(BINS)]

        def by_timestep(values: torch.Tensor) -> list[float | None]:
            return [values[members].mean().item() if members.any() else None for members in bins]

        return Baselines(zero.mean().item(), linear.mean().item(), by_timestep(zero), by_timestep(linear))


class Section(dict[str, Any]):
    """A section of a run's recipe.yaml, which holds every setting, with attribute access."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise TesseraError(f"recipe.yaml of the run has no setting {name}: another version of Tessera wrote it")
        return Section(self[name]) if isinstance(self[name], dict) else self[name]


class _DiffusionSection(Settings):
    diffusion: AnyDiffusionConfig


def read_history(run: Path) -> History:
    """Read the files of a run. Raises TesseraError if the folder is not a run."""
    if not (run / "recipe.yaml").exists():
        raise TesseraError(f"{run} is not a run: it has no recipe.yaml. Give the folder that `tessera train` writes")
    skipped = run / "skipped_samples.txt"
    return History(
        run_dir=run,
        recipe=Section(read_yaml(run / "recipe.yaml")),
        log=[record for record in _with_step(read_log(run)) if "mse" in record or "loss" in record],
        health=_with_step(read_log(run, HEALTH)),
        skipped_steps=_with_step(read_skipped_steps(run)),
        invalid_samples=skipped.read_text(encoding="utf-8").splitlines() if skipped.exists() else [],
    )


def _with_step(records: Iterable[Any]) -> list[Record]:
    """The records that have a step: a damaged file may hold others."""
    return [record for record in records if isinstance(record, dict) and isinstance(record.get("step"), int)]


def series(records: Iterable[Record], name: str) -> list[tuple[int, float]]:
    """The finite values of a metric, with their steps."""
    pairs = ((record["step"], record.get(name)) for record in records)
    return [(int(step), value) for step, value in pairs if isinstance(value, int | float) and math.isfinite(value)]


def series_max(records: Iterable[Record], name: str) -> list[tuple[int, float]]:
    """Like `series`, for a metric that is a list: the largest value of each record."""
    pairs = ((record["step"], finite(record.get(name))) for record in records)
    return [(int(step), max(values)) for step, values in pairs if values]


def finite(values: Iterable[Any] | None) -> list[float]:
    """The finite numbers among values."""
    return [value for value in values or () if isinstance(value, int | float) and math.isfinite(value)]
