"""The order of samples: a pure function of (seed, position), so one integer describes the progress through the data.

Shapes: N samples, B samples of a batch, K buckets, P parts.
"""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Protocol

import numpy as np

from tessera import randomness

SAMPLE_STREAM, BATCH_STREAM = 0x6F726472, 0x736C6F74  # random streams that shuffle samples and batches
MAX_CYCLE = 10_000  # positions of a cycle of weights


class SampleOrder(Protocol):
    """`start` is the position of a batch's first sample. Batches follow each other without gaps."""

    def batch(self, start: int) -> np.ndarray:
        """The samples of a batch, int64 [B]"""
        ...

    def candidates(self, start: int, offset: int) -> Iterator[int]:
        """The sample at an offset in a batch, then the samples that may replace it, each once."""
        ...

    def bucket(self, start: int) -> int:
        """The bucket of a batch."""
        ...


class ShuffledOrder:
    """Position p holds sample p mod N of the permutation of epoch p // N."""

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self._permutation = lru_cache(maxsize=4)(self._shuffle)

    def batch(self, start: int) -> np.ndarray:
        epochs, offsets = np.divmod(np.arange(start, start + self.batch_size), self.length)
        return np.concatenate([self._permutation(int(e))[offsets[epochs == e]] for e in np.unique(epochs)])

    def candidates(self, start: int, offset: int) -> Iterator[int]:
        epoch, first = divmod(start + offset, self.length)
        return _cycle(self._permutation(epoch), first)

    def bucket(self, start: int) -> int:
        return 0

    def _shuffle(self, epoch: int) -> np.ndarray:
        return randomness.permutation(self.seed, SAMPLE_STREAM, epoch, self.length).numpy()


class ShardedOrder(ShuffledOrder):
    """The shards are shuffled, and then the samples of each `window` of them, in every epoch.

    So a few shards at a time are needed. shards: of each sample, int64 [N]
    """

    def __init__(self, shards: np.ndarray, window: int, batch_size: int, seed: int) -> None:
        super().__init__(len(shards), batch_size, seed)
        self.shards, self.window = shards, window

    def _shuffle(self, epoch: int) -> np.ndarray:
        places = randomness.permutation(self.seed, BATCH_STREAM, epoch, int(self.shards.max()) + 1).numpy()
        samples = super()._shuffle(epoch)
        return samples[np.argsort(places[self.shards[samples]] // self.window, kind="stable")]


class BucketedOrder:
    """Each batch comes from one bucket, each bucket in proportion to its samples, and no sample is left out.

    The samples of a bucket are an endless sequence of permutations, cut into batches. A batch may span two
    permutations, so each sample occurs exactly once in each permutation of its bucket. Batch j of a bucket of n samples
    is due at (j + 1/2) B / n epochs, and the batches due in an epoch are shuffled. So the buckets are mixed within an
    epoch, and the number of batches from a bucket is never more than half a batch from its exact proportion.
    """

    def __init__(self, buckets: np.ndarray, batch_size: int, seed: int) -> None:
        """buckets: the bucket of each sample, int [N]; every number below the largest must occur."""
        self.buckets, self.batch_size, self.seed = buckets, batch_size, seed
        by_bucket = np.argsort(buckets, kind="stable")
        self.counts = np.bincount(buckets)
        self._members = np.split(by_bucket, np.cumsum(self.counts)[:-1])
        self._slots = lru_cache(maxsize=4)(self._shuffle_slots)
        self._permutation = lru_cache(maxsize=2 * len(self.counts))(self._shuffle_members)

    def batch(self, start: int) -> np.ndarray:
        bucket, number = self._slot(start)
        first = number * self.batch_size
        rounds, offsets = np.divmod(np.arange(first, first + self.batch_size), self.counts[bucket])
        return np.concatenate([self._permutation(bucket, int(r))[offsets[rounds == r]] for r in np.unique(rounds)])

    def candidates(self, start: int, offset: int) -> Iterator[int]:
        bucket, number = self._slot(start)
        round_, first = divmod(number * self.batch_size + offset, int(self.counts[bucket]))
        return _cycle(self._permutation(bucket, round_), first)

    def bucket(self, start: int) -> int:
        return self._slot(start)[0]

    def _due(self, epoch: int) -> np.ndarray:
        """How many batches of each bucket are due before an epoch begins, int64 [K]"""
        return np.maximum(0, -((self.batch_size - 2 * epoch * self.counts) // (2 * self.batch_size)))

    def _slot(self, start: int) -> tuple[int, int]:
        """The bucket of a batch, and the number of the batch among those of its bucket."""
        number = start // self.batch_size
        epoch = start // len(self.buckets)
        while self._due(epoch).sum() > number:  # the sum is off by at most half a batch per bucket
            epoch -= 1
        while self._due(epoch + 1).sum() <= number:
            epoch += 1
        bucket, index = self._slots(epoch)[number - self._due(epoch).sum()]
        return int(bucket), int(index)

    def _shuffle_slots(self, epoch: int) -> np.ndarray:
        """The batches of an epoch as (bucket, number in that bucket), int64 [batches, 2]"""
        first, end = self._due(epoch), self._due(epoch + 1)
        slots = [(bucket, number) for bucket in range(len(first)) for number in range(first[bucket], end[bucket])]
        order = randomness.permutation(self.seed, BATCH_STREAM, epoch, len(slots)).numpy()
        return np.array(slots, np.int64).reshape(-1, 2)[order]

    def _shuffle_members(self, bucket: int, round_: int) -> np.ndarray:
        members = self._members[bucket]
        return members[randomness.permutation(self.seed, SAMPLE_STREAM + 1 + bucket, round_, len(members)).numpy()]


class WeightedOrder:
    """Each part of the data has a given share of the positions, whatever its size.

    The positions of a cycle, which has as many as the whole weights have in sum, go to the parts in turn: sample j of a
    part of weight w is due at (j + 1/2) / w of the cycle. So a batch of whole cycles has exactly the shares. The first
    k samples have at most (1 + s (P - 2)) / 2 too few or too many of a part with the share s of P parts: for each part,
    they differ by at most 1/2 from what is due. The samples of a part are an endless sequence of permutations.
    """

    def __init__(self, parts: np.ndarray, weights: Sequence[float], batch_size: int, seed: int) -> None:
        """parts: the part of each sample, int [N]; weights: of the parts [P], each with at least one sample"""
        self.batch_size, self.seed = batch_size, seed
        self._members = [np.flatnonzero(parts == part) for part in range(len(weights))]
        self.whole = whole_weights(weights)
        due = sorted((Fraction(2 * j + 1, 2 * w), part, j) for part, w in enumerate(self.whole) for j in range(w))
        self._cycle = np.array([(part, number) for _, part, number in due], np.int64)  # (part, number in the part)
        self._permutation = lru_cache(maxsize=2 * len(weights) + 2)(self._shuffle)

    def batch(self, start: int) -> np.ndarray:
        return np.array([next(self.candidates(start, offset)) for offset in range(self.batch_size)], np.int64)

    def candidates(self, start: int, offset: int) -> Iterator[int]:
        cycles, slot = divmod(start + offset, len(self._cycle))
        part, number = self._cycle[slot].tolist()
        round_, first = divmod(cycles * self.whole[part] + number, len(self._members[part]))
        return _cycle(self._permutation(part, round_), first)

    def bucket(self, start: int) -> int:
        return 0

    def _shuffle(self, part: int, round_: int) -> np.ndarray:
        members = self._members[part]
        return members[randomness.permutation(self.seed, SAMPLE_STREAM + 1 + part, round_, len(members)).numpy()]


def whole_weights(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the same ratios. Raises ValueError if they are large."""
    fractions = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(each.denominator for each in fractions))
    whole = [int(each * common) for each in fractions]
    whole = [each // math.gcd(*whole) for each in whole]
    if sum(whole) > MAX_CYCLE:
        raise ValueError(f"weights {', '.join(map(str, weights))} have no simple ratio: round them, such as 1, 3")
    return whole


def _cycle(order: np.ndarray, first: int) -> Iterator[int]:
    for step in range(len(order)):
        yield int(order[(first + step) % len(order)])
