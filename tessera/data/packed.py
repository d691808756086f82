"""Indexing of files that hold many samples: tables, data sets of Hugging Face's `datasets`, and tars."""

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from tessera.data import index, tables, tars
from tessera.data.columns import (
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    Indexed,
    Labels,
    LayoutOptions,
    TextColumn,
    can_be_text,
    caption_columns,
    encode_labels,
    encoding_notes,
    find_key,
    read_texts,
    unused_columns,
)
from tessera.data.folders import no_samples
from tessera.data.index import arrow
from tessera.data.metadata_files import FILE_NAMES, SPAN_NAMES, span_columns
from tessera.data.notes import Note, about
from tessera.data.splits import SPLIT_COLUMN, TRAIN
from tessera.errors import TesseraError

if TYPE_CHECKING:
    import pyarrow

HUB_PREFIX = "hub:"

T = TypeVar("T")


def progress(items: Iterable[T], total: int, threshold: int, label: str) -> Iterable[T]:
    """The items, with a progress bar if there are at least `threshold` and stderr is a terminal."""
    console = Console(stderr=True)
    disable = total < threshold or not console.is_terminal
    return track(items, label, total, console=console, transient=True, disable=disable)


# Tables


class FileColumns:
    """Which columns of several files are read, and which look like labels or captions and are not."""

    def __init__(self, options: LayoutOptions, where: str | Path) -> None:
        self.options, self.where = options, where
        self.found_label = self.found_caption = False
        self._unused: dict[str, str] = {}

    def is_candidate(self, name: str) -> bool:
        """Whether a column may be read."""
        known = (*FILE_NAMES, SPLIT_COLUMN, *LABEL_COLUMNS, *CAPTION_COLUMNS)
        known += SPAN_NAMES if self.options.frames is not None else ()
        return name.lower() in known or name in (self.options.label, self.options.caption)

    def find(
        self, names: Sequence[str], file: Path, texts: Collection[str], declared: Sequence[str] = ()
    ) -> tuple[str | None, str | None]:
        """The columns of captions and labels of a file. `auto` selects a caption from `texts`. declared: as labels.

        Raises TesseraError if a named column is missing.
        """
        options = self.options
        known = [name for name in names if options.caption != "auto" or name in texts]
        caption = tables.find_column(options.caption, CAPTION_COLUMNS, known, file, "caption")
        label = tables.find_column(options.label, LABEL_COLUMNS, names, file, "label")
        used = {"caption": caption} | ({} if options.classes == "none" else {"label": label})
        self._unused |= unused_columns(names, used, options)
        if options.label == "auto" and options.classes != "none":
            self._unused |= {name: "label" for name in declared if name != label}
        self.found_label |= label is not None
        self.found_caption |= caption is not None
        return caption, label

    def notes(self) -> list[Note]:
        return [
            note
            for name, kind in self._unused.items()
            for note in about(
                *("unused-columns", self.where, f"column looks like {kind}s and is not used", [name]),
                f"set data.{kind}={name} to read it",
            )
        ]


def text_notes(where: Path, texts: TextColumn, row_name: Callable[[int], str]) -> list[Note]:
    return encoding_notes(where, [row_name(row) for row in texts.guessed], [row_name(row) for row in texts.unreadable])


def index_tables(files: Sequence[Path], root: Path, options: LayoutOptions) -> Indexed:
    """The rows of parquet and arrow files."""
    if options.classes == "folders":
        raise TesseraError(f"data.classes=folders, but {root} contains tables: set data.label to their label column")
    pa = arrow()
    paths, offsets, captions, labels, notes = [], [], [], [], []
    spans: list[dict[str, Any]] = []
    columns, label = FileColumns(options, root), None
    splits: set[Any] = set()
    for file in files:
        try:
            schema = tables.read_schema(file)
            tables.find_image_column(schema, options.image, file, options.frames)
            declared = tables.declared_labels(schema)
            readable = {field.name for field in schema if can_be_text(field.type)}
            caption, own_label = columns.find(schema.names, file, readable, declared)
            if options.classes == "none":
                own_label = None
            of_clips = [name for name in SPAN_NAMES if name in schema.names and options.frames is not None]
            names = list(dict.fromkeys([name for name in (caption, own_label, *of_clips) if name]))
            rows = tables.read_columns(file, names)
            count = rows.num_rows if names else tables.count_rows(file)
            if column := find_key("auto", (SPLIT_COLUMN,), schema.names):
                splits |= set(tables.read_columns(file, [column])[column].unique().to_pylist())
            texts = _table_captions(rows, caption, file) if caption else None
        except TesseraError as error:
            notes.append(Note("damaged-files", "error", str(error), "files that cannot be read", (str(file),)))
            continue
        if texts is not None:
            notes += text_notes(file, texts, "row {}".format)
        paths.append(repeat(file.relative_to(root).as_posix(), count))
        offsets.append(np.arange(count))
        spans.append(span_columns({name: rows[name] for name in of_clips}, count))
        captions.append(no_captions(count) if texts is None else texts.captions)
        label = own_label or label
        values = rows[own_label] if own_label else pa.nulls(count)
        labels.append((values, tables.class_names(schema, own_label) if own_label else ()))
    if not paths:
        raise TesseraError(notes[0].text)
    if len(splits) > 1:
        message = f"values of the column '{SPLIT_COLUMN}', which is not used, so every row is read"
        names = sorted(map(str, splits))
        notes += about("unused-columns", root, message, names, "save each split in a file named after it")
    encoded = encode_labels(labels, f"column '{label}'") if label else Labels((), np.zeros(0), [])
    table = index.build(
        root,
        encoded.class_names,
        path=pa.chunked_array(paths, pa.string()),
        offset=np.concatenate(offsets),
        label=encoded.ids if label else None,
        **columns_of(captions),
        **joined_spans(spans),
    )
    return table, [*notes, *columns.notes(), *encoded.notes]


def _table_captions(rows: "pyarrow.Table", name: str, file: Path) -> TextColumn:
    kind = rows[name].type
    if not can_be_text(kind):
        raise TesseraError(f"{file}: column '{name}' is not text ({kind}); set data.caption")
    return read_texts(rows[name])


def repeat(text: str, count: int) -> Any:
    pa = arrow()
    return pa.array([text], pa.string()).take(pa.array(np.zeros(count, np.int32)))


def no_captions(count: int) -> "pyarrow.Table":
    pa = arrow()
    return caption_columns(pa.nulls(count, pa.string()))


def joined_spans(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The columns of times of several files one after the other, by name."""
    return {name: arrow().concat_arrays([part[name] for part in parts]) for name in SPAN_NAMES}


def columns_of(tables: Sequence["pyarrow.Table"]) -> dict[str, Any]:
    """The columns of tables of captions one after the other, by name."""
    table = arrow().concat_tables([*tables, no_captions(0)])
    return dict(zip(table.column_names, table.columns))


def saved_dataset_files(root: Path, split: str | None) -> tuple[list[Path], list[Note]] | None:
    """The arrow files of a data set that `datasets` saved in a folder; of several splits those of `train`."""
    try:
        if (root / "dataset_dict.json").is_file():
            splits = json.loads((root / "dataset_dict.json").read_text())["splits"]
            chosen, notes = _named_split(splits, split, str(root), str(root / splits[0]))
            saved = saved_dataset_files(root / chosen, None)
            return None if saved is None else (saved[0], notes)
        if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
            files = json.loads((root / "state.json").read_text())["_data_files"]
            return [root / each["filename"] for each in files], []
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise TesseraError(f"the data set saved in {root} is damaged: {error}") from None
    return None


def _named_split(splits: Sequence[str], requested: str | None, where: str, example: str) -> tuple[str, list[Note]]:
    """The split to read of those with these names: the requested one, the only one, or `train`."""
    split = requested or (splits[0] if len(splits) == 1 else TRAIN)
    if split not in splits:
        raise TesseraError(f"{where} has the splits {', '.join(splits)}: give one of them, {example}")
    others = tuple(name for name in splits if name != split)
    if requested or not others:
        return split, []
    text = f"{where}: the split {split} is read, and not {', '.join(others)}; data.split selects another"
    return split, [Note("other-splits", "warning", text, f"splits that are not read; the split {split} is", others)]


def index_hub(text: str, options: LayoutOptions) -> Indexed:
    """A data set that Hugging Face's `datasets` loads: owner/name or owner/name/configuration, with optional :split."""
    try:
        import datasets
    except ImportError:
        raise TesseraError(f"{HUB_PREFIX}{text} needs Hugging Face's datasets: pip install 'tessera[data]'") from None
    name, split = (text, "") if Path(text).exists() else text.partition(":")[::2]
    repository, config = name, None
    if name.count("/") == 2 and not Path(name).exists():
        repository, _, config = name.rpartition("/")
    try:
        loaded = datasets.load_dataset(repository, config, keep_in_memory=False)
    except Exception as error:  # of many types: no network, no such name, an unknown layout
        raise TesseraError(f"{HUB_PREFIX}{text} cannot be loaded: {error}") from None
    splits = [str(name) for name in loaded]
    name = HUB_PREFIX + name
    split, notes = _named_split(splits, split or options.split, name, f"{name}:{splits[0]}")
    files = [Path(each["filename"]) for each in loaded[split].cache_files]
    table, more = index_tables(files, Path(os.path.commonpath([file.parent for file in files])), options)
    return table, notes + more


# Tars


def index_tars(files: Sequence[Path], root: Path, options: LayoutOptions) -> Indexed:
    """The images in WebDataset tars, with their captions and labels."""
    if options.classes == "folders":
        raise TesseraError(f"data.classes=folders, but {root} contains tars, with labels in .cls or .json members")
    pa = arrow()
    parts, notes, unread = [], [], Counter()
    for file in progress(files, len(files), 2, "reading tars"):
        try:
            members, report = tars.read_tar(file, options)
        except TesseraError as error:
            notes.append(Note("damaged-files", "error", str(error), "files that cannot be read", (str(file),)))
            continue
        path = repeat(file.relative_to(root).as_posix(), len(members))
        parts.append(members.replace_schema_metadata().append_column("path", path))
        if report.is_cut:
            text = f"{file} has no end-of-archive block, so it was probably cut off: {len(members):,} samples are read"
            message = "tars that were probably cut off"
            notes.append(Note("damaged-files", "warning", text, message, (str(file),)))
        notes += about(
            *("repeated-keys", file, "images have the key of another image and are not read", report.collisions),
            "a key ends at the first dot of the name, as in WebDataset: rename them",
        )
        notes += encoding_notes(file, report.guessed, report.unreadable)
        notes += about("ignored-members", file, "links are not read", report.links)
        unread.update(report.unread)
        for name, kind in report.unused.items():
            message = f"JSON key looks like {kind}s and is not used"
            notes += about("unused-columns", file, message, [name], f"set data.{kind}={name} to read it")
    if unread:
        text = f"{root}: members that are not read: " + ", ".join(
            f"{count:,} {suffix}" for suffix, count in unread.items()
        )
        notes.append(Note("ignored-members", "warning", text, "kinds of members of tars are ignored", tuple(unread)))
    if not parts:
        raise TesseraError(notes[0].text)
    samples = pa.concat_tables(parts)
    if not len(samples):
        raise TesseraError(f"the tars in {root} contain {no_samples(options.frames)}")
    class_names, class_ids, labels = (), None, samples["label"]
    if options.classes == "auto" and labels.null_count < len(labels):
        encoded = encode_labels([(labels.to_pylist(), ())], "the tars")
        class_names, class_ids, notes = encoded.class_names, encoded.ids, notes + encoded.notes
    columns = {name: samples[name] for name in ("path", "offset", "length", "caption", "other_captions")}
    return index.build(root, class_names, label=class_ids, **columns), notes
