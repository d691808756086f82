"""An evaluation as a page: scores with their protocol, pictures, the nearest reference pictures, class by class.

Written as Markdown with the pictures beside it, and as one self-contained HTML file.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tessera import images
from tessera.evaluation import distances, protocol
from tessera.evaluation.reference import chosen
from tessera.evaluation.sources import SHARD, SampleSource, shards
from tessera.evaluation.suite import Evaluation, few
from tessera.files import atomic_write
from tessera.reporting import page as page_html
from tessera.settings import flat

GRID, NEIGHBOURS = "grid.png", "neighbours.png"
SHOWN = 64  # pictures of the grid
SUSPECTS = 8  # samples nearest to the reference, and as many at random

MEANING = {
    "fd": "Fréchet distance of the features; lower is better; falls with the number of samples",
    "fd_inf": "the same, extrapolated to infinitely many samples",
    "sfid": "Fréchet distance of spatial features: layout rather than content; lower is better",
    "kid": "kernel distance, unbiased at any number of samples; lower is better, 0 is equal",
    "is": "Inception score: sharp and varied by the classifier's own classes; higher is better",
    "precision": "share of samples among the real ones (fidelity)",
    "recall": "share of real pictures among the samples (variety)",
    "density": "how densely samples stand among real ones; 1 for real ones",
    "coverage": "share of real pictures with a sample near",
    "authenticity": "share of samples not nearer to a reference picture than its nearest fellow is; copies lower it",
    "as asked": "share of pictures that show what was asked for, by the oracle",
    "impossible": "share of pictures that cannot be, by the oracle",
}


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    file: str
    pixels: np.ndarray
    about: str


Part = str | Table | Picture


def write(evaluation: Evaluation, folder: Path, command: str = "") -> None:
    """scores.json, report.md, report.html and the pictures, into a folder. TesseraError if they cannot be written."""
    protocol.save(evaluation.scores, folder / "scores.json")  # first: what follows may take a while
    parts = _parts(evaluation, command)
    for part in parts:
        if isinstance(part, Picture):
            images.save_png(folder / part.file, part.pixels)
    atomic_write(folder / "report.md", "\n\n".join(map(_markdown, parts)) + "\n")
    body = "\n".join(map(_html, parts))
    atomic_write(folder / "report.html", page_html.document(evaluation.source.where, body))


def _parts(evaluation: Evaluation, command: str) -> list[Part]:
    scores, subject, reference = evaluation.scores, evaluation.source, evaluation.reference
    told: list[Part] = [f"# Scores of {subject.where}", f"Against {reference.where}."]
    if command:
        told.append(f"    {command}")
    rows = [
        (score.metric, f"{score.value:.5g}", f"{score.low:.5g} to {score.high:.5g}", score.fingerprint, meaning)
        for score in scores
        for meaning in [MEANING.get(score.metric, "")]
    ]
    told.append(Table(("metric", "value", "95 % interval", "fingerprint", ""), rows))
    told += [f"Note: {note}." for note in evaluation.notes]
    told += ["## Pictures", Picture(GRID, _grid(subject), "the first samples, unpicked")]
    told += _neighbours(evaluation)
    if evaluation.classes:
        by_class = sorted(evaluation.classes.items(), key=lambda item: -item[1].value)
        rows = [(name, f"{kid.value:.4g}", f"{kid.low:.4g} to {kid.high:.4g}") for name, kid in by_class]
        told += ["## Class by class", "The worst first.", Table(("class", "kid", "95 % interval"), rows)]
    if scores:
        score = scores[0]
        facts = flat(score.protocol.model_dump(mode="json", exclude={"definition"}))
        facts |= {f"subject.{name}": value for name, value in score.subject.items() if not isinstance(value, dict)}
        facts |= {f"environment.{name}": value for name, value in score.environment.items()}
        told += ["## Protocol", "Scores compare where their fingerprints agree (`tessera evaluate compare`)."]
        told.append(Table(("", ""), [(name, str(value)) for name, value in facts.items()]))
    return told


def _grid(subject: SampleSource) -> np.ndarray:
    each = (subject.shard(index).pictures for index in range(shards(subject)))
    shown = next(found for found in each if len(found))[:SHOWN]
    return images.grid(shown, min(8, len(shown)), zoom=max(1, 64 // shown.shape[1]))


def _neighbours(evaluation: Evaluation) -> list[Part]:
    """The samples nearest to a reference picture, and random ones, each above the picture it is nearest to."""
    reference, samples, source = evaluation.reference, evaluation.samples, evaluation.reference_pictures
    if source is None or "pool" not in reference.rows or samples.number is None or reference.number is None:
        return []
    ours, theirs = few(samples), few(reference)
    distance, index = distances.nearest(ours, theirs)
    count = min(SUSPECTS, len(ours))
    suspects = np.argsort(distance, kind="stable")[:count]
    others = np.arange(len(ours))[:: max(1, len(ours) // count)][:count]
    our_number = samples.number[chosen(len(samples.rows["pool"]), len(ours))]
    their_number = reference.number[chosen(len(reference.rows["pool"]), len(theirs))]

    above, below = np.r_[suspects, others], np.r_[index[suspects], index[others]]
    shown = _pictures(evaluation.source, our_number[above])
    theirs_shown = _pictures(source, their_number[below])
    sheet = shown[:count] + theirs_shown[:count] + shown[count:] + theirs_shown[count:]
    about = (
        "rows 1 and 2: the samples nearest to a reference picture, and that picture; "
        "rows 3 and 4: samples not chosen so, and the picture each is nearest to. "
        f"Mean distance to the nearest reference picture, in features: {distance.mean():.4g}"
    )
    drawn = images.grid(np.stack(sheet), count, gap=2, zoom=max(1, 64 // sheet[0].shape[0]))
    return ["## Is it copying?", Picture(NEIGHBOURS, drawn, about)]


def _pictures(subject: SampleSource, numbers: np.ndarray) -> list[np.ndarray]:
    """Pictures of a subject by their numbers, uint8 [H, W, C]; each shard is read once."""
    found: dict[int, np.ndarray] = {}
    for index in sorted({int(number) // SHARD for number in numbers}):
        shard = subject.shard(index)
        found |= {int(row): picture for row, picture in zip(shard.row, shard.pictures) if row in numbers}
    return [found[int(number)] for number in numbers]


def _markdown(part: Part) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Picture):
        return f"![{part.about}]({part.file})\n\n{part.about}"
    lines = [part.head, ["---"] * len(part.head), *part.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _html(part: Part) -> str:
    if isinstance(part, Picture):
        return page_html.picture(images.to_png(part.pixels), part.about)
    if isinstance(part, Table):
        return page_html.table(part.head, part.rows)
    for mark, tag in (("## ", "h2"), ("# ", "h1"), ("    ", "pre")):
        if part.startswith(mark):
            return f"<{tag}>{html.escape(part.removeprefix(mark))}</{tag}>"
    return f"<p>{html.escape(part)}</p>"
