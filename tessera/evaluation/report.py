"""The report of an evaluation: scores with their protocol, sample images, nearest reference images, scores by class.

Written as Markdown with its images beside it and as one self-contained HTML page.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tessera import images
from tessera.evaluation import distances, protocol
from tessera.evaluation.reference import subset_indices
from tessera.evaluation.sources import SampleSource
from tessera.evaluation.suite import Evaluation, row_subset
from tessera.generation import shards
from tessera.reporting.document import Block, Code, Document, Figure, Heading, Paragraph, Table
from tessera.reporting.metrics import MEANING
from tessera.settings import flatten

GRID, NEIGHBORS = "grid.png", "neighbors.png"
MAX_IMAGES = 64  # of the grid
MAX_NEIGHBORS = 8  # samples nearest to the reference, and as many spread over all samples
MIN_SIDE = 64  # pixels: smaller images are enlarged


def write(evaluation: Evaluation, folder: Path, command: str = "") -> None:
    """Write scores.json, report.md, report.html and the images. Raises TesseraError if they cannot be written.

    command: the command line that made the scores, for the report.
    """
    protocol.save(evaluation.scores, folder / "scores.json")  # first: the rest may take a while
    build_report(evaluation, command).save(folder)


def build_report(evaluation: Evaluation, command: str = "") -> Document:
    blocks: list[Block] = [Paragraph(f"Reference: {evaluation.reference.description}.")]
    if command:
        blocks.append(Code(command))
    rows = [
        (s.metric, f"{s.value:.5g}", f"{s.low:.5g} to {s.high:.5g}", s.fingerprint, MEANING.get(s.metric, ""))
        for s in evaluation.scores
    ]
    blocks.append(Table(rows, ("metric", "value", "95 % interval", "fingerprint", "meaning")))
    blocks += [Paragraph(f"Note: {note}.") for note in evaluation.notes]
    blocks += evaluation.details
    blocks += [Heading("Samples"), _sample_grid(evaluation.source), *_neighbors(evaluation)]
    if evaluation.kid_by_class:
        by_class = sorted(evaluation.kid_by_class.items(), key=lambda item: -item[1].value)
        rows = [(name, f"{kid.value:.4g}", f"{kid.low:.4g} to {kid.high:.4g}") for name, kid in by_class]
        blocks += [Heading("KID by class"), Paragraph("The worst class first.")]
        blocks.append(Table(rows, ("class", "kid", "95 % interval")))
    if evaluation.scores:
        score = evaluation.scores[0]
        facts = flatten(score.protocol.model_dump(mode="json", exclude={"definition"}))
        facts |= {f"source.{name}": value for name, value in score.source.items() if not isinstance(value, dict)}
        facts |= {f"environment.{name}": value for name, value in score.environment.items()}
        comparable = (
            "Scores can be compared if their fingerprints are equal. tessera evaluate compare lists differences."
        )
        rows = [(name, str(value)) for name, value in facts.items()]
        blocks += [Heading("Protocol"), Paragraph(comparable), Table(rows)]
    return Document(f"Scores of {evaluation.source.description}", blocks)


def _sample_grid(source: SampleSource) -> Figure:
    parts = (source.shard(index).images for index in range(shards.num_shards(source.count)))
    first = next(part for part in parts if len(part))[:MAX_IMAGES]
    grid = images.grid(first, min(8, len(first)), zoom=max(1, MIN_SIDE // first.shape[-3]))
    return Figure(images.to_png(grid), f"the first {len(first)} samples, not selected", file=GRID)


def _neighbors(evaluation: Evaluation) -> Iterator[Block]:
    """The samples nearest to a reference image, and others, each above its nearest reference image."""
    reference, samples, source = evaluation.reference, evaluation.samples, evaluation.reference_images
    if source is None or "pool" not in reference.rows or samples.indices is None or reference.indices is None:
        return
    features, reference_features = row_subset(samples), row_subset(reference)
    distance, nearest = distances.nearest_neighbors(features, reference_features)
    count = min(MAX_NEIGHBORS, len(features))
    closest = np.argsort(distance, kind="stable")[:count]
    others = np.arange(len(features))[:: max(1, len(features) // count)][:count]
    rows = np.r_[closest, others]
    indices = samples.indices[subset_indices(len(samples.rows["pool"]), len(features))]
    reference_indices = reference.indices[subset_indices(len(reference.rows["pool"]), len(reference_features))]
    above = _images(evaluation.source, indices[rows])
    below = _images(source, reference_indices[nearest[rows]])
    sheet = np.stack(above[:count] + below[:count] + above[count:] + below[count:])
    caption = (
        "rows 1 and 2: the samples nearest to a reference image, and that image; rows 3 and 4: other samples, and the "
        f"reference image nearest to each. Mean distance to the nearest one, in features: {distance.mean():.4g}"
    )
    grid = images.grid(sheet, count, gap=2, zoom=max(1, MIN_SIDE // sheet.shape[-3]))
    yield Heading("Nearest reference images")
    yield Figure(images.to_png(grid), caption, file=NEIGHBORS)


def _images(source: SampleSource, indices: np.ndarray) -> list[np.ndarray]:
    """Images of a source by index, uint8 [H, W, C]. Each shard is read once."""
    by_index: dict[int, np.ndarray] = {}
    for number in sorted({int(index) // shards.SHARD_SIZE for index in indices}):
        shard = source.shard(number)
        by_index |= {int(index): image for index, image in zip(shard.indices, shard.images) if index in indices}
    return [by_index[int(index)] for index in indices]
