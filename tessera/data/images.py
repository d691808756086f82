"""One image file to one array: decoding, transparency, orientation, the centre crop.

Shapes: C channels, H W height and width.
"""

import io
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from tessera.data.buckets import BucketsConfig
from tessera.settings import Settings, Size

ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # the tag of EXIF, and its values that swap height and width
PNG_MARKS = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # of what can tell an orientation in a PNG
# What `read` does to an image beside its settings, as caches of latents name it: change it with centre_crop or flatten.
RESIZING = "halved by boxes, bicubic, centre crop"

Level = Annotated[int, Field(ge=0, le=255)]


class InvalidSample(Exception):
    """This image cannot be trained on; the text says why."""


class ImagesConfig(Settings):
    """What becomes of every image, wherever it comes from."""

    size: Size = Field(default=(256, 256), description="height and width after the crop, in pixels")
    channels: Literal[1, 3] = Field(default=3, description="3 for colour, 1 for grey")
    hflip: bool = Field(default=True, description="mirror at random; turn off where left and right mean something")
    background: tuple[Level, Level, Level] = Field(
        default=(255, 255, 255), description="what shows through transparent images"
    )
    upscale: bool = Field(
        default=False, description="scale up images smaller than the size; otherwise they are skipped"
    )
    decoding: Literal["exact", "fast"] = Field(
        default="exact",
        description="exact: all of an image, as published statistics were made; fast: of a JPEG at least twice as "
        "large as needed only a half, quarter or eighth",
    )
    buckets: BucketsConfig | None = Field(
        default=None, description="crop to sizes of many aspects, a batch of one size each; null: all to `size`"
    )
    cache: str | None = Field(
        default=None, description="folder of cached latents (tessera data cache); null: encode while training"
    )


class Dataset(Protocol):
    """A data set as numbered samples."""

    class_names: tuple[str, ...]  # empty: no labels

    def __len__(self) -> int: ...

    def label(self, index: int) -> int:
        """The class of a sample; 0 where there are no classes."""
        ...

    def name(self, index: int) -> str:
        """What a report calls a sample: its path, or file and row."""
        ...

    def pixels(self, index: int) -> np.ndarray:
        """uint8 [C, H, W]. Raises Unusable."""
        ...


def read(file: Path | bytes, config: ImagesConfig, size: tuple[int, int] | None = None) -> np.ndarray:
    """An image file, by path or content, as uint8 [C, H, W] of a size, or of the configured one. Raises Unusable."""
    size = size or config.size
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if config.decoding == "fast" and image.format == "JPEG":
                image.draft(None, _reduced(image.size, size))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            image = flatten(image, config)
    except UnidentifiedImageError:
        raise InvalidSample("not an image") from None
    except Exception as error:  # decoders raise anything on damaged bytes, struct.error among them
        raise InvalidSample(f"damaged: {error}") from None
    height, width = size
    if not config.upscale and (image.height < height or image.width < width):
        raise InvalidSample(
            f"smaller than the size: {image.height} x {image.width}, but the size is {height} x {width} "
            "(data.upscale=true scales up)"
        )
    pixels = np.asarray(centre_crop(image, size))
    return np.ascontiguousarray(pixels[None] if config.channels == 1 else pixels.transpose(2, 0, 1))


def _reduced(shape: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """What a JPEG of a shape (width, height) is reduced to by halves, still covering the size, however it is turned."""
    halves = min(shape) // max(size)
    factor = next((factor for factor in (8, 4, 2) if factor <= halves), 1)
    return shape[0] // factor, shape[1] // factor


def shape(file: Path | bytes) -> tuple[int, int]:
    """Height and width of an image as it is shown, after the EXIF rotation, from its header. Raises Unusable."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.format == "TIFF":  # which some versions of Pillow turn as they open it
                image = ImageOps.exif_transpose(image)
                return image.height, image.width
            orientation = image.getexif().get(ORIENTATION, 1) if _may_turn(file, image) else 1
            return (image.width, image.height) if orientation in SIDEWAYS else (image.height, image.width)
    except UnidentifiedImageError:
        raise InvalidSample("not an image") from None
    except Exception as error:  # decoders raise anything on damaged bytes
        raise InvalidSample(f"damaged: {error}") from None


def _may_turn(file: Path | bytes, image: Image.Image) -> bool:
    """Whether an image can have an orientation. Of PNG, where it may stand behind the pixels, Pillow would decode all
    to know."""
    if image.format != "PNG" or "exif" in image.info:
        return True
    content = file if isinstance(file, bytes) else file.read_bytes()
    return any(mark in content for mark in PNG_MARKS)


def flatten(image: Image.Image, config: ImagesConfig) -> Image.Image:
    """Any mode of image as grey or RGB, transparency laid onto the background."""
    mode = "L" if config.channels == 1 else "RGB"
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits of grey
        values = np.asarray(image, dtype=np.float64)
        sixteen = image.mode.startswith("I;16") or values.max(initial=0) > 255
        values = values * (255 / 65535 if sixteen else 1)
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*config.background, 255)), image)
    return image if image.mode == mode else image.convert(mode)


def centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The ADM crop (Dhariwal & Nichol 2021): halve by boxes while twice too large, then bicubic, then the centre.

    For a size that is not square the image is scaled until it covers the size.
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
