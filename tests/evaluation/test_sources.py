"""Sample sources: images exactly as they are, in their order, or one clear error."""

import json
import os
import re
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
from tessera.evaluation.sources import DatasetSource, FolderSource, NpzSource, SampleSource, subset_indices
from tessera.evaluation.suite import open_samples
from tessera.generation.shards import num_shards, shard_range


def noise(count: int, size: tuple[int, int] = (8, 8), channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, channels), dtype=np.uint8)


def read(source: SampleSource) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """All images, their indices and labels."""
    shards = [source.shard(index) for index in range(num_shards(source.count))]
    labels = [shard.labels for shard in shards if shard.labels is not None]
    all_labels = np.concatenate(labels) if labels else None
    return np.concatenate([s.images for s in shards]), np.concatenate([s.indices for s in shards]), all_labels


# Data


def test_a_data_set_skips_invalid_images_and_keeps_indices_and_labels(make_folder, small_shards):
    expected = noise(50)
    path = make_folder("data", expected, ["cat", "dog"] * 25)
    for number in (4, 7, 21):
        (path / ("cat", "dog")[number % 2] / f"{number:05d}.png").write_text("no image")
    Image.new("RGB", (4, 20)).save(path / "cat/00030.png")
    source = DatasetSource(FilesConfig(path=str(path), size=(8, 8)))
    assert (source.count, source.size, source.channels, source.class_names) == (50, (8, 8), 3, ("cat", "dog"))
    actual, indices, labels = read(source)
    order = [*range(0, 50, 2), *range(1, 50, 2)]  # folder by folder
    valid = [index for index, number in enumerate(order) if number not in (4, 7, 21, 30)]
    assert indices.tolist() == valid
    np.testing.assert_array_equal(actual, expected[[order[index] for index in valid]])
    np.testing.assert_array_equal(labels, [order[index] % 2 for index in valid])


def test_a_shard_without_a_valid_image_is_empty(make_folder, small_shards):
    path = make_folder("data", noise(25))
    for number in range(20):
        (path / f"{number:05d}.png").write_text("no image")
    source = DatasetSource(FilesConfig(path=str(path), size=(8, 8)))
    shard = source.shard(0)
    assert (shard.images.shape, shard.indices.shape, shard.labels) == ((0, 8, 8, 3), (0,), None)
    assert len(read(source)[0]) == 5


def test_a_subset_covers_the_whole_data_set(real):
    source = DatasetSource(DigitsConfig(), 30)
    actual, indices, labels = read(source)
    some = subset_indices(1000, 30)
    assert some[0] < 100 < 900 < some[-1]
    assert len(set(some)) == 30
    np.testing.assert_array_equal(actual, real[some])
    np.testing.assert_array_equal(labels, DigitsConfig().open().labels[some])
    assert indices.tolist() == list(range(30))
    with pytest.raises(TesseraError, match=r"1,001 images are requested, but .* holds 1,000: lower --num-samples"):
        DatasetSource(DigitsConfig(), 1001)


def test_changed_data_change_the_plan(make_folder):
    path = make_folder("data", noise(3))
    plan = DatasetSource(FilesConfig(path=str(path), size=(8, 8))).plan
    assert DatasetSource(FilesConfig(path=str(path), size=(8, 8))).plan == plan
    Image.fromarray(noise(1, seed=9)[0]).resize((9, 9)).save(path / "00001.png")
    assert DatasetSource(FilesConfig(path=str(path), size=(8, 8))).plan != plan


def test_a_changed_parquet_file_changes_the_plan(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from tessera.data import FilesConfig

    config = FilesConfig(path=str(tmp_path), size=(8, 8), label=None)
    plans = []
    for content in (b"one", b"other"):
        parquet.write_table(arrow.table({"image": [content]}), tmp_path / "data.parquet")
        plans.append(DatasetSource(config).plan)
    assert plans[0] != plans[1]


# Folders


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_is_used_as_it_is(make_folder, small_shards, channels):
    expected = noise(45, (6, 10), channels)
    source = FolderSource(make_folder("samples", expected))
    actual, indices, labels = read(source)
    np.testing.assert_array_equal(actual, expected)
    assert (indices.tolist(), labels, source.class_names) == (list(range(45)), None, ())
    assert (source.size, source.channels, source.count) == ((6, 10), channels, 45)
    assert FolderSource(make_folder("samples", expected), 7).count == 7


def test_another_size_in_a_folder_is_an_error_that_names_the_file(make_folder):
    path = make_folder("samples", noise(5))
    Image.new("RGB", (8, 9)).save(path / "00003.png")
    with pytest.raises(TesseraError, match=r"00003\.png is 9 x 8, but .*00000\.png is 8 x 8.*--size to crop"):
        FolderSource(path).shard(0)


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("labels", [None, ["cat", "dog", "cat", "dog", "cat"]])
def test_a_damaged_file_in_a_folder_is_skipped_and_named(make_folder, capsys, number, labels):
    images = noise(5, (32, 32))
    path = make_folder("samples", images, labels)
    file = next(path.rglob(f"{number:05d}.png"))
    whole, order = file.read_bytes(), [0, 1, 2, 3, 4] if labels is None else [0, 2, 4, 1, 3]
    position = order.index(number)
    rest = [each for each in range(5) if each != position]
    for length in (0, 10, 40, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:length])
        source = FolderSource(path)
        capsys.readouterr()
        actual, indices, classes = read(source)
        assert (indices.tolist(), source.count, source.size) == (rest, 5, (32, 32))
        np.testing.assert_array_equal(actual, images[[order[each] for each in rest]])
        assert labels is None or (classes is not None and classes.tolist() == [order[each] % 2 for each in rest])
        assert list(source.skipped) == [file]
        assert re.search(rf"{number:05d}\.png is skipped: (damaged: |not an image)", source.skipped[file])
        read(source)
        assert capsys.readouterr().err.count("is skipped") <= 1
    for each in path.rglob("*.png"):
        each.write_bytes(b"no image")
    with pytest.raises(TesseraError, match=r"samples holds no image that can be scored: .*not an image"):
        FolderSource(path)


@pytest.mark.parametrize("place", [0, 1])
def test_gray_images_among_color_ones_are_read_in_color(make_folder, place):
    grey, color = noise(1, channels=1)[0], noise(2)
    path = make_folder("samples", color)
    Image.fromarray(grey[..., 0]).save(path / f"{place:05d}.png")
    expected = color.copy()
    expected[place] = grey.repeat(3, axis=2)
    source = FolderSource(path)
    assert source.channels == 3
    np.testing.assert_array_equal(source.shard(0).images, expected)


def test_a_folder_is_read_as_training_reads_it(tmp_path):
    """Rotated, transparent, in print colors, with a palette, with odd metadata: the same pixels as those of data."""
    pixels = noise(1, (8, 8))[0]
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    image.convert("CMYK").save(tmp_path / "print.jpg", exif=exif)
    image.quantize(7).save(tmp_path / "palette.png", transparency=3)
    Image.fromarray(noise(1, (8, 8), 4)[0]).save(tmp_path / "clear.png")
    source, data = FolderSource(tmp_path), DatasetSource(FilesConfig(path=str(tmp_path), size=(8, 8)))
    assert [path.name for path in source.paths] == [path.name for path in data.dataset.files()]
    actual = source.shard(0).images
    np.testing.assert_array_equal(actual, data.shard(0).images)
    np.testing.assert_array_equal(actual[3], np.rot90(pixels, -1))


def test_the_size_of_a_folder_is_that_of_upright_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(1, (6, 10))[0]).save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(noise(1, (10, 6))[0]).save(tmp_path / "b.jpg")
    assert FolderSource(tmp_path).size == (10, 6)
    assert len(FolderSource(tmp_path).shard(0).images) == 2


def test_16_bit_grayscale_is_grayscale(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    Image.fromarray(values).save(tmp_path / "a.png")
    source = FolderSource(tmp_path)
    assert source.channels == 1
    np.testing.assert_array_equal(source.shard(0).images[0, ..., 0], np.round(values * (255 / 65535)))


def test_the_grid_is_not_a_sample(make_folder):
    path = make_folder("samples", noise(3))
    Image.new("RGB", (99, 99)).save(path / "grid.png")
    assert len(read(FolderSource(path))[0]) == 3
    for file in path.glob("0*.png"):
        file.unlink()
    with pytest.raises(TesseraError, match="holds a grid of samples only"):
        FolderSource(path)


@pytest.mark.parametrize("content", [None, "notes.txt", ".hidden.png"])
def test_an_empty_folder_is_one_error(tmp_path, content):
    if content:
        (tmp_path / content).write_text("nothing")
    with pytest.raises(TesseraError, match="no images"):
        FolderSource(tmp_path)


def test_class_folders_name_the_classes(make_folder):
    source = FolderSource(make_folder("samples", noise(6), ["dog", "cat", "emu"] * 2))
    _, _, labels = read(source)
    assert source.class_names == ("cat", "dog", "emu")
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]


def sampled_images(folder: Path, classes: list) -> Path:
    for number, labels in enumerate(classes):
        images.save_png(folder / f"{number}.png", noise(1)[0], {"classes": labels, "seeds": [number]})
    return folder


def test_images_from_tessera_sample_have_their_class(tmp_path):
    source = FolderSource(sampled_images(tmp_path, [[3], [0], [2]]))
    assert read(source)[2].tolist() == [3, 0, 2]
    assert source.class_names == ()  # numbers


@pytest.mark.parametrize("classes", [[[1], None], [None, None]])
def test_one_image_without_a_class_means_no_labels(tmp_path, classes):
    assert read(FolderSource(sampled_images(tmp_path, classes)))[2] is None


@pytest.mark.parametrize("text", ["{", "[1]", '"text"', "{}", '{"classes": ["cat"]}', '{"classes": 5}'])
def test_settings_of_another_program_are_not_a_class(tmp_path, text):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(images.KEY, text)
    Image.fromarray(noise(1)[0]).save(tmp_path / "a.png", pnginfo=info)
    source = FolderSource(tmp_path)
    assert (source.class_names, source.count) == ((), 1)


def test_a_changed_folder_changes_the_plan(make_folder):
    path = make_folder("samples", noise(3))
    plan = FolderSource(path).plan
    assert FolderSource(path).plan == plan
    assert FolderSource(path, 2).plan != plan
    os.utime(path / "00001.png", (1, 1))
    assert FolderSource(path).plan != plan


# .npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_is_read_shard_by_shard(make_npz, small_shards, save, channels):
    expected, labels = noise(45, (6, 10), channels), np.arange(45) % 4
    source = NpzSource(make_npz("samples.npz", expected, labels, save=save))
    actual, indices, actual_labels = read(source)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(actual_labels, labels)
    assert (indices.tolist(), source.class_names) == (list(range(45)), ())
    assert (source.size, source.channels, source.count) == ((6, 10), channels, 45)
    backwards = [source.shard(index).images for index in (2, 0, 1, 1)]
    for index, part in zip((2, 0, 1, 1), backwards):
        np.testing.assert_array_equal(part, expected[shard_range(index, 45)])


def test_a_subset_of_an_npz_without_labels(make_npz, small_shards):
    expected = noise(45)
    source = NpzSource(make_npz("samples.npz", expected), 30)
    actual, _, labels = read(source)
    np.testing.assert_array_equal(actual, expected[subset_indices(45, 30)])
    assert (labels, source.class_names) == (None, ())


@pytest.mark.parametrize("count", [40, 300])
def test_a_subset_has_all_classes(make_folder, make_npz, count):
    """Files are sorted by class, so the first ones would all have the first class."""
    expected, labels = noise(400), np.arange(400) // 200
    for source in (
        FolderSource(make_folder("samples", expected, labels), count),
        NpzSource(make_npz("samples.npz", expected, labels), count),
        DatasetSource(FilesConfig(path=str(make_folder("data", expected, labels)), size=expected.shape[1:3]), count),
    ):
        actual, _, actual_labels = read(source)
        assert len(actual) == len(actual_labels) == count
        assert abs(int((actual_labels == 0).sum()) - count / 2) < count / 4
        np.testing.assert_array_equal(actual, expected[subset_indices(400, count)])
        np.testing.assert_array_equal(actual_labels, labels[subset_indices(400, count)])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_cut_anywhere_is_one_error(make_npz, save):
    path = make_npz("samples.npz", noise(30), np.zeros(30, np.int64), save=save)
    whole = path.read_bytes()
    for length in (0, 1, 30, 100, len(whole) // 2, len(whole) - 200, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TesseraError, match=r"samples\.npz is truncated or not an \.npz file"):
            NpzSource(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_npz_with_a_damaged_byte_is_read_correctly_or_is_one_error(make_npz, save, position, value):
    expected = noise(30, (4, 4))
    path = make_npz("samples.npz", expected, np.arange(30) % 3, save=save)
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= value
    path.write_bytes(content)
    try:
        source = NpzSource(path)
        actual, _, labels = read(source)
    except TesseraError:
        return
    np.testing.assert_array_equal(actual, expected)
    assert labels is None or labels.tolist() == [number % 3 for number in range(30)]


def test_an_array_shorter_than_its_header_is_truncated(tmp_path):
    path = tmp_path / "samples.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (9, 4, 4, 3)})
        member.write(bytes(8 * 48))
    with pytest.raises(TesseraError, match=r"samples\.npz is truncated: image 8 of 9 is missing"):
        NpzSource(path).shard(0)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (noise(4).astype(np.float32), r"arr_0 is float32 \[4, 8, 8, 3\]; expected uint8"),
        (noise(4).astype(np.int64), "arr_0 is int64"),
        (noise(4)[..., 0], r"arr_0 is uint8 \[4, 8, 8\]; expected uint8 \[N, H, W, 3 or 1\]"),
        (noise(4).transpose(0, 3, 1, 2), r"arr_0 is uint8 \[4, 3, 8, 8\]"),
        (noise(4, channels=4), r"arr_0 is uint8 \[4, 8, 8, 4\]"),
        (noise(0), "holds no images"),
        (noise(4, size=(0, 8)), r"arr_0 is uint8 \[4, 0, 8, 3\]"),
        (np.asfortranarray(noise(4)), "Fortran order"),
        (np.array([{}]), "arr_0 is object"),
    ],
)
def test_an_npz_of_another_type_or_shape_is_an_error(make_npz, array, message):
    with pytest.raises(TesseraError, match=message):
        NpzSource(make_npz("samples.npz", array))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(3), r"arr_1 has shape \[3\]; expected \[4\]"),
        (np.eye(4), r"arr_1 has shape \[4, 4\]; expected \[4\]"),
        (np.array([0, 1, -1, 2]), "arr_1 holds the label -1"),
        (np.array([0.5, 1, 2, 3]), "arr_1 is float64"),
        (np.array(["a", "b", "c", "d"]), "arr_1 is"),
        (np.array([0, 1, 2, 10**12]), "arr_1 holds the label 1000000000000"),
    ],
)
def test_invalid_labels_are_an_error(make_npz, labels, message):
    with pytest.raises(TesseraError, match=message):
        NpzSource(make_npz("samples.npz", noise(4), labels))


def test_a_missing_npz_and_one_with_other_keys(tmp_path):
    path = tmp_path / "samples.npz"
    with pytest.raises(TesseraError, match=r"samples\.npz does not exist"):
        NpzSource(path)
    path.write_text("text")
    with pytest.raises(TesseraError, match=r"truncated or not an \.npz file"):
        NpzSource(path)
    np.savez(path, images=noise(2), labels=np.arange(2))
    with pytest.raises(TesseraError, match=r"holds images, labels; expected the images as arr_0 \[N, H, W, C\]"):
        NpzSource(path)
    np.savez(path)
    with pytest.raises(TesseraError, match="holds nothing"):
        NpzSource(path)


def test_more_images_than_there_are_is_an_error(make_npz, make_folder):
    for kind, path in (
        (NpzSource, make_npz("samples.npz", noise(3))),
        (FolderSource, make_folder("samples", noise(3))),
    ):
        assert kind(path, 3).count == 3
        with pytest.raises(TesseraError, match="4 images are requested, but .* holds 3: lower --num-samples"):
            kind(path, 4)


# From paths to sources


def test_a_path_is_an_npz_a_folder_or_data(make_npz, make_folder):
    npz, folder = make_npz("samples.npz", noise(3)), make_folder("samples", noise(3))
    assert isinstance(open_samples(str(npz), None, None), NpzSource)
    assert isinstance(open_samples(str(folder), None, None), FolderSource)
    scaled = open_samples(str(folder), (4, 4), None)
    assert isinstance(scaled, DatasetSource)
    assert scaled.shard(0).images.shape == (3, 4, 4, 3)
    shutil.rmtree(folder)
    with pytest.raises(TesseraError, match="no data at"):
        open_samples(str(folder), None, None)


def test_plans_are_json(make_npz, make_folder, real):
    for source in (
        NpzSource(make_npz("s.npz", noise(3))),
        FolderSource(make_folder("s", noise(3))),
        DatasetSource(DigitsConfig(), 5),
    ):
        assert json.loads(json.dumps(source.plan))["count"] == source.count
