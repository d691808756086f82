"""What few numbers allow to be said: intervals by Student's t, rank correlations, a correction for many comparisons."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tessera.errors import TesseraError

Z95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Estimate:
    """value, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def map(self, function) -> "Estimate":
        """Through a function that only rises or only falls."""
        low, high = sorted((function(self.low), function(self.high)))
        return Estimate(function(self.value), low, high)


# Student's t


def t_inside(t: float, freedom: int) -> float:
    """The probability that |T| <= t: the finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(abs(t) / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    if freedom == 1:
        return 2 * angle / math.pi
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * square
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def t_outside(t: float, freedom: int) -> float:
    """The two-sided p value of a t statistic."""
    return min(1.0, max(0.0, 1.0 - t_inside(t, freedom)))


@lru_cache(maxsize=256)
def t_quantile(freedom: int, inside: float = 0.95) -> float:
    """The t within which |T| stays with probability `inside`, by bisection."""
    if freedom < 1:
        raise ValueError(f"Student's t needs at least one degree of freedom, got {freedom}")
    low, high = 0.0, 1.0
    while t_inside(high, freedom) < inside:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, freedom) < inside else (low, middle)
    return (low + high) / 2


def mean(values: Sequence[float]) -> Estimate:
    """The mean of independent values, at least two, and its t interval."""
    array = np.asarray(values, float)
    if len(array) < 2:
        raise TesseraError(f"an interval of a mean needs at least two values, got {len(array)}")
    half = t_quantile(len(array) - 1) * float(array.std(ddof=1)) / math.sqrt(len(array))
    centre = float(array.mean())
    return Estimate(centre, centre - half, centre + half)


def differences_to_first(table: Sequence[Sequence[float]]) -> list[tuple[Estimate, float]]:
    """How far the other rows of a table lie from its first: difference with its t interval, and p value, row by row.

    The table [rows, columns], at least 2 by 2, is complete blocks: what a column adds is the same for all rows, and
    the noise of all rows is pooled, (rows - 1)(columns - 1) degrees of freedom. Of two rows it is the paired t test.
    """
    values = np.asarray(table, float)
    rows, columns = values.shape
    residuals = values - values.mean(1, keepdims=True) - values.mean(0, keepdims=True) + values.mean()
    freedom = (rows - 1) * (columns - 1)
    error = math.sqrt(2 / columns * float((residuals**2).sum()) / freedom)
    half = t_quantile(freedom) * error
    found = []
    for row in values[1:]:
        apart = float((row - values[0]).mean())
        p = t_outside(apart / error, freedom) if error > 0 else float(apart == 0)
        found.append((Estimate(apart, apart - half, apart + half), p))
    return found


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979): below 0.05 holds for all of them at once."""
    corrected, largest = [0.0] * len(p), 0.0
    for place, index in enumerate(sorted(range(len(p)), key=lambda index: p[index])):
        largest = max(largest, min(1.0, (len(p) - place) * p[index]))
        corrected[index] = largest
    return corrected


# Rank correlation


def ranks(values: Sequence[float]) -> np.ndarray:
    """1 for the smallest; equals share the mean of their ranks. [N]"""
    array = np.asarray(values, float)
    below = (array[None] < array[:, None]).sum(1)
    return below + ((array[None] == array[:, None]).sum(1) + 1) / 2


def spearman(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Spearman's rank correlation of at least four pairs; its interval by Fisher's z, error of Bonett & Wright (2000).

    At -1 or 1 the interval would have no width: its inner end is then found from half-way to the nearest other order.
    """
    _enough(x, y, 4, "Spearman's")
    value, count = float(np.corrcoef(ranks(x), ranks(y))[0, 1]), len(x)
    nearest = 1 - 6 / (count * (count**2 - 1))

    def error(rho: float) -> float:
        return math.sqrt((1 + rho**2 / 2) / (count - 3))

    return _by_fisher(value, nearest, error)


def kendall(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Kendall's tau-b of at least five pairs; its interval by Fisher's z (Fieller, Hartley & Pearson 1957).

    At -1 or 1 as in `spearman`.
    """
    _enough(x, y, 5, "Kendall's")
    a, b = (np.sign(np.subtract.outer(np.asarray(v, float), np.asarray(v, float))) for v in (x, y))
    value, count = float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())), len(x)
    return _by_fisher(value, 1 - 2 / (count * (count - 1)), lambda tau: math.sqrt(0.437 / (count - 4)))


def _by_fisher(value: float, nearest: float, error) -> Estimate:
    inner = min(max(value, -nearest), nearest)
    z, half = math.atanh(inner), Z95 * error(inner)
    return Estimate(value, min(value, math.tanh(z - half)), max(value, math.tanh(z + half)))


def _enough(x: Sequence[float], y: Sequence[float], least: int, whose: str) -> None:
    if len(x) != len(y) or len(x) < least:
        raise TesseraError(f"{whose} rank correlation needs at least {least} pairs, got {min(len(x), len(y))}")
    if len(set(x)) < 2 or len(set(y)) < 2:
        raise TesseraError(f"{whose} rank correlation needs values that differ: all {len(x)} are equal")
