"""A metric as a power law of compute, and what such a law says of the best model for a budget.

`fit` is least squares in logarithms; `Law` stands on the frontier of several runs: which size had the lowest metric at
which training compute (Kaplan et al. 2020; Hoffmann et al. 2022, approach 1). A study writes its law to law.json, and
`tessera plan --budget` reads it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from tessera.errors import TesseraError
from tessera.files import atomic_write
from tessera.reporting.estimates import Estimate, t_quantile

FILE = "law.json"
LEAST = 3  # points of a law
FLOORS = 200  # tried between zero and the lowest point
FLOPS_PER_MAC = 6  # of training: forward and backward, two operations a multiply-add


@dataclass(frozen=True)
class PowerLaw:
    """y = floor + scale * x^-exponent, with errors that are normal in log(y - floor). Intervals hold for a known floor.

    error: standard deviation of the residuals; freedom: points less what was fitted; centre, spread: mean of log x, and
    the sum of squares around it; low, high: the range of x, outside of which all is an extrapolation.
    """

    scale: float
    exponent: Estimate
    floor: float
    error: float
    freedom: int
    points: int
    centre: float
    spread: float
    low: float
    high: float

    def __call__(self, x: float) -> float:
        return self.floor + self.scale * x**-self.exponent.value

    def band(self, x: float) -> Estimate:
        """The line at x, and where the true line lies (95 %)."""
        return self._around(x, 0.0)

    def prediction(self, x: float) -> Estimate:
        """The line at x, and where a new point lies (95 %)."""
        return self._around(x, 1.0)

    def _around(self, x: float, own: float) -> Estimate:
        leverage = own + 1 / self.points + (math.log(x) - self.centre) ** 2 / self.spread
        reach = math.exp(t_quantile(self.freedom) * self.error * math.sqrt(leverage))
        above = self(x) - self.floor
        return Estimate(self.floor + above, self.floor + above / reach, self.floor + above * reach)

    def beyond(self, x: float) -> float:
        """How many times x lies outside the range of the points; 1 within it."""
        return max(1.0, self.low / x, x / self.high)


def fit(x: Sequence[float], y: Sequence[float], floor: Literal["none", "fitted"] = "none") -> PowerLaw:
    """The power law through points, by least squares in logarithms.

    floor: "fitted" adds what no compute takes away; it is the one with the smallest squared error in log y, and costs
    one degree of freedom. Raises TesseraError with the reason where no law can be said.
    """
    least = LEAST + (floor == "fitted")
    if len(x) != len(y) or len(x) < least:
        raise TesseraError(f"no law: it needs at least {least} points, got {min(len(x), len(y))}")
    for value in (*x, *y):
        if not (math.isfinite(value) and value > 0):
            raise TesseraError(f"no law: a power law needs numbers above zero, got {value:g}")
    if max(x) / min(x) < 1 + 1e-6:
        raise TesseraError(f"no law: all {len(x)} points stand at the same compute, {x[0]:.3g}")
    log_x, values = np.log(np.asarray(x, float)), np.asarray(y, float)
    centre, spread = float(log_x.mean()), float(((log_x - log_x.mean()) ** 2).sum())

    def line(bottom: float) -> tuple[float, float, np.ndarray]:
        """Slope, height at the centre, and log(y - bottom) by the line."""
        above = np.log(values - bottom)
        slope = float(((log_x - centre) * above).sum()) / spread
        return slope, float(above.mean()), above.mean() + slope * (log_x - centre)

    bottom = 0.0
    if floor == "fitted":
        tried = float(values.min()) * (1 - np.geomspace(1, 1e-4, FLOORS))  # the first is zero
        errors = [float(((np.log(b + np.exp(line(float(b))[2])) - np.log(values)) ** 2).sum()) for b in tried]
        bottom = float(tried[int(np.argmin(errors))])
    slope, height, fitted = line(bottom)
    freedom = len(x) - 2 - (floor == "fitted")
    residuals = np.log(values - bottom) - fitted
    error = math.sqrt(float((residuals**2).sum()) / freedom)
    half = t_quantile(freedom) * error / math.sqrt(spread)
    return PowerLaw(
        scale=math.exp(height - slope * centre),
        exponent=Estimate(-slope, -slope - half, -slope + half),
        floor=bottom,
        error=error,
        freedom=freedom,
        points=len(x),
        centre=centre,
        spread=spread,
        low=min(x),
        high=max(x),
    )


@dataclass(frozen=True)
class HeldOut:
    """A point that the law was not fitted to, and what the law said of it."""

    x: float
    measured: float
    predicted: Estimate

    @property
    def error(self) -> float:
        """Relative: 0.1 where the law said 10 % too much."""
        return self.predicted.value / self.measured - 1

    @property
    def inside(self) -> bool:
        """Whether the measured point lies in the prediction interval."""
        return self.predicted.contains(self.measured)


def held_out(x: Sequence[float], y: Sequence[float], among: Sequence[bool]) -> list[HeldOut]:
    """The law fitted to all points but those `among` the held out, and what it says of these, the smallest first."""
    kept = [index for index, out in enumerate(among) if not out]
    law = fit([x[index] for index in kept], [y[index] for index in kept])
    rest = sorted((index for index, out in enumerate(among) if out), key=lambda index: x[index])
    return [HeldOut(x[index], y[index], law.prediction(x[index])) for index in rest]


def largest(x: Sequence[float], count: int) -> list[bool]:
    """Which of x are among the `count` largest."""
    order = sorted(range(len(x)), key=lambda index: x[index])[len(x) - count :] if count else []
    return [index in order for index in range(len(x))]


# Compute-optimal


@dataclass(frozen=True)
class EvalPoint:
    """What a run had come to somewhere on its way."""

    run: str
    gmacs: float
    samples: int  # learned from until then
    value: float  # of the metric; lower is better

    @property
    def flops(self) -> float:
        """Of training until then."""
        return FLOPS_PER_MAC * 1e9 * self.gmacs * self.samples


class Optimal(NamedTuple):
    """What a law says of a budget."""

    gmacs: float  # of a forward pass of one sample
    samples: float  # to learn from
    metric: Estimate  # with its prediction interval
    beyond: float  # how many times the budget lies outside what was measured; 1 within it


def frontier(points: Sequence[EvalPoint]) -> list[EvalPoint]:
    """Those that no other beats with as little training compute: the lower envelope, from left to right."""
    found: list[EvalPoint] = []
    for point in sorted(points, key=lambda point: (point.flops, point.value)):
        if point.flops > 0 and (not found or point.value < found[-1].value):
            found.append(point)
    return found


@dataclass(frozen=True)
class Law:
    """The frontier of several runs, and the power laws through it.

    Neighbours on the frontier are often of one run, so that the intervals are narrower than independent runs would
    make them; and of noisy scores the lowest are partly the luckiest, so that the frontier lies a little too low.
    Between its first and its last point all is interpolated, outside it is extrapolated.
    """

    metric: str
    fingerprint: str  # of the protocol the metric was scored by
    source: str  # for people: which study
    points: tuple[EvalPoint, ...]  # of all runs

    def __post_init__(self) -> None:
        """Raises TesseraError where no law can be said."""
        if not any(
            one.run == other.run and one.samples != other.samples for one in self.points for other in self.points
        ):
            raise TesseraError(
                "no law of the best size: every run was scored once. Score them on their way (the study's marks), so "
                "that sizes can be compared at equal training compute"
            )
        sizes = {point.gmacs for point in self.frontier}
        if len(self.frontier) < LEAST or len(sizes) < 2:
            raise TesseraError(
                f"no law of the best size: the frontier of {self.metric} against training compute has "
                f"{len(self.frontier)} points of {len(sizes)} sizes; it needs at least {LEAST} points of 2 sizes"
            )
        _ = self.by_metric, self.by_gmacs

    @cached_property
    def frontier(self) -> list[EvalPoint]:
        return frontier(self.points)

    @property
    def range(self) -> tuple[float, float]:
        """The training FLOPs between which the law is an interpolation."""
        return self.frontier[0].flops, self.frontier[-1].flops

    @cached_property
    def by_metric(self) -> PowerLaw:
        """The lowest metric against training FLOPs."""
        return fit([point.flops for point in self.frontier], [point.value for point in self.frontier])

    @cached_property
    def by_gmacs(self) -> PowerLaw:
        """The best size against training FLOPs; its exponent is negative where larger budgets want larger models.

        The samples follow: flops = 6 x multiply-adds x samples holds for every point, and so for the lines.
        """
        return fit([point.flops for point in self.frontier], [point.gmacs for point in self.frontier])

    def optimal(self, flops: float) -> Optimal:
        """The best size for so many training FLOPs, and what to expect of it."""
        if not (math.isfinite(flops) and flops > 0):
            raise TesseraError(f"a budget is a number of training FLOPs above zero, got {flops:g}")
        gmacs = self.by_gmacs(flops)
        samples = flops / (FLOPS_PER_MAC * 1e9 * gmacs)
        return Optimal(gmacs, samples, self.by_metric.prediction(flops), self.by_metric.beyond(flops))

    def words(self) -> list[str]:
        """What it stands on and says, in sentences."""
        low, high = self.range
        runs = len({point.run for point in self.frontier})
        size, value = self.by_gmacs.exponent, self.by_metric.exponent
        return [
            f"The law of the best size for a budget stands on {len(self.frontier)} frontier points of {runs} runs, "
            f"between {low:.2g} and {high:.2g} "
            "training FLOPs; outside of them it is an extrapolation.",
            f"The best {self.metric} follows compute^{-value.value:.3f} (exponent {-value.high:.3f} to "
            f"{-value.low:.3f}), the best GMACs compute^{-size.value:.2f} ({-size.high:.2f} to {-size.low:.2f}), the "
            f"best number of samples compute^{1 + size.value:.2f}.",
        ]

    def save(self, path: Path) -> None:
        told = {"format": 1, "says": self.words(), "metric": self.metric, "fingerprint": self.fingerprint}
        told |= {"source": self.source, "points": [asdict(point) for point in self.points]}
        atomic_write(path, json.dumps(told, indent=1) + "\n")


def read(path: Path) -> Law:
    """The law of a study: law.json, or the folder it lies in. Raises TesseraError."""
    path = path / FILE if path.is_dir() else path
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["format"] != 1:
            raise ValueError(f"it is of format {told['format']}, expected 1")
        points = tuple(
            EvalPoint(str(point["run"]), float(point["gmacs"]), int(point["samples"]), float(point["value"]))
            for point in told["points"]
        )
        return Law(str(told["metric"]), str(told["fingerprint"]), str(told["source"]), points)
    except FileNotFoundError:
        raise TesseraError(f"there is no law at {path}: expected the {FILE} that `tessera study` writes") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TesseraError(f"{path} holds no law: {error!r}; expected the {FILE} that `tessera study` writes") from None
