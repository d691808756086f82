"""Mean and covariance of many rows, added up block by block and process by process."""

from dataclasses import dataclass, field

import numpy as np
import torch

from tessera.errors import TesseraError

BLOCK = 4096  # rows taken to float64 at a time


def finite(rows: np.ndarray) -> None:
    """Raises TesseraError unless rows are [N, D] and finite."""
    if rows.ndim != 2:
        raise TesseraError(f"rows of features must be [N, D], not {list(rows.shape)}")
    if bad := len(rows) - int(np.isfinite(rows).all(axis=1).sum()):
        raise TesseraError(
            f"{bad} of {len(rows)} rows of features hold NaN or infinity; look at the pictures they are of"
        )


@dataclass
class Moments:
    """count rows; mean float64 [D]; cov float64 [D, D], unbiased (zero for a single row). `Moments()` is of no rows."""

    count: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    cov: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    @classmethod
    def of(cls, rows: np.ndarray) -> "Moments":
        """Of [N, D], which may be a memory map. Raises TesseraError as `add`."""
        moments = cls()
        for start in range(0, len(rows), BLOCK):
            moments.add(rows[start : start + BLOCK])
        return moments

    def add(self, rows: np.ndarray) -> None:
        """More rows [N, D]. Raises TesseraError where they are not rows of the same width, or not finite."""
        finite(rows)
        if len(rows):
            centred = torch.tensor(rows, dtype=torch.float64)
            mean = centred.mean(dim=0)
            centred -= mean  # before the products: with |mean| >> std these would cancel
            cov = centred.T @ centred / max(1, len(rows) - 1)
            self.merge(Moments(len(rows), mean.numpy(), cov.numpy()))

    def merge(self, other: "Moments") -> None:
        """The rows of another count as well (Chan et al. 1983, equation 2.1). Raises TesseraError for another width."""
        if not (self.count and other.count):
            if other.count:
                self.count, self.mean, self.cov = other.count, other.mean, other.cov
            return
        if len(self.mean) != len(other.mean):
            raise TesseraError(f"features of different widths: {len(self.mean)} and {len(other.mean)}")
        count, apart = self.count + other.count, other.mean - self.mean
        self.cov = (
            (self.count - 1) / (count - 1) * self.cov
            + (other.count - 1) / (count - 1) * other.cov
            + np.outer(self.count * other.count / count / (count - 1) * apart, apart)
        )
        self.mean = self.mean + other.count / count * apart
        self.count = count

    def without(self, part: "Moments") -> "Moments":
        """The other rows, where part is of some but not all of these: `merge` undone."""
        count = self.count - part.count
        mean = self.mean - part.count / count * (part.mean - self.mean)
        apart = part.mean - mean
        scatter = (self.count - 1) * self.cov - (part.count - 1) * part.cov
        scatter -= np.outer(count * part.count / self.count * apart, apart)
        return Moments(count, mean, scatter / max(1, count - 1))
