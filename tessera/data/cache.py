"""Latents of a data set computed once: in parallel, shard by shard, by any number of processes and machines.

A shard holds the samples of a fixed stretch of the data. It is written whole, with its checksum inside. So whoever
finds a whole shard need not make it, and who makes it a second time writes the same bytes: shards need no locks, and a
cache that was killed goes on. What stands where: see `latents`.

Shapes: n samples of a shard, B batch, C latent channels, H W pixels, h w latents.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tessera import runtime
from tessera.codecs import AnyCodec, Codec
from tessera.data.buckets import Buckets
from tessera.data.files import FilesDataset
from tessera.data.images import Dataset, InvalidSample
from tessera.data.latents import (
    CACHE,
    DTYPES,
    FORMAT,
    LABELS,
    LATENTS,
    FLIPPED,
    INDICES,
    PLAN,
    SAMPLES,
    SKIPPED,
    METADATA_KEY,
    LatentsDataset,
    cache_spec,
    cache_key,
)
from tessera.errors import TesseraError, bullet_list
from tessera.files import atomic_file, remove_partials

if TYPE_CHECKING:
    from tessera.data import AnyData

AHEAD = 64  # images read before they are needed
DAMAGE = (OSError, SafetensorError, ValueError, KeyError, TypeError)  # that reading a shard can meet
BLOCK = 64  # latents whose statistics are taken at once


@dataclass(frozen=True)
class LatentStatistics:
    """Of `count` numbers of each latent channel, raw: mean [C], scatter [C] (the sum of squared distances from it), and
    spread [C] (the sum of the posterior's variances); float64."""

    count: int
    mean: np.ndarray
    sum_squares: np.ndarray
    sum_variances: np.ndarray

    @classmethod
    def from_moments(cls, moments: Tensor, channels: int) -> "LatentStatistics":
        """Of raw moments [B, 2C, h, w], or [B, C, h, w] without deviations, B > 0."""
        values = moments.to(torch.float64).numpy()
        mean, deviation = values[:, :channels], values[:, channels:]
        middle = mean.mean(axis=(0, 2, 3))
        scatter = ((mean - middle[:, None, None]) ** 2).sum(axis=(0, 2, 3))
        spread = (deviation**2).sum(axis=(0, 2, 3)) if deviation.shape[1] else np.zeros(channels)
        return cls(mean[:, 0].size, middle, scatter, spread)

    def __add__(self, other: "LatentStatistics") -> "LatentStatistics":
        """Of both (Chan et al. 1983, equation 2.1)."""
        count, apart = self.count + other.count, other.mean - self.mean
        return LatentStatistics(
            count,
            self.mean + other.count / count * apart,
            self.sum_squares + other.sum_squares + self.count * other.count / count * apart**2,
            self.sum_variances + other.sum_variances,
        )

    @property
    def mode_std(self) -> np.ndarray:
        """Standard deviation of the posteriors' means, [C]"""
        return np.sqrt(self.sum_squares / self.count)

    @property
    def sample_std(self) -> np.ndarray:
        """Standard deviation of draws from the posteriors, [C]: their variance is that of the means, and on average the
        posteriors' own."""
        return np.sqrt((self.sum_squares + self.sum_variances) / self.count)

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it, without loss."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> "LatentStatistics":
        return cls(told["count"], *(np.array(told[name], np.float64) for name in ("mean", "scatter", "spread")))


class CacheWriter:
    """What is to be cached, and how far it is. It may be pickled: processes that write shards of it build their codec
    from its settings."""

    def __init__(
        self,
        folder: Path,
        config: "AnyData",
        source: Dataset,
        codec_config: AnyCodec,
        codec: Codec,
        dtype: str = "float16",
        shard_size: int = 512,
    ) -> None:
        """folder: that of all caches; dtype: float16 or bfloat16; samples: of the data, in a shard.

        Raises TesseraError where codec and data do not fit each other.
        """
        _check(config, codec)
        self.config, self.source, self.codec_config, self.codec = config, source, codec_config, codec
        self.dtype, self.samples = DTYPES[dtype], shard_size
        self.spec = cache_spec(config, codec, source) | {"dtype": dtype, "samples": shard_size, "format": FORMAT}
        self.key = cache_key(self.spec)
        self.folder = folder / self.key
        self.buckets = None
        if (buckets := getattr(config, "buckets", None)) is not None and isinstance(source, FilesDataset):
            self.buckets = Buckets.assign(source.shapes(), buckets.sizes(config.size))
        # One size after the other, each in stretches of so many samples.
        of = np.zeros(len(source), np.int64) if self.buckets is None else self.buckets.bucket_ids
        self._order = np.argsort(of, kind="stable")
        self._stretches = [
            (size, start, min(start + shard_size, last))
            for size, (first, last) in enumerate(_runs(of[self._order]))
            for start in range(first, last, shard_size)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "codec": None}

    def __len__(self) -> int:
        """How many shards."""
        return len(self._stretches)

    def size(self, shard: int) -> tuple[int, int]:
        """Height and width of the images of a shard, in pixels."""
        return self.config.size if self.buckets is None else self.buckets.sizes[self._stretches[shard][0]]

    def indices(self, shard: int) -> np.ndarray:
        """Which samples of the data a shard is made of, int64."""
        _, start, stop = self._stretches[shard]
        return self._order[start:stop]

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.safetensors"

    def begin(self) -> None:
        """Make the folder, and write down what is cached. Raises TesseraError if it cannot be written."""
        told = {"codec": _named(self.codec_config), "data": self.config.description}
        path = self.folder / PLAN
        if not path.exists():
            _write(path, json.dumps({"facts": self.spec, "told": told}, indent=1).encode())

    def is_valid(self, shard: int) -> bool:
        """Whether a shard is there, with the bytes it was written with."""
        try:
            told, tensors = _read(self.path(shard))
            return told["key"] == self.key and told["sha256"] == _digest(told, tensors)
        except DAMAGE:
            return False

    def missing(self, shards: Sequence[int]) -> Iterator[tuple[int, bool]]:
        """Each of these shards, and whether it must be written: it is not there, or not whole."""
        with ThreadPoolExecutor(cores()) as pool:  # hashing leaves the interpreter free
            for shard, whole in zip(shards, _ahead(pool, self.is_valid, shards, 4)):
                yield shard, not whole

    def write(
        self, shards: Iterable[int], device: torch.device, batch: int, readers: int = 1
    ) -> Generator[int, None, None]:
        """Write shards, one after the other; yields every so often how many samples more are done.

        batch: images encoded at once; readers: threads that read ahead. Raises TesseraError.
        """
        if self.codec is None:
            self.codec = self.codec_config.build().to(device)
        numbers = ((shard, int(number)) for shard in shards for number in [-1, *self.indices(shard)])
        with _repeatable(device), ThreadPoolExecutor(readers, thread_name_prefix="tessera-cache") as pool:
            making: ShardWriter | None = None
            for shard, number, pixels in _ahead(pool, self._pixels, numbers, AHEAD):
                if pixels is None:  # the first of a shard
                    if making is not None:
                        yield making.finish()
                    making = ShardWriter(self, shard, device, batch)
                elif making is not None and (done := making.add(number, pixels)):
                    yield done
            if making is not None:
                yield making.finish()

    def _pixels(self, place: tuple[int, int]) -> tuple[int, int, np.ndarray | InvalidSample | None]:
        """uint8 [C, H, W] of a sample, or why there are none; None in place of a shard's beginning."""
        shard, number = place
        if number < 0:
            return shard, number, None
        try:
            size = () if self.buckets is None else (self.size(shard),)
            return shard, number, self.source.pixels(number, *size)
        except InvalidSample as fault:
            return shard, number, fault

    def finish(self) -> dict[str, Any] | None:
        """Once all shards are there: put together what is known of them, and write it last; None if some are missing.

        Raises TesseraError if no sample could be used.
        """
        shards, skipped, statistics = [], [], []
        labels, numbers = [], []
        for shard in range(len(self)):
            path = self.path(shard)
            if not path.exists():
                return None
            try:
                told, tensors = _read(path)
            except DAMAGE as error:
                raise TesseraError(f"{path} is damaged ({error}): run the same command again") from None
            count = len(tensors[LABELS])
            shards.append(
                {
                    "file": path.name,
                    "count": count,
                    "size": told["size"],
                    "bytes": path.stat().st_size,
                    "sha256": told["sha256"],
                }
            )
            skipped += told["skipped"]
            statistics += [LatentStatistics.from_json(told["statistics"])] if count else []
            labels.append(tensors[LABELS])
            numbers.append(tensors[INDICES])
        if not statistics:
            reasons = [f"{name}: {reason}" for _, name, reason in skipped]
            raise TesseraError(f"no image of {self.config.description} could be used:{bullet_list(reasons)}")
        whole = reduce(LatentStatistics.__add__, statistics)
        told = {
            "count": sum(shard["count"] for shard in shards),
            "skipped": len(skipped),
            "class_names": list(self.source.class_names),
            "codec": self.codec_config.model_dump(mode="json"),
            "statistics": {
                "mean": whole.mean.tolist(),
                "std of means": whole.mode_std.tolist(),
                "std of draws": whole.sample_std.tolist(),
            },
            "shards": shards,
        }
        _write(self.folder / SAMPLES, save({LABELS: torch.cat(labels), INDICES: torch.cat(numbers)}))
        lines = [
            json.dumps({"number": number, "name": name, "reason": reason}, ensure_ascii=False)
            for number, name, reason in skipped
        ]
        _write(self.folder / SKIPPED, "".join(f"{line}\n" for line in lines).encode())
        _write(self.folder / CACHE, json.dumps(told, indent=1).encode())
        remove_partials(self.folder)  # of those that were killed
        return told


class ShardWriter:
    """A shard in the making."""

    def __init__(self, cache: CacheWriter, shard: int, device: torch.device, batch: int) -> None:
        self.cache, self.shard, self.device, self.batch = cache, shard, device, batch
        self.waiting: list[np.ndarray] = []
        self.numbers: list[int] = []
        self.skipped: list[tuple[int, str, str]] = []
        self.latents: list[Tensor] = []
        self.mirrored: list[Tensor] = []

    def add(self, number: int, pixels: np.ndarray | InvalidSample) -> int:
        """Take one more sample; returns how many are done with it that were not before."""
        if isinstance(pixels, InvalidSample):
            self.skipped.append((number, self.cache.source.name(number), str(pixels)))
            return 1
        self.numbers.append(number)
        self.waiting.append(pixels)
        return self._encode() if len(self.waiting) == self.batch else 0

    @torch.no_grad()
    def _encode(self) -> int:
        done = len(self.waiting)
        if done:
            pixels = torch.from_numpy(np.stack(self.waiting)).to(self.device, torch.float32) / 127.5 - 1
            self.latents.append(self._moments(pixels))
            if self.cache.config.hflip:
                self.mirrored.append(self._moments(pixels.flip(-1)))
            self.waiting.clear()
        return done

    def _moments(self, pixels: Tensor) -> Tensor:
        codec, dtype = self.cache.codec, self.cache.dtype
        moments = codec.moments(pixels)
        if not codec.stochastic:
            moments = moments[:, : codec.latent_channels]
        stored = moments.to(dtype).cpu().contiguous()
        if not (fits := stored.isfinite().flatten(1).all(dim=1)).all():
            number = self.numbers[len(self.numbers) - len(pixels) + int((~fits).nonzero()[0])]
            name = self.cache.source.name(number)
            if moments.isfinite().all():
                raise TesseraError(f"latents of {name} are too large for {str(dtype)[6:]}: give --dtype bfloat16")
            raise TesseraError(f"the codec makes latents of {name} that are no numbers (NaN or infinite)")
        return stored

    def finish(self) -> int:
        """Encode what is left, and write the shard; returns how many samples are done that were not before."""
        done, cache = self._encode(), self.cache
        told: dict[str, Any] = {
            "key": cache.key,
            "shard": self.shard,
            "size": list(cache.size(self.shard)),
            "skipped": self.skipped,
        }
        tensors = {
            LABELS: torch.tensor([cache.source.label(number) for number in self.numbers], dtype=torch.int32),
            INDICES: torch.tensor(self.numbers, dtype=torch.int64),
        }
        for name, encoded in ((LATENTS, self.latents), (FLIPPED, self.mirrored)):
            if encoded:
                tensors[name] = torch.cat(encoded)
        if self.latents:
            blocks = [block for each in (self.latents, self.mirrored) for block in each]
            parts = (part for block in blocks for part in block.split(BLOCK))
            channels = cache.codec.latent_channels
            told["statistics"] = reduce(
                LatentStatistics.__add__, (LatentStatistics.from_moments(part, channels) for part in parts)
            ).to_json()
        told["sha256"] = _digest(told, tensors)
        try:
            _write(cache.path(self.shard), save(tensors, {METADATA_KEY: json.dumps(told)}))
        except TesseraError:
            if not cache.is_valid(self.shard):  # another wrote the same meanwhile, and cleared up
                raise
        return done


def write_in_processes(
    cache: CacheWriter, shards: Sequence[int], workers: int, batch: int
) -> Generator[int, None, None]:
    """Write shards on the CPU by so many processes; yields every so often how many samples more are done.

    Whatever ends this process ends those at once. Raises TesseraError.
    """
    if workers == 1 or len(shards) < 2:
        yield from cache.write(shards, torch.device("cpu"), batch)
        return
    context = multiprocessing.get_context("spawn")
    todo = deque(shards)
    pipes, processes = [], []
    try:
        with _deaf_to_interrupts():  # Ctrl-C reaches every process of a terminal: this one ends the others
            for _ in range(min(workers, len(shards))):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, cache, batch), daemon=True)
                process.start()
                theirs.close()
                ours.send(todo.popleft())
                pipes.append(ours)
                processes.append(process)
        while pipes:
            ready: list[Any] = connection.wait(pipes)
            for pipe in ready:
                try:
                    told = pipe.recv()
                except EOFError:
                    raise TesseraError(
                        "a process that encodes ended before its work was done; if this machine is short of memory, "
                        "give fewer --workers: the same command goes on"
                    ) from None
                if isinstance(told, int):
                    yield told
                elif told is not None:
                    raise told
                elif todo:
                    pipe.send(todo.popleft())
                else:
                    pipes.remove(pipe)
    finally:
        for process in processes:
            process.kill()
            process.join()


def damaged_shards(source: LatentsDataset, progress: Callable[[int, int], None]) -> list[str]:
    """The files of a finished cache that are not as they were written."""

    def is_whole(shard: dict[str, Any]) -> bool:
        try:
            told, tensors = _read(source.folder / shard["file"])
            return told["sha256"] == shard["sha256"] == _digest(told, tensors)
        except DAMAGE:
            return False

    found = []
    with ThreadPoolExecutor(cores()) as pool:
        for done, (shard, whole) in enumerate(zip(source.shards, _ahead(pool, is_whole, source.shards, 4)), start=1):
            found += [] if whole else [shard["file"]]
            progress(done, len(source.shards))
    return found


def scaled_statistics(statistics: dict[str, list[float]], codec: Codec) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the latents that a network sees, by channel, from those of raw latents."""
    each = torch.ones(codec.latent_channels, 1, 1, dtype=torch.float64)
    shift, scale = (each * torch.as_tensor(number).cpu() for number in (codec.shift, codec.scale))
    mean, deviation = (torch.tensor(statistics[name], dtype=torch.float64) for name in ("mean", "std of draws"))
    return ((mean - shift.flatten()) * scale.flatten()).tolist(), (deviation * scale.flatten()).tolist()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _work(pipe: Any, cache: CacheWriter, batch: int) -> None:
    """A process that writes the shards it is told, one by one: sends counts of samples, and None after each shard."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runtime.keep_freed_memory()
    try:
        while True:
            for done in cache.write([pipe.recv()], torch.device("cpu"), batch):
                pipe.send(done)
            pipe.send(None)
    except TesseraError as error:
        pipe.send(error)
    except (EOFError, BrokenPipeError):
        pass


def _end_with_parent() -> None:
    """A process that was killed cannot end the others itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes that are started within ignore Ctrl-C from their first instant."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """The same bits from the same pixels, however many processes there are: one thread each, fixed ways on a GPU."""
    if device.type == "cpu":
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
    else:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield


def _ahead(pool: ThreadPoolExecutor, call: Any, items: Iterable[Any], count: int) -> Iterator[Any]:
    """`map`, so many results begun before they are asked for."""
    begun = deque()
    try:
        for item in items:
            begun.append(pool.submit(call, item))
            if len(begun) > count:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for one in begun:
            one.cancel()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a shard says of itself, and its tensors as a memory map. Raises what DAMAGE names."""
    with safe_open(path, "pt") as file:
        told = json.loads((file.metadata() or {})[METADATA_KEY])
        return told, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)


def _digest(told: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """A sha256 over all that a shard holds."""
    said = {name: value for name, value in told.items() if name != "sha256"}
    whole = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _write(path: Path, content: bytes) -> None:
    with atomic_file(path, uuid.uuid4().hex[:8]) as partial:
        partial.write_bytes(content)


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    """Where equal numbers begin and end in an array in order, for each number from 0."""
    ends = np.bincount(values).cumsum().tolist()
    return list(zip([0, *ends], ends))


def _check(config: "AnyData", codec: Codec) -> None:
    if codec.factor == 1:
        raise TesseraError("the codec is that of pixels, so there are no latents to cache: give codec.source=FOLDER")
    if codec.pixel_channels != config.channels:
        raise TesseraError(
            f"the codec takes images of {codec.pixel_channels} channels, but data.channels is {config.channels}"
        )
    buckets = getattr(config, "buckets", None)
    for size in [config.size] if buckets is None else buckets.sizes(config.size):
        if size[0] % codec.factor or size[1] % codec.factor:
            raise TesseraError(
                f"images of {size[0]} x {size[1]} do not divide into squares of {codec.factor} pixels, a latent each: "
                "change data.size" + ("" if buckets is None else " or data.buckets.multiple")
            )


def _named(config: AnyCodec) -> str:
    """A codec as people know it."""
    return f"{config.kind} {getattr(config, 'source', '')}".strip()
