"""Batches in an order that is a pure function of (seed, epoch): a place in the data is one integer.

Position p counts samples since the start of training: it is sample p mod n of epoch p // n. Any range of positions can
be read at any time, by any number of workers or ranks, so resuming needs no state but p.

Shapes: B batch, C channels, H W height and width.
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tessera import randomness
from tessera.data.images import Source, Unusable
from tessera.errors import TesseraError

STREAM = 0x6F726472  # of randomness: the order of samples
PATIENCE = 200  # unusable images in a row before the data set is called unusable


@dataclass(frozen=True)
class Batch:
    """pixels uint8 [B, C, H, W], label int64 [B], position int64 [B]"""

    pixels: Tensor
    label: Tensor
    position: Tensor


class Loader:
    """Reads ahead in threads (decoding leaves the interpreter free); every position gets one sample.

    An unusable image is replaced by the next usable one of the epoch's order, so that the order stays a function of
    position; `skipped` says which, and why. `part` is what one of several processes reads of every batch; `passed_over`
    holds the first positions of batches that are left out.
    """

    def __init__(
        self,
        source: Source,
        batch: int,
        seed: int,
        workers: int = 2,
        part: slice | None = None,
        pinned: bool = False,
    ) -> None:
        self.source = source
        self.batch = batch
        self.seed = seed
        self.workers = max(workers, 1)
        self.part = part or slice(0, batch)
        self.pinned = pinned
        self.skipped: dict[str, str] = {}
        self.passed_over: set[int] = set()
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return randomness.permutation(self.seed, STREAM, epoch, len(self.source)).numpy()

    def index(self, position: int) -> int:
        """Which sample of the source stands at a position."""
        epoch, place = divmod(position, len(self.source))
        return int(self._order(epoch)[place])

    def batches(self, position: int = 0) -> Generator[Batch, None, None]:
        """Endless batches from a position on. Raises TesseraError if no image is usable."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="tessera-data")
        ahead = deque()
        try:
            while True:
                while len(ahead) < self.workers + 1:
                    position = self.start(position)
                    ahead.append(pool.submit(self.read, position))
                    position += self.batch
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def start(self, position: int) -> int:
        """Where the next batch starts: here, unless it is passed over."""
        while position in self.passed_over:
            position += self.batch
        return position

    def read(self, position: int) -> Batch:
        """This process's part of the batch that starts at a position."""
        positions = range(position, position + self.batch)[self.part]
        stacked, label = zip(*map(self._sample, positions))
        batch = torch.from_numpy(np.stack(stacked)), torch.tensor(label), torch.tensor(positions)
        # Pinned memory travels to a GPU while it computes.
        return Batch(*(tensor.pin_memory() for tensor in batch) if self.pinned else batch)

    def names(self, position: int) -> list[str]:
        """What the samples of the whole batch at a position are called."""
        return [self.source.name(self.index(place)) for place in range(position, position + self.batch)]

    def _sample(self, position: int) -> tuple[np.ndarray, int]:
        epoch, place = divmod(position, len(self.source))
        order = self._order(epoch)
        tries = min(len(order), PATIENCE)
        name, reason = "", ""
        for later in range(tries):
            index = int(order[(place + later) % len(order)])
            try:
                return self.source.pixels(index), self.source.label(index)
            except Unusable as fault:
                name, reason = self.source.name(index), str(fault)
                self.skipped[name] = reason
        raise TesseraError(f"no usable image among {tries} of {len(order)}; the last, {name}, is {reason}")
