"""Batches in an order that is a pure function of (seed, epoch): a place in the data is one integer.

Position p counts samples since the start of training. Any range of positions can be read at any time, by any number of
workers or ranks, so resuming needs no state but p.

Shapes: B batch, C channels, H W height and width.
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from tessera import randomness
from tessera.data.buckets import Buckets
from tessera.data.files import FilesSource
from tessera.data.images import Dataset, InvalidSample
from tessera.data.latents import LatentsSource
from tessera.data.sampler import Bucketed, Shuffled
from tessera.errors import TesseraError

FLIP = 4  # stream of randomness: which positions are mirrored
KEPT = 2**30  # bytes of pixels that are kept once they were read, if all of a data set fit
PATIENCE = 200  # unusable images in a row before the data set is called unusable


@dataclass(frozen=True)
class Batch:
    """pixels uint8 [B, C, H, W], label int64 [B], position int64 [B]

    From a cache of latents, `pixels` are the codec's raw moments of them instead, floating [B, 2 C, H / f, W / f].
    """

    pixels: Tensor
    label: Tensor
    position: Tensor


def flip_mask(seed: int, position: Tensor) -> Tensor:
    """Which positions are mirrored where a recipe flips: bool [B, 1]"""
    return randomness.uniform(seed, position, FLIP) < 0.5


class Loader:
    """Reads ahead in threads (decoding leaves the interpreter free); every position gets one sample.

    An unusable image is replaced by the next usable one of the epoch's order, so that the order stays a function of
    position; `skipped` says which, and why. `part` is what one of several processes reads of every batch; `passed_over`
    holds the first positions of batches that are left out. With `buckets` (of images in files), every batch has the
    size of one of them. A small data set stays in memory as it was read, for later epochs. `flip`: whether latents of
    mirrored images are asked for; pixels are mirrored later.
    """

    def __init__(
        self,
        source: Dataset | LatentsSource,
        batch: int,
        seed: int,
        workers: int = 2,
        part: slice | None = None,
        pinned: bool = False,
        buckets: Buckets | None = None,
        flip: bool = False,
    ) -> None:
        self.source = source
        self.batch = batch
        self.seed = seed
        self.workers = max(workers, 1)
        self.part = part or slice(0, batch)
        self.pinned = pinned
        self.buckets = buckets
        self.flip = flip
        self.order = Bucketed(buckets.of, batch, seed) if buckets else Shuffled(len(source), batch, seed)
        self.skipped: dict[str, str] = {}
        self.skipped_positions: set[int] = set()
        self._kept: np.ndarray | None = None  # [N, C, H, W]
        self._lock = Lock()
        self._read = np.zeros(len(source), bool)  # whose pixels are kept

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
        while position in self.skipped_positions:
            position += self.batch
        return position

    def read(self, position: int) -> Batch:
        """This process's part of the batch that starts at a position."""
        offsets = range(self.batch)[self.part]
        positions = torch.tensor([position + offset for offset in offsets])
        if isinstance(self.source, LatentsSource):
            samples = self.order.batch(position)[self.part]
            turned = flip_mask(self.seed, positions)[:, 0].numpy() & self.flip
            label = torch.from_numpy(self.source.labels[samples].astype(np.int64))
            batch = self.source.gather(samples, turned), label, positions
        elif self._kept is not None and self._read[samples := self.order.batch(position)[self.part]].all():
            label = torch.tensor([self.source.label(index) for index in samples.tolist()])
            batch = torch.from_numpy(self._kept[samples]), label, positions
        else:
            stacked, labels = zip(*(self._sample(position, offset) for offset in offsets))
            batch = torch.from_numpy(np.stack(stacked)), torch.tensor(labels), positions
        # Pinned memory travels to a GPU while it computes.
        return Batch(*(tensor.pin_memory() for tensor in batch) if self.pinned else batch)

    def names(self, position: int) -> list[str]:
        """What the samples of the whole batch at a position are called."""
        return [self.source.name(int(index)) for index in self.order.batch(position)]

    def _sample(self, start: int, offset: int) -> tuple[np.ndarray, int]:
        tries, name, reason = 0, "", ""
        for index in islice(self.order.candidates(start, offset), PATIENCE):
            try:
                return self._pixels(index, start), self.source.label(index)
            except InvalidSample as fault:
                name, reason = self.source.name(index), str(fault)
                self.skipped[name] = reason
                tries += 1
        raise TesseraError(f"no usable image among {tries} of {len(self.source)}; the last, {name}, is {reason}")

    def _pixels(self, index: int, start: int) -> np.ndarray:
        if self.buckets is not None and isinstance(self.source, FilesSource):
            return self.source.pixels(index, self.buckets.sizes[self.order.bucket(start)])
        assert not isinstance(self.source, LatentsSource)
        if self._kept is not None and self._read[index]:
            return self._kept[index]
        pixels = self.source.pixels(index)
        if self._kept is None and len(self.source) * pixels.nbytes <= KEPT:
            with self._lock:
                if self._kept is None:  # takes memory as it is filled
                    self._kept = np.zeros((len(self.source), *pixels.shape), np.uint8)
        if self._kept is not None:
            self._kept[index] = pixels
            self._read[index] = True
        return pixels
