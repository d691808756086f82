"""What can be scored: pictures exactly as they are, every one of them in its place, or one clear error."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tessera import images
from tessera.data import DigitsConfig, FilesConfig
from tessera.errors import TesseraError
from tessera.evaluation.sources import Data, Folder, Npz, SampleSource, chosen, rows, shards
from tessera.evaluation.suite import found


def noise(count: int, size: tuple[int, int] = (8, 8), channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, channels), dtype=np.uint8)


def read(subject: SampleSource) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """All pictures, their numbers and labels."""
    each = [subject.shard(index) for index in range(shards(subject))]
    labels = [shard.label for shard in each if shard.label is not None]
    all_labels = np.concatenate(labels) if labels else None
    return np.concatenate([s.pictures for s in each]), np.concatenate([s.row for s in each]), all_labels


# Data


def test_data_leave_out_what_cannot_be_used_and_keep_numbers_and_labels(make_folder, small_shards):
    told = noise(50)
    path = make_folder("data", told, ["cat", "dog"] * 25)
    for number in (4, 7, 21):
        (path / ("cat", "dog")[number % 2] / f"{number:05d}.png").write_text("no image")
    Image.new("RGB", (4, 20)).save(path / "cat/00030.png")
    subject = Data(FilesConfig(path=str(path), size=(8, 8)))
    assert (subject.count, subject.size, subject.channels, subject.class_names) == (50, (8, 8), 3, ("cat", "dog"))
    seen, row, label = read(subject)
    order = [*range(0, 50, 2), *range(1, 50, 2)]  # folder by folder
    usable = [place for place, number in enumerate(order) if number not in (4, 7, 21, 30)]
    assert row.tolist() == usable
    np.testing.assert_array_equal(seen, told[[order[place] for place in usable]])
    np.testing.assert_array_equal(label, [order[place] % 2 for place in usable])


def test_a_shard_without_a_usable_picture_is_empty(make_folder, small_shards):
    path = make_folder("data", noise(25))
    for number in range(20):
        (path / f"{number:05d}.png").write_text("no image")
    subject = Data(FilesConfig(path=str(path), size=(8, 8)))
    shard = subject.shard(0)
    assert (shard.pictures.shape, shard.row.shape, shard.label) == ((0, 8, 8, 3), (0,), None)
    assert len(read(subject)[0]) == 5


def test_some_of_the_data_from_everywhere_or_an_error_if_there_are_not_as_many(real):
    subject = Data(DigitsConfig(), 30)
    seen, row, label = read(subject)
    some = chosen(1000, 30)
    assert some[0] < 100 < 900 < some[-1]
    assert len(set(some)) == 30
    np.testing.assert_array_equal(seen, real[some])
    np.testing.assert_array_equal(label, DigitsConfig().open().labels[some])
    assert row.tolist() == list(range(30))
    with pytest.raises(TesseraError, match=r"1,001 pictures are asked for, but .* holds 1,000: lower --count"):
        Data(DigitsConfig(), 1001)


def test_data_that_changed_are_another_plan(make_folder):
    path = make_folder("data", noise(3))
    plan = Data(FilesConfig(path=str(path), size=(8, 8))).plan
    assert Data(FilesConfig(path=str(path), size=(8, 8))).plan == plan
    Image.fromarray(noise(1, seed=9)[0]).resize((9, 9)).save(path / "00001.png")
    assert Data(FilesConfig(path=str(path), size=(8, 8))).plan != plan


def test_parquet_that_changed_is_another_plan(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from tessera.data import FilesConfig

    config = FilesConfig(path=str(tmp_path), size=(8, 8), label=None)
    plans = []
    for content in (b"one", b"other"):
        parquet.write_table(arrow.table({"image": [content]}), tmp_path / "data.parquet")
        plans.append(Data(config).plan)
    assert plans[0] != plans[1]


# Folders


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_is_taken_as_it_is(make_folder, small_shards, channels):
    told = noise(45, (6, 10), channels)
    subject = Folder(make_folder("samples", told))
    seen, row, label = read(subject)
    np.testing.assert_array_equal(seen, told)
    assert (row.tolist(), label, subject.class_names) == (list(range(45)), None, ())
    assert (subject.size, subject.channels, subject.count) == ((6, 10), channels, 45)
    assert Folder(make_folder("samples", told), 7).count == 7


def test_another_size_in_a_folder_is_an_error_that_names_the_file(make_folder):
    path = make_folder("samples", noise(5))
    Image.new("RGB", (8, 9)).save(path / "00003.png")
    with pytest.raises(TesseraError, match=r"00003\.png is 9 x 8, but .*00000\.png is 8 x 8.*--size to crop"):
        Folder(path).shard(0)


@pytest.mark.parametrize("number", [0, 3])
def test_a_damaged_file_in_a_folder_is_an_error_that_names_it(make_folder, number):
    path = make_folder("samples", noise(5, (32, 32)))
    file = path / f"{number:05d}.png"
    whole = file.read_bytes()
    for length in (0, 10, 40, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:length])
        with pytest.raises(TesseraError, match=rf"{number:05d}\.png cannot be scored: it is damaged or no image"):
            Folder(path).shard(0)


def test_a_colour_picture_among_grey_ones_is_an_error_and_a_grey_one_among_colours_is_not(make_folder):
    grey, colour = noise(2, channels=1), noise(1)
    path = make_folder("grey", grey)
    Image.fromarray(colour[0]).save(path / "00001.png")
    with pytest.raises(TesseraError, match=r"00001\.png is in colour, but .*00000\.png is grey"):
        Folder(path).shard(0)
    path = make_folder("colour", colour)
    Image.fromarray(grey[1, ..., 0]).save(path / "00001.png")
    seen = Folder(path).shard(0).pictures
    np.testing.assert_array_equal(seen, [colour[0], grey[1].repeat(3, axis=2)])


def test_grey_of_16_bits_is_grey(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(values).save(tmp_path / "a.png")
    subject = Folder(tmp_path)
    assert subject.channels == 1
    np.testing.assert_array_equal(subject.shard(0).pictures[0, ..., 0], np.round(values * (255 / 65535)))


def test_the_grid_is_no_sample(make_folder):
    path = make_folder("samples", noise(3))
    Image.new("RGB", (99, 99)).save(path / "grid.png")
    assert len(read(Folder(path))[0]) == 3
    for file in path.glob("0*.png"):
        file.unlink()
    with pytest.raises(TesseraError, match="holds no samples, only a grid of them"):
        Folder(path)


@pytest.mark.parametrize("content", [None, "notes.txt", ".hidden.png"])
def test_an_empty_folder_is_one_error(tmp_path, content):
    if content:
        (tmp_path / content).write_text("nothing")
    with pytest.raises(TesseraError, match="holds no images"):
        Folder(tmp_path)


def test_class_folders_name_the_classes(make_folder):
    subject = Folder(make_folder("samples", noise(6), ["dog", "cat", "emu"] * 2))
    _, _, label = read(subject)
    assert subject.class_names == ("cat", "dog", "emu")
    assert label.tolist() == [0, 0, 1, 1, 2, 2]


def drawn_pictures(folder: Path, classes: list) -> Path:
    for number, told in enumerate(classes):
        images.save_png(folder / f"{number}.png", noise(1)[0], {"classes": told, "seeds": [number]})
    return folder


def test_pictures_that_tessera_drew_say_their_class(tmp_path):
    subject = Folder(drawn_pictures(tmp_path, [[3], [0], [2]]))
    assert read(subject)[2].tolist() == [3, 0, 2]
    assert subject.class_names == ()  # numbers


@pytest.mark.parametrize("classes", [[[1], None], [None, None]])
def test_one_picture_without_a_class_leaves_all_without(tmp_path, classes):
    assert read(Folder(drawn_pictures(tmp_path, classes)))[2] is None


@pytest.mark.parametrize("text", ["{", "[1]", '"text"', "{}", '{"classes": ["cat"]}', '{"classes": 5}'])
def test_settings_of_somebody_else_in_a_picture_are_no_class(tmp_path, text):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(images.KEY, text)
    Image.fromarray(noise(1)[0]).save(tmp_path / "a.png", pnginfo=info)
    subject = Folder(tmp_path)
    assert (subject.class_names, subject.count) == ((), 1)


def test_a_changed_folder_is_another_plan(make_folder):
    path = make_folder("samples", noise(3))
    plan = Folder(path).plan
    assert Folder(path).plan == plan
    assert Folder(path, 2).plan != plan
    os.utime(path / "00001.png", (1, 1))
    assert Folder(path).plan != plan


# .npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_is_read_shard_by_shard(make_npz, small_shards, save, channels):
    told, labels = noise(45, (6, 10), channels), np.arange(45) % 4
    subject = Npz(make_npz("samples.npz", told, labels, save=save))
    seen, row, label = read(subject)
    np.testing.assert_array_equal(seen, told)
    np.testing.assert_array_equal(label, labels)
    assert (row.tolist(), subject.class_names) == (list(range(45)), ())
    assert (subject.size, subject.channels, subject.count) == ((6, 10), channels, 45)
    backwards = [subject.shard(index).pictures for index in (2, 0, 1, 1)]
    for index, part in zip((2, 0, 1, 1), backwards):
        np.testing.assert_array_equal(part, told[rows(subject, index)])


def test_an_npz_without_labels_and_a_part_of_one(make_npz, small_shards):
    told = noise(45)
    subject = Npz(make_npz("samples.npz", told), 30)
    seen, _, label = read(subject)
    np.testing.assert_array_equal(seen, told[chosen(45, 30)])
    assert (label, subject.class_names) == (None, ())


@pytest.mark.parametrize("count", [40, 300])
def test_some_of_the_samples_are_of_all_classes(make_folder, make_npz, count):
    """Files lie class by class, so the first ones would be of the first class."""
    told, labels = noise(400), np.arange(400) // 200
    for subject in (
        Folder(make_folder("samples", told, labels), count),
        Npz(make_npz("samples.npz", told, labels), count),
        Data(FilesConfig(path=str(make_folder("data", told, labels)), size=told.shape[1:3]), count),
    ):
        seen, _, label = read(subject)
        assert len(seen) == len(label) == count
        assert abs(int((label == 0).sum()) - count / 2) < count / 4
        np.testing.assert_array_equal(seen, told[chosen(400, count)])
        np.testing.assert_array_equal(label, labels[chosen(400, count)])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_cut_anywhere_is_one_error(make_npz, save):
    path = make_npz("samples.npz", noise(30), np.zeros(30, np.int64), save=save)
    whole = path.read_bytes()
    for length in (0, 1, 30, 100, len(whole) // 2, len(whole) - 200, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TesseraError, match=r"samples\.npz is truncated or no \.npz file"):
            Npz(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_npz_with_a_spoilt_byte_is_read_as_it_was_or_is_one_error(make_npz, save, place, value):
    told = noise(30, (4, 4))
    path = make_npz("samples.npz", told, np.arange(30) % 3, save=save)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= value
    path.write_bytes(content)
    try:
        subject = Npz(path)
        seen, _, label = read(subject)
    except TesseraError:
        return
    np.testing.assert_array_equal(seen, told)
    assert label is None or label.tolist() == [number % 3 for number in range(30)]


def test_an_array_shorter_than_it_says_is_truncated(tmp_path):
    path = tmp_path / "samples.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (9, 4, 4, 3)})
        member.write(bytes(8 * 48))
    with pytest.raises(TesseraError, match=r"samples\.npz is truncated: picture 8 of 9 is missing"):
        Npz(path).shard(0)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (noise(4).astype(np.float32), r"arr_0 is float32 \[4, 8, 8, 3\]; expected uint8"),
        (noise(4).astype(np.int64), "arr_0 is int64"),
        (noise(4)[..., 0], r"arr_0 is uint8 \[4, 8, 8\]; expected uint8 \[N, H, W, 3 or 1\]"),
        (noise(4).transpose(0, 3, 1, 2), r"arr_0 is uint8 \[4, 3, 8, 8\]"),
        (noise(4, channels=4), r"arr_0 is uint8 \[4, 8, 8, 4\]"),
        (noise(0), "holds no pictures"),
        (noise(4, size=(0, 8)), r"arr_0 is uint8 \[4, 0, 8, 3\]"),
        (np.asfortranarray(noise(4)), "stored column by column"),
        (np.array([{}]), "arr_0 is object"),
    ],
)
def test_an_npz_of_something_else_says_what_it_is(make_npz, array, said):
    with pytest.raises(TesseraError, match=said):
        Npz(make_npz("samples.npz", array))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.arange(3), r"arr_1 holds \[3\] labels of 4 pictures"),
        (np.eye(4), r"arr_1 holds \[4, 4\] labels of 4 pictures"),
        (np.array([0, 1, -1, 2]), "arr_1 holds the label -1"),
        (np.array([0.5, 1, 2, 3]), "arr_1 is float64"),
        (np.array(["a", "b", "c", "d"]), "arr_1 is"),
        (np.array([0, 1, 2, 10**12]), "arr_1 holds the label 1000000000000"),
    ],
)
def test_labels_that_are_none_are_an_error(make_npz, labels, said):
    with pytest.raises(TesseraError, match=said):
        Npz(make_npz("samples.npz", noise(4), labels))


def test_no_npz_at_all_and_one_of_other_keys(tmp_path):
    path = tmp_path / "samples.npz"
    with pytest.raises(TesseraError, match=r"there is nothing at .*samples\.npz"):
        Npz(path)
    path.write_text("text")
    with pytest.raises(TesseraError, match=r"truncated or no \.npz file"):
        Npz(path)
    np.savez(path, pictures=noise(2), labels=np.arange(2))
    with pytest.raises(TesseraError, match=r"holds pictures, labels; pictures are expected as arr_0 \[N, H, W, C\]"):
        Npz(path)
    np.savez(path)
    with pytest.raises(TesseraError, match="holds nothing"):
        Npz(path)


def test_more_than_there_is_cannot_be_asked_for(make_npz, make_folder):
    for subject, path in ((Npz, make_npz("samples.npz", noise(3))), (Folder, make_folder("samples", noise(3)))):
        assert subject(path, 3).count == 3
        with pytest.raises(TesseraError, match="4 pictures are asked for, but .* holds 3: lower --count"):
            subject(path, 4)


# Which of them a path is


def test_a_path_is_an_npz_a_folder_as_it_is_or_data(make_npz, make_folder):
    npz, folder = make_npz("samples.npz", noise(3)), make_folder("samples", noise(3))
    assert isinstance(found(str(npz), None, None), Npz)
    assert isinstance(found(str(folder), None, None), Folder)
    scaled = found(str(folder), (4, 4), None)
    assert isinstance(scaled, Data)
    assert scaled.shard(0).pictures.shape == (3, 4, 4, 3)
    shutil.rmtree(folder)
    with pytest.raises(TesseraError, match="no data at"):
        found(str(folder), None, None)


def test_plans_travel_as_json(make_npz, make_folder, real):
    for subject in (Npz(make_npz("s.npz", noise(3))), Folder(make_folder("s", noise(3))), Data(DigitsConfig(), 5)):
        assert json.loads(json.dumps(subject.plan))["count"] == subject.count
