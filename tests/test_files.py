"""Files are whole or absent, whatever happens while they are written."""

import errno
import os
import threading
from contextlib import ExitStack

import pytest

from tessera import files
from tessera.errors import TesseraError
from tessera.files import PARTIAL, atomic_file, atomic_folder, atomic_write, remove_partials


def full_disk(*_args, **_named):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
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

    monkeypatch.setattr(files, "sync", recorded)
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
def test_what_exists_is_refused_and_untouched(tmp_path, kind):
    target = tmp_path / "bundle"
    mine = target
    if kind == "folder":
        target.mkdir()
        mine = target / "mine.txt"
    mine.write_text("precious")
    with pytest.raises(TesseraError, match="bundle exists already"), atomic_folder(target):
        pytest.fail("the folder must not be opened")
    assert mine.read_text() == "precious"
    assert len(tree(tmp_path)) == (2 if kind == "folder" else 1)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_a_failure_in_mid_write_leaves_nothing(tmp_path, error):
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


def test_remains_of_a_killed_program_do_not_end_up_in_the_folder(tmp_path):
    remains = tmp_path / ("bundle" + PARTIAL)
    remains.mkdir()
    (remains / "stale").write_text("stale")
    with atomic_folder(tmp_path / "bundle") as partial:
        (partial / "a").write_text("a")
    assert tree(tmp_path) == ["bundle", "bundle/a"]


def test_a_file_is_replaced_whole(tmp_path):
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


def test_a_folder_that_cannot_be_is_a_readable_error(tmp_path):
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


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path):
    with files.exclusive_lock(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
        with pytest.raises(TesseraError, match="in use by another process"), files.exclusive_lock(tmp_path / "run"):
            pass
    with files.exclusive_lock(tmp_path / "run"):
        pass
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TesseraError, match="cannot write"), files.exclusive_lock(tmp_path / "file"):
        pass


def test_in_turn_waits_for_whoever_holds_a_folder(tmp_path):
    waited = threading.Event()
    with ExitStack() as first:
        first.enter_context(files.exclusive_lock(tmp_path))
        release = threading.Thread(target=lambda: waited.wait() and first.pop_all().close())
        release.start()
        with files.wait_for_lock(tmp_path, waited.set):
            assert waited.is_set()
            with pytest.raises(files.InUse), files.exclusive_lock(tmp_path):
                pass
        release.join()
    with files.wait_for_lock(tmp_path, lambda: pytest.fail("nobody holds it")):
        pass


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    target = tmp_path / "file"
    with atomic_file(target, "one") as first, atomic_file(target, "other") as second:
        first.write_text("same")
        second.write_text("same")
    assert target.read_text() == "same"
    assert list(tmp_path.iterdir()) == [target]
