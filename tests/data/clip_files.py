"""Clips as files of every kind. Frame k of a clip is gray of the level 20 + 20 k, unless levels are given."""

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CODECS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".webm": "libvpx-vp9", ".avi": "mpeg4"}
IDENTITY = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
CLOCKWISE = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)  # (x, y) is shown at (-y, x)


def levels(count: int) -> list[int]:
    return [20 + 20 * number for number in range(count)]


def grey(values: Sequence[int], size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """uint8 [T, H, W, 3]"""
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), *size, 3))


def moving(seed: int, frames: int = 8, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """A textured background, over which a square moves: uint8 [T, H, W, 3]"""
    random = np.random.default_rng(seed)
    still = random.integers(0, 200, (size[0] // 4, size[1] // 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    result = np.repeat(still[None], frames, axis=0)
    for number in range(frames):
        result[number, 8:20, 2 * number : 2 * number + 12] = 240
    return result


def video(
    path: Path, frames: np.ndarray, fps: float = 10, times: Sequence[float] | None = None, rotated: bool = False
) -> Path:
    """times: when each frame is shown, in seconds, for a variable frame rate. rotated: shown turned clockwise."""
    av: Any = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix], rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.options = {"crf": "1"} if path.suffix != ".avi" else {"qscale": "1"}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times is not None:
                frame.time_base, frame.pts = Fraction(1, 1000), round(times[number] * 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if rotated:
        content = path.read_bytes()
        track = content.index(b"tkhd")  # the matrix of the track, after that of the movie
        place = content.index(IDENTITY, track)
        path.write_bytes(content[:place] + CLOCKWISE + content[place + len(IDENTITY) :])
    return path


def animation(path: Path, frames: np.ndarray, milliseconds: int | list[int] = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    content = io.BytesIO()
    kind = path.suffix[1:]
    images[0].save(
        content, format=kind, save_all=True, append_images=images[1:], duration=milliseconds, loop=0, **options
    )
    path.write_bytes(content.getvalue())
    return path


def folder(path: Path, frames: np.ndarray) -> Path:
    path.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(np.ascontiguousarray(frame)).save(path / f"frame-{number}.png")
    return path


def clip(path: Path, count: int = 8, **options: Any) -> Path:
    """A clip of any kind, by the suffix of the path; without one, a folder of frames."""
    frames = grey(options.pop("values", levels(count)))
    if path.suffix in CODECS:
        return video(path, frames, **options)
    return animation(path, frames, **options) if path.suffix else folder(path, frames)


def shown(pixels: np.ndarray) -> list[int]:
    """The level of each frame of uint8 [C, T, H, W], to the nearest multiple of 10."""
    return [round(float(frame.mean()) / 10) * 10 for frame in np.moveaxis(pixels, 1, 0)]
