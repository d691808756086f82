"""Decoding of one image file to an array: value ranges, transparency, orientation, center crop.

Every image of a user is opened here, whatever reads it: training, check, evaluation, editing.

Shapes: C channels, H W height and width.
"""

import io
import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Self, TypeVar

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from pydantic import Field, PositiveInt, model_validator

from tessera.data.buckets import BucketsConfig
from tessera.settings import Settings, Size

if TYPE_CHECKING:
    from tessera.data.captions import EncodedCaptions

ORIENTATION_TAG, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap height and width
UPRIGHT = {  # what turns an image of an orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_EXIF = b"eXIf"
PNG_ORIENTATION_KEYS = (PNG_EXIF, b"Raw profile type", b"XML:com.adobe.xmp")  # what can hold an orientation in a PNG
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_ANIMATION = (b"acTL", b"fcTL", b"fdAT")
AVIF_EXIF = re.compile(rb"(infe\x02.{7})Exif", re.DOTALL)  # the entry of EXIF data in the list of a file's items
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
WHITE_IS_ZERO, SIGNED = 0, 2  # values of the last two
SIXTEEN_BIT_FORMATS = ("PNG", "TIFF", "JPEG2000", "IM")  # whose integers of 16 bits have no sign
METADATA_PROBLEM = "tessera: metadata problem"  # the key of `Image.info` with what could not be read
MAX_FPS = 1000  # frames per second; more are an error of units
MAX_SCALED = 16  # times the size: where scaling up an image would exceed it, the image is cropped first
# What `load_image` does beside its settings. It is part of a latent cache's key: change it with center_crop or flatten.
RESIZING = "halved by boxes, bicubic, centre crop"  # part of the key of caches: the spelling stays

T = TypeVar("T")

# The usual formats come first. After Image.init() alone, which lists suffixes, Pillow tries several formats without a
# signature before JPEG, which takes half as long again as reading an image of 16 x 16.
Image.preinit()
# Pillow warns about metadata and sizes of files, which `tessera data check` reports by name.
warnings.filterwarnings("ignore", module=r"PIL\.")

Level = Annotated[int, Field(ge=0, le=255)]


class InvalidSample(Exception):
    """The image cannot be used for training; the message is the reason."""


class ImagesConfig(Settings):
    """Preprocessing of every image, wherever it comes from."""

    size: Size = Field(default=(256, 256), description="height and width after the crop, in pixels")
    channels: Literal[1, 3] = Field(default=3, description="3 for color, 1 for gray")
    hflip: bool = Field(
        default=True,
        description="random horizontal flip; turn off where left and right differ; of clips off by default",
    )
    background: tuple[Level, Level, Level] = Field(
        default=(255, 255, 255), description="color behind transparent pixels"
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

    frames: PositiveInt | None = Field(
        default=None, description="frames of a clip, for data of videos and animations; null: images"
    )
    fps: float | None = Field(
        default=None,
        gt=0,
        le=MAX_FPS,
        description="frames per second that clips are resampled to, by the nearest timestamp; null: every frame",
    )
    short: Literal["drop", "pad", "loop"] = Field(
        default="drop",
        description="clips of fewer frames: drop: skipped and named; pad: the last frame is repeated, without loss "
        "there; loop: repeated from the start",
    )
    stride: PositiveInt | None = Field(
        default=None, description="frames from the start of a clip to that of the next in a file; null: one clip a file"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_flips_of_clips(cls, values: Any) -> Any:
        """Motion has a direction, so clips are flipped only where the recipe sets it."""
        if isinstance(values, dict) and values.get("frames") is not None and "hflip" not in values:
            return {**values, "hflip": False}
        return values

    @model_validator(mode="after")
    def _check_frames(self) -> Self:
        lengths = self.buckets.frames if self.buckets is not None else ()
        settings = {
            "fps": self.fps is not None,
            "short": self.short != "drop",
            "stride": self.stride is not None,
            "buckets.frames": bool(lengths),
        }
        if self.frames is None and (names := [name for name, is_set in settings.items() if is_set]):
            raise ValueError(f"{', '.join(names)} has no effect on images: set frames, or leave it out")
        if lengths and max(lengths) != self.frames:
            raise ValueError(f"the longest of buckets.frames is {max(lengths)}, but frames is {self.frames}")
        if self.stride is not None and len(lengths) > 1:
            raise ValueError(
                "stride and several buckets.frames exclude each other: the clips of a file have one length"
            )
        return self


class SizedData(Protocol):
    """The settings of a data set that every network depends on. frames: of clips; None: images"""

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def frames(self) -> int | None: ...


class Dataset(Protocol):
    """A data set as numbered samples."""

    class_names: tuple[str, ...]  # empty: no labels
    text: "EncodedCaptions | None"  # the captions as tokens, where a network reads them
    image_sizes: np.ndarray | None  # height, width and ratio of the samples, float32 [N, 3], where a network uses them

    def __len__(self) -> int: ...

    def label(self, index: int) -> int:
        """The class of a sample; 0 if there are no classes."""
        ...

    def name(self, index: int) -> str:
        """The name of a sample in reports: its path, or file and row."""
        ...

    def pixels(self, index: int) -> np.ndarray:
        """uint8 [C, H, W], of clips [C, T, H, W]. Raises InvalidSample."""
        ...


def sample_size(config: "SizedData") -> tuple[int, ...]:
    """The size of the samples of a data set in pixels: (H, W), or (T, H, W) of clips."""
    return config.size if config.frames is None else (config.frames, *config.size)


def with_image(file: Path | bytes, read: Callable[[Image.Image], T]) -> T:
    """`read` of an opened image file, by path or content.

    Metadata that cannot be read do not cost the pixels: the image is read without them, and `info[METADATA_PROBLEM]`
    is the reason. Raises what the decoder raises, which is any exception for damaged bytes.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            _scale_transparent_color(image)
            return read(image)
    except Exception as error:
        if isinstance(error, (InvalidSample, FileNotFoundError, PermissionError, Image.DecompressionBombError)):
            raise
        problem = error
    content = file if isinstance(file, bytes) else file.read_bytes()
    for remaining in _without_metadata(content):
        try:
            with Image.open(io.BytesIO(remaining)) as image:
                image.info[METADATA_PROBLEM] = _describe(problem)
                _scale_transparent_color(image)
                return read(image)
        except InvalidSample:
            raise
        except Exception:  # the pixels are damaged, or other metadata are
            continue
    if isinstance(problem, UnidentifiedImageError) and content.startswith((b"II*\0", b"MM\0*")):
        raise InvalidSample(
            "a TIFF that is damaged, or of a type that Pillow cannot read, such as numbers of 64 bits: "
            "convert it to 8 or 16 bits"
        )
    raise problem


def _without_metadata(content: bytes) -> Iterator[bytes]:
    """Versions of a file without the metadata that may prevent reading it, the first with those that may hold an
    orientation; none, if it has no metadata.
    """
    if content[4:8] == b"ftyp" and AVIF_EXIF.search(content):
        yield AVIF_EXIF.sub(rb"\1none", content)
    if not content.startswith(PNG_SIGNATURE):
        return
    chunks, start = [], len(PNG_SIGNATURE)
    while start < len(content) and not (chunks and chunks[-1][4:8] == b"IEND"):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        chunks.append(content[start:end])
        start = end
    if not (all(chunk[4:8].isalpha() for chunk in chunks) and any(chunk[4:8] == b"IDAT" for chunk in chunks)):
        return
    previous = len(chunks)
    for keys in ((*PNG_ANIMATION, *PNG_ORIENTATION_KEYS), (*PNG_ANIMATION, PNG_EXIF), ()):
        remaining = [chunk for chunk in chunks if _affects_pixels(chunk, keys)]
        if len(remaining) < previous:
            yield PNG_SIGNATURE + b"".join(remaining)
        previous = len(remaining)


def _affects_pixels(chunk: bytes, keys: tuple[bytes, ...]) -> bool:
    """Whether a PNG chunk is critical (its name starts in upper case), holds a transparent color, or is intact and
    starts with a key."""
    kind, intact = chunk[4:8], zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
    return kind[:1].isupper() or kind == b"tRNS" or (intact and (kind in keys or chunk[8:].startswith(keys)))


def _describe(error: Exception) -> str:
    return str(error) or type(error).__name__


@contextmanager
def decoding_errors(unidentified: str = "not an image") -> Iterator[None]:
    """Any error of a decoder as InvalidSample: on damaged bytes they raise anything, struct.error included."""
    try:
        yield
    except InvalidSample:
        raise
    except UnidentifiedImageError:
        raise InvalidSample(unidentified) from None
    except Image.DecompressionBombError as error:
        raise InvalidSample(f"too large: {error}") from None
    except Exception as error:
        raise InvalidSample(f"damaged: {_describe(error)}") from None


def read_image(file: Path | bytes, config: ImagesConfig, size: tuple[int, int] | None = None) -> Image.Image:
    """An image file as displayed: upright, 8 bits, L or RGB, on the background. Its size does not change.

    size: what it will be cropped to, for fast decoding. Raises InvalidSample.
    """

    def read(image: Image.Image) -> Image.Image:
        if size is not None and config.decoding == "fast" and image.format == "JPEG":
            image.draft(None, _draft_size(image.size, size))
        return flatten(upright(image), config)

    with decoding_errors():
        return with_image(file, read)


def load_image(file: Path | bytes, config: ImagesConfig, size: tuple[int, ...] | None = None) -> np.ndarray:
    """Decode an image file, by path or content, to uint8 [C, H, W] of `size` (default: config.size).

    Raises InvalidSample.
    """
    height, width = size or config.size
    size = height, width
    image = read_image(file, config, size)
    check_covers(image, size, config)
    with decoding_errors():  # an image without pixels, or without memory for them
        pixels = np.asarray(center_crop(image, size))
    return np.ascontiguousarray(pixels[None] if config.channels == 1 else pixels.transpose(2, 0, 1))


def check_covers(image: Image.Image, size: tuple[int, int], config: ImagesConfig) -> None:
    """Raise InvalidSample for an image that is smaller than a size, unless it may be scaled up."""
    height, width = size
    if not config.upscale and (image.height < height or image.width < width):
        raise InvalidSample(
            f"smaller than the size: {image.height} x {image.width}, but the size is {height} x {width} "
            "(data.upscale=true scales up)"
        )


def _draft_size(shape: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The size (width, height) at which to decode a JPEG: halved while it still covers the size in any orientation."""
    halves = min(shape) // max(size)
    factor = next((factor for factor in (8, 4, 2) if factor <= halves), 1)
    return shape[0] // factor, shape[1] // factor


def image_shape(file: Path | bytes) -> tuple[int, int]:
    """Height and width of an image as displayed, after the EXIF rotation, from its header. Raises InvalidSample."""

    def read(image: Image.Image) -> tuple[int, int]:
        if image.format == "TIFF":  # Pillow may rotate it when it opens or loads it
            orientation(image)
            image.load()
        turned = _may_have_orientation(file, image) and orientation(image) in SIDEWAYS
        return (image.width, image.height) if turned else (image.height, image.width)

    with decoding_errors():
        return with_image(file, read)


def is_gray(file: Path | bytes) -> bool:
    """Whether an image has no colors, by its type, from its header. Raises InvalidSample."""
    with decoding_errors():
        return with_image(file, lambda image: image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I"))


def _may_have_orientation(file: Path | bytes, image: Image.Image) -> bool:
    """Whether an image can have an orientation. In a PNG it may stand behind the pixels, and Pillow would decode the
    whole image to read it."""
    if image.format != "PNG" or "exif" in image.info:
        return True
    content = file if isinstance(file, bytes) else file.read_bytes()
    return any(key in content for key in PNG_ORIENTATION_KEYS)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8; 1 if it has none or one that cannot be read."""
    if image.format == "PNG" and "exif" not in image.info:  # it may stand behind the pixels, whose errors count
        image.load()
    try:
        value = image.getexif().get(ORIENTATION_TAG)
        if value is None and "exif" in image.info:
            Image.Exif().load(image.info["exif"])  # Pillow hides the error when it opens a JPEG
    except Exception as error:  # of parsers on metadata of any kind
        image.info.setdefault(METADATA_PROBLEM, f"EXIF: {_describe(error)}")
        return 1
    if value is None or value in range(1, 9):
        return int(value or 1)
    image.info.setdefault(METADATA_PROBLEM, f"the EXIF orientation {value!r}")
    return 1


def upright(image: Image.Image) -> Image.Image:
    """The pixels of an opened image, turned as EXIF specifies, with 8 bits per channel and its transparency.

    Raises InvalidSample for values without a defined range, and whatever the decoder raises.
    """
    if image.format == "TIFF":
        orientation(image)  # before loading, when Pillow turns it: what could not be read once does not fail again
    image.load()
    method = UPRIGHT.get(orientation(image))
    image = _eight_bits(image)
    return image if method is None else image.transpose(method)


def _scale_transparent_color(image: Image.Image) -> None:
    """The transparent color of an opened PNG in the units of its pixels: Pillow scales only the pixels to 8 bits."""
    color = image.info.get("transparency")
    if color is None or not isinstance(image, PngImagePlugin.PngImageFile):
        return
    raw_mode = image.tile[0].args
    if raw_mode == "RGB;16B":
        raise InvalidSample("16 bits of color with a transparent color, which Pillow reads with 8: save it as RGBA")
    if raw_mode in ("L;2", "L;4"):
        highest = 2 ** int(raw_mode[-1]) - 1
        image.info["transparency"] = (color & highest) * (255 // highest)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A loaded image with 8 bits per channel, in a mode that Pillow converts to RGB and RGBA.

    Integers of 16 bits are 0 to 65535 (of n bits, in a TIFF, 0 to 2^n - 1), floating-point numbers 0 to 1. Other types
    have no defined range. Raises InvalidSample for them, and for numbers outside 0 to 1.
    """
    tags = getattr(image, "tag_v2", {})
    if SIGNED in tags.get(SAMPLE_FORMAT, ()):
        raise InvalidSample("signed integers, which have no defined range: convert to 8 or 16 bits without a sign")
    if image.mode == "La":
        return image.convert("LA")
    if image.mode in ("LAB", "HSV"):  # which Pillow cannot convert to L
        return image.convert("RGB")
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F":
        highest = 1
        if values.size and not (values.min() >= 0 and values.max() <= 1):
            raise InvalidSample(
                f"floating-point values from {values.min():.4g} to {values.max():.4g}, expected 0 to 1: scale them, or "
                "convert to 8 or 16 bits"
            )
    elif image.mode.startswith("I;16") and image.format in SIXTEEN_BIT_FORMATS:
        highest = 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    elif image.format in ("PNG", "PPM"):  # Pillow scales those of a PPM to 16 bits
        highest = 65535
    else:
        raise InvalidSample(
            f"integers of Pillow's mode {image.mode} in {image.format}, which have no defined range: convert to 8 or "
            "16 bits"
        )
    levels = values * (255 / highest)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        levels = 255 - levels
    gray = Image.fromarray(levels.clip(0, 255).round().astype(np.uint8))
    if (color := image.info.get("transparency")) is not None:
        gray.putalpha(Image.fromarray(np.where(values == color, 0, 255).astype(np.uint8)))
    return gray


def has_transparency(image: Image.Image) -> bool:
    """Whether an image of 8 bits per channel may have transparent pixels."""
    palette = image.palette is not None and image.palette.mode == "RGBA"
    return image.mode in ("RGBA", "LA", "PA", "RGBa") or palette or "transparency" in image.info


def flatten(image: Image.Image, config: ImagesConfig) -> Image.Image:
    """Convert an image of 8 bits per channel to gray or RGB, composited onto the background color."""
    mode = "L" if config.channels == 1 else "RGB"
    if has_transparency(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*config.background, 255)), image)
    return image if image.mode == mode else image.convert(mode)


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The center crop of ADM (Dhariwal & Nichol 2021): box filter by halves while at least twice too large, then
    bicubic, then the center. For a size that is not square the image is scaled until it covers the size.
    """
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    scaled = (max(round(image.width * scale), width), max(round(image.height * scale), height))
    if scale >= 2 and math.prod(scaled) > MAX_SCALED * width * height:
        return _crop_before_scaling(image, scaled, size)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    if image.size == (width, height):
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _crop_before_scaling(image: Image.Image, scaled: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """The center crop of an image scaled up to `scaled` (width, height). What is cropped away is not scaled, except a
    margin. Rounding makes a difference of two levels at most from scaling everything.
    """
    spans, windows = [], []  # by axis
    for old, new, side in zip(image.size, scaled, reversed(size)):
        start, margin = (new - side) // 2, math.ceil(4 * new / old)  # bicubic interpolation reads two pixels around it
        first, last = max(start - margin, 0), min(start + side + margin, new)  # what is scaled
        left, right = math.floor(first * old / new), math.ceil(last * old / new)  # the pixels it is scaled from
        spans.append((left, right, first * old / new - left, last * old / new - left, last - first))
        windows.append((start - first, start - first + side))
    (left, right, x0, x1, width), (top, bottom, y0, y1, height) = spans
    part = image.crop((left, top, right, bottom)).resize((width, height), Image.Resampling.BICUBIC, (x0, y0, x1, y1))
    return part.crop((windows[0][0], windows[1][0], windows[0][1], windows[1][1]))
