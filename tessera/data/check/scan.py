"""Measurements of every file of a data set, by many processes, saved in parts that may come from many machines.

A part is the unit of work: 512 consecutive samples, measured by one process and written atomically under a key that
depends on the state of the files. So an interrupted scan resumes, parts may be made anywhere in any order, and a
changed file is measured again.

Shapes: N samples, H W height and width.
"""

import functools
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from tessera import storage
from tessera.data.check import similarity
from tessera.data.check.clips import measure_clip
from tessera.data.files import FilesDataset
from tessera.data.images import (
    METADATA_PROBLEM,
    ImagesConfig,
    InvalidSample,
    flatten,
    has_transparency,
    orientation,
    upright,
    with_image,
)
from tessera.data.index import SPAN_COLUMNS, arrow
from tessera.data.processes import run_in_processes
from tessera.data.tables import NO_BYTES
from tessera.errors import TesseraError
from tessera.files import atomic_file, this_writer

if TYPE_CHECKING:
    import pyarrow

PART_SIZE = 512  # samples
MIN_SECONDS = 8.0  # of remaining work for which processes are started; each needs about three to start
FORMAT = 5  # of a part; a part of another format is made again
THUMBNAIL_SIDE = 64  # pixels of the longer side at which colors are counted
MIN_PROFILE_DIFFERENCE = 4  # of 255 levels: profiles that are called sRGB differ by one or two
CELLS = 8  # cells per axis of the color grid, which distinguishes recolored images

# Why an image is invalid.
Fault = Literal[
    "empty",
    "no image",
    "no video",
    "truncated",
    "damaged",
    "unsupported",
    "unreadable",
    "missing",
    "broken link",
    "too large",
]
FAULTS: tuple[Fault, ...] = get_args(Fault)


@dataclass
class SampleStats:
    """Measurements of one sample: complete without a fault, with one only what could be read."""

    name: str  # relative to the root of the data set
    fault: Fault | None = None
    detail: str = ""  # of the fault
    length: int = 0  # in bytes
    digest: bytes | None = None  # sha256 of the content
    format: str = ""  # Pillow's name
    mode: str = ""  # Pillow's name, as stored
    height: int = 0  # as displayed, after the EXIF rotation
    width: int = 0
    bits: int = 8  # per channel, as stored
    orientation: int = 1  # EXIF value
    metadata_problem: str = ""  # why metadata were ignored
    profile: str = ""  # a color profile by which colors are visibly different, and how much
    animated: bool = False
    transparent_fraction: float = 0.0  # of the pixels that are not opaque
    contrast: int = 0  # of 255: the largest range of a channel, on the background
    visible_contrast: int = 0  # the same on the background that shows most
    max_color_fraction: float = 0.0  # of the area, of the most frequent color
    hash: int = 0  # perceptual
    color_grid: bytes = b"\0" * (3 * CELLS**2)  # RGB means of CELLS x CELLS cells
    # Of clips:
    frames: int = 0  # at the rate of the data
    seconds: float = 0.0  # of the whole file
    rate: float = 0.0  # frames per second of the file; 0: not known
    variable_rate: bool = False
    motion: float = 0.0  # of 255: the largest mean difference of two frames
    cut: float = -1.0  # seconds at which the scene changes; -1: it does not

    def describe_pixels(self, image: Image.Image, gray: np.ndarray) -> None:
        """Measure an RGB image without transparency. gray: uint8 [similarity.SIDE, similarity.SIDE]"""
        self.contrast = self.visible_contrast = _contrast(image)
        scale = min(1.0, THUMBNAIL_SIDE / max(image.size))
        size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
        thumbnail = image if scale == 1 else image.resize(size, Image.Resampling.BOX)
        self.max_color_fraction = _max_color_fraction(np.asarray(thumbnail))
        self.hash = similarity.perceptual_hash(gray)
        self.color_grid = image.resize((CELLS, CELLS), Image.Resampling.BOX).tobytes()


ARROW_TYPES = {str: "string", int: "int64", bool: "bool_", float: "float32", bytes: "binary"}
FIELD_TYPES = {"digest": "binary", "fault": "string", "hash": "uint64", "color_grid": "binary", "orientation": "int32"}


def schema() -> "pyarrow.Schema":
    pa = arrow()
    types = {field.name: FIELD_TYPES.get(field.name) or ARROW_TYPES[field.type] for field in fields(SampleStats)}
    return pa.schema([(name, getattr(pa, type_)()) for name, type_ in types.items()])


# One sample


def measure_sample(content: Path | bytes, name: str, config: ImagesConfig) -> SampleStats:
    """Measure one encoded image. It is decoded once, a JPEG at the smallest scale that is enough for its hash."""
    stats = SampleStats(name)
    try:
        data = content if isinstance(content, bytes) else content.read_bytes()
    except PermissionError:
        return _failed(stats, "unreadable", "no permission to read it")
    except FileNotFoundError:
        linked = isinstance(content, Path) and content.is_symlink()
        return _failed(stats, "broken link" if linked else "missing", "")
    except OSError as error:
        return _failed(stats, "unreadable", error.strerror or str(error))
    stats.length = len(data)
    if not data:
        return _failed(stats, "empty", "0 bytes")
    stats.digest = hashlib.sha256(data).digest()
    try:
        with_image(data, lambda image: _measure(stats, image, data, config))
    except InvalidSample as error:
        return _failed(stats, "unsupported", str(error))
    except Image.DecompressionBombError as error:
        return _failed(stats, "too large", str(error))
    except UnidentifiedImageError:
        kind = describe_content(data)
        if kind.endswith(" image"):
            return _failed(stats, "truncated" if is_truncated(data) else "damaged", f"the start of {kind}")
        return _failed(stats, "no image", kind)
    except Exception as error:  # decoders raise anything on damaged bytes
        return _failed(stats, "truncated" if is_truncated(data) else "damaged", str(error))
    return stats


def _failed(stats: SampleStats, fault: Fault, detail: str) -> SampleStats:
    stats.fault, stats.detail = fault, detail
    return stats


def _measure(stats: SampleStats, image: Image.Image, data: bytes, config: ImagesConfig) -> None:
    stats.format, stats.mode = image.format or "", image.mode
    stats.animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"  # two views of one photo
    stats.bits = data[24] if image.format == "PNG" else 16 if image.mode.startswith(("I", "F")) else 8
    width, height = image.size
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        image.draft(image.mode, (4 * THUMBNAIL_SIDE, 4 * THUMBNAIL_SIDE))  # every byte is still decoded
    stats.orientation = orientation(image)
    stored = image.size
    shown = upright(image)
    sideways = stored[0] != stored[1] and shown.size == stored[::-1]
    stats.height, stats.width = (width, height) if sideways else (height, width)
    if profile := image.info.get("icc_profile"):
        stats.profile, problem = describe_profile(profile)
        if problem:
            image.info.setdefault(METADATA_PROBLEM, problem)
    stats.metadata_problem = image.info.get(METADATA_PROBLEM, "")

    flat = flatten(shown, config).convert("RGB")
    gray = flat.convert("L").resize((similarity.SIDE, similarity.SIDE), Image.Resampling.BOX)
    stats.describe_pixels(flat, np.asarray(gray))
    if has_transparency(shown):
        rgba = shown.convert("RGBA")
        alpha = np.asarray(rgba.getchannel("A"))
        if not (alpha == 255).all():
            stats.transparent_fraction = float((alpha < 255).mean())
            # On black and on white: an image without contrast on either is blank on any background.
            stats.visible_contrast = max(_contrast(_on_gray(rgba, level)) for level in (0, 255))


@functools.lru_cache(16)
def describe_profile(profile: bytes) -> tuple[str, str]:
    """The name of a color profile and the largest difference from sRGB, "" where it is not visible; and why the
    profile cannot be used, "" if it can or is one of print colors."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()  # pyright: ignore[reportAttributeAccessIssue]
        if space not in ("RGB", "GRAY"):
            return "", ""
        levels = np.linspace(0, 255, 9).astype(np.uint8)
        colors = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 9, 3)
        plain = Image.fromarray(colors if space == "RGB" else np.arange(256, dtype=np.uint8)[None])
        converted = ImageCms.profileToProfile(plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        name = ImageCms.getProfileDescription(source).strip() or "a profile without a name"
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        return "", f"color profile: {error}"
    assert converted is not None
    difference = np.abs(np.asarray(converted, np.int32) - np.asarray(plain.convert("RGB"), np.int32)).max()
    return (f"{name}, up to {difference} of 255 levels" if difference >= MIN_PROFILE_DIFFERENCE else ""), ""


def _on_gray(image: Image.Image, level: int) -> Image.Image:
    background = Image.new("RGBA", image.size, (level, level, level, 255))
    return Image.alpha_composite(background, image).convert("RGB")


def _contrast(image: Image.Image) -> int:
    """The largest range of a channel of an RGB image."""
    return max(high - low for low, high in image.getextrema())  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]


def _max_color_fraction(pixels: np.ndarray) -> float:
    """The fraction of the most frequent color; pixels: uint8 [H, W, 3]"""
    colors = pixels.reshape(-1, 3).astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
    return float(np.unique(colors, return_counts=True)[1].max() / len(colors))


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


def describe_content(data: bytes) -> str:
    """The type of content that Pillow cannot open, from its first bytes; that of a damaged image ends in " image"."""
    if match := next((kind for magic, kind in MAGIC if data.startswith(magic)), ""):
        return match
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "a WebP image"
    if data[4:8] == b"ftyp":
        return "a HEIF file, which Pillow cannot read" if data[8:12] in (b"heic", b"heix", b"mif1") else "a video"
    if data[257:262] == b"ustar":
        return "a tar archive"
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if start.startswith((b"<svg", b"<?xml")):
        return "XML or SVG, no pixels"
    if b"\0" in data[:512]:
        return "unknown binary data"
    try:
        data[:512].decode("utf-8")
    except UnicodeDecodeError as error:
        return "text" if error.start > 500 else "unknown binary data"  # a character cut in two
    return "text"


def is_truncated(data: bytes) -> bool:
    """Whether a file ends early, if its format marks the end."""
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
    """The parts to scan here: part p where p mod count == index."""

    index: int = 0
    count: int = 1


ALL = ScanShard()


def num_parts(dataset: FilesDataset) -> int:
    return -(-len(dataset) // PART_SIZE)


def part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:06d}.arrow"


def part_key(dataset: FilesDataset, part: int) -> str:
    """A hash of the samples of a part, the present state of their files, and the settings that affect measurements."""
    rows = dataset.table.select(["path", "offset", "length", *SPAN_COLUMNS]).slice(part * PART_SIZE, PART_SIZE)
    paths = rows["path"].to_pylist()
    states = [_file_state(dataset.root / path) for path in dict.fromkeys(paths)]
    spans = (rows["offset"].to_pylist(), rows["length"].to_pylist())
    config = dataset.config
    facts: tuple[object, ...] = (FORMAT, config.background, config.channels, paths, states, spans)
    if config.frames is not None:
        facts += (config.fps, [rows[name].to_pylist() for name in SPAN_COLUMNS])
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()


def _file_state(path: Path) -> tuple[int, ...]:
    try:
        state = storage.stat(path)
        frames = sorted(path.iterdir()) if path.is_dir() else []
    except OSError:
        return ()
    return state.st_size, state.st_mtime_ns, state.st_mode, *(number for each in frames for number in _file_state(each))


def scan(
    dataset: FilesDataset,
    folder: Path,
    workers: int = 1,
    shard: ScanShard = ALL,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Measure every part of a shard that is not in the folder or whose files have changed.

    workers: processes; a few seconds of work are done in this process.
    Raises TesseraError if the folder cannot be written or a process dies.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TesseraError(f"cannot write {folder}: {error.strerror or error}") from None
    parts = range(shard.index, num_parts(dataset), shard.count)
    keys = {part: part_key(dataset, part) for part in parts}
    missing = [part for part in parts if _read_key(part_path(folder, part)) != keys[part]]
    total = sum(min(PART_SIZE, len(dataset) - part * PART_SIZE) for part in parts)
    done = total - sum(min(PART_SIZE, len(dataset) - part * PART_SIZE) for part in missing)
    for count in _scan_parts(dataset, folder, missing, keys, workers):
        done += count
        if progress is not None:
            progress(done, total)


def _scan_parts(
    dataset: FilesDataset, folder: Path, missing: Sequence[int], keys: dict[int, str], workers: int
) -> Iterator[int]:
    """Scan parts; yields the number of samples of each."""
    scan_part = partial(_scan_part, dataset, folder, keys)
    for number, part in enumerate(missing, start=1):
        start = time.perf_counter()
        yield from scan_part(part)
        seconds = time.perf_counter() - start
        if number == 1 and workers > 1 and seconds * (len(missing) - 1) >= MIN_SECONDS:
            yield from run_in_processes(scan_part, missing[1:], workers)
            return


def _scan_part(dataset: FilesDataset, folder: Path, keys: dict[int, str], part: int) -> Iterator[int]:
    """Measure the samples of a part and write it atomically; yields their number."""
    pa = arrow()
    rows = range(part * PART_SIZE, min((part + 1) * PART_SIZE, len(dataset)))
    stats = [_scan_sample(dataset, row) for row in rows]
    columns = {field.name: [getattr(sample, field.name) for sample in stats] for field in fields(SampleStats)}
    table = pa.table(columns, schema()).replace_schema_metadata({"key": keys[part]})
    with (
        atomic_file(part_path(folder, part), this_writer()) as partial,  # two processes may write the same part
        pa.OSFile(str(partial), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)
    yield len(rows)


def _scan_sample(dataset: FilesDataset, row: int) -> SampleStats:
    name = short_name(dataset, row)
    try:
        content = dataset.encoded(row)
    except InvalidSample as error:
        reason = str(error)
        return _failed(SampleStats(name), "empty" if reason == NO_BYTES else "damaged", reason)
    if dataset.config.frames is not None:
        return measure_clip(SampleStats(name), content, dataset.span(row), dataset.config)
    return measure_sample(content, name, dataset.config)


def short_name(dataset: FilesDataset, row: int) -> str:
    """The name of a sample relative to the root of its data set, as valid UTF-8."""
    name = dataset.name(row).removeprefix(str(dataset.root) + os.sep)
    return name.encode("utf-8", "backslashreplace").decode()


def _read_key(path: Path) -> str | None:
    """The key of a part; None if it does not exist or is damaged."""
    pa = arrow()
    try:
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).schema.metadata[b"key"].decode()
    except (OSError, ValueError, KeyError, TypeError):
        return None


def missing_parts(dataset: FilesDataset, folder: Path) -> list[Path]:
    """The parts that do not exist, are damaged, or whose files have changed."""
    paths = [part_path(folder, part) for part in range(num_parts(dataset))]
    return [path for part, path in enumerate(paths) if _read_key(path) != part_key(dataset, part)]


def part_keys(dataset: FilesDataset, folder: Path) -> list[str | None]:
    """The keys of the parts as they were written."""
    return [_read_key(part_path(folder, part)) for part in range(num_parts(dataset))]


def read_parts(dataset: FilesDataset, folder: Path) -> "pyarrow.Table":
    """All parts as one memory-mapped table of SampleStats, in the order of the samples.

    Raises TesseraError if parts are missing or their files have changed.
    """
    if missing := missing_parts(dataset, folder):
        raise TesseraError(
            f"{len(missing)} of {num_parts(dataset)} parts in {folder} are missing or their files have changed (the "
            f"first: {missing[0].name}): run the missing shards, or the command without --shard"
        )
    return open_parts(dataset, folder)


def open_parts(dataset: FilesDataset, folder: Path) -> "pyarrow.Table":
    """`read_parts` of parts that are known to be valid."""
    pa = arrow()
    paths = [part_path(folder, part) for part in range(num_parts(dataset))]
    tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths]
    return pa.concat_tables([table.replace_schema_metadata() for table in tables])
