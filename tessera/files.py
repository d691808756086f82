"""Atomic writes, folder locks and the cache folder. An interrupted write leaves the old file or none."""

import errno
import io
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from filelock import FileLock, Timeout

from tessera.errors import TesseraError

LOCK = ".lock"  # the file in a locked folder; it stays when the lock is released
PARTIAL = ".partial"  # suffix of a file or folder that is being written


def _cannot_write(target: Path, error: OSError) -> TesseraError:
    return TesseraError(f"cannot write {target}: {error.strerror or error}")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside the target to fill. At the end it is synced to disk and renamed to the target.

    If anything fails, the partial folder is removed and the target is unchanged. Raises TesseraError if it cannot be
    written or if the target exists and is not an empty folder.
    """
    partial = begin(target)
    try:
        partial.mkdir(parents=True)
        yield partial
        commit(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise _cannot_write(target, error) from error
        raise


def begin(target: Path) -> Path:
    """The path of the partial folder of a target, with nothing there. Raises TesseraError if the target exists."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TesseraError(f"{target} exists already: remove it or give another name")
    partial = target.with_name(target.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    return partial


def commit(partial: Path, target: Path) -> None:
    """Sync a partial folder to disk and rename it to the target. Raises OSError."""
    for path in sorted(partial.rglob("*")):
        fsync(path)
    fsync(partial)
    partial.rename(target)  # replaces an empty folder
    fsync(target.parent)


@contextmanager
def atomic_file(target: Path, writer: str = "") -> Iterator[Path]:
    """Yield the path of a file beside the target to write. At the end it is synced to disk and renamed to the target.

    If anything fails, the partial file is removed and the target is unchanged. Raises TesseraError if it cannot be
    written. writer: a name for each process, where several may write one target at the same time.
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
            raise _cannot_write(target, error) from error
        raise


def this_writer() -> str:
    """A name of this process, for `atomic_file` where processes of several machines write one target."""
    return f"{platform.node()}-{os.getpid()}"


def atomic_write(target: Path, data: bytes | str, writer: str = "") -> None:
    """Write a file under a temporary name and rename it to the target. writer: as in `atomic_file`.

    Raises TesseraError.
    """
    with atomic_file(target, writer) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def write_array(target: Path, array: np.ndarray, writer: str = "") -> None:
    """Write an .npy file atomically. writer: as in `atomic_file`. Raises TesseraError."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    atomic_write(target, buffer.getvalue(), writer)


def read_array(path: Path) -> np.ndarray:
    """An .npy file as a memory map. Raises TesseraError if it is damaged."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise TesseraError(f"{path} is damaged: {error}; remove it to have it made again") from None


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """The content of a JSON file that holds an object. Raises TesseraError, whose message ends with the remedy."""
    hint = f"; {remedy}" if remedy else ""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TesseraError(f"cannot read {path}: {error}{hint}") from None
    if not isinstance(data, dict):
        raise TesseraError(f"{path} holds {type(data).__name__}; expected an object{hint}")
    return data


def remove_partials(folder: Path) -> None:
    """Remove the partial files and folders that a killed process left in a folder."""
    for path in folder.glob("*" + PARTIAL):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


class InUse(TesseraError):
    """Another process has locked the folder."""


@contextmanager
def exclusive_lock(folder: Path, on_wait: Callable[[], None] | None = None, name: str = "") -> Iterator[None]:
    """Create a folder if necessary and lock it for this process. The lock of a killed process does not block.

    on_wait: called once if another process has locked the folder; then this process waits for it. Without on_wait
    InUse is raised. name: of the folder in errors, if it is a copy. Raises TesseraError if the folder cannot be
    written.
    """
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if on_wait is None:
                raise InUse(
                    f"{name or folder} is in use by another process: wait for it, or choose another folder"
                ) from None
            on_wait()
            lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
            raise _cannot_write(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def fsync(path: Path) -> None:
    """Write a file or folder through to the disk, where the system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder() -> Path:
    """The folder for files that can be made again: TESSERA_CACHE, or the system's cache folder of the user."""
    folder = os.environ.get("TESSERA_CACHE")
    return Path(folder).expanduser() if folder else platformdirs.user_cache_path("tessera", appauthor=False)
