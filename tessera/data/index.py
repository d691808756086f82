"""The index: a data set as one table of samples, whatever its files look like.

A sample is a whole file, a stretch of bytes of a tar, or a row of a parquet or arrow file. The table says so with its
columns `path`, `offset` and `length`, and carries its root, class names and format in its metadata, so that a table
alone is a data set, in memory and on disk.

Shapes: N samples.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tessera.errors import TesseraError
from tessera.files import atomic_file

if TYPE_CHECKING:
    import pyarrow

FORMAT = 1
METADATA_KEY = b"tessera"  # of the metadata
ROW_GROUP_SIZE = 100_000  # of a group in the file
TABLE_SUFFIXES = (".parquet", ".arrow")  # files of rows: `offset` is the number of a row

COLUMNS = {
    "path": "string",  # from the root, with '/' between the parts
    "offset": "int64",  # first byte in a tar, number of the row in a table; null: the whole file
    "length": "int64",  # bytes in a tar; null elsewhere
    "height": "int32",  # as displayed, after the EXIF rotation; null: not looked at yet
    "width": "int32",
    "label": "int32",  # null: none
    "caption": "string",  # null: none
    "hash": "uint64",  # perceptual; null: not looked at yet
    "digest": "string",  # sha256 of the content; null: not looked at yet
}


def arrow() -> Any:
    """pyarrow. Raises TesseraError that says what to install."""
    try:
        import pyarrow
    except ImportError:
        raise TesseraError("reading image data needs pyarrow: pip install pyarrow") from None
    return pyarrow


def compute() -> Any:
    """pyarrow's functions of columns, which it makes when it is imported, unknown to type checkers."""
    arrow()
    import pyarrow.compute

    return pyarrow.compute


def schema() -> "pyarrow.Schema":
    """The columns of every index, without metadata."""
    pa = arrow()
    return pa.schema([(name, getattr(pa, kind)()) for name, kind in COLUMNS.items()])


def build(root: Path, class_names: Sequence[str] = (), **columns: Any) -> "pyarrow.Table":
    """An index of arrays or sequences [N] by column; columns that are not given are null.

    root: an absolute folder, from which the paths count.
    """
    pa = arrow()
    if unknown := columns.keys() - COLUMNS.keys():
        raise ValueError(f"an index has no column {sorted(unknown)}")
    count = len(columns["path"])
    fields = schema()
    made = [
        pa.nulls(count, field.type) if columns.get(field.name) is None else _column(columns[field.name], field.type)
        for field in fields
    ]
    return with_metadata(pa.Table.from_arrays(made, schema=fields), root, class_names)


def _column(values: Any, kind: Any) -> Any:
    pa = arrow()
    if isinstance(values, pa.ChunkedArray | pa.Array):
        return values if values.type == kind else values.cast(kind)
    return pa.array(values, kind)


def with_metadata(table: "pyarrow.Table", root: Path, class_names: Sequence[str]) -> "pyarrow.Table":
    """The table with another root and class names."""
    told = {"format": FORMAT, "root": str(root), "class_names": list(class_names)}
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(told).encode()})


def metadata(table: "pyarrow.Table") -> tuple[Path, tuple[str, ...]]:
    """The root from which the paths count, and the class names."""
    told = json.loads(table.schema.metadata[METADATA_KEY])
    return Path(told["root"]), tuple(told["class_names"])


def concat(tables: Sequence["pyarrow.Table"]) -> "pyarrow.Table":
    """One index of several: classes of one name are one class, numbered as they first appear."""
    if len(tables) == 1:
        return tables[0]
    pa, pc = arrow(), compute()
    roots, names = zip(*map(metadata, tables))
    try:
        root = Path(os.path.commonpath(roots))
    except ValueError:  # on several drives of Windows: the paths stay absolute
        root = Path()
    every = list(dict.fromkeys(name for some in names for name in some))
    number = {name: index for index, name in enumerate(every)}
    parts = []
    for table, own_root, own_names in zip(tables, roots, names):
        above = own_root.relative_to(root).as_posix() if root.is_absolute() else own_root.as_posix()
        if above != ".":
            paths = pc.binary_join_element_wise(above, table["path"], "/")
            table = table.set_column(table.schema.get_field_index("path"), "path", paths)
        renumbered = pa.array([number[name] for name in own_names], pa.int32()).take(table["label"].combine_chunks())
        parts.append(table.set_column(table.schema.get_field_index("label"), "label", renumbered))
    return with_metadata(pa.concat_tables([part.replace_schema_metadata() for part in parts]), root, every)


def write(table: "pyarrow.Table", path: Path) -> None:
    """Write an index as a parquet file, whole or not at all. Raises TesseraError if it cannot be written.

    Where the index lies in its root or above it, the root is written relative to it, so that both may move together.
    """
    from pyarrow import parquet

    root, class_names = metadata(table)
    here = path.expanduser().absolute().parent
    if root.is_relative_to(here) or here.is_relative_to(root):
        root = Path(os.path.relpath(root, here))
    table = with_metadata(table, root, class_names)
    with atomic_file(path) as partial:
        repeated: Any = ["label"]  # a dictionary of paths or captions would cost more than it saves
        parquet.write_table(table, partial, compression="zstd", use_dictionary=repeated, row_group_size=ROW_GROUP_SIZE)


def is_index(path: Path) -> bool:
    """Whether a file is an index; False for every other file, damaged ones among them."""
    import pyarrow.parquet as parquet

    try:
        return METADATA_KEY in (parquet.read_schema(path).metadata or {})
    except (OSError, ValueError):
        return False


def read(path: Path) -> "pyarrow.Table":
    """Read an index. Raises TesseraError if it is damaged, of a newer format, or its root is gone."""
    pa = arrow()
    import pyarrow.parquet as parquet

    try:
        found = parquet.ParquetFile(path).read()
        told = json.loads(found.schema.metadata[METADATA_KEY])
        version, root, class_names = (
            int(told["format"]),
            Path(told["root"]),
            [str(name) for name in told["class_names"]],
        )
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise TesseraError(f"the index {path} is damaged: {error}; write it again") from None
    if version > FORMAT:
        raise TesseraError(f"the index {path} is of format {version}, which is newer than this Tessera: update it")
    fields = schema()
    try:
        found = found.select(fields.names).cast(fields)
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise TesseraError(f"the index {path} has not the columns of an index: {error}; write it again") from None
    root = Path(os.path.normpath(path.absolute().parent / root))
    if not root.is_dir():
        raise TesseraError(
            f"the index {path} is of files in {root}, which is no folder: move them there, or write the index again"
        )
    return with_metadata(found, root, class_names)


def int_column(column: Any, missing: int) -> np.ndarray:
    """A column of whole numbers as int32 [N], with a number for those that are missing."""
    if column.null_count == len(column):
        return np.full(len(column), missing, np.int32)
    if column.null_count:
        column = column.fill_null(missing)
    # Not by to_numpy, which imports pandas where it is installed: most of the time of opening a million samples.
    return np.concatenate([np.from_dlpack(chunk) for chunk in column.chunks])


def labels(table: "pyarrow.Table") -> np.ndarray:
    """The class of every sample, int32 [N]; -1 where there is none."""
    return int_column(table["label"], -1)
