"""Images in folders, and the behaviour common to every layout."""

import io
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from tessera.data import AnyData, FilesConfig, index
from tessera.data.images import InvalidSample
from tessera.data.resolve import check_classes
from tessera.errors import TesseraError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def put(path, value: int = 0, size: int = 8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, value, value)).save(path)


def open_data(path, **changes):
    return FilesConfig(path=str(path), size=8, **changes).open()


def test_the_first_level_of_folders_names_the_classes(tmp_path):
    for number, name in enumerate(("dog/z.png", "cat/deep/er/b.jpg", "cat/a.webp", "dog/old/c.PNG", "emu/e.jpeg")):
        put(tmp_path / name, 10 * number)
    source = open_data(tmp_path)
    assert source.class_names == ("cat", "dog", "emu")
    assert len(source) == 5
    classes = {source.name(i).removeprefix(str(tmp_path) + "/"): source.class_names[source.label(i)] for i in range(5)}
    assert classes == {
        "cat/a.webp": "cat",
        "cat/deep/er/b.jpg": "cat",
        "dog/old/c.PNG": "dog",
        "dog/z.png": "dog",
        "emu/e.jpeg": "emu",
    }
    index = next(i for i in range(5) if source.name(i).endswith("c.PNG"))
    np.testing.assert_array_equal(source.pixels(index), np.full((3, 8, 8), 30))


def test_samples_are_ordered_by_path(tmp_path):
    for name in ("b/2.png", "a/9.png", "b/10.png", "a/1.png"):
        put(tmp_path / name)
    source = open_data(tmp_path)
    names = [source.name(i) for i in range(4)]
    assert names == [str(tmp_path / name) for name in ("a/1.png", "a/9.png", "b/10.png", "b/2.png")]


def test_a_flat_folder_has_no_classes(tmp_path):
    for number in range(3):
        put(tmp_path / f"{number}.png")
    source = open_data(tmp_path)
    assert source.class_names == ()
    assert [source.label(i) for i in range(3)] == [0, 0, 0]


def test_hidden_and_other_files_are_ignored(tmp_path):
    for name in ("cat/a.png", "dog/b.png", ".thumbs/c.png", "cat/._a.png", "dog/.cache/d.png"):
        put(tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/read.txt").write_text("no image")
    (tmp_path / "cat/labels.csv").write_text("1,2")
    source = open_data(tmp_path)
    assert (len(source), source.class_names) == (2, ("cat", "dog"))


def test_a_hidden_folder_may_be_the_root(tmp_path):
    put(tmp_path / ".data/cat/a.png")
    put(tmp_path / ".data/dog/a.png")
    assert len(open_data(tmp_path / ".data")) == 2


def test_linked_folders_are_followed_without_cycles(tmp_path):
    put(tmp_path / "elsewhere/a.png")
    put(tmp_path / "data/dog/b.png")
    (tmp_path / "data/cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "data/dog/around").symlink_to(tmp_path / "data", target_is_directory=True)
    source = open_data(tmp_path / "data")
    assert source.class_names == ("cat", "dog")
    assert len(source) == 2


def test_loose_images_beside_class_folders_are_an_error(tmp_path):
    for name in ("cat/a.png", "dog/b.png", "c.png", "d.png"):
        put(tmp_path / name)
    with pytest.raises(TesseraError, match=r"2 images in .* beside the class folders.*data\.classes=none"):
        open_data(tmp_path)
    source = open_data(tmp_path, classes="none")
    assert (len(source), source.class_names) == (4, ())


def test_a_single_class_is_an_error(tmp_path):
    put(tmp_path / "cat/a.png")
    put(tmp_path / "cat/b.png")
    source = open_data(tmp_path)
    with pytest.raises(TesseraError, match=r"only one class \('cat'\).*data\.classes=none"):
        check_classes(source.class_names, source.config)
    assert len(open_data(tmp_path, classes="none")) == 2


def test_classes_from_folders_that_do_not_exist(tmp_path):
    put(tmp_path / "a.png")
    with pytest.raises(TesseraError, match=r"data\.classes=folders, but .*class folder"):
        open_data(tmp_path, classes="folders")


def test_a_missing_path(tmp_path):
    with pytest.raises(TesseraError, match=re.escape(f"data.path {tmp_path / 'gone'} does not exist")):
        open_data(tmp_path / "gone")


def test_a_file_instead_of_a_folder(tmp_path):
    put(tmp_path / "a.png")
    with pytest.raises(TesseraError, match=r"a\.png is a file; expected a folder"):
        open_data(tmp_path / "a.png")


def test_a_folder_without_images(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/text.txt").write_text("hello")
    with pytest.raises(TesseraError, match=r"contains no images at any depth .*\.png"):
        open_data(tmp_path)


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "photos/a.png")
    assert len(open_data("~/photos")) == 1


# Behaviour common to every layout


def every_layout(tmp_path) -> FilesConfig:
    """A folder, a parquet file and a tar, of two images each: three classes, captions."""
    import tarfile

    put(tmp_path / "folder/cat/a.png", 1)
    put(tmp_path / "folder/dog/b.png", 2)
    (tmp_path / "folder/dog/b.txt").write_text("a dog")
    contents = {}
    for value in (3, 4, 5, 6):
        buffer = io.BytesIO()
        Image.new("RGB", (10, 8 + value), (value,) * 3).save(buffer, format="png")
        contents[value] = buffer.getvalue()
    table = arrow.table({"image": [contents[3], contents[4]], "label": ["dog", "emu"], "text": ["three", None]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for value in (5, 6):
            member = tarfile.TarInfo(f"{value}.png")
            member.size = len(contents[value])
            archive.addfile(member, io.BytesIO(contents[value]))
    return FilesConfig(path=[str(tmp_path / name) for name in ("folder", "rows.parquet", "a.tar")], size=8)


def rows(source) -> list[tuple]:
    return [
        (int(source.pixels(i)[0, 0, 0]), source.label(i), source.caption(i), source.name(i), source.shape(i))
        for i in range(len(source))
    ]


def test_names_shapes_labels_and_captions_of_every_layout(tmp_path):
    source = every_layout(tmp_path).open()
    assert source.class_names == ("cat", "dog", "emu")
    assert rows(source) == [
        (1, 0, None, str(tmp_path / "folder/cat/a.png"), (8, 8)),
        (2, 1, "a dog", str(tmp_path / "folder/dog/b.png"), (8, 8)),
        (3, 1, "three", f"{tmp_path / 'rows.parquet'} row 0", (11, 10)),
        (4, 2, None, f"{tmp_path / 'rows.parquet'} row 1", (12, 10)),
        (5, -1, None, f"{tmp_path / 'a.tar'} 5.png", (13, 10)),
        (6, -1, None, f"{tmp_path / 'a.tar'} 6.png", (14, 10)),
    ]
    assert source.shapes().tolist() == [list(shape) for *_, shape in rows(source)]
    names = ("folder/cat/a.png", "folder/dog/b.png", "rows.parquet", "a.tar")
    assert source.files() == [tmp_path / name for name in names]


def test_a_data_set_can_be_pickled(tmp_path):
    source = every_layout(tmp_path).open()
    packed = pickle.dumps(source)
    assert rows(pickle.loads(packed)) == rows(source)
    content = source.encoded(2)
    assert isinstance(content, bytes)
    assert content not in packed  # read again after unpickling


def test_an_index_of_every_layout_is_the_same_data_set(tmp_path):
    source = every_layout(tmp_path).open()
    index.write(source.table, tmp_path / "lists/index.parquet")
    assert rows(FilesConfig(path=str(tmp_path / "lists/index.parquet"), size=8).open()) == rows(source)
    plain = FilesConfig(path=str(tmp_path / "lists/index.parquet"), size=8, classes="none").open()
    assert (plain.class_names, plain.label(1)) == ((), 0)


def test_shapes_in_the_index_are_used(tmp_path):
    put(tmp_path / "a.png")
    table = index.build(tmp_path, path=["a.png", "a.png"], height=[5, None], width=[6, None])
    index.write(table, tmp_path / "index.parquet")
    source = open_data(tmp_path / "index.parquet")
    assert [source.shape(0), source.shape(1)] == [(5, 6), (8, 8)]
    assert source.shapes().tolist() == [[5, 6], [8, 8]]


def test_files_that_vanish_or_shrink_are_invalid(tmp_path):
    source = every_layout(tmp_path).open()
    (tmp_path / "folder/cat/a.png").unlink()
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:530])
    for number, message in ((0, "No such file"), (4, "ends within it"), (5, "ends within it")):
        with pytest.raises(InvalidSample, match=message):
            source.pixels(number)
    assert source.shapes().tolist() == [[0, 0], [8, 8], [11, 10], [12, 10], [0, 0], [0, 0]]
    assert source.name(5) == f"{tmp_path / 'a.tar'} byte 1536"


def test_another_size_than_the_configured_one(tmp_path):
    put(tmp_path / "a.png", 7, size=16)
    assert open_data(tmp_path).pixels(0, (12, 10)).shape == (3, 12, 10)


@pytest.mark.parametrize("kind", ["files", "folder", "parquet"])
def test_every_kind_of_files(tmp_path, kind):
    from pydantic import TypeAdapter

    put(tmp_path / "a.png", 9)
    content = (tmp_path / "a.png").read_bytes()
    if kind == "parquet":
        parquet.write_table(arrow.table({"image": [content]}), tmp_path / "a.parquet")
    config = TypeAdapter(AnyData).validate_python({"kind": kind, "path": str(tmp_path), "size": 8})
    assert isinstance(config, FilesConfig)
    source = config.open()
    assert (len(source), source.pixels(0)[0, 0, 0]) == (1, 9)


def test_each_path_may_have_a_share(tmp_path):
    for name in ("new/1.png", "old/1.png", "old/2.png"):
        put(tmp_path / name)
    paths = [str(tmp_path / "new"), str(tmp_path / "old")]
    source = FilesConfig(path=paths, size=8, weights=(1, 1)).open()
    assert source.path_sizes == [1, 2]
    for settings, message in (
        ({"weights": (1, 2, 3)}, "weights has 3 numbers, and path has 2"),
        ({"weights": (1, 0)}, "greater than 0"),
        ({"weights": (1, 1), "buckets": {}}, "weights and buckets exclude each other"),
        ({"weights": (1, 0.123456)}, "no simple ratio"),
    ):
        with pytest.raises(ValueError, match=message):
            FilesConfig(path=paths, size=8, **settings)
