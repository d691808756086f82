"""Measurements of clips for `tessera data check`: all frames of a sample are decoded once.

Shapes: N frames.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tessera.data.check import similarity
from tessera.data.clips import NO_VIDEO, Frames, Span, frame_numbers, open_frames
from tessera.data.images import ImagesConfig, InvalidSample, flatten

if TYPE_CHECKING:
    from tessera.data.check.scan import Fault, SampleStats

SIDE = 16  # pixels of the thumbnails whose differences are motion
MAX_FRAMES = 600  # of a sample that are measured; of longer ones the first
CUT, CUT_RATIO = 30.0, 6.0  # a scene cut: so many of 255 levels of mean difference, and times the median of the clip
FAULTS: tuple[tuple[str, "Fault"], ...] = (
    ("its end is missing", "truncated"), ("needs PyAV", "unsupported"), ("empty", "empty"), ("damaged", "damaged"),
    ("not an image", "no image"), (NO_VIDEO, "no video"), ("no frames", "no video"),
)  # fmt: skip


def measure_clip(stats: "SampleStats", content: Path | bytes, span: Span, config: ImagesConfig) -> "SampleStats":
    """Fill in the measurements of one clip, or why it cannot be used."""
    try:
        stats.digest, stats.length = _digest(content, span)
        if not stats.length:
            stats.fault, stats.detail = "empty", "0 bytes"
            return stats
        span.check()
        with open_frames(content, span.fps) as frames:
            _measure(stats, frames, span, config)
    except InvalidSample as error:
        stats.detail = str(error)
        faults: list[Fault] = [fault for words, fault in FAULTS if words in stats.detail]
        stats.fault = faults[0] if faults else "unsupported"
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        stats.detail = error.strerror or str(error)
        stats.fault = "missing" if missing else "unreadable"
    return stats


def _digest(content: Path | bytes, span: Span) -> tuple[bytes, int]:
    """A hash of the bytes and of the part of the file, and the number of bytes."""
    if isinstance(content, bytes):
        parts = [content]
    else:
        files = sorted(path for path in content.iterdir() if path.is_file()) if content.is_dir() else [content]
        parts = [file.read_bytes() for file in files]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    if span != Span(fps=span.fps):
        digest.update(repr(span).encode())
    return digest.digest(), sum(map(len, parts))


def _measure(stats: "SampleStats", frames: Frames, span: Span, config: ImagesConfig) -> None:
    count = len(frame_numbers(frames, config.fps, span)) - span.first
    numbers = frame_numbers(frames, None, span)[:MAX_FRAMES]
    if count <= 0 or not len(numbers):
        raise InvalidSample(f"no frame from {span.start:g} s on: it has {frames.times[-1]:.3g} s")
    stats.frames, stats.seconds = count, float(frames.times[-1])
    stats.format, durations = frames.format, np.diff(frames.times)
    if frames.is_timed:
        stats.rate = len(durations) / max(stats.seconds, 1e-9)
        stats.variable_rate = len(durations) > 2 and float(durations[:-1].max()) > 1.5 * float(durations[:-1].min())
    images = [flatten(image, config).convert("RGB") for image in frames.read(numbers.tolist())]
    stats.orientation = {0: 1, 90: 8, 180: 3, 270: 6}.get(frames.rotation, 1)  # as the EXIF orientation
    stats.height, stats.width = images[0].height, images[0].width
    if len({image.size for image in images}) > 1:
        raise InvalidSample("its frames have different sizes")
    small = np.stack([np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.int16) for image in images])
    changes = np.abs(np.diff(small, axis=0)).mean(axis=(1, 2, 3))
    stats.motion = float(changes.max()) if len(changes) else 0.0
    if len(changes) > 1 and changes.max() > max(CUT, CUT_RATIO * float(np.median(changes))):
        stats.cut = float(frames.times[numbers[int(changes.argmax()) + 1]])
    # Three frames beside each other stand for the clip where it is compared with others.
    chosen = [images[0], images[len(images) // 2], images[-1]]
    strip = Image.fromarray(np.concatenate([np.asarray(image) for image in chosen], axis=1))
    gray = strip.convert("L").resize((similarity.SIDE, similarity.SIDE), Image.Resampling.BOX)
    stats.describe_pixels(strip, np.asarray(gray))


def short_clips(config: ImagesConfig) -> int:
    """The number of frames below which `data.short` decides about a clip; 0: images."""
    lengths = config.buckets.frames if config.buckets is not None else ()
    return min(lengths, default=config.frames or 0)
