"""From samples and a reference to scores: the table of metrics, what each one needs, and the evaluation itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tessera import pretrained
from tessera.bundle import Model
from tessera.data import AnyData
from tessera.data.resolve import EMBEDDED, parse_data, resolve_data
from tessera.errors import TesseraError
from tessera.evaluation import captions, clips, distances
from tessera.evaluation.captions import ImageScores
from tessera.evaluation.features import (
    MEAN,
    NUM_FRAMES,
    FeatureExtractor,
    FeatureSet,
    Progress,
    built_in_features,
    extract,
    extract_part,
    features_path,
)
from tessera.evaluation.moments import Moments
from tessera.evaluation.protocol import Protocol, Score
from tessera.evaluation.reference import (
    MAX_ROWS,
    check_widths,
    describe_reference,
    open_reference,
    resolve_reference,
    statistics_features,
)
from tessera.evaluation.sources import DatasetSource, FolderSource, NpzSource, SampleSource, subset_indices
from tessera.evaluation.toy.digit_classifier import DigitClassifier, ShapesEvaluator, load_oracle
from tessera.generation.bulk import BulkSamples
from tessera.generation.shards import num_shards
from tessera.reporting.document import Block
from tessera.reporting.estimates import Estimate
from tessera.runtime import SINGLE, Distributed
from tessera.settings import unknown_name

MIN_CLASS_IMAGES = 20  # to score a class by itself
MOTION_GROUPS = 20  # of clips, of which one at a time is left out for the interval of a distance


def row_subset(features: FeatureSet, limit: int = MAX_ROWS) -> np.ndarray:
    """At most `limit` rows of pool, float32 [n, D], always the same ones."""
    return np.asarray(features.rows["pool"][subset_indices(len(features.rows["pool"]), limit)])


Estimates = dict[str, Estimate]


def _prdc(samples: FeatureSet, reference: FeatureSet) -> Estimates:
    x, y = row_subset(samples), row_subset(reference)
    return distances.precision_recall(x, y) | distances.density_coverage(x, y)


def _frechet(samples: FeatureSet, reference: FeatureSet, kind: str) -> Estimate:
    return distances.frechet(samples.rows[kind], samples.moments[kind], reference.moments[kind])


@dataclass(frozen=True)
class Metric:
    """A metric, its definition (part of every score's protocol), and what it needs."""

    compute: Callable[[FeatureSet, FeatureSet], Estimates]  # of samples and reference
    definition: dict[str, Any]
    moments: str = ""  # kind of features whose moments it needs, of samples and reference
    rows: tuple[str, str] = ("pool", "")  # kinds of features whose rows it needs: of samples, of reference
    min_samples: Callable[[int], int] = lambda width: 2  # by the number of features


def _fd(samples: FeatureSet, reference: FeatureSet) -> Estimates:
    """Of clips always with `motion`: a distance alone can prefer clips that stand still."""
    fd = {"fd": _frechet(samples, reference, "pool")}
    return fd | (_motion(samples, reference) if "motion" in samples.rows and "motion" in reference.rows else {})


def _frame_fd(samples: FeatureSet, reference: FeatureSet) -> Estimates:
    """The Fréchet distance of single frames. Its interval is that of as many independent frames as there are clips."""
    width = samples.rows["pool"].shape[1]
    x, y = (_rows_of_clips(features, "frames").reshape(-1, width) for features in (samples, reference))
    value = distances.frechet(x, Moments.from_rows(x), Moments.from_rows(y))
    half = (value.high - value.value) * NUM_FRAMES**0.5
    return {"frame_fd": Estimate(value.value, value.value - half, value.value + half)}


def _motion(samples: FeatureSet, reference: FeatureSet) -> Estimates:
    x, y = (_rows_of_clips(features, "motion") for features in (samples, reference))
    return {"motion": distances.wasserstein(np.array_split(x, min(MOTION_GROUPS, len(x))), y.ravel())}


def _rows_of_clips(features: FeatureSet, kind: str) -> np.ndarray:
    if kind not in features.rows:
        raise TesseraError(f"{kind} are compared of clips, and {features.description} has images or statistics")
    return np.asarray(features.rows[kind])


METRICS = {
    "fd": Metric(_fd, {"distance": "Fréchet", "features": "pool"}, "pool"),
    "frame_fd": Metric(
        _frame_fd,
        {"distance": "Fréchet", "features": "pool of single frames", "frames": NUM_FRAMES},
        rows=("frames", "frames"),
    ),
    "motion": Metric(
        _motion,
        {"distance": "Wasserstein", "of": "mean absolute difference of frames that follow each other"},
        rows=("motion", "motion"),
    ),
    "fd_inf": Metric(
        lambda x, y: {"fd_inf": distances.frechet_infinity(x.rows["pool"], y.moments["pool"])},
        {"distance": "Fréchet, infinitely many samples", "features": "pool"},
        moments="pool",
        min_samples=lambda width: max(80, 4 * width),
    ),
    "sfid": Metric(
        lambda x, y: {"sfid": _frechet(x, y, "spatial")},
        {"distance": "Fréchet", "features": "spatial"},
        moments="spatial",
        rows=("spatial", ""),
    ),
    "kid": Metric(
        lambda x, y: {"kid": distances.kernel_distance(row_subset(x), row_subset(y))},
        {"distance": "MMD², kernel (x.y/D + 1)³, unbiased", "rows": MAX_ROWS},
        rows=("pool", "pool"),
    ),
    "is": Metric(
        lambda x, y: {"is": distances.inception_score(x.rows["logits"])},
        {"score": "Inception", "splits": 10},
        rows=("logits", ""),
        min_samples=lambda width: 20,  # two in each split
    ),
    "prdc": Metric(
        _prdc,
        {"precision, recall": "k = 3", "density, coverage": "k = 5", "rows": MAX_ROWS},
        rows=("pool", "pool"),
        min_samples=lambda width: 4,  # a sample and its three nearest neighbors
    ),
    "authenticity": Metric(
        lambda x, y: {"authenticity": distances.authenticity(row_subset(x), row_subset(y))},
        {"fraction": "not copied", "rows": MAX_ROWS},
        rows=("pool", "pool"),
        min_samples=lambda width: 1,
    ),
}
IMAGE_METRICS = ("oracle", "alignment", "clip_score", "law")  # that read the images themselves, not features
ALIASES = {"fid": "fd", "FID": "fd"}  # the same metric, with Inception features
DEFAULT_METRICS = (
    "fd",
    "kid",
    "prdc",
    "authenticity",
    "oracle",
    "alignment",
    "law",
)  # those of them that can be computed


def parse_metrics(text: str | None) -> list[str] | None:
    """'fd,kid' -> names. None selects the default metrics. Raises TesseraError for an unknown name."""
    if text is None:
        return None
    names = [part.strip() for part in text.split(",") if part.strip()]
    names = list(dict.fromkeys(ALIASES.get(name, name) for name in names))
    if not names:
        raise TesseraError("name at least one metric, for example fd")
    for name in names:
        if name not in METRICS and name not in IMAGE_METRICS:
            raise TesseraError(unknown_name("metric", name, [*METRICS, *IMAGE_METRICS]))
    return names


def unmet_requirement(name: str, count: int, extractor: FeatureExtractor, reference: FeatureSet | None) -> str:
    """Why a metric cannot be computed from `count` samples; empty if it can. reference: None if it will have all."""
    metric = METRICS[name]
    of_samples, of_reference = metric.rows
    if of_samples not in extractor.widths:
        return f"{name} needs {of_samples} features, which {extractor.name} does not have"
    if count < (minimum := metric.min_samples(extractor.widths[of_samples])):
        return f"{name} with {extractor.widths[of_samples]} features needs at least {minimum} samples, not {count}"
    if reference is None:
        return ""
    if metric.moments and metric.moments not in reference.moments:
        return (
            f"{name} needs the moments of {metric.moments} features, which the reference {reference.description} lacks"
        )
    if of_reference in ("frames", "motion") and of_reference not in reference.rows:
        return (
            f"{of_reference} are compared of clips, and the reference {reference.description} has images or statistics"
        )
    if of_reference and of_reference not in reference.rows:
        return f"{name} compares row by row, but the reference {reference.description} holds statistics only"
    return ""


def needs_reference(metrics: Sequence[str] | None) -> bool:
    """Whether one of the metrics compares features with those of a reference."""
    return metrics is None or any(name in METRICS for name in metrics)


def check_metrics(
    metrics: Sequence[str], count: int, extractor: FeatureExtractor, reference: FeatureSet | None = None
) -> None:
    """Raise TesseraError if one of the metrics cannot be computed; call it before sampling."""
    for name in metrics:
        if name in METRICS and (reason := unmet_requirement(name, count, extractor, reference)):
            raise TesseraError(reason)


@dataclass(frozen=True)
class Evaluation:
    """Scores, and what a report shows with them."""

    scores: list[Score]
    source: SampleSource
    samples: FeatureSet
    reference: FeatureSet
    reference_images: SampleSource | None
    notes: list[str]
    kid_by_class: Estimates
    details: list[Block] = field(default_factory=list)


def evaluate(
    source: SampleSource,
    reference: str | AnyData,
    extractor: FeatureExtractor,
    folder: Path,
    metrics: Sequence[str] | None = None,
    distributed: Distributed = SINGLE,
    batch_size: int = 50,
    progress: Callable[[str], Progress] | None = None,
    reference_folder: Path | None = None,
    clip: str | None = None,
) -> Evaluation:
    """Score a sample source against a reference (see `open_reference`). The features are saved in `folder`, so an
    interrupted evaluation resumes.

    metrics: names of METRICS; "oracle" for data with a known ground truth; "alignment" for captions of shapes; "law"
    for clips of lanes; "clip_score" for any captions, by the network at `clip`, a folder. None: the default metrics,
    and clip_score with a network. Every rank must call it; only the main rank returns scores. Raises TesseraError.
    """

    def task(name: str) -> Progress:
        return progress(name) if progress is not None else None

    check_metrics(metrics or (), source.count, extractor)
    scorer = captions.check(metrics, source, clip, extractor.device)
    is_sampled = isinstance(source, BulkSamples)
    if is_sampled:
        source.begin(distributed)
    if needs_reference(metrics):
        bar = task("features of the reference")
        reference_features, reference_images = open_reference(
            reference, source, extractor, reference_folder or folder, distributed, batch_size, bar
        )
    else:
        reference_features, reference_images = describe_reference(reference, source, extractor)
    check_metrics(metrics or (), source.count, extractor, reference_features)
    if "oracle" in (metrics or ()):
        _oracle(reference_images)
    path = features_path(folder, "features", source, extractor)
    name = "sampling and features" if is_sampled else "features of the samples"
    samples = extract(source, extractor, path, distributed, batch_size, task(name))
    check_widths(reference_features, samples)
    if not distributed.is_main:
        return Evaluation([], source, samples, reference_features, reference_images, [], {})
    notes: list[str] = []
    estimates: dict[str, Estimates] = {}
    if samples.num_invalid or reference_features.num_invalid:
        notes.append(
            f"invalid images skipped: {samples.num_invalid} of the samples, {reference_features.num_invalid} of the "
            "reference"
        )
    width = len(samples.moments["pool"].mean)
    if (samples.count or 0) <= width and (metrics is None or "fd" in metrics):
        notes.append(
            f"{samples.count} samples of {width} features: too few for the Fréchet distance, which is biased upwards; "
            "compare it only with scores of the same number of samples, or use kid"
        )
    of_images: dict[str, ImageScores] = {}
    for name in metrics if metrics is not None else (*DEFAULT_METRICS, *(["clip_score"] if clip else [])):
        if name in METRICS and (reason := unmet_requirement(name, samples.count or 0, extractor, reference_features)):
            notes.append(reason)
            continue
        try:
            if name in METRICS:
                estimates[name] = METRICS[name].compute(samples, reference_features)
                continue
            if name == "oracle":
                of_images[name] = _oracle_scores(source, reference_images)
            elif name == "alignment":
                of_images[name] = captions.alignment_scores(source)
            elif name == "law":
                of_images[name] = clips.law_scores(source)
            else:
                assert scorer is not None
                of_images[name] = captions.clip_scores(source, reference_images, scorer, batch_size)
            estimates[name] = of_images[name].estimates
            notes += of_images[name].notes
        except TesseraError as error:  # missing labels, too few reference rows: the other scores are still useful
            if metrics is not None and len(metrics) == 1:
                raise
            if metrics is not None or name not in ("oracle", "alignment", "law"):
                notes.append(f"{name} is skipped: {error}")
    origin = {"description": source.description, "images": samples.hash, "reference": reference_features.description}
    origin |= source.model_identity if isinstance(source, BulkSamples) else {}
    scores = [
        Score.from_estimate(
            metric,
            estimate,
            _protocol(name, source, samples, reference_features, of_images.get(name)),
            origin,
            str(extractor.device),
        )
        for name, group in estimates.items()
        for metric, estimate in group.items()
    ]
    by_class = kid_by_class(samples, reference_features)
    details = [block for each in of_images.values() for block in each.details]
    return Evaluation(scores, source, samples, reference_features, reference_images, notes, by_class, details)


def extract_shard(
    source: SampleSource,
    reference: str | AnyData,
    extractor: FeatureExtractor,
    folder: Path,
    part: tuple[int, int],
    metrics: Sequence[str] | None = None,
    batch_size: int = 50,
    progress: Callable[[str], Progress] | None = None,
    clip: str | None = None,
) -> None:
    """Sample and compute features for a part of what `evaluate` needs. part: number from 0, and of how many.

    Parts may be computed anywhere in any order; `evaluate` with the same arguments then computes the scores. Raises
    TesseraError.
    """

    def task(name: str) -> Progress:
        return progress(name) if progress is not None else None

    check_metrics(metrics or (), source.count, extractor)
    captions.check(metrics, source, clip, extractor.device)
    if isinstance(source, BulkSamples):
        source.begin(SINGLE)
    resolved = resolve_reference(reference, source, extractor)
    if needs_reference(metrics) and not isinstance(resolved, FeatureSet):
        path = features_path(folder, "reference", resolved, extractor)
        extract_part(resolved, extractor, path, part, batch_size, task("features of the reference"))
    path = features_path(folder, "features", source, extractor)
    extract_part(source, extractor, path, part, batch_size, task("features of the samples"))


def training_data(model: Model) -> AnyData:
    """The data in a model's own recipe: the default reference. Raises TesseraError if there is none."""
    data = (model.config.recipe or {}).get("data")
    if data is None:
        raise TesseraError("this model has no record of its training data: give --reference DATA or statistics (.npz)")
    return parse_data(data)


def check_target(target: str) -> None:
    """Raise TesseraError if what is to be scored is neither a path that exists nor a name of Tessera's."""
    names = (*pretrained.names(), *EMBEDDED)
    if not Path(target).expanduser().exists() and target.partition(":")[0] not in names:
        raise TesseraError(
            f"{target} does not exist: give a model (a run, a bundle, a .pt, a diffusers folder, or "
            f"{', '.join(pretrained.names())}), a folder or an .npz of samples, or data ({', '.join(EMBEDDED)}, a "
            ".parquet, a recipe)"
        )


def evaluation_name(target: str) -> str:
    """The name of an evaluation's folder: the last part of the target's path, without a file suffix."""
    path = Path(target)
    return ((path.stem if path.is_file() else path.name) or "samples").replace(":", "-")


def open_samples(target: str, size: tuple[int, int] | None, count: int | None) -> SampleSource:
    """The images at a path: an .npz, a folder of samples exactly as they are, or data (also a folder, if a size to crop
    and scale to is given). Raises TesseraError.
    """
    path = Path(target).expanduser()
    if path.suffix == ".npz":
        return NpzSource(path, count)
    if path.is_dir() and size is None and not any(path.rglob("*.parquet")):
        return FolderSource(path, count)
    return DatasetSource(resolve_data(target, size), count)


def default_features(reference: str | AnyData, metrics: Sequence[str] | None = None) -> str:
    """The default feature network for a reference: the mean of the pixels where none of the metrics compares features,
    else that of its statistics, the built-in one if there is one, or Inception.
    """
    if not needs_reference(metrics):
        return MEAN
    if isinstance(reference, str) and Path(reference).suffix == ".npz":
        return statistics_features(Path(reference).expanduser()) or "inception"
    kind = (resolve_data(reference, (1, 1)) if isinstance(reference, str) else reference).kind
    return kind if kind in built_in_features() else "inception"


def kid_by_class(samples: FeatureSet, reference: FeatureSet) -> Estimates:
    """KID of each class by itself, if both sides have labels of the same classes; it is unbiased at any count."""
    if samples.labels is None or reference.labels is None or "pool" not in reference.rows:
        return {}
    names = reference.class_names or tuple(str(label) for label in range(int(reference.labels.max()) + 1))
    mapping = _class_mapping(samples.class_names, names)
    if mapping is None:
        return {}
    estimates = {}
    for label, reference_label in enumerate(mapping):
        x_rows, y_rows = np.flatnonzero(samples.labels == label), np.flatnonzero(reference.labels == reference_label)
        if min(len(x_rows), len(y_rows)) >= MIN_CLASS_IMAGES:
            x, y = samples.rows["pool"][x_rows[:MAX_ROWS]], reference.rows["pool"][y_rows[:MAX_ROWS]]
            estimates[names[reference_label]] = distances.kernel_distance(np.asarray(x), np.asarray(y))
    return estimates


def _oracle(reference: SampleSource | None) -> tuple[DatasetSource, DigitClassifier | ShapesEvaluator]:
    """The data set with a known ground truth, and its oracle. Raises TesseraError for other references."""
    oracle = load_oracle(reference.config) if isinstance(reference, DatasetSource) else None
    if not isinstance(reference, DatasetSource) or oracle is None:
        raise TesseraError("oracle needs data with a known ground truth: digits or shapes as --reference")
    return reference, oracle


def _oracle_scores(source: SampleSource, reference: SampleSource | None) -> ImageScores:
    """The scores of an oracle, and a note about it. Raises TesseraError if it cannot score the images."""
    data, oracle = _oracle(reference)
    mapping = _class_mapping(source.class_names, data.class_names)
    hits: dict[str, float] = {}
    total = 0
    for index in range(num_shards(source.count)):
        shard = source.shard(index)
        if not len(shard.images):
            continue
        labels = None
        if shard.labels is not None and mapping is not None:
            labels = [mapping[label] for label in shard.labels.tolist()]
        for name, fraction in oracle.score(shard.images, labels).items():
            hits[name] = hits.get(name, 0.0) + fraction.value * len(shard.images)
        total += len(shard.images)
    if not hits:
        raise TesseraError(f"oracle needs the class of each sample, and {source.description} has no labels it can use")
    note = f"the oracle measures {oracle.description}; its accuracy on other real images is {oracle.real_accuracy:.1%}"
    return ImageScores({name: Estimate.proportion(count, total) for name, count in hits.items()}, [note])


def _class_mapping(names: Sequence[str], reference_names: Sequence[str]) -> list[int] | None:
    """The reference class of each class, by name or by number; None if one of them is not a reference class.

    Without names, labels are numbers of the reference classes.
    """
    if not names:
        return list(range(len(reference_names)))
    if set(names) <= set(reference_names):
        return [reference_names.index(name) for name in names]
    if all(name.isdecimal() and int(name) < len(reference_names) for name in names):
        return [int(name) for name in names]
    return None


def _protocol(
    name: str, source: SampleSource, samples: FeatureSet, reference: FeatureSet, of_images: ImageScores | None
) -> Protocol:
    """Only what the metric depends on: an oracle uses no features, the Inception score no reference."""
    metric = METRICS.get(name)
    used_reference: dict[str, Any] = {}
    if metric is not None and (metric.moments or metric.rows[1]):
        used_reference = {"hash": reference.hash, "count": reference.count}
        if metric.rows[1]:  # statistics may hold only some of the rows
            used_reference["rows"] = min(len(reference.rows[metric.rows[1]]), MAX_ROWS)
    definition, features = {}, {}
    if metric is not None:
        definition, features = metric.definition, samples.features or {}
    elif of_images is not None:
        definition, features = of_images.definition, of_images.features
    return Protocol(
        definition={"metric": name} | definition,
        features=features,
        reference=used_reference,
        samples=samples.count or 0,
        size=source.size,
        channels=source.channels,
        sampling=source.sampling_protocol if isinstance(source, BulkSamples) else None,
    )
