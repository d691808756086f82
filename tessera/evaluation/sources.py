"""What can be scored, as shards of images: a data set, a folder or .npz of samples, and `generation.bulk.BulkSamples`.

Shapes: B images of a shard, H W height and width, C channels (1 or 3).
"""

import hashlib
import sys
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import numpy as np

from tessera import clips, randomness
from tessera.data import AnyData
from tessera.data.clips import open_frames, read_clip
from tessera.data.columns import MAX_CLASSES
from tessera.data.files import FilesConfig, FilesDataset
from tessera.data.folders import VIDEO_SUFFIXES
from tessera.data.images import ImagesConfig, InvalidSample, is_gray, read_image, sample_size
from tessera.data.resolve import open_data
from tessera.errors import TesseraError
from tessera.generation.shards import ImageShard, shard_range
from tessera.images import read_settings

T = TypeVar("T")
GRIDS = ("grid.png", "grid.webp")  # written by `tessera sample`
CLIP_SUFFIXES = ({*clips.ANIMATIONS} - {".png"}) | clips.VIDEOS.keys()
STREAM = 0x726F7773  # random stream of `subset_indices`


class SampleSource(Protocol):
    """Images in a fixed order. Any rank can read any shard."""

    description: str  # for reports and messages
    count: int
    size: tuple[int, ...]  # (H, W) of images, (T, H, W) of clips
    channels: int
    class_names: tuple[str, ...]  # empty: labels, if there are any, are class numbers

    @property
    def plan(self) -> dict[str, Any]:
        """Everything that decides the images. Work saved under another plan is not resumed."""
        ...

    def shard(self, index: int) -> ImageShard: ...


def subset_indices(total: int, limit: int | None) -> np.ndarray:
    """At most `limit` of `total` positions, ascending and always the same ones.

    They are taken from the whole range, because files are often sorted by class.
    """
    if limit is None or total <= limit:
        return np.arange(total)
    return np.sort(randomness.permutation(0, STREAM, 0, total).numpy()[:limit])


class DatasetSource:
    """A data set as training reads it: images are cropped to its size, and invalid ones are skipped."""

    size: tuple[int, ...]

    def __init__(self, config: AnyData, count: int | None = None) -> None:
        self.config, self.dataset = config, open_data(config)
        self.description = config.description
        self._rows = _select(count, len(self.dataset), self.description)
        self.count = len(self._rows)
        self.size, self.channels, self.class_names = sample_size(config), config.channels, self.dataset.class_names

    @property
    def plan(self) -> dict[str, Any]:
        plan: dict[str, Any] = {"data": self.config.model_dump(mode="json"), "count": self.count}
        if isinstance(self.dataset, FilesDataset):
            plan["files"] = _files_hash(self.dataset.files(), self.dataset.root)
        return plan

    def shard(self, index: int) -> ImageShard:
        positions = shard_range(index, self.count)
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(self.image, positions))
        indices = np.array([i for i, image in zip(positions, results) if image is not None], np.int64)
        valid = [image for image in results if image is not None]
        images = np.stack(valid) if valid else np.empty((0, *self.size, self.channels), np.uint8)
        labels = None
        if self.class_names:
            labels = np.array([self.dataset.label(int(row)) for row in self._rows[indices]], np.int64)
        caption = getattr(self.dataset, "caption", None)
        captions = None if caption is None else [caption(int(row)) for row in self._rows[indices]]
        return ImageShard(images, indices, labels, captions)

    def image(self, index: int) -> np.ndarray | None:
        """uint8 [H, W, C], of a clip [T, H, W, C], or None if it is invalid."""
        try:
            return np.moveaxis(self.dataset.pixels(int(self._rows[index])), 0, -1)
        except InvalidSample:
            return None


class FolderSource:
    """A folder of images or clips as they are displayed: they must have one size, and clips one length.

    They have one channel if all are gray (of clips: in their first frames). Clips have the frame rate that is stored
    with them, as `tessera sample` does, else every frame of the file.

    Attributes:
        skipped: the reason by file of each damaged one that was met. It is printed, too.
    """

    size: tuple[int, ...]

    def __init__(self, path: Path, count: int | None = None) -> None:
        self.has_clips = _holds_clips(path.expanduser())
        frames = 1 if self.has_clips else None
        dataset = open_data(FilesConfig(kind="folder", path=str(path), caption=None, size=(1, 1), frames=frames))
        files = [(Path(dataset.name(index)), dataset.label(index)) for index in range(len(dataset))]
        self.description, self.path, self.class_names = f"folder {path}", path, dataset.class_names
        files = [(file, label) for file, label in files if file.name not in GRIDS]
        if not files:
            raise TesseraError(f"{path} holds a grid of samples only: sample with a folder, not a .png, as --out")
        files = [files[index] for index in _select(count, len(files), self.description)]
        self.paths, self.count = [file for file, _ in files], len(files)
        self.skipped: dict[Path, str] = {}
        gray = {path: self._usable(_is_gray_clip if self.has_clips else is_gray, path) for path in self.paths}
        readable = [path for path, value in gray.items() if value is not None]
        self.channels = 3 if False in gray.values() else 1
        self._config = ImagesConfig(channels=1 if self.channels == 1 else 3)
        images = ((path, self._usable(self._pixels, path)) for path in readable)
        self._first, first = next(((path, image) for path, image in images if image is not None), (None, None))
        if first is None:
            raise TesseraError(f"{path} holds no image that can be scored: {next(iter(self.skipped.values()))}")
        self.size = first.shape[:-1]
        if dataset.class_names:
            self._labels = [label for _, label in files]
        else:
            saved = dict(zip(readable, _saved_labels(readable)))
            self._labels = [saved.get(path, -1) for path in self.paths] if saved else None

    @property
    def plan(self) -> dict[str, Any]:
        return {"folder": _files_hash(self.paths, self.path.expanduser().absolute()), "count": self.count}

    def shard(self, index: int) -> ImageShard:
        images = {i: self._read(self.paths[i]) for i in shard_range(index, self.count)}
        valid = {i: image for i, image in images.items() if image is not None}
        stacked = np.stack(list(valid.values())) if valid else np.empty((0, *self.size, self.channels), np.uint8)
        labels = None if self._labels is None else np.array([self._labels[i] for i in valid], np.int64)
        captions = [_saved_prompt(self.paths[i]) for i in valid]
        return ImageShard(stacked, np.array(list(valid), np.int64), labels, captions if any(captions) else None)

    def _usable(self, read: Callable[..., T], path: Path, *arguments: Any) -> T | None:
        """What `read` returns for a file, None if it is damaged."""
        try:
            return read(path, *arguments)
        except InvalidSample as error:
            if path not in self.skipped:
                self.skipped[path] = f"{path} is skipped: {error}"
                print(self.skipped[path], file=sys.stderr, flush=True)
            return None

    def _read(self, path: Path) -> np.ndarray | None:
        pixels = self._usable(self._pixels, path)
        if pixels is not None and pixels.shape[:-1] != self.size:
            size, other = (" x ".join(map(str, each)) for each in (pixels.shape[:-1], self.size))
            raise TesseraError(
                f"{path} is {size}, but {self._first} is {other}: samples are scored as they are, at one size; give "
                "--size to crop and scale all of them like data"
            )
        return pixels

    def _pixels(self, path: Path) -> np.ndarray:
        """uint8 [H, W, C], of a clip [T, H, W, C]. Raises InvalidSample."""
        if self.has_clips:
            settings = _saved_settings(path)
            return read_clip(path, settings.get("fps") if isinstance(settings, dict) else None, self.channels)
        pixels = np.asarray(read_image(path, self._config))
        return pixels[..., None] if self.channels == 1 else pixels


class NpzSource:
    """The .npz of the ADM evaluation suite: arr_0 uint8 [N, H, W, C], and optionally the labels as arr_1.

    Clips are [N, T, H, W, C].
    """

    size: tuple[int, ...]

    def __init__(self, path: Path, count: int | None = None) -> None:
        self.path, self.description = path, f"npz {path}"
        self._file: IO[bytes] | None = None
        self._offset = 0
        if not path.exists():
            raise TesseraError(f"{path} does not exist: give an .npz of images, a folder of samples or a model")
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                if "arr_0.npy" not in names:
                    contents = ", ".join(name.removesuffix(".npy") for name in names) or "nothing"
                    raise TesseraError(f"{path} holds {contents}; expected the images as arr_0 [N, H, W, C]")
                with archive.open("arr_0.npy") as member:
                    shape, dtype = _npy_header(member)
                labels = _read_npy(archive, "arr_1.npy") if "arr_1.npy" in names else None
        except TesseraError:
            raise
        except Exception as error:  # readers raise any exception on damaged bytes
            raise TesseraError(f"{path} is truncated or not an .npz file: {error}") from None
        if len(shape) not in (4, 5) or 0 in shape[1:] or shape[-1] not in (1, 3) or dtype != np.uint8:
            raise TesseraError(
                f"{path}: arr_0 is {dtype} {list(shape)}; expected uint8 [N, H, W, 3 or 1], or [N, T, H, W, 3 or 1]"
            )
        if not shape[0]:
            raise TesseraError(f"{path} holds no images: arr_0 is {list(shape)}")
        self._shape = shape
        self._rows = _select(count, shape[0], self.description)
        self.count = len(self._rows)
        self.size, self.channels = tuple(shape[1:-1]), shape[-1]
        self.class_names: tuple[str, ...] = ()
        self._labels = None if labels is None else _check_labels(labels, shape[0], path)

    @property
    def plan(self) -> dict[str, Any]:
        stat = self.path.stat()
        return {"npz": [stat.st_size, stat.st_mtime_ns], "count": self.count}

    def shard(self, index: int) -> ImageShard:
        positions = shard_range(index, self.count)
        rows, image_bytes = self._rows[positions], int(np.prod(self._shape[1:]))
        try:
            content = b"".join(self._read(int(row) * image_bytes, image_bytes) for row in rows)
        except Exception as error:  # readers raise any exception on damaged bytes
            raise TesseraError(f"{self.path} is damaged: {error}") from None
        if len(content) != len(positions) * image_bytes:
            raise TesseraError(f"{self.path} is truncated: image {rows[-1]} of {self._shape[0]} is missing")
        images = np.frombuffer(content, np.uint8).reshape(len(positions), *self._shape[1:])
        return ImageShard(images, np.array(positions), None if self._labels is None else self._labels[rows])

    def _read(self, start: int, length: int) -> bytes:
        """Bytes of the array. The file stays open between shards: a compressed one can only be read forward."""
        if self._file is None or start < self._offset:
            self._file = zipfile.ZipFile(self.path).open("arr_0.npy")  # noqa: SIM115
            _npy_header(self._file)
            self._offset = 0
        while self._offset < start:
            skipped = len(self._file.read(min(start - self._offset, 1 << 24)))
            if not skipped:
                return b""
            self._offset += skipped
        content = self._file.read(length)
        self._offset += len(content)
        return content


def _holds_clips(folder: Path) -> bool:
    """Whether a folder has videos, or animations that `tessera sample` may have written."""
    files = (path for path in sorted(folder.rglob("*")) if path.name not in GRIDS)
    for path in files:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            return True
        if path.suffix.lower() in CLIP_SUFFIXES:
            with suppress(InvalidSample), open_frames(path) as frames:
                return len(frames.times) > 2
    return False


def _is_gray_clip(path: Path) -> bool:
    """Whether the first frame of a clip has no colors. Raises InvalidSample."""
    with open_frames(path) as frames:
        pixels = np.asarray(frames.read([0])[0].convert("RGB"))
    return bool((pixels == pixels[..., :1]).all())


def _saved_labels(paths: list[Path]) -> list[int]:
    """The classes that `tessera sample` saved in its PNG files; empty if one of the files has none."""
    labels = []
    for path in paths:
        match _saved_settings(path):
            case {"classes": [int(label)]} if 0 <= label < MAX_CLASSES:
                labels.append(label)
            case _:
                return []
    return labels


def _saved_prompt(path: Path) -> str | None:
    """The prompt that `tessera sample` saved in a PNG file."""
    match _saved_settings(path):
        case {"prompts": [str(prompt)]}:
            return prompt
    return None


def _saved_settings(path: Path) -> Any:
    try:
        suffix = path.suffix.lower()
        if suffix in CLIP_SUFFIXES:
            return clips.read_settings(path)
        return read_settings(path) if suffix == ".png" else None
    except Exception:  # damaged bytes, or another program's settings: reading the image reports what is wrong
        return None


def _check_labels(labels: np.ndarray, count: int, path: Path) -> np.ndarray:
    """arr_1 as int64 [N]. Raises TesseraError if it does not hold class numbers."""
    if labels.shape != (count,):
        raise TesseraError(f"{path}: arr_1 has shape {list(labels.shape)}; expected [{count}], one label per image")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TesseraError(f"{path}: arr_1 is {labels.dtype}; expected class numbers")
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < MAX_CLASSES:
            raise TesseraError(f"{path}: arr_1 holds the label {label}; expected class numbers")
    return labels.astype(np.int64)


def _files_hash(files: Sequence[Path], root: Path) -> str:
    """A hash of the names, sizes and modification times of files in a folder."""
    stats = [(str(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _select(count: int | None, total: int, description: str) -> np.ndarray:
    """The positions of the requested number of images."""
    if count is not None and count > total:
        raise TesseraError(f"{count:,} images are requested, but {description} holds {total:,}: lower --num-samples")
    return subset_indices(total, count)


def _npy_header(member: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(member)
    if fortran_order:
        raise ValueError("its array is stored in Fortran order")
    return shape, dtype


def _read_npy(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as member:
        return np.lib.format.read_array(member, allow_pickle=False)
