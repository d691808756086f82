"""Parquet files with encoded images and labels: the layout of data sets on the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from tessera.data.images import ImagesConfig, Unusable, read
from tessera.errors import TesseraError
from tessera.settings import unknown

MOST_CLASSES = 100_000  # more are identities of rows, not classes


class ParquetConfig(ImagesConfig):
    """One parquet file, or a folder of them, with the image as bytes and the label as a number or a name."""

    kind: Literal["parquet"] = "parquet"
    path: str = Field(description="a .parquet file or a folder of them")
    image: str = Field(default="image", description="the column of images: bytes, or a struct with a field bytes")
    label: str | None = Field(default="label", description="the column of labels; null: without classes")

    @property
    def where(self) -> str:
        return f"{self.kind} {self.path}"

    def open(self) -> "ParquetSource":
        return ParquetSource(self)


class ParquetSource:
    """The rows of the files in the order of their names, held in memory as they are encoded."""

    def __init__(self, config: ParquetConfig) -> None:
        try:
            import pyarrow as arrow
            import pyarrow.parquet as parquet
        except ImportError:
            raise TesseraError("reading parquet needs pyarrow: pip install 'tessera[parquet]'") from None
        self.config = config
        root = Path(config.path).expanduser()
        self.files = sorted(root.rglob("*.parquet")) if root.is_dir() else [root]
        if not self.files or not self.files[0].exists():
            raise TesseraError(f"data.path {root} holds no parquet file")
        columns = [config.image] + ([config.label] if config.label else [])
        tables = []
        for file in self.files:
            try:
                known = parquet.read_schema(file).names
                for column in columns:
                    if column not in known:
                        raise TesseraError(f"{file}: {unknown('column', column, known)} (data.image, data.label)")
                tables.append(parquet.read_table(file, columns=columns))
            except (arrow.ArrowException, OSError, ValueError) as error:  # ValueError: names that are no text
                raise TesseraError(f"{file} is damaged or no parquet file: {error}") from None
        try:
            table = arrow.concat_tables(tables)
        except arrow.ArrowException as error:
            raise TesseraError(f"the files in {root} do not hold the same columns: {error}") from None
        if not len(table):
            raise TesseraError(f"data.path {root} holds no rows")
        self._images = table[config.image]
        self.class_names, self._labels = _classes(table, config.label) if config.label else ((), None)
        if len(self.class_names) == 1:
            raise TesseraError(
                f"{root} holds one class only ('{self.class_names[0]}'), which tells a network nothing: "
                "set data.label=null to train without classes"
            )

    def __len__(self) -> int:
        return len(self._images)

    def label(self, index: int) -> int:
        return 0 if self._labels is None else int(self._labels[index])

    def name(self, index: int) -> str:
        return f"{self.config.path} row {index}"

    def pixels(self, index: int) -> np.ndarray:
        try:
            value = self._images[index].as_py()
        except ValueError as error:
            raise Unusable(f"damaged: {error}") from None
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise Unusable("holds no image bytes")
        return read(content, self.config)


def _classes(table: Any, column: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and the class number of every row."""
    try:
        values = table[column].to_pylist()
    except ValueError as error:
        raise TesseraError(f"column '{column}' is damaged: {error}") from None
    missing = sum(value is None for value in values)
    if missing:
        raise TesseraError(f"{missing} of {len(values)} rows have no label in column '{column}'")
    if all(isinstance(value, str) for value in values):
        names = tuple(sorted(set(values)))
        number = {name: index for index, name in enumerate(names)}
        return names, np.array([number[value] for value in values])
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise TesseraError(f"column '{column}' holds neither class numbers nor names; set data.label")
    names = _hub_names(table, column)
    if not names:
        if max(values) >= MOST_CLASSES:
            raise TesseraError(f"column '{column}' holds {max(values)}, which is no class number; set data.label")
        names = tuple(str(i) for i in range(max(values) + 1))
    if max(values) >= len(names):
        raise TesseraError(f"column '{column}' holds class {max(values)}, but the file names {len(names)} classes")
    return names, np.array(values)


def _hub_names(table: Any, column: str) -> tuple[str, ...]:
    """The class names that Hugging Face's `datasets` writes into a file's metadata, or none."""
    try:
        metadata = json.loads((table.schema.metadata or {})[b"huggingface"])
        return tuple(str(name) for name in metadata["info"]["features"][column]["names"])
    except (ValueError, KeyError, TypeError):
        return ()
