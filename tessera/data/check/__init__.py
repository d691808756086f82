"""`tessera data check`: look at every sample, in as many processes and machines as there are; then say what was found.

Looking makes parts, in any order and anywhere; telling reads them all and writes what people and programs read.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tessera.data import index
from tessera.data.check import findings, page, scan
from tessera.data.check.findings import Finding, ScanResult
from tessera.data.check.non_samples import find_non_samples
from tessera.data.check.scan import WHOLE, ScanShard
from tessera.data.files import FilesConfig, FilesDataset
from tessera.data.resolve import EMBEDDED, resolve_data
from tessera.errors import TesseraError
from tessera.files import PARTIAL, atomic_file, atomic_write, exclusive_lock

PARTS, AGAINST = "parts", "parts-against"  # folders of what was seen
DECISIONS, FINDINGS, REPORT = "decisions.jsonl", "findings.json", "report.html"
Progress = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True)
class CheckRequest:
    """data, against: a path of any layout, or a recipe. folder: where parts and reports go. size: to be trained at."""

    data: str
    folder: Path
    reference: str | None = None
    size: tuple[int, int] | None = None

    @cached_property
    def source(self) -> tuple[FilesDataset, str]:
        """The data set, and why it could not be opened as it is, if it is not in good order. Raises TesseraError."""
        return findings.open_any(_config(self.data, self.size))

    @cached_property
    def other(self) -> FilesDataset | None:
        return None if self.reference is None else findings.open_any(_config(self.reference, self.size))[0]


@dataclass(frozen=True)
class CheckResult:
    """What came of a check. summary: what there is, in rows of two; keep: bool [N]"""

    findings: list[Finding]
    keep: np.ndarray
    summary: list[tuple[str, str]]


def _config(told: str, size: tuple[int, int] | None) -> FilesConfig:
    config = resolve_data(told, size or findings.NO_SIZE)
    if not isinstance(config, FilesConfig):
        raise TesseraError(f"{told}: embedded data ({', '.join(EMBEDDED)}) has no files to check; give a path")
    return config


def scan_data(
    asked: CheckRequest, workers: int = 1, shard: ScanShard = WHOLE, progress: Progress | None = None
) -> None:
    """Look at all samples of a shard that were not looked at yet. Raises TesseraError."""
    for source, name, what in ((asked.source[0], PARTS, "looking"), (asked.other, AGAINST, f"at {asked.reference}")):
        if source is not None:
            scan.scan(source, asked.folder / name, workers, shard, progress(what) if progress else None)


def report_findings(
    asked: CheckRequest, exclude: Sequence[str] = findings.EXCLUDED, command: str = "", write_index: Path | None = None
) -> CheckResult:
    """Read all parts and write decisions, findings and report into the folder, and an index of what is kept to `apply`.

    drop: kinds of findings. Raises TesseraError if parts are missing or something cannot be written.
    """
    source, disorder = asked.source
    dropped = findings.excluded_kinds(exclude)
    with exclusive_lock(asked.folder):
        for partial in asked.folder.glob(f"parts*/*{PARTIAL}"):  # of processes that were killed
            partial.unlink(missing_ok=True)
        survey = ScanResult(
            source,
            scan.read_parts(source, asked.folder / PARTS),
            sorted(find_non_samples(source), key=lambda stray: (stray.kind, stray.name)),
            asked.data,
            disorder,
            None if asked.other is None else scan.read_parts(asked.other, asked.folder / AGAINST),
            asked.reference or "",
        )
        found = findings.findings(survey)
        keep, reasons = findings.decisions(found, dropped, len(source))
        checked = CheckResult(found, keep, page.summary(survey, keep))
        with atomic_file(asked.folder / DECISIONS) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(_decisions(survey, keep, reasons))
        atomic_write(asked.folder / FINDINGS, as_json(checked))
        atomic_write(asked.folder / REPORT, page.page(survey, found, keep, command))
        if write_index is not None:
            if not keep.any():
                raise TesseraError(f"nothing would be kept of {asked.data}: see {asked.folder / REPORT}, or drop less")
            index.write(findings.index_of(survey, keep), write_index)
    return checked


def _decisions(survey: ScanResult, keep: np.ndarray, reasons: dict[int, list[str]]) -> Iterator[str]:
    """One line for each sample, then one for each thing that is none."""
    row = 0
    for chunk in survey.stats["name"].chunks:
        for name in chunk.to_pylist():
            told = {"name": name, "keep": bool(keep[row]), "reasons": reasons.get(row, [])}
            yield json.dumps(told, ensure_ascii=False) + "\n"
            row += 1


def as_json(checked: CheckResult) -> str:
    """The findings for programs: samples are rows of the data set, as in decisions.jsonl."""
    told: list[dict[str, Any]] = []
    for finding in checked.findings:
        one = asdict(finding) | {"count": finding.count}
        one["reasons"] = {str(row): reason for row, reason in finding.reasons.items()}
        told.append(one)
    summary = dict(checked.summary)
    return json.dumps({"summary": summary, "findings": told}, ensure_ascii=False) + "\n"
