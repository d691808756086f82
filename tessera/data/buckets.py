"""Aspect-ratio bucketing: each image is cropped to the size nearest in aspect, so that little of it is lost.

Clips are also cut to one of several lengths. After Podell et al. 2023 (SDXL), section 2.3. Shapes: N samples, K
buckets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from tessera.settings import Settings, as_tuple


class BucketsConfig(Settings):
    """Sizes with about the area of `data.size`, from tall to wide, or with several areas."""

    aspect: float = Field(default=2.0, ge=1, description="largest ratio of the longer side to the shorter")
    multiple: PositiveInt = Field(default=16, description="sides are multiples of this many pixels")
    sides: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        default=(), description="resolutions: one area for each, its square; empty: the area of data.size"
    )
    frames: Annotated[tuple[Annotated[int, Field(gt=0)], ...], BeforeValidator(as_tuple)] = Field(
        default=(),
        description="lengths of clips: each has the longest that it covers; 1: images, too; empty: data.frames",
    )

    @model_validator(mode="after")
    def _sides_fit(self) -> "BucketsConfig":
        if small := [side for side in self.sides if side < self.multiple]:
            raise ValueError(f"sides {small} are smaller than multiple {self.multiple}")
        return self

    def sizes(self, size: tuple[int, ...]) -> list[tuple[int, ...]]:
        """All sizes (height, width) in order of area, then height: for each height the largest width that the area
        allows. Without `sides` the result always contains `size`.

        size: of the data; of clips (frames, height, width), and so are the results.
        """
        *length, height, width = size
        if length:
            spatial, lengths = self.sizes((height, width)), self.frames or length
            return sorted(((count, *each) for count in set(lengths) for each in spatial), key=area_then_height)
        areas = [side * side for side in self.sides] or [height * width]
        result: set[tuple[int, ...]] = set() if self.sides else {(height, width)}
        for area in areas:
            for height in range(self.multiple, math.isqrt(int(area * self.aspect)) + 1, self.multiple):
                width = area // height // self.multiple * self.multiple
                if width and max(height, width) <= self.aspect * min(height, width):
                    result.add((height, width))
        return sorted(result, key=area_then_height)


def area_then_height(size: Sequence[int]) -> tuple[int, ...]:
    """The order in which sizes are listed."""
    return math.prod(size), *size


@dataclass(frozen=True)
class Buckets:
    """Sizes in use, (height, width) or (frames, height, width), and the index of that of each sample, int64 [N]."""

    sizes: list[tuple[int, ...]]
    bucket_ids: np.ndarray

    @classmethod
    def assign(cls, shapes: np.ndarray, sizes: Sequence[tuple[int, ...]], min_samples: int = 1) -> "Buckets":
        """Sort images by `assign_buckets`, and leave out the sizes that no image has."""
        used, bucket_ids = np.unique(assign_buckets(shapes, sizes, min_samples), return_inverse=True)
        return cls([sizes[index] for index in used], bucket_ids.reshape(-1))


def assign_buckets(shapes: np.ndarray, sizes: Sequence[tuple[int, ...]], min_samples: int = 1) -> np.ndarray:
    """The index of the best size for each image, int64 [N]

    shapes: heights and widths of the images, int [N, 2], of clips after the number of frames [N, 3]; 0 where unknown. A
    clip gets the longest length that it covers, or the shortest of all. An image gets the size nearest in aspect (by
    its logarithm) among those it covers, of equally near ones the largest. If it covers none, it gets the size that
    needs the least upscaling. Sizes with fewer than `min_samples` images are removed one by one, the rarest first, and
    their images go to the next best size; the last size stays.
    """
    unique_shapes, inverse, multiplicity = np.unique(shapes, axis=0, return_inverse=True, return_counts=True)
    cost = np.stack([_cost(unique_shapes, size) for size in sizes], axis=1)
    while True:
        best = cost.argmin(axis=1)
        counts = np.bincount(best, weights=multiplicity, minlength=len(sizes))
        used = np.flatnonzero(counts)
        if len(used) == 1 or counts[used].min() >= min_samples:
            return best[inverse.reshape(-1)]
        cost[:, used[counts[used].argmin()]] = np.inf


def _cost(shapes: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """The mismatch of a size and shapes [N, 2]: the distance of aspects, plus a penalty where images are upscaled.

    Of clips [N, 3] also what is cut off, as a logarithm, or a larger penalty where frames are missing.
    """
    height, width = np.maximum(shapes[:, -2:], 1).astype(np.float64).T
    distance = np.abs(np.log(height / width) - math.log(size[-2] / size[-1]))
    upscaling = np.maximum(size[-2] / height, size[-1] / width)
    prefer_largest = -1e-9 * size[-2] * size[-1] / 2**20
    cost = distance + prefer_largest + np.where(upscaling > 1, 1e3 * (1 + np.log(upscaling)), 0.0)
    if len(size) == 2:
        return cost
    cut_off = np.log(np.maximum(shapes[:, 0], 1) / size[0])
    return cost + np.where(cut_off >= 0, cut_off, 1e6 * (1 - cut_off))
