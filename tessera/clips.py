"""Clip files: writing of videos, animations and folders of frames, with the settings that made them.

Shapes: T frames, H W height and width, C channels (1 or 3).
"""

import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import PngImagePlugin

from tessera.errors import TesseraError
from tessera.files import atomic_write
from tessera.images import KEY, to_pil

DEFAULT_FPS = 8.0  # frames per second, where neither the data nor the user specify any
ANIMATIONS = (".webp", ".gif", ".png")  # which Pillow writes
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description>{}</dc:description>'
    "</rdf:Description></rdf:RDF></x:xmpmeta>"
)


def frame_rate(config: Any) -> float:
    """The frames per second of the clips of a data configuration."""
    return getattr(config, "fps", None) or DEFAULT_FPS


def save(path: Path, clip: np.ndarray, fps: float = DEFAULT_FPS, settings: dict[str, Any] | None = None) -> None:
    """Write a clip uint8 [T, H, W, C] as a looping animation: WebP and PNG without loss, or GIF with 256 colours.

    fps: frames per second; each frame is shown for a whole number of milliseconds, in a GIF of hundredths of a second.
    settings: stored in the text chunk of a PNG, the comment of a GIF, or the XMP of a WebP. Raises TesseraError.
    """
    suffix = path.suffix.lower()
    if suffix not in ANIMATIONS:
        raise TesseraError(f"cannot write {path}: expected a name that ends in {', '.join(ANIMATIONS)}")
    content = json.dumps(settings)
    options: dict[str, Any] = {"format": suffix[1:], "loop": 0, "duration": _durations(len(clip), fps, suffix)}
    if suffix == ".webp":
        options |= {"lossless": True} | ({} if settings is None else {"xmp": XMP.format(html.escape(content)).encode()})
    elif settings is not None and suffix == ".gif":
        options["comment"] = content.encode()
    elif settings is not None:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text(KEY, content)
    frames, buffer = [to_pil(frame) for frame in clip], io.BytesIO()
    frames[0].save(buffer, save_all=True, append_images=frames[1:], **options)
    atomic_write(path, buffer.getvalue())


def _durations(count: int, fps: float, suffix: str) -> list[int]:
    """Milliseconds for each frame, whose sum is that of the clip up to one unit."""
    unit = 10 if suffix == ".gif" else 1
    times = np.round(np.arange(count + 1) * 1000 / fps / unit).astype(int) * unit
    return np.maximum(np.diff(times), unit).tolist()
