"""Images in files of any common layout as one data set. The files are indexed, and samples are read by the index."""

import functools
import math
import os
import sys
import tarfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from tessera import storage
from tessera.data import layouts, tables
from tessera.data.clips import Span, clip_shape, count_frames, load_clip
from tessera.data.images import ImagesConfig, InvalidSample, image_shape, load_image
from tessera.data.index import SPAN_COLUMNS, TABLE_SUFFIXES, arrow, compute, int_column, labels, metadata
from tessera.data.index import shards as index_shards
from tessera.data.notes import printable
from tessera.data.sampler import whole_weights
from tessera.errors import TesseraError

if TYPE_CHECKING:
    from tessera.data.captions import EncodedCaptions

TAR_HEADER = 512  # bytes before the content of a member
MAX_NAME_BLOCKS = 8  # of a name before the header


class FilesConfig(ImagesConfig):
    """Folders of images or clips, parquet files, WebDataset tars, lists of files (.csv, .jsonl), data sets of Hugging
    Face, or an index of any of them."""

    kind: Literal["files", "folder", "frame-folders", "parquet"] = Field(
        default="files",
        description="files: any layout, detected; folder: images only; frame-folders: each folder of images is a clip; "
        "parquet: tables only",
    )
    path: str | list[str] = Field(
        description="a folder of images or of .parquet or .tar files, one such file, an index, hub:owner/name; a list"
    )
    classes: Literal["auto", "folders", "none"] = Field(
        default="auto", description="auto: from labels or subfolders, if there are any"
    )
    image: str = Field(default="auto", description="the column of images in tables: bytes, or a struct with them")
    label: str | None = Field(
        default="auto", description="the column of labels; auto: label or class, if there is one; null: none"
    )
    caption: str | None = Field(
        default="auto", description="the column of captions; auto: caption or text, if there is one; null: none"
    )
    split: str | None = Field(
        default=None,
        description="train, validation or test, by the names of files or folders; null: train, or the only one",
    )

    weights: tuple[PositiveFloat, ...] | Literal["classes"] = Field(
        default=(),
        description="of the paths: the parts of each in every batch, as in 1, 1; classes: every class equally often; "
        "empty: every image equally often",
    )

    shuffle_shards: PositiveInt | None = Field(
        default=None,
        description="tars or tables (of a cache: its files) whose samples are shuffled together, so that twice as many "
        "have to be on the disk; null: all samples",
    )

    @field_validator("weights")
    @classmethod
    def _check_ratio(cls, weights: tuple[float, ...] | Literal["classes"]) -> tuple[float, ...] | Literal["classes"]:
        if weights and weights != "classes":
            whole_weights(weights)
        return weights

    @model_validator(mode="after")
    def _check_weights(self) -> "FilesConfig":
        if self.weights and self.weights != "classes" and len(self.weights) != len(self.paths):
            raise ValueError(f"weights has {len(self.weights)} numbers, and path has {len(self.paths)}: give one each")
        if self.weights and self.buckets is not None:
            raise ValueError("weights and buckets exclude each other: a batch of one size has images of any path")
        if self.shuffle_shards is not None and (self.weights or self.buckets is not None):
            raise ValueError("shuffle_shards is for shuffled samples of one size: leave weights and buckets out")
        return self

    @model_validator(mode="after")
    def _check_frame_folders(self) -> "FilesConfig":
        if self.kind == "frame-folders" and self.frames is None:
            raise ValueError("kind frame-folders is for clips: set frames, such as frames: 16")
        return self

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def description(self) -> str:
        return f"{self.kind} {', '.join(self.paths)}"

    def open(self) -> "FilesDataset":
        """The data set for training; what it leaves out is printed. Raises TesseraError if its layout is not valid."""
        dataset = FilesDataset(self)
        for note in dataset.notes:
            if note.severity == "warning":
                _print_once(note.text)  # before an error, whose cause may be there
        for note in dataset.notes:
            if note.severity == "error":
                raise TesseraError(note.text)
        return dataset


@functools.cache
def _print_once(text: str) -> None:
    """Print a note on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"data: {text}", file=sys.stderr, flush=True)


class FilesDataset:
    """The samples of an index: encoded files, their labels and captions. It can be pickled.

    A file of clips has one sample, or one for each `data.stride`.

    Attributes:
        notes: what the index leaves out. Data with errors are for `tessera data check` only.
        text: the captions as tokens, where a network reads them.
        path_sizes: how many samples each of config.paths has.
        own_frames: of clips, the number of frames that `data.short` did not add, int32 [N]; known once a clip was read.
    """

    text: "EncodedCaptions | None" = None
    image_sizes: np.ndarray | None = None
    own_frames: np.ndarray | None = None

    def __init__(self, config: FilesConfig) -> None:
        self.config = config
        self.table, self.notes, self.path_sizes = layouts.build_index(config)
        self._prepare()
        if config.stride is not None:
            self._cut_windows(config.stride)

    def _prepare(self) -> None:
        self.root, self.class_names = metadata(self.table)
        self.labels = labels(self.table)  # int32 [N], -1: no label
        self._path, self._offset, self._length, self._caption = (
            self.table[name] for name in ("path", "offset", "length", "caption")
        )
        paths = tables.table_paths(self._path)
        files, config = [self.root / path for path in paths], self.config
        self._tables = dict(zip(paths, tables.open_images(files, config.image, config.frames)))
        self.remote = storage.holds_remote(self.root)
        self._whole = True  # whether files of several samples are downloaded whole, or what is read of them
        if self.remote:
            self._check_room()
        self._spans = None
        if config.frames is not None:
            numbers = [self.table[name].to_numpy(zero_copy_only=False).astype(np.float64) for name in SPAN_COLUMNS]
            self._spans = np.stack(numbers, axis=1)  # NaN: null
            self.own_frames = np.full(len(self.table), config.frames, np.int32)

    def _check_room(self) -> None:
        """Decide how shards are read. Raises TesseraError for tables that have no room on the disk."""
        shards = [path for path in (self.root / name for name in index_shards(self.table)) if storage.is_remote(path)]
        self._states = {str(path): storage.stat(path)[:2] for path in shards}
        total = sum(size for size, _ in self._states.values())
        if total <= storage.limit() or self.config.shuffle_shards is not None:
            return
        if self._tables:
            raise TesseraError(
                f"the tables of {self.config.description} take {total / 1e9:.1f} GB, more than TESSERA_STORAGE_GB "
                f"({storage.limit() / 1e9:.1f}): set data.shuffle_shards, such as data.shuffle_shards=8, or raise it"
            )
        self._whole = False

    def __getstate__(self) -> dict[str, Any]:
        states = self._states if self.remote else {}
        return {
            "config": self.config, "table": self.table, "notes": [], "path_sizes": self.path_sizes, "states": states
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        for path, known in state.pop("states").items():
            storage.expect(Path(path), *known)
        self.__dict__.update(state)
        self._prepare()

    def __len__(self) -> int:
        return len(self.table)

    def label(self, index: int) -> int:
        """The class of a sample, -1 if it has no label; 0 if there are no classes."""
        return int(self.labels[index]) if self.class_names else 0

    def caption(self, index: int) -> str | None:
        """The caption of a sample, of several the first; None if it has none."""
        text = self._caption[index].as_buffer()
        return None if text is None else text.to_pybytes().decode("utf-8", errors="replace")

    def all_captions(self) -> tuple[np.ndarray, Any]:
        """The number of captions of each sample, int64 [N], and all captions in order, an arrow array of strings."""
        counts, texts = self._caption.is_valid().to_numpy().astype(np.int64), self._caption.drop_null()
        others = self.table["other_captions"].combine_chunks()
        if others.null_count == len(others):
            return counts, texts
        rows = np.concatenate((np.flatnonzero(counts), compute().list_parent_indices(others).to_numpy()))
        texts = arrow().chunked_array([*texts.chunks, others.flatten()])
        return np.bincount(rows, minlength=len(self)), texts.take(np.argsort(rows, kind="stable"))

    def name(self, index: int) -> str:
        path, offset = self.root / self._path[index].as_py(), self._offset[index].as_py()
        if offset is None:
            return storage.address(path) if self.remote else str(path)
        if self.remote and storage.is_remote(path):
            return f"{storage.address(path)} {'row' if path.suffix.lower() in TABLE_SUFFIXES else 'byte'} {offset}"
        return (
            f"{path} row {offset}" if path.suffix.lower() in TABLE_SUFFIXES else f"{path} {_member_name(path, offset)}"
        )

    def encoded(self, index: int) -> Path | bytes:
        """The encoded image or clip: a file, a folder of frames, or bytes from a larger file. Raises InvalidSample."""
        path, offset = self._path[index].as_py(), self._offset[index].as_py()
        if offset is None:
            if self.remote and storage.is_remote(self.root / path):
                return storage.read(self.root / path)
            return self.root / path
        if (table := self._tables.get(path)) is not None:
            return table[offset]
        if self.remote and storage.is_remote(file := self.root / path):
            read = storage.read if self._whole else storage.read_range
            return read(file, offset, self._length[index].as_py())
        return _read_bytes(self.root / path, offset, self._length[index].as_py())

    def shard_ids(self) -> np.ndarray:
        """The file of each sample, int64 [N]"""
        return self._path.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)

    def prefetch(self, indices: np.ndarray) -> None:
        """Download the files of samples that are read soon, if they are in a bucket."""
        if self.remote and self._whole:
            paths = {self.root / self._path[index].as_py() for index in indices.tolist()}
            with ThreadPoolExecutor(8) as pool:
                deque(pool.map(storage.fetch, sorted(paths)), maxlen=0)

    def pixels(self, index: int, size: tuple[int, ...] | None = None) -> np.ndarray:
        """uint8 [C, H, W] or [C, T, H, W] of `size` (default: that of the data). Raises InvalidSample."""
        if self.config.frames is None:
            return load_image(self.encoded(index), self.config, size)
        assert self.own_frames is not None
        pixels, self.own_frames[index] = load_clip(self.encoded(index), self.config, self.span(index), size)
        return pixels

    def span(self, index: int) -> Span:
        """The part of its file that a clip is."""
        assert self._spans is not None
        start, end, fps, first = self._spans[index].tolist()
        start, end = 0.0 if math.isnan(start) else start, math.inf if math.isnan(end) else end
        return Span(start, end, 0 if math.isnan(first) else int(first), None if math.isnan(fps) else fps)

    def sizes(self) -> np.ndarray:
        """What buckets are chosen by: height and width of every sample, int32 [N, 2]; of clips after the number of
        frames [N, 3]."""
        shapes = self.shapes()
        return shapes if self.config.frames is None else np.concatenate((self.lengths()[:, None], shapes), axis=1)

    def lengths(self) -> np.ndarray:
        """How many frames each clip could have at the rate of the data, int32 [N]; 0 where it is invalid."""
        counts = np.zeros(len(self), np.int32)

        def count(index: int) -> None:
            with suppress(InvalidSample):
                span = self.span(index)
                counts[index] = max(count_frames(self.encoded(index), self.config, span) - span.first, 0)

        self._for_each(count, np.arange(len(self)))
        return counts

    def _cut_windows(self, stride: int) -> None:
        """Several clips of each file that is long enough. Raises TesseraError if the index has them already."""
        if self.table["first_frame"].null_count < len(self):
            raise TesseraError("this index lists several clips of a file already: leave data.stride out")
        frames = self.config.frames or 1
        counts = np.maximum((self.lengths() - frames) // stride + 1, 1)
        rows = np.repeat(np.arange(len(self)), counts)
        numbers = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        column = self.table.schema.get_field_index("first_frame")
        first = arrow().array(numbers * stride, "int32")
        self.table = self.table.take(rows).set_column(column, "first_frame", first)
        parts = np.repeat(np.arange(len(self.path_sizes)), self.path_sizes)[rows]
        self.path_sizes = np.bincount(parts, minlength=len(self.path_sizes)).tolist()
        self._prepare()

    def shape(self, index: int) -> tuple[int, int]:
        """Height and width as displayed, from the index or else the file's header. Raises InvalidSample."""
        height, width = self.table["height"][index].as_py(), self.table["width"][index].as_py()
        return self._read_shape(index) if height is None or width is None else (height, width)

    def _read_shape(self, index: int) -> tuple[int, int]:
        return (image_shape if self.config.frames is None else clip_shape)(self.encoded(index))

    def shapes(self) -> np.ndarray:
        """Height and width of every sample, int32 [N, 2]; 0 x 0 where an image is invalid."""
        shapes = np.stack([int_column(self.table[name], 0) for name in ("height", "width")], axis=1)

        def read_shape(index: int) -> None:
            with suppress(InvalidSample):
                shapes[index] = self._read_shape(index)

        self._for_each(read_shape, np.flatnonzero((shapes == 0).any(axis=1)))
        return shapes

    @staticmethod
    def _for_each(function: Callable[[int], None], indices: np.ndarray) -> None:
        """Call a function that waits for the disk most of its time."""
        with ThreadPoolExecutor(max(8, 2 * (os.cpu_count() or 1))) as pool:
            for chunk in np.array_split(indices, len(indices) // 1024 + 1):  # an interrupt waits for one chunk
                deque(pool.map(function, chunk.tolist()), maxlen=0)

    def files(self) -> list[Path]:
        """Every file that holds samples, once, in order; of a folder of frames each frame."""
        paths = [self.root / path for path in self._path.unique().to_pylist()]
        if self.config.kind != "frame-folders":
            return paths
        return [file for folder in paths for file in sorted(folder.iterdir()) if file.is_file()]


def _read_bytes(path: Path, offset: int, length: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(length)
    except OSError as error:
        raise InvalidSample(f"damaged: {error}") from None
    if len(content) < length:
        raise InvalidSample(f"damaged: {path} ends within it")
    return content


def _member_name(path: Path, offset: int) -> str:
    """The name of the tar member whose content starts at an offset."""
    with suppress(OSError, tarfile.TarError), path.open("rb") as file:
        # A name that is long or not ASCII is in a member of its own before that of the file, of one block or more.
        for start in (*range(offset - (2 + MAX_NAME_BLOCKS) * TAR_HEADER, offset - TAR_HEADER, TAR_HEADER), None):
            file.seek(max(offset - TAR_HEADER if start is None else start, 0))
            header = file.read(TAR_HEADER)
            file.seek(-len(header), os.SEEK_CUR)
            if start is None or (start >= 0 and header[156:157] in (b"x", b"L") and header[257:262] == b"ustar"):
                member = tarfile.TarFile(fileobj=file).next()
                if member is not None and member.offset_data == offset:
                    return printable(member.name)
    return f"byte {offset}"
