"""Objects in buckets and on web servers (s3://, gs://, hf://, https://), through fsspec, which only this file imports.

An object has a path in the cache folder that stands for its address: `locate` gives it, `fetch` downloads the object to
it, `publish` uploads it. So everything else works with paths, and paths of local files are used as they are.

Downloaded files take at most TESSERA_STORAGE_GB; beyond that the files that were not used for longest are removed. The
size and the ETag of each object are known from one listing of its folder, or from an index; an object that no longer
has them is an error. Requests are repeated with growing random waits.
"""

import contextlib
import errno
import hashlib
import logging
import os
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

from tessera.errors import TesseraError
from tessera.files import PARTIAL, cache_folder

PROTOCOLS = ("s3", "gs", "hf", "https", "http", "memory", "file")  # the last two for tests
ADDRESS = re.compile(rf"({'|'.join(PROTOCOLS)}):/+(.*?)/*")  # `Path` makes one slash of two
INSTALL = {
    "s3": "pip install 'tessera[storage]'",
    "gs": "pip install 'tessera[gcs]'",
    "hf": "pip install 'tessera[hub]'",
}
CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "set HF_TOKEN to a token that may read it, and accept its terms on its page if it is gated",
}
ABSENT = {"hf": "its repository does not, or HF_TOKEN has no access to it"}  # the hub does not say which
READ_ONLY = ("hf", "https", "http")  # each file written to the hub would be a commit
# Requests of S3 are repeated here alone, so that waits do not multiply.
OPTIONS: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": {"retries": {"max_attempts": 0}}}}
TRIES, FIRST_WAIT, LONGEST_WAIT = 8, 0.1, 10.0  # attempts of a request, seconds between them
FEWER_TRIES = {"gs": 3, "hf": 5}  # their libraries repeat many requests too, 6 times in half a minute
ETAGS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "created", "LastModified")  # what changes with an object
THREADS = 16
PARTIAL_SECONDS = 86_400  # after which a partial file is of a process that was killed
WALK_SHARE = 16  # of the limit: what a process adds before it looks again for what others added

T = TypeVar("T")


class State(NamedTuple):
    """What is known of an object, with the names of `os.stat_result`: mtime is a hash of the ETag."""

    st_size: int
    st_mtime_ns: int
    st_mode: int = 0

    @property
    def st_mtime(self) -> float:
        return self.st_mtime_ns / 1e9


_known: dict[str, State] = {}  # by path
_folders: set[str] = set()
_locks = [Lock() for _ in range(64)]  # of paths, by their hash: no file is downloaded twice at once
_room_lock = Lock()
_stored: dict[str, int] = {}  # bytes of all downloaded files, by folder
_added: dict[str, int] = {}  # the part of them that was not there when this process last looked


def _root() -> Path:
    return cache_folder().absolute() / "storage/objects"


def unpacked_folder() -> Path:
    """For files that are made of downloaded ones, and are removed like them."""
    return _root().with_name("unpacked")


def locate(text: str | Path) -> Path:
    """The path that stands for an address; any other text is a local path."""
    match = ADDRESS.fullmatch(str(text))
    return Path(text).expanduser() if match is None else _root() / match[1] / match[2]


def is_remote(path: Path) -> bool:
    """Whether a path stands for an address."""
    return str(path).startswith(f"{_root()}{os.sep}")


def holds_remote(folder: Path) -> bool:
    """Whether a folder is remote, or above the paths that are."""
    return is_remote(folder) or _root().is_relative_to(folder)


def address(path: Path) -> str:
    """The address of a path; of a local path itself."""
    if not is_remote(path):
        return str(path)
    protocol, *parts = path.relative_to(_root()).parts
    return f"{protocol}://{'/' if protocol == 'file' else ''}{'/'.join(parts)}"


@cache
def _prepare(protocol: str) -> None:
    """Set up the library of a protocol before it is imported: errors and progress are reported here alone."""
    if protocol == "gs":
        # Otherwise gcsfs asks for the type of each bucket by gRPC, which needs credentials even of public buckets.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        if not os.environ.get("GCSFS_DEBUG"):
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
            logging.getLogger("google.auth").setLevel(logging.ERROR)  # no credentials, which public buckets do not need
    elif protocol == "hf":
        from huggingface_hub.utils import disable_progress_bars

        for name in ("huggingface_hub.http_get", "huggingface_hub.xet_get"):
            disable_progress_bars(name)


def _is_refused(error: BaseException) -> bool:
    """Whether an error means missing credentials or permission; each library has errors of its own."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None) or getattr(error, "status", None)  # of huggingface_hub, aiohttp
    if status is None:
        status = getattr(error, "code", None)  # of gcsfs
    return (
        "Credentials" in type(error).__name__
        or isinstance(error, PermissionError)
        or str(status) in ("401", "403")
        or (type(error) is OSError and str(error).startswith("Forbidden"))  # of gcsfs
    )


def _is_full(error: BaseException) -> bool:
    """Whether an error means that the disk has no room."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def absence(url: str) -> str:
    """What may not exist if an address leads to nothing."""
    return f"{url} does not exist, or {ABSENT.get(url.partition(':')[0], 'its bucket does not')}"


def check_writable(url: str) -> None:
    """Raise TesseraError if nothing can be written to such an address."""
    protocol = url.partition(":")[0]
    if protocol in READ_ONLY and ADDRESS.fullmatch(url):
        raise TesseraError(
            f"cannot write {url}: {protocol}:// is read only; give a local folder, s3:// or gs://"
            + ("; `hf upload` puts a local folder on the hub" if protocol == "hf" else "")
        )


def _call(url: str, action: str, function: Callable[[Any, str], T]) -> T:
    """`function(file system, path)`, repeated while it fails for reasons that may pass.

    Raises FileNotFoundError if there is no such object, else TesseraError.
    """
    protocol, start, problem = url.partition(":")[0], time.monotonic(), ""
    tries = min(FEWER_TRIES.get(protocol, TRIES), TRIES)
    for attempt in range(tries):
        try:
            from fsspec.core import url_to_fs

            _prepare(protocol)
            files, path = url_to_fs(url, use_listings_cache=False, **OPTIONS.get(protocol, {}))
            files.retries = 1  # of s3fs
            if protocol == "hf":
                files.dircache.clear()  # it has listings in spite of use_listings_cache
            return function(files, path)
        except ImportError:
            install = INSTALL.get(protocol, INSTALL["s3"])
            raise TesseraError(f"{url}: reading {protocol}:// needs another library: {install}") from None
        except (FileExistsError, TesseraError):
            raise
        except Exception as raised:  # each library has errors of its own
            error: BaseException = raised
            named = str(getattr(error, "filename", None) or "")
            if named.startswith(f"{cache_folder().absolute()}{os.sep}") and not _is_full(error):
                raise TesseraError(
                    f"{url}: cannot {action}, because of {named}: {getattr(error, 'strerror', error)}; check the cache "
                    "folder, or set TESSERA_CACHE to another one"
                ) from None
            if isinstance(error, FileNotFoundError):
                # Of web servers, fsspec reports every failure as a missing file, with its cause.
                if protocol not in ("http", "https") or isinstance(error.__cause__, FileNotFoundError | None):
                    raise
                error = error.__cause__
            if _is_full(error):
                raise TesseraError(f"{url}: cannot {action}: {error}; TESSERA_STORAGE_GB limits what stays") from None
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if _is_refused(error):
                advice = CREDENTIALS.get(protocol, "check the permissions")
                raise TesseraError(f"{url}: cannot {action} without permission ({problem}); {advice}") from None
        if attempt + 1 < tries:
            time.sleep(random.uniform(0.5, 1) * min(FIRST_WAIT * 2**attempt, LONGEST_WAIT))
    raise TesseraError(
        f"{url}: could not {action} in {tries} attempts over {time.monotonic() - start:.0f} seconds; the last error: "
        f"{problem}\ncheck the network and the server, then run the same command again"
    )


def _state(info: dict[str, Any]) -> State:
    tag = next((str(info[name]) for name in ETAGS if info.get(name)), "")
    seconds = int.from_bytes(hashlib.sha256(tag.encode()).digest()[:4], "big") >> 1
    return State(int(info.get("size") or 0), seconds * 10**9)


def _info(files: Any, name: str) -> dict[str, Any]:
    if files.protocol == "hf" and files.resolve_path(name).path:
        return files.info(name, refresh=True, expand_info=True)  # one request; without it, a listing of the folder
    return files.info(name)


def stat(path: Path) -> Any:
    """`path.stat()`, of an object what is known of it, else what its server reports. Raises OSError, TesseraError."""
    if not is_remote(path):
        return path.stat()
    if (state := _known.get(str(path))) is None:
        state = _known[str(path)] = _ask(path)
    return state


def _ask(path: Path) -> State:
    return _state(_call(address(path), "read", _info))


def expect(path: Path, size: int, mtime_ns: int) -> None:
    """State what an object must be, as `stat` gave it when an index was written."""
    _known[str(path)] = State(size, mtime_ns)


def listing(folder: Path) -> list[str]:
    """The paths of all objects below a remote folder, relative to it, by one listing. Empty if there are none."""
    try:
        entries = _call(address(folder), "list", lambda files, name: (name, files.find(name, detail=True)))
    except FileNotFoundError:
        return []
    name, objects = entries
    names = []
    for key, info in objects.items():
        relative = key.removeprefix(name).lstrip("/")
        if relative and not relative.endswith("/"):
            _known[str(folder / relative)] = _state(info)
            names.append(relative)
    return sorted(names)


def matching(pattern: Path) -> list[Path]:
    """The remote paths of a pattern with *, ? and [], sorted; what exists by this name is no pattern."""
    if exists(pattern):
        return [pattern]
    if not re.search(r"[*?\[]", str(pattern)):
        return []
    url = address(pattern)
    names = _call(url, "list", lambda files, name: [files.unstrip_protocol(each) for each in files.glob(name)])
    return sorted(locate(name) for name in names)


def glob(folder: Path, pattern: str) -> list[Path]:
    """The paths of a pattern in a folder, sorted."""
    return matching(folder / pattern) if is_remote(folder) else sorted(folder.glob(pattern))


def size_of(path: Path) -> int | None:
    """Bytes of a file; None if it does not exist."""
    try:
        return stat(path).st_size
    except FileNotFoundError:
        return None


def exists(path: Path) -> bool:
    """Whether there is a file or folder at a path."""
    if not is_remote(path):
        return path.exists()
    return str(path) in _known or is_folder(path) or str(path) in _known


def is_folder(path: Path) -> bool:
    """Whether a path is a folder. Of a bucket, an answer of yes is remembered."""
    if not is_remote(path):
        return path.is_dir()
    if str(path) in _folders or str(path) in _known:
        return str(path) in _folders
    with contextlib.suppress(FileNotFoundError):
        info = _call(address(path), "read", _info)
        if info.get("type") == "directory":
            _folders.add(str(path))
            return True
        _known[str(path)] = _state(info)
    return False


def fetch(path: Path) -> Path:
    """The path itself, once its object is there. Raises TesseraError if there is none or it has changed."""
    if not is_remote(path):
        return path
    with _locks[hash(path) % len(_locks)]:
        try:
            known = stat(path)
            with contextlib.suppress(OSError):
                stored = path.stat()
                if (stored.st_size, stored.st_mtime_ns) == (known.st_size, known.st_mtime_ns):
                    os.utime(path, ns=(time.time_ns(), known.st_mtime_ns))
                    return path
            _download(path, known)
        except FileNotFoundError:
            raise TesseraError(absence(address(path))) from None
    make_room(path)
    return path


def _download(path: Path, known: State) -> None:
    url = address(path)

    def get(files: Any, name: str) -> None:
        state = _state(_info(files, name))
        if state != known:
            sizes = f"{known.st_size:,} bytes then, {state.st_size:,} now"
            difference = sizes if state.st_size != known.st_size else "of the same size, but with another ETag or date"
            raise TesseraError(
                f"{url} has changed since its index was written or its folder was listed: {difference}; write the "
                "index again, or restore the file"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
        try:
            files.get_file(name, str(partial))
            if partial.stat().st_size != state.st_size:
                raise ConnectionError(f"{partial.stat().st_size:,} of {state.st_size:,} bytes arrived")
            os.utime(partial, ns=(time.time_ns(), state.st_mtime_ns))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    _call(url, "download", get)


def limit() -> int:
    """How many bytes of downloaded files stay on the disk."""
    text = os.environ.get("TESSERA_STORAGE_GB", "50")
    try:
        return int(float(text) * 10**9)
    except ValueError:
        raise TesseraError(f"TESSERA_STORAGE_GB is {text!r}; expected a number of gigabytes, such as 50") from None


def make_room(added: Path) -> None:
    """Remove the files that were not used for longest, if all exceed the limit. Files that are being written stay."""
    root = str(_root().parent)
    with _room_lock:
        size = added.stat().st_size if added.exists() else 0
        if root in _stored and _stored[root] + size <= limit() and _added[root] + size <= limit() / WALK_SHARE:
            _stored[root] += size
            _added[root] += size
            return
        entries = []
        for folder, _, names in os.walk(root):
            for name in names:
                with contextlib.suppress(OSError):  # removed by another process
                    state = os.stat(path := os.path.join(folder, name))
                    is_written = name.endswith(PARTIAL) and time.time() - state.st_mtime < PARTIAL_SECONDS
                    entries.append((state.st_atime_ns, state.st_size, path, is_written))
        total = sum(size for _, size, _, _ in entries)
        if total > limit():
            for _, size, path, is_written in sorted(entries):
                if total <= 0.9 * limit():
                    break
                if path != str(added) and not is_written:
                    with contextlib.suppress(OSError):
                        os.unlink(path)
                    total -= size
        _stored[root], _added[root] = total, 0


def read(path: Path, offset: int = 0, length: int = -1) -> bytes:
    """Bytes of a file, which is downloaded whole. Raises OSError, TesseraError."""
    while True:
        try:
            with open(fetch(path), "rb") as file:
                file.seek(offset)
                return file.read(length)
        except FileNotFoundError:
            if not is_remote(path):
                raise  # of others: another process made room before it was opened


def read_range(path: Path, offset: int, length: int) -> bytes:
    """Bytes of an object, without the rest of it. Raises TesseraError."""

    def get(files: Any, name: str) -> bytes:
        # Of the hub, without `size` it would also ask for that, and read 5 MB ahead.
        exact = {"size": offset + length, "cache_type": "none"} if files.protocol == "hf" else {}
        content = files.cat_file(name, start=offset, end=offset + length, **exact)
        if len(content) != length:
            raise ConnectionError(f"{len(content):,} of {length:,} bytes arrived")
        return content

    try:
        return _call(address(path), "read", get)
    except FileNotFoundError:
        raise TesseraError(absence(address(path))) from None


def publish(path: Path) -> None:
    """Upload a file that was written at a remote path; a local one is where it belongs. Raises TesseraError."""
    if is_remote(path):
        _known[str(path)] = upload(path, address(path))
        os.utime(path, ns=(time.time_ns(), _known[str(path)].st_mtime_ns))


def upload(path: Path, url: str) -> State:
    """Upload a file to an address, whole or not at all. Raises TesseraError."""
    check_writable(url)

    def put(files: Any, name: str) -> State:
        files.makedirs(files._parent(name), exist_ok=True) if url.startswith(("file:", "memory:")) else None
        files.put_file(str(path), name)
        state = _state(files.info(name))
        if state.st_size != path.stat().st_size:
            raise ConnectionError(f"{state.st_size:,} of {path.stat().st_size:,} bytes arrived")
        return state

    try:
        return _call(url, "write", put)
    except FileNotFoundError as error:
        raise TesseraError(f"cannot write {url}: {error}; create the bucket first, or correct its name") from None


def create(url: str, content: bytes, overwrite: bool = False) -> bool:
    """Write a small object. Returns whether it was written: not if it exists, unless it is to be overwritten."""
    check_writable(url)

    def put(files: Any, name: str) -> bool:
        files.makedirs(files._parent(name), exist_ok=True) if url.startswith(("file:", "memory:")) else None
        files.pipe_file(name, content, mode="overwrite" if overwrite else "create")
        return True

    try:
        return _call(url, "write", put)
    except FileExistsError:
        return False
    except FileNotFoundError as error:
        raise TesseraError(f"cannot write {url}: {error}; create the bucket first, or correct its name") from None


def content(url: str) -> bytes | None:
    """A small object; None if there is none."""
    try:
        return _call(url, "read", lambda files, name: files.cat_file(name))
    except FileNotFoundError:
        return None


def remove(urls: Iterable[str]) -> None:
    """Delete objects, in this order; those that do not exist are no error."""
    for url in urls:
        with contextlib.suppress(FileNotFoundError):
            _call(url, "delete", lambda files, name: files.rm_file(name))


def copy_folder(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy objects below a remote folder into a local one. Raises TesseraError."""

    def copy(name: str) -> None:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(fetch(source / name), target / name)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(copy, names))


def upload_folder(source: Path, url: str, names: Iterable[str]) -> None:
    """Upload files below a local folder. Raises TesseraError."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda name: upload(source / name, f"{url}/{name}"), names))
