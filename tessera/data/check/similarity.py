"""Near duplicates: a perceptual hash of each image, and the pairs among a million whose hashes differ in few bits.

Shapes: N images, E pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np

SIDE = 32  # pixels of the gray image that is hashed
LOW = 8  # frequencies per axis, which gives 64 bits; also the cells per axis of the color grid
BITS = 5  # largest number of different bits; JPEG at quality 50, or scaling to a half, changes 0 to 4
LEVELS = 32  # of 255: largest difference of the color of a cell
VARIANCE_FRACTION = 0.03  # largest mean square difference of cells, relative to the variance within an image
BANDS = ((0, 21), (21, 21), (42, 22))  # first bit and width of each band of the hash
LEADERS = 64  # leaders per hash; more images with one hash and different colors are textures, not copies
CHUNK = 1 << 20  # pairs compared at once


class Colors(Protocol):
    """The colors of images: an array uint8 [N, cells], or what is indexed like one and need not be in memory."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: np.ndarray, /) -> np.ndarray:
        """int64 [E] -> uint8 [E, cells]"""
        ...


@dataclass(frozen=True)
class _Selected:
    """Some rows of colors. rows: int64 [K]"""

    colors: Colors
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return self.colors[self.rows[index]]


def perceptual_hash(gray: np.ndarray) -> int:
    """pHash (Zauner 2010): which of the lowest frequencies of a cosine transform are above their median. 64 bits.

    gray: [SIDE, SIDE]
    """
    low = _cosines() @ gray.astype(np.float32) @ _cosines().T
    # The mean brightness is not structure and always far above the median: its bit stays 0.
    bits = low.ravel() > np.median(low.ravel()[1:])
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@cache
def _cosines() -> np.ndarray:
    """The first rows of the discrete cosine transform, float32 [LOW, SIDE]"""
    return np.cos(np.pi / SIDE * np.arange(LOW)[:, None] * (np.arange(SIDE) + 0.5)).astype(np.float32)


def near_pairs(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs whose hashes differ in at most BITS bits, in chunks int64 ([E], [E]), the smaller index first. A pair
    can occur up to three times.

    hashes: uint64 [N]. Of two hashes that differ in at most 5 bits, one of three bands differs in at most 1 (the
    multi-index of Norouzi et al. 2012): a million evenly spread hashes cost some 30 million comparisons, not 5e11.
    """
    for first, width in BANDS:
        band = ((hashes >> np.uint64(first)) & np.uint64((1 << width) - 1)).astype(np.int32)
        order = np.argsort(band, kind="stable").astype(np.int32 if len(band) < 1 << 31 else np.int64)
        start = np.searchsorted(band[order], np.arange((1 << width) + 1, dtype=np.int32))  # of each value in the order
        position = np.empty_like(order)
        position[order] = np.arange(len(order), dtype=order.dtype)
        yield from _matches(hashes, order, np.arange(len(hashes)), position + 1, start[band + 1])
        for bit in range(width):
            clear = np.flatnonzero(~band >> bit & 1)  # each pair once, from the value without the bit
            flipped = band[clear] | 1 << bit
            yield from _matches(hashes, order, clear, start[flipped], start[flipped + 1])


def _matches(
    hashes: np.ndarray, order: np.ndarray, index: np.ndarray, low: np.ndarray, high: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pairs of index[i] and order[low[i]:high[i]] whose hashes differ in at most BITS bits."""
    counts = high - low  # [len(index)]
    nonempty = np.flatnonzero(counts)
    index, low, counts = index[nonempty], low[nonempty], counts[nonempty]
    total = np.cumsum(counts)
    begin = 0
    while begin < len(index):
        before = total[begin - 1] if begin else 0
        end = max(int(np.searchsorted(total, before + CHUNK, "right")), begin + 1)
        part = counts[begin:end]
        left = np.repeat(index[begin:end], part)
        right = order[np.arange(len(left)) - np.repeat(np.cumsum(part) - part, part) + np.repeat(low[begin:end], part)]
        near = np.bitwise_count(hashes[left] ^ hashes[right]) <= BITS
        left, right = left[near], right[near]
        if len(left):
            yield np.minimum(left, right), np.maximum(left, right)
        begin = end


def same_colors(colors: Colors, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether no cell of two images differs by more than LEVELS, and the mean square difference is small compared with
    the variance within each image, bool [E]. So recolored, dark or small motifs are not duplicates.

    left, right: int64 [E]
    """
    near = np.empty(len(left), bool)
    for start in range(0, len(left), CHUNK >> 8):
        part = slice(start, start + (CHUNK >> 8))
        first, second = (colors[side[part]].astype(np.float32) for side in (left, right))
        distance = np.abs(first - second)
        variance = np.minimum(_variance(first), _variance(second))
        small = (distance**2).mean(axis=1) <= VARIANCE_FRACTION * variance
        near[part] = (distance.max(axis=1, initial=0) <= LEVELS) & small
    return near


def _variance(cells: np.ndarray) -> np.ndarray:
    """The variance of each image over its cells, mean over channels: [N]"""
    channels = cells.reshape(len(cells), -1, 3)
    return channels.var(axis=1).mean(axis=1)


def pairs(hashes: np.ndarray, colors: Colors) -> np.ndarray:
    """All pairs that are similar in hash and colors, int64 [E, 2], sorted, each once. hashes: uint64 [N]"""
    chunks = [np.empty((0, 2), np.int64)]
    for left, right in near_pairs(hashes):
        similar = same_colors(colors, left, right)
        chunks.append(np.stack((left[similar], right[similar]), axis=1))
    return np.unique(np.concatenate(chunks), axis=0)


def appearances(hashes: np.ndarray, colors: Colors) -> np.ndarray:
    """Two 64-bit hashes of the perceptual hash and the colors of each image, uint64 [N, 2]: equal for equal images,
    and for others with a probability of about 1e-26 a pair.

    hashes: uint64 [N]
    """
    result = np.stack((hashes, hashes ^ np.uint64(0x9E3779B97F4A7C15)), axis=1)
    factors = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)  # of SplitMix64 (Steele et al. 2014)
    for start in range(0, len(hashes), CHUNK >> 4):
        rows = np.arange(start, min(start + (CHUNK >> 4), len(hashes)))
        words, state = np.ascontiguousarray(colors[rows]).view(np.uint64), result[rows]
        for word in words.T:
            state = (state ^ word[:, None]) * factors
            state ^= state >> np.uint64(29)
        result[rows] = state
    return result


def leaders(hashes: np.ndarray, colors: Colors) -> np.ndarray:
    """For each image the first image that it is similar to, itself if there is none: int64 [N]

    A leader has no other leader, and every follower is similar to its leader directly. So no chain of similar images
    connects very different ones. hashes: uint64 [N]
    """
    leader = np.arange(len(hashes))
    order = np.argsort(hashes, kind="stable")
    edges = np.r_[0, np.flatnonzero(np.diff(hashes[order])) + 1, len(order)]
    for run in np.flatnonzero(np.diff(edges) > 1):
        group = order[edges[run] : edges[run + 1]]  # with the same hash: compared without listing pairs
        for _ in range(LEADERS):
            if len(group) < 2:
                break
            similar = same_colors(colors, np.full(len(group), group[0]), group)
            leader[group[similar]] = group[0]
            group = group[~similar]
        else:
            leader[group] = group
    heads = _select_leaders(hashes, leader)
    before = leader.copy()
    for first, later in heads[pairs(hashes[heads], _Selected(colors, heads))]:
        if leader[first] == first and leader[later] == later:
            leader[later] = first
    moved = np.flatnonzero(leader[before] != before)
    moved = moved[before[moved] != moved]  # whose leader now has another leader
    stay = ~same_colors(colors, moved, leader[before[moved]])
    leader[moved] = np.where(stay, moved, leader[before[moved]])
    return leader


def _select_leaders(hashes: np.ndarray, leader: np.ndarray) -> np.ndarray:
    """The images that are their own leader, in order; at most LEADERS per hash."""
    heads = np.flatnonzero(leader == np.arange(len(leader)))
    order = heads[np.argsort(hashes[heads], kind="stable")]
    first = np.r_[True, np.diff(hashes[order]) > 0] if len(order) else np.empty(0, bool)
    begin = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    return np.sort(order[np.arange(len(order)) - begin < LEADERS])
