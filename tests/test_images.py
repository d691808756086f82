"""Grids, PNG files with settings, animations."""

import re
import struct
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from tessera import images
from tessera.errors import TesseraError
from tessera.images import grid, read_settings, save_gif, save_png

FIGURES = Path(__file__).parents[1] / "docs" / "figures"


def random_images(count, height, width, channels):
    return np.random.default_rng(0).integers(0, 255, (count, height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_is_row_by_row_with_white_gaps(channels):
    images = random_images(5, 2, 3, channels)
    sheet = grid(images, columns=2, gap=1, zoom=1)
    assert sheet.shape == (3 * 2 + 2, 2 * 3 + 1, channels)
    expected = np.full(sheet.shape, 255, np.uint8)
    for index, (top, left) in enumerate([(0, 0), (0, 4), (3, 0), (3, 4), (6, 0)]):
        expected[top : top + 2, left : left + 3] = images[index]
    assert np.array_equal(sheet, expected)


def test_zoom_repeats_pixels():
    images = random_images(2, 2, 2, 1)
    sheet = grid(images, columns=2, gap=0, zoom=3)
    assert np.array_equal(sheet[::3, ::3], grid(images, columns=2, gap=0))
    assert np.array_equal(sheet, np.kron(sheet[::3, ::3, 0], np.ones((3, 3), np.uint8))[..., None])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_png_holds_every_pixel_and_its_settings(tmp_path, channels, mode):
    (image,) = random_images(1, 5, 7, channels)
    settings = {"seed": 3, "class": "émeu", "guidance_scale": 1.5, "sampler": {"kind": "ddim"}}
    save_png(tmp_path / "deep" / "a.png", image, settings)
    with Image.open(tmp_path / "deep" / "a.png") as file:
        assert file.mode == mode
        assert np.array_equal(np.asarray(file).reshape(image.shape), image)
    assert read_settings(tmp_path / "deep" / "a.png") == settings


def test_an_image_without_settings(tmp_path):
    save_png(tmp_path / "a.png", random_images(1, 4, 4, 3)[0])
    assert read_settings(tmp_path / "a.png") is None
    Image.new("RGB", (2, 2)).save(tmp_path / "b.jpg")
    assert read_settings(tmp_path / "b.jpg") is None


def test_gif_loops_and_holds_its_last_frame(tmp_path):
    frames = [np.full((4, 6, 1), value, np.uint8) for value in (0, 100, 200)]
    save_gif(tmp_path / "a.gif", frames, milliseconds=50, hold=900)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (3, (6, 4), 0)
        durations, values = [], []
        for index in range(3):
            image.seek(index)
            durations.append(image.info["duration"])
            values.append(int(np.asarray(image.convert("L"))[0, 0]))
    assert durations == [50, 50, 900]
    assert values == [0, 100, 200]


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TesseraError, match="cannot write"):
        save_png(tmp_path / "file" / "a.png", random_images(1, 4, 4, 3)[0])


@pytest.mark.parametrize("function", ["read_settings", "limit_width", "load_png"])
def test_any_error_of_a_decoder_is_one_that_callers_expect(tmp_path, monkeypatch, function):
    images.save_png(tmp_path / "a.png", random_images(1, 4, 4, 3)[0], {"seed": 1})
    arguments = {"read_settings": (), "limit_width": (8,), "load_png": ({"seed": 1},)}[function]
    for error in (struct.error("odd"), IndexError(), SyntaxError("broken PNG file"), EOFError(), TypeError("odd")):
        monkeypatch.setattr(images.Image, "open", Mock(side_effect=error))
        if function == "load_png":
            assert images.load_png(tmp_path / "a.png", *arguments) is None
        else:
            with pytest.raises(ValueError, match=re.escape(str(error) or type(error).__name__)):
                getattr(images, function)(tmp_path / "a.png", *arguments)


def test_captions_above_rows_are_continued_at_the_right_and_then_cut():
    rows = [np.full((10, 40, 3), value, np.uint8) for value in (0, 100)]
    short = images.with_captions(rows, ["a", "b"])
    assert short.shape == (2 * (16 + 10), 40, 3)
    assert (short[16:26] == 0).all()
    assert (short[42:] == 100).all()
    assert short[:16].min() < 100  # text
    long = images.with_captions(rows, ["a" * 15, "b"])
    assert 40 < long.shape[1] < 120
    assert (long[16:26, 40:] == 255).all()
    assert images.with_captions(rows, ["a" * 500, "b"]).shape[1] == 120


@pytest.mark.parametrize("path", sorted(FIGURES.glob("*.png")), ids=lambda path: path.name)
def test_figures_of_the_documentation_name_no_path_of_a_machine(path):
    settings = read_settings(path) or {"model": ""}
    assert not settings["model"].startswith("/"), settings["model"]
