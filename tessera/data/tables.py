"""Parquet and arrow files of rows: which column is what, labels as class numbers, images at hand in any order.

Shapes: N rows.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tessera.data.images import InvalidSample
from tessera.data.index import TABLE_SUFFIXES, arrow, compute
from tessera.errors import TesseraError
from tessera.files import atomic_file, cache_folder
from tessera.settings import unknown_name

if TYPE_CHECKING:
    import pyarrow

MAX_CLASSES = 100_000  # more are identities of rows, not classes
MAX_IN_MEMORY = 1 << 30  # bytes of images in parquet files that are held in memory; more are unpacked onto the disk
LABEL_COLUMNS, CAPTION_COLUMNS = (
    ("label", "class"),
    ("caption", "text"),
)  # columns that `auto` looks for, the first first
ROWS_PER_BATCH = 256  # rows that are unpacked at a time


class ColumnOptions(Protocol):
    """What a configuration says of columns: a name, `auto`, or null for none."""

    @property
    def image(self) -> str: ...
    @property
    def label(self) -> str | None: ...
    @property
    def caption(self) -> str | None: ...


def table_paths(paths: Any) -> list[str]:
    """The tables among paths, an arrow array [N], each once."""
    pc = compute()
    ends = [pc.ends_with(paths, ending) for ending in TABLE_SUFFIXES]
    return paths.filter(pc.or_(*ends)).unique().to_pylist()


def read_schema(file: Path) -> "pyarrow.Schema":
    """The columns of a file. Raises TesseraError if it is damaged."""
    pa = arrow()
    import pyarrow.parquet as parquet

    try:
        return parquet.read_schema(file) if file.suffix == ".parquet" else _reader(file).schema
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are no text
        raise TesseraError(f"{file} is damaged or no {file.suffix[1:]} file: {error}") from None


def read_columns(file: Path, columns: Sequence[str]) -> "pyarrow.Table":
    """Columns of a file: of parquet in memory, of arrow memory-mapped. Raises TesseraError if it is damaged."""
    pa = arrow()
    import pyarrow.parquet as parquet

    try:
        if file.suffix == ".parquet":
            return parquet.ParquetFile(file).read(columns=list(columns))
        return _reader(file).read_all().select(list(columns))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise TesseraError(f"{file} is damaged or no {file.suffix[1:]} file: {error}") from None


def _reader(file: Path) -> Any:
    pa = arrow()
    mapped = pa.memory_map(str(file))
    magic = mapped.read(6)
    mapped.seek(0)
    return pa.ipc.open_file(mapped) if magic == b"ARROW1" else pa.ipc.open_stream(mapped)  # `datasets` writes streams


def find_column(
    asked: str | None, usual: Sequence[str], known: Sequence[str], where: Path | str, field: str
) -> str | None:
    """The column that is meant: the one asked for, for `auto` the first usual one; None if there is none.

    Raises TesseraError if the one asked for is missing.
    """
    if asked == "auto":
        return next((name for name in usual if name in known), None)
    if asked is not None and asked not in known:
        raise TesseraError(f"{where}: {unknown_name('column', asked, known)} (data.{field})")
    return asked


def find_image_column(found: "pyarrow.Schema", asked: str, file: Path) -> str:
    """The column of images: the one asked for; for `auto` image, or the one declared as such, or the one of bytes."""
    pa = arrow()
    if asked != "auto" or "image" in found.names:
        return find_column("image" if asked == "auto" else asked, (), found.names, file, "image") or ""
    declared = [
        name for name, told in _features(found).items() if isinstance(told, dict) and told.get("_type") == "Image"
    ]
    bytes_ = [
        field.name
        for field in found
        if pa.types.is_binary(field.type)
        or pa.types.is_large_binary(field.type)
        or (pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]
    for names in (declared, bytes_):
        if len(set(names) & set(found.names)) == 1:
            return names[0]
    raise TesseraError(f"{file}: say which column holds the images with data.image; it has {', '.join(found.names)}")


def encode_labels(values: Any, names: Sequence[str], what: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and the class of every row, int32 [N], from labels in words or numbers.

    values: an arrow array [N]; names: of numbers, if they are known; what: for messages, "column 'label'".
    Raises TesseraError if a label is missing, or the labels are neither.
    """
    pa, pc = arrow(), compute()
    count = len(values)
    if values.null_count:
        raise TesseraError(
            f"{values.null_count} of {count} rows have no label in {what}; "
            "give them one, or set data.classes=none to train without classes"
        )
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        try:
            # One dictionary for all chunks, in the order in which its words first appear.
            coded = pc.dictionary_encode(values.cast(kind)).unify_dictionaries().combine_chunks()
            words = coded.dictionary.to_pylist()
        except (pa.ArrowException, ValueError) as error:
            raise TesseraError(f"{what} is damaged: {error}") from None
        ordered = sorted(words)
        place = {word: number for number, word in enumerate(ordered)}
        return tuple(ordered), np.array([place[word] for word in words], np.int32)[coded.indices.to_numpy()]
    if not pa.types.is_integer(kind) or (count and pc.min(values).as_py() < 0):
        raise TesseraError(f"{what} holds neither class numbers nor names; set data.label")
    most = pc.max(values).as_py() if count else -1
    if not names:
        if most >= MAX_CLASSES:
            raise TesseraError(f"{what} holds {most}, which is no class number; set data.label")
        names = [str(number) for number in range(most + 1)]
    if most >= len(names):
        raise TesseraError(f"{what} holds class {most}, but the file names {len(names)} classes")
    return tuple(names), values.cast(pa.int32()).to_numpy()


def class_names(found: "pyarrow.Schema", label: str) -> tuple[str, ...]:
    """The class names that Hugging Face's `datasets` writes into a file's metadata, or none."""
    try:
        return tuple(str(name) for name in _features(found)[label]["names"])
    except (KeyError, TypeError):
        return ()


def _features(found: "pyarrow.Schema") -> dict[str, Any]:
    """What `datasets` writes of the columns into a file's metadata."""
    try:
        told = json.loads((found.metadata or {})[b"huggingface"])["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return told if isinstance(told, dict) else {}


class ImageColumn:
    """The encoded images of one file, by the number of the row."""

    def __init__(self, column: Any, folder: Path) -> None:
        pa, pc = arrow(), compute()
        self.folder = folder
        self.paths = None
        if pa.types.is_struct(column.type):
            fields = [column.type.field(number).name for number in range(column.type.num_fields)]
            self.paths = pc.struct_field(column, "path") if "path" in fields else None
            column = pc.struct_field(column, "bytes") if "bytes" in fields else None
        elif not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            column = None
        self.bytes = column
        if column is not None and not column.null_count:
            self.paths = None  # never asked for

    def __getitem__(self, row: int) -> Path | bytes:
        """The content, or the file that a row names instead. Raises Unusable."""
        try:
            content = None if self.bytes is None else self.bytes[row].as_py()
            named = self.paths[row].as_py() if content is None and self.paths is not None else None
        except ValueError as error:
            raise InvalidSample(f"damaged: {error}") from None
        if isinstance(content, bytes):
            return content
        if isinstance(named, str) and (self.folder / named).is_file():
            return self.folder / named
        raise InvalidSample("holds no image bytes")


def open_images(files: Sequence[Path], asked: str) -> list[ImageColumn]:
    """The images of files, held in memory if they are small, otherwise memory-mapped.

    Parquet has no access to a single row, so large files are unpacked once, into the folder of caches.
    Raises TesseraError if a file is damaged or cannot be unpacked.
    """
    columns = [find_image_column(read_schema(file), asked, file) for file in files]
    packed = sum(_unpacked_size(file, column) for file, column in zip(files, columns) if file.suffix == ".parquet")
    found = []
    for file, column in zip(files, columns):
        at_hand = _unpacked(file, column) if packed > MAX_IN_MEMORY and file.suffix == ".parquet" else file
        found.append(ImageColumn(read_columns(at_hand, [column])[column], file.parent))
    return found


def cache_path(file: Path, kind: str, ending: str, *asked: Any) -> Path:
    """Where what was made of a file is kept, in the folder of caches: elsewhere once the file changes."""
    state = file.stat()
    key = repr((str(file.resolve()), state.st_size, state.st_mtime_ns, *asked))
    return cache_folder() / kind / f"{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}{ending}"


def _unpacked_size(file: Path, column: str) -> int:
    """Bytes of a column of a parquet file, unpacked."""
    import pyarrow.parquet as parquet

    try:
        told = parquet.read_metadata(file)
        groups = [told.row_group(number) for number in range(told.num_row_groups)]
        parts = [group.column(place) for group in groups for place in range(group.num_columns)]
        return sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] == column)
    except (OSError, ValueError) as error:
        raise TesseraError(f"{file} is damaged or no parquet file: {error}") from None


def _unpacked(file: Path, column: str) -> Path:
    """A column of a parquet file as an arrow file in the folder of caches, made if it is not there."""
    pa = arrow()
    import pyarrow.parquet as parquet
    from filelock import FileLock

    target = cache_path(file, "tables", ".arrow", column)
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TesseraError(f"cannot write {target.parent}: {error.strerror or error}; set TESSERA_CACHE") from None
    with FileLock(target.with_suffix(".lock")):  # of several processes one unpacks, the others wait
        if target.exists():
            return target
        print(f"unpacking {file.name} once into {target}, to read its rows in any order", file=sys.stderr, flush=True)
        try:
            source = parquet.ParquetFile(file)
            with atomic_file(target) as partial, pa.OSFile(str(partial), "wb") as sink:
                kind = pa.schema([source.schema_arrow.field(column)])
                with pa.ipc.new_file(sink, kind) as writer:
                    for batch in source.iter_batches(batch_size=ROWS_PER_BATCH, columns=[column]):
                        writer.write_batch(batch.cast(kind))
        except (pa.ArrowException, ValueError) as error:
            raise TesseraError(f"{file} is damaged or no parquet file: {error}") from None
    return target


def count_rows(file: Path) -> int:
    """How many rows a file has. Raises TesseraError if it is damaged."""
    pa = arrow()
    import pyarrow.parquet as parquet

    try:
        if file.suffix == ".parquet":
            return parquet.read_metadata(file).num_rows
        return _reader(file).read_all().num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise TesseraError(f"{file} is damaged or no {file.suffix[1:]} file: {error}") from None
