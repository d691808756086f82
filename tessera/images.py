"""Finished pictures: uint8 arrays to grids, PNG files that say how they were made, and animations.

Shapes: B pictures, H W height and width, C channels (1 or 3).
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from tessera.files import atomic_write

KEY = "tessera"  # the PNG text chunk that holds the settings


def to_image(picture: np.ndarray) -> Image.Image:
    """uint8 [H, W, C] -> a grey or RGB image."""
    return Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


def grid(pictures: np.ndarray, columns: int, gap: int = 1, zoom: int = 1) -> np.ndarray:
    """uint8 [B, H, W, C] -> one picture, row by row, white between; zoom repeats pixels."""
    count, height, width, channels = pictures.shape
    rows = -(-count // columns)
    height, width = height * zoom, width * zoom
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture.repeat(zoom, axis=0).repeat(zoom, axis=1)
    return sheet


def to_png(picture: np.ndarray, settings: dict[str, Any] | None = None) -> bytes:
    """uint8 [H, W, C] as a PNG; settings go into a text chunk, from which the picture can be made again."""
    text = PngImagePlugin.PngInfo()
    if settings is not None:
        text.add_text(KEY, json.dumps(settings))
    buffer = io.BytesIO()
    to_image(picture).save(buffer, format="png", pnginfo=text)
    return buffer.getvalue()


def save_png(path: Path, picture: np.ndarray, settings: dict[str, Any] | None = None) -> None:
    """Write uint8 [H, W, C]; settings go into a text chunk, from which the picture can be made again."""
    atomic_write(path, to_png(picture, settings))


def limit_width(path: Path, width: int) -> bytes:
    """A picture file as a PNG at most so many pixels wide. Raises OSError or ValueError if it cannot be read."""
    with Image.open(path) as image:
        shown = image.convert("L" if image.mode == "L" else "RGB")
    if shown.width > width:
        shown = shown.resize((width, max(1, round(shown.height * width / shown.width))), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, format="png")
    return buffer.getvalue()


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings a picture was drawn with, or None if it does not say."""
    with Image.open(path) as image:
        text = getattr(image, "text", {}).get(KEY)
    return None if text is None else json.loads(text)


def load_png(path: Path, settings: dict[str, Any]) -> np.ndarray | None:
    """uint8 [H, W, C] of a picture that was drawn with these settings, or None: absent, damaged, or drawn otherwise."""
    try:
        if not path.exists() or read_settings(path) != json.loads(json.dumps(settings)):
            return None
        with Image.open(path) as image:
            pixels = np.asarray(image)
    except (OSError, ValueError, SyntaxError):  # Pillow's word for a broken PNG
        return None
    return pixels[..., None] if pixels.ndim == 2 else pixels


def save_gif(path: Path, frames: list[np.ndarray], milliseconds: int = 60, hold: int = 1500) -> None:
    """Write uint8 [H, W, C] frames as a looping animation that holds its last frame."""
    images = [to_image(frame) for frame in frames]
    buffer = io.BytesIO()
    durations = [milliseconds] * (len(images) - 1) + [hold]
    images[0].save(buffer, format="gif", save_all=True, append_images=images[1:], duration=durations, loop=0)
    atomic_write(path, buffer.getvalue())
