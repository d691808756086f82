"""A number and the range its true value may lie in."""

import math
from dataclasses import dataclass

Z95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Estimate:
    """value, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def normal(cls, value: float, error: float) -> "Estimate":
        """From a standard error."""
        return cls(value, value - Z95 * error, value + Z95 * error)

    @classmethod
    def proportion(cls, hits: float, count: int) -> "Estimate":
        """From `hits` of `count` trials, by Wilson's interval."""
        return cls(hits / count, *wilson(hits / count, count))


def wilson(share: float, count: int, z: float = Z95) -> tuple[float, float]:
    """The interval of a share of `count` trials (Wilson 1927); 95 % by default."""
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)
