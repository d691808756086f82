"""Decoding of image files: every mode, transparency, orientation, damage, and the ADM crop."""

import contextlib
import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, JpegImagePlugin

from tessera.data.images import ImagesConfig, InvalidSample, centre_crop, image_shape, load_image

ORIENTATION = 0x0112


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def config(height: int, width: int | None = None, **changes) -> ImagesConfig:
    return ImagesConfig(size=(height, width or height), **changes)


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


def test_a_palette_with_one_transparent_colour():
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


def test_grey_output_has_one_channel_and_the_luma_of_the_colours():
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


def test_floating_point_tiff():
    values = np.linspace(0, 255, 16, dtype=np.float32).reshape(4, 4)
    pixels_read = load_image(encoded(Image.fromarray(values), "tiff"), config(4, channels=1))
    assert np.abs(pixels_read[0] - values).max() <= 0.5


def test_cmyk():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    for kind, options in (("jpeg", {"quality": 100}), ("tiff", {})):
        pixels_read = load_image(encoded(image, kind, **options), config(8))
        assert np.abs(pixels_read[:, 4, 4].astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(orientation):
    pixels = noise(6, 4)
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),  # flipped at the other diagonal
        8: lambda a: np.rot90(a, 1),
    }
    upright = undo[orientation](pixels)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    pixels_read = load_image(encoded(Image.fromarray(pixels), exif=exif), config(*upright.shape[:2]))
    np.testing.assert_array_equal(pixels_read, upright.transpose(2, 0, 1))


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
    def fail(image, in_place):
        raise struct.error("required argument is not an integer")

    monkeypatch.setattr("tessera.data.images.ImageOps.exif_transpose", fail)
    with pytest.raises(InvalidSample, match="damaged: required argument"):
        load_image(encoded(Image.fromarray(noise(8, 8))), config(8))


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


def adm_centre_crop(image: Image.Image, size: int) -> np.ndarray:
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
    np.testing.assert_array_equal(np.asarray(centre_crop(image, (size, size))), adm_centre_crop(image, size))


@settings(max_examples=150, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), rows=st.integers(1, 40), columns=st.integers(1, 40))
def test_any_image_becomes_exactly_the_size(height, width, rows, columns):
    cropped = centre_crop(Image.fromarray(noise(height, width)), (rows, columns))
    assert cropped.size == (columns, rows)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 60), width=st.integers(1, 60), rows=st.integers(1, 30), columns=st.integers(1, 30))
def test_a_constant_image_stays_constant_to_the_edge(height, width, rows, columns):
    cropped = centre_crop(Image.new("RGB", (width, height), (12, 200, 99)), (rows, columns))
    assert (np.asarray(cropped) == (12, 200, 99)).all()


def test_the_crop_is_the_centre():
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    assert np.asarray(centre_crop(Image.fromarray(pixels), (8, 8))).min() == 255
    assert np.asarray(centre_crop(Image.fromarray(pixels.transpose(1, 0, 2).copy()), (8, 8))).min() == 255


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


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


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


# Sixteen bits of colour, which Pillow cannot write


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bits_of_colour_keep_their_range(channels):
    values = np.random.default_rng(0).integers(0, 65536, (5, 4, channels)).astype(">u2")
    if channels == 4:
        values[..., 3] = 65535
    header = struct.pack(">IIBBBBB", 4, 5, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        png_chunk(kind, data) for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )
    pixels_read = load_image(content, config(5, 4)).transpose(1, 2, 0)
    assert np.abs(pixels_read - values[..., :3] / 257).max() <= 1


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_of_grey_in_a_tiff_of_either_byte_order(order):
    values = np.random.default_rng(0).integers(0, 65536, (4, 4)).astype(order)
    image = Image.frombytes("I;16" if order == "<u2" else "I;16B", (4, 4), values.tobytes())
    pixels_read = load_image(encoded(image, "tiff"), config(4, channels=1))
    assert np.abs(pixels_read[0] - values.astype(np.float64) / 257).max() <= 0.5
