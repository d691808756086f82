"""Indexing of files: the layout is detected from the content of a path.

A path holds an index, tables (parquet, arrow, a data set saved by Hugging Face's `datasets`), WebDataset tars, or image
files, whose captions and labels are in metadata files, text files or folder names. Every function returns an index and
notes about what it leaves out: training and `tessera data check` read the same samples, and training refuses those with
notes of errors.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tessera import storage
from tessera.data import index, tables
from tessera.data.columns import (
    Indexed,
    LayoutOptions,
    TextColumn,
    can_be_text,
    decode_text,
    encode_labels,
    encoding_notes,
    find_key,
    read_texts,
)
from tessera.data.folders import VIDEO_SUFFIXES, FolderListing, list_folder, no_samples, sample_suffixes
from tessera.data.index import arrow
from tessera.data.metadata_files import (
    FILE_NAME,
    FILE_NAMES,
    METADATA_FILES,
    MetadataRows,
    caption_values,
    label_values,
    path_values,
    read_metadata,
    span_columns,
)
from tessera.data.notes import Note, about, printable
from tessera.data.packed import (
    HUB_PREFIX,
    FileColumns,
    columns_of,
    index_hub,
    index_tables,
    index_tars,
    joined_spans,
    no_captions,
    progress,
    saved_dataset_files,
    text_notes,
)
from tessera.data.splits import SPLIT_COLUMN, SPLIT_OF_WORD, SPLITS, choose_split, split_at, split_depth, split_of_file
from tessera.errors import TesseraError

if TYPE_CHECKING:
    import pyarrow

CAPTION_SUFFIXES = (".txt", ".caption")  # of text files beside images
DOCUMENT_SUFFIXES = {".md", ".rst", ".yaml", ".yml", ".html", ".htm", ".xml"}  # of files that are ignored unsaid
LABEL_NOTES = {"missing-labels", "invalid-labels", "label-types", "loose-images"}  # without meaning without classes
LIST_SUFFIXES = (".csv", ".jsonl")  # of files with one row for each sample, as data.path
CHUNK = 1024  # text files read at once; an interrupt waits for one chunk
BRACES = re.compile(r"\{([^{}]*)\}")  # of a pattern: {a,b} or {000..127}, as WebDataset and shells write them


def build_index(options: LayoutOptions) -> tuple["pyarrow.Table", list[Note], list[int]]:
    """The index of all samples in the paths, notes, and how many samples each path has, which follow each other.

    Raises TesseraError if there are none.
    """
    if not options.paths:
        raise TesseraError("data.path is an empty list; expected at least one folder or file")
    parts = [_index_path(path, options) for path in options.paths]
    table, notes = _concat(parts)
    where = ", ".join(options.paths)
    if not len(table):
        errors = [note.text for note in notes if note.severity == "error"]
        raise TesseraError(errors[0] if errors else f"data.path {where} contains no rows")
    root, class_names = index.metadata(table)
    if options.classes == "none":
        notes = [note for note in notes if note.kind not in LABEL_NOTES]
        if class_names:
            no_labels = arrow().nulls(len(table), arrow().int32())
            table = table.set_column(table.schema.get_field_index("label"), "label", no_labels)
            table, class_names = index.with_metadata(table, root, ()), ()
    if class_names:
        labels = index.labels(table)
        counts = np.bincount(labels[labels >= 0], minlength=len(class_names))
        unused = [class_names[number] for number in np.flatnonzero(counts == 0)]
        message = f"of {len(class_names):,} classes have no sample"
        notes += about("unused-classes", where, message, unused, "a network learns nothing of them")
    return table, notes, [len(part) for part, _ in parts]


def _concat(parts: Sequence[Indexed]) -> Indexed:
    """Indexes as one, and their notes with the rows of the whole."""
    notes, start = [], 0
    for table, part in parts:
        notes += [note.shifted(start) for note in part]
        start += len(table)
    return index.concat([table for table, _ in parts]), notes


def expand_path(name: str) -> list[Path]:
    """The files or folders of a path or pattern, sorted; what exists by this name is no pattern. Empty if none exist.

    Raises TesseraError if some alternatives of braces do not exist.
    """
    if storage.is_remote(path := storage.locate(name)):
        existing, alternatives = path, _expand_braces(name)
        matches = {each: storage.matching(storage.locate(each)) for each in alternatives}
        return _all_matches(name, existing, matches)
    path = path.absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    alternatives = _expand_braces(path.relative_to(existing).as_posix())
    return _all_matches(name, existing, {each: _expand_pattern(existing, each) for each in alternatives})


def _all_matches(name: str, existing: Path, matches: dict[str, list[Path]]) -> list[Path]:
    missing = [alternative for alternative, paths in matches.items() if not paths]
    if 0 < len(missing) < len(matches):
        count = f"{len(missing)} of {len(matches)}"
        raise TesseraError(f"data.path {name}: {count} do not exist, such as {existing / missing[0]}")
    return [path for paths in matches.values() for path in paths]


def _expand_braces(text: str) -> list[str]:
    braces = BRACES.search(text)
    if braces is None:
        return [text]
    words = braces[1].split(",")
    if limits := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
        words = [f"{number:0{len(limits[1])}}" for number in range(int(limits[1]), int(limits[2]) + 1)]
    return [each for word in words for each in _expand_braces(text[: braces.start()] + word + text[braces.end() :])]


def _expand_pattern(folder: Path, pattern: str) -> list[Path]:
    if (folder / pattern).exists():
        return [folder / pattern]
    return [Path(match) for match in sorted(glob.glob(os.path.join(glob.escape(str(folder)), pattern), recursive=True))]


def split_path(name: str) -> tuple[str, str | None]:
    """A path and the split that it names: `folder:test` is the split `test` of `folder`, unless it exists itself."""
    path, _, split = name.rpartition(":")
    return (path, split) if path and split and not expand_path(name) and expand_path(path) else (name, None)


def _index_path(name: str, options: LayoutOptions) -> Indexed:
    if name.startswith(HUB_PREFIX):
        return index_hub(name.removeprefix(HUB_PREFIX), options)
    path, split = split_path(name)
    split = split or options.split
    matches = expand_path(path)
    if not matches:
        problem = f"{name} contains no parquet file" if options.kind == "parquet" else f"{name} does not exist"
        problem = storage.absence(name) if storage.is_remote(storage.locate(name)) else problem
        raise TesseraError(f"data.path {problem}; expected {EXPECTED}")
    return _concat(
        [_index_match(match, path if len(matches) == 1 else str(match), split, options) for match in matches]
    )


EXPECTED = "a folder of images, or of one subfolder per class, or .parquet, .tar or .csv files, or hub:owner/name"


def _index_match(path: Path, name: str, split: str | None, options: LayoutOptions) -> Indexed:
    if storage.is_folder(path):
        return _index_folder(path, name, split, options)
    suffix = path.suffix.lower()
    if suffix in LIST_SUFFIXES or (suffix == ".parquet" and not index.is_index(path) and _is_list(path, options)):
        table, notes = _index_metadata(path.parent, [path.name], [], lambda _: True, None, name, split, options)
        if not len(table):
            errors = [note.text for note in notes if note.severity == "error"]
            raise TesseraError(errors[0] if errors else f"{path} has no rows")
        return table, notes
    if suffix in index.TABLE_SUFFIXES:
        if not index.is_index(path):
            return index_tables([path], path.parent, options)
        if split is not None:
            raise TesseraError(f"data.path {name} is an index, which has no splits: leave data.split={split} out")
        return index.read(path), []
    if suffix == ".tar":
        return index_tars([path], path.parent, options)
    if options.kind == "parquet":
        raise TesseraError(f"data.path {name} contains no parquet file")
    if suffix in (".zip", ".tgz", ".gz", ".7z", ".rar"):
        raise TesseraError(f"data.path {name} is compressed, which has no random access: unpack it first")
    raise TesseraError(f"data.path {name} is a file; expected {EXPECTED}")


def _is_list(path: Path, options: LayoutOptions) -> bool:
    """Whether a parquet file has the paths of files instead of their content."""
    schema = tables.read_schema(path)
    if find_key("auto", FILE_NAMES, schema.names) is None:
        return False
    try:
        tables.find_image_column(schema, options.image, path, options.frames)
    except TesseraError:
        return True
    return False


# Folders


def _index_folder(root: Path, name: str, split: str | None, options: LayoutOptions) -> Indexed:
    if options.kind not in ("folder", "frame-folders") and (saved := saved_dataset_files(root, split)) is not None:
        files, notes = saved
        table, more = index_tables(files, root, options)
        return table, notes + more
    if storage.is_remote(root) and storage.exists(root / index.FILE) and index.is_index(root / index.FILE):
        return index.read(root / index.FILE), []
    listing = list_folder(root)
    kinds: dict[str, list[str]] = {"images": [], "metadata": [], "tables": [], "tars": [], "indexes": []}
    for path in listing.files:
        file_name = path.rpartition("/")[2].lower()
        suffix = os.path.splitext(file_name)[1]
        if suffix in sample_suffixes(options.frames):
            kinds["images"].append(path)
        elif file_name in METADATA_FILES:
            kinds["metadata"].append(path)
        elif suffix in index.TABLE_SUFFIXES:
            kinds["indexes" if index.is_index(root / path) else "tables"].append(path)
        elif suffix == ".tar":
            kinds["tars"].append(path)
    if options.kind == "parquet" and not kinds["tables"]:
        raise TesseraError(f"data.path {name} contains no parquet file")
    frames = kinds["images"]
    if options.kind == "frame-folders":
        kinds["images"] = list(dict.fromkeys(path.rpartition("/")[0] or "." for path in frames))
    layout, notes = _choose_layout(name, kinds, options)
    if layout == "images":
        table, used, more = _index_images(listing, name, kinds, split, options)
    else:
        chosen, more = _files_of_split(kinds[layout], split, name)
        index_files = index_tables if layout == "tables" else index_tars
        table, files_notes = index_files([root / path for path in chosen], root, options)
        used, more = set(kinds[layout]), more + files_notes
    used |= {*kinds["indexes"], *frames} if options.kind == "frame-folders" else set(kinds["indexes"])
    return table, [*listing.notes(name), *notes, *more, *_ignored_files(listing, used, name)]


def _choose_layout(name: str, kinds: dict[str, list[str]], options: LayoutOptions) -> tuple[str, list[Note]]:
    """Which of the files of a folder are the samples. Several layouts are an error, unless the kind selects one."""
    if options.kind == "parquet":
        return "tables", []
    present = [layout for layout in ("images", "tables", "tars") if kinds[layout]]
    if options.kind in ("folder", "frame-folders") or not present:
        return "images", []
    if len(present) == 1:
        return present[0], []
    counts = [
        f"{len(kinds[layout])} {'parquet files' if layout == 'tables' else layout} (such as {kinds[layout][0]})"
        for layout in present
    ]
    text = (
        f"data.path {name} contains {' and '.join(counts)}: give the folder of one of them, "
        "or set data.kind to folder (images) or parquet"
    )
    names = tuple(kinds[layout][0] for layout in present)
    return present[0], [Note("several-layouts", "error", text, f"layouts in {name}; the first is checked", names)]


def _files_of_split(files: Sequence[str], split: str | None, name: str) -> tuple[list[str], list[Note]]:
    splits = [split_of_file(path) for path in files]
    chosen, notes = choose_split(splits, split, name, "files")
    return [path for path, own in zip(files, splits) if own in chosen], notes


def _ignored_files(listing: FolderListing, used: set[str], name: str) -> list[Note]:
    """Files that are neither samples nor belong to them nor are documents."""
    ignored = [
        path
        for path in listing.files
        if path not in used and os.path.splitext(path)[1].lower() not in DOCUMENT_SUFFIXES
    ]
    if not ignored:
        return []
    counts = Counter(os.path.splitext(path)[1] or "without an ending" for path in ignored)
    text = ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(5))
    text = f"{name}: files that are not read: {text} (such as {ignored[0]})"
    return [Note("ignored-files", "warning", text, "files that are ignored", tuple(ignored), folder=listing.root)]


def _index_images(
    listing: FolderListing, name: str, kinds: dict[str, list[str]], split: str | None, options: LayoutOptions
) -> tuple["pyarrow.Table", set[str], list[Note]]:
    """The index of images in folders, and the files that it used."""
    root, images, metadata = listing.root, kinds["images"], kinds["metadata"]
    depth = split_depth(images)
    notes: list[Note] = []
    chosen: set[str | None] = set()
    if depth is not None:
        chosen, notes = choose_split([split_at(path, depth) for path in images], split, name, "images")
        images = [path for path in images if split_at(path, depth) in chosen]
    elif split is not None and not metadata:
        choose_split([None], split, name, "images")
    if metadata:
        # A metadata file above the folders of splits names the images of all of them.
        in_split = [path for path in metadata if depth is None or split_at(path, depth) in {None, *chosen}]

        def is_selected(path: str) -> bool:
            return depth is None or split_at(path, depth) in chosen

        table, more = _index_metadata(root, in_split, images, is_selected, depth, name, split, options)
        return table, {*kinds["images"], *metadata}, notes + more
    if not images:
        videos = sum(os.path.splitext(path)[1].lower() in VIDEO_SUFFIXES for path in listing.files)
        raise TesseraError(
            f"data.path {name} contains {no_samples(options.frames)}"
            + (f"; it has {videos:,} videos: set data.frames (--frames of commands)" if videos else "")
            + ("; " + listing.unreadable[0] + " cannot be read" if listing.unreadable else "")
        )
    captions, texts, more = _read_caption_files(listing, images, options)
    class_names, labels, class_notes = _folder_classes(images, name, depth, options)
    if class_names:
        folders = {path.partition("/")[0] for path in listing.files if "/" in path} | {
            path.partition("/")[0] for path in listing.empty
        }
        bare = sorted(folders - {path.partition("/")[0] for path in kinds["images"]})
        class_notes += about("folders-without-images", name, "folders without images are no classes", bare)
        words = [each for each in class_names if split_of_file(f"{each}/") is not None]
        if len(words) > 1:
            class_notes += about(
                *("splits-as-classes", name, "folders are classes, although their names are those of splits", words),
                f"move the others ({', '.join(sorted(set(class_names) - set(words))[:3])}) away, or give one of them",
            )
    table = index.build(root, class_names, path=images, label=labels, caption=captions)
    # Captions of images of another split are no ignored files.
    stems = {os.path.splitext(path)[0] for path in kinds["images"]} - {os.path.splitext(path)[0] for path in images}
    others = {path for path in listing.files if stems and os.path.splitext(path)[0] in stems}
    return table, {*kinds["images"], *texts, *others}, [*notes, *more, *class_notes]


def _folder_classes(
    paths: Sequence[str], name: str, depth: int | None, options: LayoutOptions
) -> tuple[tuple[str, ...], np.ndarray | None, list[Note]]:
    """Class names from the first level of folders, and the class of every image, int32 [N], -1 beside class folders.

    depth: of folders that are splits. Classes are below it, unless there are several folders above it.
    """
    if options.classes == "none":
        return (), None, []
    level = 0
    if depth is not None and len({tuple(path.split("/")[:depth]) for path in paths}) == 1:
        level = depth + 1
    folders = [parts[level] if len(parts := path.split("/")) > level + 1 else "" for path in paths]
    loose = [row for row, folder in enumerate(folders) if not folder]
    if len(loose) == len(paths):
        if options.classes == "folders":
            raise TesseraError(
                f"data.classes=folders, but none of the {len(loose)} images in {name} is in a class folder"
            )
        return (), None, []
    notes = []
    if loose:
        text = (
            f"{len(loose)} images in {name} are beside the class folders, so their class is unknown: "
            "move them into a class folder, or set data.classes=none to train without classes"
        )
        message = "images beside the class folders, without a class"
        notes.append(Note("loose-images", "error", text, message, rows=dict.fromkeys(loose, "")))
    names = sorted(set(folders) - {""})
    number = {name: index for index, name in enumerate(names)} | {"": -1}
    return tuple(names), np.fromiter((number[folder] for folder in folders), np.int32, len(folders)), notes


def _read_caption_files(
    listing: FolderListing, images: Sequence[str], options: LayoutOptions
) -> tuple[list[str | None] | None, set[str], list[Note]]:
    """The caption of every image, from the text file with the same name beside it; the text files."""
    files: dict[str, str] = {}  # by path without suffix
    if options.caption is not None:
        for suffix in CAPTION_SUFFIXES:
            for path in listing.files:
                stem, own_suffix = os.path.splitext(path)
                if own_suffix.lower() == suffix:
                    files.setdefault(stem, path)
    if not files:
        return None, set(), []
    guessed, unreadable = [], []

    def read_caption(path: str) -> str | None:
        file = files.get(os.path.splitext(path)[0])
        if file is None:
            return None
        try:
            text, is_guessed = decode_text(storage.read(listing.root / file))
        except OSError:
            text, is_guessed = None, False
        if text is None:
            unreadable.append(file)
        elif is_guessed:
            guessed.append(file)
        return text and text.strip()

    starts = range(0, len(images), CHUNK)
    captions: list[str | None] = []
    with ThreadPoolExecutor(8) as pool:
        for start in progress(starts, len(starts), 20, "reading captions"):
            captions.extend(pool.map(read_caption, images[start : start + CHUNK]))
    used = {files[stem] for path in images if (stem := os.path.splitext(path)[0]) in files}
    return captions, used, encoding_notes(listing.root, sorted(guessed), sorted(unreadable))


# Metadata files


def _index_metadata(
    root: Path,
    files: Sequence[str],
    images: Sequence[str],
    is_selected: Callable[[str], bool],
    depth: int | None,
    name: str,
    split: str | None,
    options: LayoutOptions,
) -> Indexed:
    """The images listed in metadata files, with their labels and captions.

    is_selected: whether a path is in the split that is read, where folders are splits (`depth`). split: the requested
    one, for a column of splits.
    """
    pa = arrow()
    known, notes = set(images), []
    parts: list[tuple[str, MetadataRows, list[str | None]]] = []  # file, its rows, and the path of each
    columns = FileColumns(options, name)
    best: dict[str, tuple[int, int, str]] = {}  # by path: how near the metadata file is that describes it
    for file in files:
        try:
            rows = read_metadata(root / file, columns.is_candidate)
            file_name = find_key("auto", FILE_NAMES, rows.names) or FILE_NAME
            tables.find_column(file_name, (), rows.names, root / file, "path")
        except TesseraError as error:
            notes.append(Note("damaged-files", "error", str(error), "metadata files that cannot be read", (file,)))
            continue
        folder = file.rpartition("/")[0]
        paths, unnamed = [], []
        for row, value in enumerate(path_values(rows.columns[file_name])):
            path = _sample_path(root, folder, value, known)
            if path is None:
                unnamed.append(rows.row_name(row) + ("" if not value else f": {printable(value)}"))
            paths.append(path)
        advice = "give them one, or remove the rows"
        notes += about("rows-without-file", root / file, "rows have no valid file_name", unnamed, advice)
        notes += about("damaged-rows", root / file, "rows cannot be read and are left out", rows.unreadable)
        if rows.is_guessed:
            notes += encoding_notes(root, [file], [])
        parts.append((file, rows, paths))
        kind = file.rpartition("/")[2].lower()
        number = METADATA_FILES.index(kind) if kind in METADATA_FILES else len(METADATA_FILES)
        rank = (-len(folder.split("/")) if folder else 0, number, file)
        for path in paths:
            if path is not None:
                best[path] = min(best.get(path, rank), rank)
    if depth is None:
        splits, chosen, more = _choose_rows([rows for _, rows, _ in parts], split, name)
        notes += more
    else:
        splits, chosen = [[None] * len(paths) for _, _, paths in parts], {None}
    all_paths, captions, labels = [], [], []
    spans: list[dict[str, Any]] = []
    for (file, rows, paths), row_splits in zip(parts, splits):
        keep = [
            row
            for row, path in enumerate(paths)
            if path is not None and best[path][2] == file and is_selected(path) and row_splits[row] in chosen
        ]
        elsewhere = [path for path in paths if path is not None and best[path][2] != file and is_selected(path)]
        if elsewhere:
            advice = f"that in {best[elsewhere[0]][2]} is used"
            notes += about("repeated-rows", root / file, "images have another description", elsewhere, advice)
        all_paths += [paths[row] for row in keep]
        taken = pa.array(keep, pa.int64())
        times = span_columns(rows.columns if options.frames is not None else {}, len(rows))
        spans.append({name: values.take(taken) for name, values in times.items()})
        caption, label = columns.find(rows.names, root / file, rows.names)
        texts = read_texts(caption_values(rows.columns[caption])) if caption else None
        if texts is not None and caption:
            values = rows.columns[caption]
            if not isinstance(values, list) and not can_be_text(values.type) and options.caption != "auto":
                raise TesseraError(f"{root / file}: column '{caption}' is not text ({values.type}); set data.caption")
            lost = _lost_texts(values, texts)
            notes += about(
                "unreadable-text", root / file, "captions are not text", [rows.row_name(row) for row in lost]
            )
            notes += text_notes(root / file, texts, rows.row_name)
        captions.append(no_captions(len(keep)) if texts is None else texts.captions.take(taken))
        if label and options.classes == "auto":
            values = label_values(rows.columns[label], rows.is_typed)
            labels.append(([values[row] for row in keep] if isinstance(values, list) else values.take(taken), ()))
        else:
            labels.append((pa.nulls(len(keep)), ()))
    notes += columns.notes()
    class_names, class_ids = (), None
    if columns.found_label and options.classes == "auto":
        encoded = encode_labels(labels, "the metadata")
        class_names, class_ids, notes = encoded.class_names, encoded.ids, notes + encoded.notes
    elif options.classes == "folders":
        class_names, class_ids, more = _folder_classes(all_paths, name, depth, options)
        notes += more
    elif options.classes == "auto":
        folders = _folder_classes(all_paths, name, depth, options)[0] if all_paths else ()
        if len(folders) > 1:
            message = "folders of images are not used as classes, as there is metadata"
            notes += about("unused-columns", name, message, folders, "set data.classes=folders to use them")
    unlisted = sorted(known - set(best))
    notes += about(
        *("unlisted-images", name, "images are not in the metadata and are not used", unlisted),
        *("add rows for them, or move the metadata away", "warning", root),
    )
    repeated = [path for path, count in Counter(all_paths).items() if count > 1]
    times = joined_spans(spans) if spans else {}
    if all(values.null_count == len(values) for values in times.values()):  # otherwise several clips of a file
        notes += about("repeated-rows", name, "images are listed more than once, and are that many samples", repeated)
    paths = pa.array(all_paths, pa.string())
    table = index.build(root, class_names, path=paths, label=class_ids, **columns_of(captions), **times)
    return table, notes


def _choose_rows(
    files: Sequence[MetadataRows], split: str | None, name: str
) -> tuple[list[list[str | None]], set[str | None], list[Note]]:
    """The split of every row of metadata files from their column `split`, and which splits are read."""
    splits: list[list[str | None]] = []
    unknown: list[str] = []
    for rows in files:
        column = find_key("auto", (SPLIT_COLUMN,), rows.names)
        texts = read_texts(caption_values(rows.columns[column])).texts.to_pylist() if column else [None] * len(rows)
        words = [text.strip().lower() if text else "" for text in texts]
        unknown += [word for word in words if word and word not in SPLIT_OF_WORD]
        splits.append([SPLIT_OF_WORD.get(word) for word in words])
    notes = []
    if unknown:
        splits = [[None] * len(rows) for rows in files]
        message = f"values of the column '{SPLIT_COLUMN}' are no splits, so every row is read"
        notes = about("unused-columns", name, message, dict.fromkeys(unknown), f"expected {', '.join(SPLITS)}")
    chosen, more = choose_split([own for rows in splits for own in rows] or [None], split, name, "rows")
    return splits, chosen, notes + more


def _lost_texts(values: Any, texts: TextColumn) -> list[int]:
    """Rows of a column of JSON whose values are neither text nor null."""
    if not isinstance(values, list):
        return [] if can_be_text(values.type) else np.flatnonzero(values.is_valid()).tolist()
    return [row for row, missing in enumerate(texts.texts.is_null().to_pylist()) if missing and values[row] is not None]


def _sample_path(root: Path, folder: str, name: str | None, known: set[str]) -> str | None:
    """The path of an image relative to the root, from its name in a metadata file in a folder; None without a name.

    Outside the root it is absolute.
    """
    if name is None or not name.strip() or printable(name) != name:
        return None
    path = f"{folder}/{name}" if folder else name
    if path in known:
        return path
    full = os.path.normpath(os.path.join(root, folder, name))
    if not os.path.exists(full) and "\\" in name:
        full = os.path.normpath(os.path.join(root, folder, name.replace("\\", "/")))
    for base in (str(root), os.path.realpath(root)):
        if full.startswith(base.rstrip(os.sep) + os.sep):
            return os.path.relpath(full, base).replace(os.sep, "/")
    return full.replace(os.sep, "/")
