"""Values with 95 % intervals, rank correlations and p values. scipy is imported where it is used: it loads slowly."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tessera.errors import TesseraError

Z95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def normal(cls, value: float, error: float) -> "Estimate":
        """From a standard error."""
        return cls(value, value - Z95 * error, value + Z95 * error)

    @classmethod
    def proportion(cls, hits: float, count: int) -> "Estimate":
        """From `hits` of `count` trials, with Wilson's interval."""
        return cls(hits / count, *wilson(hits / count, count))

    @classmethod
    def mean(cls, values: Sequence[float]) -> "Estimate":
        """The mean of at least two independent values, with Student's t interval."""
        if len(values) < 2:
            raise TesseraError(f"an interval of a mean needs at least two values, got {len(values)}")
        center = float(np.mean(values))
        half = t_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
        return cls(center, center - half, center + half)

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high

    def map(self, function: Callable[[float], float]) -> "Estimate":
        """Apply a monotonic function."""
        low, high = sorted((function(self.low), function(self.high)))
        return Estimate(function(self.value), low, high)


def wilson(fraction: float, count: int, z: float = Z95) -> tuple[float, float]:
    """The interval of a fraction of `count` trials (Wilson 1927); 95 % by default."""
    center = (fraction + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(fraction * (1 - fraction) / count + z**2 / (4 * count**2))
    # Without rounding: exactly 0 for no hit, and 1 for nothing but hits.
    return 0.0 if fraction == 0 else max(0.0, center - half), 1.0 if fraction == 1 else min(1.0, center + half)


def t_quantile(df: int) -> float:
    """Half the width of a 95 % interval in standard errors, by Student's t with `df` degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(df, 0.975))


def differences_to_first(table: Sequence[Sequence[float]]) -> list[tuple[Estimate, float]]:
    """The difference of every other row to the first, with its t interval and its two-sided p value.

    The table [rows, columns], at least 2 by 2, is analyzed as complete blocks: the effect of a column is the same for
    all rows, and the noise of all rows is pooled, with (rows - 1)(columns - 1) degrees of freedom. For two rows this
    is the paired t test.
    """
    from scipy.special import stdtr

    values = np.asarray(table, float)
    rows, columns = values.shape
    residuals = values - values.mean(1, keepdims=True) - values.mean(0, keepdims=True) + values.mean()
    df = (rows - 1) * (columns - 1)
    error = math.sqrt(2 / columns * float((residuals**2).sum()) / df)
    half = t_quantile(df) * error
    results = []
    for row in values[1:]:
        difference = float((row - values[0]).mean())
        p = 2 * float(stdtr(df, -abs(difference / error))) if error > 0 else float(difference == 0)
        results.append((Estimate(difference, difference - half, difference + half), p))
    return results


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for multiple comparisons (Holm 1979)."""
    corrected, largest = [0.0] * len(p), 0.0
    for position, index in enumerate(sorted(range(len(p)), key=lambda index: p[index])):
        largest = max(largest, min(1.0, (len(p) - position) * p[index]))
        corrected[index] = largest
    return corrected


def spearman(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Spearman's rank correlation of at least four pairs. The interval is Fisher's z with the error of Bonett & Wright
    (2000); see `_fisher_interval`.
    """
    from scipy.stats import spearmanr

    _check_pairs(x, y, 4, "Spearman's")
    value, count = float(spearmanr(x, y).statistic), len(x)  # pyright: ignore[reportAttributeAccessIssue]
    nearest = 1 - 6 / (count * (count**2 - 1))
    return _fisher_interval(value, nearest, lambda rho: math.sqrt((1 + rho**2 / 2) / (count - 3)))


def kendall(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Kendall's tau-b of at least five pairs. The interval is Fisher's z with the error of Fieller, Hartley & Pearson
    (1957); see `_fisher_interval`.
    """
    from scipy.stats import kendalltau

    _check_pairs(x, y, 5, "Kendall's")
    value, count = float(kendalltau(x, y).statistic), len(x)  # pyright: ignore[reportAttributeAccessIssue]
    return _fisher_interval(value, 1 - 2 / (count * (count - 1)), lambda tau: math.sqrt(0.437 / (count - 4)))


def _fisher_interval(value: float, nearest: float, error: Callable[[float], float]) -> Estimate:
    """At -1 or 1 the interval would have no width. Its inner end is then computed from `nearest`, half-way to the
    value of the nearest other order.
    """
    inner = min(max(value, -nearest), nearest)
    z, half = math.atanh(inner), Z95 * error(inner)
    return Estimate(value, min(value, math.tanh(z - half)), max(value, math.tanh(z + half)))


def _check_pairs(x: Sequence[float], y: Sequence[float], minimum: int, name: str) -> None:
    if len(x) != len(y) or len(x) < minimum:
        raise TesseraError(f"{name} rank correlation needs at least {minimum} pairs, got {min(len(x), len(y))}")
    if len(set(x)) < 2 or len(set(y)) < 2:
        raise TesseraError(f"{name} rank correlation needs values that differ: all {len(x)} are equal")
