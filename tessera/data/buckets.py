"""Sizes for pictures of many shapes: each is cropped to the nearest in aspect, so that little of it is lost.

After Podell et al. 2023 (SDXL), section 2.3. Shapes: N samples, K buckets.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from tessera.settings import Settings


class BucketsConfig(Settings):
    """Sizes of about the area of `data.size`, from tall to wide, or of several areas."""

    aspect: float = Field(default=2.0, ge=1, description="the longer side is at most so many times the shorter")
    multiple: PositiveInt = Field(default=16, description="sides are multiples of so many pixels")
    sides: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default=(), description="resolutions: areas are the squares of these; none: that of data.size alone"
    )

    @model_validator(mode="after")
    def _sides_fit(self) -> "BucketsConfig":
        if small := [side for side in self.sides if side < self.multiple]:
            raise ValueError(f"sides {small} are smaller than multiple {self.multiple}")
        return self

    def sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """All sizes (height, width) in order of area, then height; `size` is always among them where `sides` is not
        given. Of each height the widest that the area allows."""
        areas = [side * side for side in self.sides] or [size[0] * size[1]]
        found = set() if self.sides else {size}
        for area in areas:
            for height in range(self.multiple, math.isqrt(int(area * self.aspect)) + 1, self.multiple):
                width = area // height // self.multiple * self.multiple
                if width and max(height, width) <= self.aspect * min(height, width):
                    found.add((height, width))
        return sorted(found, key=lambda one: (one[0] * one[1], one[0]))


@dataclass(frozen=True)
class Buckets:
    """Sizes (height, width) in use, and the place among them of each sample, int64 [N]."""

    sizes: list[tuple[int, int]]
    of: np.ndarray

    @classmethod
    def sort(cls, shapes: np.ndarray, sizes: list[tuple[int, int]], fewest: int = 1) -> "Buckets":
        """Sort pictures by `assign`, and forget the sizes that no picture has."""
        used, of = np.unique(assign(shapes, sizes, fewest), return_inverse=True)
        return cls([sizes[place] for place in used], of.reshape(-1))


def assign(shapes: np.ndarray, sizes: list[tuple[int, int]], fewest: int = 1) -> np.ndarray:
    """The place among `sizes` of the best one for each picture, int64 [N]

    shapes: heights and widths of the pictures, int [N, 2]; 0 where unknown. Of the sizes that a picture covers the
    nearest in aspect (by its logarithm), of equally near ones the largest; where it covers none, the size it would be
    enlarged for the least. Sizes with fewer than `fewest` pictures are given up, one by one from the rarest, and their
    pictures go to the next best; the last size stays.
    """
    kinds, back, of_each = np.unique(shapes, axis=0, return_inverse=True, return_counts=True)
    cost = np.stack([_cost(kinds, size) for size in sizes], axis=1)
    while True:
        chosen = cost.argmin(axis=1)
        held = np.bincount(chosen, weights=of_each, minlength=len(sizes))
        used = np.flatnonzero(held)
        if len(used) == 1 or held[used].min() >= fewest:
            return chosen[back.reshape(-1)]
        cost[:, used[held[used].argmin()]] = np.inf


def _cost(shapes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """How badly a size suits shapes [N, 2]: the distance of aspects, and far more where pictures would be enlarged."""
    height, width = np.maximum(shapes, 1).astype(np.float64).T
    apart = np.abs(np.log(height / width) - math.log(size[0] / size[1]))
    short = np.maximum(size[0] / height, size[1] / width)
    largest_first = -1e-9 * size[0] * size[1] / 2**20
    return apart + largest_first + np.where(short > 1, 1e3 * (1 + np.log(short)), 0.0)
