"""Which samples of a data set are accepted.

Shapes: N samples.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tessera.data.check.findings import CORRUPT, Finding, ScanResult
from tessera.data.index import ROW_GROUP_SIZE, arrow
from tessera.errors import TesseraError
from tessera.settings import unknown_name

if TYPE_CHECKING:
    import pyarrow

# Kinds of findings about single samples, which can therefore be excluded.
SAMPLE_KINDS = (
    *("conflicts", "leaks", "duplicates", "near-duplicates", "near-leaks", "loose-images", "missing-labels"),
    *("small", "extreme-aspect"),
    *("blank", "invisible", "low-information", "missing-captions", "empty-captions", "animated", "transparent"),
    *("sixteen-bit", "cmyk", "profile", "rotated", "wrong-endings"),
    *("short-clips", "frozen", "scene-cuts", "odd-fps", "low-fps", "variable-fps"),
)


def excluded_kinds(words: Sequence[str]) -> tuple[str, ...]:
    """The kinds of findings whose samples are excluded; `corrupt` stands for all that cannot be read.

    Raises TesseraError for other words.
    """
    kinds: list[str] = []
    for word in words:
        if word == "corrupt":
            kinds += CORRUPT
        elif word in SAMPLE_KINDS or word in CORRUPT:
            kinds.append(word)
        else:
            raise TesseraError(f"--exclude: {unknown_name('kind', word, ['corrupt', *SAMPLE_KINDS, *CORRUPT])}")
    return tuple(kinds)


def decide(findings: Sequence[Finding], exclude: Sequence[str], count: int) -> np.ndarray:
    """Which samples are accepted, bool [N].

    If the first of several near duplicates is excluded for another reason, no other one replaces it.
    """
    keep = np.ones(count, bool)
    for finding in findings:
        if finding.kind in exclude:
            keep[finding.samples] = False
    return keep


def reasons_between(findings: Sequence[Finding], start: int, end: int) -> dict[int, list[str]]:
    """What all findings state about some rows, by row."""
    reasons: dict[int, list[str]] = defaultdict(list)
    for finding in findings:
        first, last = np.searchsorted(finding.samples, (start, end))
        for row in finding.samples[first:last].tolist():
            detail = finding.reason(row)
            reasons[row].append(f"{finding.kind}: {detail}" if detail else finding.kind)
    return reasons


def accepted_parts(scan: ScanResult, keep: np.ndarray) -> Iterator["pyarrow.Table"]:
    """The index of the accepted samples with their measurements, in parts that fit into memory. keep: bool [N]"""
    pa = arrow()
    measured = scan.stats.select(["fault", "height", "width", "hash", "digest"])
    for start in range(0, len(keep), ROW_GROUP_SIZE):
        part, stats = (table.slice(start, ROW_GROUP_SIZE) for table in (scan.dataset.table, measured))
        faulty = ~scan.usable[start : start + ROW_GROUP_SIZE]
        digests = (None if value is None else value.hex() for value in stats["digest"].to_pylist())
        for name, values in {
            "height": pa.array(stats["height"].to_numpy(), "int32", mask=faulty),
            "width": pa.array(stats["width"].to_numpy(), "int32", mask=faulty),
            "hash": pa.array(stats["hash"].to_numpy(), "uint64", mask=faulty),
            "digest": pa.array(list(digests), "string"),
        }.items():
            part = part.set_column(part.schema.get_field_index(name), name, values)
        yield part.filter(pa.array(keep[start : start + ROW_GROUP_SIZE]))
