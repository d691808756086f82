"""Decoding of one image file to an array: transparency, orientation, centre crop.

Shapes: C channels, H W height and width.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from tessera.data.buckets import BucketsConfig
from tessera.settings import Settings, Size

ORIENTATION_TAG, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap height and width
PNG_ORIENTATION_KEYS = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # what can hold an orientation in a PNG
# What `load_image` does beside its settings. It is part of a latent cache's key: change it with centre_crop or flatten.
RESIZING = "halved by boxes, bicubic, centre crop"

Level = Annotated[int, Field(ge=0, le=255)]


class InvalidSample(Exception):
    """The image cannot be used for training; the message is the reason."""


class ImagesConfig(Settings):
    """Preprocessing of every image, wherever it comes from."""

    size: Size = Field(default=(256, 256), description="height and width after the crop, in pixels")
    channels: Literal[1, 3] = Field(default=3, description="3 for colour, 1 for grey")
    hflip: bool = Field(default=True, description="random horizontal flip; turn off where left and right differ")
    background: tuple[Level, Level, Level] = Field(
        default=(255, 255, 255), description="colour behind transparent pixels"
    )
    upscale: bool = Field(
        default=False, description="scale up images smaller than the size; otherwise they are skipped"
    )
    decoding: Literal["exact", "fast"] = Field(
        default="exact",
        description="exact: decode the whole image, as published statistics do; fast: decode a JPEG at least "
        "twice as large as needed at a half, quarter or eighth of its size",
    )
    buckets: BucketsConfig | None = Field(
        default=None, description="crop to sizes of several aspects, one size per batch; null: crop all to `size`"
    )
    cache: str | None = Field(
        default=None, description="folder of cached latents (tessera data cache); null: encode during training"
    )


class Dataset(Protocol):
    """A data set as numbered samples."""

    class_names: tuple[str, ...]  # empty: no labels

    def __len__(self) -> int: ...

    def label(self, index: int) -> int:
        """The class of a sample; 0 if there are no classes."""
        ...

    def name(self, index: int) -> str:
        """The name of a sample in reports: its path, or file and row."""
        ...

    def pixels(self, index: int) -> np.ndarray:
        """uint8 [C, H, W]. Raises InvalidSample."""
        ...


def _open(file: Path | bytes) -> Image.Image:
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)


@contextmanager
def _decoding_errors() -> Iterator[None]:
    """Any error of a decoder as InvalidSample: on damaged bytes they raise anything, struct.error included."""
    try:
        yield
    except UnidentifiedImageError:
        raise InvalidSample("not an image") from None
    except Exception as error:
        raise InvalidSample(f"damaged: {error}") from None


def load_image(file: Path | bytes, config: ImagesConfig, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image file, by path or content, to uint8 [C, H, W] of `size` (default: config.size).

    Raises InvalidSample.
    """
    size = size or config.size
    with _decoding_errors(), _open(file) as image:
        if config.decoding == "fast" and image.format == "JPEG":
            image.draft(None, _draft_size(image.size, size))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        image = flatten(image, config)
    height, width = size
    if not config.upscale and (image.height < height or image.width < width):
        raise InvalidSample(
            f"smaller than the size: {image.height} x {image.width}, but the size is {height} x {width} "
            "(data.upscale=true scales up)"
        )
    pixels = np.asarray(centre_crop(image, size))
    return np.ascontiguousarray(pixels[None] if config.channels == 1 else pixels.transpose(2, 0, 1))


def _draft_size(shape: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The size (width, height) at which to decode a JPEG: halved while it still covers the size in any orientation."""
    halves = min(shape) // max(size)
    factor = next((factor for factor in (8, 4, 2) if factor <= halves), 1)
    return shape[0] // factor, shape[1] // factor


def image_shape(file: Path | bytes) -> tuple[int, int]:
    """Height and width of an image as displayed, after the EXIF rotation, from its header. Raises InvalidSample."""
    with _decoding_errors(), _open(file) as image:
        if image.format == "TIFF":  # some versions of Pillow rotate it when they open it
            image = ImageOps.exif_transpose(image)
            return image.height, image.width
        orientation = image.getexif().get(ORIENTATION_TAG, 1) if _may_have_orientation(file, image) else 1
        return (image.width, image.height) if orientation in SIDEWAYS else (image.height, image.width)


def _may_have_orientation(file: Path | bytes, image: Image.Image) -> bool:
    """Whether an image can have an orientation. In a PNG it may stand behind the pixels, and Pillow would decode the
    whole image to read it."""
    if image.format != "PNG" or "exif" in image.info:
        return True
    content = file if isinstance(file, bytes) else file.read_bytes()
    return any(key in content for key in PNG_ORIENTATION_KEYS)


def flatten(image: Image.Image, config: ImagesConfig) -> Image.Image:
    """Convert an image of any mode to grey or RGB, composited onto the background colour."""
    mode = "L" if config.channels == 1 else "RGB"
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bit grey
        values = np.asarray(image, dtype=np.float64)
        sixteen = image.mode.startswith("I;16") or values.max(initial=0) > 255
        values = values * (255 / 65535 if sixteen else 1)
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*config.background, 255)), image)
    return image if image.mode == mode else image.convert(mode)


def centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The centre crop of ADM (Dhariwal & Nichol 2021): box filter by halves while at least twice too large, then
    bicubic, then the centre. For a size that is not square the image is scaled until it covers the size.
    """
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    scaled = (max(round(image.width * scale), width), max(round(image.height * scale), height))
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
