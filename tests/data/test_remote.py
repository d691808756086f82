"""Data in a bucket are read as the same data on a disk."""

import pickle
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tessera import storage
from tessera.data import Loader, index
from tessera.data.sampler import ShardedOrder
from tessera.errors import TesseraError

fsspec = pytest.importorskip("fsspec")
made = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "layout_files.py")))


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Path:
    """A folder that `file://` serves; the copies are in a folder of the test."""
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "cache"))
    for name, value in (("_known", {}), ("_stored", {}), ("_folders", set())):
        monkeypatch.setattr(storage, name, value)
    return tmp_path / "bucket"


def write(folder: Path, layout: str) -> str:
    """Nine images in files of a layout; returns the path to read."""
    if layout == "folders":
        for value in range(9):
            made.put(folder / f"{'ab'[value % 2]}/{value}.png", made.png(value))
            made.put(folder / f"{'ab'[value % 2]}/{value}.txt", f"number {value}")
        made.put(folder / "a/.hidden.png", made.png(99))
        return str(folder)
    for shard in range(3):
        values = range(3 * shard, 3 * shard + 3)
        if layout == "tars":
            members = [(f"{value}.png", made.png(value)) for value in values]
            made.tar(folder / f"{shard}.tar", *members, *((f"{value}.cls", f"c{value % 2}") for value in values))
        else:
            made.table(folder / f"{shard}.parquet", *values, label=[value % 2 for value in values])
    return str(folder / ("{0..2}.tar" if layout == "tars" else "*.parquet"))


@pytest.mark.parametrize("layout", ["folders", "tars", "tables"])
def test_every_layout_has_the_samples_of_the_local_one(bucket, layout):
    path = write(bucket, layout)
    local, remote = made.open_data(path), made.open_data(f"file://{path}")
    assert made.samples(remote) == made.samples(local)
    assert made.samples(pickle.loads(pickle.dumps(remote))) == made.samples(local)
    assert (remote.shapes() == local.shapes()).all()
    assert remote.name(0).startswith(f"file://{bucket}/")


@pytest.mark.parametrize("layout", ["tars", "tables"])
def test_shards_that_exceed_the_disk(bucket, layout, monkeypatch):
    path = f"file://{write(bucket, layout)}"
    expected = made.samples(made.open_data(path))
    monkeypatch.setenv("TESSERA_STORAGE_GB", "1e-6")  # a kilobyte: less than the shards
    if layout == "tables":
        with pytest.raises(TesseraError, match=r"more than TESSERA_STORAGE_GB .*set data.shuffle_shards"):
            made.open_data(path)
    else:  # bytes of each sample
        remote = made.open_data(path)
        for copy in (storage._root()).rglob("*.tar"):
            copy.unlink()
        assert made.samples(remote) == expected
        assert not list(storage._root().rglob("*.tar"))
    windowed = made.open_data(path, shuffle_shards=1)
    assert made.samples(windowed) == expected


def test_batches_in_windows_of_shards_are_those_of_local_data(bucket):
    path, batches = write(bucket, "tars"), []
    for place in (path, f"file://{path}"):
        data = made.open_data(place, shuffle_shards=2)
        order = ShardedOrder(data.shard_ids(), 2, 2, seed=0)
        reading = Loader(data, 2, 0, order=order).batches(4)
        batches.append([next(reading).pixels.numpy() for _ in range(9)])
        reading.close()
    assert np.array_equal(*batches)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_an_epoch_has_each_sample_once_and_few_shards_at_a_time(window):
    shards = np.repeat(np.arange(7), [3, 5, 1, 4, 6, 2, 9])
    order = ShardedOrder(shards, window, len(shards), seed=3)
    epochs = [order.batch(epoch * len(shards)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(len(shards)))
        groups, start = [], 0
        while start < len(epoch):  # each window is complete before the next
            members: set[int] = set()
            end = start
            while end < len(epoch) and len(members | {int(shards[epoch[end]])}) <= window:
                members.add(int(shards[epoch[end]]))
                end += 1
            assert end - start == np.isin(shards, list(members)).sum()
            groups.append(members)
            start = end
        assert len(groups) == -(-7 // window)
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(order.batch(len(shards)), ShardedOrder(shards, window, len(shards), 3).batch(len(shards)))


@pytest.mark.parametrize("folder", [".", "elsewhere"], ids=["above the cache folder", "beside it"])
def test_a_local_index_of_two_buckets_names_them_and_not_the_cache_folder(bucket, folder, tmp_path, monkeypatch):
    files = fsspec.filesystem("memory")
    addresses = [f"memory://{tmp_path.name}-{name}" for name in "ab"]
    for value, address in enumerate(addresses):
        files.pipe(f"{address}/{value}.png", made.png(value))
    index.write(made.open_data(addresses).table, tmp_path / folder / "index.parquet")
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "other"))  # as on another machine
    opened = made.open_data(tmp_path / folder / "index.parquet")
    assert [opened.name(number) for number in range(2)] == [f"{addresses[0]}/0.png", f"{addresses[1]}/1.png"]
    assert [opened.encoded(number) for number in range(2)] == [made.png(0), made.png(1)]
