"""What can be scored, as shards of pictures: data, a folder or .npz of samples; what a model draws is in drawn.py.

A shard is the unit of work: processes share them out, a killed evaluation goes on with the first one missing.

Shapes: n pictures of a shard, H W height and width, C channels (1 or 3).
"""

import hashlib
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image

from tessera import randomness
from tessera.data import AnyData
from tessera.data.files import FilesConfig, FilesSource
from tessera.data.images import ImagesConfig, InvalidSample, flatten
from tessera.data.resolve import open_data
from tessera.data.tables import MOST_CLASSES
from tessera.errors import TesseraError
from tessera.images import read_settings

SHARD = 250
STREAM = 0x726F7773  # of randomness: which rows stand for many


@dataclass(frozen=True)
class ImageShard:
    """pictures uint8 [n, H, W, C]; row [n]: their numbers in the subject; label [n], or None without classes."""

    pictures: np.ndarray
    row: np.ndarray
    label: np.ndarray | None


class SampleSource(Protocol):
    """Pictures in a fixed order, read a shard at a time by any process."""

    where: str  # for people
    count: int
    size: tuple[int, int]
    channels: int
    class_names: tuple[str, ...]  # empty: labels, where there are any, are numbers

    @property
    def plan(self) -> dict[str, Any]:
        """What decides its pictures: work begun under another plan is not gone on with."""
        ...

    def shard(self, index: int) -> ImageShard: ...


def rows(subject: SampleSource, index: int) -> range:
    """The numbers of the pictures in a shard."""
    return range(index * SHARD, min((index + 1) * SHARD, subject.count))


def chosen(there: int, most: int | None) -> np.ndarray:
    """The numbers of at most `most` of `there`, in order, always the same ones, from everywhere: files lie by class."""
    if most is None or there <= most:
        return np.arange(there)
    return np.sort(randomness.permutation(0, STREAM, 0, there).numpy()[:most])


def shards(subject: SampleSource) -> int:
    return -(-subject.count // SHARD)


class Data:
    """A data set as training reads it: cropped to its size, unusable images left out."""

    def __init__(self, config: AnyData, count: int | None = None) -> None:
        self.config, self.source = config, open_data(config)
        self.where = config.where
        self._numbers = _enough(count, len(self.source), self.where)
        self.count = len(self._numbers)
        self.size, self.channels, self.class_names = config.size, config.channels, self.source.class_names

    @property
    def plan(self) -> dict[str, Any]:
        told: dict[str, Any] = {"data": self.config.model_dump(mode="json"), "count": self.count}
        if isinstance(self.source, FilesSource):
            told["files"] = _state(self.source.files(), self.source.root)
        return told

    def shard(self, index: int) -> ImageShard:
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(self.picture, rows(self, index)))
        row = np.array([row for row, picture in zip(rows(self, index), read) if picture is not None], np.int64)
        kept = [picture for picture in read if picture is not None]
        pictures = np.stack(kept) if kept else np.empty((0, *self.size, self.channels), np.uint8)
        found = [self.source.label(int(number)) for number in self._numbers[row]] if self.class_names else None
        return ImageShard(pictures, row, None if found is None else np.array(found, np.int64))

    def picture(self, row: int) -> np.ndarray | None:
        """uint8 [H, W, C], or None where the image cannot be used."""
        try:
            return self.source.pixels(int(self._numbers[row])).transpose(1, 2, 0)
        except InvalidSample:
            return None


class Folder:
    """A folder of samples, taken exactly as they are: one size, nothing damaged, nothing left out."""

    def __init__(self, path: Path, count: int | None = None) -> None:
        source = open_data(FilesConfig(kind="folder", path=str(path), caption=None, size=(1, 1)))
        found = [(Path(source.name(index)), source.label(index)) for index in range(len(source))]
        self.where, self.path, self.class_names = f"folder {path}", path, source.class_names
        found = [(place, label) for place, label in found if place.name != "grid.png"]  # of `tessera sample`
        if not found:
            raise TesseraError(f"{path} holds no samples, only a grid of them: draw without a .png as --out")
        found = [found[number] for number in _enough(count, len(found), self.where)]
        self.paths, self.count = [place for place, _ in found], len(found)
        self._labels = [label for _, label in found] if source.class_names else _asked(self.paths) or None
        first = self._open(self.paths[0])
        self.size = (first.height, first.width)
        self.channels = 1 if _grey(first) else 3

    @property
    def plan(self) -> dict[str, Any]:
        return {"folder": _state(self.paths, self.path.expanduser().absolute()), "count": self.count}

    def shard(self, index: int) -> ImageShard:
        row = rows(self, index)
        pictures = np.stack([self._picture(self.paths[number]) for number in row])
        label = None if self._labels is None else np.array([self._labels[number] for number in row], np.int64)
        return ImageShard(pictures, np.array(row), label)

    def _open(self, path: Path) -> Image.Image:
        try:
            with Image.open(path) as image:
                image.load()
                return image
        except Exception as error:  # decoders raise anything on damaged bytes
            raise TesseraError(f"{path} cannot be scored: it is damaged or no image ({error})") from None

    def _picture(self, path: Path) -> np.ndarray:
        image = self._open(path)
        if (image.height, image.width) != self.size:
            raise TesseraError(
                f"{path} is {image.height} x {image.width}, but {self.paths[0]} is {self.size[0]} x {self.size[1]}: "
                "samples are scored as they are, at one size; give --size to crop and scale all of them like data"
            )
        if self.channels == 1 and not _grey(image):
            raise TesseraError(f"{path} is in colour, but {self.paths[0]} is grey: samples are scored as they are")
        pixels = np.asarray(flatten(image, ImagesConfig(size=self.size, channels=1 if self.channels == 1 else 3)))
        return pixels[..., None] if self.channels == 1 else pixels


class Npz:
    """The .npz of the ADM suite: arr_0 uint8 [N, H, W, C], and arr_1 the labels where they are told."""

    def __init__(self, path: Path, count: int | None = None) -> None:
        self.path, self.where = path, f"npz {path}"
        self._open: IO[bytes] | None = None
        self._at = 0
        if not path.exists():
            raise TesseraError(f"there is nothing at {path}: give an .npz of pictures, a folder of samples or a model")
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                if "arr_0.npy" not in names:
                    held = ", ".join(name.removesuffix(".npy") for name in names)
                    raise TesseraError(f"{path} holds {held or 'nothing'}; pictures are expected as arr_0 [N, H, W, C]")
                with archive.open("arr_0.npy") as member:
                    self._shape, self._type = _npy_header(member)
                self._labels = _small(archive, "arr_1.npy") if "arr_1.npy" in names else None
        except TesseraError:
            raise
        except Exception as error:  # readers raise anything on damaged bytes
            raise TesseraError(f"{path} is truncated or no .npz file: {error}") from None
        shape = self._shape
        if len(shape) != 4 or not shape[1] * shape[2] or shape[3] not in (1, 3) or self._type != np.uint8:
            raise TesseraError(f"{path}: arr_0 is {self._type} {list(shape)}; expected uint8 [N, H, W, 3 or 1]")
        if not shape[0]:
            raise TesseraError(f"{path} holds no pictures: arr_0 is {list(shape)}")
        self._numbers = _enough(count, self._shape[0], self.where)
        self.count = len(self._numbers)
        self.size, self.channels = (self._shape[1], self._shape[2]), self._shape[3]
        self.class_names: tuple[str, ...] = ()
        if self._labels is not None:
            self._labels = _class_numbers(self._labels, shape[0], path)

    @property
    def plan(self) -> dict[str, Any]:
        told = self.path.stat()
        return {"npz": [told.st_size, told.st_mtime_ns], "count": self.count}

    def shard(self, index: int) -> ImageShard:
        row = rows(self, index)
        each = int(np.prod(self._shape[1:]))
        try:
            content = b"".join(self._read(int(number) * each, each) for number in self._numbers[row])
        except Exception as error:  # readers raise anything on damaged bytes
            raise TesseraError(f"{self.path} is damaged: {error}") from None
        if len(content) != len(row) * each:
            raise TesseraError(
                f"{self.path} is truncated: picture {self._numbers[row][-1]} of {self._shape[0]} is missing"
            )
        pictures = np.frombuffer(content, np.uint8).reshape(len(row), *self._shape[1:])
        return ImageShard(pictures, np.array(row), None if self._labels is None else self._labels[self._numbers[row]])

    def _read(self, start: int, length: int) -> bytes:
        """Bytes of the array. The file stays open between shards: a compressed one can only be read onwards."""
        if self._open is None or start < self._at:
            self._open = zipfile.ZipFile(self.path).open("arr_0.npy")  # noqa: SIM115
            _npy_header(self._open)
            self._at = 0
        while self._at < start:
            skipped = len(self._open.read(min(start - self._at, 1 << 24)))
            if not skipped:
                return b""
            self._at += skipped
        content = self._open.read(length)
        self._at += len(content)
        return content


def _asked(paths: list[Path]) -> list[int]:
    """The classes that pictures drawn by `tessera sample` were asked for; none if one of them does not say."""
    found = []
    for path in paths:
        try:
            said = read_settings(path) if path.suffix.lower() == ".png" else None
        except Exception:  # damaged bytes, or settings of somebody else; reading it as a picture tells what is wrong
            said = None
        match said:
            case {"classes": [int(told)]} if 0 <= told < MOST_CLASSES:
                found.append(told)
            case _:
                return []
    return found


def _class_numbers(labels: np.ndarray, count: int, path: Path) -> np.ndarray:
    """arr_1 as int64 [N], or TesseraError."""
    if labels.shape != (count,):
        raise TesseraError(f"{path}: arr_1 holds {list(labels.shape)} labels of {count} pictures")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TesseraError(f"{path}: arr_1 is {labels.dtype}; expected the numbers of classes")
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < MOST_CLASSES:
            raise TesseraError(f"{path}: arr_1 holds the label {label}; expected the numbers of classes")
    return labels.astype(np.int64)


def _state(files: Sequence[Path], root: Path) -> str:
    """A hash that changes with any of the files below a folder."""
    stats = [(str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def _enough(asked: int | None, there: int, where: str) -> np.ndarray:
    """The numbers of as many pictures as are asked for, out of those that are there."""
    if asked is not None and asked > there:
        raise TesseraError(f"{asked:,} pictures are asked for, but {where} holds {there:,}: lower --count")
    return chosen(there, asked)


def _npy_header(member: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, kind = read(member)
    if fortran:
        raise ValueError("its array is stored column by column")
    return shape, kind


def _small(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as member:
        return np.lib.format.read_array(member, allow_pickle=False)
