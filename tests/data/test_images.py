"""Decoding of image files: every mode, transparency, orientation, damage, and the ADM crop."""

import contextlib
import io
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps, JpegImagePlugin

from tessera.data.images import (
    METADATA_PROBLEM,
    PNG_SIGNATURE,
    ImagesConfig,
    InvalidSample,
    _eight_bits,
    center_crop,
    flatten,
    image_shape,
    load_image,
    upright,
    with_image,
)

ORIENTATION = 0x0112


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def config(height: int, width: int | None = None, **changes) -> ImagesConfig:
    return ImagesConfig(size=(height, width or height), **changes)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(samples: np.ndarray, bits: int, color_type: int, *before: bytes, after: tuple[bytes, ...] = ()) -> bytes:
    """A PNG as its specification says, with chunks before and after the pixels. samples: integers [H, W, C]"""
    height, width = samples.shape[:2]
    if bits == 16:
        rows = samples.astype(">u2").reshape(height, -1).view("u1")
    else:
        digits = np.unpackbits(samples.astype("u1").reshape(height, -1, 1), axis=-1)[..., 8 - bits :]
        rows = np.packbits(digits.reshape(height, -1), axis=-1)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return PNG_SIGNATURE + b"".join((header, *before, data, *after, png_chunk(b"IEND", b"")))


def exif_chunk(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))


TURN = {  # of the stored pixels [H, W, C], so that they are upright
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),  # flipped at the other diagonal
    8: lambda a: np.rot90(a, 1),
}
BIG = b"workflow " * 200_000  # more than Pillow unpacks from one chunk
BAD_CHECKSUM = png_chunk(b"tEXt", b"prompt\0hello")[:-4] + bytes(4)
ODD_CHUNKS = {  # metadata that stop Pillow
    "compressed text": png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(BIG)),
    "international text": png_chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(BIG)),
    "profile": png_chunk(b"iCCP", b"printer\0\0" + zlib.compress(BIG)),
    "broken text": png_chunk(b"zTXt", b"prompt\0\0nothing compressed"),
    "wrong checksum": BAD_CHECKSUM,
    "unknown, with a wrong checksum": png_chunk(b"prVt", b"data")[:-4] + bytes(4),
    "a large XMP": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(BIG)),
}

# Valid files


@pytest.mark.parametrize(("kind", "options"), [("png", {}), ("webp", {"lossless": True}), ("bmp", {}), ("tiff", {})])
def test_a_lossless_file_of_the_right_size_is_read_exactly(kind, options):
    pixels = noise(8, 12)
    pixels_read = load_image(encoded(Image.fromarray(pixels), kind, **options), config(8, 12))
    assert pixels_read.dtype == np.uint8
    assert pixels_read.flags.c_contiguous
    np.testing.assert_array_equal(pixels_read, pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_a_lossy_file_is_read_almost_exactly(kind):
    ramp = np.broadcast_to(np.linspace(0, 255, 16).astype(np.uint8)[:, None, None], (16, 16, 3))
    pixels_read = load_image(encoded(Image.fromarray(ramp.copy()), kind, quality=95), config(16))
    assert np.abs(pixels_read.astype(int) - ramp.transpose(2, 0, 1)).max() < 12


def test_a_path_and_its_bytes_read_the_same(tmp_path):
    data = encoded(Image.fromarray(noise(20, 30)))
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png", config(8)), load_image(data, config(8)))


def test_transparency_shows_the_background():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    pixels[0, 1] = (10, 20, 30, 0)
    pixels[1, 0] = (0, 0, 0, 51)  # a fifth
    pixels_read = load_image(encoded(Image.fromarray(pixels)), config(2, background=(255, 100, 0)))
    assert pixels_read[:, 0, 0].tolist() == [10, 20, 30]
    assert pixels_read[:, 0, 1].tolist() == [255, 100, 0]
    assert np.abs(pixels_read[:, 1, 0].astype(int) - (204, 80, 0)).max() <= 1


def test_the_background_is_white_by_default():
    assert load_image(encoded(Image.new("RGBA", (4, 4))), config(4)).min() == 255


def test_a_palette_with_one_transparent_color():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putdata([0, 1])
    pixels_read = load_image(encoded(image, transparency=1), config(1, 2, background=(1, 2, 3)))
    assert pixels_read[:, 0, 0].tolist() == [200, 0, 0]
    assert pixels_read[:, 0, 1].tolist() == [1, 2, 3]


def test_grey_with_alpha():
    pixels = np.array([[[77, 255], [77, 0]]], np.uint8)
    pixels_read = load_image(encoded(Image.fromarray(pixels, "LA")), config(1, 2, background=(9, 9, 9)))
    assert pixels_read.tolist() == [[[77, 9]]] * 3


def test_grey_becomes_three_equal_channels():
    pixels = noise(4, 4, 1)[..., 0]
    pixels_read = load_image(encoded(Image.fromarray(pixels)), config(4))
    np.testing.assert_array_equal(pixels_read, np.stack([pixels] * 3))


def test_black_and_white_of_one_bit():
    bits = noise(4, 4, 1)[..., 0] > 127
    pixels_read = load_image(encoded(Image.fromarray(bits)), config(4, channels=1))
    np.testing.assert_array_equal(pixels_read[0], bits * np.uint8(255))


def test_grey_output_has_one_channel_and_the_luma_of_the_colors():
    pixels = noise(4, 4)
    pixels_read = load_image(encoded(Image.fromarray(pixels)), config(4, channels=1))
    assert pixels_read.shape == (1, 4, 4)
    luma = pixels @ np.array([0.299, 0.587, 0.114])  # ITU-R 601-2
    assert np.abs(pixels_read[0] - luma).max() <= 1


def test_grey_output_shows_the_background_too():
    pixels_read = load_image(encoded(Image.new("RGBA", (4, 4))), config(4, channels=1, background=(50, 50, 50)))
    assert pixels_read.tolist() == np.full((1, 4, 4), 50).tolist()


@pytest.mark.parametrize("brightest", [65535, 200])  # the dark one shows whether the range is guessed
def test_sixteen_bits_of_grey_keep_their_range(brightest):
    values = np.linspace(0, brightest, 16).astype(np.uint16).reshape(4, 4)
    pixels_read = load_image(encoded(Image.fromarray(values)), config(4, channels=1))
    assert np.abs(pixels_read[0] - values / 257).max() <= 0.5


@pytest.mark.parametrize("brightest", [1, 0.004])  # the dark one shows whether the range is guessed
def test_floating_point_values_are_from_0_to_1(brightest):
    values = np.linspace(0, brightest, 16, dtype=np.float32).reshape(4, 4)
    pixels_read = load_image(encoded(Image.fromarray(values), "tiff"), config(4, channels=1))
    assert np.abs(pixels_read[0] - values * 255).max() <= 0.5


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-0.1, 1), (0, 1.1), (0, np.nan), (0, np.inf)])
def test_floating_point_values_outside_0_to_1_are_refused_by_name(low, high):
    values = np.full((4, 4), low, np.float32)
    values[0, 0] = high
    with pytest.raises(InvalidSample, match=r"floating-point values from .* to .*, expected 0 to 1: scale them"):
        load_image(encoded(Image.fromarray(values), "tiff"), config(4))


def tiff(pixels: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1, extra: tuple = ()) -> bytes:
    """An uncompressed TIFF of one strip, as its specification says. pixels: [H, W] or [H, W, C] in little-endian"""
    height, width, channels = *pixels.shape[:2], pixels.shape[2] if pixels.ndim == 3 else 1
    data = pixels.tobytes()
    tags = [(256, width), (257, height), (258, (bits,) * channels), (259, 1), (262, photometric), (273, 8)]
    tags += [(277, channels), (278, height), (279, len(data)), (339, (sample_format,) * channels)]
    tags += [(338, extra)] if extra else []
    entries, more = b"", b""
    start = 8 + len(data)
    for tag, value in sorted(tags):
        numbers = value if isinstance(value, tuple) else (value,)
        content = struct.pack(f"<{len(numbers)}H", *numbers)
        if len(content) > 4:
            offset = start + 2 + 12 * len(tags) + 4 + len(more)
            more, content = more + content, struct.pack("<I", offset)
        entries += struct.pack("<HHI", tag, 3, len(numbers)) + content.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", start) + data + struct.pack("<H", len(tags)) + entries + bytes(4) + more


@pytest.mark.parametrize("photometric", [0, 1])
def test_white_is_zero_in_some_tiffs_of_any_depth(photometric):
    levels = np.arange(16).reshape(4, 4) / 15
    expected = (levels if photometric else 1 - levels) * 255
    for content in (
        tiff((levels * 255).astype("u1"), 8, photometric),
        tiff((levels * 65535).astype("<u2"), 16, photometric),
        tiff(levels.astype("<f4"), 32, photometric, sample_format=3),
    ):
        assert np.abs(load_image(content, config(4, channels=1))[0] - expected).max() <= 0.5


def test_twelve_bits_of_grey_keep_their_range():
    values = np.linspace(0, 4095, 16).astype(int).reshape(4, 4)
    pairs = values.reshape(-1, 2)
    packed = np.stack((pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255), axis=1)
    content = bytearray(tiff(packed.astype("u1").reshape(4, 6), 12))
    content = bytes(content).replace(struct.pack("<HHII", 256, 3, 1, 6), struct.pack("<HHII", 256, 3, 1, 4))
    assert np.abs(load_image(content, config(4, channels=1))[0] - values / 4095 * 255).max() <= 0.5


@pytest.mark.parametrize(
    ("kind", "bits", "sample_format"), [("i1", 8, 2), ("<i2", 16, 2), ("<i4", 32, 2), ("<u4", 32, 1)]
)
def test_integers_without_a_defined_range_are_refused_by_name(kind, bits, sample_format):
    content = tiff(np.arange(16).reshape(4, 4).astype(kind), bits, sample_format=sample_format)
    with pytest.raises(InvalidSample, match=r"no defined range: convert to 8 or 16 bits"):
        load_image(content, config(4))


def test_a_tiff_of_a_type_that_pillow_cannot_read_is_refused_by_name():
    for content in (
        tiff(np.arange(16).reshape(4, 4) / 15, 64, sample_format=3),
        tiff((np.arange(16).reshape(4, 4) / 15).astype("<f2"), 16, sample_format=3),
    ):
        with pytest.raises(InvalidSample, match="of a type that Pillow cannot read.*: convert it to 8 or 16 bits"):
            load_image(content, config(4))


def test_a_pgm_of_any_maximum_keeps_its_range():
    for highest in (15, 255, 1000, 65535):
        values = np.linspace(0, highest, 16).astype(int)
        content = f"P5 4 4 {highest}\n".encode() + values.astype("u1" if highest < 256 else ">u2").tobytes()
        expected = values.reshape(4, 4) / highest * 255
        assert np.abs(load_image(content, config(4, channels=1))[0] - expected).max() <= 1


def test_premultiplied_grey_with_alpha_in_a_tiff():
    pixels = np.array([[[50, 100], [0, 0], [80, 255], [255, 255]]], np.uint8)
    content = tiff(pixels, 8, extra=(1,))
    pixels_read = load_image(content, config(1, 4, background=(255, 255, 255), channels=1))
    expected = pixels[0, :, 0] + 255.0 - pixels[0, :, 1]  # the definition of compositing
    assert np.abs(pixels_read[0, 0] - expected).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_cielab_in_a_tiff(channels):
    lab = np.array([[[50, 20, 30], [80, -30, 40], [30, 10, -40], [95, 0, 0]]], np.float64)
    content = tiff(np.round(lab * (2.55, 1, 1)).astype(int).astype("u1"), 8, photometric=8)
    f = (lab[..., :1] + 16) / 116 + lab[..., 1:] * (1 / 500, -1 / 200)
    f = np.stack((f[..., 0], (lab[..., 0] + 16) / 116, f[..., 1]), axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.96422, 1, 0.82521)  # D50
    linear = xyz @ np.array(
        [[3.1338561, -0.9787684, 0.0719453], [-1.6168667, 1.9161415, -0.2289914], [-0.4906146, 0.0334540, 1.4052427]]
    )
    rgb = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clip(0) ** (1 / 2.4) - 0.055)
    expected = rgb if channels == 3 else rgb @ np.array([[0.299], [0.587], [0.114]])
    pixels_read = load_image(content, config(1, 4, channels=channels))
    assert np.abs(pixels_read.transpose(1, 2, 0) - expected).max() <= 3


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "La", "RGBX", "CMYK", "YCbCr", "HSV"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_of_pillow_is_converted(mode, channels):
    assert flatten(_eight_bits(Image.new(mode, (3, 2))), config(2, 3, channels=channels)).mode in ("L", "RGB")


def test_cmyk():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    for kind, options in (("jpeg", {"quality": 100}), ("tiff", {})):
        pixels_read = load_image(encoded(image, kind, **options), config(8))
        assert np.abs(pixels_read[:, 4, 4].astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(orientation):
    pixels = noise(6, 4)
    turned = TURN[orientation](pixels)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    pixels_read = load_image(encoded(Image.fromarray(pixels), exif=exif), config(*turned.shape[:2]))
    np.testing.assert_array_equal(pixels_read, turned.transpose(2, 0, 1))


CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by the color type of a PNG
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_png_is_read_as_its_specification_says(data):
    """Random type, depth, transparency, orientation, background and metadata, against arithmetic on the samples."""
    kind = data.draw(st.sampled_from(list(CHANNELS)))
    bits = data.draw(st.sampled_from(DEPTHS[kind]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    samples = rng.integers(0, 2**bits, (height, width, CHANNELS[kind]))
    colors, alpha = samples[..., :3] / (2**bits - 1) * 255, np.ones((height, width, 1))
    before = []
    if kind == 3:
        palette = rng.integers(0, 256, (2**bits, 3))
        before.append(png_chunk(b"PLTE", palette.astype("u1").tobytes()))
        colors = palette[samples[..., 0]]
    if kind in (4, 6):
        alpha = samples[..., -1:] / (2**bits - 1)
        colors = colors[..., :-1] if kind == 4 else colors
    elif data.draw(st.booleans()) and (kind, bits) != (2, 16):  # 16 bits of color are refused
        if kind == 3:
            entries = rng.integers(0, 256, int(rng.integers(1, 2**bits + 1)))
            before.append(png_chunk(b"tRNS", entries.astype("u1").tobytes()))
            alpha = np.append(entries, np.full(2**bits, 255))[samples] / 255
        else:
            transparent = samples[rng.integers(height), rng.integers(width)]
            before.append(png_chunk(b"tRNS", transparent.astype(">u2").tobytes()))
            alpha = (samples != transparent).any(axis=-1, keepdims=True)
    turn = data.draw(st.sampled_from(list(TURN)))
    after = []
    (before if data.draw(st.booleans()) else after).append(exif_chunk(turn))
    for name in data.draw(st.lists(st.sampled_from(list(ODD_CHUNKS)), max_size=2, unique=True)):
        (before if data.draw(st.booleans()) or name == "profile" else after).insert(0, ODD_CHUNKS[name])
    background = tuple(rng.integers(0, 256, 3).tolist())
    channels = data.draw(st.sampled_from((1, 3)))

    expected = TURN[turn](np.broadcast_to(colors, (height, width, 3)) * alpha + background * (1 - alpha))
    if channels == 1:
        expected = expected @ np.array([[0.299], [0.587], [0.114]])
    content = png(samples, bits, kind, *before, after=tuple(after))
    wanted = config(*expected.shape[:2], background=background, channels=channels)
    assert image_shape(content) == expected.shape[:2]
    assert np.abs(load_image(content, wanted) - expected.transpose(2, 0, 1)).max() <= 2


def step_by_step(content: bytes, background: tuple[int, int, int], mode: str) -> np.ndarray:
    """By Pillow's own functions, one after another."""
    with Image.open(io.BytesIO(content)) as image:
        turned = ImageOps.exif_transpose(image)
    if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
        rgba = turned.convert("RGBA")
        canvas = Image.new("RGB", rgba.size, background)
        canvas.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
        turned = canvas
    return np.asarray(turned.convert(mode))


FORMATS = {  # options by format, and the modes that it stores
    "jpeg": ({"quality": 90}, ("L", "RGB", "CMYK")),
    "webp": ({"lossless": True, "exact": True}, ("RGB", "RGBA")),
    "tiff": ({}, ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")),
    "png": ({}, ("1", "L", "LA", "P", "RGB", "RGBA")),
    "jpeg2000": ({}, ("L", "LA", "RGB", "RGBA")),
    "avif": ({"quality": 100}, ("RGB", "RGBA")),
}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_format_mode_profile_and_rotation_is_read_as_pillow_shows_it(data):
    kind = data.draw(st.sampled_from(list(FORMATS)))
    options, modes = FORMATS[kind]
    mode = data.draw(st.sampled_from(modes))
    height, width = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 24))
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = noise(height, width, bands, data.draw(st.integers(0, 999)))
    if mode in ("1", "P"):
        image = Image.fromarray(pixels[..., 0]).convert(mode)
    else:
        image = Image.frombytes(mode, (width, height), pixels.tobytes())
    if kind != "jpeg2000":
        exif = Image.Exif()
        exif[ORIENTATION] = data.draw(st.integers(1, 8))
        options = options | {"exif": exif}
    if data.draw(st.booleans()):
        options = options | {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()}
    content = encoded(image, kind, **options)
    channels = data.draw(st.sampled_from((1, 3)))
    expected = step_by_step(content, (10, 200, 90), "L" if channels == 1 else "RGB")
    assert image_shape(content) == expected.shape[:2]
    actual = load_image(content, config(*expected.shape[:2], background=(10, 200, 90), channels=channels))
    tolerance = 1 if mode in ("LA", "RGBA") else 0  # of another order of rounding
    assert np.abs(actual.transpose(1, 2, 0).astype(int) - expected.reshape(*expected.shape[:2], -1)).max() <= tolerance


Image.init()
WITHOUT_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "WMF", "PDF"}
FLOATS = {"SPIDER"}  # stores levels of 0 to 255 as floating-point numbers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted((Image.SAVE.keys() & Image.OPEN.keys()) - WITHOUT_PIXELS - FLOATS))
def test_every_format_that_pillow_writes_and_reads(kind):
    for mode in ("RGB", "RGBA", "P", "L", "1", "CMYK"):
        try:
            content = encoded(Image.fromarray(noise(32, 32)).convert(mode), kind)
        except Exception:  # a mode that it cannot store
            continue
        expected = step_by_step(content, (255, 255, 255), "RGB")
        actual = load_image(content, config(*expected.shape[:2])).transpose(1, 2, 0).astype(int)
        assert np.abs(actual - expected).max() <= 1


# Metadata


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", list(ODD_CHUNKS))
def test_metadata_of_a_png_do_not_cost_its_pixels(name, place, tmp_path):
    samples = noise(6, 4)
    chunks = (ODD_CHUNKS[name], exif_chunk(6))
    content = png(samples, 8, 2, *chunks) if place == "before" else png(samples, 8, 2, after=chunks)
    (tmp_path / "a.png").write_bytes(content)
    for file in (content, tmp_path / "a.png"):
        assert image_shape(file) == (4, 6)
        np.testing.assert_array_equal(load_image(file, config(4, 6)), np.rot90(samples, -1).transpose(2, 0, 1))


def metadata_problem(content: bytes) -> str:
    return with_image(content, lambda image: (upright(image), image.info.get(METADATA_PROBLEM, ""))[1])


def test_what_is_wrong_with_metadata_is_known():
    assert metadata_problem(png(noise(6, 4), 8, 2)) == ""
    assert "too large" in metadata_problem(png(noise(6, 4), 8, 2, ODD_CHUNKS["compressed text"]))
    assert "orientation 77" in metadata_problem(png(noise(6, 4), 8, 2, exif_chunk(77)))


def test_a_wrong_checksum_of_pixels_or_of_transparency_is_damage():
    transparent = png_chunk(b"tRNS", bytes(6))
    for content in (
        png(noise(6, 4), 8, 2, transparent[:-4] + b"none"),
        png(noise(6, 4), 8, 2, ODD_CHUNKS["wrong checksum"]).replace(b"IDAT", b"IDaT"),
        png(noise(6, 4), 8, 2, ODD_CHUNKS["wrong checksum"])[:-30],
    ):
        with pytest.raises(InvalidSample, match="damaged|not an image"):
            load_image(content, config(6, 4))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif", "tiff"])
@pytest.mark.parametrize("value", ["6", 0, 9, -1, 70000, 6.5, b"6"], ids=repr)
def test_an_odd_orientation_does_not_cost_the_pixels(kind, value):
    exif = Image.Exif()
    exif[ORIENTATION] = value
    exif[0x010F] = "maker"
    image = Image.fromarray(noise(6, 4))
    try:
        content = encoded(image, kind, exif=exif)
    except Exception:  # Pillow cannot write every value
        return
    plain = load_image(encoded(image, kind), config(6, 4))
    np.testing.assert_array_equal(load_image(content, config(6, 4)), plain)
    assert image_shape(content) == (6, 4)


def odd_exif(entry: bytes) -> bytes:
    """EXIF of one entry beside an orientation of 6, in an order that no program writes."""
    orientation = struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0)
    return b"Exif\0\0II*\0\10\0\0\0" + struct.pack("<H", 2) + orientation + entry + bytes(4)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize(
    "entry",
    [
        struct.pack("<HHII", 0x0131, 1, 1, 3),  # software as a byte: Pillow cannot write it again
        struct.pack("<HHII", 0x010E, 7, 4, 2**31),  # outside the file
        struct.pack("<HHII", 0x011A, 5, 1, 2**20),  # a resolution outside the file
        struct.pack("<HHII", 0x9C9B, 12, 2**30, 8),  # a length of gigabytes
        struct.pack("<HHII", 0x8769, 4, 1, 8),  # a directory that is its own parent
        struct.pack("<HHII", 0x0112, 99, 1, 6),  # an unknown type
    ],
)
def test_an_odd_exif_entry_does_not_cost_pixels_or_rotation(kind, entry):
    pixels = noise(6, 4)
    options = {"quality": 100} if kind == "jpeg" else {"lossless": True} if kind == "webp" else {}
    content = encoded(Image.fromarray(pixels), kind, exif=odd_exif(entry), **options)
    plain = load_image(encoded(Image.fromarray(pixels), kind, **options), config(6, 4))
    np.testing.assert_array_equal(load_image(content, config(4, 6)), np.rot90(plain, -1, axes=(1, 2)))
    assert image_shape(content) == (4, 6)


def test_exif_that_cannot_be_parsed_does_not_cost_the_pixels():
    image = Image.fromarray(noise(24, 32))
    exif = Image.Exif()
    exif[0x010E] = "a description"
    header = exif.tobytes().removeprefix(b"Exif\0\0")[:8]
    for kind in ("jpeg", "png", "webp", "avif"):
        content = encoded(image, kind, exif=exif)
        assert content.count(header) == 1
        damaged = content.replace(header, b"XXXXXXXX")
        if kind == "png":  # its checksum is right
            start = damaged.index(b"eXIf")
            length = int.from_bytes(damaged[start - 4 : start], "big")
            end = start + 4 + length
            damaged = damaged[:end] + struct.pack(">I", zlib.crc32(damaged[start:end])) + damaged[end + 4 :]
        np.testing.assert_array_equal(load_image(damaged, config(24, 32)), load_image(content, config(24, 32)))
        assert image_shape(damaged) == (24, 32)
        assert metadata_problem(damaged)


@pytest.mark.slow  # a process of its own
def test_warnings_of_pillow_do_not_reach_the_user(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(Image.fromarray(noise(8, 8)), "jpeg", exif=b"Exif\0\0II*\0\10\0\0\0\5\0"))
    code = f"from tessera.data.images import *; load_image(Path({str(tmp_path / 'a.jpg')!r}), ImagesConfig(size=8))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == ""


def test_the_usual_formats_are_tried_first():
    code = "from tessera.data import folders, images; folders.image_suffixes(); print(*images.Image.ID)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = run.stdout.split()
    assert {"JPEG", "PNG", "IM", "TGA"} <= set(names)
    assert max(map(names.index, ("JPEG", "PNG"))) < min(map(names.index, ("IM", "TGA")))  # these have no signature


# Invalid files


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_truncated_file_is_invalid(kind):
    data = encoded(Image.fromarray(noise(32, 32)), kind)
    with pytest.raises(InvalidSample, match=r"damaged|not an image"):
        load_image(data[: len(data) // 2], config(8))


@pytest.mark.parametrize("data", [b"", b"not an image at all", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_other_content_is_invalid(data):
    with pytest.raises(InvalidSample, match=r"damaged|not an image"):
        load_image(data, config(8))


def test_a_missing_file_is_invalid(tmp_path):
    with pytest.raises(InvalidSample):
        load_image(tmp_path / "gone.png", config(8))


@pytest.mark.filterwarnings("ignore")
def test_random_damage_raises_nothing_but_invalid_sample():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x010E] = "a description"
    image = Image.fromarray(noise(20, 16))
    files = [encoded(image, kind, exif=exif) for kind in ("jpeg", "png", "webp")]
    files += [encoded(image.quantize(16), "gif"), encoded(image.convert("CMYK"), "jpeg"), encoded(image, "bmp")]
    generator = random.Random(0)
    for _ in range(1500):
        data = bytearray(generator.choice(files))
        if generator.random() < 0.5:
            del data[generator.randrange(len(data)) :]
        for _ in range(generator.randrange(4)):
            if data:
                data[generator.randrange(min(len(data), generator.choice((64, 200, 10**6))))] = generator.randrange(256)
        with contextlib.suppress(InvalidSample):
            assert load_image(bytes(data), config(8, upscale=True)).shape == (3, 8, 8)


def test_an_unexpected_error_of_pillow_is_invalid(monkeypatch):
    def fail(image, method):
        raise struct.error("required argument is not an integer")

    monkeypatch.setattr("tessera.data.images.Image.Image.convert", fail)
    with pytest.raises(InvalidSample, match="damaged: required argument"):
        load_image(encoded(Image.fromarray(noise(8, 8, 1)[..., 0])), config(8))


def test_an_image_without_pixels_is_invalid():
    with pytest.raises(InvalidSample):
        load_image(b"P6 0 8 255\n", config(8, upscale=True))


@pytest.mark.parametrize(("height", "width"), [(7, 20), (20, 7), (7, 7)])
def test_an_image_smaller_than_the_size_is_invalid_without_upscale(height, width):
    data = encoded(Image.fromarray(noise(height, width)))
    with pytest.raises(InvalidSample, match=rf"smaller than the size: {height} x {width}.*data\.upscale=true"):
        load_image(data, config(8))
    assert load_image(data, config(8, upscale=True)).shape == (3, 8, 8)


@pytest.mark.parametrize("value", [-1, 256])
def test_background_levels_are_bytes(value):
    with pytest.raises(ValueError, match="background"):
        ImagesConfig(background=(0, 0, value))


# The crop


def adm_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Independent: as guided-diffusion and DiT write it, for squares."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC)
    pixels = np.array(image)
    top = (pixels.shape[0] - size) // 2
    left = (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@settings(max_examples=80, deadline=None)
@given(height=st.integers(8, 90), width=st.integers(8, 90), size=st.integers(1, 24))
def test_squares_are_cropped_as_adm_does(height, width, size):
    image = Image.fromarray(noise(height, width))
    np.testing.assert_array_equal(np.asarray(center_crop(image, (size, size))), adm_center_crop(image, size))


@settings(max_examples=150, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), rows=st.integers(1, 40), columns=st.integers(1, 40))
def test_any_image_becomes_exactly_the_size(height, width, rows, columns):
    cropped = center_crop(Image.fromarray(noise(height, width)), (rows, columns))
    assert cropped.size == (columns, rows)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 60), width=st.integers(1, 60), rows=st.integers(1, 30), columns=st.integers(1, 30))
def test_a_constant_image_stays_constant_to_the_edge(height, width, rows, columns):
    cropped = center_crop(Image.new("RGB", (width, height), (12, 200, 99)), (rows, columns))
    assert (np.asarray(cropped) == (12, 200, 99)).all()


def test_the_crop_is_the_center():
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    assert np.asarray(center_crop(Image.fromarray(pixels), (8, 8))).min() == 255
    assert np.asarray(center_crop(Image.fromarray(pixels.transpose(1, 0, 2).copy()), (8, 8))).min() == 255


def crop_of_the_whole(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The center of the whole image, scaled up."""
    scale = max(size[1] / image.width, size[0] / image.height)
    scaled = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (scaled.width - size[1]) // 2, (scaled.height - size[0]) // 2
    return np.asarray(scaled.crop((left, top, left + size[1], top + size[0])))


@settings(max_examples=60, deadline=None)
@given(short=st.integers(1, 6), aspect=st.integers(2, 300), rows=st.integers(12, 40), columns=st.integers(12, 40))
def test_a_long_image_that_is_scaled_up_is_the_center_of_the_whole(short, aspect, rows, columns):
    for shape in ((short, short * aspect), (short * aspect, short)):
        image = Image.fromarray(noise(*shape, seed=aspect))
        expected = crop_of_the_whole(image, (rows, columns)).astype(int)
        assert np.abs(np.asarray(center_crop(image, (rows, columns))) - expected).max() <= 2
        if max(shape) * max(rows, columns) / short <= 16 * min(rows, columns):  # an ordinary shape
            np.testing.assert_array_equal(np.asarray(center_crop(image, (rows, columns))), expected)


@pytest.mark.parametrize("shape", [(1, 60000), (60000, 1), (2, 30000)])
def test_the_cost_of_scaling_up_does_not_grow_with_the_length(shape, monkeypatch):
    """No image that is made on the way has more pixels than the file and a few times the result."""
    areas = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *a, **k: areas.append(resize(*a, **k)) or areas[-1])
    pixels_read = load_image(encoded(Image.fromarray(noise(*shape))), config(64, upscale=True))
    assert pixels_read.shape == (3, 64, 64)
    assert max(image.width * image.height for image in areas) <= 100 * 64**2


def test_the_configured_size_is_height_then_width():
    assert load_image(encoded(Image.fromarray(noise(30, 30))), config(6, 10)).shape == (3, 6, 10)
    assert ImagesConfig(size=7).size == (7, 7)


def test_reading_does_not_hold_files_open(tmp_path):
    path = Path(tmp_path / "a.png")
    path.write_bytes(encoded(Image.fromarray(noise(8, 8))))
    load_image(path, config(8))
    path.unlink()
    assert not path.exists()


SIDES = [(704, 896), (128, 144), (100, 100), (400, 304)]  # whole blocks: of others the last block is padded


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("size", [(64, 64), (16, 48)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_fast_decoding_differs_little_from_exact(side, size, orientation):
    rows, columns = np.mgrid[: side[0], : side[1]]
    smooth = np.stack([128 + 90 * np.sin(rows / 31 + shift) * np.cos(columns / 23) for shift in (0, 1, 2)], axis=-1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(smooth.astype(np.uint8)).save(file, "JPEG", quality=95, exif=exif)
    exact, fast = (
        load_image(file.getvalue(), ImagesConfig(size=size, decoding=how)).astype(float) for how in ("exact", "fast")
    )
    assert exact.shape == fast.shape == (3, *size)
    assert np.sqrt(((exact - fast) ** 2).mean()) < 2


def test_fast_decoding_decodes_less(monkeypatch):
    calls = []
    draft = JpegImagePlugin.JpegImageFile.draft
    monkeypatch.setattr(
        JpegImagePlugin.JpegImageFile, "draft", lambda image, mode, size: calls.append(draft(image, mode, size))
    )
    file = io.BytesIO()
    Image.new("RGB", (1000, 800)).save(file, "JPEG")
    load_image(file.getvalue(), ImagesConfig(size=(64, 64), decoding="fast"))
    assert calls[0][1][2:] == (1000 / 8, 800 / 8)


# The shape from the header


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_the_shape_is_that_of_the_displayed_image(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = encoded(Image.fromarray(noise(6, 4)), kind, exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        upright = ImageOps.exif_transpose(image)
    (tmp_path / "a").write_bytes(content)
    assert image_shape(content) == image_shape(tmp_path / "a") == (upright.height, upright.width)


def test_an_orientation_behind_the_pixels_of_a_png_counts():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    plain = encoded(Image.fromarray(noise(6, 4)))
    late = plain[:-12] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + plain[-12:]
    assert image_shape(plain) == (6, 4)
    assert image_shape(late) == (4, 6)
    assert load_image(late, config(4, 6)).shape == (3, 4, 6)


def test_a_plain_png_is_not_decoded_for_its_shape(monkeypatch):
    content = encoded(Image.fromarray(noise(6, 4)))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", None)
    assert image_shape(content) == (6, 4)


@pytest.mark.parametrize("data", [b"", b"not an image at all", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_other_content_has_no_shape(data, tmp_path):
    with pytest.raises(InvalidSample, match=r"damaged|not an image"):
        image_shape(data)
    with pytest.raises(InvalidSample):
        image_shape(tmp_path / "gone.png")


# Sixteen bits


def test_sixteen_bits_of_color_with_a_transparent_color_are_refused_by_name():
    content = png(noise(2, 2).astype(int) * 257, 16, 2, png_chunk(b"tRNS", bytes(6)))
    with pytest.raises(InvalidSample, match="16 bits of color with a transparent color.*save it as RGBA"):
        load_image(content, config(2))


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_of_grey_in_a_tiff_of_either_byte_order(order):
    values = np.random.default_rng(0).integers(0, 65536, (4, 4)).astype(order)
    image = Image.frombytes("I;16" if order == "<u2" else "I;16B", (4, 4), values.tobytes())
    pixels_read = load_image(encoded(image, "tiff"), config(4, channels=1))
    assert np.abs(pixels_read[0] - values.astype(np.float64) / 257).max() <= 0.5
