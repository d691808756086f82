"""Metrics of images and their captions: alignment, for captions of shapes, and the CLIP score.

Shapes: B images of a shard, C channels, H W height and width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tessera.bundle import Model, weights_hash
from tessera.data import AnyData
from tessera.data.resolve import parse_data, resolve_data
from tessera.data.shapes import ShapesConfig, parse_caption
from tessera.errors import TesseraError
from tessera.evaluation import alignment
from tessera.evaluation.sources import SampleSource
from tessera.generation.bulk import BulkSamples, hash_values
from tessera.generation.request import image_size
from tessera.generation.shards import num_shards
from tessera.reporting.document import Block, Heading, Paragraph, Table
from tessera.reporting.estimates import Estimate

if TYPE_CHECKING:
    from tessera.encoders.clip import Clip


@dataclass(frozen=True)
class ImageScores:
    """Scores of images themselves, not of their features, with notes, and what their protocol records."""

    estimates: dict[str, Estimate]
    notes: list[str]
    definition: dict[str, Any] = field(default_factory=dict)
    features: dict[str, str] = field(default_factory=dict)
    details: list[Block] = field(default_factory=list)  # for the report


def caption_data(captions: str | None, reference: str | AnyData, model: Model) -> AnyData | None:
    """The data whose captions a model is sampled for: `captions`, or else the reference. None for a model without text,
    and for statistics, which have none. Raises TesseraError.
    """
    rules = model.config.network.condition_type.rules()
    if not any(rules[name].from_data for name in model.config.network.condition_fields):
        if captions is not None:
            raise TesseraError("this model takes no captions: leave --captions (evaluation.captions) out")
        return None
    chosen = captions or reference
    if not isinstance(chosen, str):
        return chosen
    if captions is None and Path(chosen).suffix == ".npz":
        return None
    height, width = image_size(model)[-2:]
    return resolve_data(chosen, (height, width), model.codec.pixel_channels)


def check(metrics: Sequence[str] | None, source: SampleSource, clip: str | None, device: torch.device) -> "Clip | None":
    """The CLIP network of a folder, if one is given. Raises TesseraError if one of the metrics needs captions or a
    network that are missing; call it before sampling. metrics: None for the default ones
    """
    if metrics is not None and (clip is None) == ("clip_score" in metrics):
        raise TesseraError("clip_score and the folder of a CLIP network, --clip (evaluation.clip), need each other")
    for name in metrics or ():
        if name in ("alignment", "clip_score"):
            captions = source.request.prompts if isinstance(source, BulkSamples) else source.shard(0).captions
            if captions is None or None in captions:
                raise TesseraError(f"{name} needs a caption for each image, and {source.description} has none")
            if name == "alignment":
                for caption in captions:
                    parse_caption(caption or "")
    if clip is None:
        return None
    from tessera.encoders import clip as clip_encoder

    return clip_encoder.load(clip).to(device)


def alignment_scores(source: SampleSource) -> ImageScores:
    """What images of shapes show of their captions. Raises TesseraError for other captions."""
    images, captions = [], []
    for shard_images, shard_captions in _captioned(source):
        parse_caption(shard_captions[0])  # images with other captions may be many
        images.append(shard_images)
        captions += shard_captions
    lines = alignment.measure(np.concatenate(images), captions, _training_captions(source))
    return ImageScores(
        {line.score: line.images for line in lines if line.score},
        [alignment.summary(lines)],
        {"captions": hash_values(captions), **alignment.DEFINITION},
        details=[
            Heading("Alignment"),
            Paragraph(
                "What images show of their captions, the same with captions of other images (chance), and of real "
                "images with theirs (ceiling). A model that ignores which color belongs to which object shows captions "
                "as often with the colors exchanged."
            ),
            Table(alignment.table(lines), alignment.COLUMNS),
        ],
    )


def clip_scores(source: SampleSource, reference: SampleSource | None, clip: "Clip", batch_size: int) -> ImageScores:
    """The mean of 100 max(cosine, 0) of images and captions, as torchmetrics and most papers report it; Hessel et al.
    (2021) have 2.5 max(cosine, 0). Notes have the same with captions of other images, and of reference images.
    """
    own, others, captions, num_cut = [], [], [], 0
    for images, shard_captions in _captioned(source):
        own += _clip_values(clip, images, shard_captions, batch_size)
        others += _clip_values(clip, images, [*shard_captions[1:], shard_captions[0]], batch_size)
        captions += shard_captions
        num_cut += clip.num_cut(shard_captions)
    notes = [f"clip_score with captions of other images is {np.mean(others):.4g}"]
    try:
        images, real_captions = next(_captioned(reference)) if reference is not None else (np.empty(0), [])
    except TesseraError:  # captions of the reference are not required
        images, real_captions = np.empty(0), []
    if real_captions:
        value = np.mean(_clip_values(clip, images, real_captions, batch_size))
        notes.append(f"clip_score of {len(real_captions)} reference images is {value:.4g}")
    if num_cut:
        notes.append(f"CLIP reads {clip.max_tokens} tokens: {num_cut} of {len(captions)} captions are cut")
    return ImageScores(
        {"clip_score": Estimate.mean(own)},
        notes,
        {"score": "100 max(cosine, 0)", "captions": hash_values(captions), "max_tokens": clip.max_tokens},
        {"name": clip.name, "weights": weights_hash(clip.images), "resize": clip.resize},
    )


def _clip_values(clip: "Clip", images: np.ndarray, captions: Sequence[str], batch_size: int) -> list[float]:
    device, values = next(clip.parameters()).device, []
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(np.array(images[start : start + batch_size].transpose(0, 3, 1, 2), order="C"))
        cosines = clip(batch.to(device), captions[start : start + batch_size])
        values += (100 * cosines.clamp(min=0)).tolist()
    return values


def _captioned(source: SampleSource) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Images uint8 [B, H, W, C] with their captions, by shard. Raises TesseraError if a caption is missing."""
    for index in range(num_shards(source.count)):
        shard = source.shard(index)
        captions = [caption for caption in shard.captions or () if caption is not None]
        if len(captions) != len(shard.images):
            missing = len(shard.images) - len(captions)
            raise TesseraError(
                f"{source.description}: {missing} of {len(shard.images)} images have no caption; alignment and "
                "clip_score need one for each"
            )
        if captions:
            yield shard.images, captions


def _training_captions(source: SampleSource) -> set[str] | None:
    """The captions of the shapes that a model was trained on; None if it was trained on other data."""
    recipe = source.model.config.recipe if isinstance(source, BulkSamples) else None
    data = parse_data(recipe["data"]) if recipe and "data" in recipe else None
    if not isinstance(data, ShapesConfig):
        return None
    dataset = data.open()
    return {dataset.caption(index) for index in range(len(dataset))}
