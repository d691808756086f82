"""Atomic writes and locks of folders."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from tessera import files
from tessera.errors import TesseraError
from tessera.files import PARTIAL, atomic_file, atomic_folder, atomic_write, remove_partials


def full_disk(*_args, **_named):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "deep" / "bundle"
    with atomic_folder(target) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "inner" / "a.txt").read_text() == "a"
    assert tree(tmp_path) == ["deep", "deep/bundle", "deep/bundle/inner", "deep/bundle/inner/a.txt"]


def test_every_byte_is_on_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    target, synced = tmp_path / "bundle", []

    def recorded(path):
        synced.append((path.relative_to(tmp_path).as_posix(), target.exists()))

    monkeypatch.setattr(files, "fsync", recorded)
    with atomic_folder(target) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a").write_text("a")
    before = [path for path, named in synced if not named]
    assert sorted(before) == ["bundle.partial", "bundle.partial/inner", "bundle.partial/inner/a"]
    assert synced[-1] == (".", True)  # then the name itself
    synced.clear()
    atomic_write(tmp_path / "b", "b")
    assert synced[0][0] == "b.partial"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "bundle").mkdir()
    with atomic_folder(tmp_path / "bundle") as partial:
        (partial / "a").write_text("a")
    assert tree(tmp_path) == ["bundle", "bundle/a"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_existing_target_is_an_error_and_unchanged(tmp_path, kind):
    target = tmp_path / "bundle"
    content = target
    if kind == "folder":
        target.mkdir()
        content = target / "content.txt"
    content.write_text("kept")
    with pytest.raises(TesseraError, match="bundle exists already"), atomic_folder(target):
        pytest.fail("the folder must not be opened")
    assert content.read_text() == "kept"
    assert len(tree(tmp_path)) == (2 if kind == "folder" else 1)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_a_failure_while_writing_leaves_nothing(tmp_path, error):
    expected = TesseraError if isinstance(error, OSError) else type(error)

    def write():
        with atomic_folder(tmp_path / "bundle") as partial:
            (partial / "a").write_text("a")
            raise error

    with pytest.raises(expected) as caught:
        write()
    assert tree(tmp_path) == []
    if isinstance(error, OSError):
        assert "bundle: No space left on device" in str(caught.value)


def test_a_disk_that_fails_while_syncing_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(TesseraError, match="No space left"), atomic_folder(tmp_path / "bundle") as partial:
        (partial / "a").write_text("a")
    with pytest.raises(TesseraError, match="No space left"):
        atomic_write(tmp_path / "a.txt", "a")
    assert tree(tmp_path) == []


def test_the_partial_folder_of_a_killed_process_is_discarded(tmp_path):
    remains = tmp_path / ("bundle" + PARTIAL)
    remains.mkdir()
    (remains / "stale").write_text("stale")
    with atomic_folder(tmp_path / "bundle") as partial:
        (partial / "a").write_text("a")
    assert tree(tmp_path) == ["bundle", "bundle/a"]


def test_a_file_is_replaced_atomically(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    atomic_write(path, "one")
    atomic_write(path, b"two \xc3\xa9")
    assert path.read_text(encoding="utf-8") == "two é"
    assert tree(tmp_path) == ["deep", "deep/a.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    atomic_write(path, "one")
    monkeypatch.setattr(type(path), "replace", full_disk)
    with pytest.raises(TesseraError, match=r"a\.txt: No space left"):
        atomic_write(path, "two")
    assert path.read_text() == "one"
    assert tree(tmp_path) == ["a.txt"]


def test_a_target_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TesseraError, match="cannot write"):
        atomic_write(tmp_path / "file" / "a.txt", "a")
    with pytest.raises(TesseraError, match="cannot write"), atomic_folder(tmp_path / "file" / "bundle"):
        pytest.fail("the folder must not be opened")


def test_remove_partials(tmp_path):
    (tmp_path / ("a" + PARTIAL)).write_text("")
    (tmp_path / ("b" + PARTIAL)).mkdir()
    (tmp_path / ("b" + PARTIAL) / "inner").write_text("")
    (tmp_path / "c").write_text("")
    remove_partials(tmp_path)
    assert tree(tmp_path) == ["c"]


def test_a_folder_is_locked_by_one_process_at_a_time(tmp_path):
    with files.exclusive_lock(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
        with pytest.raises(files.InUse, match="run is in use by another process"):
            files.exclusive_lock(tmp_path / "run").__enter__()
    with files.exclusive_lock(tmp_path / "run"):
        pass
    assert tree(tmp_path) == ["run", "run/.lock"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TesseraError, match="cannot write"):
        files.exclusive_lock(tmp_path / "file").__enter__()


LOCK = """
import sys, time
from pathlib import Path
from tessera.files import exclusive_lock
with exclusive_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(3600)
"""


def test_the_lock_of_a_killed_process_does_not_block(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", LOCK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(files.InUse):
        files.exclusive_lock(tmp_path).__enter__()
    with files.exclusive_lock(tmp_path, on_wait=process.kill):
        assert process.wait() == -signal.SIGKILL
    process.stdout.close()


def test_a_process_that_does_not_have_to_wait_does_not_report_it(tmp_path):
    with files.exclusive_lock(tmp_path, on_wait=lambda: pytest.fail("nobody holds the lock")):
        pass


def test_two_processes_may_write_one_file(tmp_path):
    target = tmp_path / "file"
    with atomic_file(target, "one") as first, atomic_file(target, "other") as second:
        first.write_text("same")
        second.write_text("same")
    assert target.read_text() == "same"
    assert list(tmp_path.iterdir()) == [target]


def test_read_json(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(TesseraError, match="cannot read .*a.json.*; write it again"):
        files.read_json(path, "write it again")
    for content, message in (("{", "cannot read"), ("[]", "holds list; expected an object"), ("\xff", "cannot read")):
        path.write_text(content, encoding="latin-1")
        with pytest.raises(TesseraError, match=message):
            files.read_json(path)
    path.write_text('{"a": 1}')
    assert files.read_json(path) == {"a": 1}


def test_the_cache_folder_is_that_of_the_environment_or_the_system(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_CACHE", str(tmp_path))
    assert files.cache_folder() == tmp_path
    monkeypatch.delenv("TESSERA_CACHE")
    assert files.cache_folder().name == "tessera"
