"""`tessera data check`: measure every sample in many processes and on many machines, then report what was found.

Scanning writes parts, in any order and anywhere. Reporting reads all parts and writes files for people and programs.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from tessera.data import index
from tessera.data.check import page, scan
from tessera.data.check.decisions import accepted_parts, decide, excluded_kinds, reasons_between
from tessera.data.check.findings import EXCLUDED, NO_SIZE, Finding, ScanResult
from tessera.data.check.non_samples import find_non_samples
from tessera.data.check.rules import find_problems
from tessera.data.check.scan import ALL, ScanShard
from tessera.data.files import FilesConfig, FilesDataset
from tessera.data.resolve import EMBEDDED, parse_data, resolve_data
from tessera.errors import TesseraError
from tessera.files import PARTIAL, atomic_file, atomic_write, exclusive_lock

PARTS, REFERENCE_PARTS = "parts", "parts-reference"  # folders of measurements
DECISIONS, FINDINGS, REPORT = "decisions.jsonl", "findings.json", "report.html"
ROWS_PER_CHUNK = 1 << 14  # of findings that are written
Progress = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True)
class CheckRequest:
    """data, reference: a path of any layout, or a recipe. folder: of parts and reports. size, frames, fps: of training;
    frames: None for images, or where a recipe sets them."""

    data: str
    folder: Path
    reference: str | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    fps: float | None = None

    @cached_property
    def dataset(self) -> FilesDataset:
        """The data set. Raises TesseraError if it cannot be opened."""
        return FilesDataset(self._config(self.data))

    @cached_property
    def reference_dataset(self) -> FilesDataset | None:
        return None if self.reference is None else FilesDataset(self._config(self.reference))

    def _config(self, path: str) -> FilesConfig:
        config = resolve_data(path, self.size or NO_SIZE)
        if not isinstance(config, FilesConfig):
            raise TesseraError(f"{path}: embedded data ({', '.join(EMBEDDED)}) has no files to check; expected a path")
        if self.frames is None and self.fps is not None and config.frames is None:
            raise TesseraError("--fps is for clips: add --frames, such as --frames 16")
        changes = {name: value for name in ("frames", "fps") if (value := getattr(self, name)) is not None}
        settings = config.model_dump(exclude_unset=True, exclude={"stride"})  # a file is checked as a whole
        checked = parse_data({"kind": config.kind, **settings, **changes}, f"the data {path}")
        assert isinstance(checked, FilesConfig)
        return checked


@dataclass(frozen=True)
class CheckResult:
    """keep: which samples are accepted, bool [N]; summary: names and values that describe the data set."""

    findings: list[Finding]
    keep: np.ndarray
    summary: list[tuple[str, str]]


def scan_data(
    request: CheckRequest, workers: int = 1, shard: ScanShard = ALL, progress: Progress | None = None
) -> None:
    """Measure all samples of a shard that were not measured yet. Raises TesseraError."""
    for dataset, folder, label in (
        (request.dataset, PARTS, "scanning"),
        (request.reference_dataset, REFERENCE_PARTS, f"scanning {request.reference}"),
    ):
        if dataset is not None:
            scan.scan(dataset, request.folder / folder, workers, shard, progress(label) if progress else None)


def report_findings(
    request: CheckRequest, exclude: Sequence[str] = EXCLUDED, command: str = "", write_index: Path | None = None
) -> CheckResult:
    """Read all parts; write decisions, findings and report to the folder, and an index of accepted samples.

    exclude: kinds of findings. Raises TesseraError if parts are missing or a file cannot be written.
    """
    dataset, reference = request.dataset, request.reference_dataset
    kinds = excluded_kinds(exclude)
    with exclusive_lock(request.folder):
        for partial in request.folder.glob(f"parts*/*{PARTIAL}"):  # of processes that were killed
            partial.unlink(missing_ok=True)
        result = ScanResult(
            dataset,
            scan.read_parts(dataset, request.folder / PARTS),
            sorted(find_non_samples(dataset), key=lambda non_sample: (non_sample.kind, non_sample.name)),
            request.data,
            None if reference is None else scan.read_parts(reference, request.folder / REFERENCE_PARTS),
            request.reference or "",
        )
        findings = find_problems(result)
        keep = decide(findings, kinds, len(dataset))
        checked = CheckResult(findings, keep, page.summary(result, keep))
        with atomic_file(request.folder / DECISIONS) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(_decision_lines(result, findings, keep))
        with atomic_file(request.folder / FINDINGS) as partial, partial.open("w", encoding="utf-8") as file:
            file.writelines(json_parts(checked))
        atomic_write(request.folder / REPORT, page.page(result, findings, keep, command))
        if write_index is not None:
            for note in dataset.notes:
                if note.kind in ("invalid-labels", "label-types"):
                    raise TesseraError(f"no index is written, which would lose the labels: {note.text}")
            if not keep.any():
                report = request.folder / REPORT
                raise TesseraError(f"no sample of {request.data} is accepted: see {report}, or exclude fewer kinds")
            index.write_parts(accepted_parts(result, keep), dataset.table, write_index)
    return checked


def _decision_lines(result: ScanResult, findings: Sequence[Finding], keep: np.ndarray) -> Iterator[str]:
    """One line of JSON per sample."""
    start = 0
    for chunk in result.stats["name"].chunks:
        reasons = reasons_between(findings, start, start + len(chunk))
        for row, name in enumerate(chunk.to_pylist(), start):
            decision = {"name": name, "keep": bool(keep[row]), "reasons": reasons.get(row, [])}
            yield json.dumps(decision, ensure_ascii=False) + "\n"
        start += len(chunk)


def json_parts(checked: CheckResult) -> Iterator[str]:
    """The findings as JSON, in pieces; samples are rows of the data set, as in decisions.jsonl."""

    def dump(value: object) -> str:
        return json.dumps(value, ensure_ascii=False)

    def joined(texts: Iterable[str]) -> Iterator[str]:
        yield from (f"{', ' if number else ''}{text}" for number, text in enumerate(texts))

    yield f'{{"summary": {dump(dict(checked.summary))}, "findings": ['
    for number, finding in enumerate(checked.findings):
        names = ("kind", "severity", "message", "advice", "commands", "names", "count")
        yield f"{', ' if number else ''}{dump({name: getattr(finding, name) for name in names})[:-1]}"
        yield ', "samples": ['
        yield from joined(str(row) for chunk in _chunks(finding.samples) for row in chunk)
        yield '], "groups": ['
        yield from joined(dump(group) for group in finding.groups())
        yield '], "reasons": {'
        texts = ((row, finding.reason(row)) for chunk in _chunks(finding.samples) for row in chunk)
        yield from joined(f'"{row}": {dump(text)}' for row, text in texts if text)
        yield "}}"
    yield "]}\n"


def _chunks(rows: np.ndarray) -> Iterator[list[int]]:
    for start in range(0, len(rows), ROWS_PER_CHUNK):
        yield rows[start : start + ROWS_PER_CHUNK].tolist()
