"""Batches in an order that is a pure function of (seed, position).

A position counts samples since the start of training. Any range of positions can be read at any time, by any number of
threads or ranks, so the position is the only state needed to resume.

Shapes: B batch, C channels, T frames, H W height and width.
"""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from tessera import randomness
from tessera.conditioning import Condition
from tessera.data.buckets import Buckets
from tessera.data.control import ControlImages
from tessera.data.decoding import DecodingProcesses
from tessera.data.files import FilesDataset
from tessera.data.images import Dataset, InvalidSample
from tessera.data.latents import LatentsDataset
from tessera.data.sampler import BucketedOrder, SampleOrder, ShuffledOrder
from tessera.errors import TesseraError
from tessera.rows import Rows

FLIP_STREAM = 4  # random stream that decides which positions are flipped
AHEAD = 32  # batches before its first sample is read that a file in a bucket is downloaded
MEMORY_LIMIT = 2**30  # bytes; a data set whose pixels need no more stays in memory once it was read
MAX_INVALID = 200  # invalid images in a row that make the data set unusable


@dataclass(frozen=True)
class Batch(Rows):
    """pixels uint8 [B, C, H, W] or [B, C, T, H, W], the condition of each sample, position int64 [B]

    own_frames: of clips that were lengthened with data.short=pad, the frames before the padding, int64 [B]; None: all.
    From a latent cache, `pixels` are the codec's raw moments instead, floating point [B, 2 C, H / f, W / f]. control: a
    control image of each image, shaped like it.
    """

    pixels: Tensor
    condition: Condition
    position: Tensor
    control: Tensor | None = None
    own_frames: Tensor | None = None

    def pin_memory(self) -> "Batch":
        pinned = {name: value.pin_memory() for name, value in self.condition.present.items()}
        control = None if self.control is None else self.control.pin_memory()
        condition, position = replace(self.condition, **pinned), self.position.pin_memory()
        return Batch(self.pixels.pin_memory(), condition, position, control, self.own_frames)


def flip_mask(seed: int, position: Tensor) -> Tensor:
    """Which positions are flipped where the recipe sets `data.hflip`: bool [B, 1]"""
    return randomness.uniform(seed, position, FLIP_STREAM) < 0.5


class Loader:
    """Reads batches ahead in threads; decoding releases the GIL, or is done by processes.

    An invalid image is replaced by the next valid one of the epoch's order, so that the order stays a function of
    position. A small data set stays in memory once it was read.

    Attributes:
        invalid_samples: the reason by the name of each sample that could not be used.
        invalid_rows: the numbers of these samples.
        short_samples: how many frames each clip has that data.short lengthened, by its name.
        skipped_positions: first positions of the batches to leave out.
    """

    def __init__(
        self,
        dataset: Dataset | LatentsDataset,
        batch_size: int,
        seed: int,
        num_workers: int = 2,
        rank_slice: slice | None = None,
        pin_memory: bool = False,
        buckets: Buckets | None = None,
        hflip: bool = False,
        condition_type: type[Condition] = Condition,
        condition_fields: Sequence[str] = ("label",),
        control: ControlImages | None = None,
        order: SampleOrder | None = None,
        decode_processes: int = 0,
    ) -> None:
        """rank_slice: the part of every batch that this rank reads; buckets: of images in files, every batch has the
        size of one bucket; hflip: whether to read latents of flipped images (pixels are flipped after loading);
        condition_fields: the fields of the condition that are read; control: what gives their control images; order:
        instead of that of the buckets, or of shuffled epochs; decode_processes: of images in files, the number of
        processes that decode them, 0: the threads do. Raises TesseraError if there is nothing for them to decode."""
        if decode_processes and not (isinstance(dataset, FilesDataset) and dataset.config.frames is None):
            raise TesseraError(
                f"training.decode_processes is {decode_processes}, but the data are not images in files, which alone "
                "are decoded in processes: leave it out"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = max(num_workers, 1)
        self.rank_slice = rank_slice or slice(0, batch_size)
        self.pin_memory = pin_memory
        self.buckets = buckets
        self.hflip = hflip
        self.condition_type = condition_type
        self.condition_fields = condition_fields
        self.control = control
        if order is not None:
            self.order = order
        elif buckets is None:
            self.order = ShuffledOrder(len(dataset), batch_size, seed)
        else:
            self.order = BucketedOrder(buckets.bucket_ids, batch_size, seed)
        self.decode_processes = decode_processes
        self._decoder: DecodingProcesses | None = None
        self.invalid_samples: dict[str, str] = {}
        self.invalid_rows: set[int] = set()
        self.short_samples: dict[str, str] = {}
        self.skipped_positions: set[int] = set()
        self._memory: np.ndarray | None = None  # pixels, [N, C, H, W] or [N, C, T, H, W]
        self._in_memory = np.zeros(len(dataset), bool)
        self._lock = Lock()

    @property
    def own_frames(self) -> np.ndarray | None:
        """The frames of each clip before the padding, int [N]; None if the loss has all frames."""
        dataset = self.dataset
        if isinstance(dataset, FilesDataset):
            return dataset.own_frames if dataset.config.short == "pad" else None
        return dataset.own_frames if isinstance(dataset, LatentsDataset) else None

    def batches(self, position: int = 0) -> Generator[Batch, None, None]:
        """Endless batches from a position on. Raises TesseraError if no image is valid."""
        num_threads = max(self.num_workers, self.decode_processes)  # a thread waits for each process
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="tessera-data")
        pending = deque()
        dataset, prefetch = self.dataset, None
        if isinstance(dataset, FilesDataset | LatentsDataset) and dataset.remote:
            prefetch = dataset.prefetch
        ahead = ThreadPoolExecutor(1, thread_name_prefix="tessera-download")
        try:
            if self.decode_processes and not self._in_memory.all():
                assert isinstance(self.dataset, FilesDataset)
                self._decoder = DecodingProcesses(self.dataset.config, self.decode_processes)
            while True:
                while len(pending) < num_threads + 1:
                    position = self.next_position(position)
                    if prefetch is not None:  # an error is raised where the sample is read
                        ahead.submit(prefetch, self.order.batch(position + AHEAD * self.batch_size)[self.rank_slice])
                    pending.append(pool.submit(self.load_batch, position))
                    position += self.batch_size
                yield pending.popleft().result()
        finally:
            ahead.shutdown(wait=True, cancel_futures=True)
            pool.shutdown(wait=True, cancel_futures=True)
            if self._decoder is not None:
                self._decoder.close()
                self._decoder = None

    def next_position(self, position: int) -> int:
        """The first position from here on at which a batch starts that is not skipped."""
        while position in self.skipped_positions:
            position += self.batch_size
        return position

    def load_batch(self, position: int) -> Batch:
        """This rank's part of the batch that starts at a position."""
        offsets = range(self.batch_size)[self.rank_slice]
        positions = torch.tensor([position + offset for offset in offsets])
        if isinstance(self.dataset, LatentsDataset):
            samples = self.order.batch(position)[self.rank_slice]
            flip = flip_mask(self.seed, positions)[:, 0].numpy() & self.hflip
            pixels = self.dataset.gather(samples, flip)
        elif self._memory is not None and self._in_memory[samples := self.order.batch(position)[self.rank_slice]].all():
            pixels = torch.from_numpy(self._memory[samples])
        else:
            samples, images = self._decode(position)
            if len(samples) < len(offsets):
                decoded = dict(zip(samples, images))
                images, samples = zip(*(self._sample(position, offset, decoded) for offset in offsets))
                images = np.stack(images)
            else:
                self._remember(samples, images)
            pixels = torch.from_numpy(images)
        numbers = [int(sample) for sample in samples]
        condition = self.condition_type.load(self.condition_fields, self.dataset, numbers, positions)
        control = None if self.control is None else torch.from_numpy(self.control(pixels.numpy(), numbers))
        own_frames = None if self.own_frames is None else torch.from_numpy(self.own_frames[numbers].astype(np.int64))
        batch = Batch(pixels, condition, positions, control, own_frames)
        return batch.pin_memory() if self.pin_memory else batch

    def names(self, position: int) -> list[str]:
        """The names of all samples of the batch at a position."""
        return [self.dataset.name(int(index)) for index in self.order.batch(position)]

    def _decode(self, start: int) -> tuple[list[int], np.ndarray]:
        """The samples of a batch that processes decoded, and their pixels: without invalid ones."""
        if self._decoder is None:
            return [], np.empty(0)
        assert isinstance(self.dataset, FilesDataset)
        numbers: list[int] = []
        files: list[Path | bytes] = []
        for index in self.order.batch(start)[self.rank_slice].tolist():
            with suppress(InvalidSample):  # read once more by `_sample`, for its reason
                files.append(self.dataset.encoded(index))
                numbers.append(index)
        size = None if self.buckets is None else self.buckets.sizes[self.order.bucket(start)]
        valid, pixels = self._decoder.decode(files, size)
        return [numbers[place] for place in valid], pixels

    def _sample(self, start: int, offset: int, decoded: dict[int, np.ndarray]) -> tuple[np.ndarray, int]:
        """The pixels and the number of the sample at an offset in a batch, or of the valid one that replaces it."""
        tries, name, reason = 0, "", ""
        for index in islice(self.order.candidates(start, offset), MAX_INVALID):
            try:
                return self._pixels(index, start, decoded.get(index)), index
            except InvalidSample as error:
                name, reason = self.dataset.name(index), str(error)
                self.invalid_samples[name] = reason
                self.invalid_rows.add(index)
                tries += 1
        raise TesseraError(f"no valid image among {tries} of {len(self.dataset)}; the last, {name}: {reason}")

    def _pixels(self, index: int, start: int, decoded: np.ndarray | None) -> np.ndarray:
        if self.buckets is not None and isinstance(self.dataset, FilesDataset):
            if decoded is not None:
                return decoded
            pixels = self.dataset.pixels(index, self.buckets.sizes[self.order.bucket(start)])
            self._note_short(index, pixels)
            return pixels
        assert not isinstance(self.dataset, LatentsDataset)
        if self._memory is not None and self._in_memory[index]:
            return self._memory[index]
        pixels = self.dataset.pixels(index) if decoded is None else decoded
        self._note_short(index, pixels)
        self._remember([index], pixels[None])
        return pixels

    def _remember(self, numbers: Sequence[int], pixels: np.ndarray) -> None:
        """Keep samples of a small data set in memory. pixels: [B, C, H, W] or [B, C, T, H, W]"""
        if self.buckets is not None:  # of several sizes
            return
        if self._memory is None and len(self.dataset) * pixels[0].nbytes <= MEMORY_LIMIT:
            with self._lock:
                if self._memory is None:  # the system provides the memory only as it is filled
                    self._memory = np.zeros((len(self.dataset), *pixels.shape[1:]), np.uint8)
        if self._memory is not None:
            self._memory[numbers] = pixels
            self._in_memory[numbers] = True

    def _note_short(self, index: int, pixels: np.ndarray) -> None:
        """Name a clip that data.short lengthened."""
        if isinstance(self.dataset, FilesDataset) and self.dataset.own_frames is not None:
            own = int(self.dataset.own_frames[index])
            if own < pixels.shape[1]:
                self.short_samples[self.dataset.name(index)] = f"{own} of {pixels.shape[1]} frames"
