"""Which sample stands where: a pure function of (seed, position), so that a place in the data is one integer.

Shapes: N samples, B samples of a batch, K buckets.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol

import numpy as np

from tessera import randomness

STREAM, SLOTS = 0x6F726472, 0x736C6F74  # of randomness: samples of an epoch, batches of an epoch


class SampleOrder(Protocol):
    """`start` is the position at which a batch begins; batches lie one behind the other."""

    def batch(self, start: int) -> np.ndarray:
        """The samples of a batch, int64 [B]"""
        ...

    def candidates(self, start: int, offset: int) -> Iterator[int]:
        """The sample at a place of a batch, then those that may stand in for it, each once."""
        ...

    def bucket(self, start: int) -> int:
        """Which bucket a batch is from."""
        ...


class Shuffled:
    """Position p is sample p mod N of the shuffle of epoch p // N."""

    def __init__(self, length: int, batch: int, seed: int) -> None:
        self.length, self.size, self.seed = length, batch, seed
        self._epoch = lru_cache(maxsize=4)(self._shuffle)

    def batch(self, start: int) -> np.ndarray:
        epochs, places = np.divmod(np.arange(start, start + self.size), self.length)
        return np.concatenate([self._epoch(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])

    def candidates(self, start: int, offset: int) -> Iterator[int]:
        epoch, place = divmod(start + offset, self.length)
        return _round(self._epoch(epoch), place)

    def bucket(self, start: int) -> int:
        return 0

    def _shuffle(self, epoch: int) -> np.ndarray:
        return randomness.permutation(self.seed, STREAM, epoch, self.length).numpy()


class Bucketed:
    """Every batch from one bucket, every bucket in proportion to its samples, and none of them left out.

    Each bucket is an endless row of shuffles of its own samples, cut into batches; what remains of one shuffle begins
    the batch that the next goes on with, so a bucket's sample comes exactly once in each of its rounds. The j-th batch
    of a bucket of n samples is due at (j + 1/2) B / n epochs, and the batches due in an epoch are shuffled: within an
    epoch all buckets come mixed, and since the beginning each is at most half a batch off its share.
    """

    def __init__(self, buckets: np.ndarray, batch: int, seed: int) -> None:
        """buckets: that of each sample, int [N]; every number below the largest must have a sample."""
        self.buckets, self.size, self.seed = buckets, batch, seed
        by_bucket = np.argsort(buckets, kind="stable")
        self.counts = np.bincount(buckets)
        self._members = np.split(by_bucket, np.cumsum(self.counts)[:-1])
        self._slots = lru_cache(maxsize=4)(self._shuffle_slots)
        self._round = lru_cache(maxsize=2 * len(self.counts))(self._shuffle_round)

    def batch(self, start: int) -> np.ndarray:
        bucket, number = self._slot(start)
        rounds, places = np.divmod(np.arange(number * self.size, (number + 1) * self.size), self.counts[bucket])
        return np.concatenate([self._round(bucket, int(each))[places[rounds == each]] for each in np.unique(rounds)])

    def candidates(self, start: int, offset: int) -> Iterator[int]:
        bucket, number = self._slot(start)
        passed, place = divmod(number * self.size + offset, int(self.counts[bucket]))
        return _round(self._round(bucket, passed), place)

    def bucket(self, start: int) -> int:
        return self._slot(start)[0]

    def _due(self, epoch: int) -> np.ndarray:
        """How many batches of each bucket are due before an epoch begins, int64 [K]"""
        return np.maximum(0, -((self.size - 2 * epoch * self.counts) // (2 * self.size)))

    def _slot(self, start: int) -> tuple[int, int]:
        """The bucket of a batch, and which of that bucket's batches it is."""
        number = start // self.size
        epoch = start // len(self.buckets)
        while self._due(epoch).sum() > number:  # the sum is at most half a batch for each bucket off
            epoch -= 1
        while self._due(epoch + 1).sum() <= number:
            epoch += 1
        bucket, place = self._slots(epoch)[number - self._due(epoch).sum()]
        return int(bucket), int(place)

    def _shuffle_slots(self, epoch: int) -> np.ndarray:
        """The batches of an epoch as (bucket, number in that bucket), int64 [batches, 2]"""
        first, end = self._due(epoch), self._due(epoch + 1)
        slots = [(bucket, number) for bucket in range(len(first)) for number in range(first[bucket], end[bucket])]
        mixed = randomness.permutation(self.seed, SLOTS, epoch, len(slots)).numpy()
        return np.array(slots, np.int64).reshape(-1, 2)[mixed]

    def _shuffle_round(self, bucket: int, number: int) -> np.ndarray:
        members = self._members[bucket]
        return members[randomness.permutation(self.seed, STREAM + 1 + bucket, number, len(members)).numpy()]


def _round(order: np.ndarray, place: int) -> Iterator[int]:
    for later in range(len(order)):
        yield int(order[(place + later) % len(order)])
