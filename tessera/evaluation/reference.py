"""What samples are compared with: a data set, or statistics that were saved of one.

Our file is an .npz that other programs read too: `mu`, `sigma` (pytorch-fid, clean-fid, ADM) and `mu_s`, `sigma_s`
(ADM); beside them stand `features` and `number` (some thousand rows, for the distances that need rows), and `tessera`,
which says what they are of.
"""

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from tessera.data import AnyData
from tessera.data.resolve import resolve_data
from tessera.errors import TesseraError
from tessera.evaluation.features import Extractor, FeatureSet, Progress, extract, place
from tessera.evaluation.moments import Moments
from tessera.evaluation.sources import Data, Npz, SampleSource, chosen
from tessera.files import atomic_write
from tessera.runtime import Distributed

MOST = 10_000  # rows that metrics of pairs look at: their cost grows with the square; a file of statistics keeps them
MOMENTS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


def features_of(path: Path) -> str | None:
    """The name of the features that statistics are of, where they say it."""
    name = (load(path).features or {}).get("name") if is_statistics(path) else None
    return None if name is None else name.removeprefix("tessera/")


def is_statistics(path: Path) -> bool:
    """Whether an .npz holds statistics, not pictures. ADM's reference batches hold both, and count as statistics."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "mu.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise TesseraError(f"{path} is truncated or no .npz file: {error}") from None


def save(features: FeatureSet, path: Path, kept: int = MOST) -> None:
    """Write statistics, with `kept` rows chosen at random, at most MOST. TesseraError if it cannot be written."""
    arrays: dict[str, Any] = {}
    for part, moments in features.moments.items():
        mean, covariance = MOMENTS[part]
        arrays |= {mean: moments.mean, covariance: moments.cov}
    pool, number = features.rows.get("pool"), features.number
    if pool is not None and number is not None and kept:
        keep = chosen(len(pool), min(kept, MOST))  # the very rows that `suite.few` takes of all
        arrays |= {"features": np.asarray(pool[keep]), "number": number[keep]}
        if features.label is not None:
            arrays["label"] = features.label[keep]
    told = {
        "format": 1,
        "where": features.where,
        "hash": features.hash,
        "count": features.count,
        "size": features.size,
        "channels": features.channels,
        "features": features.features,
        "class_names": features.class_names,
        "unusable": features.unusable,
    }
    buffer = io.BytesIO()
    np.savez(buffer, tessera=np.array(json.dumps(told)), **arrays)
    atomic_write(path, buffer.getvalue())


def load(path: Path) -> FeatureSet:
    """Statistics of our own, of pytorch-fid, clean-fid or ADM. Raises TesseraError if the file is damaged."""
    arrays: dict[str, np.ndarray] = {}
    wanted = {name for pair in MOMENTS.values() for name in pair} | {"features", "number", "label", "tessera"}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in wanted}
    except Exception as error:  # readers raise anything on damaged bytes
        raise TesseraError(f"{path} is truncated or damaged: {error}") from None
    try:
        told = dict(json.loads(str(arrays["tessera"]))) if "tessera" in arrays else {}
    except (ValueError, TypeError):
        raise TesseraError(f"{path}: what it says of itself cannot be read") from None
    count = told.get("count")
    moments = {}
    for part, (mean, covariance) in MOMENTS.items():
        if mean in arrays:
            if covariance not in arrays:
                raise TesseraError(f"{path} holds {mean}, but no {covariance}")
            moments[part] = _moments(path, mean, arrays[mean], arrays[covariance], count)
    if not moments:
        raise TesseraError(f"{path} holds no statistics: expected mu and sigma")
    rows = arrays.get("features")
    if rows is not None and (rows.ndim != 2 or "pool" not in moments or rows.shape[1] != len(moments["pool"].mean)):
        raise TesseraError(f"{path}: features are {list(rows.shape)}; expected as many a row as mu has")
    digest = hashlib.sha256(b"".join(m.mean.tobytes() + m.cov.tobytes() for m in moments.values())).hexdigest()[:16]
    return FeatureSet(
        where=f"{path.name} ({told['where']})" if "where" in told else str(path),
        hash=told.get("hash", digest),
        count=count,
        size=None if told.get("size") is None else (told["size"][0], told["size"][1]),
        channels=told.get("channels"),
        features=told.get("features"),
        moments=moments,
        rows={} if rows is None else {"pool": rows},
        number=arrays.get("number"),
        label=arrays.get("label"),
        class_names=tuple(told.get("class_names", ())),
        unusable=told.get("unusable", 0),
    )


def open_reference(
    told: str | AnyData,
    like: SampleSource,
    network: Extractor,
    folder: Path,
    ranks: Distributed,
    batch: int = 50,
    progress: Progress = None,
) -> tuple[FeatureSet, SampleSource | None]:
    """The reference that a command names, and its pictures where they are at hand.

    told: data, also as a word as in `named`; an .npz of pictures or of statistics. like: what will be compared with it,
    at whose size data are read. folder: for the features of pictures. TesseraError where they do not go together.
    """
    opened = find_reference(told, like, network)
    if isinstance(opened, FeatureSet):
        return opened, None
    return extract(opened, network, place(folder, "reference", opened, network), ranks, batch, progress), opened


def check_word(told: str) -> None:
    """Raise TesseraError for a word or path that names no reference, without opening it."""
    if Path(told).suffix != ".npz" or not Path(told).expanduser().exists():
        resolve_data(told, (1, 1))


def find_reference(told: str | AnyData, like: SampleSource, network: Extractor) -> FeatureSet | SampleSource:
    """The statistics that a command names, or the pictures, not looked at yet. Raises as `open_reference`."""
    path = Path(told).expanduser() if isinstance(told, str) else Path()
    if path.suffix == ".npz" and path.exists() and is_statistics(path):
        found = load(path)
        check(found, like, network)
        return found
    config = resolve_data(told, like.size, like.channels) if isinstance(told, str) and path.suffix != ".npz" else told
    subject = Npz(path) if isinstance(config, str) else Data(config)
    _same("size", tuple(subject.size), tuple(like.size), subject.where, like.where)
    _same("channels", subject.channels, like.channels, subject.where, like.where)
    return subject


def check(reference: FeatureSet, like: SampleSource, network: Extractor) -> None:
    """Raise TesseraError if a reference is of other pictures or other features than what is to be compared with it."""
    known = reference.features
    if known is not None and any(known.get(fact) != network.identity[fact] for fact in ("weights", "resize")):
        theirs, ours = (
            f"{told['name']} (weights {told['weights']}, resize {told['resize']})" for told in (known, network.identity)
        )
        raise TesseraError(f"the reference {reference.where} is of the features {theirs}; asked for are {ours}")
    if reference.size is not None:
        _same("size", reference.size, tuple(like.size), reference.where, like.where)
    if reference.channels is not None:
        _same("channels", reference.channels, like.channels, reference.where, like.where)


def check_widths(reference: FeatureSet, samples: FeatureSet) -> None:
    """Raise TesseraError if two sets hold features of different widths: files of others do not say what they are of."""
    for part, moments in reference.moments.items():
        if part in samples.moments and len(moments.mean) != len(samples.moments[part].mean):
            network = (samples.features or {}).get("name")
            raise TesseraError(
                f"the reference {reference.where} has {len(moments.mean)} {part} features a picture, {network} gives "
                f"{len(samples.moments[part].mean)}: it is of other features, or of pictures of another size"
            )


def _same(what: str, theirs: Any, ours: Any, reference: str, subject: str) -> None:
    if theirs != ours:
        raise TesseraError(
            f"{what} differ: {reference} has {_shown(theirs)}, {subject} has {_shown(ours)}; "
            "pictures are compared as they are: give a reference of the same kind, or --size to crop and scale folders"
        )


def _shown(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _moments(path: Path, name: str, mean: np.ndarray, covariance: np.ndarray, count: int | None) -> Moments:
    if any(array.dtype.kind not in "fiu" for array in (mean, covariance)):
        raise TesseraError(f"{path}: {name} is no array of numbers, or its covariance is none")
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise TesseraError(
            f"{path}: {name} is {list(mean.shape)} and its covariance {list(covariance.shape)}; expected [D] and [D, D]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise TesseraError(f"{path}: {name} or its covariance holds numbers that are not finite")
    return Moments(count or 0, mean, covariance)
