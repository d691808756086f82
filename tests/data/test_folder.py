"""Folders of images as people have them."""

import re

import numpy as np
import pytest
from PIL import Image

from tessera.data import FolderConfig
from tessera.errors import TesseraError


def put(path, value: int = 0, size: int = 8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, value, value)).save(path)


def opened(path, **changes):
    return FolderConfig(path=str(path), size=8, **changes).open()


def test_the_first_level_of_folders_names_the_classes(tmp_path):
    for number, name in enumerate(("dog/z.png", "cat/deep/er/b.jpg", "cat/a.webp", "dog/old/c.PNG", "emu/e.jpeg")):
        put(tmp_path / name, 10 * number)
    source = opened(tmp_path)
    assert source.class_names == ("cat", "dog", "emu")
    assert len(source) == 5
    found = {source.name(i).removeprefix(str(tmp_path) + "/"): source.class_names[source.label(i)] for i in range(5)}
    assert found == {
        "cat/a.webp": "cat",
        "cat/deep/er/b.jpg": "cat",
        "dog/old/c.PNG": "dog",
        "dog/z.png": "dog",
        "emu/e.jpeg": "emu",
    }
    index = next(i for i in range(5) if source.name(i).endswith("c.PNG"))
    np.testing.assert_array_equal(source.pixels(index), np.full((3, 8, 8), 30))


def test_the_order_is_that_of_the_paths(tmp_path):
    for name in ("b/2.png", "a/9.png", "b/10.png", "a/1.png"):
        put(tmp_path / name)
    source = opened(tmp_path)
    names = [source.name(i) for i in range(4)]
    assert names == [str(tmp_path / name) for name in ("a/1.png", "a/9.png", "b/10.png", "b/2.png")]


def test_a_flat_folder_has_no_classes(tmp_path):
    for number in range(3):
        put(tmp_path / f"{number}.png")
    source = opened(tmp_path)
    assert source.class_names == ()
    assert [source.label(i) for i in range(3)] == [0, 0, 0]


def test_hidden_files_and_folders_and_other_files_do_not_count(tmp_path):
    for name in ("cat/a.png", "dog/b.png", ".thumbs/c.png", "cat/._a.png", "dog/.cache/d.png"):
        put(tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/read.txt").write_text("no image")
    (tmp_path / "cat/labels.csv").write_text("1,2")
    source = opened(tmp_path)
    assert (len(source), source.class_names) == (2, ("cat", "dog"))


def test_a_hidden_folder_may_be_the_root(tmp_path):
    put(tmp_path / ".data/cat/a.png")
    put(tmp_path / ".data/dog/a.png")
    assert len(opened(tmp_path / ".data")) == 2


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    put(tmp_path / "elsewhere/a.png")
    put(tmp_path / "data/dog/b.png")
    (tmp_path / "data/cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "data/dog/around").symlink_to(tmp_path / "data", target_is_directory=True)
    source = opened(tmp_path / "data")
    assert source.class_names == ("cat", "dog")
    assert len(source) == 2


def test_loose_images_beside_class_folders_are_an_error(tmp_path):
    for name in ("cat/a.png", "dog/b.png", "c.png", "d.png"):
        put(tmp_path / name)
    with pytest.raises(TesseraError, match=r"2 images beside its class folders.*data\.classes=none"):
        opened(tmp_path)
    source = opened(tmp_path, classes="none")
    assert (len(source), source.class_names) == (4, ())


def test_one_class_only_is_an_error_that_names_the_way_out(tmp_path):
    put(tmp_path / "cat/a.png")
    put(tmp_path / "cat/b.png")
    with pytest.raises(TesseraError, match=r"one class only \('cat'\).*data\.classes=none"):
        opened(tmp_path)
    assert len(opened(tmp_path, classes="none")) == 2


def test_folders_asked_for_but_absent(tmp_path):
    put(tmp_path / "a.png")
    with pytest.raises(TesseraError, match=r"data\.classes=folders, but .* holds no class folders"):
        opened(tmp_path, classes="folders")


def test_a_missing_path(tmp_path):
    with pytest.raises(TesseraError, match=re.escape(f"data.path {tmp_path / 'gone'} does not exist")):
        opened(tmp_path / "gone")


def test_a_file_instead_of_a_folder(tmp_path):
    put(tmp_path / "a.png")
    with pytest.raises(TesseraError, match=r"a\.png is a file; expected a folder"):
        opened(tmp_path / "a.png")


def test_a_folder_without_images(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/text.txt").write_text("hello")
    with pytest.raises(TesseraError, match=r"holds no images; looked at every depth for .*\.png"):
        opened(tmp_path)


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "pictures/a.png")
    assert len(opened("~/pictures")) == 1
