"""The report of a data set check as one HTML page: numbers, charts, and thumbnails of the samples of each finding."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice

import numpy as np
from PIL import Image

from tessera.data.check.findings import Finding, ScanResult
from tessera.data.clips import frame_numbers, open_frames
from tessera.data.files import FilesDataset
from tessera.data.images import flatten, upright, with_image
from tessera.reporting.document import Block, Bullets, Code, Document, Figure, Heading, Images, Notice, Paragraph, Table
from tessera.reporting.figures import bar_chart

MAX_SAMPLES = 16  # of a finding
MAX_GROUPS, MAX_GROUP_SIZE = 12, 6  # groups of a finding, and samples of a group
MAX_NAMES = 30
MAX_BARS = 30
THUMBNAIL_SIDE = 96  # pixels of the longer side


def page(result: ScanResult, findings: Sequence[Finding], keep: np.ndarray, command: str = "") -> str:
    """The whole page. keep: which samples are accepted, bool [N]; command: the command line of the check."""
    blocks: list[Block] = [Table(summary(result, keep))]
    if command:
        blocks.append(Code(command))
    blocks += [Images(list(_charts(result))), Heading("Findings")]
    blocks += [_notice(result, finding) for finding in findings] or [Paragraph("No findings.")]
    return Document(f"Check of {result.path}", blocks).html()


def summary(result: ScanResult, keep: np.ndarray) -> list[tuple[str, str]]:
    """Names and values that describe the data set. keep: bool [N]"""
    usable, names = result.usable, result.dataset.class_names
    captions = result.dataset.table["caption"]
    rows = [
        ("samples", f"{len(usable):,}"),
        ("readable", f"{int(usable.sum()):,}"),
        ("accepted", f"{int(keep.sum()):,}"),
        ("bytes", f"{int(result.column('length').sum()):,}"),
        ("classes", f"{len(names):,}" if names else "none"),
        ("with a caption", f"{len(captions) - captions.null_count:,}"),
    ]
    if usable.any():
        height, width = result.column("height")[usable], result.column("width")[usable]
        area = height * width
        least, most = int(area.argmin()), int(area.argmax())
        rows.append(("sizes", f"{height[least]} x {width[least]} to {height[most]} x {width[most]} (height x width)"))
    if result.dataset.config.frames is not None and usable.any():
        frames, rate = result.column("frames")[usable], result.column("rate")[usable]
        rates = f" at {rate[rate > 0].min():.4g} to {rate.max():.4g} fps" if (rate > 0).any() else ""
        rows.append(("frames", f"{frames.min():,} to {frames.max():,}{rates}"))
    rows.append(("checked", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"))
    return rows


def _charts(result: ScanResult) -> Iterator[Figure]:
    usable, names = result.usable, result.dataset.class_names
    labels = result.labels[usable & (result.labels >= 0)]
    classes = dict(zip(names or (), np.bincount(labels, minlength=len(names or ())).tolist()))
    shapes, counts = np.unique(
        result.column("height")[usable] << 32 | result.column("width")[usable], return_counts=True
    )
    sizes = {f"{shape >> 32} x {shape & 0xFFFFFFFF}": count for shape, count in zip(shapes.tolist(), counts.tolist())}
    formats: Counter[str] = Counter()
    for batch in result.stats.select(["format", "mode", "fault"]).to_batches():
        columns = (batch[name].to_pylist() for name in ("format", "mode", "fault"))
        formats.update(f"{kind} {mode}" for kind, mode, fault in zip(*columns) if fault is None)
    for title, counts in (
        ("Images per class", classes),
        ("Sizes (height x width)", sizes),
        ("Formats", formats),
    ):
        bars = sorted(counts.items(), key=lambda item: -item[1])
        chart = bar_chart(title, bars[:MAX_BARS], f"the first {MAX_BARS} of {len(bars):,}" * (len(bars) > MAX_BARS))
        if chart is not None:
            yield chart


def _notice(result: ScanResult, finding: Finding) -> Notice:
    blocks: list[Block] = [Paragraph(f"{finding.message[:1].upper()}{finding.message[1:]}: {finding.count:,}.")]
    if finding.advice:
        blocks.append(Paragraph(f"Remedy: {finding.advice}."))
    blocks += [Code(command) for command in finding.commands]
    for group in islice(finding.groups(), MAX_GROUPS):
        blocks += [_thumbnails(result, finding, group[:MAX_GROUP_SIZE])]
        blocks += _more(len(group), MAX_GROUP_SIZE, "in this group")
    blocks += _more(finding.num_groups, MAX_GROUPS, "groups")
    if len(finding.samples) and not finding.num_groups:
        blocks.append(_thumbnails(result, finding, finding.samples[:MAX_SAMPLES].tolist()))
        blocks += _more(len(finding.samples), MAX_SAMPLES, "samples")
    if finding.names:
        blocks += [Bullets(finding.names[:MAX_NAMES]), *_more(len(finding.names), MAX_NAMES, "names")]
    return Notice(finding.severity, finding.kind, blocks)


def _more(total: int, limit: int, name: str) -> list[Block]:
    count = total - limit
    return [Paragraph(f"and {count:,} more {name}; decisions.jsonl lists all samples")] if count > 0 else []


def _thumbnails(result: ScanResult, finding: Finding, rows: Sequence[int]) -> Images:
    captions = [": ".join(filter(None, (result.name(row), finding.reason(row)))) for row in rows]
    return Images([Figure(_thumbnail(result.dataset, row), text) for row, text in zip(rows, captions)], thumbnails=True)


def _filmstrip(dataset: FilesDataset, row: int) -> Image.Image:
    """The first, the middle and the last frame of a clip."""
    span = dataset.span(row)
    with open_frames(dataset.encoded(row), span.fps) as frames:
        numbers = frame_numbers(frames, None, span)
        chosen = sorted({int(numbers[place]) for place in (0, len(numbers) // 2, -1)})
        images = [flatten(image, dataset.config).convert("RGB") for image in frames.read(chosen)]
    return Image.fromarray(np.concatenate([np.asarray(image) for image in images], axis=1))


def _thumbnail(dataset: FilesDataset, row: int) -> bytes | None:
    """A sample as training reads it, as a PNG of at most THUMBNAIL_SIDE pixels; None if it cannot be decoded."""

    def read(image: Image.Image) -> Image.Image:
        image.draft("RGB", (2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))
        return flatten(upright(image), dataset.config).convert("RGB")

    is_clip = dataset.config.frames is not None
    try:
        thumbnail = _filmstrip(dataset, row) if is_clip else with_image(dataset.encoded(row), read)
    except Exception:  # InvalidSample, and decoders raise anything on damaged bytes
        return None
    thumbnail.thumbnail((THUMBNAIL_SIDE * (3 if is_clip else 1), THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    thumbnail.save(buffer, "PNG")
    return buffer.getvalue()
