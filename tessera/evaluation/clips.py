"""Metrics that read clips themselves."""

import numpy as np

from tessera.data.lanes import COLORS
from tessera.errors import TesseraError
from tessera.evaluation import law
from tessera.evaluation.captions import ImageScores
from tessera.evaluation.sources import SampleSource
from tessera.generation.shards import num_shards
from tessera.reporting.document import Heading, Paragraph, Table


def law_scores(source: SampleSource) -> ImageScores:
    """The law of lanes. Raises TesseraError for other clips."""
    if len(source.size) != 3 or source.channels != 3:
        raise TesseraError(f"law needs clips of lanes, and {source.description} has images of {list(source.size)}")
    clips, labels = _all_clips(source)
    if source.class_names and source.class_names != tuple(COLORS):
        labels = None
    scores, rows = law.measure(clips, None if labels is None else labels.tolist())
    explanation = (
        "A lane obeys the law if its disc has one color, moves at a constant speed of the data, is reflected by the "
        "walls, and is seen wherever the bar does not hide it; a clip that stands still does not. The held-out groups "
        "are those of the clips' own colors and speeds, so they may be small."
    )
    return ImageScores(
        scores, [], law.DEFINITION, details=[Heading("Law"), Paragraph(explanation), Table(rows, law.COLUMNS)]
    )


def _all_clips(source: SampleSource) -> tuple[np.ndarray, np.ndarray | None]:
    """The clips uint8 [B, T, H, W, C] of a source, and their labels, if all have one."""
    shards = [source.shard(index) for index in range(num_shards(source.count))]
    labels = [shard.labels for shard in shards if shard.labels is not None]
    return (
        np.concatenate([shard.images for shard in shards]),
        np.concatenate(labels) if len(labels) == len(shards) else None,
    )
