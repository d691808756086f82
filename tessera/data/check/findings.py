"""From what was seen of a data set to findings: what it is, which samples, and what to do about it.

A rule looks at the whole survey and says nothing, or what is true of the samples it names. Nothing is changed here.

Shapes: N samples, K classes.
"""

import functools
import os
import re
import shlex
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from tessera.data import index
from tessera.data.check import similarity
from tessera.data.check.non_samples import NonSample, StrayKind
from tessera.data.check.scan import CELLS, FAULTS
from tessera.data.files import FilesConfig, FilesDataset
from tessera.data.index import arrow, compute
from tessera.errors import TesseraError
from tessera.settings import unknown_name

if TYPE_CHECKING:
    import pyarrow

Severity = Literal["wrong", "doubtful", "note"]

TINY = 8  # pixels: a shorter side below it shows nothing, and below a quarter of the usual one is a slip
ASPECT = 3.0  # the longer side over the shorter; buckets go to 2
BLANK, FAINT = 2, 16  # of 255: the widest range of a channel
PLAIN = 0.99  # share of the area that is of one colour
FEW = 20  # images of a class
IMBALANCE = 10.0  # the largest class over the smallest
NO_SIZE = (1, 1)  # the size of a data set that nobody says what it is to be trained at
NAMED = 8  # names in the line of a finding

CORRUPT = tuple(fault.replace(" ", "-") for fault in FAULTS)
EXCLUDED = ("corrupt", "duplicates", "leaks")  # unless the command says otherwise
# What can be said of a single sample, and so be dropped.
SAMPLE_KINDS = (
    *("conflicts", "leaks", "duplicates", "near-duplicates", "near-leaks", "loose-images", "small", "extreme-aspect"),
    *("blank", "invisible", "low-information", "missing-captions", "empty-captions", "animated", "transparent"),
    *("sixteen-bit", "cmyk", "rotated", "wrong-endings"),
)


@dataclass(frozen=True)
class Finding:
    """kind is one word; what says it in a sentence; advice is commands and recipe lines, one each."""

    kind: str
    severity: Severity
    message: str
    advice: tuple[str, ...] = ()
    samples: tuple[int, ...] = ()  # rows, in order
    groups: tuple[tuple[int, ...], ...] = ()  # rows that belong together, the one to keep first
    names: tuple[str, ...] = ()  # of what is no sample
    reasons: dict[int, str] = field(default_factory=dict)  # more about single samples

    @property
    def count(self) -> int:
        return len(self.samples) + len(self.names)


@dataclass(frozen=True)
class ScanResult:
    """Everything that was seen. seen: the table of `seen.gathered`; path: as the user told it."""

    source: FilesDataset
    stats: "pyarrow.Table"
    non_samples: Sequence[NonSample] = ()
    path: str = "PATH"
    layout_error: str = ""  # why the data set could not be opened as it is
    reference: "pyarrow.Table | None" = None
    reference_path: str = ""

    def column(self, name: str) -> np.ndarray:
        """A column of what was seen, [N]; texts come as objects."""
        return self.stats[name].to_numpy()

    @functools.cached_property
    def usable(self) -> np.ndarray:
        """Which samples are images that can be read, bool [N]."""
        return usable(self.stats)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int32 [N], -1 where there is none"""
        return self.source.labels

    def name(self, row: int) -> str:
        return self.stats["name"][row].as_py()

    def where(self, told: np.ndarray) -> tuple[int, ...]:
        """The rows of usable samples of which something is true, bool [N]."""
        return tuple(np.flatnonzero(told & self.usable).tolist())

    @functools.cached_property
    def first_copy(self) -> np.ndarray:
        """The first usable sample of the same bytes, int64 [N]; of one alone, or unusable, itself."""
        return first_of_same(digests(self.stats), self.usable)

    @functools.cached_property
    def leader(self) -> np.ndarray:
        """The first sample that looks alike, int64 [N], among different files with contrast."""
        own = np.arange(len(self.stats))
        rows = np.flatnonzero(distinct(self.stats) & (self.first_copy == own))
        found = own.copy()
        found[rows] = rows[similarity.leaders(self.column("hash")[rows], colours(self.stats)[rows])]
        return found

    @property
    def command(self) -> str:
        return f"tessera data check {shlex.quote(self.path)}"

    def drop(self, kind: str) -> str:
        """The command that writes an index without samples of a kind."""
        words = EXCLUDED if kind in EXCLUDED else (*EXCLUDED, kind)
        told = "" if kind in EXCLUDED else f" --drop {','.join(words)}"
        against = f" --against {shlex.quote(self.reference_path)}" if self.reference_path else ""
        return f"{self.command}{against}{told} --apply kept.parquet, then data.path=kept.parquet"


def usable(seen: "pyarrow.Table") -> np.ndarray:
    return seen["fault"].is_null().to_numpy()


def distinct(seen: "pyarrow.Table") -> np.ndarray:
    """Which images have something to tell them apart by, bool [N]."""
    return usable(seen) & (seen["contrast"].to_numpy() > BLANK)


def digests(seen: "pyarrow.Table") -> np.ndarray:
    """uint64 [N, 4]; zeros where nothing could be read"""
    pa = arrow()
    whole = seen["digest"].fill_null(bytes(32)).cast(pa.binary(32)).combine_chunks()
    return np.frombuffer(whole.buffers()[1], np.uint64).reshape(-1, 4)[: len(seen)]


def colours(seen: "pyarrow.Table") -> np.ndarray:
    """uint8 [N, cells]"""
    whole = seen["colours"].combine_chunks()
    begin, end = np.frombuffer(whole.buffers()[1], np.int32)[[0, len(whole)]]
    return np.frombuffer(whole.buffers()[2], np.uint8)[begin:end].reshape(len(whole), -1)


def first_of_same(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The first row of the same values among some, int64 [N]; others have their own. values: [N, K], among: bool [N]"""
    first = np.arange(len(values))
    rows = np.flatnonzero(among)
    if not len(rows):
        return first
    order = rows[np.lexsort((rows, *values[rows].T))]
    starts = np.r_[True, (values[order][1:] != values[order][:-1]).any(axis=1)]
    first[order] = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
    return first


def groups_of(leader: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Rows that share a leader, the leader first, of all that are not alone. leader: int64 [N]"""
    found: dict[int, list[int]] = defaultdict(list)
    for row in np.flatnonzero(leader != np.arange(len(leader))).tolist():
        found[int(leader[row])].append(row)
    return tuple((first, *rest) for first, rest in sorted(found.items()))


# The data set as it lies there


def open_any(config: FilesConfig) -> tuple[FilesDataset, str]:
    """The data set however untidy it is, and why it could not be opened as it is.

    Loose images beside class folders have no class; a single class folder is a class. Raises TesseraError.
    """
    first: TesseraError | None = None
    for change in ({}, {"classes": "none"}, {"kind": "folder"}, {"kind": "folder", "classes": "none"}):
        try:
            found = config.model_copy(update=change).open()
        except TesseraError as error:
            first = first or error
            continue
        return (found if not change else _by_folder(found)), str(first or "")
    assert first is not None
    raise first


def _by_folder(source: FilesDataset) -> FilesDataset:
    """With the first level of folders as classes where there is one, whatever else lies beside it."""
    table = source.table
    if table["offset"].null_count < len(table) or source.config.classes != "none":
        return source
    folders = [path.partition("/")[0] if "/" in path else None for path in table["path"].to_pylist()]
    names = sorted({name for name in folders if name})
    number: dict[str | None, int | None] = {name: place for place, name in enumerate(names)}
    labels = arrow().array([number.get(name) for name in folders], "int32")
    table = table.set_column(table.schema.get_field_index("label"), "label", labels)
    return FilesDataset(source.config, index.with_metadata(table, source.root, names))


# Rules


Rule = Callable[[ScanResult], Iterator[Finding]]


def findings(survey: ScanResult) -> list[Finding]:
    """All that is true and worth knowing, the grave first."""
    found = [
        replace(finding, what=_of_one(finding.message)) for rule in RULES for finding in rule(survey) if finding.count
    ]
    order = ("wrong", "doubtful", "note")
    return sorted(found, key=lambda finding: order.index(finding.severity))


FAULT_ADVICE = {
    "empty": "fetch the files again",
    "no image": "fetch the files again, or move them out of the folder",
    "truncated": "fetch the files again: they end too early",
    "damaged": "fetch the files again, or open and save them in an image editor",
    "unreadable": "chmod -R u+rX {path}",
    "missing": "put the files where the metadata says, or take their lines out of it",
    "broken link": "find {path} -xtype l lists them: mend the links or put the files there",
    "too large": "scale them down: Pillow refuses so many pixels as a likely attack",
}


def faults(survey: ScanResult) -> Iterator[Finding]:
    told, detail = survey.column("fault"), survey.stats["detail"]
    for fault in FAULTS:
        rows = tuple(np.flatnonzero(told == fault).tolist())
        others = [stray for stray in survey.non_samples if stray.kind == fault.replace(" ", "-")]
        count = len(rows) + len(others)
        if not count:
            continue
        what = {
            "empty": "have no content",
            "no image": "have the name but not the content of an image",
            "truncated": "end too early",
            "damaged": "are damaged and cannot be decoded",
            "unreadable": "cannot be read",
            "missing": "are named in the metadata but absent",
            "broken link": "link to nothing",
            "too large": "have more pixels than can safely be decoded",
        }[fault]
        advice = FAULT_ADVICE[fault].format(path=shlex.quote(survey.path))
        yield Finding(
            fault.replace(" ", "-"),
            "wrong",
            f"{_files(count)} {what}",
            (advice, survey.drop("corrupt")),
            rows,
            names=tuple(map(_told, others)),
            reasons={row: detail[row].as_py() for row in rows},
        )


def duplicates(survey: ScanResult) -> Iterator[Finding]:
    groups = groups_of(survey.first_copy)
    if not groups:
        return
    labels = survey.labels
    torn = [group for group in groups if len({int(labels[row]) for row in group}) > 1]
    copies = [row for group in groups for row in group[1:]]
    yield Finding(
        "duplicates",
        "doubtful",
        f"{_files(len(copies))} repeat, byte for byte, {_files(len(groups))} before",
        (survey.drop("duplicates"),),
        tuple(sorted(copies)),
        groups,
        reasons={row: f"the same file as {survey.name(group[0])}" for group in groups for row in group[1:]},
    )
    if torn:
        names = survey.source.class_names

        def classes(group: Sequence[int]) -> str:
            told = sorted({int(labels[row]) for row in group})
            return " and ".join(f"'{names[label]}'" if label >= 0 else "no class" for label in told)

        yield Finding(
            "conflicts",
            "wrong",
            f"{_images(len(torn))} stand in several classes at once",
            ("decide for one class and take the other copies out, or leave all of them out:", survey.drop("conflicts")),
            tuple(sorted(row for group in torn for row in group)),
            tuple(torn),
            reasons={row: f"the same file in {classes(group)}" for group in torn for row in group},
        )


def near_duplicates(survey: ScanResult) -> Iterator[Finding]:
    leader = survey.leader
    groups = groups_of(leader)
    if not groups:
        return
    hashes = survey.column("hash")
    members = [row for group in groups for row in group[1:]]
    reasons = {
        row: f"looks like {survey.name(group[0])} ({_apart(hashes[row], hashes[group[0]])})"
        for group in groups
        for row in group[1:]
    }
    yield Finding(
        "near-duplicates",
        "doubtful",
        f"{_images(len(members))} look all but like {_images(len(groups))} before them: at most {similarity.BITS} of the 64 "
        f"bits of their perceptual hash differ, and none of {CELLS} x {CELLS} parts by more than {similarity.LEVELS} of 255 "
        "levels of colour; variants that differ in a detail are among them",
        ("look at the groups in the report before you decide", survey.drop("near-duplicates")),
        tuple(sorted(members)),
        groups,
        reasons=reasons,
    )


def leaks(survey: ScanResult) -> Iterator[Finding]:
    other = survey.reference
    if other is None:
        return
    count = len(survey.stats)
    both = np.concatenate((digests(survey.stats), digests(other)))
    among = np.concatenate((survey.usable, usable(other)))
    order = np.r_[np.arange(len(other)) + count, np.arange(count)]  # the other set first, so that its rows are found
    place = first_of_same(both[order], among[order])
    exact = place[len(other) :]
    rows = np.flatnonzero(survey.usable & (exact < len(other)))
    names = other["name"]
    where = survey.reference_path
    yield Finding(
        "leaks",
        "wrong",
        f"{_files(len(rows))} are also in {where}, byte for byte: what is measured there is remembered, not learned",
        (survey.drop("leaks"),),
        tuple(rows.tolist()),
        reasons={int(row): f"the same file as {names[int(exact[row])].as_py()} in {where}" for row in rows},
    )
    near = _near_across(survey, other)
    near = {row: partner for row, partner in near.items() if exact[row] >= len(other)}
    hashes, theirs = survey.column("hash"), other["hash"].to_numpy()
    yield Finding(
        "near-leaks",
        "doubtful",
        f"{_images(len(near))} look all but like one in {where}",
        ("look at them in the report before you decide", survey.drop("near-leaks")),
        tuple(sorted(near)),
        reasons={
            row: f"looks like {names[partner].as_py()} in {where} ({_apart(hashes[row], theirs[partner])})"
            for row, partner in near.items()
        },
    )


def _near_across(survey: ScanResult, other: "pyarrow.Table") -> dict[int, int]:
    """Rows here that look like one there, by the first such row there."""
    ours, theirs = np.flatnonzero(distinct(survey.stats)), np.flatnonzero(distinct(other))
    hashes = np.concatenate((survey.column("hash")[ours], other["hash"].to_numpy()[theirs]))
    looks = np.concatenate((colours(survey.stats)[ours], colours(other)[theirs]))
    # Of the same hash and the same colours one is enough here and there, so that a thousand copies are one pair.
    key = np.concatenate((hashes[:, None], looks.view(np.uint64)), axis=1)
    side = np.arange(len(hashes)) >= len(ours)
    first = np.where(side, first_of_same(key, side), first_of_same(key, ~side))
    heads = np.flatnonzero(first == np.arange(len(first)))
    found = heads[similarity.pairs(hashes[heads], looks[heads])]
    partner: dict[int, int] = {}
    for left, right in found[(found[:, 0] < len(ours)) & (found[:, 1] >= len(ours))].tolist():
        partner.setdefault(left, int(theirs[right - len(ours)]))
    of_each = zip(ours.tolist(), first[: len(ours)].tolist())
    return {row: partner[head] for row, head in of_each if head in partner}


def sizes(survey: ScanResult) -> Iterator[Finding]:
    height, width = survey.column("height"), survey.column("width")
    shorter, longer = np.minimum(height, width), np.maximum(height, width)
    asked = survey.source.config
    if asked.size != NO_SIZE and not asked.upscale:
        rows = survey.where((height < asked.size[0]) | (width < asked.size[1]))
        why = f"are smaller than {asked.size[0]} x {asked.size[1]}, and training skips them"
    else:
        usual = float(np.median(shorter[survey.usable])) if survey.usable.any() else 0.0
        least = max(TINY, usual / 4)
        rows = survey.where(shorter < least)
        why = f"have a shorter side below {least:.0f} pixels, where the usual one is {usual:.0f}"
    yield Finding(
        "small",
        "doubtful",
        f"{_images(len(rows))} {why}",
        (survey.drop("small"), "or data.upscale=true, which scales them up"),
        rows,
        reasons={row: f"{height[row]} x {width[row]}" for row in rows},
    )
    rows = survey.where(longer > ASPECT * shorter)
    yield Finding(
        "extreme-aspect",
        "doubtful",
        f"{_images(len(rows))} are more than {ASPECT:.0f} times as long as wide: a crop loses most",
        (survey.drop("extreme-aspect"), "or data.buckets={aspect: 3}, which crops to many shapes"),
        rows,
        reasons={row: f"{height[row]} x {width[row]}" for row in rows},
    )


def contents(survey: ScanResult) -> Iterator[Finding]:
    contrast, own, common = (survey.column(name) for name in ("contrast", "own_contrast", "commonest"))
    clear = survey.column("transparent")
    ground = list(survey.source.config.background)
    blank = (contrast <= BLANK) & (own <= BLANK)
    hidden = (contrast <= BLANK) & (own > BLANK)
    rows = survey.where(blank)
    yield Finding("blank", "doubtful", f"{_images(len(rows))} are of one colour", (survey.drop("blank"),), rows)
    rows = survey.where(hidden)
    yield Finding(
        "invisible",
        "doubtful",
        f"{_images(len(rows))} are drawn in the colour of the background {ground} on transparency, and so invisible",
        ("data.background=[0, 0, 0], or another colour that none of them has",),
        rows,
    )
    rows = survey.where(~blank & ~hidden & ((contrast <= FAINT) | (common >= PLAIN)))
    yield Finding(
        "low-information",
        "doubtful",
        f"{_images(len(rows))} show next to nothing: {PLAIN:.0%} of the area is of one colour, or the colours span at "
        f"most {FAINT} of 255 levels",
        (survey.drop("low-information"),),
        rows,
        reasons={row: f"{common[row]:.1%} of one colour, {contrast[row]} levels" for row in rows},
    )
    rows = survey.where(clear > 0)
    yield Finding(
        "transparent",
        "note",
        f"{_images(len(rows))} are transparent in part: {ground} shows through",
        (f"data.background={ground} says so; set another colour if these were drawn for one",),
        rows,
    )


def formats(survey: ScanResult) -> Iterator[Finding]:
    rows = survey.where(survey.column("animated"))
    yield Finding(
        "animated",
        "note",
        f"{_files(len(rows))} hold several frames or pages, of which the first is taken",
        (survey.drop("animated"),),
        rows,
    )
    rows = survey.where(survey.column("bits") > 8)
    yield Finding(
        "sixteen-bit",
        "note",
        f"{_images(len(rows))} have more than 8 bits a channel, of which 8 are read",
        ("nothing needs to be done",),
        rows,
    )
    modes = survey.column("mode")
    rows = survey.where(modes == "CMYK")
    yield Finding(
        "cmyk",
        "note",
        f"{_images(len(rows))} are in the colours of print (CMYK); they are converted without their profile, so that "
        "colours may be off",
        ("to be exact, convert them by their profile: magick IN -profile sRGB.icc OUT", survey.drop("cmyk")),
        rows,
    )
    rows = survey.where(survey.column("orientation") > 1)
    yield Finding(
        "rotated",
        "note",
        f"{_images(len(rows))} are stored turned or mirrored, and set upright as EXIF says",
        ("nothing needs to be done",),
        rows,
    )
    wrong = {}
    if survey.source.table["offset"].null_count:  # files with names of their own
        told = survey.stats.select(["name", "format"]).filter(survey.stats["fault"].is_null())
        rows = iter(survey.where(survey.usable))
        for batch in told.to_batches():
            for name, kind in zip(batch["name"].to_pylist(), batch["format"].to_pylist()):
                row = next(rows)
                if not _fits(os.path.splitext(name)[1].lower(), kind):
                    wrong[row] = kind
    yield Finding(
        "wrong-endings",
        "note",
        f"{_files(len(wrong))} have another format than the name says; reading goes by the content",
        tuple(_renaming(survey, row, kind) for row, kind in list(wrong.items())[:NAMED]),
        tuple(wrong),
        reasons={row: f"a {kind} image" for row, kind in wrong.items()},
    )


@functools.cache
def _endings() -> dict[str, str]:
    """The format of each ending, as Pillow knows them."""
    Image.init()
    return dict(Image.EXTENSION) | {".jfif": "JPEG", ".apng": "PNG"}


def _fits(ending: str, kind: str) -> bool:
    """Whether a format goes by an ending; endings of no known format fit all."""
    return _endings().get(ending, kind) in (kind, {"MPO": "JPEG", "DIB": "BMP"}.get(kind))


def _renaming(survey: ScanResult, row: int, kind: str) -> str:
    """The command that gives a file the ending of its format."""
    usual = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}
    path = survey.source.root / survey.name(row)
    ending = usual.get(kind) or next(ending for ending, known in _endings().items() if known == kind)
    return f"mv -n {shlex.quote(str(path))} {shlex.quote(str(path.with_suffix(ending)))}"


def captions(survey: ScanResult) -> Iterator[Finding]:
    told = survey.source.table["caption"]
    if told.null_count == len(told):
        return
    missing = told.is_null().to_numpy()
    pc = compute()
    empty = pc.equal(pc.utf8_trim_whitespace(told.cast("string")), "").fill_null(False).to_numpy()
    for kind, rows, what in (
        ("missing-captions", survey.where(missing), "have no caption, though others have"),
        ("empty-captions", survey.where(empty), "have a caption without a letter in it"),
    ):
        yield Finding(kind, "doubtful", f"{_images(len(rows))} {what}", (survey.drop(kind),), rows)
    yield from _of_strays(
        survey,
        "captions-without-image",
        "doubtful",
        "hold a caption of an image that is not there",
        "put the images beside them, or give both one name",
    )


def classes(survey: ScanResult) -> Iterator[Finding]:
    names, labels = survey.source.class_names, survey.labels
    if not names:
        return
    loose = survey.where(labels < 0)
    yield Finding(
        "loose-images",
        "wrong",
        f"{_images(len(loose))} lie beside the class folders, without a class",
        ("move them into a class folder, or train without classes: data.classes=none", survey.drop("loose-images")),
        loose,
    )
    counts = np.bincount(labels[(labels >= 0) & survey.usable], minlength=len(names))
    if len(names) == 1:
        yield Finding(
            "one-class",
            "wrong",
            f"there is one class only, '{names[0]}', which tells a network nothing",
            ("data.classes=none",),
            names=(names[0],),
        )
        return
    few = [f"{name} ({count})" for name, count in zip(names, counts.tolist()) if count < FEW]
    yield Finding(
        "few-images",
        "doubtful",
        f"{len(few)} of {len(names)} classes have fewer than {FEW} images that can be read",
        ("add images, or put the class together with one like it",),
        names=tuple(few),
    )
    if counts.max() > IMBALANCE * max(counts.min(), 1):
        most, least = int(counts.argmax()), int(counts.argmin())
        yield Finding(
            "imbalance",
            "doubtful",
            f"class '{names[most]}' has {counts[most]} images, '{names[least]}' {counts[least]}: "
            f"{counts[most] / max(counts[least], 1):.0f} times as many",
            ("add images to the small classes, or put some of them together",),
            names=(f"{names[most]} ({counts[most]})", f"{names[least]} ({counts[least]})"),
        )
    alike_names: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike_names[re.sub(r"[\s_\-]+", "", unicodedata.normalize("NFKC", name).casefold())].append(name)
    size = dict(zip(names, counts.tolist()))
    same = [sorted(group, key=lambda name: -size[name]) for group in alike_names.values() if len(group) > 1]
    root = survey.source.root
    yield Finding(
        "class-names",
        "wrong",
        f"{len(same)} {'class has' if len(same) == 1 else 'classes have'} several names that differ in case, spaces, "
        "'-' or '_' only",
        tuple(
            f"mv -n {shlex.quote(str(root / other))}/* {shlex.quote(str(root / group[0]))}/"
            if (root / other).is_dir()
            else f"name class '{other}' '{group[0]}' in the labels"
            for group in same[:NAMED]
            for other in group[1:]
        ),
        names=tuple(" = ".join(f"'{name}'" for name in group) for group in same),
    )


def names(survey: ScanResult) -> Iterator[Finding]:
    """Names that are one name on Windows and macOS."""
    pc = compute()
    paths = survey.source.table["path"].unique()
    lower = pc.utf8_lower(paths.cast("string"))
    counted = pc.value_counts(lower)
    several = counted.filter(pc.greater(counted.field("counts"), 1)).field("values")
    same: dict[str, list[str]] = defaultdict(list)
    for path in paths.filter(pc.is_in(lower, several)).to_pylist() if len(several) else ():
        same[path.lower()].append(path)
    groups = [f"{', '.join(group)}" for group in same.values()]
    yield Finding(
        "case-names",
        "doubtful",
        f"{_files(sum(map(len, same.values())))} have names that differ in case only: one file on Windows and macOS",
        tuple(
            f"mv -n {shlex.quote(str(survey.source.root / group[-1]))} "
            f"{shlex.quote(str(survey.source.root / _another(group[-1])))}"
            for group in list(same.values())[:NAMED]
        ),
        names=tuple(groups),
    )


def _another(path: str) -> str:
    stem, ending = os.path.splitext(path)
    return f"{stem}-2{ending}"


def others(survey: ScanResult) -> Iterator[Finding]:
    path = shlex.quote(survey.path)
    of = functools.partial(_of_strays, survey)
    archives = [stray.name for stray in survey.non_samples if stray.kind == "archives"]
    yield from of("misnamed-images", "doubtful", "hold an image, which the name does not say: passed over",
                  "give them the ending of their format, such as .png or .jpg")  # fmt: skip
    yield from of("archives", "doubtful", "hold packed content, which is not looked at",
                  f"unpack them: {' '.join(archives[:NAMED])}")  # fmt: skip
    yield from of("empty-folders", "doubtful", "hold no file", f"find {path} -type d -empty lists them")
    yield from of("hidden-files", "note", "are hidden or made by the system: passed over",
                  "rename those that are images; the others do no harm")  # fmt: skip
    yield from of("other-files", "note", "hold no image: passed over", "nothing needs to be done")


def _of_strays(survey: ScanResult, kind: StrayKind, severity: Severity, what: str, advice: str) -> Iterator[Finding]:
    found = [_told(stray) for stray in survey.non_samples if stray.kind == kind]
    things = _files(len(found)).replace("file", "folder" if kind == "empty-folders" else "file")
    yield Finding(kind, severity, f"{things} {what}", (advice,), names=tuple(found))


def _told(stray: NonSample) -> str:
    return f"{stray.name} ({stray.detail})" if stray.detail else stray.name


RULES: tuple[Rule, ...] = (
    *(faults, duplicates, near_duplicates, leaks, classes, sizes, contents, captions, names, formats, others),
)


def _files(count: int) -> str:
    return f"{count:,} file{'s' if count != 1 else ''}"


def _images(count: int) -> str:
    return f"{count:,} image{'s' if count != 1 else ''}"


VERBS = {"have": "has", "are": "is", "end": "ends", "stand": "stands", "look": "looks", "lie": "lies", "show": "shows",
         "hold": "holds", "link": "links", "repeat": "repeats"}  # fmt: skip


def _of_one(what: str) -> str:
    """'1 file have no content' -> '1 file has no content'"""
    found = re.match(r"1 (file|image|folder) (\w+)", what)
    return what if found is None else f"1 {found[1]} {VERBS.get(found[2], found[2])}{what[found.end() :]}"


def _apart(left: int, right: int) -> str:
    return f"{int(np.bitwise_count(np.uint64(left) ^ np.uint64(right)))} of 64 bits differ"


# Decisions


def excluded_kinds(words: Sequence[str]) -> tuple[str, ...]:
    """Kinds of findings whose samples are dropped; `corrupt` is everything that cannot be read. Raises TesseraError."""
    found: list[str] = []
    for word in words:
        if word == "corrupt":
            found += CORRUPT
        elif word in SAMPLE_KINDS or word in CORRUPT:
            found.append(word)
        else:
            raise TesseraError(f"--drop: {unknown_name('kind', word, ['corrupt', *SAMPLE_KINDS, *CORRUPT])}")
    return tuple(found)


def decisions(found: Sequence[Finding], drop: Sequence[str], count: int) -> tuple[np.ndarray, dict[int, list[str]]]:
    """Which samples are kept, bool [N], and of each sample of which something is said, what.

    Of near duplicates whose first one is dropped for another reason, none takes its place.
    """
    keep = np.ones(count, bool)
    reasons: dict[int, list[str]] = defaultdict(list)
    for finding in found:
        for row in finding.samples:
            more = finding.reasons.get(row)
            reasons[row].append(f"{finding.kind}: {more}" if more else finding.kind)
        if finding.kind in drop:
            keep[list(finding.samples)] = False
    return keep, reasons


def index_of(survey: ScanResult, keep: np.ndarray) -> "pyarrow.Table":
    """The index of the samples that are kept, with what was measured of them. keep: bool [N]"""
    pa = arrow()
    table, digest = survey.source.table, survey.stats["digest"].to_pylist()
    for name, values in {
        "height": pa.array(survey.column("height"), "int32", mask=~survey.usable),
        "width": pa.array(survey.column("width"), "int32", mask=~survey.usable),
        "hash": pa.array(survey.column("hash"), "uint64", mask=~survey.usable),
        "digest": pa.array([None if one is None else one.hex() for one in digest], "string"),
    }.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    return table.filter(pa.array(keep))
