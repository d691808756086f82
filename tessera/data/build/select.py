"""Which samples of all sources become part of a data set, and why the others do not. All of it is arrays.

Shapes: N samples of all sources in order, M selected ones.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tessera.data.build.recipe import BuildRecipe
from tessera.data.check import rules, similarity
from tessera.data.check.decisions import excluded_kinds
from tessera.data.check.findings import CORRUPT, ColorGrids, Finding, ScanResult, digests, first_equal, has_contrast
from tessera.data.check.scan import FAULTS
from tessera.data.index import arrow, compute

if TYPE_CHECKING:
    import pyarrow

# In order: a sample has the first reason that applies. Copies come last: they are searched among what remains.
OWN_REASONS = ("short-clips", "small", "extreme-aspect", "missing-captions")
COPIES = ("conflicts", "duplicates", "near-duplicates")
RULES = (rules.leaks, rules.classes, rules.contents, rules.clips, rules.formats)  # of findings about single samples


@dataclass
class Selection:
    """reason: of each sample, an index into `kinds`, or -1 for selected ones, int16 [N]. original: the sample that it
    copies, int64 [N], or -1. findings: of each source by kind. rows: of the selected samples in their new order, int64
    [M].
    """

    kinds: tuple[str, ...]
    reason: np.ndarray
    original: np.ndarray
    findings: list[dict[str, Finding]]
    rows: np.ndarray

    def counts(self) -> dict[str, int]:
        """How many samples were left out for each reason that occurs."""
        numbers = np.bincount(self.reason[self.reason >= 0], minlength=len(self.kinds)).tolist()
        return {kind: number for kind, number in zip(self.kinds, numbers) if number}


def select_samples(recipe: BuildRecipe, sources: Sequence[ScanResult]) -> Selection:
    """Apply the recipe to the scans of its sources, in their order."""
    exclude = excluded_kinds(recipe.exclude)
    kinds = (*CORRUPT, *OWN_REASONS, *(kind for kind in exclude if kind not in (*CORRUPT, *COPIES)), *COPIES)
    starts = np.cumsum([0, *(len(source.stats) for source in sources)]).tolist()
    reason, original = np.full(starts[-1], -1, np.int16), np.full(starts[-1], -1)
    findings = []
    for source, start in zip(sources, starts):
        own, own_findings = _own_reasons(recipe, source, kinds)
        reason[start : start + len(own)] = own
        findings.append(own_findings)
    _mark_copies(exclude, sources, kinds, reason, original)
    rows = np.flatnonzero(reason < 0)
    if recipe.shuffle is not None:
        rows = np.random.default_rng(recipe.shuffle).permutation(rows)
    return Selection(kinds, reason, original, findings, rows)


def _own_reasons(
    recipe: BuildRecipe, source: ScanResult, kinds: Sequence[str]
) -> tuple[np.ndarray, dict[str, Finding]]:
    """The reasons of one source that do not depend on other sources, int16 [N], and its findings by kind."""
    reason = np.full(len(source.stats), -1, np.int16)

    def mark(kind: str, mask: np.ndarray) -> None:
        reason[mask & (reason < 0)] = kinds.index(kind)

    # Samples that cannot be read are left out, whatever the recipe excludes: there is nothing to write.
    faults = compute().index_in(source.stats["fault"], arrow().array(FAULTS)).fill_null(-1).to_numpy()
    reason[:] = np.where(faults >= 0, faults, -1)
    if recipe.frames is not None:
        mark("short-clips", source.column("frames") < recipe.frames)
    height, width = source.column("height"), source.column("width")
    shorter, longer = np.minimum(height, width), np.maximum(height, width)
    mark("small", shorter < recipe.least_side)
    if recipe.max_aspect is not None:
        mark("extreme-aspect", longer > recipe.max_aspect * shorter)
    if recipe.require_captions and recipe.captioner is None:
        mark("missing-captions", ~has_caption(source.dataset.table))
    findings = {}
    for rule in RULES:
        for finding in rule(source):
            if finding.kind in kinds and finding.kind not in (*OWN_REASONS, *CORRUPT):
                mask = np.zeros(len(reason), bool)
                mask[finding.samples] = True
                mark(finding.kind, mask)
                findings[finding.kind] = finding
    return reason, findings


def has_caption(table: "pyarrow.Table") -> np.ndarray:
    """Which samples of an index have a caption that is not empty, bool [N]"""
    pc = compute()
    lengths = pc.utf8_length(pc.utf8_trim_whitespace(table["caption"].cast("string"))).fill_null(0)
    return lengths.to_numpy() > 0


def _mark_copies(
    exclude: Sequence[str],
    sources: Sequence[ScanResult],
    kinds: Sequence[str],
    reason: np.ndarray,
    original: np.ndarray,
) -> None:
    """Mark copies among the samples without a reason. Of identical files the first stays, of similar images the
    largest, of equally large ones the first."""

    def mark(kind: str, copies: np.ndarray, of: np.ndarray) -> None:
        reason[copies], original[copies] = kinds.index(kind), of

    values = np.concatenate([digests(source.stats) for source in sources])
    candidates = reason < 0
    first = first_equal(values, candidates)
    if "conflicts" in exclude:
        labels = class_numbers(sources)[1]
        groups = np.unique(first[candidates & (labels != labels[first])])
        conflicts = np.flatnonzero(candidates & np.isin(first, groups))
        mark("conflicts", conflicts, first[conflicts])
    copies = np.flatnonzero((reason < 0) & (first != np.arange(len(first))))
    if "duplicates" in exclude:
        mark("duplicates", copies, first[copies])
    if "near-duplicates" in exclude:
        contrast = np.concatenate([has_contrast(source.stats) for source in sources])
        rows = np.flatnonzero((reason < 0) & contrast & (first == np.arange(len(first))))
        area = np.concatenate([source.column("height") * source.column("width") for source in sources])
        rows = rows[np.argsort(-area[rows], kind="stable")]  # so that the first of a group is the largest
        hashes = np.concatenate([source.column("hash") for source in sources])[rows]
        leader = rows[similarity.leaders(hashes, ColorGrids([source.stats for source in sources], rows))]
        similar = np.flatnonzero(leader != rows)
        mark("near-duplicates", rows[similar], leader[similar])


def class_numbers(sources: Sequence[ScanResult]) -> tuple[tuple[str, ...], np.ndarray]:
    """The class names of all sources, and the class of each sample, int32 [N], -1 without one. Classes with the same
    name are one class."""
    names = tuple(dict.fromkeys(name for source in sources for name in source.dataset.class_names))
    number = {name: index for index, name in enumerate(names)}
    parts = []
    for source in sources:
        renumbered = np.array([number[name] for name in source.dataset.class_names] + [-1], np.int32)
        parts.append(renumbered[source.labels])  # a label of -1 takes the last
    return names, np.concatenate(parts)


def left_out_lines(selection: Selection, sources: Sequence[ScanResult]) -> Iterator[str]:
    """One line of JSON for each sample that is left out: its source, name, reason and detail."""
    starts = np.cumsum([0, *(len(source.stats) for source in sources)])

    def place(row: int) -> tuple[int, int]:
        number = int(np.searchsorted(starts, row, "right")) - 1
        return number, row - int(starts[number])

    for row in np.flatnonzero(selection.reason >= 0).tolist():
        number, own = place(row)
        source, kind, detail = sources[number], selection.kinds[selection.reason[row]], ""
        if kind in CORRUPT:
            detail = source.stats["detail"][own].as_py()
        elif kind == "short-clips":
            detail = f"{source.stats['frames'][own].as_py()} frames"
        elif kind in ("small", "extreme-aspect"):
            detail = f"{source.stats['height'][own].as_py()} x {source.stats['width'][own].as_py()}"
        elif selection.original[row] >= 0:
            other, other_row = place(int(selection.original[row]))
            detail = f"{sources[other].path}: {sources[other].name(other_row)}"
        elif finding := selection.findings[number].get(kind):
            detail = finding.reason(own)
        yield left_out_line(source.path, source.name(own), kind, detail)


def left_out_line(source: str, name: str, reason: str, detail: str) -> str:
    record = {"source": source, "name": name, "reason": reason} | ({"detail": detail} if detail else {})
    return json.dumps(record, ensure_ascii=False) + "\n"
