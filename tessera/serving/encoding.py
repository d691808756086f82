"""Images and clips as files for clients.

Shapes: T frames, H W height and width, C channels.
"""

import io
from typing import Any

import numpy as np
from PIL import Image

from tessera import images
from tessera.serving.parameters import OutputFormat

MEDIA_TYPES: dict[OutputFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
CLIP_MILLISECONDS = 125  # of a frame


def encode(
    image: np.ndarray, output_format: OutputFormat, quality: int | None = None, settings: dict[str, Any] | None = None
) -> bytes:
    """uint8 [H, W, C] as a file; a clip [T, H, W, C] as an animated PNG or WebP, as a JPEG its frames side by side.

    settings: stored in a PNG. quality: of jpeg and webp; None: 90 for jpeg, without loss for webp
    """
    if output_format == "png" and image.ndim == 3:
        return images.to_png(image, settings)
    buffer, options = io.BytesIO(), {}
    if output_format == "png":
        options = {"pnginfo": images.png_text(settings)}
    elif output_format == "jpeg":
        options = {"quality": 90 if quality is None else quality}
    else:
        options = {"lossless": True} if quality is None else {"quality": quality}
    if image.ndim == 4 and output_format != "jpeg":
        frames: list[Image.Image] = [images.to_pil(frame) for frame in image]
        frames[0].save(
            buffer,
            output_format,
            save_all=True,
            append_images=frames[1:],
            duration=CLIP_MILLISECONDS,
            loop=0,
            **options,
        )
    else:
        images.to_pil(image).save(buffer, output_format, **options)
    return buffer.getvalue()
