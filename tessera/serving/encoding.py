"""Images and clips as files for clients.

Shapes: T frames, H W height and width, C channels.
"""

import io
from typing import Any

import numpy as np

from tessera import clips, images
from tessera.serving.parameters import VIDEO_FORMATS, JobFormat

MEDIA_TYPES: dict[str, str] = {
    "png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "mp4": "video/mp4", "webm": "video/webm"
}  # fmt: skip


def encode(
    image: np.ndarray,
    output_format: JobFormat,
    quality: int | None = None,
    settings: dict[str, Any] | None = None,
    fps: float = clips.DEFAULT_FPS,
) -> bytes:
    """uint8 [H, W, C] as a file; a clip [T, H, W, C] as a video or an animation, as a JPEG its frames side by side.

    quality: of jpeg and webp; None: 90 for jpeg, without loss for webp. settings: stored in a PNG, and in files of
    clips but JPEGs. fps: of clips, frames per second
    """
    if image.ndim == 4 and output_format != "jpeg":
        return clips.encode_clip(image, f".{output_format}", fps, settings, quality)
    if output_format == "png":
        return images.to_png(image, settings)
    options: dict[str, Any] = {"lossless": True} if output_format == "webp" else {"quality": 90}
    buffer = io.BytesIO()
    images.to_pil(image).save(buffer, output_format, **(options if quality is None else {"quality": quality}))
    return buffer.getvalue()


def preview_format(output_format: JobFormat) -> JobFormat:
    """The format of previews: where the result is a video, an animation, which a page shows as an image."""
    return "webp" if output_format in VIDEO_FORMATS else output_format
