"""Public data sets, where they are present."""

import os
import zipfile
from itertools import islice
from pathlib import Path

import pytest

from tessera.data import FilesConfig, Loader

SHARED = Path(os.environ.get("TESSERA_SHARED") or Path(__file__).parents[2] / "../shared/data")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is absent: set TESSERA_SHARED to the folder of shared data")
    return path


def test_cifar10_opens_with_ten_classes():
    pytest.importorskip("pyarrow")
    source = FilesConfig(path=str(shared("cifar10/test.parquet")), size=32).open()
    assert len(source) == 10_000
    assert source.class_names == CIFAR10
    loader = Loader(source, 64, seed=0)
    batch = loader.load_batch(0)
    assert batch.pixels.shape == (64, 3, 32, 32)
    assert len(set(batch.condition.label.tolist())) > 5
    assert not loader.invalid_samples


def test_emoji_open_by_the_name_of_their_group():
    pytest.importorskip("pyarrow")
    path = str(shared("emoji/train.parquet"))
    source = FilesConfig(path=path, size=64, label="group").open()
    assert len(source) == 2789
    assert 5 < len(source.class_names) < 20
    assert source.pixels(0).shape == (3, 64, 64)


def test_emoji_open_without_classes_and_with_their_names_as_captions():
    parquet = pytest.importorskip("pyarrow.parquet")
    path = shared("emoji/train.parquet")
    source = FilesConfig(path=str(path), size=64).open()
    assert source.class_names == ()
    assert [source.caption(i) for i in range(len(source))] == parquet.read_table(path)["text"].to_pylist()
    assert source.shape(0) == (64, 64)


def test_tiles_open_as_nested_class_folders_and_all_are_valid(tmp_path):
    with zipfile.ZipFile(shared("tiles/tiles.zip")) as archive:
        archive.extractall(tmp_path)
    source = FilesConfig(path=str(tmp_path), size=32, upscale=True).open()
    assert len(source) > 3000
    assert source.class_names == tuple(sorted(path.name for path in tmp_path.iterdir() if path.is_dir()))
    loader = Loader(source, 256, seed=0)
    for batch in islice(loader.batches(), 4):
        assert batch.pixels.shape == (256, 3, 32, 32)
    assert not loader.invalid_samples
