"""Feature extraction: a feature network, and the features of a whole sample source, on disk.

    FOLDER/plan.json           the images and the network: a folder with another plan is refused
    FOLDER/000000.npz, ...     the features of one shard each, until all shards are done
    FOLDER/pool.npy, ...       the features of all images
    FOLDER/summary.json        count and hash: written last

Shapes: B images of a batch, N images in total, C channels, H W height and width, D features.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera.bundle import weights_hash
from tessera.errors import TesseraError
from tessera.evaluation.inception import full_float32
from tessera.evaluation.moments import Moments
from tessera.evaluation.sources import SampleSource
from tessera.evaluation.toy import feature_network
from tessera.files import atomic_write, read_array, remove_partials, this_writer, write_array
from tessera.generation.bulk import BulkSamples
from tessera.generation.resumable import claim_folder
from tessera.generation.shards import ImageShard, num_shards
from tessera.runtime import SINGLE, Distributed
from tessera.settings import unknown_name

SUMMARY = "summary.json"
BUILT_IN = Path(__file__).parent / "weights"  # the feature networks that come with the package
ROWS = 1000  # rows read from disk at a time
NUM_FRAMES = 4  # of a clip, whose features are compared one by one
Progress = Callable[[int, int], None] | None


MEAN = "mean"  # the mean of the pixels, where no metric compares features: needs no weights


@dataclass(frozen=True)
class FeatureExtractor:
    """A feature network, with what a score's protocol records about it."""

    name: str
    weights: str  # short hash
    resize: str  # how images are resized before the network
    network: Callable[[Tensor], dict[str, Tensor]]
    device: torch.device
    channels: tuple[int, ...] = (1, 3)
    size: tuple[int, ...] | None = None  # the only size it takes, (T, H, W) of clips; None: any

    @property
    def identity(self) -> dict[str, str]:
        return {"name": self.name, "weights": self.weights, "resize": self.resize}

    @cached_property
    def widths(self) -> dict[str, int]:
        """The number of features of each kind. Those of frames are of clips alone."""
        blank = np.zeros((1, *(self.size or (64, 64)), self.channels[-1]), np.uint8)
        widths = {kind: values.shape[1] for kind, values in self(blank, 1).items()}
        return widths | {"frames": NUM_FRAMES * widths["pool"], "motion": 1}

    def __call__(self, images: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
        """uint8 [B, H, W, C] -> float32 [B, D] of each kind: pool, and spatial and logits if the network has them.

        Clips are uint8 [B, T, H, W, C]. A network of images gives the mean over the frames: motion has no effect on it.
        Two more kinds: `frames`, pool of NUM_FRAMES frames one by one [B, NUM_FRAMES D]; and `motion` [B, T - 1], the
        mean absolute difference of frames that follow each other, in levels.
        """
        if images.ndim == 4:
            return self._features(images, batch_size)
        count, length = images.shape[:2]
        chosen = np.linspace(0, length - 1, NUM_FRAMES).round().astype(int)
        if self.size is not None and len(self.size) == 3:
            features = self._features(images, batch_size)
            frames = self._features(images[:, chosen].reshape(-1, *images.shape[2:]), batch_size)["pool"]
        else:
            each = self._features(images.reshape(-1, *images.shape[2:]), batch_size)
            features = {kind: values.reshape(count, length, -1).mean(axis=1) for kind, values in each.items()}
            frames = each["pool"].reshape(count, length, -1)[:, chosen]
        motion = np.stack([np.abs(np.diff(clip.astype(np.float32), axis=0)).mean(axis=(1, 2, 3)) for clip in images])
        return features | {"frames": frames.reshape(count, -1), "motion": motion}

    @torch.no_grad()
    def _features(self, images: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
        """Images uint8 [B, H, W, C], or clips [B, T, H, W, C] of a network of clips."""
        features: dict[str, list[np.ndarray]] = {}
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(np.array(np.moveaxis(images[start : start + batch_size], -1, 1), order="C"))
            with full_float32(self.device):
                outputs = self.network(batch.to(self.device))
            for kind, values in outputs.items():
                features.setdefault(kind, []).append(values.float().cpu().numpy())
        return {kind: np.concatenate(values) for kind, values in features.items()}


def built_in_features() -> list[str]:
    """The names of the feature networks that come with the package."""
    return sorted(folder.name for folder in BUILT_IN.iterdir()) if BUILT_IN.is_dir() else []


def feature_macs(name: str) -> float:
    """Multiply-adds of a feature network for one image: counted for those of `train-features`. All others count as
    Inception, which takes 299 x 299 pixels.
    """
    if name == MEAN:
        return 1
    path = BUILT_IN / name if name in built_in_features() else Path(name).expanduser()
    return feature_network.read_config(path).macs() if feature_network.is_saved_at(path) else 5.7e9


def load_extractor(name: str, device: torch.device) -> FeatureExtractor:
    """The feature network of a name: `digits`, `shapes`, `inception`, the path of its .pth, a folder written by
    `tessera evaluate train-features`, or a Hugging Face vision model by id or folder. Raises TesseraError.
    """
    if name == MEAN:
        return FeatureExtractor(
            MEAN, "", "none", lambda images: {"pool": images.float().mean(dim=(1, 2, 3))[:, None]}, device
        )
    path, built_in = Path(name).expanduser(), built_in_features()
    if name in built_in or feature_network.is_saved_at(path):
        network = feature_network.load(BUILT_IN / name if name in built_in else path).to(device)
        label = f"tessera/{name}" if name in built_in else path.name
        config = network.config
        return FeatureExtractor(label, weights_hash(network), "none", network, device, (config.channels,), config.size)
    if name == "inception" or path.suffix in (".pth", ".pt"):
        from tessera.evaluation import inception

        network = inception.load(None if name == "inception" else path).to(device)
        return FeatureExtractor(network.name, network.weights, network.resize, network, device)
    if "/" not in name and not path.exists():  # a Hugging Face id has an owner
        raise TesseraError(unknown_name("features", name, [*built_in, "inception"]))
    from tessera.encoders import vision

    model = vision.load(name)
    return FeatureExtractor(name, weights_hash(model), model.resize, model.to(device), device)


@dataclass(frozen=True)
class FeatureSet:
    """The features of a set of images, or statistics saved of them.

    moments: of pool, and of spatial if there are any. rows: memory maps [N, D] of pool, spatial and logits; saved
    statistics have a few rows or none. indices [N]: the position of each row's image in its source. features: the
    identity of the network; None if a file does not record it. num_invalid: images that could not be used.
    """

    description: str
    hash: str
    count: int | None
    size: tuple[int, ...] | None
    channels: int | None
    features: dict[str, str] | None
    moments: dict[str, Moments]
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    indices: np.ndarray | None = None
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    num_invalid: int = 0


def extract(
    source: SampleSource,
    extractor: FeatureExtractor,
    folder: Path,
    distributed: Distributed = SINGLE,
    batch_size: int = 50,
    progress: Progress = None,
) -> FeatureSet:
    """Compute the features of every image of a source. The shards are divided among the ranks.

    Shards that are already in the folder are not computed again, so an interrupted extraction resumes. Raises
    TesseraError for images that the network cannot take, for features that are not finite, and if the folder holds
    other work.
    """
    check_images(source, extractor)
    if distributed.is_main:
        _claim(source, extractor, folder)
    distributed.barrier()
    total = num_shards(source.count)
    if not (folder / SUMMARY).exists():
        shards = range(distributed.rank, total, distributed.world_size)
        _extract_missing(source, extractor, folder, shards, batch_size, progress)
        distributed.barrier()
        if distributed.is_main:
            _join_shards(folder, total, source)
        distributed.barrier()
    return _read_features(source, extractor, folder, distributed)


def extract_part(
    source: SampleSource,
    extractor: FeatureExtractor,
    folder: Path,
    part: tuple[int, int],
    batch_size: int = 50,
    progress: Progress = None,
) -> None:
    """Compute a part of what `extract` computes, and leave the rest to it. part: number from 0, and of how many.

    Raises TesseraError as `extract` does.
    """
    check_images(source, extractor)
    _claim(source, extractor, folder)
    if not (folder / SUMMARY).exists():
        shards = range(part[0], num_shards(source.count), part[1])
        _extract_missing(source, extractor, folder, shards, batch_size, progress)


def _claim(source: SampleSource, extractor: FeatureExtractor, folder: Path) -> None:
    claim_folder(folder, {"source": source.plan, "features": extractor.identity})


def _extract_missing(
    source: SampleSource,
    extractor: FeatureExtractor,
    folder: Path,
    shards: Sequence[int],
    batch_size: int,
    progress: Progress,
) -> None:
    missing = [index for index in shards if not _shard_path(folder, index).exists()]
    done = len(shards) - len(missing)
    for step, (index, shard) in enumerate(_prefetch(source, missing), start=done + 1):
        _extract_shard(shard, extractor, batch_size, _shard_path(folder, index))
        if progress is not None:
            progress(step, len(shards))


def features_path(folder: Path, name: str, source: SampleSource, extractor: FeatureExtractor) -> Path:
    """The folder for the features of a source. Each pair of images and network has its own."""
    identity = json.dumps([source.plan, extractor.identity], sort_keys=True)
    return folder / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def check_images(source: SampleSource, extractor: FeatureExtractor) -> None:
    """Raise TesseraError for images that the network cannot take."""
    if source.channels not in extractor.channels:
        raise TesseraError(
            f"{source.description} has {source.channels} channels, but the features {extractor.name} take "
            f"{extractor.channels[0]}: choose other --features"
        )
    size = extractor.size
    if size is not None and (len(source.size) < len(size) or tuple(source.size[-2:]) != tuple(size[-2:])):
        theirs, ours = (" x ".join(map(str, each)) for each in (source.size, size))
        raise TesseraError(
            f"{source.description} is {theirs}, but the features {extractor.name} take {ours}: choose other "
            "--features, or --size"
        )


def _shard_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.npz"


def _prefetch(source: SampleSource, indices: Sequence[int]) -> Iterator[tuple[int, ImageShard]]:
    """Shards with their indices; the next one is read in the background. Sampling needs the device to itself."""
    if isinstance(source, BulkSamples):
        yield from ((index, source.shard(index)) for index in indices)
        return
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(source.shard, index) for index in indices[:1]]
        for number, index in enumerate(indices):
            shard = pending.pop().result()
            pending += [pool.submit(source.shard, later) for later in indices[number + 1 : number + 2]]
            yield index, shard


def _extract_shard(shard: ImageShard, extractor: FeatureExtractor, batch_size: int, path: Path) -> None:
    features = extractor(shard.images, batch_size) if len(shard.images) else {}
    for kind, values in features.items():
        bad = int((~np.isfinite(values).all(axis=1)).sum())
        if bad:
            raise TesseraError(
                f"{extractor.name} computed {kind} features that are not finite for {bad} of {len(values)} images"
            )
    digest = np.frombuffer(hashlib.sha256(shard.images.tobytes()).digest(), np.uint8)
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {**features, "digest": digest, "indices": shard.indices}
    if shard.labels is not None:
        arrays["labels"] = shard.labels
    np.savez(buffer, **arrays)
    atomic_write(path, buffer.getvalue(), this_writer())


def _join_shards(folder: Path, total: int, source: SampleSource) -> None:
    """Join the shards to one array of each kind. The summary is written last; then the shards are removed."""
    paths = [_shard_path(folder, index) for index in range(total)]
    digest, layouts, counts = hashlib.sha256(), {}, []
    for path in paths:
        with np.load(path) as shard:
            digest.update(shard["digest"].tobytes())
            counts.append(len(shard["indices"]))
            layouts |= {name: (shard[name].shape[1:], shard[name].dtype) for name in shard.files if name != "digest"}
    count = sum(counts)
    if not count:
        raise TesseraError(f"{source.description}: no image can be used")
    for name, (shape, dtype) in layouts.items():
        partial = folder / f"{name}.partial"
        joined = np.lib.format.open_memmap(partial, "w+", dtype=dtype, shape=(count, *shape))
        start = 0
        for path, length in zip(paths, counts):
            if length:
                with np.load(path) as shard:
                    joined[start : start + length] = shard[name]
            start += length
        joined.flush()
        del joined
        partial.replace(folder / f"{name}.npy")
    summary = {"count": count, "hash": digest.hexdigest()[:16], "num_invalid": source.count - count}
    atomic_write(folder / SUMMARY, json.dumps(summary))
    for path in paths:
        path.unlink()
    remove_partials(folder)  # of processes that were killed


def _read_features(
    source: SampleSource, extractor: FeatureExtractor, folder: Path, distributed: Distributed
) -> FeatureSet:
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except ValueError as error:
        raise TesseraError(f"{folder / SUMMARY} is damaged: {error}; remove {folder} to compute it again") from None
    kinds = [kind for kind in ("pool", "spatial", "logits", "frames", "motion") if (folder / f"{kind}.npy").exists()]
    rows = {kind: read_array(folder / f"{kind}.npy") for kind in kinds}
    labels = folder / "labels.npy"
    return FeatureSet(
        description=source.description,
        hash=summary["hash"],
        count=summary["count"],
        size=source.size,
        channels=source.channels,
        features=extractor.identity,
        moments={
            kind: _cached_moments(folder, kind, rows[kind], distributed) for kind in ("pool", "spatial") if kind in rows
        },
        rows=rows,
        indices=read_array(folder / "indices.npy"),
        labels=read_array(labels) if labels.exists() else None,
        class_names=source.class_names,
        num_invalid=summary["num_invalid"],
    )


def _cached_moments(folder: Path, kind: str, rows: np.ndarray, distributed: Distributed) -> Moments:
    """The moments, computed once and saved beside the rows."""
    mean, covariance = folder / f"{kind}-mean.npy", folder / f"{kind}-covariance.npy"
    if not covariance.exists():
        moments = compute_moments(rows, distributed)
        if distributed.is_main:
            write_array(mean, moments.mean)
            write_array(covariance, moments.cov)
        distributed.barrier()
    return Moments(len(rows), np.array(read_array(mean)), np.array(read_array(covariance)))


def compute_moments(rows: np.ndarray, distributed: Distributed = SINGLE) -> Moments:
    """Mean and covariance of [N, D]. Each rank adds up a part of the rows."""
    local = Moments()
    for start in range(distributed.rank * ROWS, len(rows), distributed.world_size * ROWS):
        local.add(np.asarray(rows[start : start + ROWS]))
    total, *others = distributed.gather(local)
    for other in others:
        total.merge(other)
    return total
