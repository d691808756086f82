"""The rules of a data set check: each looks at a scan and yields findings. Nothing is changed.

Shapes: N samples, K classes.
"""

import functools
import os
import re
import shlex
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from PIL import Image

from tessera.data.check import similarity
from tessera.data.check.clips import short_clips
from tessera.data.check.findings import (
    MIN_CONTRAST,
    NO_SIZE,
    ColorGrids,
    Finding,
    ScanResult,
    Severity,
    digests,
    first_equal,
    has_contrast,
    is_usable,
    no_reason,
)
from tessera.data.check.non_samples import NonSampleKind
from tessera.data.check.scan import CELLS, FAULTS
from tessera.data.index import arrow, compute

if TYPE_CHECKING:
    import pyarrow

Rule = Callable[[ScanResult], Iterator[Finding]]

MIN_SIDE = 8  # pixels: an image with a shorter side shows nothing; below a quarter of the median it is a mistake
MAX_ASPECT = 3.0  # the longer side over the shorter; buckets go to 2
FAINT_CONTRAST = 16  # of 255: largest range of a channel of an image with low information
PLAIN_FRACTION = 0.99  # of the area with one color, from which on an image has low information
FEW_IMAGES = 20  # of a class
IMBALANCE = 10.0  # the largest class over the smallest
STILL = 0.25  # of 255 levels of the mean difference of frames: nothing moves
MIN_RATE, MAX_RATE = 1, 240  # frames per second; others are most likely a mistake of units
CHUNK = 1 << 16  # names in memory at once
MAX_COMMANDS = 8  # commands, or names in a command, of one finding

EXCLUDE = "write an index without them, and train with data.path=accepted.parquet"
REVIEW = "look at them in the report before you decide"
NOTHING = "nothing needs to be done"


def find_problems(scan: ScanResult) -> list[Finding]:
    """All findings, ordered by severity."""
    findings = [finding for rule in RULES for finding in rule(scan) if finding.count]
    order = ("error", "warning", "note")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def _excludable(
    scan: ScanResult,
    kind: str,
    severity: Severity,
    message: str,
    rows: np.ndarray,
    reason: Callable[[int], str] = no_reason,
    advice: str = "",
    leaders: np.ndarray | None = None,
) -> Finding:
    """A finding whose samples can be excluded by a command. advice: another remedy."""
    advice = f"{advice}; or {EXCLUDE}" if advice else EXCLUDE
    command = scan.exclude_command(kind)
    return Finding(kind, severity, message, advice, (command,), rows, leaders, reason=reason)


# Message and advice by fault; {path} is the data set.
FAULT_MESSAGES = {
    "empty": ("files without content", "download the files again"),
    "no image": ("files with the name of an image and other content", "download the files again, or move them away"),
    "no video": ("files without a video stream", "move them away"),
    "truncated": ("truncated files", "download the files again"),
    "damaged": ("damaged files that cannot be decoded", "download the files again, or save them in an image editor"),
    "unsupported": ("images whose values have no defined range", "convert them to 8 or 16 bits per channel"),
    "unreadable": ("files or folders without permission to read them", "give yourself the permission"),
    "missing": ("files in the metadata that do not exist", "add the files, or remove their rows from the metadata"),
    "broken link": ("links whose target does not exist", "fix the links, or put the files there"),
    "too large": ("images with so many pixels that Pillow treats them as an attack", "scale them down"),
}
FAULT_COMMANDS = {"unreadable": "chmod -R u+rX {path}", "broken link": "find {path} -xtype l"}


def faults(scan: ScanResult) -> Iterator[Finding]:
    for fault in FAULTS:
        kind = fault.replace(" ", "-")
        rows = np.flatnonzero(scan.equals("fault", fault))
        message, advice = FAULT_MESSAGES[fault]
        command = FAULT_COMMANDS.get(fault, "").format(path=shlex.quote(scan.path))
        yield Finding(
            kind,
            "error",
            message,
            f"{advice}; or {EXCLUDE}",
            (*filter(None, [command]), scan.exclude_command("corrupt")),
            rows,
            names=_non_sample_names(scan, kind),
            reason=functools.partial(scan.value, "detail"),
        )


def duplicates(scan: ScanResult) -> Iterator[Finding]:
    first, labels = scan.first_copy, scan.labels
    copies = np.flatnonzero(first != np.arange(len(first)))
    message = "copies with the same bytes as an earlier file"

    def original(row: int) -> str:
        return f"the same file as {scan.name(int(first[row]))}"

    yield _excludable(scan, "duplicates", "warning", message, copies, original, leaders=first[copies])
    conflicting = np.unique(first[copies[labels[copies] != labels[first[copies]]]])  # the first of each such group
    rows = np.sort(np.concatenate((conflicting, copies[np.isin(first[copies], conflicting)])))
    leaders = first[rows]
    order = np.argsort(leaders, kind="stable")
    sorted_leaders, names = leaders[order], scan.dataset.class_names

    def classes(row: int) -> str:
        begin, end = (np.searchsorted(sorted_leaders, first[row], side) for side in ("left", "right"))
        group_labels = np.unique(labels[rows[order[begin:end]]]).tolist()
        texts = (f"'{names[label]}'" if label >= 0 else "no class" for label in group_labels)
        return f"the same file in {' and '.join(texts)}"

    message, advice = "copies of an image in different classes", "choose one class and delete the other copies"
    yield _excludable(scan, "conflicts", "error", message, rows, classes, advice, leaders)


def near_duplicates(scan: ScanResult) -> Iterator[Finding]:
    leader, hashes = scan.leader, scan.stats["hash"]
    message = (
        f"images similar to an earlier one: at most {similarity.BITS} of 64 bits of the perceptual hashes differ, and "
        f"the color of no cell of {CELLS} x {CELLS} by more than {similarity.LEVELS} of 255 levels; they may be "
        "variants that differ in a detail"
    )
    rows = np.flatnonzero(leader != np.arange(len(leader)))

    def similar(row: int) -> str:
        first = int(leader[row])
        return f"similar to {scan.name(first)} ({_bits_differ(hashes[row].as_py(), hashes[first].as_py())})"

    yield _excludable(scan, "near-duplicates", "warning", message, rows, similar, REVIEW, leader[rows])


def leaks(scan: ScanResult) -> Iterator[Finding]:
    reference = scan.reference
    if reference is None:
        return
    values = np.concatenate((digests(reference), digests(scan.stats)))  # the reference first, so that its rows win
    usable = np.concatenate((is_usable(reference), scan.usable))
    match = first_equal(values, usable)[len(reference) :]
    rows = np.flatnonzero(scan.usable & (match < len(reference)))
    names = reference["name"]
    path = scan.reference_path
    message = f"files that are also in {path}, with the same bytes, so that scores on it would measure memorization"

    def same(row: int) -> str:
        return f"the same file as {names[int(match[row])].as_py()} in {path}"

    yield _excludable(scan, "leaks", "error", message, rows, same)
    near, others = _near_leaks(scan, reference)
    is_other_file = match[near] >= len(reference)
    near, others = near[is_other_file], others[is_other_file]
    hashes, reference_hashes = scan.stats["hash"], reference["hash"]

    def similar(row: int) -> str:
        other = int(others[np.searchsorted(near, row)])
        difference = _bits_differ(hashes[row].as_py(), reference_hashes[other].as_py())
        return f"similar to {names[other].as_py()} in {path} ({difference})"

    yield _excludable(scan, "near-leaks", "warning", f"images similar to one in {path}", near, similar, REVIEW)


def _near_leaks(scan: ScanResult, reference: "pyarrow.Table") -> tuple[np.ndarray, np.ndarray]:
    """The rows that are similar to the reference, in order, and the first such row there: int64 [K] each"""
    rows, reference_rows = np.flatnonzero(has_contrast(scan.stats)), np.flatnonzero(has_contrast(reference))
    hashes = np.concatenate((scan.column("hash")[rows], reference["hash"].to_numpy()[reference_rows]))
    every_row = np.concatenate((rows, len(scan.stats) + reference_rows))
    # One image per hash and colors is compared on each side, so that a thousand copies are one pair.
    values = similarity.appearances(hashes, ColorGrids([scan.stats, reference], every_row))
    in_reference = np.arange(len(hashes)) >= len(rows)
    first = np.where(in_reference, first_equal(values, in_reference), first_equal(values, ~in_reference))
    heads = np.flatnonzero(first == np.arange(len(first)))
    grids = ColorGrids([scan.stats, reference], every_row[heads])
    pairs = heads[similarity.pairs(hashes[heads], grids)]
    pairs = pairs[(pairs[:, 0] < len(rows)) & (pairs[:, 1] >= len(rows))]
    left, place = np.unique(pairs[:, 0], return_index=True)  # the first partner of each
    partner = np.full(len(first), -1)
    partner[left] = reference_rows[pairs[place, 1] - len(rows)]
    others = partner[first[: len(rows)]]
    return rows[others >= 0], others[others >= 0]


def _bits_differ(left: int, right: int) -> str:
    return f"{int(np.bitwise_count(np.uint64(left) ^ np.uint64(right)))} of 64 bits differ"


def sizes(scan: ScanResult) -> Iterator[Finding]:
    height, width = scan.column("height"), scan.column("width")
    shorter, longer = np.minimum(height, width), np.maximum(height, width)
    config = scan.dataset.config
    if config.size != NO_SIZE and not config.upscale:
        rows = scan.rows((height < config.size[0]) | (width < config.size[1]))
        message = f"images smaller than {config.size[0]} x {config.size[1]}, which training skips"
    else:
        median = float(np.median(shorter[scan.usable])) if scan.usable.any() else 0.0
        least = max(MIN_SIDE, median / 4)
        rows = scan.rows(shorter < least)
        message = f"images with a shorter side below {least:.0f} pixels; the median is {median:.0f}"

    def shape(row: int) -> str:
        return f"{scan.value('height', row)} x {scan.value('width', row)}"

    yield _excludable(scan, "small", "warning", message, rows, shape, "data.upscale=true scales them up")
    rows = scan.rows(longer > MAX_ASPECT * shorter)
    message = f"images more than {MAX_ASPECT:.0f} times as long as wide, of which a crop removes most"
    advice = "data.buckets={aspect: 3} crops to many shapes"
    yield _excludable(scan, "extreme-aspect", "warning", message, rows, shape, advice)


def contents(scan: ScanResult) -> Iterator[Finding]:
    contrast, visible, fraction = (scan.column(n) for n in ("contrast", "visible_contrast", "max_color_fraction"))
    background = list(scan.dataset.config.background)
    blank = (contrast <= MIN_CONTRAST) & (visible <= MIN_CONTRAST)
    invisible = (contrast <= MIN_CONTRAST) & (visible > MIN_CONTRAST)
    yield _excludable(scan, "blank", "warning", "images of one color", scan.rows(blank))
    yield Finding(
        "invisible",
        "warning",
        f"transparent images whose content has the color of the background {background}, so nothing is visible",
        "set data.background to a color that none of them has, such as data.background=[0, 0, 0]",
        samples=scan.rows(invisible),
    )
    low = (contrast <= FAINT_CONTRAST) | (fraction >= PLAIN_FRACTION)
    rows = scan.rows(~blank & ~invisible & low)
    message = (
        f"images with little information: {PLAIN_FRACTION:.0%} of the area has one color, or the colors span at most "
        f"{FAINT_CONTRAST} of 255 levels"
    )

    def plainness(row: int) -> str:
        return f"{scan.value('max_color_fraction', row):.1%} of one color, {scan.value('contrast', row)} levels"

    yield _excludable(scan, "low-information", "warning", message, rows, plainness)
    yield Finding(
        "transparent",
        "note",
        f"images with transparent pixels, where {background} is visible",
        f"if they were made for another background, set data.background (now {background})",
        samples=scan.rows(scan.column("transparent_fraction") > 0),
    )


def formats(scan: ScanResult) -> Iterator[Finding]:
    rows = scan.rows(scan.column("animated"))
    yield _excludable(scan, "animated", "note", "files with several frames or pages, of which the first is read", rows)
    message = "images with more than 8 bits per channel, which are read as 8 bits"
    yield Finding("sixteen-bit", "note", message, NOTHING, samples=scan.rows(scan.column("bits") > 8))
    rows = scan.rows(scan.equals("mode", "CMYK"))
    message = "images in print colors (CMYK), converted without their profile, so that colors may be inaccurate"
    advice = "for exact colors convert them with their profile (ImageMagick: -profile sRGB.icc)"
    yield _excludable(scan, "cmyk", "note", message, rows, advice=advice)
    rows = scan.rows(~scan.equals("profile", ""))
    message = "images with a color profile that is not sRGB and is not applied, so a viewer shows other colors"
    advice = "for exact colors convert them with their profile (ImageMagick: -profile sRGB.icc)"
    yield _excludable(scan, "profile", "note", message, rows, functools.partial(scan.value, "profile"), advice)
    message = "images or videos stored rotated or flipped, which are turned upright as the file specifies"
    yield Finding("rotated", "note", message, NOTHING, samples=scan.rows(scan.column("orientation") > 1))
    rows = scan.rows(~scan.equals("metadata_problem", ""))
    message = "images with metadata that cannot be read, which are ignored; their pixels are used"
    yield Finding(
        "odd-metadata",
        "note",
        message,
        "save them without metadata, if other programs read them",
        samples=rows,
        reason=functools.partial(scan.value, "metadata_problem"),
    )
    wrong: dict[int, str] = {}
    if scan.dataset.table["offset"].null_count:  # samples that are whole files
        formats, row = {"MPO", *_suffix_formats().values()}, 0  # not of videos
        for batch in scan.stats.select(["name", "format", "fault"]).to_batches():
            for name, format_, fault in zip(*(batch[column].to_pylist() for column in ("name", "format", "fault"))):
                is_known = fault is None and format_ in formats
                if is_known and not _suffix_matches(os.path.splitext(name)[1].lower(), format_):
                    wrong[row] = format_
                row += 1
    yield Finding(
        "wrong-endings",
        "note",
        "files whose suffix is of another format; they are read by their content",
        "rename them, if other programs read them",
        tuple(_rename_command(scan, row, format_) for row, format_ in islice(wrong.items(), MAX_COMMANDS)),
        np.array(list(wrong), np.int64),
        reason=lambda row: f"a {wrong[row]} image",
    )


@functools.cache
def _suffix_formats() -> dict[str, str]:
    """Pillow's format by suffix."""
    Image.init()
    return dict(Image.EXTENSION) | {".jfif": "JPEG", ".apng": "PNG"}


def _suffix_matches(suffix: str, format_: str) -> bool:
    """Whether a suffix belongs to a format; an unknown suffix matches every format."""
    return _suffix_formats().get(suffix, format_) in (format_, {"MPO": "JPEG", "DIB": "BMP"}.get(format_))


def _rename_command(scan: ScanResult, row: int, format_: str) -> str:
    """The command that gives a file the suffix of its format."""
    path = scan.dataset.root / scan.name(row)
    suffixes = {known: suffix for suffix, known in reversed(_suffix_formats().items())}
    suffixes |= {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}
    return _move(path, path.with_suffix(suffixes[format_]))


def _move(old: Path, new: Path) -> str:
    return f"mv -n {shlex.quote(str(old))} {shlex.quote(str(new))}"


def captions(scan: ScanResult) -> Iterator[Finding]:
    texts = scan.dataset.table["caption"]
    if texts.null_count == len(texts):
        return
    missing = texts.is_null().to_numpy()
    pc = compute()
    empty = pc.equal(pc.utf8_trim_whitespace(texts.cast("string")), "").fill_null(False).to_numpy()
    message = "images without a caption, although others have one"
    yield _excludable(scan, "missing-captions", "warning", message, scan.rows(missing))
    yield _excludable(scan, "empty-captions", "warning", "images with an empty caption", scan.rows(empty))
    yield _non_samples(
        scan,
        "captions-without-image",
        "warning",
        "caption files without an image",
        "put the images beside them, or give both the same name",
    )


def classes(scan: ScanResult) -> Iterator[Finding]:
    names, labels = scan.dataset.class_names, scan.labels
    if not names:
        return
    reasons = {row: reason for note in scan.dataset.notes for row, reason in note.rows.items()}
    loose = {row for note in scan.dataset.notes if note.kind == "loose-images" for row in note.rows}
    loose_rows = np.array(sorted(loose), np.int64)
    unlabeled = np.setdiff1d(np.flatnonzero(labels < 0), loose_rows)
    message = "images beside the class folders, without a class"
    advice = "move them into a class folder, or train without classes (data.classes=none)"
    yield _excludable(scan, "loose-images", "error", message, loose_rows, advice=advice)
    message, advice = "samples without a usable label", "give them one, or train without classes (data.classes=none)"
    yield _excludable(
        scan, "missing-labels", "error", message, unlabeled, lambda row: reasons.get(row, "no label"), advice
    )
    counts = np.bincount(labels[(labels >= 0) & scan.usable], minlength=len(names))
    if len(names) == 1:
        message, advice = "only one class, so there is nothing to condition on", "set data.classes=none"
        yield Finding("one-class", "error", message, advice, names=(names[0],))
        return
    yield Finding(
        "few-images",
        "warning",
        f"classes with fewer than {FEW_IMAGES} usable images, of {len(names)} classes",
        "add images, or merge the class with a similar one",
        names=tuple(f"{name} ({count})" for name, count in zip(names, counts.tolist()) if count < FEW_IMAGES),
    )
    if counts.max() > IMBALANCE * max(counts.min(), 1):
        most, least = int(counts.argmax()), int(counts.argmin())
        yield Finding(
            "imbalance",
            "warning",
            f"class '{names[most]}' has {counts[most] / max(counts[least], 1):.0f} times as many images as "
            f"'{names[least]}': {counts[most]} and {counts[least]}",
            "add images to the small classes, or merge some of them",
            names=(f"{names[most]} ({counts[most]})", f"{names[least]} ({counts[least]})"),
        )
    by_normal_form: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_normal_form[re.sub(r"[\s_\-]+", "", unicodedata.normalize("NFKC", name).casefold())].append(name)
    size = dict(zip(names, counts.tolist()))
    groups = [sorted(group, key=lambda name: -size[name]) for group in by_normal_form.values() if len(group) > 1]
    root = scan.dataset.root
    yield Finding(
        "class-names",
        "error",
        "classes whose names differ only in case, spaces, '-' or '_'",
        "merge them: move the files into one folder, or give them one name in the labels",
        tuple(
            f"mv -n {shlex.quote(str(root / other))}/* {shlex.quote(str(root / group[0]))}/"
            for group in groups[:MAX_COMMANDS]
            for other in group[1:]
            if (root / other).is_dir()
        ),
        names=tuple(" = ".join(f"'{name}'" for name in group) for group in groups),
    )


def names(scan: ScanResult) -> Iterator[Finding]:
    """Names that are the same on Windows and macOS."""
    paths = scan.dataset.table["path"]
    hashes = np.concatenate([np.empty((0, 2), np.int64), *map(_name_hashes, _slices(paths))])  # 16 bytes a name
    hashes = np.unique(hashes, axis=0)[:, 0]
    repeated = np.unique(hashes[1:][np.diff(hashes) == 0])
    groups: dict[str, list[str]] = defaultdict(list)
    for chunk in _slices(paths) if len(repeated) else ():
        is_repeated = np.isin(_name_hashes(chunk)[:, 0], repeated)
        for path in chunk.filter(arrow().array(is_repeated)).to_pylist():
            if path not in groups[path.lower()]:
                groups[path.lower()].append(path)
    groups = {name: group for name, group in groups.items() if len(group) > 1}
    last = [scan.dataset.root / group[-1] for group in list(groups.values())[:MAX_COMMANDS]]
    yield Finding(
        "case-names",
        "warning",
        "names that differ only in case, which are one file on Windows and macOS",
        "rename one of them",
        tuple(_move(path, path.with_name(f"{path.stem}-2{path.suffix}")) for path in last),
        names=tuple(", ".join(group) for group in groups.values()),
    )


def _slices(column: Any) -> Iterator[Any]:
    """The different values within each CHUNK of a column, arrow arrays."""
    for start in range(0, len(column), CHUNK):
        yield column.slice(start, CHUNK).unique()


def _name_hashes(names: Any) -> np.ndarray:
    """Hashes of names in lower case, and of names, int64 [N, 2]. names: an arrow array of text"""
    texts = names.to_pylist()
    pairs = ((hash(text.lower()), hash(text)) for text in texts)
    return np.fromiter(chain.from_iterable(pairs), np.int64, 2 * len(texts)).reshape(-1, 2)


def layout(scan: ScanResult) -> Iterator[Finding]:
    """What the index leaves out, or training refuses. Notes about rows and about files have rules of their own."""
    own_rules = {*get_args(NonSampleKind), "ignored-files"}
    for note in scan.dataset.notes:
        if note.names and note.kind not in own_rules:
            yield Finding(note.kind, note.severity, note.message or note.text, note.text, names=note.names)


NON_SAMPLE_RULES: tuple[tuple[NonSampleKind, Severity, str, str], ...] = (
    ("misnamed-images", "warning", "images without the suffix of an image, which are ignored", "rename them"),
    ("archives", "warning", "archives, whose content is ignored", "unpack them"),
    ("empty-folders", "warning", "folders without files", "delete them, or add the files"),
    ("hidden-files", "note", "hidden files and files of the system, which are ignored", "rename any that are samples"),
    ("other-files", "note", "files that are not images, which are ignored", NOTHING),
)


def others(scan: ScanResult) -> Iterator[Finding]:
    return (_non_samples(scan, *rule) for rule in NON_SAMPLE_RULES)


def _non_samples(scan: ScanResult, kind: NonSampleKind, severity: Severity, message: str, advice: str) -> Finding:
    return Finding(kind, severity, message, advice, names=_non_sample_names(scan, kind))


def _non_sample_names(scan: ScanResult, kind: str) -> tuple[str, ...]:
    return tuple(str(non_sample) for non_sample in scan.non_samples if non_sample.kind == kind)


def clips(scan: ScanResult) -> Iterator[Finding]:
    """Lengths, motion and frame rates of clips."""
    config = scan.dataset.config
    if config.frames is None:
        return
    frames, motion, cut, rate = (scan.column(name) for name in ("frames", "motion", "cut", "rate"))
    least = short_clips(config)
    rows = scan.rows(frames < least)
    what = {"drop": "training skips", "pad": "training pads", "loop": "training repeats from the start"}[config.short]
    message = f"clips of fewer than {least} frames, which {what}"
    advice = "data.short=pad or loop uses short clips, as do shorter data.buckets.frames"
    yield _excludable(
        scan, "short-clips", "warning", message, rows, lambda row: f"{scan.value('frames', row)} frames", advice
    )
    rows = scan.rows((motion <= STILL) & (frames > 1))
    yield _excludable(scan, "frozen", "warning", "clips in which nothing moves", rows, advice=REVIEW)
    rows = scan.rows(cut >= 0)
    message = "clips in which the scene changes, so that a model learns to jump"
    advice = "list the scenes with start and end in a .csv or .jsonl"
    yield _excludable(
        scan, "scene-cuts", "warning", message, rows, lambda row: f"at {scan.value('cut', row):.2f} s", advice
    )
    known, variable = rate > 0, scan.column("variable_rate")
    rows = scan.rows(known & ((rate < MIN_RATE) | (rate > MAX_RATE)))

    def speed(row: int) -> str:
        return f"{scan.value('rate', row):.4g} fps"

    message = f"clips of less than {MIN_RATE} or more than {MAX_RATE} frames per second; their times may be wrong"
    yield _excludable(scan, "odd-fps", "warning", message, rows, speed, REVIEW)
    if config.fps is None:
        rates = np.round(rate[known & scan.usable], 1)
        if len(rates) and rates.max() > 1.1 * rates.min():
            text = f"clips have {rates.min():g} to {rates.max():g} frames per second, so one motion has several speeds"
            advice = f"set data.fps, such as data.fps={float(np.median(rates)):g}"
            yield Finding("several-fps", "warning", text, advice, samples=scan.rows(known))
    else:
        rows = scan.rows(known & (rate < config.fps * 0.95))
        message = f"clips of fewer than data.fps={config.fps:g} frames per second, whose frames are repeated"
        yield _excludable(scan, "low-fps", "warning", message, rows, speed, "lower data.fps")
    message = "clips of a variable frame rate, which are read by time"
    advice = NOTHING if config.fps is not None else "set data.fps, so that their motion has one speed"
    severity: Severity = "note" if config.fps is not None else "warning"
    yield Finding("variable-fps", severity, message, advice, samples=scan.rows(variable))


RULES: tuple[Rule, ...] = (
    *(faults, duplicates, near_duplicates, leaks, classes, sizes, contents, clips, captions, names, formats, layout),
    others,
)
