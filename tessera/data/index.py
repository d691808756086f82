"""The index: a data set as one table of samples, independent of the layout of its files.

A sample is a whole file, a byte range of a tar, or a row of a parquet or arrow file, given by the columns `path`,
`offset` and `length`; or a part of a clip. The root, class names and format are in the table's metadata, so the table
alone is a complete data set, in memory and on disk.

Shapes: N samples.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tessera import storage
from tessera.errors import TesseraError
from tessera.files import atomic_file, cache_folder, this_writer

if TYPE_CHECKING:
    import pyarrow

FORMAT = 1
FILE = "index.parquet"  # of a remote folder that is read by its index, without listing it
METADATA_KEY, STATES_KEY = b"tessera", b"tessera files"
ROW_GROUP_SIZE = 100_000
MAX_ROWS_IN_MEMORY = 500_000  # of an index; a larger one is memory-mapped
TABLE_SUFFIXES = (".parquet", ".arrow")  # in these files `offset` is the number of a row

COLUMNS = {
    "path": "string",  # relative to the root, with '/'
    "offset": "int64",  # first byte in a tar, row number in a table; null: the whole file
    "length": "int64",  # bytes in a tar; null elsewhere
    "height": "int32",  # as displayed, after the EXIF rotation; null: not measured
    "width": "int32",
    "label": "int32",  # null: none
    "caption": "string",  # null: none
    "other_captions": "list",  # further ones, of samples with several; null: none
    "hash": "uint64",  # perceptual; null: not measured
    "digest": "string",  # sha256 of the content; null: not measured
    # Of clips, null elsewhere:
    "start": "float64",  # seconds; null: the beginning
    "end": "float64",  # seconds; null: the end
    "fps": "float64",  # of a folder of frames; null: not stated
    "first_frame": "int32",  # of one of several clips in a file, counted from the start at the rate of the data
}
SPAN_COLUMNS = ("start", "end", "fps", "first_frame")
ADDED_COLUMNS = ("other_captions", *SPAN_COLUMNS)  # since the first version of the format


def arrow() -> Any:
    """The module pyarrow. Raises TesseraError with what to install."""
    try:
        import pyarrow
    except ImportError:
        raise TesseraError("reading image data needs pyarrow: pip install pyarrow") from None
    return pyarrow


def compute() -> Any:
    """The module pyarrow.compute. It creates its functions at import, so type checkers do not know them."""
    arrow()
    import pyarrow.compute

    return pyarrow.compute


def schema() -> "pyarrow.Schema":
    """The columns of every index, without metadata."""
    pa = arrow()
    kinds = {"list": pa.list_(pa.string())}
    return pa.schema([(name, kinds.get(kind) or getattr(pa, kind)()) for name, kind in COLUMNS.items()])


def build(root: Path, class_names: Sequence[str] = (), **columns: Any) -> "pyarrow.Table":
    """An index from arrays or sequences [N] by column name; other columns are null, and so are labels of -1.

    root: the absolute folder that the paths are relative to.
    """
    pa = arrow()
    if unknown := columns.keys() - COLUMNS.keys():
        raise ValueError(f"an index has no column {sorted(unknown)}")
    count = len(columns["path"])
    fields = schema()
    arrays = [
        pa.nulls(count, field.type) if columns.get(field.name) is None else _column(columns[field.name], field.type)
        for field in fields
    ]
    return with_metadata(pa.Table.from_arrays(arrays, schema=fields), root, class_names)


def _column(values: Any, kind: Any) -> Any:
    pa = arrow()
    if isinstance(values, pa.ChunkedArray | pa.Array):
        return values if values.type == kind else values.cast(kind)
    if isinstance(values, np.ndarray):
        return pa.array(values, kind, mask=values < 0)
    return pa.array(values, kind)


def with_metadata(table: "pyarrow.Table", root: Path | str, class_names: Sequence[str]) -> "pyarrow.Table":
    """The table with this root and these class names."""
    values = {"format": FORMAT, "root": str(root), "class_names": list(class_names)}
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(values).encode()})


def shards(table: "pyarrow.Table") -> list[str]:
    """The paths of the files that hold several samples, once each."""
    return table["path"].filter(table["offset"].is_valid()).unique().to_pylist()


def metadata(table: "pyarrow.Table") -> tuple[Path, tuple[str, ...]]:
    """The root that the paths are relative to, and the class names."""
    values = json.loads(table.schema.metadata[METADATA_KEY])
    return Path(values["root"]), tuple(values["class_names"])


def concat(tables: Sequence["pyarrow.Table"]) -> "pyarrow.Table":
    """Several indexes as one. Classes with the same name are one class; they are numbered by first appearance."""
    if len(tables) == 1:
        return tables[0]
    pa, pc = arrow(), compute()
    roots, names = zip(*map(metadata, tables))
    try:
        root = Path(os.path.commonpath(roots))
    except ValueError:  # on different drives of Windows: the paths stay absolute
        root = Path()
    all_names = list(dict.fromkeys(name for table_names in names for name in table_names))
    number = {name: index for index, name in enumerate(all_names)}
    parts = []
    for table, table_root, table_names in zip(tables, roots, names):
        prefix = table_root.relative_to(root).as_posix() if root.is_absolute() else table_root.as_posix()
        if prefix != ".":
            paths = pc.binary_join_element_wise(prefix, table["path"], "/")
            paths = pc.if_else(pc.starts_with(table["path"], "/"), table["path"], paths)  # outside the root
            table = table.set_column(table.schema.get_field_index("path"), "path", paths)
        renumbered = pa.array([number[name] for name in table_names], pa.int32()).take(table["label"].combine_chunks())
        parts.append(table.set_column(table.schema.get_field_index("label"), "label", renumbered))
    return with_metadata(pa.concat_tables([part.replace_schema_metadata() for part in parts]), root, all_names)


def write(table: "pyarrow.Table", path: Path) -> None:
    """Write an index as a parquet file, atomically. Raises TesseraError if it cannot be written.

    If the index is in its root or above it, the root is saved as a relative path, so that both can be moved together.
    """
    write_parts([table], table, path)


def write_parts(parts: Iterable["pyarrow.Table"], table: "pyarrow.Table", path: Path) -> None:
    """`write` of parts that follow each other, which need not be in memory together.

    table: with the root, the class names and all files of the parts.
    """
    from pyarrow import parquet

    path = storage.locate(path)
    root, class_names = metadata(table)
    here = path.expanduser().absolute().parent
    # Not from a local index into the cache folder, which stands for a bucket on this machine alone.
    is_near = storage.is_remote(root) == storage.is_remote(path.absolute())
    if is_near and (root.is_relative_to(here) or here.is_relative_to(root)):
        root = Path(os.path.relpath(root, here))
    states = {}
    if storage.holds_remote(metadata(table)[0]):
        paths = {name: metadata(table)[0] / name for name in shards(table)}
        states = {name: list(storage.stat(each)[:2]) for name, each in paths.items() if storage.is_remote(each)}
    columns = with_metadata(table.slice(0, 0), storage.address(root), class_names).schema
    if states:  # by which a changed file is noticed
        columns = columns.with_metadata({**columns.metadata, STATES_KEY: json.dumps(states).encode()})
    dictionary_columns: Any = ["label"]  # for paths and captions a dictionary costs more than it saves
    with (
        atomic_file(path, this_writer()) as partial,
        parquet.ParquetWriter(partial, columns, compression="zstd", use_dictionary=dictionary_columns) as writer,
    ):
        for part in parts:
            writer.write_table(part.replace_schema_metadata(columns.metadata), row_group_size=ROW_GROUP_SIZE)
    storage.publish(path)


def is_index(path: Path) -> bool:
    """Whether a file is an index; False for any other file, damaged ones included."""
    import pyarrow.parquet as parquet

    try:
        return METADATA_KEY in (parquet.read_schema(storage.fetch(path)).metadata or {})
    except (OSError, ValueError):
        return False


def _read_table(path: Path) -> "pyarrow.Table":
    """A parquet file in memory; a large one unpacked once into the cache folder and memory-mapped."""
    pa = arrow()
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(path)
    if file.metadata.num_rows <= MAX_ROWS_IN_MEMORY:
        return file.read()
    state = path.stat()
    key = hashlib.sha256(repr((str(path.resolve()), state.st_size, state.st_mtime_ns)).encode()).hexdigest()[:16]
    target = cache_folder() / "indexes" / f"{path.stem}-{key}.arrow"
    if not target.exists():
        with (
            atomic_file(target, this_writer()) as partial,
            pa.OSFile(str(partial), "wb") as sink,
            pa.ipc.new_file(sink, file.schema_arrow) as writer,
        ):
            for batch in file.iter_batches(ROW_GROUP_SIZE):
                writer.write_batch(batch)
    return pa.ipc.open_file(pa.memory_map(str(target))).read_all()


def read(path: Path) -> "pyarrow.Table":
    """Read an index. Raises TesseraError if it is damaged, has another format, or its root does not exist."""
    pa = arrow()

    try:
        table = _read_table(storage.fetch(path))
        values = json.loads(table.schema.metadata[METADATA_KEY])
        version, root, class_names = (
            int(values["format"]),
            storage.locate(values["root"]),
            list(map(str, values["class_names"])),
        )
        states = json.loads(table.schema.metadata.get(STATES_KEY, b"{}"))
        if version == FORMAT:
            for column in schema():  # an index of an earlier version has fewer
                if column.name in ADDED_COLUMNS and column.name not in table.column_names:
                    table = table.append_column(column.name, pa.nulls(len(table), column.type))
            table = table.select(schema().names).cast(schema())
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise TesseraError(f"the index {path} is damaged: {error}; write it again") from None
    if version != FORMAT:
        raise TesseraError(f"the index {path} has format {version}; this version of Tessera reads format {FORMAT} only")
    root = Path(os.path.normpath(path.absolute().parent / root))
    for name, (size, mtime) in states.items():
        storage.expect(root / name, size, mtime)
    if not storage.holds_remote(root) and not root.is_dir():
        raise TesseraError(
            f"the files of the index {path} are expected in {root}, which is not a folder: "
            "move them there, or write the index again"
        )
    return with_metadata(table, root, class_names)


def fingerprint(table: "pyarrow.Table") -> dict[str, Any]:
    """The number of samples, and hashes of what they are in their order (`samples`), of their labels and captions.

    A run stores it, to notice at its next start that the data changed. The root does not matter.
    """
    several = table["other_captions"].null_count < len(table)
    captions = ("caption", "other_captions") if several else ("caption",)
    spans = tuple(name for name in SPAN_COLUMNS if table[name].null_count < len(table))
    parts = {"samples": ("path", "offset", "length", *spans), "labels": ("label",), "captions": captions}
    result: dict[str, Any] = {"count": len(table)}
    for part, columns in parts.items():
        digest = hashlib.blake2b(digest_size=16)
        if part == "labels":
            digest.update(json.dumps(metadata(table)[1]).encode())
        for name in columns:
            _update_digest(digest, table[name])
        result[part] = digest.hexdigest()
    return result


def _update_digest(digest: Any, column: Any) -> None:
    """Hash the values of a column of integers, text or lists; how they are divided into chunks does not matter."""
    pa, pc = arrow(), compute()
    types = pa.types
    is_list = types.is_list(column.type) or types.is_large_list(column.type)
    if types.is_integer(column.type) or types.is_floating(column.type):
        number = pa.int64() if types.is_integer(column.type) else pa.float64()
        for chunk in column.chunks:
            digest.update(chunk.cast(number).fill_null(-1).to_numpy())
        return
    count = pc.list_value_length if is_list else pc.binary_length
    for chunk in column.chunks:
        digest.update(count(chunk).cast(pa.int64()).fill_null(-1).to_numpy())
    if is_list:
        _update_digest(digest, pc.list_flatten(column))
        return
    for chunk in column.chunks:
        text = chunk.cast(pa.large_string()).fill_null("")  # 64-bit offsets, whatever the type
        _, offsets, content = text.buffers()
        limits = np.frombuffer(offsets, np.int64)[text.offset : text.offset + len(text) + 1]
        if content is not None:
            digest.update(memoryview(content)[limits[0] : limits[-1]])


def int_column(column: Any, missing: int) -> np.ndarray:
    """A column of integers as int32 [N], with `missing` in place of null."""
    if column.null_count == len(column):
        return np.full(len(column), missing, np.int32)
    if column.null_count:
        column = column.fill_null(missing)
    # Not to_numpy: it imports pandas if that is installed, which takes most of the time of opening a million samples.
    return np.concatenate([np.from_dlpack(chunk) for chunk in column.chunks])


def labels(table: "pyarrow.Table") -> np.ndarray:
    """The class of every sample, int32 [N]; -1: no label"""
    return int_column(table["label"], -1)
