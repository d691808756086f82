"""Mean and covariance of many rows, accumulated block by block and rank by rank."""

from dataclasses import dataclass, field

import numpy as np
import torch

from tessera.errors import TesseraError

BLOCK = 4096  # rows converted to float64 at a time


def check_finite(rows: np.ndarray) -> None:
    """Raise TesseraError unless rows are [N, D] and finite."""
    if rows.ndim != 2:
        raise TesseraError(f"rows of features must be [N, D], not {list(rows.shape)}")
    if bad := len(rows) - int(np.isfinite(rows).all(axis=1).sum()):
        raise TesseraError(f"{bad} of {len(rows)} rows of features hold NaN or infinity; check their images")


@dataclass
class Moments:
    """count rows; mean float64 [D]; cov float64 [D, D], unbiased (zero for a single row). `Moments()` has no rows."""

    count: int = 0
    mean: np.ndarray = field(default_factory=lambda: np.zeros(0))
    cov: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    @classmethod
    def from_rows(cls, rows: np.ndarray) -> "Moments":
        """The moments of [N, D], which may be a memory map. Raises TesseraError like `add`."""
        moments = cls()
        for start in range(0, len(rows), BLOCK):
            moments.add(rows[start : start + BLOCK])
        return moments

    def add(self, rows: np.ndarray) -> None:
        """Add rows [N, D]. Raises TesseraError if they have another width or are not finite."""
        check_finite(rows)
        if len(rows):
            centered = torch.tensor(rows, dtype=torch.float64)
            mean = centered.mean(dim=0)
            centered -= mean  # before the products: with |mean| >> std they would cancel
            cov = centered.T @ centered / max(1, len(rows) - 1)
            self.merge(Moments(len(rows), mean.numpy(), cov.numpy()))

    def merge(self, other: "Moments") -> None:
        """Add the rows of other moments (Chan et al. 1983, equation 2.1). Raises TesseraError for another width."""
        if not (self.count and other.count):
            if other.count:
                self.count, self.mean, self.cov = other.count, other.mean, other.cov
            return
        if len(self.mean) != len(other.mean):
            raise TesseraError(f"features of different widths: {len(self.mean)} and {len(other.mean)}")
        count, delta = self.count + other.count, other.mean - self.mean
        self.cov = (
            (self.count - 1) / (count - 1) * self.cov
            + (other.count - 1) / (count - 1) * other.cov
            + np.outer(self.count * other.count / count / (count - 1) * delta, delta)
        )
        self.mean = self.mean + other.count / count * delta
        self.count = count

    def without(self, part: "Moments") -> "Moments":
        """The moments of the rows that are not in `part`, which must be a proper subset: the inverse of `merge`."""
        count = self.count - part.count
        mean = self.mean - part.count / count * (part.mean - self.mean)
        delta = part.mean - mean
        scatter = (self.count - 1) * self.cov - (part.count - 1) * part.cov
        scatter -= np.outer(count * part.count / self.count * delta, delta)
        return Moments(count, mean, scatter / max(1, count - 1))
