"""Writing of one shard: its samples decoded, resized, described and encoded, and a record of what it holds.
Samples are images, or clips: a clip is encoded as soon as it is read, and its middle frame stands for it.

A shard is a function of the recipe and of its samples, and is written under another name and then renamed. So it may be
written by any process, at any time, twice, and has the same bytes.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from tessera import storage
from tessera.clips import DEFAULT_FPS, encode_clip
from tessera.data.build.recipe import BuildRecipe
from tessera.data.check.scan import short_name
from tessera.data.clips import Span, frame_numbers, open_frames
from tessera.data.files import FilesConfig, FilesDataset
from tessera.data.images import InvalidSample, decoding_errors, flatten, read_image
from tessera.data.index import arrow
from tessera.errors import TesseraError
from tessera.files import atomic_file, this_writer

if TYPE_CHECKING:
    import pyarrow

    from tessera.encoders.captioner import Captioner

CHUNK = 64  # samples in memory at once; of a captioner its batch
FRAMES_AT_ONCE = 32  # of a clip at the size of its source
MAX_FRAMES = 512  # of a clip, which is in memory at its new size
ROWS_PER_GROUP = 256  # of parquet, whose groups are unpacked whole
SUFFIXES = {"jpeg": "jpg", "png": "png", "webp": "webp", "mp4": "mp4"}
SHARDS, RECORDS = "shards", "records"  # folders of the output, and of the work


@dataclass
class Sample:
    """One sample that is written. captions: without empty ones. image: of a clip its middle frame. frames, fps: of a
    clip."""

    row: int
    source: str
    name: str
    label: int
    captions: list[str]
    original_size: tuple[int, int]  # height and width before resizing
    image: Image.Image
    content: bytes = b""  # encoded
    frames: int = 0
    fps: float = 0.0


class Writer(Protocol):
    def add(self, sample: Sample, number: int) -> tuple[int, int | None]:
        """Write a sample; returns its offset and length as in an index."""
        ...

    def close(self) -> None: ...


class TarWriter:
    """A WebDataset tar. Nothing in it depends on the time or the user."""

    def __init__(self, path: Path, recipe: BuildRecipe, class_names: Sequence[str], several: bool) -> None:
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._suffix, self._class_names = SUFFIXES[recipe.file_format], class_names

    def add(self, sample: Sample, number: int) -> tuple[int, int]:
        offset = self._tar.offset + tarfile.BLOCKSIZE
        self._member(f"{number:09d}.{self._suffix}", sample.content)
        if len(sample.captions) == 1:
            self._member(f"{number:09d}.txt", sample.captions[0].encode())
        if sample.label >= 0:
            self._member(f"{number:09d}.cls", self._class_names[sample.label].encode())
        height, width = sample.original_size
        facts: dict[str, Any] = {"source": sample.source, "name": sample.name, "height": height, "width": width}
        if sample.frames:
            facts |= {"frames": sample.frames, "fps": sample.fps}
        if len(sample.captions) > 1:
            facts["caption"] = sample.captions
        self._member(f"{number:09d}.json", json.dumps(facts, ensure_ascii=False).encode())
        return offset, len(sample.content)

    def _member(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        self._tar.close()


class ParquetWriter:
    """A parquet file as on the Hugging Face hub: images as a struct of bytes and path."""

    def __init__(self, path: Path, recipe: BuildRecipe, class_names: Sequence[str], several: bool) -> None:
        pa = arrow()
        from pyarrow import parquet

        columns: dict[str, Any] = {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})}
        columns["caption"] = pa.list_(pa.string()) if several else pa.string()
        columns |= {"label": pa.string()} if class_names else {}
        columns |= {"source": pa.string(), "name": pa.string(), "height": pa.int32(), "width": pa.int32()}
        self._schema = pa.schema(columns)
        self._file = parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._suffix, self._class_names, self._several = SUFFIXES[recipe.file_format], class_names, several
        self._rows: list[dict[str, Any]] = []
        self._written = 0

    def add(self, sample: Sample, number: int) -> tuple[int, None]:
        height, width = sample.original_size
        captions = sample.captions or None
        row = {
            "image": {"bytes": sample.content, "path": f"{number:09d}.{self._suffix}"},
            "caption": captions if self._several or captions is None else captions[0],
            "label": self._class_names[sample.label] if sample.label >= 0 else None,
            **{"source": sample.source, "name": sample.name, "height": height, "width": width},
        }
        self._rows.append({name: row[name] for name in self._schema.names})
        self._written += 1
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()
        return self._written - 1, None

    def _flush(self) -> None:
        self._file.write_table(arrow().Table.from_pylist(self._rows, self._schema))
        self._rows = []

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._file.close()


@dataclass
class ShardRecord:
    """What a shard holds, as columns of an index, and the samples that could not be written after all."""

    columns: dict[str, list[Any]] = field(
        default_factory=lambda: {name: [] for name in ("offset", "length", "height", "width", "label", "digest")}
    )
    captions: list[list[str]] = field(default_factory=list)
    left_out: list[tuple[int, str, str]] = field(default_factory=list)  # row, reason, detail
    cut: int = 0  # clips of which only the first frames were written

    def table(self) -> "pyarrow.Table":
        pa = arrow()
        types = {name: pa.int32() for name in ("height", "width", "label")}
        types |= {"offset": pa.int64(), "length": pa.int64(), "digest": pa.string()}
        columns = {name: pa.array(values, types[name]) for name, values in self.columns.items()}
        columns["caption"] = pa.array([texts[0] if texts else None for texts in self.captions], pa.string())
        others = [texts[1:] or None for texts in self.captions]
        columns["other_captions"] = pa.array(others, pa.list_(pa.string()))
        return pa.table(columns)


@dataclass(frozen=True)
class ShardWriter:
    """Writes shards by number. It can be pickled.

    datasets: of the sources. limits: where the samples of each shard start in `rows`, [K + 1]. labels: class numbers of
    all samples. several: whether any sample has several captions. key: of everything that the bytes depend on.
    """

    recipe: BuildRecipe
    datasets: tuple[FilesDataset, ...]
    rows: np.ndarray
    limits: tuple[int, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    several: bool
    key: str
    output: Path
    work: Path

    def __len__(self) -> int:
        return len(self.limits) - 1

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.datasets)])

    def name(self, number: int) -> str:
        return f"{SHARDS}/{number:06d}.{self.recipe.format}"

    def record_path(self, number: int) -> Path:
        return self.work / RECORDS / f"{number:06d}.arrow"

    def is_written(self, number: int) -> bool:
        """Whether a shard is there with all its bytes, and a record of the same samples."""
        metadata = self.read_metadata(number)
        return metadata is not None and storage.size_of(self.output / self.name(number)) == metadata["bytes"]

    def read_metadata(self, number: int) -> dict[str, Any] | None:
        """key, bytes, sha256, cut and left_out of a shard; None without a valid record of it."""
        pa = arrow()
        try:
            with pa.memory_map(str(self.record_path(number))) as file:
                metadata = json.loads(pa.ipc.open_file(file).schema.metadata[b"record"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return metadata if metadata["key"] == self.key else None

    def read_record(self, number: int) -> "pyarrow.Table":
        """The columns of an index of a shard, memory-mapped."""
        pa = arrow()
        return pa.ipc.open_file(pa.memory_map(str(self.record_path(number)))).read_all().replace_schema_metadata()

    def place(self, row: int) -> tuple[FilesDataset, int]:
        """The data set of a sample, and its row there."""
        number = int(np.searchsorted(self._starts, row, "right")) - 1
        return self.datasets[number], row - int(self._starts[number])

    def write(self, number: int) -> Iterator[int]:
        """Write a shard and its record; yields numbers of finished samples. Raises TesseraError."""
        target, record = self.output / self.name(number), ShardRecord()
        rows = self.rows[self.limits[number] : self.limits[number + 1]].tolist()
        captioner = self._captioner
        size = CHUNK if self.recipe.frames is None else 1
        size = size if self.recipe.captioner is None else self.recipe.captioner.batch_size
        kind = TarWriter if self.recipe.format == "tar" else ParquetWriter
        with atomic_file(target, this_writer()) as partial:
            file = kind(partial, self.recipe, self.class_names, self.several)
            for start in range(0, len(rows), size):
                chunk = rows[start : start + size]
                for sample in self._read(chunk, captioner, record):
                    self._add(file, sample, self.limits[number] + len(record.captions), record)
                yield len(chunk)
            file.close()
            with partial.open("rb") as written:
                digest = hashlib.file_digest(written, "sha256").hexdigest()
            bytes_written = partial.stat().st_size
        storage.publish(target)
        metadata = {"key": self.key, "bytes": bytes_written, "sha256": digest, "left_out": record.left_out}
        metadata["cut"] = record.cut
        self._write_record(number, record, metadata)

    def _write_record(self, number: int, record: ShardRecord, metadata: dict[str, Any]) -> None:
        pa = arrow()
        table = record.table().replace_schema_metadata({"record": json.dumps(metadata)})
        with (
            atomic_file(self.record_path(number), this_writer()) as partial,
            pa.OSFile(str(partial), "wb") as file,
            pa.ipc.new_file(file, table.schema) as writer,
        ):
            writer.write_table(table)

    def _add(self, file: Writer, sample: Sample, number: int, record: ShardRecord) -> None:
        if self.recipe.frames is None:
            sample.content = encode(sample.image, self.recipe)
        height, width = sample.image.height, sample.image.width
        if self.recipe.file_format == "mp4":  # of odd sides one more pixel is written
            height, width = height + height % 2, width + width % 2
        offset, length = file.add(sample, number)
        values = (offset, length, height, width, sample.label if sample.label >= 0 else None)
        for column, value in zip(record.columns.values(), (*values, hashlib.sha256(sample.content).hexdigest())):
            column.append(value)
        record.captions.append(sample.captions)

    def _read(self, rows: Sequence[int], captioner: "Captioner | None", record: ShardRecord) -> list[Sample]:
        """The samples of some rows that can be read, with captions."""
        by_dataset: dict[int, list[int]] = {}
        for row in rows:
            by_dataset.setdefault(int(np.searchsorted(self._starts, row, "right")) - 1, []).append(row)
        for source, own in by_dataset.items():
            if self.datasets[source].remote:
                self.datasets[source].prefetch(np.array(own) - self._starts[source])
        samples = []
        for row in rows:
            try:
                samples.append(self._read_sample(row, record))
            except InvalidSample as error:
                record.left_out.append((row, "damaged", str(error)))
        config = self.recipe.captioner
        if captioner is not None and config is not None:
            uncaptioned = [sample for sample in samples if config.replace or not sample.captions]
            texts = captioner([sample.image for sample in uncaptioned]) if uncaptioned else []
            for sample, text in zip(uncaptioned, texts):
                sample.captions = [text] if text else []
        if self.recipe.require_captions:
            empty = [sample for sample in samples if not sample.captions]
            record.left_out += [(sample.row, "missing-captions", "the captioner wrote none") for sample in empty]
            samples = [sample for sample in samples if sample.captions]
        return samples

    def _read_sample(self, row: int, record: ShardRecord) -> Sample:
        dataset, own = self.place(row)
        frames, fps, content = 0, 0.0, b""
        try:
            if self.recipe.frames is None:
                image = read_image(dataset.encoded(own), dataset.config)
                original = (image.height, image.width)
                with decoding_errors():  # without memory for the pixels
                    small = resize(image, self.recipe)
            else:
                clip = read_clip(dataset.encoded(own), dataset.span(own), self.recipe, dataset.config)
                small, original = clip.images[len(clip.images) // 2], clip.original_size
                frames, fps, content = len(clip.images), clip.fps, encode_frames(clip, self.recipe)
                record.cut += clip.is_cut
        except OSError as error:
            raise InvalidSample(f"cannot be read: {error.strerror or error}") from None
        others = dataset.table["other_captions"][own].as_py() or []
        captions = [(text or "").strip() for text in (dataset.caption(own), *others)]
        return Sample(
            row,
            dataset.config.paths[0],
            short_name(dataset, own),
            int(self.labels[row]),
            list(filter(None, captions)),
            original,
            small,
            content,
            frames,
            fps,
        )

    @cached_property
    def _captioner(self) -> "Captioner | None":
        config = self.recipe.captioner
        if config is None:
            return None
        from tessera import runtime
        from tessera.encoders.captioner import Captioner

        device = runtime.choose_device(config.device)
        return Captioner(Path(config.source).expanduser(), config.prompt, config.max_tokens, device)


def resize(image: Image.Image, recipe: BuildRecipe) -> Image.Image:
    """The image with its shorter side at recipe.size; unchanged where that would enlarge it, unless allowed."""
    shorter = min(image.size)
    if recipe.size is None or shorter == recipe.size or (shorter < recipe.size and not recipe.upscale):
        return image
    width, height = (max(round(side * recipe.size / shorter), recipe.size) for side in image.size)
    return image.resize((width, height), Image.Resampling[recipe.resampling.upper()])


@dataclass
class ResizedClip:
    """The frames of a clip after resizing. original_size: height and width before. is_cut: whether it had more."""

    images: list[Image.Image]
    fps: float
    original_size: tuple[int, int]
    is_cut: bool


def frame_limit(recipe: BuildRecipe) -> int:
    """How many frames of a clip are written at most."""
    return recipe.max_frames or max(MAX_FRAMES, recipe.frames or 0)


def read_clip(source: Path | bytes, span: Span, recipe: BuildRecipe, config: FilesConfig) -> ResizedClip:
    """Decode the first frames of a clip at the frame rate of the recipe, and resize them. Raises InvalidSample."""
    span.check()
    limit = frame_limit(recipe)
    with open_frames(source, span.fps) as frames:
        numbers = frame_numbers(frames, recipe.fps, span, limit + 1)
        is_cut, numbers = len(numbers) > limit, numbers[:limit]
        unique, inverse = np.unique(numbers, return_inverse=True)
        images: list[Image.Image] = []
        sizes: set[tuple[int, int]] = set()
        for start in range(0, len(unique), FRAMES_AT_ONCE):
            for image in frames.read(unique[start : start + FRAMES_AT_ONCE].tolist()):
                sizes.add(image.size)
                images.append(resize(flatten(image, config), recipe))
        if len(sizes) != 1:
            raise InvalidSample("its frames have different sizes" if sizes else "it has no frames")
        fps = recipe.fps
        if fps is None:
            seconds = float(frames.times[numbers[-1] + 1] - frames.times[numbers[0]])
            fps = len(numbers) / seconds if frames.is_timed and seconds > 0 else DEFAULT_FPS
    width, height = sizes.pop()
    return ResizedClip([images[number] for number in inverse], round(fps, 3), (height, width), is_cut)


def encode_frames(clip: ResizedClip, recipe: BuildRecipe) -> bytes:
    """A video or an animation in memory, without metadata, by one thread: x264 writes other bytes with more."""
    pixels = np.stack([np.asarray(image) for image in clip.images])
    pixels = pixels if pixels.ndim == 4 else pixels[..., None]
    return encode_clip(pixels, f".{recipe.file_format}", clip.fps, quality=recipe.quality, threads=1)


def encode(image: Image.Image, recipe: BuildRecipe) -> bytes:
    """An image file in memory, without metadata."""
    options: dict[str, Any] = {
        "jpeg": {"quality": recipe.quality, "subsampling": "4:4:4" if recipe.quality >= 90 else "4:2:0"},
        "png": {},
        "webp": {"quality": recipe.quality},
    }[recipe.file_format]
    buffer = io.BytesIO()
    try:
        image.info = {}  # text and profiles of the source, which Pillow would write
        image.save(buffer, recipe.file_format, **options)
    except OSError as error:
        raise TesseraError(f"cannot encode {recipe.file_format}: {error}; set encoding") from None
    return buffer.getvalue()
