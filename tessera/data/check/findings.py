"""Findings of a data set check, and the scan results that rules derive them from.

Shapes: N samples.
"""

import functools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from tessera.data.check import similarity
from tessera.data.check.non_samples import NonSample
from tessera.data.check.scan import FAULTS
from tessera.data.files import FilesDataset
from tessera.data.index import arrow

if TYPE_CHECKING:
    import pyarrow

Severity = Literal["error", "warning", "note"]

NO_SIZE = (1, 1)  # stands for an unknown training size
MIN_CONTRAST = 2  # of 255: an image whose channels have no larger range is blank

CORRUPT = tuple(fault.replace(" ", "-") for fault in FAULTS)  # kinds of findings of samples that cannot be read
EXCLUDED = ("corrupt", "duplicates", "leaks")  # excluded by default


@dataclass(frozen=True)
class Finding:
    """One problem of a data set, with the samples that have it."""

    kind: str  # one word, as --exclude accepts it
    severity: Severity
    message: str  # what the samples have in common, without their number: "files without content"
    advice: str = ""  # what to do, as prose
    commands: tuple[str, ...] = ()  # shell commands that can be pasted
    samples: tuple[int, ...] = ()  # rows, in order
    groups: tuple[tuple[int, ...], ...] = ()  # rows that belong together, the one to keep first
    names: tuple[str, ...] = ()  # of files, classes or folders that are not samples
    reasons: dict[int, str] = field(default_factory=dict)  # details by row

    @property
    def count(self) -> int:
        return len(self.samples) + len(self.names)


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

    def rows(self, mask: np.ndarray) -> tuple[int, ...]:
        """The usable rows in a mask, bool [N]."""
        return tuple(np.flatnonzero(mask & self.usable).tolist())

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
        leader[rows] = rows[similarity.leaders(self.column("hash")[rows], colour_grids(self.stats)[rows])]
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
    """uint64 [N, 4]; zeros where nothing could be read"""
    pa = arrow()
    values = stats["digest"].fill_null(bytes(32)).cast(pa.binary(32)).combine_chunks()
    return np.frombuffer(values.buffers()[1], np.uint64).reshape(-1, 4)[: len(stats)]


def colour_grids(stats: "pyarrow.Table") -> np.ndarray:
    """uint8 [N, cells]"""
    values = stats["colour_grid"].combine_chunks()
    begin, end = np.frombuffer(values.buffers()[1], np.int32)[[0, len(values)]]
    return np.frombuffer(values.buffers()[2], np.uint8)[begin:end].reshape(len(values), -1)


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
