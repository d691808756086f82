"""Writing of cached latents: in parallel, shard by shard, by any number of processes and machines.

A shard contains the samples of a fixed range of the data. It is written atomically, with its checksum. A valid shard is
not written again, and writing it twice gives the same bytes. So shards need no locks, and the same command resumes a
cache that was killed. For the files see `latents`.

Shapes: n samples of a shard, B batch, C latent channels, H W pixels, h w latents.
"""

import hashlib
import json
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tessera import runtime, storage
from tessera.codecs import AnyCodec, Codec
from tessera.data.buckets import Buckets
from tessera.data.files import FilesDataset
from tessera.data.images import Dataset, InvalidSample, sample_size
from tessera.data.latents import (
    CACHE,
    DTYPES,
    FLIPPED,
    FORMAT,
    INDICES,
    LABELS,
    LATENTS,
    METADATA_KEY,
    OWN_FRAMES,
    PLAN,
    SAMPLES,
    SKIPPED,
    LatentsDataset,
    cache_key,
    cache_spec,
)
from tessera.data.processes import run_in_processes
from tessera.errors import TesseraError, bullet_list
from tessera.files import atomic_file, remove_partials

if TYPE_CHECKING:
    from tessera.data import AnyData

PREFETCH = 64  # images read before they are needed
READ_ERRORS = (OSError, SafetensorError, ValueError, KeyError, TypeError)  # of a damaged shard
BLOCK = 64  # latents per block of the statistics


@dataclass(frozen=True)
class LatentStatistics:
    """Sums over `count` raw numbers per latent channel, float64.

    mean [C]; sum_squares [C]: of the distances of the posterior means from it; sum_variances [C]: of the posteriors.
    """

    count: int
    mean: np.ndarray
    sum_squares: np.ndarray
    sum_variances: np.ndarray

    @classmethod
    def from_moments(cls, moments: Tensor, channels: int) -> "LatentStatistics":
        """From raw moments [B, 2C, ...], or [B, C, ...] without standard deviations, B > 0."""
        values = moments.to(torch.float64).numpy()
        modes, std = values[:, :channels], values[:, channels:]
        axes = (0, *range(2, values.ndim))
        mean = modes.mean(axis=axes)
        sum_squares = ((modes - mean.reshape(-1, *(1,) * (values.ndim - 2))) ** 2).sum(axis=axes)
        sum_variances = (std**2).sum(axis=axes) if std.shape[1] else np.zeros(channels)
        return cls(modes[:, 0].size, mean, sum_squares, sum_variances)

    def __add__(self, other: "LatentStatistics") -> "LatentStatistics":
        """The statistics of both (Chan et al. 1983, equation 2.1)."""
        count, delta = self.count + other.count, other.mean - self.mean
        return LatentStatistics(
            count,
            self.mean + other.count / count * delta,
            self.sum_squares + other.sum_squares + self.count * other.count / count * delta**2,
            self.sum_variances + other.sum_variances,
        )

    @property
    def mode_std(self) -> np.ndarray:
        """Standard deviation of the posterior means, [C]"""
        return np.sqrt(self.sum_squares / self.count)

    @property
    def sample_std(self) -> np.ndarray:
        """Standard deviation of samples from the posteriors, [C]: the variance of the means plus the mean variance."""
        return np.sqrt((self.sum_squares + self.sum_variances) / self.count)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, without loss."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "LatentStatistics":
        arrays = (np.array(values[name], np.float64) for name in ("mean", "sum_squares", "sum_variances"))
        return cls(values["count"], *arrays)


class ShardedCache(ABC):
    """A folder of shards that any number of processes write.

    folder: of this cache; key: its name, a hash of spec; spec: what its content depends on; names: of what spec
    contains hashes of, for messages.
    """

    folder: Path
    key: str
    spec: dict[str, Any]
    names: dict[str, str]

    @abstractmethod
    def __len__(self) -> int:
        """The number of shards."""

    @abstractmethod
    def indices(self, shard: int) -> np.ndarray:
        """The samples of the data in a shard, int64 [n]"""

    @abstractmethod
    def write(
        self, shards: Iterable[int], device: torch.device, batch_size: int, num_readers: int = 1
    ) -> Generator[int, None, None]:
        """Write shards one after the other; yields repeatedly how many more samples are done.

        batch_size: samples encoded at once; num_readers: threads that read ahead. Raises TesseraError.
        """

    @abstractmethod
    def finish(self) -> dict[str, Any] | None:
        """If all shards exist, write and return the summary of the cache; None if some are missing."""

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.safetensors"

    def begin(self) -> None:
        """Create the folder and write the plan. Raises TesseraError if it cannot be written."""
        path = self.folder / PLAN
        if not storage.exists(path):
            write_file(path, json.dumps({"spec": self.spec, "names": self.names}, indent=1).encode())

    def is_valid(self, shard: int) -> bool:
        """Whether a shard exists and its checksum is right."""
        return is_intact(self.path(shard), key=self.key)

    def missing(self, shards: Sequence[int]) -> Iterator[tuple[int, bool]]:
        """For each shard, whether it must be written because it is absent or damaged."""
        with ThreadPoolExecutor(runtime.available_cpus()) as pool:  # hashing releases the GIL
            for shard, valid in zip(shards, prefetch(pool, self.is_valid, shards, 4)):
                yield shard, not valid

    def save_shard(self, shard: int, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write a shard with its checksum. Raises TesseraError if it cannot be written."""
        metadata = {"key": self.key, "shard": shard, **metadata}
        metadata["sha256"] = checksum(metadata, tensors)
        try:
            write_file(self.path(shard), save(tensors, {METADATA_KEY: json.dumps(metadata)}))
        except TesseraError:
            if not self.is_valid(shard):  # another process wrote the same shard and removed the partial file
                raise

    def shards(self) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]]:
        """The facts about each shard, its metadata and its tensors. Raises TesseraError if one is damaged."""
        for shard in range(len(self)):
            path = self.path(shard)
            try:
                metadata, tensors = read_shard(path)
            except READ_ERRORS as error:
                raise TesseraError(f"{path} is damaged ({error}): run the same command again") from None
            facts = {"file": path.name, "bytes": storage.stat(path).st_size, "sha256": metadata["sha256"]}
            yield facts, metadata, tensors


class CacheWriter(ShardedCache):
    """Writes the latents of one data set. It can be pickled: a process builds its codec from the settings."""

    def __init__(
        self,
        folder: Path,
        config: "AnyData",
        dataset: Dataset,
        codec_config: AnyCodec,
        codec: Codec,
        dtype: str = "float16",
        shard_size: int = 512,
    ) -> None:
        """folder: of all caches; dtype: float16 or bfloat16; shard_size: samples of the data in a shard.

        Raises TesseraError if codec and data do not match.
        """
        _check_sizes(config, codec)
        self.config, self.dataset, self.codec_config, self.codec = config, dataset, codec_config, codec
        self.dtype = DTYPES[dtype]
        self.spec = cache_spec(config, codec, dataset) | {"dtype": dtype, "shard_size": shard_size, "format": FORMAT}
        self.key = cache_key(self.spec)
        self.folder = folder / self.key
        codec_name = f"{codec_config.kind} {getattr(codec_config, 'source', '')}".strip()
        self.names = {"codec": codec_name, "data": config.description}
        self.buckets = None
        if (buckets := getattr(config, "buckets", None)) is not None and isinstance(dataset, FilesDataset):
            self.buckets = Buckets.assign(dataset.sizes(), buckets.sizes(sample_size(config)))
        # The samples of one size after those of another, and within a size ranges of shard_size samples.
        bucket_ids = np.zeros(len(dataset), np.int64) if self.buckets is None else self.buckets.bucket_ids
        self._order = np.argsort(bucket_ids, kind="stable")
        ends = np.bincount(bucket_ids).cumsum().tolist()
        self._ranges = [
            (bucket, start, min(start + shard_size, end))
            for bucket, (first, end) in enumerate(zip([0, *ends], ends))
            for start in range(first, end, shard_size)
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "codec": None}

    def __len__(self) -> int:
        return len(self._ranges)

    def size(self, shard: int) -> tuple[int, ...]:
        """(height, width) of the images of a shard in pixels, (frames, height, width) of clips."""
        return sample_size(self.config) if self.buckets is None else self.buckets.sizes[self._ranges[shard][0]]

    def indices(self, shard: int) -> np.ndarray:
        _, start, stop = self._ranges[shard]
        return self._order[start:stop]

    def write(
        self, shards: Iterable[int], device: torch.device, batch_size: int, num_readers: int = 1
    ) -> Generator[int, None, None]:
        if self.codec is None:
            self.codec = self.codec_config.build().to(device)
        items = ((shard, int(index)) for shard in shards for index in [-1, *self.indices(shard)])  # -1: a shard starts
        with deterministic(device), ThreadPoolExecutor(num_readers, thread_name_prefix="tessera-cache") as pool:
            writer: ShardWriter | None = None
            for shard, index, pixels in prefetch(pool, self._read_pixels, items, PREFETCH):
                if pixels is None:
                    if writer is not None:
                        yield writer.finish()
                    writer = ShardWriter(self, shard, device, batch_size)
                elif writer is not None and (done := writer.add(index, pixels)):
                    yield done
            if writer is not None:
                yield writer.finish()

    def _read_pixels(self, item: tuple[int, int]) -> tuple[int, int, np.ndarray | InvalidSample | None]:
        """uint8 [C, H, W] of a sample, or why it is invalid; None for index -1."""
        shard, index = item
        if index < 0:
            return shard, index, None
        try:
            size = () if self.buckets is None else (self.size(shard),)
            return shard, index, self.dataset.pixels(index, *size)
        except InvalidSample as error:
            return shard, index, error

    def finish(self) -> dict[str, Any] | None:
        """As the base class. Raises TesseraError if no sample is valid."""
        shards, skipped, statistics, labels, indices, own_frames = [], [], [], [], [], []
        if not all(storage.exists(self.path(shard)) for shard in range(len(self))):
            return None
        for facts, metadata, tensors in self.shards():
            count = len(tensors[LABELS])
            shards.append({"count": count, "size": metadata["size"], **facts})
            skipped += metadata["skipped"]
            statistics += [LatentStatistics.from_json(metadata["statistics"])] if count else []
            labels.append(tensors[LABELS])
            indices.append(tensors[INDICES])
            own_frames += [tensors[OWN_FRAMES]] if OWN_FRAMES in tensors else []
        if not statistics:
            reasons = [f"{name}: {reason}" for _, name, reason in skipped]
            raise TesseraError(f"no image of {self.config.description} is valid:{bullet_list(reasons)}")
        total = reduce(LatentStatistics.__add__, statistics)
        summary = {
            "count": sum(shard["count"] for shard in shards),
            "skipped": len(skipped),
            "class_names": list(self.dataset.class_names),
            "codec": self.codec_config.model_dump(mode="json"),
            "statistics": {
                "mean": total.mean.tolist(),
                "mode_std": total.mode_std.tolist(),
                "sample_std": total.sample_std.tolist(),
            },
            "shards": shards,
        }
        samples = {LABELS: torch.cat(labels), INDICES: torch.cat(indices)}
        samples |= {OWN_FRAMES: torch.cat(own_frames)} if own_frames else {}
        write_file(self.folder / SAMPLES, save(samples))
        lines = [
            json.dumps({"index": index, "name": name, "reason": reason}, ensure_ascii=False) + "\n"
            for index, name, reason in skipped
        ]
        write_file(self.folder / SKIPPED, "".join(lines).encode())
        write_file(self.folder / CACHE, json.dumps(summary, indent=1).encode())
        remove_partials(self.folder)  # of processes that were killed
        return summary


class ShardWriter:
    """Encodes the samples of one shard and writes it."""

    def __init__(self, cache: CacheWriter, shard: int, device: torch.device, batch_size: int) -> None:
        self.cache, self.shard, self.device, self.batch_size = cache, shard, device, batch_size
        self.waiting: list[np.ndarray] = []
        self.indices: list[int] = []
        self.skipped: list[tuple[int, str, str]] = []  # index, name, reason
        self.latents: list[Tensor] = []
        self.flipped: list[Tensor] = []

    def add(self, index: int, pixels: np.ndarray | InvalidSample) -> int:
        """Add one sample; returns how many more samples are done."""
        if isinstance(pixels, InvalidSample):
            self.skipped.append((index, self.cache.dataset.name(index), str(pixels)))
            return 1
        self.indices.append(index)
        self.waiting.append(pixels)
        return self._encode() if len(self.waiting) == self.batch_size else 0

    @torch.no_grad()
    def _encode(self) -> int:
        done = len(self.waiting)
        if done:
            pixels = torch.from_numpy(np.stack(self.waiting)).to(self.device, torch.float32) / 127.5 - 1
            self.latents.append(self._moments(pixels))
            if self.cache.config.hflip:
                self.flipped.append(self._moments(pixels.flip(-1)))
            self.waiting.clear()
        return done

    def _moments(self, pixels: Tensor) -> Tensor:
        codec, dtype = self.cache.codec, self.cache.dtype
        moments = codec.moments(pixels)
        if not codec.stochastic:
            moments = moments[:, : codec.latent_channels]
        stored = moments.to(dtype).cpu().contiguous()
        if not (finite := stored.isfinite().flatten(1).all(dim=1)).all():
            index = self.indices[len(self.indices) - len(pixels) + int((~finite).nonzero()[0])]
            name = self.cache.dataset.name(index)
            if moments.isfinite().all():
                raise TesseraError(f"the latents of {name} are too large for {str(dtype)[6:]}: add --dtype bfloat16")
            raise TesseraError(f"the codec gives latents of {name} that are NaN or infinite")
        return stored

    def finish(self) -> int:
        """Encode the remaining samples and write the shard; returns how many more samples are done."""
        done, cache = self._encode(), self.cache
        metadata: dict[str, Any] = {"size": list(cache.size(self.shard)), "skipped": self.skipped}
        tensors = {
            LABELS: torch.tensor([cache.dataset.label(index) for index in self.indices], dtype=torch.int32),
            INDICES: torch.tensor(self.indices, dtype=torch.int64),
        }
        if getattr(cache.config, "short", None) == "pad" and isinstance(cache.dataset, FilesDataset):
            assert cache.dataset.own_frames is not None
            tensors[OWN_FRAMES] = torch.from_numpy(cache.dataset.own_frames[self.indices])
        for name, batches in ((LATENTS, self.latents), (FLIPPED, self.flipped)):
            if batches:
                tensors[name] = torch.cat(batches)
        if self.latents:
            blocks = (block for batch in (*self.latents, *self.flipped) for block in batch.split(BLOCK))
            channels = cache.codec.latent_channels
            statistics = (LatentStatistics.from_moments(block, channels) for block in blocks)
            metadata["statistics"] = reduce(LatentStatistics.__add__, statistics).to_json()
        cache.save_shard(self.shard, tensors, metadata)
        return done


def write_in_processes(
    cache: ShardedCache, shards: Sequence[int], workers: int, batch_size: int
) -> Generator[int, None, None]:
    """Write shards on the CPU in several processes; yields repeatedly how many more samples are done.

    Raises TesseraError.
    """
    if workers == 1 or len(shards) < 2:
        return cache.write(shards, torch.device("cpu"), batch_size)
    return run_in_processes(partial(_write_shard, cache, batch_size), shards, workers)


def _write_shard(cache: ShardedCache, batch_size: int, shard: int) -> Iterator[int]:
    runtime.keep_freed_memory()
    return cache.write([shard], torch.device("cpu"), batch_size)


def damaged_shards(dataset: LatentsDataset, progress: Callable[[int, int], None]) -> list[str]:
    """The files of a finished cache whose checksum is wrong."""
    shards, damaged = dataset.shards, []
    with ThreadPoolExecutor(runtime.available_cpus()) as pool:
        results = prefetch(
            pool, lambda each: is_intact(dataset.folder / each["file"], sha256=each["sha256"]), shards, 4
        )
        for done, (shard, valid) in enumerate(zip(shards, results), start=1):
            damaged += [] if valid else [shard["file"]]
            progress(done, len(shards))
    return damaged


def is_intact(path: Path, **expected: str) -> bool:
    """Whether a shard exists, its checksum is right, and its metadata has the expected values."""
    if storage.is_remote(path) and not storage.exists(path):
        return False
    try:
        metadata, tensors = read_shard(path)
        return expected.items() <= metadata.items() and metadata["sha256"] == checksum(metadata, tensors)
    except READ_ERRORS:
        return False


def scaled_statistics(statistics: dict[str, list[float]], codec: Codec) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of the scaled latents a network receives, from those of raw latents."""
    ones = torch.ones(codec.latent_channels, 1, 1, dtype=torch.float64)
    shift, scale = ((ones * torch.as_tensor(number).cpu()).flatten() for number in (codec.shift, codec.scale))
    mean, std = (torch.tensor(statistics[name], dtype=torch.float64) for name in ("mean", "sample_std"))
    return ((mean - shift) * scale).tolist(), (std * scale).tolist()


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """The same pixels give the same bits with any number of processes: one thread each; fixed algorithms on a GPU."""
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


def prefetch(pool: ThreadPoolExecutor, function: Any, items: Iterable[Any], count: int) -> Iterator[Any]:
    """`map` in a pool that starts at most `count` calls before their results are needed."""
    pending = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def read_shard(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata of a shard, and its tensors as a memory map. Raises READ_ERRORS."""
    with safe_open(storage.fetch(path), "pt") as file:
        metadata = json.loads((file.metadata() or {})[METADATA_KEY])
        return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)


def checksum(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """The sha256 of everything in a shard."""
    facts = {name: value for name, value in metadata.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_file(path: Path, content: bytes) -> None:
    with atomic_file(path, uuid.uuid4().hex[:8]) as partial:
        partial.write_bytes(content)
    storage.publish(path)


def _check_sizes(config: "AnyData", codec: Codec) -> None:
    if codec.factor == 1:
        raise TesseraError("the codec is `pixels`, so there are no latents to cache: set codec.source=FOLDER")
    if codec.pixel_channels != config.channels:
        raise TesseraError(
            f"the codec expects images of {codec.pixel_channels} channels, but data.channels is {config.channels}"
        )
    buckets, own_size = getattr(config, "buckets", None), sample_size(config)
    for size in [own_size] if buckets is None else buckets.sizes(own_size):
        if size[-2] % codec.factor or size[-1] % codec.factor:
            raise TesseraError(
                f"images of {size[-2]} x {size[-1]} cannot be divided into squares of {codec.factor} pixels, one per "
                "latent: change data.size" + ("" if buckets is None else " or data.buckets.multiple")
            )
        codec.latent_size(size)
