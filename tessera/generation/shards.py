"""Shards of images: the unit in which bulk sampling and evaluation share out their work, save it and resume it.

Shapes: B images of a shard, H W height and width, C channels (1 or 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHARD_SIZE = 250


@dataclass(frozen=True)
class ImageShard:
    """images uint8 [B, H, W, C]; indices [B]: their positions in the whole set; labels [B], or None without classes;
    captions: B of them, None for an image without one, or None without captions."""

    images: np.ndarray
    indices: np.ndarray
    labels: np.ndarray | None
    captions: Sequence[str | None] | None = None


def num_shards(count: int) -> int:
    """The number of shards of `count` images."""
    return -(-count // SHARD_SIZE)


def shard_range(index: int, count: int) -> range:
    """The positions of the images in a shard."""
    return range(index * SHARD_SIZE, min((index + 1) * SHARD_SIZE, count))
