"""Decoding of clips: frames by presentation time, from videos, animations and folders of frames.

Videos are read with PyAV, animations (GIF, WebP, PNG, AVIF) and still images with Pillow. A still image is a clip of
one frame. Shapes: N frames of a file, T of a clip, C channels, H W height and width.
"""

import io
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from tessera.data.folders import image_suffixes
from tessera.data.images import (
    MAX_FPS,
    ImagesConfig,
    InvalidSample,
    center_crop,
    check_covers,
    decoding_errors,
    flatten,
    sample_size,
    upright,
    with_image,
)

ANIMATED_FORMATS = ("GIF", "WEBP", "PNG", "AVIF")  # of Pillow, whose frames follow each other in time
DEFAULT_DURATION = 0.1  # seconds of a frame of an animation that states none, as browsers show it
TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}
READING = "nearest timestamp, long frames stay"  # part of a latent cache's key: change it with `frame_numbers`
EPSILON = 1e-6  # seconds, for the rounding of times
ALPHA = re.compile(r"yuva|rgba|argb|bgra|abgr|gbrap|ya\d")  # pixel formats of videos with transparency
NO_VIDEO = "has no video stream"


@dataclass(frozen=True)
class Span:
    """The part of a file that a sample is taken from.

    start, end: in seconds. first: the number of the clip's first frame in this part, counted at the frame rate of the
    data. fps: of a folder of frames, which has no times; None: not stated.
    """

    start: float = 0.0
    end: float = math.inf
    first: int = 0
    fps: float | None = None

    def check(self) -> None:
        """Raise InvalidSample for times that no file has."""
        if self.fps is not None and not 0 < self.fps <= MAX_FPS:
            raise InvalidSample(f"its row states {self.fps:g} fps: expected more than 0 and at most {MAX_FPS}")
        if not 0 <= self.start < self.end:
            raise InvalidSample(f"its row states the times {self.start:g} to {self.end:g} s: expected 0 <= start < end")


class Frames(ABC):
    """An opened file.

    times: when each frame is shown, and when the last one ends, in seconds, float64 [N + 1]. is_timed: whether they are
    known. format: of Pillow or of the container. rotation: degrees counterclockwise by which frames are turned to be
    displayed, once one was read. rate: as a container states it, None if it does not.
    """

    times: np.ndarray
    is_timed: bool = True
    format: str = "frames"
    rotation: int = 0
    rate: float | None = None

    @abstractmethod
    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        """The frames with these ascending numbers, as displayed. Raises what the decoder raises."""


@contextmanager
def open_frames(source: Path | bytes, fps: float | None = None) -> Iterator[Frames]:
    """The frames of a file, of its content, or of a folder of images. fps: of a folder. Raises InvalidSample."""
    with decoding_errors("not an image, an animation or a video"):
        if isinstance(source, Path) and source.is_dir():
            yield _Folder(source, fps)
            return
        try:
            frames = with_image(source, _Animation)
        except UnidentifiedImageError:
            frames = None
        if frames is not None:
            yield frames
            return
        with _open_video(source) as video:
            yield video


class _Folder(Frames):
    """A folder of images, in the order of the numbers in their names."""

    def __init__(self, folder: Path, fps: float | None) -> None:
        files = (path for path in folder.iterdir() if path.suffix.lower() in image_suffixes() and path.name[0] != ".")
        self.paths = sorted(files, key=lambda path: natural_key(path.name))
        if not self.paths:
            raise InvalidSample("a folder without images")
        self.is_timed = fps is not None
        self.times = np.arange(len(self.paths) + 1) / (fps or 1.0)

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        return [with_image(self.paths[index], upright) for index in indices]


def natural_key(name: str) -> tuple[Any, ...]:
    """A key that sorts frame-2 before frame-10."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name))


class _Animation(Frames):
    """An animation, or a still image as one frame. All frames are decoded: each may depend on the ones before."""

    def __init__(self, image: Image.Image) -> None:
        count = getattr(image, "n_frames", 1) if image.format in ANIMATED_FORMATS else 1
        # A PNG may have a separate image for programs that show no animations.
        numbers = range(1 if count > 1 and image.info.get("default_image") else 0, count)
        self.images, durations, self.format = [], [], image.format or ""
        for number in numbers:
            if count > 1:
                image.seek(number)
            self.images.append(upright(image).copy())
            durations.append((image.info.get("duration") or 0) / 1000 or DEFAULT_DURATION)
        self.times = np.cumsum([0.0, *durations])

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        return [self.images[index] for index in indices]


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise InvalidSample("a video, which needs PyAV: pip install 'tessera[video]'") from None
    return av


@contextmanager
def _open_video(source: Path | bytes) -> Iterator["_Video"]:
    av = _av()
    try:
        container = av.open(str(source) if isinstance(source, Path) else io.BytesIO(source))
    except FileNotFoundError:
        raise InvalidSample(f"{source} does not exist") from None
    except av.error.InvalidDataError:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        reason = "not an image, an animation or a video, or its end is missing" if size else "empty"
        raise InvalidSample(f"damaged: {reason}") from None
    with container:
        yield _Video(container)


class _Video(Frames):
    """The first video stream of a container."""

    def __init__(self, container: Any) -> None:
        attached = _av().stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & attached]
        if not streams:
            raise InvalidSample(NO_VIDEO)
        self.container, self.stream, self.format = container, streams[0], container.format.name.partition(",")[0]
        self.stream.codec_context.thread_count = 1  # the loader reads several files at once
        base = self.stream.time_base or Fraction(1, 1000)
        packets = [packet for packet in container.demux(self.stream) if packet.size and not packet.is_discard]
        if not packets:
            raise InvalidSample("its video stream has no frames")
        rate = self.stream.average_rate or self.stream.guessed_rate
        self.rate = None if rate is None else float(rate)
        self.pts: np.ndarray | None = None
        if all(packet.pts is not None for packet in packets):
            pts, order = np.unique([packet.pts for packet in packets], return_index=True)
            last = packets[order[-1]].duration or (int(np.median(np.diff(pts))) if len(pts) > 1 else 0)
            self.pts, ends = pts, [*pts.tolist(), int(pts[-1]) + max(last, 1)]
            self.times = np.array([float(time * base) for time in ends]) - float(pts[0] * base)
        else:
            if not self.rate:
                raise InvalidSample("its frames have no times, and it states no frame rate")
            self.times = np.arange(len(packets) + 1) / self.rate

    def _decode(self, indices: Sequence[int]) -> list[Any]:
        """Decoded frames with these ascending numbers."""
        if self.pts is None:
            self.container.seek(0, stream=self.stream)
            numbered = enumerate(self.container.decode(self.stream))
            frames = {number: frame for number, frame in numbered if number in set(indices)}
            keys = list(indices)
        else:
            keys = self.pts[list(indices)].tolist()
            frames = self._between(keys, keys[0])
            if len(frames) < len(set(keys)):  # a container whose index is wrong
                frames = self._between(keys, int(self.pts[0]))
        if missing := [index for index, key in zip(indices, keys) if key not in frames]:
            raise InvalidSample(
                f"damaged: the frame at {self.times[missing[0]]:.3g} s cannot be decoded, and {len(missing) - 1} others"
            )
        return [frames[key] for key in keys]

    def _between(self, keys: Sequence[int], start: int) -> dict[int, Any]:
        """Decoded frames by presentation time, from the key frame before `start` on."""
        needed, frames = set(keys), {}
        self.container.seek(start, stream=self.stream, backward=True)
        for frame in self.container.decode(self.stream):
            if frame.pts in needed:
                frames[frame.pts] = frame
            if len(frames) == len(needed) or (frame.pts is not None and frame.pts > keys[-1]):
                break
        return frames

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        frames = self._decode(indices)
        self.rotation = round(frames[0].rotation) % 360
        return [self._image(frame) for frame in frames]

    def _image(self, frame: Any) -> Image.Image:
        has_alpha = ALPHA.match(frame.format.name)
        image = Image.fromarray(frame.to_ndarray(format="rgba")) if has_alpha else frame.to_image()
        if (aspect := self.stream.sample_aspect_ratio) and aspect != 1:  # pixels that are not square
            image = image.resize((max(round(image.width * float(aspect)), 1), image.height), Image.Resampling.BICUBIC)
        method = TURNS.get(round(frame.rotation / 90) % 4)
        return image if method is None else image.transpose(method)


def frame_numbers(frames: Frames, fps: float | None, span: Span, limit: int | None = None) -> np.ndarray:
    """The numbers of the frames of a span at a frame rate, int64 [n]: the nearest of those whose times lie in the span.

    A frame that is shown for longer than 1 / fps stays until the next one begins, as encoders merge equal frames. fps:
    None, or a folder without times: every frame. limit: the largest n that is needed.
    """
    starts, end = frames.times[:-1], min(float(frames.times[-1]), span.end)
    inside = np.flatnonzero((starts >= span.start - EPSILON) & (starts < end - EPSILON))
    if fps is None or not frames.is_timed:
        return inside[:limit]
    begin = max(span.start, float(starts[0]))
    if end <= begin:
        return inside[:0]
    if not len(inside):  # a span between two frames: the one that is shown
        inside = np.array([np.searchsorted(starts, begin + EPSILON) - 1])
    count = max(math.floor((end - begin) * fps + EPSILON * fps), 1)
    targets = begin + np.arange(count if limit is None else min(count, limit)) / fps
    candidates = starts[inside]
    right = np.searchsorted(candidates, targets).clip(1, max(len(candidates) - 1, 1))
    if len(candidates) == 1:
        return np.repeat(inside, len(targets))
    until = candidates[right] - targets
    earlier = (targets - candidates[right - 1] <= until + EPSILON) | (until > 0.5 / fps + EPSILON)
    return inside[np.where(earlier, right - 1, right)]


def count_frames(source: Path | bytes, config: ImagesConfig, span: Span) -> int:
    """How many frames a span has at the frame rate of the data. Raises InvalidSample."""
    span.check()
    with open_frames(source, span.fps) as frames:
        return len(frame_numbers(frames, config.fps, span))


def clip_shape(source: Path | bytes) -> tuple[int, int]:
    """Height and width of the first frame as displayed. Raises InvalidSample."""
    with open_frames(source) as frames:
        image = frames.read([0])[0]
    return image.height, image.width


def load_clip(
    source: Path | bytes, config: ImagesConfig, span: Span, size: tuple[int, ...] | None = None
) -> tuple[np.ndarray, int]:
    """Decode a clip to uint8 [C, T, H, W] of `size` (default: that of the data), and how many frames are its own, not
    added by `data.short`.

    Raises InvalidSample.
    """
    count, height, width = size or sample_size(config)
    span.check()
    with open_frames(source, span.fps) as frames:
        numbers = frame_numbers(frames, config.fps, span, span.first + count)[span.first :]
        available = len(numbers)
        if not available:
            seconds = float(frames.times[-1])
            raise InvalidSample(f"no frame from {span.start:g} s on: it has {seconds:.3g} s")
        if available < count:
            numbers = _lengthen(numbers, count, config)
        unique, inverse = np.unique(numbers, return_inverse=True)
        images = [flatten(image, config) for image in frames.read(unique.tolist())]
        if len({image.size for image in images}) > 1:
            raise InvalidSample("its frames have different sizes")
        check_covers(images[0], (height, width), config)
        pixels = np.stack([np.asarray(center_crop(image, (height, width))) for image in images])[inverse]
    pixels = pixels[None] if config.channels == 1 else np.moveaxis(pixels, -1, 0)
    return np.ascontiguousarray(pixels), min(available, count)


def _lengthen(numbers: np.ndarray, count: int, config: ImagesConfig) -> np.ndarray:
    """The frames of a clip that is too short, as `data.short` specifies. Raises InvalidSample for `drop`."""
    if config.short == "drop":
        rate = "" if config.fps is None else f" at {config.fps:g} fps"
        raise InvalidSample(
            f"too short: {len(numbers)} of {count} frames{rate} (data.short=pad or loop uses short clips)"
        )
    if config.short == "loop":
        return np.resize(numbers, count)
    return np.concatenate((numbers, np.repeat(numbers[-1:], count - len(numbers))))


def read_clip(source: Path | bytes, fps: float | None = None, channels: int = 3) -> np.ndarray:
    """A whole clip as displayed, uint8 [T, H, W, C], at a frame rate (None: every frame). Raises InvalidSample."""
    config = ImagesConfig(channels=1 if channels == 1 else 3)
    with open_frames(source) as frames:
        unique, inverse = np.unique(frame_numbers(frames, fps, Span()), return_inverse=True)
        images = [np.asarray(flatten(image, config)) for image in frames.read(unique.tolist())]
    if len({image.shape for image in images}) > 1:
        raise InvalidSample("its frames have different sizes")
    pixels = np.stack(images)[inverse]
    return pixels if pixels.ndim == 4 else pixels[..., None]
