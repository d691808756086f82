"""Parquet and arrow files: the columns of images, labels and captions, and random access to the images.

Shapes: N rows.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessera import storage
from tessera.data.columns import find_key
from tessera.data.images import InvalidSample
from tessera.data.index import TABLE_SUFFIXES, arrow, compute
from tessera.errors import TesseraError
from tessera.files import atomic_file, cache_folder
from tessera.settings import unknown_name

if TYPE_CHECKING:
    import pyarrow

NO_BYTES = "no image bytes in this row, or they cannot be unpacked"
MAX_IN_MEMORY = 1 << 26  # bytes of parquet images that each process holds; more are unpacked once and memory-mapped
OPEN_TABLES = 16  # tables of a bucket that are mapped at once
ROWS_PER_BATCH = 256  # rows unpacked at once


def table_paths(paths: Any) -> list[str]:
    """The tables among paths, an arrow array [N], each once."""
    pc = compute()
    is_table = pc.or_(*(pc.ends_with(paths, suffix, ignore_case=True) for suffix in TABLE_SUFFIXES))
    return paths.filter(is_table).unique().to_pylist()


def is_parquet(file: Path) -> bool:
    return file.suffix.lower() == ".parquet"


@contextmanager
def _read_errors(file: Path) -> Iterator[None]:
    """Any error of pyarrow as TesseraError."""
    try:
        yield
    except (arrow().ArrowException, OSError, ValueError) as error:  # ValueError: names that are not valid text
        raise TesseraError(f"{file} is damaged or not a valid {file.suffix[1:]} file: {error}") from None


def read_schema(file: Path) -> "pyarrow.Schema":
    """The columns of a file. Raises TesseraError if it is damaged."""
    import pyarrow.parquet as parquet

    with _read_errors(file):
        return parquet.read_schema(storage.fetch(file)) if is_parquet(file) else _reader(file).schema


def read_columns(file: Path, columns: Sequence[str]) -> "pyarrow.Table":
    """Columns of a file: parquet in memory, arrow memory-mapped. Raises TesseraError if it is damaged."""
    import pyarrow.parquet as parquet

    with _read_errors(file):
        if is_parquet(file):
            return parquet.ParquetFile(storage.fetch(file)).read(columns=list(columns))
        return _reader(file).read_all().select(list(columns))


def count_rows(file: Path) -> int:
    """The number of rows of a file. Raises TesseraError if it is damaged."""
    import pyarrow.parquet as parquet

    with _read_errors(file):
        return (
            parquet.read_metadata(storage.fetch(file)).num_rows
            if is_parquet(file)
            else _reader(file).read_all().num_rows
        )


def _reader(file: Path) -> Any:
    pa = arrow()
    mapped = pa.memory_map(str(storage.fetch(file)))
    magic = mapped.read(6)
    mapped.seek(0)
    return pa.ipc.open_file(mapped) if magic == b"ARROW1" else pa.ipc.open_stream(mapped)  # `datasets` writes streams


def find_column(
    name: str | None, defaults: Sequence[str], known: Sequence[str], where: Path | str, field: str
) -> str | None:
    """The column to read: the named one, or for `auto` the first of the defaults that exists; None if there is none.

    Raises TesseraError if the named column is missing.
    """
    if name not in (None, "auto", *known):
        raise TesseraError(f"{where}: {unknown_name('column', name, known)} (data.{field})")
    return find_key(name, defaults, known)


def find_image_column(columns: "pyarrow.Schema", name: str, file: Path, frames: int | None = None) -> str:
    """The column of images: the named one; for `auto` "image", else the only one declared as images, or of bytes.

    frames: where the data are clips, "video" and "clip" come first.

    Raises TesseraError if there is none or more than one.
    """
    pa = arrow()
    defaults = ("image",) if frames is None else ("video", "clip", "image")
    if column := find_column(name, defaults, columns.names, file, "image"):
        return column
    declared = [
        name
        for name, feature in _features(columns).items()
        if isinstance(feature, dict) and feature.get("_type") in ("Image", "Video")
    ]
    binary = [
        field.name
        for field in columns
        if pa.types.is_binary(field.type)
        or pa.types.is_large_binary(field.type)
        or (pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]
    for names in (declared, binary):
        if len(set(names) & set(columns.names)) == 1:
            return names[0]
    raise TesseraError(f"{file}: set data.image to the column of images; the columns are {', '.join(columns.names)}")


def declared_labels(columns: "pyarrow.Schema") -> list[str]:
    """The columns that a file's metadata declares as labels, as Hugging Face's `datasets` writes it."""
    features = _features(columns).items()
    return [name for name, each in features if isinstance(each, dict) and each.get("_type") == "ClassLabel"]


def class_names(columns: "pyarrow.Schema", label: str) -> tuple[str, ...]:
    """The class names in a file's metadata, as Hugging Face's `datasets` writes them, or none."""
    try:
        return tuple(str(name) for name in _features(columns)[label]["names"])
    except (KeyError, TypeError):
        return ()


def _features(columns: "pyarrow.Schema") -> dict[str, Any]:
    """The descriptions of columns in a file's metadata, as `datasets` writes them."""
    try:
        features = json.loads((columns.metadata or {})[b"huggingface"])["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


class ImageColumn:
    """The encoded images of one file, by row number."""

    def __init__(self, column: Any, folder: Path) -> None:
        pa, pc = arrow(), compute()
        self.folder = folder
        self.paths = None
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_struct(column.type):
            fields = [column.type.field(number).name for number in range(column.type.num_fields)]
            self.paths = pc.struct_field(column, "path") if "path" in fields else None
            column = pc.struct_field(column, "bytes") if "bytes" in fields else None
        elif not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            column = None
        self.bytes = column
        if column is not None and not column.null_count:
            self.paths = None  # not needed

    def __getitem__(self, row: int) -> Path | bytes:
        """The content, or the file that a row names instead. Raises InvalidSample."""
        try:
            content = None if self.bytes is None else self.bytes[row].as_py()
            path = self.paths[row].as_py() if content is None and self.paths is not None else None
        except ValueError as error:
            raise InvalidSample(f"damaged: {error}") from None
        if isinstance(content, bytes):
            return content
        if isinstance(path, str) and (self.folder / path).is_file():
            return self.folder / path
        raise InvalidSample(NO_BYTES)


class RemoteColumn:
    """The encoded images of a table in a bucket, which is downloaded and unpacked when a row of it is read."""

    def __init__(self, file: Path, name: str, frames: int | None) -> None:
        self.file, self.name, self.frames = file, name, frames

    def __getitem__(self, row: int) -> Path | bytes:
        return _opened(self.file, self.name, self.frames)[row]


@functools.lru_cache(maxsize=OPEN_TABLES)
def _opened(file: Path, name: str, frames: int | None) -> ImageColumn:
    column = find_image_column(read_schema(file), name, file, frames)
    values = read_columns(_unpacked(file, column), [column])[column] if is_parquet(file) else _read_images(file, column)
    return ImageColumn(values, file.parent)


def open_images(files: Sequence[Path], name: str, frames: int | None = None) -> Sequence[ImageColumn | RemoteColumn]:
    """The images of files, in memory if they are small, otherwise memory-mapped.

    Parquet has no random access to rows, so large files are unpacked once, into the cache folder.
    Raises TesseraError if a file is damaged or cannot be unpacked.
    """
    if any(map(storage.is_remote, files)):
        return [RemoteColumn(file, name, frames) for file in files]
    columns = [find_image_column(read_schema(file), name, file, frames) for file in files]
    packed = sum(_unpacked_size(file, column) for file, column in zip(files, columns) if is_parquet(file))
    images = []
    for file, column in zip(files, columns):
        if packed > MAX_IN_MEMORY and is_parquet(file):
            values = read_columns(_unpacked(file, column), [column])[column]
        else:
            values = _read_images(file, column)
        images.append(ImageColumn(values, file.parent))
    return images


def _read_images(file: Path, column: str) -> Any:
    """A column of images. Rows of a parquet file that cannot be unpacked are null."""
    pa = arrow()
    try:
        return read_columns(file, [column])[column]
    except TesseraError:
        if not is_parquet(file):
            raise
    with _read_errors(file):
        batches = list(_readable_batches(file, column))
        return pa.chunked_array([batch[column] for batch in batches], read_schema(file).field(column).type)


def _readable_batches(file: Path, column: str) -> Iterator["pyarrow.RecordBatch"]:
    """The rows of a column of a parquet file; null from damaged bytes on to the end of their row group."""
    pa = arrow()
    import pyarrow.parquet as parquet

    source = parquet.ParquetFile(storage.fetch(file))
    kind = pa.schema([source.schema_arrow.field(column)])
    for group in range(source.num_row_groups):
        missing = source.metadata.row_group(group).num_rows
        try:
            for batch in source.iter_batches(batch_size=ROWS_PER_BATCH, row_groups=[group], columns=[column]):
                missing -= batch.num_rows
                yield batch.cast(kind)
        except (pa.ArrowException, OSError, ValueError):
            yield pa.record_batch([pa.nulls(missing, kind.field(0).type)], kind)


def cache_path(file: Path, kind: str, suffix: str, *options: Any) -> Path:
    """The path in the cache folder for what is derived from a file with some options; another once the file changes."""
    state = storage.stat(file)
    key = repr((str(file.resolve()), state.st_size, state.st_mtime_ns, *options))
    return cache_folder() / kind / f"{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}{suffix}"


def _unpacked_size(file: Path, column: str) -> int:
    """Bytes of a column of a parquet file, unpacked."""
    import pyarrow.parquet as parquet

    with _read_errors(file):
        statistics = parquet.read_metadata(file)
        groups = [statistics.row_group(number) for number in range(statistics.num_row_groups)]
        chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
        return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)


def _unpacked(file: Path, column: str) -> Path:
    """A column of a parquet file as an arrow file in the cache folder, which is written if it does not exist."""
    pa = arrow()
    import pyarrow.parquet as parquet
    from filelock import FileLock

    target = cache_path(file, "tables", ".arrow", column)
    if storage.is_remote(file):
        target = storage.unpacked_folder() / target.name
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TesseraError(f"cannot write {target.parent}: {error.strerror or error}; set TESSERA_CACHE") from None
    with FileLock(target.with_suffix(".lock")):  # one of several processes unpacks, the others wait
        if target.exists():
            return target
        print(f"unpacking {file.name} once into {target}, for random access to its rows", file=sys.stderr, flush=True)
        with _read_errors(file), atomic_file(target) as partial, pa.OSFile(str(partial), "wb") as sink:
            kind = pa.schema([parquet.read_schema(storage.fetch(file)).field(column)])
            with pa.ipc.new_file(sink, kind) as writer:
                for batch in _readable_batches(file, column):
                    writer.write_batch(batch)
    if storage.is_remote(file):
        storage.make_room(target)
    return target
