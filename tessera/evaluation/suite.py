"""Samples and a reference to scores: which metric needs what, and under which definition it is computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tessera.bundle import Model
from tessera.data import AnyData
from tessera.data.resolve import EMBEDDED, parse_data, resolve_data
from tessera.errors import TesseraError
from tessera.evaluation import distances
from tessera.evaluation.features import Extractor, FeatureSet, Progress, extract, place
from tessera.evaluation.intervals import Estimate
from tessera.evaluation.protocol import Protocol, Score
from tessera.evaluation.reference import MOST, check_widths, features_of, open_reference
from tessera.evaluation.sources import Data, Folder, Npz, SampleSource, chosen, shards
from tessera.evaluation.toy.digit_classifier import DigitClassifier, ShapesEvaluator, oracle_for
from tessera.generation.bulk import BulkSamples
from tessera.runtime import Distributed
from tessera.settings import unknown

FEWEST = 20  # pictures of a class, to score it by itself

Measure = Callable[[FeatureSet, FeatureSet], dict[str, Estimate]]


def few(features: FeatureSet, most: int = MOST) -> np.ndarray:
    """At most so many rows of pool, float32 [n, D], always the same ones."""
    return np.asarray(features.rows["pool"][chosen(len(features.rows["pool"]), most)])


def _fd(samples: FeatureSet, reference: FeatureSet) -> dict[str, Estimate]:
    return {"fd": distances.frechet(samples.rows["pool"], samples.moments["pool"], reference.moments["pool"])}


def _fd_inf(samples: FeatureSet, reference: FeatureSet) -> dict[str, Estimate]:
    return {"fd_inf": distances.frechet_infinity(samples.rows["pool"], reference.moments["pool"])}


def _sfid(samples: FeatureSet, reference: FeatureSet) -> dict[str, Estimate]:
    moments = samples.moments["spatial"]
    return {"sfid": distances.frechet(samples.rows["spatial"], moments, reference.moments["spatial"])}


def _kid(samples: FeatureSet, reference: FeatureSet) -> dict[str, Estimate]:
    return {"kid": distances.kernel_distance(few(samples), few(reference))}


def _is(samples: FeatureSet, reference: FeatureSet) -> dict[str, Estimate]:
    return {"is": distances.inception_score(samples.rows["logits"])}


def _prdc(samples: FeatureSet, reference: FeatureSet) -> dict[str, Estimate]:
    return distances.precision_recall(few(samples), few(reference)) | distances.density_coverage(
        few(samples), few(reference)
    )


def _authenticity(samples: FeatureSet, reference: FeatureSet) -> dict[str, Estimate]:
    return {"authenticity": distances.authenticity(few(samples), few(reference))}


def _one(width: int) -> int:
    return 1


def _two(width: int) -> int:
    return 2


def _twenty(width: int) -> int:
    return 20  # two of each split


def _four(width: int) -> int:
    return 4  # a sample and its three nearest fellows


def _four_each(width: int) -> int:
    return max(80, 4 * width)


@dataclass(frozen=True)
class Metric:
    """What is measured, in words and constants (they are part of every score's protocol), and what it needs."""

    measure: Measure
    definition: dict[str, Any]
    moments: str = ""  # of samples and reference
    rows: tuple[str, str] = ("", "")  # of samples, of reference
    least: Callable[[int], int] = _two  # samples, by the number of features


METRICS = {
    "fd": Metric(_fd, {"distance": "Fréchet", "of": "pool"}, moments="pool", rows=("pool", "")),
    "fd_inf": Metric(
        _fd_inf, {"distance": "Fréchet, infinitely many samples", "of": "pool"}, "pool", ("pool", ""), _four_each
    ),
    "sfid": Metric(_sfid, {"distance": "Fréchet", "of": "spatial"}, moments="spatial", rows=("spatial", "")),
    "kid": Metric(_kid, {"distance": "MMD², kernel (x.y/D + 1)³, unbiased", "rows": MOST}, rows=("pool", "pool")),
    "is": Metric(_is, {"score": "Inception", "splits": 10}, rows=("logits", ""), least=_twenty),
    "prdc": Metric(
        _prdc, {"precision, recall": "k = 3", "density, coverage": "k = 5", "rows": MOST}, "", ("pool", "pool"), _four
    ),
    "authenticity": Metric(_authenticity, {"share": "not copied", "rows": MOST}, rows=("pool", "pool"), least=_one),
}
ALIASES = {"fid": "fd", "FID": "fd"}  # with Inception's features they are one
USUAL = ("fd", "kid", "prdc", "authenticity", "oracle")  # where nothing is asked for, and it can be had


def wanted(text: str | None) -> list[str] | None:
    """'fd,kid' -> names; None is whatever of the usual can be had. Raises TesseraError for an unknown one."""
    if text is None:
        return None
    told = [part.strip() for part in text.split(",") if part.strip()]
    names = list(dict.fromkeys(ALIASES.get(name, name) for name in told))
    if not names:
        raise TesseraError("name at least one metric, for example fd")
    for name in names:
        if name not in METRICS and name != "oracle":
            raise TesseraError(unknown("metric", name, [*METRICS, "oracle"]))
    return names


def lacking(name: str, count: int, network: Extractor, reference: FeatureSet | None) -> str:
    """Why a metric of so many samples cannot be had, in words; empty if it can. reference: None if it will have all."""
    metric = METRICS[name]
    ours, theirs = metric.rows
    if ours not in network.widths:
        return f"{name} needs {ours} features, which {network.name} does not give"
    if count < (least := metric.least(network.widths[ours])):
        return f"{name} with {network.widths[ours]} features needs at least {least} samples, not {count}"
    if reference is None:
        return ""
    if metric.moments and metric.moments not in reference.moments:
        return f"{name} needs the moments of {metric.moments} features, which the reference {reference.where} lacks"
    if theirs and theirs not in reference.rows:
        return f"{name} compares row by row, but the reference {reference.where} holds statistics only"
    return ""


def check_metrics(metrics: Sequence[str], count: int, network: Extractor, reference: FeatureSet | None = None) -> None:
    """Raise TesseraError if one of the metrics cannot be had: before pictures are drawn, not after."""
    for name in metrics:
        if name != "oracle" and (reason := lacking(name, count, network, reference)):
            raise TesseraError(reason)


@dataclass(frozen=True)
class Evaluation:
    """Scores, and what a report shows beside them."""

    scores: list[Score]
    source: SampleSource
    samples: FeatureSet
    reference: FeatureSet
    reference_pictures: SampleSource | None
    notes: list[str]
    classes: dict[str, Estimate]  # KID of each class by itself


def evaluate(
    subject: SampleSource,
    reference: str | AnyData,
    network: Extractor,
    folder: Path,
    metrics: Sequence[str] | None = None,
    ranks: Distributed = Distributed(),  # noqa: B008 (frozen)
    batch: int = 50,
    progress: Callable[[str], Progress] | None = None,
    reference_folder: Path | None = None,
) -> Evaluation:
    """Score a subject against a reference (as `open_reference` takes it), everything kept in a folder so that a killed
    evaluation goes on. metrics: names of METRICS, and "oracle" for data whose truth is known; None: the usual ones.

    Every process of `ranks` must call it; the scores are the first one's. Raises TesseraError.
    """
    told = progress or _silent
    check_metrics(metrics or (), subject.count, network)
    if isinstance(subject, BulkSamples):
        subject.begin(ranks)
    known, pictures = open_reference(
        reference,
        subject,
        network,
        reference_folder or folder,
        ranks,
        batch,
        told("looking at the reference"),
    )
    check_metrics(metrics or (), subject.count, network, known)
    if "oracle" in (metrics or ()):
        _oracle(pictures)
    what = "drawing and looking" if isinstance(subject, BulkSamples) else "looking at the samples"
    samples = extract(subject, network, place(folder, "features", subject, network), ranks, batch, told(what))
    check_widths(known, samples)
    notes, found = [], {}
    if not ranks.is_main:
        return Evaluation([], subject, samples, known, pictures, [], {})
    if samples.unusable or known.unusable:
        notes.append(
            f"unusable pictures left out: {samples.unusable} of the samples, {known.unusable} of the reference"
        )
    width = len(samples.moments["pool"].mean)
    if (samples.count or 0) <= width and (metrics is None or "fd" in metrics):
        notes.append(
            f"{samples.count} samples of {width} features: too few for the Fréchet distance, which is biased upwards; "
            "compare it with scores of as many samples only, or rely on kid"
        )
    for name in metrics if metrics is not None else USUAL:
        if name != "oracle" and (reason := lacking(name, samples.count or 0, network, known)):
            notes.append(reason)
            continue
        try:
            if name == "oracle":
                found[name], said = _judged(subject, pictures)
                notes.append(said)
            else:
                found[name] = METRICS[name].measure(samples, known)
        except TesseraError as error:  # labels missing, too few rows of the reference: other scores are worth having
            if metrics is not None and len(metrics) == 1:
                raise
            if metrics is not None or name != "oracle":
                notes.append(f"{name} is left out: {error}")
    about, device = _subject(subject, samples, known), str(network.device)
    scores = [
        Score.of(metric, measured, _protocol(name, subject, samples, known), about, device)
        for name, group in found.items()
        for metric, measured in group.items()
    ]
    return Evaluation(scores, subject, samples, known, pictures, notes, by_class(samples, known))


def trained_on(model: Model) -> AnyData:
    """The data that a model's own recipe names: the usual reference. Raises TesseraError if it names none."""
    told = (model.config.recipe or {}).get("data")
    if told is None:
        raise TesseraError("this model does not say what it was trained on: give --reference DATA or statistics (.npz)")
    return parse_data(told)


def check_target(target: str) -> None:
    """Raise TesseraError if there is nothing at a path that is to be scored."""
    if not Path(target).expanduser().exists() and target.partition(":")[0] not in EMBEDDED:
        raise TesseraError(
            f"there is nothing at {target}: give a model (a run, a bundle, a .pt, a diffusers folder), a folder or an "
            f".npz of samples, or data ({', '.join(EMBEDDED)}, a .parquet, a recipe)"
        )


def name_of(target: str) -> str:
    """What to call the folder of an evaluation: the target's last name, without the ending of a file."""
    path = Path(target)
    return ((path.stem if path.is_file() else path.name) or "samples").replace(":", "-")


def found(target: str, size: tuple[int, int] | None, count: int | None) -> SampleSource:
    """The pictures at a path: an .npz, a folder of samples exactly as they are, or data (also folders, where a size is
    given to crop and scale them to). Raises TesseraError.
    """
    path = Path(target).expanduser()
    if path.suffix == ".npz":
        return Npz(path, count)
    if path.is_dir() and size is None and not any(path.rglob("*.parquet")):
        return Folder(path, count)
    return Data(resolve_data(target, size), count)


def usual_features(reference: str | AnyData) -> str:
    """The features for a reference, where none are asked for: those its statistics are of, its own for the embedded
    data, else Inception's."""
    if isinstance(reference, str) and Path(reference).suffix == ".npz":
        return features_of(Path(reference).expanduser()) or "inception"
    kind = (resolve_data(reference, (1, 1)) if isinstance(reference, str) else reference).kind
    return kind if kind in EMBEDDED else "inception"


def _silent(what: str) -> Progress:
    return None


def by_class(samples: FeatureSet, reference: FeatureSet) -> dict[str, Estimate]:
    """KID of each class by itself, where both sides have labels of the same classes; it is unbiased at any count."""
    ours, theirs = samples.label, reference.label
    if ours is None or theirs is None or "pool" not in reference.rows:
        return {}
    known = reference.class_names or tuple(str(number) for number in range(int(theirs.max()) + 1))
    numbers = _numbers(samples.class_names, known)
    if numbers is None:
        return {}
    found = {}
    for label, number in enumerate(numbers):
        rows, others, name = np.flatnonzero(ours == label), np.flatnonzero(theirs == number), known[number]
        if min(len(rows), len(others)) >= FEWEST:
            pool, real = samples.rows["pool"][rows[:MOST]], reference.rows["pool"][others[:MOST]]
            found[name] = distances.kernel_distance(np.asarray(pool), np.asarray(real))
    return found


def _oracle(reference: SampleSource | None) -> tuple[Data, DigitClassifier | ShapesEvaluator]:
    """The data whose truth is known, and its judge. Raises TesseraError for other references."""
    found = oracle_for(reference.config) if isinstance(reference, Data) else None
    if not isinstance(reference, Data) or found is None:
        raise TesseraError("oracle needs data whose truth is known: digits or shapes as --reference")
    return reference, found


def _judged(subject: SampleSource, reference: SampleSource | None) -> tuple[dict[str, Estimate], str]:
    """What an oracle says of the pictures, shard by shard, and what to know of it. Raises TesseraError if it cannot."""
    data, oracle = _oracle(reference)
    number = _numbers(subject.class_names, data.class_names)
    hits: dict[str, float] = {}
    seen = 0
    for index in range(shards(subject)):
        shard = subject.shard(index)
        if not len(shard.pictures):
            continue
        asked = None if shard.label is None or number is None else [number[label] for label in shard.label.tolist()]
        for name, share in oracle.judge(shard.pictures, asked).items():
            hits[name] = hits.get(name, 0.0) + share.value * len(shard.pictures)
        seen += len(shard.pictures)
    if not hits:
        raise TesseraError(f"oracle needs to know which class each sample was asked for: {subject.where} does not say")
    told = f"the oracle reads {oracle.reads}; of real pictures that it has not seen, {oracle.ceiling:.1%} right"
    return {name: Estimate.proportion(count, seen) for name, count in hits.items()}, told


def _numbers(names: Sequence[str], known: Sequence[str]) -> list[int] | None:
    """Which of the known classes each name stands for, itself or as a number; None if one of them is no such class.

    Without names labels are numbers of the known classes.
    """
    if not names:
        return list(range(len(known)))
    if set(names) <= set(known):
        return [known.index(name) for name in names]
    if all(name.isdecimal() and int(name) < len(known) for name in names):
        return [int(name) for name in names]
    return None


def _protocol(name: str, subject: SampleSource, samples: FeatureSet, reference: FeatureSet) -> Protocol:
    """What a metric depends on: an oracle on no features, the Inception score on no reference."""
    metric = METRICS.get(name)
    against: dict[str, Any] = {}
    if metric is not None and (metric.moments or metric.rows[1]):
        against = {"hash": reference.hash, "count": reference.count}
        if metric.rows[1]:  # statistics may keep a part
            against["rows"] = min(len(reference.rows[metric.rows[1]]), MOST)
    return Protocol(
        definition={"metric": name} | (metric.definition if metric is not None else {}),
        features=(samples.features or {}) if metric is not None else {},
        reference=against,
        samples=samples.count or 0,
        size=(subject.size[0], subject.size[1]),
        channels=subject.channels,
        sampling=subject.protocol if isinstance(subject, BulkSamples) else None,
    )


def _subject(subject: SampleSource, samples: FeatureSet, reference: FeatureSet) -> dict[str, Any]:
    told = {"where": subject.where, "pictures": samples.hash, "reference": reference.where}
    return told | (subject.made_by if isinstance(subject, BulkSamples) else {})
