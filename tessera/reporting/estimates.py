"""Values with 95 % intervals."""

import math
from collections.abc import Callable
from dataclasses import dataclass

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
    return max(0.0, center - half), min(1.0, center + half)
