"""Which samples of a data set are accepted.

Shapes: N samples.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tessera.data.check.findings import CORRUPT, Finding, ScanResult
from tessera.data.index import arrow
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


def decide(findings: Sequence[Finding], exclude: Sequence[str], count: int) -> tuple[np.ndarray, dict[int, list[str]]]:
    """Which samples are accepted, bool [N], and the reasons from all findings, by row.

    If the first of several near duplicates is excluded for another reason, no other one replaces it.
    """
    keep = np.ones(count, bool)
    reasons: dict[int, list[str]] = defaultdict(list)
    for finding in findings:
        for row in finding.samples:
            detail = finding.reasons.get(row)
            reasons[row].append(f"{finding.kind}: {detail}" if detail else finding.kind)
        if finding.kind in exclude:
            keep[list(finding.samples)] = False
    return keep, reasons


def accepted_index(scan: ScanResult, keep: np.ndarray) -> "pyarrow.Table":
    """The index of the accepted samples with their measurements. keep: bool [N]"""
    pa = arrow()
    table, digest = scan.dataset.table, scan.stats["digest"].to_pylist()
    for name, values in {
        "height": pa.array(scan.column("height"), "int32", mask=~scan.usable),
        "width": pa.array(scan.column("width"), "int32", mask=~scan.usable),
        "hash": pa.array(scan.column("hash"), "uint64", mask=~scan.usable),
        "digest": pa.array([None if value is None else value.hex() for value in digest], "string"),
    }.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    return table.filter(pa.array(keep))
