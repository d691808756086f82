"""Writing files so that they are whole or absent: nothing is lost to a kill or a full disk in mid-write."""

import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

import numpy as np

from tessera.errors import TesseraError

PARTIAL = ".partial"  # the ending of a folder or file that is being written


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to fill beside the target; it takes the target's name, on disk to the last byte, at the end.

    If anything fails the half-written folder is removed and the target is untouched. Raises TesseraError if the
    target exists and holds something.
    """
    partial = begin(target)
    try:
        partial.mkdir(parents=True)
        yield partial
        commit(partial, target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TesseraError(f"cannot write {target}: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def begin(target: Path) -> Path:
    """The place beside a target where it is to be made, with nothing there. TesseraError if the target exists."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TesseraError(f"{target} exists already: remove it or give another name")
    partial = target.with_name(target.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    return partial


def commit(partial: Path, target: Path) -> None:
    """Push all of a folder to the disk, then give it its name. Raises OSError."""
    for path in sorted(partial.rglob("*")):
        fsync(path)
    fsync(partial)
    partial.rename(target)  # replaces an empty folder
    fsync(target.parent)


@contextmanager
def atomic_file(target: Path, writer: str = "") -> Iterator[Path]:
    """Yield the path of a file to write beside the target; it takes the target's name, on disk to the last byte, at the
    end. If anything fails it is removed and the target is untouched. Raises TesseraError if it cannot be written.

    writer: a name, where several may write the same target at once.
    """
    partial = target.with_name(target.name + (f".{writer}" if writer else "") + PARTIAL)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        fsync(partial)
        partial.replace(target)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise TesseraError(f"cannot write {target}: {error.strerror or error}") from error
        raise


def atomic_write(target: Path, data: bytes | str) -> None:
    """Write a file under another name, then rename it over the target. Raises TesseraError if that cannot be done."""
    with atomic_file(target) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def write_array(target: Path, array: np.ndarray) -> None:
    """An .npy file, whole or absent. Raises TesseraError if it cannot be written."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    atomic_write(target, buffer.getvalue())


def read_array(path: Path) -> np.ndarray:
    """An .npy file as a memory map. Raises TesseraError if it is damaged."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise TesseraError(f"{path} is damaged: {error}; remove it to have it made again") from None


def remove_partials(folder: Path) -> None:
    """Clear away what a killed program left half-written in a folder."""
    for path in folder.glob("*" + PARTIAL):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


class InUse(TesseraError):
    """Another process holds a folder."""


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Make a folder if need be and hold it for one process at a time, where the system can.

    Raises TesseraError if it cannot be made, and InUse if another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TesseraError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(f"{folder} is in use by another process: wait for it, or choose another folder") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


@contextmanager
def wait_for_lock(folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """As `alone`, after waiting for whoever holds the folder; `waiting` is called once if so."""
    with ExitStack() as held:
        for tries in count():
            try:
                held.enter_context(exclusive_lock(folder))
                break
            except InUse:
                if not tries:
                    waiting()
                time.sleep(1)
        yield


def fsync(path: Path) -> None:
    """Push a file or folder to the disk, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder() -> Path:
    """Where what can be made again is kept between runs: TESSERA_CACHE, or the place this system has for it."""
    if told := os.environ.get("TESSERA_CACHE"):
        return Path(told).expanduser()
    usual = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return Path(usual or "~/.cache").expanduser() / "tessera"
