"""What is in every file of a data set, seen once by many processes and kept in parts that may come from many machines.

A part is the unit of work: so many samples in order, looked at by one process, written whole or not at all under a key
of the files as they were. So a pass goes on where it was interrupted, parts may be made anywhere in any order, and a
file that was mended is looked at again.

Shapes: N samples, H W height and width.
"""

import hashlib
import io
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tessera.data.check import similarity
from tessera.data.files import FilesDataset
from tessera.data.images import ORIENTATION_TAG, ImagesConfig, InvalidSample, flatten
from tessera.data.index import arrow
from tessera.errors import TesseraError
from tessera.files import PARTIAL, fsync

if TYPE_CHECKING:
    import pyarrow

PART = 512  # samples
WORTHWHILE = 8.0  # seconds of work for which processes are started, as each needs about three to begin
FORMAT = 1  # of a part; another one is made again
SMALL_PICTURE = 64  # pixels of the longer side at which colours are counted
CELLS = 8  # in each direction, whose colours tell recoloured pictures apart

# Why an image cannot be used.
Fault = Literal["empty", "no image", "truncated", "damaged", "unreadable", "missing", "broken link", "too large"]
FAULTS: tuple[Fault, ...] = get_args(Fault)


@dataclass
class SampleStats:
    """What was seen of one sample. Without a fault everything is known; with one only what could be read."""

    name: str  # from the root of the data set
    fault: Fault | None = None
    detail: str = ""  # of the fault
    length: int = 0  # in bytes
    digest: bytes | None = None  # sha256 of the content
    format: str = ""  # as Pillow calls it
    mode: str = ""  # as Pillow calls it, before anything is done
    height: int = 0  # as displayed, after the EXIF rotation
    width: int = 0
    bits: int = 8  # of a channel in the file
    orientation: int = 1  # of EXIF
    animated: bool = False
    transparent_fraction: float = 0.0  # share of the pixels that are not opaque
    contrast: int = 0  # of 255: the widest range of a channel, on the background
    visible_contrast: int = 0  # the same of the pixels that can be seen, whatever the background
    max_color_fraction: float = 0.0  # share of the area that is of one colour
    hash: int = 0  # perceptual
    color_grid: bytes = b"\0" * (3 * CELLS**2)  # of CELLS x CELLS cells, RGB


ARROW = {str: "string", int: "int64", bool: "bool_", float: "float32", bytes: "binary"}
KINDS = {"digest": "binary", "fault": "string", "hash": "uint64", "colours": "binary", "orientation": "int32"}


def schema() -> "pyarrow.Schema":
    pa = arrow()
    kinds = {field.name: KINDS.get(field.name) or ARROW[field.type] for field in fields(SampleStats)}
    return pa.schema([(name, getattr(pa, kind)()) for name, kind in kinds.items()])


# One sample


def measure_sample(content: Path | bytes, name: str, config: ImagesConfig) -> SampleStats:
    """Everything about one encoded image, decoded once; a JPEG at the smallest scale that is enough for its hash."""
    seen = SampleStats(name)
    try:
        data = content if isinstance(content, bytes) else content.read_bytes()
    except PermissionError:
        return _failed(seen, "unreadable", "no permission to read it")
    except FileNotFoundError:
        linked = isinstance(content, Path) and content.is_symlink()
        return _failed(seen, "broken link" if linked else "missing", "")
    except OSError as error:
        return _failed(seen, "unreadable", error.strerror or str(error))
    seen.length = len(data)
    if not data:
        return _failed(seen, "empty", "0 bytes")
    seen.digest = hashlib.sha256(data).digest()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow would say of odd files goes unsaid: they are read, or are not
            with Image.open(io.BytesIO(data)) as image:
                _measure(seen, image, data, config)
    except Image.DecompressionBombError as error:
        return _failed(seen, "too large", str(error))
    except UnidentifiedImageError:
        kind = what_is(data)
        if kind.endswith(" image"):
            return _failed(seen, "truncated" if ends_early(data) else "damaged", f"the start of {kind}")
        return _failed(seen, "no image", kind)
    except Exception as error:  # decoders raise anything on damaged bytes
        return _failed(seen, "truncated" if ends_early(data) else "damaged", str(error))
    return seen


def _failed(seen: SampleStats, fault: Fault, detail: str) -> SampleStats:
    seen.fault, seen.detail = fault, detail
    return seen


def _measure(seen: SampleStats, image: Image.Image, data: bytes, config: ImagesConfig) -> None:
    seen.format, seen.mode = image.format or "", image.mode
    seen.animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"  # two views of one photo
    seen.bits = data[24] if image.format == "PNG" else 16 if image.mode.startswith(("I", "F")) else 8
    width, height = image.size
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        image.draft(image.mode, (4 * SMALL_PICTURE, 4 * SMALL_PICTURE))  # every byte is decoded all the same
    image.load()
    seen.orientation = image.getexif().get(ORIENTATION_TAG, 1)
    turned = ImageOps.exif_transpose(image)
    sideways = image.size[0] != image.size[1] and turned.size == image.size[::-1]
    seen.height, seen.width = (width, height) if sideways else (height, width)

    flat = flatten(turned, config).convert("RGB")
    seen.contrast = seen.visible_contrast = _contrast(flat)
    if "A" in turned.mode or "a" in turned.mode or "transparency" in turned.info:
        clear = turned.convert("RGBA")
        alpha = np.asarray(clear.getchannel("A"))
        if not (alpha == 255).all():
            seen.transparent_fraction = float((alpha < 255).mean())
            # Against black and against white: what has contrast on neither cannot be seen at all.
            seen.visible_contrast = max(_contrast(_on(clear, level)) for level in (0, 255))
    scale = min(1.0, SMALL_PICTURE / max(flat.size))
    smaller = (max(round(flat.width * scale), 1), max(round(flat.height * scale), 1))
    seen.max_color_fraction = _commonest(np.asarray(flat if scale == 1 else flat.resize(smaller, Image.Resampling.BOX)))
    seen.hash = similarity.perceptual_hash(
        np.asarray(flat.convert("L").resize((similarity.SIDE, similarity.SIDE), Image.Resampling.BOX))
    )
    seen.color_grid = flat.resize((CELLS, CELLS), Image.Resampling.BOX).tobytes()


def _on(image: Image.Image, level: int) -> Image.Image:
    ground = Image.new("RGBA", image.size, (level, level, level, 255))
    return Image.alpha_composite(ground, image).convert("RGB")


def _contrast(image: Image.Image) -> int:
    """The widest range of a channel, of an RGB image."""
    return max(high - low for low, high in image.getextrema())  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]


def _commonest(pixels: np.ndarray) -> float:
    """The share of the commonest colour; pixels: uint8 [H, W, 3]"""
    one = pixels.reshape(-1, 3).astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    return float(np.unique(one, return_counts=True)[1].max() / len(one))


MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"PK\3\4", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"Rar!", "a rar archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"%PDF", "a PDF document"),
    (b"\x1aE\xdf\xa3", "a video"),
    (b"SQLite", "a database"),
)


def what_is(data: bytes) -> str:
    """What content is that Pillow cannot open, by how it begins; an image that is damaged ends in " image"."""
    if found := next((what for magic, what in MAGIC if data.startswith(magic)), ""):
        return found
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "a WebP image"
    if data[4:8] == b"ftyp":
        return "a HEIF picture, which Pillow cannot read" if data[8:12] in (b"heic", b"heix", b"mif1") else "a video"
    if data[257:262] == b"ustar":
        return "a tar archive"
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if start.startswith((b"<svg", b"<?xml")):
        return "XML or SVG, no pixels"
    if b"\0" in data[:512]:
        return "bytes of no known kind"
    try:
        data[:512].decode("utf-8")
    except UnicodeDecodeError as error:
        return "text" if error.start > 500 else "bytes of no known kind"  # a letter cut in two
    return "text"


def ends_early(data: bytes) -> bool:
    """Whether a file of a format that says where it ends, ends before."""
    if data.startswith(b"\xff\xd8"):
        return not data.rstrip(b"\0").endswith(b"\xff\xd9")
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    if data.startswith(b"GIF8"):
        return not data.rstrip(b"\0").endswith(b";")
    if data.startswith(b"RIFF"):
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data.startswith(b"BM"):
        return int.from_bytes(data[2:6], "little") > len(data)
    return False


# Parts


@dataclass(frozen=True)
class ScanShard:
    """Which of the parts are looked at here: part p where p mod count is index."""

    index: int = 0
    count: int = 1


WHOLE = ScanShard()


def parts(source: FilesDataset) -> int:
    return -(-len(source) // PART)


def part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:06d}.arrow"


def part_key(source: FilesDataset, part: int) -> str:
    """A hash of which samples a part holds, of their files as they are now, and of what decides how they are seen."""
    rows = source.table.select(["path", "offset", "length"]).slice(part * PART, PART)
    paths = rows["path"].to_pylist()
    state = {path: _state(source.root / path) for path in dict.fromkeys(paths)}
    told = (FORMAT, source.config.background, source.config.channels, paths, list(state.values()))
    places = (rows["offset"].to_pylist(), rows["length"].to_pylist())
    return hashlib.sha256(repr((told, places)).encode("utf-8", "surrogateescape")).hexdigest()


def _state(path: Path) -> tuple[int, ...]:
    try:
        told = path.stat()
    except OSError:
        return ()
    return told.st_size, told.st_mtime_ns, told.st_mode


def scan(
    source: FilesDataset,
    folder: Path,
    workers: int = 1,
    shard: ScanShard = WHOLE,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Look at every part of a shard that is not in the folder, or whose files have changed since.

    workers: processes; what takes a few seconds only is looked at in this one.
    Raises TesseraError if the folder cannot be written or a process dies.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TesseraError(f"cannot write {folder}: {error.strerror or error}") from None
    own = range(shard.index, parts(source), shard.count)
    wanted = {part: part_key(source, part) for part in own}
    missing = [part for part in own if _key_of(part_path(folder, part)) != wanted[part]]
    total = sum(min(PART, len(source) - part * PART) for part in own)
    done = total - sum(min(PART, len(source) - part * PART) for part in missing)
    for count in _made(source, folder, missing, wanted, workers):
        done += count
        if progress is not None:
            progress(done, total)


def _made(
    source: FilesDataset, folder: Path, missing: Sequence[int], keys: dict[int, str], workers: int
) -> Iterator[int]:
    """Make parts, and say of each how many samples it has."""
    if not missing:
        return
    began = time.perf_counter()
    yield _make_part(source, folder, missing[0], keys[missing[0]])
    seconds, missing = time.perf_counter() - began, missing[1:]
    if workers <= 1 or seconds * len(missing) < WORTHWHILE:
        for part in missing:
            yield _make_part(source, folder, part, keys[part])
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads that run here
    pool = ProcessPoolExecutor(workers, spawn, _begin, (source, folder))
    try:
        with _undisturbed():  # submitting starts the processes
            futures = [pool.submit(_make_part_here, part, keys[part]) for part in missing]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise TesseraError(
            "a process that looked at images died, which lack of memory does: run the same command again with fewer "
            f"--workers than {workers}; what is done is not done again"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold Ctrl-C back until the end: half of a pool cannot be shut down. Processes that are started meanwhile never
    hear of it: it is the business of the one that waits for them."""
    received: list[int] = []
    try:
        before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    except ValueError:  # not the main thread, which is the only one that is interrupted
        yield
        return
    mask = None
    if hasattr(signal, "pthread_sigmask"):  # not on Windows; for the children, as other threads of this process hear it
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
        if received:
            signal.raise_signal(signal.SIGINT)


_here: tuple[FilesDataset, Path]  # of a process of the pool


def _begin(source: FilesDataset, folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    global _here
    _here = source, folder


def _make_part_here(part: int, key: str) -> int:
    return _make_part(*_here, part, key)


def _make_part(source: FilesDataset, folder: Path, part: int, key: str) -> int:
    """Look at the samples of a part and write it, whole or not at all; how many there are."""
    pa = arrow()
    rows = range(part * PART, min((part + 1) * PART, len(source)))
    seen = [_look_at(source, row) for row in rows]
    columns = {field.name: [getattr(one, field.name) for one in seen] for field in fields(SampleStats)}
    table = pa.table(columns, schema()).replace_schema_metadata({"key": key})
    target = part_path(folder, part)
    partial = target.with_name(f"{target.name}.{os.getpid()}{PARTIAL}")  # two processes may make the same part
    try:
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        fsync(partial)
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise TesseraError(f"cannot write {target}: {error.strerror or error}") from error
    return len(rows)


def _look_at(source: FilesDataset, row: int) -> SampleStats:
    name = short_name(source, row)
    try:
        content = source.encoded(row)
    except InvalidSample as fault:
        told = str(fault)
        return _failed(SampleStats(name), "empty" if told == "holds no image bytes" else "damaged", told)
    return measure_sample(content, name, source.config)


def short_name(source: FilesDataset, row: int) -> str:
    """The name of a sample from the root of its data set, in letters that every file can hold."""
    name = source.name(row).removeprefix(str(source.root) + os.sep)
    return name.encode("utf-8", "backslashreplace").decode()


def _key_of(path: Path) -> str | None:
    """The key of a part, None if it is not there or damaged."""
    pa = arrow()
    try:
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).schema.metadata[b"key"].decode()
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_parts(source: FilesDataset, folder: Path) -> "pyarrow.Table":
    """All parts as one table of what was seen, memory-mapped, in the order of the samples.

    Raises TesseraError if parts are missing, or of files that have changed.
    """
    pa = arrow()
    count = parts(source)
    missing = [part for part in range(count) if _key_of(part_path(folder, part)) != part_key(source, part)]
    if missing:
        raise TesseraError(
            f"{len(missing)} of {count} parts in {folder} are missing or of files that have changed since (the first: "
            f"{part_path(folder, missing[0]).name}): run the missing shards, or the command without --shard"
        )
    read = [pa.ipc.open_file(pa.memory_map(str(part_path(folder, part)))).read_all() for part in range(count)]
    return pa.concat_tables([table.replace_schema_metadata() for table in read])
