"""Power laws of a metric against compute, and compute-optimal model sizes.

`fit` is least squares in logarithms. `Law` is fitted to the frontier of several runs: the size with the lowest metric
at each training compute (Kaplan et al. 2020; Hoffmann et al. 2022, approach 1). A study writes its law to law.json;
`tessera plan --law` reads it.
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
from tessera.planning import FLOPS_PER_MAC
from tessera.reporting.estimates import Estimate, t_quantile

LAW_FILE = "law.json"
FORMAT = 1
MIN_POINTS = 3  # of a fit
NUM_FLOORS = 200  # tried between zero and the lowest point


@dataclass(frozen=True)
class PowerLaw:
    """y = floor + scale * x^-exponent, with normal errors in log(y - floor). The intervals assume a known floor.

    error: standard deviation of the residuals; df: degrees of freedom; center, spread: mean of log x, and the sum of
    squares around it; low, high: the range of x, outside which the law is extrapolated.
    """

    scale: float
    exponent: Estimate
    floor: float
    error: float
    df: int
    points: int
    center: float
    spread: float
    low: float
    high: float

    def __call__(self, x: float) -> float:
        return self.floor + self.scale * x**-self.exponent.value

    def confidence(self, x: float) -> Estimate:
        """The law at x with the 95 % interval of the true law."""
        return self._interval(x, 0.0)

    def prediction(self, x: float) -> Estimate:
        """The law at x with the 95 % interval of a new point."""
        return self._interval(x, 1.0)

    def _interval(self, x: float, new_points: float) -> Estimate:
        leverage = new_points + 1 / self.points + (math.log(x) - self.center) ** 2 / self.spread
        factor = math.exp(t_quantile(self.df) * self.error * math.sqrt(leverage))
        above = self(x) - self.floor
        return Estimate(self.floor + above, self.floor + above / factor, self.floor + above * factor)

    def extrapolation(self, x: float) -> float:
        """The factor by which x lies outside the range of the points; 1 inside it."""
        return max(1.0, self.low / x, x / self.high)


def fit(x: Sequence[float], y: Sequence[float], floor: Literal["none", "fitted"] = "none") -> PowerLaw:
    """Fit a power law by least squares in logarithms.

    floor: "fitted" adds an irreducible part, the one with the smallest squared error in log y; it costs one degree of
    freedom. Raises TesseraError with the reason if no law can be fitted.
    """
    needed = MIN_POINTS + (floor == "fitted")
    if len(x) != len(y) or len(x) < needed:
        raise TesseraError(f"no law: it needs at least {needed} points, got {min(len(x), len(y))}")
    for value in (*x, *y):
        if not (math.isfinite(value) and value > 0):
            raise TesseraError(f"no law: a power law needs numbers above zero, got {value:g}")
    if max(x) / min(x) < 1 + 1e-6:
        raise TesseraError(f"no law: all {len(x)} points have the same compute, {x[0]:.3g}")
    log_x, values = np.log(np.asarray(x, float)), np.asarray(y, float)
    center, spread = float(log_x.mean()), float(((log_x - log_x.mean()) ** 2).sum())

    def fit_line(bottom: float) -> tuple[float, float, np.ndarray]:
        """Slope, height at the center, and the fitted log(y - bottom)."""
        log_y = np.log(values - bottom)
        slope = float(((log_x - center) * log_y).sum()) / spread
        return slope, float(log_y.mean()), log_y.mean() + slope * (log_x - center)

    bottom = 0.0
    if floor == "fitted":
        floors = float(values.min()) * (1 - np.geomspace(1, 1e-4, NUM_FLOORS))  # the first is zero
        errors = [float(((np.log(b + np.exp(fit_line(float(b))[2])) - np.log(values)) ** 2).sum()) for b in floors]
        bottom = float(floors[int(np.argmin(errors))])
    slope, height, fitted = fit_line(bottom)
    df = len(x) - 2 - (floor == "fitted")
    residuals = np.log(values - bottom) - fitted
    error = math.sqrt(float((residuals**2).sum()) / df)
    half = t_quantile(df) * error / math.sqrt(spread)
    return PowerLaw(
        scale=math.exp(height - slope * center),
        exponent=Estimate(-slope, -slope - half, -slope + half),
        floor=bottom,
        error=error,
        df=df,
        points=len(x),
        center=center,
        spread=spread,
        low=min(x),
        high=max(x),
    )


@dataclass(frozen=True)
class HeldOut:
    """A point that was left out of a fit, and the prediction for it."""

    x: float
    measured: float
    predicted: Estimate

    @property
    def error(self) -> float:
        """Relative error: 0.1 if the prediction is 10 % too high."""
        return self.predicted.value / self.measured - 1

    @property
    def inside(self) -> bool:
        """Whether the measured point lies in the prediction interval."""
        return self.predicted.contains(self.measured)


def predict_held_out(x: Sequence[float], y: Sequence[float], mask: Sequence[bool]) -> list[HeldOut]:
    """Fit all points except those in the mask and predict these, in the order of x."""
    train = [index for index, is_held_out in enumerate(mask) if not is_held_out]
    law = fit([x[index] for index in train], [y[index] for index in train])
    test = sorted((index for index, is_held_out in enumerate(mask) if is_held_out), key=lambda index: x[index])
    return [HeldOut(x[index], y[index], law.prediction(x[index])) for index in test]


def largest_mask(x: Sequence[float], count: int) -> list[bool]:
    """Marks the `count` largest x."""
    order = sorted(range(len(x)), key=lambda index: x[index])[len(x) - count :] if count else []
    return [index in order for index in range(len(x))]


# Compute-optimal size


def best_size(gmacs: Sequence[float], values: Sequence[float]) -> float | None:
    """The GMACs at the minimum of the parabola through the lowest value and its two neighbors, in logarithms.

    Approach 2 of Hoffmann et al. 2022, who fit all sizes; far from the minimum the curve is no parabola. None if the
    lowest value belongs to the smallest or the largest size, or if a value is not above zero: the minimum may lie
    outside.
    """
    sizes, metric = zip(*sorted(zip(gmacs, values)))
    lowest = int(np.argmin(metric))
    if not 0 < lowest < len(sizes) - 1 or min(metric) <= 0:
        return None
    near = slice(lowest - 1, lowest + 2)
    curvature, slope, _ = np.polyfit(np.log(sizes[near]), np.log(metric[near]), 2)
    return math.exp(-slope / (2 * curvature)) if curvature > 0 else sizes[lowest]


@dataclass(frozen=True)
class EvalPoint:
    """The metric of a run at some step."""

    run: str
    gmacs: float
    samples: int  # training samples up to then
    value: float  # of the metric; lower is better

    @property
    def flops(self) -> float:
        """Training FLOPs up to then."""
        return FLOPS_PER_MAC * 1e9 * self.gmacs * self.samples


class Optimal(NamedTuple):
    """The compute-optimal model for a budget."""

    gmacs: float  # of a forward pass of one sample
    samples: float  # training samples
    metric: Estimate  # with its prediction interval
    extrapolation: float  # the factor by which the budget lies outside the measured range; 1 inside it


def frontier(points: Sequence[EvalPoint]) -> list[EvalPoint]:
    """The points with the lowest value for their training compute or less, ordered by compute."""
    result: list[EvalPoint] = []
    for point in sorted(points, key=lambda point: (point.flops, point.value)):
        if point.flops > 0 and (not result or point.value < result[-1].value):
            result.append(point)
    return result


@dataclass(frozen=True)
class Law:
    """The frontier of several runs, and the power laws fitted to it.

    Neighbors on the frontier are often from one run, so the intervals are narrower than those of independent runs. The
    lowest of noisy scores are partly lucky, so the frontier lies slightly too low.
    """

    metric: str
    fingerprint: str  # of the protocol of the metric
    source: str  # the study
    points: tuple[EvalPoint, ...]  # of all runs

    def __post_init__(self) -> None:
        """Raises TesseraError if no law can be fitted."""
        if not any(a.run == b.run and a.samples != b.samples for a in self.points for b in self.points):
            raise TesseraError(
                "no law of the best size: every run was scored once. Score runs at several steps (the marks of the "
                "study), so that sizes can be compared at equal training compute"
            )
        sizes = {point.gmacs for point in self.frontier}
        if len(self.frontier) < MIN_POINTS or len(sizes) < 2:
            raise TesseraError(
                f"no law of the best size: the frontier of {self.metric} against training compute has "
                f"{len(self.frontier)} points of {len(sizes)} sizes; it needs at least {MIN_POINTS} points of 2 sizes"
            )
        _ = self.by_metric, self.by_gmacs

    @cached_property
    def frontier(self) -> list[EvalPoint]:
        return frontier(self.points)

    @property
    def range(self) -> tuple[float, float]:
        """The training FLOPs between which the law interpolates."""
        return self.frontier[0].flops, self.frontier[-1].flops

    @cached_property
    def by_metric(self) -> PowerLaw:
        """The lowest metric against training FLOPs."""
        return fit([point.flops for point in self.frontier], [point.value for point in self.frontier])

    @cached_property
    def by_gmacs(self) -> PowerLaw:
        """The best size against training FLOPs. The exponent is negative if larger budgets need larger models.

        The number of samples follows, because FLOPs = 6 x multiply-adds x samples holds for every point.
        """
        return fit([point.flops for point in self.frontier], [point.gmacs for point in self.frontier])

    def optimal(self, flops: float) -> Optimal:
        """The best size for a training compute, and its expected metric."""
        if not (math.isfinite(flops) and flops > 0):
            raise TesseraError(f"a budget is a number of training FLOPs above zero, got {flops:g}")
        gmacs = self.by_gmacs(flops)
        samples = flops / (FLOPS_PER_MAC * 1e9 * gmacs)
        return Optimal(gmacs, samples, self.by_metric.prediction(flops), self.by_metric.extrapolation(flops))

    def summary(self) -> list[str]:
        """The law in sentences."""
        low, high = self.range
        runs = len({point.run for point in self.frontier})
        size, value = self.by_gmacs.exponent, self.by_metric.exponent
        return [
            f"The law of the best size is fitted to {len(self.frontier)} frontier points of {runs} runs, between "
            f"{low:.2g} and {high:.2g} training FLOPs; outside this range it is extrapolated.",
            f"The best {self.metric} follows compute^{-value.value:.3f} (exponent {-value.high:.3f} to "
            f"{-value.low:.3f}), the best GMACs compute^{-size.value:.2f} ({-size.high:.2f} to {-size.low:.2f}), the "
            f"best number of samples compute^{1 + size.value:.2f}.",
        ]

    def save(self, path: Path) -> None:
        data = {"format": FORMAT, "summary": self.summary(), "metric": self.metric, "fingerprint": self.fingerprint}
        data |= {"source": self.source, "points": [asdict(point) for point in self.points]}
        atomic_write(path, json.dumps(data, indent=1) + "\n")


def read_law(path: Path) -> Law:
    """Read law.json, or the one in a study's folder. Raises TesseraError."""
    path = path / LAW_FILE if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}, expected {FORMAT}")
        points = tuple(
            EvalPoint(str(point["run"]), float(point["gmacs"]), int(point["samples"]), float(point["value"]))
            for point in data["points"]
        )
        return Law(str(data["metric"]), str(data["fingerprint"]), str(data["source"]), points)
    except FileNotFoundError:
        raise TesseraError(f"there is no law at {path}: expected the {LAW_FILE} that `tessera study` writes") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TesseraError(
            f"{path} is not a law: {error!r}; expected the {LAW_FILE} that `tessera study` writes"
        ) from None
