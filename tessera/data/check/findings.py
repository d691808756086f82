"""Findings of a data set check, and the scan results that rules derive them from.

Shapes: N samples.
"""

import functools
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tessera.data.check import similarity
from tessera.data.check.non_samples import NonSample
from tessera.data.check.scan import FAULTS
from tessera.data.files import FilesDataset
from tessera.data.index import arrow, compute

if TYPE_CHECKING:
    import pyarrow

Severity = Literal["error", "warning", "note"]

NO_SIZE = (1, 1)  # stands for an unknown training size
MIN_CONTRAST = 2  # of 255: an image whose channels have no larger range is blank

CORRUPT = tuple(fault.replace(" ", "-") for fault in FAULTS)  # kinds of findings of samples that cannot be read
EXCLUDED = ("corrupt", "duplicates", "leaks")  # excluded by default


def no_reason(row: int) -> str:
    return ""


@dataclass(frozen=True, eq=False)
class Finding:
    """One problem of a data set, with the samples that have it.

    Samples are 8 bytes each, or 16 in groups: what is reported about a sample is computed when it is written.
    """

    kind: str  # one word, as --exclude accepts it
    severity: Severity
    message: str  # what the samples have in common, without their number: "files without content"
    advice: str = ""  # what to do, as prose
    commands: tuple[str, ...] = ()  # shell commands that can be pasted
    samples: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # rows, in order, int64 [K]
    leaders: np.ndarray | None = None  # of samples in groups: the row to keep of the group of each, int64 [K]
    names: tuple[str, ...] = ()  # of files, classes or folders that are not samples
    reason: Callable[[int], str] = no_reason  # details of a row, "" if there are none

    @property
    def count(self) -> int:
        return len(self.samples) + len(self.names)

    @functools.cached_property
    def num_groups(self) -> int:
        return 0 if self.leaders is None else len(np.unique(self.leaders))

    def groups(self) -> Iterator[tuple[int, ...]]:
        """Rows that belong together, the one to keep first."""
        if self.leaders is None:
            return
        order = np.argsort(self.leaders, kind="stable")
        edges = np.r_[0, np.flatnonzero(np.diff(self.leaders[order])) + 1, len(order)]
        for start, end in pairwise(edges) if len(order) else ():
            first = int(self.leaders[order[start]])
            yield first, *(row for row in self.samples[order[start:end]].tolist() if row != first)


@dataclass(frozen=True)
class ScanResult:
    """Everything that a scan measured. stats: the table of `scan.read_parts`; path: as the user gave it."""

    dataset: FilesDataset
    stats: "pyarrow.Table"
    non_samples: Sequence[NonSample] = ()
    path: str = "PATH"
    reference: "pyarrow.Table | None" = None  # stats of the reference data
    reference_path: str = ""

    def column(self, name: str) -> np.ndarray:
        """A column of the stats, [N]; text as objects."""
        return self.stats[name].to_numpy()

    @functools.cached_property
    def usable(self) -> np.ndarray:
        """Which samples are images that can be read, bool [N]"""
        return is_usable(self.stats)

    @property
    def labels(self) -> np.ndarray:
        """int32 [N], -1: no label"""
        return self.dataset.labels

    def name(self, row: int) -> str:
        return self.stats["name"][row].as_py()

    def value(self, name: str, row: int) -> Any:
        """One measurement of a sample. Findings use it in place of `column`, which would stay in memory with them."""
        return self.stats[name][row].as_py()

    def equals(self, name: str, value: str) -> np.ndarray:
        """Where a column of text has a value, bool [N]"""
        return compute().equal(self.stats[name], value).fill_null(False).to_numpy()

    def rows(self, mask: np.ndarray) -> np.ndarray:
        """The usable rows in a mask, bool [N] -> int64 [K]"""
        return np.flatnonzero(mask & self.usable)

    @functools.cached_property
    def first_copy(self) -> np.ndarray:
        """The first usable sample with the same bytes, int64 [N]; itself if it is the first or not usable."""
        return first_equal(digests(self.stats), self.usable)

    @functools.cached_property
    def leader(self) -> np.ndarray:
        """The first similar sample, int64 [N], among different files with contrast; itself if there is none."""
        own = np.arange(len(self.stats))
        rows = np.flatnonzero(has_contrast(self.stats) & (self.first_copy == own))
        leader = own.copy()
        leader[rows] = rows[similarity.leaders(self.column("hash")[rows], ColorGrids([self.stats], rows))]
        return leader

    def exclude_command(self, kind: str) -> str:
        """The command that writes an index without the samples of a finding."""
        reference = f" --reference {shlex.quote(self.reference_path)}" if self.reference_path else ""
        config, is_recipe = self.dataset.config, self.path.endswith((".yaml", ".yml"))
        if config.frames is not None and not is_recipe:
            reference += f" --frames {config.frames}" + (f" --fps {config.fps:g}" if config.fps is not None else "")
        exclude = "" if kind in EXCLUDED else f" --exclude {','.join((*EXCLUDED, kind))}"
        return f"tessera data check {shlex.quote(self.path)}{reference}{exclude} --write-index accepted.parquet"


def is_usable(stats: "pyarrow.Table") -> np.ndarray:
    return stats["fault"].is_null().to_numpy()


def has_contrast(stats: "pyarrow.Table") -> np.ndarray:
    """Which images are not blank, bool [N]: blank ones are not compared."""
    return is_usable(stats) & (stats["contrast"].to_numpy() > MIN_CONTRAST)


def digests(stats: "pyarrow.Table") -> np.ndarray:
    """The first 128 bits of each digest, uint64 [N, 2]; zeros where nothing could be read"""
    pa = arrow()
    result, start = np.empty((len(stats), 2), np.uint64), 0
    for chunk in stats["digest"].chunks:
        values = chunk.fill_null(bytes(32)).cast(pa.binary(32))
        words = np.frombuffer(values.buffers()[1], np.uint64).reshape(-1, 4)
        result[start : start + len(chunk)] = words[values.offset : values.offset + len(chunk), :2]
        start += len(chunk)
    return result


class ColorGrids:
    """The color grids of some rows of tables that follow each other. They stay in the memory-mapped parts: only what
    is indexed is copied."""

    def __init__(self, tables: Sequence["pyarrow.Table"], rows: np.ndarray) -> None:
        """rows: int64 [K]"""
        self._rows = rows
        self._chunks = [_grids(chunk) for table in tables for chunk in table["color_grid"].chunks if len(chunk)]
        self._starts = np.cumsum([0, *map(len, self._chunks)])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """int64 [E] -> uint8 [E, cells]"""
        rows = self._rows[index]
        order = np.argsort(rows, kind="stable")
        rows = rows[order]
        numbers = np.searchsorted(self._starts, rows, "right") - 1
        edges = np.r_[0, np.flatnonzero(np.diff(numbers)) + 1, len(rows)]
        result = np.empty((len(rows), similarity.LOW**2 * 3), np.uint8)
        for start, end in pairwise(edges) if len(rows) else ():
            number = numbers[start]
            result[order[start:end]] = self._chunks[number][rows[start:end] - self._starts[number]]
        return result


def _grids(chunk: Any) -> np.ndarray:
    """An arrow array of bytes as uint8 [N, cells], without a copy."""
    limits = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    return np.frombuffer(chunk.buffers()[2], np.uint8)[limits[0] : limits[-1]].reshape(len(chunk), -1)


def first_equal(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The first row in the mask with the same values, int64 [N]; rows outside the mask get themselves.

    values: [N, K], mask: bool [N]
    """
    first = np.arange(len(values))
    rows = np.flatnonzero(mask)
    if not len(rows):
        return first
    order = rows[np.lexsort((rows, *values[rows].T))]
    starts = np.r_[True, (values[order][1:] != values[order][:-1]).any(axis=1)]
    first[order] = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
    return first
