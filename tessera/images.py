"""Image files: grids, PNG files with their settings, and animations.

Shapes: B images, T frames, H W height and width, C channels (1 or 3).
"""

import io
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from tessera.files import atomic_write

KEY = "tessera"  # the PNG text chunk that holds the settings


def filmstrips(clips: np.ndarray) -> np.ndarray:
    """Clips [..., T, H, W, C] as images [..., H, T W, C], their frames side by side."""
    *batch, frames, height, width, channels = clips.shape
    return np.moveaxis(clips, -4, -3).reshape(*batch, height, frames * width, channels)


def to_pil(image: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] -> a grayscale or RGB image; a clip [T, H, W, C] becomes a filmstrip."""
    image = filmstrips(image) if image.ndim == 4 else image
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def grid(images: np.ndarray, columns: int, gap: int = 1, zoom: int = 1) -> np.ndarray:
    """uint8 [B, H, W, C] -> one image of all, row by row, with white gaps. zoom repeats pixels.

    Of clips [B, T, H, W, C], each is a filmstrip.
    """
    images = filmstrips(images) if images.ndim == 5 else images
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    height, width = height * zoom, width * zoom
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
    return sheet


def with_captions(rows: Sequence[np.ndarray], captions: Sequence[str], height: int = 16) -> np.ndarray:
    """Images uint8 [H, W, C] of equal width, one below the other, with a line of text above each.

    Long texts are continued at the right of the images, up to three times as wide as these, and then cut.
    """
    (width, channels), font = rows[0].shape[1:], ImageFont.load_default(height - 4)
    widest = 4 + max(map(font.getlength, captions))
    canvas = max(width, min(math.ceil(widest), 3 * width))
    parts = []
    for row, caption in zip(rows, captions, strict=True):
        text = caption
        while font.getlength(text) > canvas - 4:
            text = text.removesuffix("…")[:-1] + "…"
        strip = Image.new("L", (canvas, height), 255)
        ImageDraw.Draw(strip).text((2, 0), text, 0, font)
        space = np.full((len(row), canvas - width, channels), 255, np.uint8)
        parts += [np.repeat(np.asarray(strip)[..., None], channels, axis=2), np.concatenate((row, space), axis=1)]
    return np.concatenate(parts)


def png_text(settings: dict[str, Any] | None) -> PngImagePlugin.PngInfo:
    """The text chunk that stores settings."""
    text = PngImagePlugin.PngInfo()
    if settings is not None:
        text.add_text(KEY, json.dumps(settings))
    return text


def to_png(image: np.ndarray, settings: dict[str, Any] | None = None) -> bytes:
    """uint8 [H, W, C] as a PNG. The settings that reproduce the image are stored in a text chunk."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="png", pnginfo=png_text(settings))
    return buffer.getvalue()


def save_png(path: str | Path, image: np.ndarray, settings: dict[str, Any] | None = None) -> None:
    """Write uint8 [H, W, C] as `to_png` does. Raises TesseraError."""
    atomic_write(Path(path), to_png(image, settings))


def limit_width(path: Path, width: int) -> bytes:
    """An image file as a PNG of at most this width. Raises OSError or ValueError if it cannot be read."""
    with _decoding_errors(), Image.open(path) as file:
        image = file.convert("L" if file.mode == "L" else "RGB")
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings stored in an image, or None if it holds none. Raises OSError or ValueError if it cannot be read."""
    with _decoding_errors(), Image.open(path) as image:
        text = getattr(image, "text", {}).get(KEY)
        return None if text is None else json.loads(text)


@contextmanager
def _decoding_errors() -> Iterator[None]:
    """Any error of a decoder, except OSError, as ValueError: on damaged bytes they raise anything."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from None


def load_png(path: Path, settings: dict[str, Any]) -> np.ndarray | None:
    """uint8 [H, W, C] of an image that holds exactly these settings. None: absent, damaged, or other settings."""
    try:
        if not path.exists() or read_settings(path) != json.loads(json.dumps(settings)):
            return None
        with _decoding_errors(), Image.open(path) as image:
            pixels = np.asarray(image)
    except (OSError, ValueError):
        return None
    return pixels[..., None] if pixels.ndim == 2 else pixels


def save_gif(path: Path, frames: list[np.ndarray], milliseconds: int = 60, hold: int = 1500) -> None:
    """Write uint8 [H, W, C] frames as a looping animation. The last frame is shown for `hold` milliseconds."""
    images = [to_pil(frame) for frame in frames]
    buffer = io.BytesIO()
    durations = [milliseconds] * (len(images) - 1) + [hold]
    images[0].save(buffer, format="gif", save_all=True, append_images=images[1:], duration=durations, loop=0)
    atomic_write(path, buffer.getvalue())
