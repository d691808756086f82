"""Which images look alike: a perceptual hash of each, and the pairs among a million that differ in few of its bits.

Shapes: N images, E pairs.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np

SIDE = 32  # pixels of the grey picture that is hashed
LOW = 8  # frequencies kept in each direction: 64 bits; also the cells in each direction of the colours
BITS = 5  # so many of the 64 may differ; JPEG at quality 50, or scaling to a half, changes 0 to 4
LEVELS = 32  # of 255, by which the colour of a cell may differ
SHARE = 0.03  # of the variance within a picture: the mean square by which cells may differ
BANDS = ((0, 21), (21, 21), (42, 22))  # of the hash: first bit and width
LEADERS = 64  # pictures of one hash and different colours that are followed; more are texture, not copies
CHUNK = 1 << 22  # pairs looked at together


def perceptual_hash(grey: np.ndarray) -> int:
    """pHash (Zauner 2010): which of the lowest frequencies of a cosine transform lie above their median. 64 bits.

    grey: [SIDE, SIDE]
    """
    low = _cosines() @ grey.astype(np.float32) @ _cosines().T
    # The mean brightness is no structure, and would always be far above the median: its bit stays 0.
    bits = low.ravel() > np.median(low.ravel()[1:])
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@cache
def _cosines() -> np.ndarray:
    """The first rows of the discrete cosine transform, float32 [LOW, SIDE]"""
    return np.cos(np.pi / SIDE * np.arange(LOW)[:, None] * (np.arange(SIDE) + 0.5)).astype(np.float32)


def near_pairs(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs whose hashes differ in at most BITS bits, int64 ([E], [E]) a chunk at a time, the smaller index first;
    a pair may come up to three times.

    hashes: uint64 [N]. Of two hashes that differ in at most 5 bits, one of three bands differs in at most 1 (the
    multi-index of Norouzi et al. 2012): a million evenly spread hashes cost some 30 million comparisons, not 5e11.
    """
    for first, width in BANDS:
        band = ((hashes >> np.uint64(first)) & np.uint64((1 << width) - 1)).astype(np.int64)
        order = np.argsort(band, kind="stable")
        start = np.searchsorted(band[order], np.arange((1 << width) + 1))  # where each value begins in the order
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        yield from _matches(hashes, order, np.arange(len(hashes)), place + 1, start[band + 1])
        for bit in range(width):
            clear = np.flatnonzero(~band >> bit & 1)  # each pair once: from the one without the bit
            flipped = band[clear] | 1 << bit
            yield from _matches(hashes, order, clear, start[flipped], start[flipped + 1])


def _matches(
    hashes: np.ndarray, order: np.ndarray, index: np.ndarray, low: np.ndarray, high: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pairs of index[i] with order[low[i]:high[i]] that are near."""
    many = high - low
    some = np.flatnonzero(many)
    index, low, many = index[some], low[some], many[some]
    total = np.cumsum(many)
    begin = 0
    while begin < len(index):
        before = total[begin - 1] if begin else 0
        end = max(int(np.searchsorted(total, before + CHUNK, "right")), begin + 1)
        part = many[begin:end]
        left = np.repeat(index[begin:end], part)
        right = order[np.arange(len(left)) - np.repeat(np.cumsum(part) - part, part) + np.repeat(low[begin:end], part)]
        near = np.bitwise_count(hashes[left] ^ hashes[right]) <= BITS
        left, right = left[near], right[near]
        if len(left):
            yield np.minimum(left, right), np.maximum(left, right)
        begin = end


def same_colours(colours: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether no cell of two pictures differs by more than LEVELS, and all together by little against what there is to
    see in each, bool [E]: so that recoloured, dark or small drawings are told apart. colours: uint8 [N, cells]"""
    near = np.empty(len(left), bool)
    for first in range(0, len(left), CHUNK >> 8):
        part = slice(first, first + (CHUNK >> 8))
        one, other = (colours[side[part]].astype(np.float32) for side in (left, right))
        apart = np.abs(one - other)
        seen = np.minimum(_variance(one), _variance(other))
        near[part] = (apart.max(axis=1, initial=0) <= LEVELS) & ((apart**2).mean(axis=1) <= SHARE * seen)
    return near


def _variance(cells: np.ndarray) -> np.ndarray:
    """Of each picture, over its cells and channels: [N]"""
    channels = cells.reshape(len(cells), -1, 3)
    return channels.var(axis=1).mean(axis=1)


def pairs(hashes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """All pairs that look alike by hash and by colours, int64 [E, 2], in order, each once.

    hashes: uint64 [N]; colours: uint8 [N, cells]
    """
    found = [np.empty((0, 2), np.int64)]
    for left, right in near_pairs(hashes):
        kept = same_colours(colours, left, right)
        found.append(np.stack((left[kept], right[kept]), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def leaders(hashes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """For each picture the first one that it looks like, itself if there is none: int64 [N]

    A leader follows nobody, and whoever follows looks like its leader itself, not like a friend of a friend: so no
    chain leads from one picture to a quite different one. hashes: uint64 [N]; colours: uint8 [N, cells]
    """
    leader = np.arange(len(hashes))
    order = np.argsort(hashes, kind="stable")
    edges = np.r_[0, np.flatnonzero(np.diff(hashes[order])) + 1, len(order)]
    for many in np.flatnonzero(np.diff(edges) > 1):
        group = order[edges[many] : edges[many + 1]]  # of one hash: no pairs are needed, however many they are
        for _ in range(LEADERS):
            if len(group) < 2:
                break
            like = same_colours(colours, np.full(len(group), group[0]), group)
            leader[group[like]] = group[0]
            group = group[~like]
        else:
            leader[group] = group
    heads = _followed(hashes, leader)
    found = pairs(hashes[heads], colours[heads])
    before = leader.copy()
    for first, later in heads[found]:
        if leader[first] == first and leader[later] == later:
            leader[later] = first
    moved = np.flatnonzero(leader[before] != before)
    moved = moved[before[moved] != moved]  # whose own leader now follows another
    stay = ~same_colours(colours, moved, leader[before[moved]])
    leader[moved] = np.where(stay, moved, leader[before[moved]])
    return leader


def _followed(hashes: np.ndarray, leader: np.ndarray) -> np.ndarray:
    """Who follows nobody, in order; of one hash at most LEADERS."""
    heads = np.flatnonzero(leader == np.arange(len(leader)))
    order = heads[np.argsort(hashes[heads], kind="stable")]
    first = np.r_[True, np.diff(hashes[order]) > 0] if len(order) else np.empty(0, bool)
    begin = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    return np.sort(order[np.arange(len(order)) - begin < LEADERS])
