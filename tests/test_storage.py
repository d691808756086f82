"""Objects in a bucket: what is read, what is kept, and what happens when a server or a network fails."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tessera import storage
from tessera.errors import TesseraError

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def bucket(tmp_path, fresh_storage) -> str:
    """The address of an empty remote folder, which `file` serves; its copies are in a folder of the test."""
    (tmp_path / "bucket").mkdir()
    return f"file://{tmp_path}/bucket"


def put(bucket: str, name: str, content: bytes) -> Path:
    path = Path(bucket.removeprefix("file://"), name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/a/b.tar", "gs://b/c", "hf://datasets/o/n/x.parquet", "https://h.org:1/x/y.tar", "file:///tmp/x"],
)
def test_an_address_and_its_path_name_each_other(url):
    path = storage.locate(url)
    assert storage.is_remote(path)
    assert storage.address(path) == url
    assert storage.locate(Path(url)) == path  # whose slashes are one


def test_what_is_above_all_buckets_has_an_address():
    folder = storage.locate("s3://bucket").parent
    assert storage.address(folder) == "s3://"
    assert storage.locate("s3://") == folder


def test_other_paths_are_local(tmp_path):
    for path in (tmp_path / "a", Path("a/b"), Path("c:/x"), Path("folder:test")):
        assert storage.locate(path) == path
        assert not storage.is_remote(path)
        assert storage.fetch(path) is path


def test_an_object_is_downloaded_once_and_again_when_it_was_removed(bucket, monkeypatch):
    source = put(bucket, "a/x", b"content")
    path = storage.locate(f"{bucket}/a/x")
    assert storage.listing(storage.locate(bucket)) == ["a/x"]
    assert storage.read(path, 3, 2) == b"te"
    hidden = source.rename(source.with_name("hidden"))
    assert storage.read(path) == b"content"  # the copy
    path.unlink()
    with pytest.raises(TesseraError, match="does not exist, or its bucket"):
        storage.read(path)
    hidden.rename(source)


def test_a_changed_object_is_an_error_and_not_read(bucket):
    source = put(bucket, "x", b"content")
    path = storage.locate(f"{bucket}/x")
    storage.fetch(path)
    path.unlink()
    source.write_bytes(b"other content")
    with pytest.raises(TesseraError, match="has changed since its index.*7 bytes then, 13 now; write the index again"):
        storage.fetch(path)
    assert not path.exists()


def test_a_copy_of_an_earlier_version_is_replaced(bucket, monkeypatch):
    source = put(bucket, "x", b"content")
    path = storage.fetch(storage.locate(f"{bucket}/x"))
    source.write_bytes(b"other 1")
    os.utime(source, (1, 1))
    monkeypatch.setattr(storage, "_known", {})  # another process
    assert storage.read(path) == b"other 1"


def test_copies_take_no_more_than_the_limit_and_the_oldest_go(bucket, monkeypatch):
    monkeypatch.setenv("TESSERA_STORAGE_GB", "5e-6")  # 5,000 bytes
    paths = [storage.locate(f"{bucket}/{number}") for number in range(8)]
    for number, path in enumerate(paths):
        put(bucket, str(number), bytes(1000))
        storage.fetch(path)
        storage.fetch(paths[0])  # used all the time
        assert sum(each.stat().st_size for each in path.parent.iterdir()) <= 5000
    assert paths[0].exists()
    assert paths[7].exists()
    assert not paths[1].exists()
    assert storage.read(paths[1]) == bytes(1000)  # downloaded again


def test_what_other_processes_download_counts_for_the_limit(bucket, monkeypatch):
    monkeypatch.setenv("TESSERA_STORAGE_GB", "1e-5")  # 10,000 bytes
    folder = storage.locate(bucket)
    for number in range(20):
        put(bucket, str(number), bytes(1000))
        storage.fetch(folder / str(number))
        (folder / f"other-{number}").write_bytes(bytes(1000))  # by another process, that makes no room
        assert sum(each.stat().st_size for each in folder.iterdir()) <= 11_000


def test_a_file_that_is_being_written_is_not_removed_for_another(bucket, monkeypatch):
    monkeypatch.setenv("TESSERA_STORAGE_GB", "2e-6")  # 2,000 bytes
    folder = storage.locate(bucket)
    partial, killed = folder / "x.1.partial", folder / "x.2.partial"
    folder.mkdir(parents=True)
    for path in (partial, killed):
        path.write_bytes(bytes(1000))
    os.utime(partial, (1, time.time()))  # begun long ago, and written since
    os.utime(killed, (1, 1))
    for number in range(3):
        put(bucket, str(number), bytes(1000))
        storage.fetch(folder / str(number))
    assert partial.exists()
    assert not killed.exists()


def test_a_cache_folder_that_cannot_be_written_is_named(bucket, tmp_path, monkeypatch):
    put(bucket, "x", b"content")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(TesseraError, match="cannot download, because of .*file/cache.*Not a directory.*TESSERA_CACHE"):
        storage.fetch(storage.locate(f"{bucket}/x"))


def test_a_name_with_the_characters_of_patterns_is_itself(bucket):
    put(bucket, "a[1]?*.tar", b"content")
    path = storage.locate(f"{bucket}/a[1]?*.tar")
    assert storage.matching(path) == [path]
    assert storage.matching(storage.locate(f"{bucket}/a*.tar")) == [path]


def test_wrong_limits_and_missing_libraries_are_named(monkeypatch, bucket):
    monkeypatch.setenv("TESSERA_STORAGE_GB", "much")
    with pytest.raises(TesseraError, match="TESSERA_STORAGE_GB is 'much'"):
        storage.limit()
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    with pytest.raises(TesseraError, match="needs another library: pip install 'tessera\\[gcs\\]'"):
        storage.exists(storage.locate("gs://bucket/x"))


class Failing:
    """A file system that fails some times before it works."""

    protocol = "s3"

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times = error, times

    def info(self, name: str) -> dict:
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return {"type": "file", "size": 1}


@pytest.fixture
def failing(monkeypatch):
    """What every address leads to, and the waits between requests."""
    waits: list[float] = []
    monkeypatch.setattr(storage, "_known", {})
    monkeypatch.setattr(storage.time, "sleep", waits.append)

    def use(error: Exception, times: int) -> list[float]:
        files = Failing(error, times)
        monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **options: (files, url))
        return waits

    return use


def test_requests_are_repeated_with_growing_waits(failing):
    waits = failing(OSError("503 SlowDown"), 5)
    assert storage.exists(storage.locate("s3://bucket/x"))
    assert len(waits) == 5
    longest = [storage.FIRST_WAIT * 2**number for number in range(5)]
    assert all(each / 2 <= wait <= each for wait, each in zip(waits, longest))
    assert len(set(np.array(waits) / longest)) == 5  # at random, so that many processes do not come at once


def test_a_server_that_keeps_failing_is_one_error(failing):
    waits = failing(OSError("503 SlowDown"), 100)
    with pytest.raises(TesseraError, match=r"x: could not read in 8 attempts.*SlowDown(.|\n)*run the same command"):
        storage.exists(storage.locate("s3://bucket/x"))
    assert len(waits) == storage.TRIES - 1


def test_missing_permission_is_not_tried_again(failing):
    waits = failing(PermissionError("Access Denied"), 1)
    with pytest.raises(TesseraError, match="without permission.*AWS_ACCESS_KEY_ID"):
        storage.exists(storage.locate("s3://bucket/x"))
    assert not waits


def test_what_is_uploaded_is_there_and_complete(bucket, tmp_path):
    path = storage.locate(f"{bucket}/new/x")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"content")
    storage.publish(path)
    shutil.rmtree(path.parent)
    assert storage.read(path) == b"content"
