"""What samples are compared with: a data set, or statistics saved of one.

A file of statistics is an .npz that other programs can read: `mu`, `sigma` (pytorch-fid, clean-fid, ADM) and `mu_s`,
`sigma_s` (ADM). Tessera adds `features` and `indices` (some thousand rows, for the metrics that compare rows) and
`tessera`, which describes the images and the feature network.
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
from tessera.evaluation.features import FeatureExtractor, FeatureSet, Progress, extract, features_path
from tessera.evaluation.moments import Moments
from tessera.evaluation.sources import DatasetSource, NpzSource, SampleSource, subset_indices
from tessera.files import atomic_write
from tessera.runtime import Distributed

MAX_ROWS = 10_000  # rows that pairwise metrics use, and that statistics keep: the cost of pairs grows with the square
MOMENTS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
METADATA = ("description", "hash", "count", "size", "channels", "features", "class_names", "num_invalid")
FORMAT = 2


def statistics_features(path: Path) -> str | None:
    """The name of the feature network of a statistics file, if it records one."""
    name = (load_statistics(path).features or {}).get("name") if is_statistics(path) else None
    return None if name is None else name.removeprefix("tessera/")


def is_statistics(path: Path) -> bool:
    """Whether an .npz holds statistics, not images. ADM's reference batches hold both, and count as statistics."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "mu.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise TesseraError(f"{path} is truncated or not an .npz file: {error}") from None


def is_statistics_path(reference: str | AnyData) -> bool:
    """Whether a reference is a file of statistics, whose features are known."""
    path = Path(reference).expanduser() if isinstance(reference, str) else Path()
    return path.suffix == ".npz" and path.exists() and is_statistics(path)


def save_statistics(features: FeatureSet, path: Path, num_rows: int = MAX_ROWS) -> None:
    """Write statistics and `num_rows` random rows, at most MAX_ROWS. Raises TesseraError if writing fails."""
    arrays: dict[str, Any] = {}
    for kind, moments in features.moments.items():
        mean, covariance = MOMENTS[kind]
        arrays |= {mean: moments.mean, covariance: moments.cov}
    pool, indices = features.rows.get("pool"), features.indices
    if pool is not None and indices is not None and num_rows:
        subset = subset_indices(len(pool), min(num_rows, MAX_ROWS))  # the same rows as `suite.row_subset`
        arrays |= {"features": np.asarray(pool[subset]), "indices": indices[subset]}
        if features.labels is not None:
            arrays["labels"] = features.labels[subset]
    metadata = {"format": FORMAT} | {name: getattr(features, name) for name in METADATA}
    buffer = io.BytesIO()
    np.savez(buffer, tessera=np.array(json.dumps(metadata)), **arrays)
    atomic_write(path, buffer.getvalue())


def load_statistics(path: Path) -> FeatureSet:
    """Read statistics of Tessera, pytorch-fid, clean-fid or ADM. Raises TesseraError if the file is damaged."""
    arrays: dict[str, np.ndarray] = {}
    names = {name for pair in MOMENTS.values() for name in pair} | {"features", "indices", "labels", "tessera"}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in names}
    except Exception as error:  # readers raise any exception on damaged bytes
        raise TesseraError(f"{path} is truncated or damaged: {error}") from None
    try:
        metadata = dict(json.loads(str(arrays["tessera"]))) if "tessera" in arrays else {}
    except (ValueError, TypeError):
        raise TesseraError(f"{path}: its array `tessera` (metadata) cannot be read") from None
    if metadata.get("format", FORMAT) != FORMAT:
        raise TesseraError(
            f"{path} has format {metadata['format']}, expected {FORMAT}: another version of Tessera wrote it. Write it "
            "again with `tessera evaluate stats`"
        )
    count = metadata.get("count")
    moments = {}
    for kind, (mean, covariance) in MOMENTS.items():
        if mean in arrays:
            if covariance not in arrays:
                raise TesseraError(f"{path} holds {mean}, but no {covariance}")
            moments[kind] = _check_moments(path, mean, arrays[mean], arrays[covariance], count)
    if not moments:
        raise TesseraError(f"{path} holds no statistics: expected mu and sigma")
    rows = arrays.get("features")
    if rows is not None and (rows.ndim != 2 or "pool" not in moments or rows.shape[1] != len(moments["pool"].mean)):
        raise TesseraError(f"{path}: features are {list(rows.shape)}; expected the width of mu")
    digest = hashlib.sha256(b"".join(m.mean.tobytes() + m.cov.tobytes() for m in moments.values())).hexdigest()[:16]
    size = metadata.get("size")
    return FeatureSet(
        description=f"{path.name} ({metadata['description']})" if "description" in metadata else str(path),
        hash=metadata.get("hash", digest),
        count=count,
        size=None if size is None else tuple(size),
        channels=metadata.get("channels"),
        features=metadata.get("features"),
        moments=moments,
        rows={} if rows is None else {"pool": rows},
        indices=arrays.get("indices"),
        labels=arrays.get("labels"),
        class_names=tuple(metadata.get("class_names", ())),
        num_invalid=metadata.get("num_invalid", 0),
    )


def open_reference(
    reference: str | AnyData,
    samples: SampleSource,
    extractor: FeatureExtractor,
    folder: Path,
    distributed: Distributed,
    batch_size: int = 50,
    progress: Progress = None,
) -> tuple[FeatureSet, SampleSource | None]:
    """The features of a reference, and its images if they are available.

    reference: data, or its name (see `resolve_data`); or an .npz of images or statistics. samples: what will be
    compared with it; data are read at the same size. folder: for the features. Raises TesseraError if the two do not
    match.
    """
    resolved = resolve_reference(reference, samples, extractor)
    if isinstance(resolved, FeatureSet):
        return resolved, None
    path = features_path(folder, "reference", resolved, extractor)
    return extract(resolved, extractor, path, distributed, batch_size, progress), resolved


def describe_reference(
    reference: str | AnyData, samples: SampleSource, extractor: FeatureExtractor
) -> tuple[FeatureSet, SampleSource | None]:
    """The same as `open_reference`, without features."""
    resolved = resolve_reference(reference, samples, extractor)
    if isinstance(resolved, FeatureSet):
        return resolved, None
    size, channels = tuple(resolved.size), resolved.channels
    return FeatureSet(resolved.description, "", resolved.count, size, channels, None, {}), resolved


def check_reference(reference: str) -> None:
    """Raise TesseraError for a name or path that is not a reference, without opening it."""
    if Path(reference).suffix != ".npz" or not Path(reference).expanduser().exists():
        resolve_data(reference, (1, 1))


def resolve_reference(
    reference: str | AnyData, samples: SampleSource, extractor: FeatureExtractor
) -> FeatureSet | SampleSource:
    """The statistics, or the images without their features. Raises like `open_reference`."""
    path = Path(reference).expanduser() if isinstance(reference, str) else Path()
    if is_statistics_path(reference):
        statistics = load_statistics(path)
        check_compatible(statistics, samples, extractor)
        return statistics
    if isinstance(reference, str) and path.suffix == ".npz":
        source = NpzSource(path)
    else:
        if isinstance(reference, str):
            height, width = samples.size[-2:]
            reference = resolve_data(reference, (height, width), samples.channels)
        source = DatasetSource(reference)
    _check_equal("size", tuple(source.size), tuple(samples.size), source.description, samples.description)
    _check_equal("channels", source.channels, samples.channels, source.description, samples.description)
    return source


def check_compatible(reference: FeatureSet, samples: SampleSource, extractor: FeatureExtractor) -> None:
    """Raise TesseraError if a reference has other features, another size or other channels than the samples."""
    features = reference.features
    if features is not None and any(features.get(key) != extractor.identity[key] for key in ("weights", "resize")):
        theirs, ours = (
            f"{identity['name']} (weights {identity['weights']}, resize {identity['resize']})"
            for identity in (features, extractor.identity)
        )
        raise TesseraError(f"the reference {reference.description} has the features {theirs}; requested are {ours}")
    if reference.size is not None:
        _check_equal("size", reference.size, tuple(samples.size), reference.description, samples.description)
    if reference.channels is not None:
        _check_equal("channels", reference.channels, samples.channels, reference.description, samples.description)


def check_widths(reference: FeatureSet, samples: FeatureSet) -> None:
    """Raise TesseraError if features differ in width: files of other programs do not record their network."""
    for kind, moments in reference.moments.items():
        if kind in samples.moments and len(moments.mean) != len(samples.moments[kind].mean):
            network = (samples.features or {}).get("name")
            raise TesseraError(
                f"the reference {reference.description} has {len(moments.mean)} {kind} features per image, {network} "
                f"has {len(samples.moments[kind].mean)}: it was made with other features, or from another image size"
            )


def _check_equal(what: str, theirs: Any, ours: Any, reference: str, samples: str) -> None:
    if theirs != ours:
        theirs, ours = (" x ".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in (theirs, ours))
        raise TesseraError(
            f"{what} differ: {reference} has {theirs}, {samples} has {ours}; images are compared as they are: give a "
            "reference of the same size and channels, or --size to crop and scale folders"
        )


def _check_moments(path: Path, name: str, mean: np.ndarray, covariance: np.ndarray, count: int | None) -> Moments:
    if any(array.dtype.kind not in "fiu" for array in (mean, covariance)):
        raise TesseraError(f"{path}: {name} or its covariance is not an array of numbers")
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise TesseraError(
            f"{path}: {name} is {list(mean.shape)} and its covariance {list(covariance.shape)}; expected [D] and [D, D]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise TesseraError(f"{path}: {name} or its covariance holds values that are not finite")
    return Moments(count or 0, mean, covariance)
