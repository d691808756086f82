"""One image file to one array: decoding, transparency, orientation, the centre crop.

Shapes: C channels, H W height and width.
"""

import io
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from tessera.settings import Settings, Size

Level = Annotated[int, Field(ge=0, le=255)]


class Unusable(Exception):
    """This image cannot be trained on; the text says why."""


class ImagesConfig(Settings):
    """What becomes of every image, wherever it comes from."""

    size: Size = Field(default=(256, 256), description="height and width after the crop, in pixels")
    channels: Literal[1, 3] = Field(default=3, description="3 for colour, 1 for grey")
    flip: bool = Field(default=True, description="mirror at random; turn off where left and right mean something")
    background: tuple[Level, Level, Level] = Field(
        default=(255, 255, 255), description="what shows through transparent images"
    )
    enlarge: bool = Field(
        default=False, description="scale up images smaller than the size; otherwise they are skipped"
    )


class Source(Protocol):
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


def read(file: Path | bytes, config: ImagesConfig) -> np.ndarray:
    """An image file, by path or content, as uint8 [C, H, W] of the configured size. Raises Unusable."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            image.load()
            image = flatten(ImageOps.exif_transpose(image), config)
    except UnidentifiedImageError:
        raise Unusable("not an image") from None
    except Exception as error:  # decoders raise anything on damaged bytes, struct.error among them
        raise Unusable(f"damaged: {error}") from None
    height, width = config.size
    if not config.enlarge and (image.height < height or image.width < width):
        raise Unusable(
            f"smaller than the size: {image.height} x {image.width}, but data.size is {height} x {width} "
            "(data.enlarge=true scales up)"
        )
    pixels = np.asarray(centre_crop(image, config.size))
    return np.ascontiguousarray(pixels[None] if config.channels == 1 else pixels.transpose(2, 0, 1))


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
    return image.convert(mode)


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
