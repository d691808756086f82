"""Metadata files: one row per image, as JSON Lines, CSV or parquet. A row that cannot be read is named and left out."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tessera import storage
from tessera.data import tables
from tessera.data.columns import can_be_text, decode_text, read_texts
from tessera.data.index import arrow
from tessera.errors import TesseraError

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # in order of preference, in any case
FILE_NAME = "file_name"  # the column with the path of the image, relative to the folder of the file
FILE_NAMES = (FILE_NAME, "path")  # the names that it may have, in order of preference and in any case
SPAN_NAMES = ("start", "end", "fps")  # columns of clips: seconds in the file, and frames per second of a folder
DELIMITERS = ",;\t"
MAX_FIELD = 2**31 - 1  # characters of one value of a CSV file


@dataclass
class MetadataRows:
    """The rows of a metadata file.

    names: of all columns; columns: the selected ones, as an arrow array, a list of text from CSV, or a list of values
    from JSON; numbers: of the row or line of each; unreadable: rows that are left out, with the reason.
    """

    unit: str  # what numbers count: "line" or "row"
    names: list[str]
    columns: dict[str, Any]
    numbers: list[int]
    unreadable: list[str] = field(default_factory=list)
    is_guessed: bool = False  # whether the encoding was guessed
    is_typed: bool = True  # whether text and numbers differ

    def __len__(self) -> int:
        return len(self.numbers)

    def row_name(self, row: int) -> str:
        return f"{self.unit} {self.numbers[row]}"


def read_metadata(file: Path, select: Callable[[str], bool]) -> MetadataRows:
    """The columns that `select` accepts. Raises TesseraError if no row can be read."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        schema = tables.read_schema(file)
        rows = tables.read_columns(file, [name for name in schema.names if select(name)])
        columns = {name: rows[name] for name in rows.column_names}
        return MetadataRows("row", schema.names, columns, list(range(len(rows))))
    try:
        text, is_guessed = decode_text(storage.read(file))
    except OSError as error:
        raise TesseraError(f"{file} cannot be read: {error.strerror or error}") from None
    if text is None:
        raise TesseraError(f"{file} is damaged: it is not text")
    rows = (_read_csv if suffix == ".csv" else _read_json_lines)(text, select)
    rows.is_guessed = is_guessed
    if not rows.numbers:
        raise TesseraError(f"{file} is damaged: " + (rows.unreadable or ["it has no rows"])[0])
    return rows


def _read_json_lines(text: str, select: Callable[[str], bool]) -> MetadataRows:
    rows = MetadataRows("line", [], {}, [])
    names: dict[str, None] = {}
    for number, fields in _json_objects(text):
        if not isinstance(fields, dict):
            rows.unreadable.append(f"line {number}: {fields}")
            continue
        names.update(dict.fromkeys(fields))
        for name in fields:
            if name not in rows.columns and select(name):
                rows.columns[name] = [None] * len(rows.numbers)
        for name, values in rows.columns.items():
            values.append(fields.get(name))
        rows.numbers.append(number)
    rows.names = list(names)
    return rows


def _json_objects(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The number of each line and its object, or what is wrong with it. A whole file may also be one JSON array."""
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
            yield from (
                (number, row if isinstance(row, dict) else "no JSON object") for number, row in enumerate(rows, 1)
            )
            return
        except ValueError:
            pass
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"not JSON ({error})"
        else:
            yield number, fields if isinstance(fields, dict) else "no JSON object"


def _read_csv(text: str, select: Callable[[str], bool]) -> MetadataRows:
    header = text.split("\n", 1)[0].strip().lower()
    delimiters = [mark for mark in DELIMITERS if {*FILE_NAMES} & {name.strip('" ') for name in header.split(mark)}]
    records = _csv_records(text, (delimiters or [","])[0])
    _, names = next(records, (1, []))
    names = names if isinstance(names, list) else []
    rows = MetadataRows("line", names, {name: [] for name in names if select(name)}, [], is_typed=False)
    for number, record in records:
        if isinstance(record, str):
            rows.unreadable.append(f"line {number}: {record}")
        elif len(record) != len(names):
            rows.unreadable.append(f"line {number}: {len(record)} values instead of {len(names)}; quote commas in text")
        else:
            rows.numbers.append(number)
            for name, value in zip(names, record):
                if name in rows.columns:
                    rows.columns[name].append(value or None)
    return rows


def _csv_records(text: str, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """The first line of each record and its values, or what is wrong with it; then the next line begins a record."""
    csv.field_size_limit(MAX_FIELD)
    lines = list(io.StringIO(text, newline=""))
    position = 0

    def remaining() -> Iterator[str]:
        nonlocal position
        while position < len(lines):
            position += 1
            yield lines[position - 1]

    while position < len(lines):
        reader = csv.reader(remaining(), delimiter=delimiter, strict=True)
        start = position
        try:
            for values in reader:
                if values:
                    yield start + 1, values
                start = position
        except csv.Error as error:
            yield start + 1, f"damaged ({error})"
            position = start + 1


def caption_values(values: Any) -> Any:
    """A column as `read_texts` takes it. JSON: lists are several texts, numbers are text; other values are null."""
    pa = arrow()
    if not isinstance(values, list):
        return values if can_be_text(values.type) else pa.nulls(len(values), "string")
    if not any(isinstance(value, list) for value in values):
        return _text_array([_text(value) for value in values])
    rows = [[] if value is None else _texts(value) for value in values]
    ends = np.cumsum([0, *map(len, rows)])
    is_null = [value is None for value in values]
    texts = _text_array([text for row in rows for text in row])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32(), mask=np.array([*is_null, False])), texts)


def _text(value: Any) -> str | None:
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return value if isinstance(value, str) else None


def _texts(value: Any) -> list[str | None]:
    """The text of a value, or those of a list of any depth."""
    return [text for each in value for text in _texts(each)] if isinstance(value, list) else [_text(value)]


def _text_array(texts: list[str | None]) -> Any:
    """An arrow array; characters that are no Unicode (half a surrogate pair in JSON) become '?'."""
    pa = arrow()
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:
        return pa.array([text and text.encode("utf-8", "replace").decode() for text in texts], pa.string())


def label_values(values: Any, is_typed: bool) -> Any:
    """A column as `encode_labels` takes it. JSON of several types is text without types, as in CSV."""
    if not isinstance(values, list) or not is_typed:
        return values
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {str}:
        return _text_array(values)
    if kinds == {bool} or kinds == {int} or kinds == {float, int} or kinds == {float}:
        pa = arrow()
        try:
            return pa.array(values)
        except pa.ArrowException:  # integers of more than 64 bits
            return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return [str(value) if isinstance(value, str | int | float) else None for value in values]


def span_columns(columns: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The columns SPAN_NAMES as arrow arrays of numbers [count]. What is no number becomes NaN, which no clip has."""
    pa = arrow()
    result = {}
    for name in SPAN_NAMES:
        values = columns.get(name)
        values = [None] * count if values is None else values if isinstance(values, list) else values.to_pylist()
        result[name] = pa.array([None if value is None else _number(value) for value in values], pa.float64())
    return result


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def path_values(values: Any) -> list[str | None]:
    """A column of paths as text; null for anything else."""
    if not isinstance(values, list):
        return read_texts(caption_values(values)).texts.to_pylist()
    return [value if isinstance(value, str) else None for value in values]
