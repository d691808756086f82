"""Alignment of images with captions of the shapes data: what each image shows of its caption, beside controls.

An image is compared with its own caption and with that of another image (chance); real images are compared with theirs
(ceiling). With the colors of two objects exchanged, a caption has the same words: a model that ignores which color
belongs to which object shows it as often. Captions with combinations of color and shape that are held out of training
measure composition.

Shapes: B images, H W height and width.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tessera import randomness
from tessera.data.shapes import HELD_OUT, RELATIONS, ShapesConfig, parse_caption
from tessera.errors import TesseraError
from tessera.evaluation.toy.shape_reader import Detection, compare, detect
from tessera.generation import SampleRequest, generate_request
from tessera.model import Model
from tessera.reporting.estimates import Estimate

STREAM = 0x6F746865  # random stream of the captions of other images
NUM_REAL = 1000  # real images, of the test split
DEFINITION = {"reader": "shapes, by comparison with exact masks", "held out": ", ".join(HELD_OUT)}

ONE, TWO, EXCHANGED = "one object", "two objects", "two objects of different colors and shapes"
READABLE = "images that can be read"
COMPOSED, KNOWN, UNSEEN = "held-out combinations", "known combinations", "captions absent from the training data"
# The fractions that are reported: group of captions, what must be correct, and the name of the score, if it is one.
LINES = (
    ("all captions", "whole", "alignment"),
    (ONE, "whole", "alignment_one_object"),
    *((ONE, word, "") for word in ("shape", "color", "size")),
    (TWO, "whole", "alignment_two_objects"),
    (TWO, "binding", "binding"),
    (TWO, "relation", "relation"),
    *((TWO, word, "") for word in ("shape", "color", "size")),
    *((name, "relation", "") for name in RELATIONS),
    (EXCHANGED, "binding", ""),
    (EXCHANGED, "swapped", "swapped_colors"),
    (KNOWN, "whole", ""),
    (COMPOSED, "whole", "composition"),
    (f"{COMPOSED}, {ONE}", "binding", ""),
    (f"{COMPOSED}, {TWO}", "binding", ""),
    (f"{UNSEEN}, {ONE}", "whole", ""),
    (f"{UNSEEN}, {TWO}", "whole", ""),
    (f"{UNSEEN}, {TWO}", "binding", ""),
    (f"{UNSEEN}, {TWO}", "relation", ""),
    ("all captions", "invalid", ""),
    (f"{READABLE}, {ONE}", "whole", ""),
    (f"{READABLE}, {TWO}", "whole", ""),
    (f"{READABLE}, {TWO}", "binding", ""),
    (f"{READABLE}, {TWO}", "relation", ""),
)
MEANING = {
    "whole": "whole caption",
    "binding": "color and shape of every object",
    "swapped": "color and shape of every object, with the colors exchanged",
    "invalid": "the image cannot be read",
}


COLUMNS = ("captions", "correct", "images", "fraction and 95 % interval", "captions of other images", "real images")


@dataclass(frozen=True)
class Line:
    """A fraction of the images whose captions are in a group (of READABLE only the images that can be read), and the
    same of the controls.

    chance: with captions of other images. real: of real images, if they have captions of the group.
    """

    group: str
    correct: str
    score: str  # its name as a score; "" if it is in the table only
    count: int
    images: Estimate
    chance: Estimate
    real: Estimate | None


def measure(
    images: np.ndarray, captions: Sequence[str], training_captions: Collection[str] | None = None
) -> list[Line]:
    """The fractions for images uint8 [B, H, W, 3] with their captions. Groups without captions are left out.

    training_captions: to report others apart. Raises TesseraError for a caption that is not one
    of shapes.
    """
    if len(images) != len(captions) or not captions:
        raise TesseraError(f"{len(images)} images and {len(captions)} captions: expected one for each, at least one")
    detections = [detect(image) for image in images]
    own = _fractions(detections, captions, training_captions)
    chance = _fractions(detections, _other_captions(captions), training_captions)
    real = _fractions(*_real(), training_captions)
    return [
        Line(
            group, correct, score, count, estimate, chance[group, correct][1], real.get((group, correct), (0, None))[1]
        )
        for group, correct, score in LINES
        if (group, correct) in own
        for count, estimate in [own[group, correct]]
    ]


def measure_model(
    model: Model,
    captions: Sequence[str],
    seeds: Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 50,
    training_captions: Collection[str] | None = None,
) -> list[Line]:
    """The fractions for images sampled from captions, by default with the seeds 0, 1, ...

    settings: changes of the sampling settings.
    """
    seeds = range(len(captions)) if seeds is None else seeds
    request = SampleRequest(seeds, {"text": list(captions)}, settings=settings or {}, policy="listed")
    return measure(generate_request(model, request, batch_size), captions, training_captions)


def summary(lines: Sequence[Line]) -> str:
    """A sentence about the controls of the whole caption."""
    line = next(line for line in lines if line.score == "alignment")
    real = "" if line.real is None else f"; of real images {line.real.value:.1%}"
    return f"alignment is {line.images.value:.1%}, with captions of other images {line.chance.value:.1%}{real}"


def table(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """Rows of a table with the columns COLUMNS."""
    rows = []
    for line in lines:
        interval = f"{line.images.value:.1%} ({line.images.low:.1%} to {line.images.high:.1%})"
        real = "" if line.real is None else f"{line.real.value:.1%}"
        name = MEANING.get(line.correct, line.correct)
        rows.append((line.group, name, str(line.count), interval, f"{line.chance.value:.1%}", real))
    return rows


def _fractions(
    detections: Sequence[Detection], captions: Sequence[str], training_captions: Collection[str] | None
) -> dict[tuple[str, str], tuple[int, Estimate]]:
    """The number of captions and the fraction that is correct, by group and by what must be correct."""
    hits: dict[tuple[str, str], list[bool]] = {}
    lines = {(group, correct) for group, correct, _ in LINES}
    for detection, caption in zip(detections, captions, strict=True):
        results = compare(detection.objects, parse_caption(caption)) | {"invalid": bool(detection.invalid_reason)}
        groups = _groups(caption, training_captions)
        groups += [] if detection.invalid_reason else [f"{READABLE}, {groups[1]}"]
        for group in groups:
            for correct, hit in results.items():
                if (group, correct) in lines:
                    hits.setdefault((group, correct), []).append(hit)
    return {key: (len(values), Estimate.proportion(sum(values), len(values))) for key, values in hits.items()}


def _groups(caption: str, training_captions: Collection[str] | None) -> list[str]:
    """The groups that a caption belongs to."""
    description = parse_caption(caption)
    first, *others = description.appearances
    number = TWO if others else ONE
    groups = ["all captions", number]
    if description.relation:
        groups.append(description.relation)
    if others and first.color != others[0].color and first.shape != others[0].shape:
        groups.append(EXCHANGED)
    composed = any(item.combination in HELD_OUT for item in description.appearances)
    groups += [COMPOSED, f"{COMPOSED}, {number}"] if composed else [KNOWN]
    if training_captions is not None and caption not in training_captions:
        groups.append(f"{UNSEEN}, {number}")
    return groups


def _other_captions(captions: Sequence[str]) -> list[str]:
    """For each image the caption of another one with as many objects; its own if there is no other."""
    others = list(captions)
    for number in (1, 2):
        rows = [row for row, caption in enumerate(captions) if len(parse_caption(caption).appearances) == number]
        order = [rows[position] for position in randomness.permutation(0, STREAM, number, len(rows)).tolist()]
        for row, other in zip(order, order[1:] + order[:1]):
            others[row] = captions[other]
    return others


@cache
def _real() -> tuple[list[Detection], list[str]]:
    """What is detected in real images, and their captions."""
    dataset = ShapesConfig(split="test", count=NUM_REAL).open()
    detections = [detect(dataset.pixels(index).transpose(1, 2, 0)) for index in range(NUM_REAL)]
    return detections, [dataset.caption(index) for index in range(NUM_REAL)]
