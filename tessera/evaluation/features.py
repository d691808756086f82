"""Pictures to features: the network that looks at them, and the features of a whole subject, on disk.

    FOLDER/plan.json           what is looked at, and by which network: other work is refused
    FOLDER/000000.npz, ...     the features of one shard each, until all are there
    FOLDER/pool.npy, ...       all of them, row by row
    FOLDER/facts.json          count and hash: written last

Shapes: B pictures, N rows, D features.
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
from tessera.evaluation.inception import exact
from tessera.evaluation.moments import Moments
from tessera.evaluation.sources import ImageShard, SampleSource, shards
from tessera.evaluation.toy import feature_network
from tessera.files import atomic_write, read_array, write_array
from tessera.generation.bulk import BulkSamples
from tessera.generation.resumable import begin_work
from tessera.runtime import Distributed
from tessera.settings import unknown

FACTS = "facts.json"
OWN = Path(__file__).parent / "weights"  # the feature networks that come with the package
ROWS = 1000  # read at once from disk
Progress = Callable[[int, int], None] | None


@dataclass(frozen=True)
class Extractor:
    """A network that looks at pictures, and what a score has to say of it."""

    name: str
    weights: str  # a short hash
    resize: str  # what becomes of a picture before the network sees it
    network: Callable[[Tensor], dict[str, Tensor]]
    device: torch.device
    channels: tuple[int, ...] = (1, 3)
    size: tuple[int, int] | None = None  # the only one it takes

    @property
    def identity(self) -> dict[str, str]:
        return {"name": self.name, "weights": self.weights, "resize": self.resize}

    @cached_property
    def widths(self) -> dict[str, int]:
        """How many features each part has."""
        blank = np.zeros((1, *(self.size or (64, 64)), self.channels[-1]), np.uint8)
        return {part: values.shape[1] for part, values in self(blank, 1).items()}

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray, batch: int) -> dict[str, np.ndarray]:
        """uint8 [B, H, W, C] -> float32 [B, D] of each part: pool, and spatial and logits where it has them."""
        found: dict[str, list[np.ndarray]] = {}
        for start in range(0, len(pictures), batch):
            seen = torch.from_numpy(np.array(pictures[start : start + batch].transpose(0, 3, 1, 2), order="C"))
            with exact(self.device):
                told = self.network(seen.to(self.device))
            for part, values in told.items():
                found.setdefault(part, []).append(values.float().cpu().numpy())
        return {part: np.concatenate(values) for part, values in found.items()}


def extractor(name: str, device: torch.device) -> Extractor:
    """The feature network of a name: `digits`, `shapes`, `inception`, the path of its .pth, a folder written by
    `tessera evaluate train-features`, or a Hugging Face vision model by id or folder. Raises TesseraError.
    """
    path = Path(name).expanduser()
    own = sorted(folder.name for folder in OWN.iterdir()) if OWN.is_dir() else []
    if name in own or feature_network.is_saved_at(path):
        network = feature_network.load(OWN / name if name in own else path).to(device)
        told = f"tessera/{name}" if name in own else path.name
        config = network.config
        return Extractor(told, weights_hash(network), "none", network, device, (config.channels,), config.size)
    if name == "inception" or path.suffix in (".pth", ".pt"):
        from tessera.evaluation import inception

        network = inception.load(None if name == "inception" else path).to(device)
        return Extractor(network.name, network.weights, network.resize, network, device)
    if "/" not in name and not path.exists():  # ids of Hugging Face name their owner
        raise TesseraError(unknown("features", name, [*own, "inception"]))
    from tessera.encoders import vision

    model = vision.load(name)
    return Extractor(name, weights_hash(model), model.resize, model.to(device), device)


@dataclass(frozen=True)
class FeatureSet:
    """The features of a set of pictures, or statistics that somebody saved of them.

    moments: of pool, and of spatial where there are any. rows: [N, D] memory maps of pool, spatial, logits; of saved
    statistics a few or none. number [N]: which picture each row is of. features: None where a file does not say.
    """

    where: str
    hash: str
    count: int | None
    size: tuple[int, int] | None
    channels: int | None
    features: dict[str, str] | None
    moments: dict[str, Moments]
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    number: np.ndarray | None = None
    label: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    unusable: int = 0


def extract(
    subject: SampleSource,
    network: Extractor,
    folder: Path,
    ranks: Distributed,
    batch: int = 50,
    progress: Progress = None,
) -> FeatureSet:
    """Look at every picture of a subject, shard by shard, sharing the shards out among the processes.

    What stands in the folder already is kept: a killed extraction goes on. Raises TesseraError for pictures that the
    network cannot take, for features that are not finite, and for a folder that holds other work.
    """
    check_images(subject, network)
    if ranks.is_main:
        begin_work(folder, {"subject": subject.plan, "features": network.identity})
    ranks.barrier()
    total = shards(subject)
    if not (folder / FACTS).exists():
        share = range(ranks.rank, total, ranks.world_size)
        missing = [index for index in share if not _path(folder, index).exists()]
        for done, (index, shard) in enumerate(_ahead(subject, missing), start=len(share) - len(missing) + 1):
            _extract_shard(shard, network, batch, _path(folder, index))
            if progress is not None:
                progress(done, len(share))
        ranks.barrier()
        if ranks.is_main:
            _join(folder, total, subject)
        ranks.barrier()
    return _read(subject, network, folder, ranks)


def place(folder: Path, what: str, subject: SampleSource, network: Extractor) -> Path:
    """Where the features of a subject by a network are kept: other features of the same pictures stand beside them."""
    told = json.dumps([subject.plan, network.identity], sort_keys=True)
    return folder / f"{what}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def check_images(subject: SampleSource, network: Extractor) -> None:
    """Raise TesseraError for pictures that the network cannot take."""
    if subject.channels not in network.channels:
        raise TesseraError(
            f"{subject.where} has {subject.channels} channels, but the features {network.name} are of "
            f"{network.channels[0]}: choose other --features"
        )
    if network.size is not None and tuple(subject.size) != tuple(network.size):
        raise TesseraError(
            f"{subject.where} is {subject.size[0]} x {subject.size[1]}, but the features {network.name} are of "
            f"{network.size[0]} x {network.size[1]}: choose other --features, or --size"
        )


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.npz"


def _ahead(subject: SampleSource, indices: Sequence[int]) -> Iterator[tuple[int, ImageShard]]:
    """Shards by their numbers, the next one read while this one is looked at; drawing takes the device for itself."""
    if isinstance(subject, BulkSamples):
        yield from ((index, subject.shard(index)) for index in indices)
        return
    with ThreadPoolExecutor(1) as pool:
        coming = [pool.submit(subject.shard, index) for index in indices[:1]]
        for place, index in enumerate(indices):
            current = coming.pop()
            shard = current.result()
            coming += [pool.submit(subject.shard, later) for later in indices[place + 1 : place + 2]]
            yield index, shard


def _extract_shard(shard: ImageShard, network: Extractor, batch: int, path: Path) -> None:
    found = network(shard.pictures, batch) if len(shard.pictures) else {}
    for part, values in found.items():
        wrong = int((~np.isfinite(values).all(axis=1)).sum())
        if wrong:
            raise TesseraError(
                f"{network.name} gives {part} features that are not finite for {wrong} of {len(values)} pictures"
            )
    digest = np.frombuffer(hashlib.sha256(shard.pictures.tobytes()).digest(), np.uint8)
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {**found, "digest": digest, "number": shard.row}
    if shard.label is not None:
        arrays["label"] = shard.label
    np.savez(buffer, **arrays)
    atomic_write(path, buffer.getvalue())


def _join(folder: Path, total: int, subject: SampleSource) -> None:
    """Shards to one array a part. The facts are written last, and the shards removed after that."""
    paths = [_path(folder, index) for index in range(total)]
    digest, names, counts = hashlib.sha256(), {}, []
    for path in paths:
        with np.load(path) as shard:
            digest.update(shard["digest"].tobytes())
            counts.append(len(shard["number"]))
            names |= {name: (shard[name].shape[1:], shard[name].dtype) for name in shard.files if name != "digest"}
    count = sum(counts)
    if not count:
        raise TesseraError(f"{subject.where}: no picture can be used")
    for name, (shape, kind) in names.items():
        partial = folder / f"{name}.partial"
        joined = np.lib.format.open_memmap(partial, "w+", dtype=kind, shape=(count, *shape))
        start = 0
        for path, length in zip(paths, counts):
            if length:
                with np.load(path) as shard:
                    joined[start : start + length] = shard[name]
            start += length
        joined.flush()
        del joined
        partial.replace(folder / f"{name}.npy")
    facts = {"count": count, "hash": digest.hexdigest()[:16], "unusable": subject.count - count}
    atomic_write(folder / FACTS, json.dumps(facts))
    for path in paths:
        path.unlink()


def _read(subject: SampleSource, network: Extractor, folder: Path, ranks: Distributed) -> FeatureSet:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise TesseraError(f"{folder / FACTS} is damaged: {error}; remove {folder} to have it made again") from None
    parts = [part for part in ("pool", "spatial", "logits") if (folder / f"{part}.npy").exists()]
    rows = {part: read_array(folder / f"{part}.npy") for part in parts}
    label = folder / "label.npy"
    moments = {part: _kept_moments(folder, part, rows[part], ranks) for part in ("pool", "spatial") if part in rows}
    return FeatureSet(
        where=subject.where,
        hash=facts["hash"],
        count=facts["count"],
        size=(subject.size[0], subject.size[1]),
        channels=subject.channels,
        features=network.identity,
        moments=moments,
        rows=rows,
        number=read_array(folder / "number.npy"),
        label=read_array(label) if label.exists() else None,
        class_names=subject.class_names,
        unusable=facts["unusable"],
    )


def _kept_moments(folder: Path, part: str, rows: np.ndarray, ranks: Distributed) -> Moments:
    """Moments, computed once and kept beside the rows."""
    mean, covariance = folder / f"{part}-mean.npy", folder / f"{part}-covariance.npy"
    if not covariance.exists():
        moments = moments_of(rows, ranks)
        if ranks.is_main:
            write_array(mean, moments.mean)
            write_array(covariance, moments.cov)
        ranks.barrier()
    return Moments(len(rows), np.array(read_array(mean)), np.array(read_array(covariance)))


def moments_of(rows: np.ndarray, ranks: Distributed = Distributed()) -> Moments:  # noqa: B008 (frozen)
    """Mean and covariance of [N, D], each process adding up its share of the rows."""
    share = Moments()
    for start in range(ranks.rank * ROWS, len(rows), ranks.world_size * ROWS):
        share.add(np.asarray(rows[start : start + ROWS]))
    first, *others = ranks.gather(share)
    for other in others:
        first.merge(other)
    return first
