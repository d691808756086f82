"""Indexing of files: the layout is detected from the content of a path.

A path holds an index, tables (parquet, arrow, a data set saved by Hugging Face's `datasets`), WebDataset tars, or image
files, whose captions and labels are in metadata files, text files or folder names.
"""

import glob
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from tessera.data import index, tables
from tessera.data.index import arrow, compute
from tessera.errors import TesseraError
from tessera.files import atomic_file

if TYPE_CHECKING:
    import pyarrow

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"  # the column of a metadata file with the path of the image, relative to its folder
TEXT_TYPES = ("string", "large_string", "list<element: string>", "list<item: string>")  # column types of captions
HUB_PREFIX = "hub:"
MIN_CACHED_MEMBERS = 1000  # a tar with as many samples has its members cached: listing takes about 0.1 ms a member
CHUNK = 1024  # text files read at once; an interrupt waits for one chunk

T = TypeVar("T")


class LayoutOptions(tables.ColumnOptions, Protocol):
    """The settings that select what is read from a path."""

    @property
    def kind(self) -> str: ...
    @property
    def classes(self) -> str: ...
    @property
    def paths(self) -> list[str]: ...


def build_index(options: LayoutOptions) -> "pyarrow.Table":
    """The index of all samples in the paths. Raises TesseraError if there are none or the layout is not valid."""
    if not options.paths:
        raise TesseraError("data.path is an empty list; expected at least one folder or file")
    table = index.concat([_index_path(path, options) for path in options.paths])
    where = ", ".join(options.paths)
    if not len(table):
        raise TesseraError(f"data.path {where} contains no rows")
    root, class_names = index.metadata(table)
    if options.classes == "none" and class_names:
        no_labels = arrow().nulls(len(table), arrow().int32())
        table = table.set_column(table.schema.get_field_index("label"), "label", no_labels)
        table, class_names = index.with_metadata(table, root, ()), ()
    if len(class_names) == 1:
        raise TesseraError(
            f"{where} contains only one class ('{class_names[0]}'), so there is nothing to condition on: "
            "set data.classes=none to train without classes"
        )
    return table


def _index_path(name: str, options: LayoutOptions) -> "pyarrow.Table":
    if name.startswith(HUB_PREFIX):
        return _index_hub(name.removeprefix(HUB_PREFIX), options)
    path = Path(name).expanduser().absolute()
    if path.is_dir():
        return _index_folder(path, name, options)
    if path.is_file() and path.suffix in index.TABLE_SUFFIXES:
        return index.read(path) if index.is_index(path) else _index_tables([path], path.parent, options)
    if path.is_file() and path.suffix == ".tar":
        return _index_tars([path], path.parent, options)
    if not path.exists() and (matches := sorted(glob.glob(str(path)))):
        return index.concat([_index_path(match, options) for match in matches])
    if options.kind == "parquet":
        raise TesseraError(f"data.path {name} contains no parquet file")
    if path.suffix in (".zip", ".tgz", ".gz", ".7z", ".rar") and path.exists():
        raise TesseraError(f"data.path {name} is compressed, which has no random access: unpack it first")
    problem = "is a file" if path.exists() else "does not exist"
    raise TesseraError(
        f"data.path {name} {problem}; expected a folder of images, or of one subfolder per class, "
        "or .parquet or .tar files, or hub:owner/name"
    )


# Folders


def _progress(items: Iterable[T], total: int, threshold: int, label: str) -> Iterable[T]:
    """The items, with a progress bar if there are at least `threshold` and stderr is a terminal."""
    console = Console(stderr=True)
    disable = total < threshold or not console.is_terminal
    return track(items, label, total, console=console, transient=True, disable=disable)


@dataclass
class _FolderContents:
    """The files of a folder at any depth, as sorted relative paths."""

    images: list[str] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    metadata: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)


def _index_folder(root: Path, name: str, options: LayoutOptions) -> "pyarrow.Table":
    if (saved := _saved_dataset_files(root)) is not None and options.kind != "folder":
        return _index_tables(saved, root, options)
    contents = _list_folder(root)
    table_files = [root / path for path in contents.tables] if options.kind != "folder" else []
    table_files = [path for path in table_files if not index.is_index(path)]
    if options.kind == "parquet" and not table_files:
        raise TesseraError(f"data.path {name} contains no parquet file")
    if options.kind == "files":
        layouts = {"images": contents.images, "parquet files": table_files, "tars": contents.tars}
        present = [f"{len(paths)} {layout} (such as {paths[0]})" for layout, paths in layouts.items() if paths]
        if len(present) > 1:
            raise TesseraError(
                f"data.path {name} contains {' and '.join(present)}: give the folder of one of them, "
                "or set data.kind to folder (images) or parquet"
            )
    if table_files:
        return _index_tables(table_files, root, options)
    if contents.tars and not contents.images:
        return _index_tars([root / path for path in contents.tars], root, options)
    if contents.metadata:
        return _index_metadata(root, contents, options)
    if not contents.images:
        raise TesseraError(f"data.path {name} contains no images at any depth ({', '.join(sorted(IMAGE_SUFFIXES))})")
    captions = _read_caption_files(root, contents) if contents.texts and options.caption is not None else None
    class_names, labels = _folder_classes(contents.images, name, options)
    return index.build(root, class_names, path=contents.images, label=labels, caption=captions)


def _list_folder(root: Path) -> _FolderContents:
    contents = _FolderContents()
    for path in sorted(_walk(root), key=lambda path: path.split("/")):
        name = path.rpartition("/")[2]
        suffix = os.path.splitext(name)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            contents.images.append(path)
        elif name in METADATA_FILES:
            contents.metadata.append(path)
        elif suffix in index.TABLE_SUFFIXES:
            contents.tables.append(path)
        elif suffix == ".tar":
            contents.tars.append(path)
        elif suffix == ".txt":
            contents.texts.add(path)
    return contents


def _walk(root: Path) -> Iterator[str]:
    """Every file at any depth that is not hidden. Links to folders are followed, except into a folder they are in."""
    real = os.path.realpath(root)
    # Folders, their paths relative to the root, and the real paths of the folder and its parents.
    stack: list[tuple[str, str, tuple[str, ...]]] = [(str(root), "", (real,))]
    while stack:
        folder, prefix, parents = stack.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError:  # no permission
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(parents[-1], entry.name)
                if real not in parents:
                    stack.append((entry.path, f"{prefix}{entry.name}/", (*parents, real)))
            elif entry.is_file():
                yield prefix + entry.name


def _folder_classes(
    paths: Sequence[str], name: str, options: LayoutOptions
) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Class names from the first level of folders, and the class of every image, int32 [N]."""
    if options.classes == "none":
        return (), None
    folders = [path.partition("/")[0] if "/" in path else "" for path in paths]
    loose = folders.count("")
    if loose == len(paths):
        if options.classes == "folders":
            raise TesseraError(f"data.classes=folders, but none of the {loose} images in {name} is in a class folder")
        return (), None
    if loose:
        raise TesseraError(
            f"{loose} images in {name} are beside the class folders, so their class is unknown: "
            "move them into a class folder, or set data.classes=none to train without classes"
        )
    names = sorted(set(folders))
    number = {name: index for index, name in enumerate(names)}
    return tuple(names), np.fromiter((number[folder] for folder in folders), np.int32, len(folders))


def _read_caption_files(root: Path, contents: _FolderContents) -> list[str | None]:
    """The caption of every image: the text file with the same name beside it, if there is one."""

    def read_caption(path: str) -> str | None:
        text_path = os.path.splitext(path)[0] + ".txt"
        if text_path not in contents.texts:
            return None
        try:
            return (root / text_path).read_text(encoding="utf-8-sig", errors="replace").strip()
        except OSError:
            return None

    starts = range(0, len(contents.images), CHUNK)
    captions: list[str | None] = []
    with ThreadPoolExecutor(8) as pool:
        for start in _progress(starts, len(starts), 20, "reading captions"):
            captions.extend(pool.map(read_caption, contents.images[start : start + CHUNK]))
    return captions


# Metadata files


def _index_metadata(root: Path, contents: _FolderContents, options: LayoutOptions) -> "pyarrow.Table":
    """The images listed in metadata files, with their labels and captions."""
    pa, pc = arrow(), compute()
    paths, captions, labels = [], [], []
    for file in contents.metadata:
        rows = _read_metadata_file(root / file)
        tables.find_column(FILE_NAME, (), rows.column_names, root / file, "path")
        folder = PurePosixPath(file).parent.as_posix()
        file_names = pc.replace_substring(rows[FILE_NAME].cast(pa.string()), "\\", "/")
        paths.append(file_names if folder == "." else pc.binary_join_element_wise(folder, file_names, "/"))
        caption, label = _caption_and_label_columns(rows.schema, options, root / file)
        captions.append(_caption_text(rows, caption, root / file))
        if label and options.classes == "auto":
            labels.append(rows[label])
    class_names, class_ids = (), None
    if labels:
        if len(labels) < len(contents.metadata):
            raise TesseraError(f"only {len(labels)} of {len(contents.metadata)} metadata files in {root} have labels")
        class_names, class_ids = tables.encode_labels(_concat(labels, root), (), "the metadata")
    path = _concat(paths, root)
    if options.classes == "folders":
        class_names, class_ids = _folder_classes(path.to_pylist(), str(root), options)
    return index.build(root, class_names, path=path, label=class_ids, caption=_concat(captions, root))


def _read_metadata_file(file: Path) -> "pyarrow.Table":
    pa = arrow()
    from pyarrow import csv, json

    try:
        if file.suffix == ".jsonl":
            return json.read_json(file)
        if file.suffix == ".csv":
            convert = csv.ConvertOptions(null_values=[""], strings_can_be_null=True)
            return csv.read_csv(file, parse_options=csv.ParseOptions(newlines_in_values=True), convert_options=convert)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise TesseraError(f"{file} is damaged: {error}") from None
    return tables.read_columns(file, tables.read_schema(file).names)


# Tables


def _index_tables(files: Sequence[Path], root: Path, options: LayoutOptions) -> "pyarrow.Table":
    """The rows of parquet and arrow files."""
    if options.classes == "folders":
        raise TesseraError(f"data.classes=folders, but {root} contains tables: set data.label to their label column")
    pa = arrow()
    paths, offsets, captions, labels, names = [], [], [], [], ()
    label = None
    for number, file in enumerate(files):
        schema = tables.read_schema(file)
        tables.find_image_column(schema, options.image, file)
        caption, label = _caption_and_label_columns(schema, options, file)
        if options.classes == "none":
            label = None
        rows = tables.read_columns(file, [name for name in (caption, label) if name])
        count = rows.num_rows if caption or label else tables.count_rows(file)
        paths.append(_repeat(file.relative_to(root).as_posix(), count))
        offsets.append(np.arange(count))
        captions.append(_caption_text(rows, caption, file) if caption else _no_captions(count))
        if label:
            labels.append(rows[label])
            names = names or tables.class_names(schema, label)
        if 0 < len(labels) < number + 1:
            raise TesseraError(f"the files in {root} have different columns: not all have labels")
    class_names, class_ids = (), None
    if labels:
        class_names, class_ids = tables.encode_labels(_concat(labels, root), names, f"column '{label}'")
    return index.build(
        root,
        class_names,
        path=pa.chunked_array(paths, pa.string()),
        offset=np.concatenate(offsets),
        label=class_ids,
        caption=_concat(captions, root),
    )


def _repeat(text: str, count: int) -> Any:
    pa = arrow()
    return pa.array([text], pa.string()).take(pa.array(np.zeros(count, np.int32)))


def _no_captions(count: int) -> Any:
    pa = arrow()
    return pa.chunked_array([pa.nulls(count, pa.string())])


def _concat(columns: Sequence[Any], root: Path) -> Any:
    pa = arrow()
    try:
        chunks = [chunk for column in columns for chunk in column.chunks]
        return pa.chunked_array(chunks, type=columns[0].type)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise TesseraError(f"the files in {root} have different columns: {error}") from None


def _caption_and_label_columns(
    schema: "pyarrow.Schema", options: LayoutOptions, file: Path
) -> tuple[str | None, str | None]:
    """The columns of captions and labels. `auto` selects only text columns as captions."""
    text_columns = [column.name for column in schema if str(column.type) in TEXT_TYPES]
    known = text_columns if options.caption == "auto" else schema.names
    return (
        tables.find_column(options.caption, tables.CAPTION_COLUMNS, known, file, "caption"),
        tables.find_column(options.label, tables.LABEL_COLUMNS, schema.names, file, "label"),
    )


def _caption_text(rows: "pyarrow.Table", name: str | None, file: Path) -> Any:
    """A column of captions as text, the first of several captions; nulls without a column."""
    pa, pc = arrow(), compute()
    if name is None:
        return _no_captions(len(rows))
    try:
        if pa.types.is_list(rows[name].type):
            return pc.binary_join(pc.list_slice(rows[name], 0, 1), "").cast(pa.string())
        return rows[name].cast(pa.string())
    except pa.ArrowException as error:
        raise TesseraError(f"{file}: column '{name}' is not text ({error}); set data.caption") from None


def _saved_dataset_files(root: Path) -> list[Path] | None:
    """The arrow files of a data set that `datasets` saved in a folder; of several splits those of `train`."""
    try:
        if (root / "dataset_dict.json").is_file():
            splits = json.loads((root / "dataset_dict.json").read_text())["splits"]
            split = splits[0] if len(splits) == 1 else "train"
            if split not in splits:
                raise TesseraError(f"{root} has the splits {', '.join(splits)}: give one of them, {root / splits[0]}")
            return _saved_dataset_files(root / split)
        if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
            return [root / each["filename"] for each in json.loads((root / "state.json").read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TesseraError(f"the data set saved in {root} is damaged: {error}") from None
    return None


def _index_hub(text: str, options: LayoutOptions) -> "pyarrow.Table":
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
    split = split or (splits[0] if len(splits) == 1 else "train")
    if split not in splits:
        name = HUB_PREFIX + name
        raise TesseraError(f"{name} has the splits {', '.join(splits)}: write {name}:{splits[0]}")
    files = [Path(each["filename"]) for each in loaded[split].cache_files]
    return _index_tables(files, Path(os.path.commonpath([file.parent for file in files])), options)


# Tars


def _index_tars(files: Sequence[Path], root: Path, options: LayoutOptions) -> "pyarrow.Table":
    """The images in WebDataset tars, with their captions and labels."""
    pa = arrow()
    parts = []
    for file in _progress(files, len(files), 2, "reading tars"):
        members = _image_members(file, options)
        parts.append(members.append_column("path", _repeat(file.relative_to(root).as_posix(), len(members))))
    samples = pa.concat_tables(parts)
    if not len(samples):
        raise TesseraError(f"the tars in {root} contain no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    class_names, class_ids, labels = (), None, samples["label"]
    if options.classes == "auto" and labels.null_count < len(labels):
        if all(word is None or word.isdecimal() for word in labels.unique().to_pylist()):
            labels = labels.cast(pa.int64())
        class_names, class_ids = tables.encode_labels(labels, (), "the tars")
    if options.classes == "folders":
        raise TesseraError(f"data.classes=folders, but {root} contains tars, with labels in .cls or .json members")
    columns = {name: samples[name] for name in ("path", "offset", "length", "caption")}
    return index.build(root, class_names, label=class_ids, **columns)


def _image_members(file: Path, options: LayoutOptions) -> "pyarrow.Table":
    """Offset, length, caption and label (as text) of the images in a tar; cached if there are many."""
    import pyarrow.parquet as parquet

    cached = tables.cache_path(file, "tars", ".parquet", options.caption, options.label)
    if cached.exists():
        with suppress(OSError, ValueError):  # damaged: written again
            return parquet.read_table(cached)
    members = _list_tar(file, options)
    if len(members) >= MIN_CACHED_MEMBERS:
        with suppress(TesseraError), atomic_file(cached) as partial:  # no space: the tar is listed again next time
            parquet.write_table(members, partial)
    return members


def _list_tar(file: Path, options: LayoutOptions) -> "pyarrow.Table":
    """Members with the same key, which is the path up to the first dot of the name, are one sample
    (https://github.com/webdataset/webdataset)."""
    pa = arrow()
    images: dict[str, tuple[int, int]] = {}  # offset and length by key
    fallbacks: dict[str, tuple[int, int]] = {}  # such as 0001.mask.png, the image of a sample without 0001.png
    texts: dict[str, dict[str, str]] = {}  # caption and label by key
    try:
        with tarfile.open(file, "r:") as opened:
            archive: Any = opened
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile keeps them, so memory would grow with their number
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key, span = f"{folder}/{stem}", (member.offset_data, member.size)
                if not member.isreg() or not stem:
                    continue
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    images.setdefault(key, span)
                elif os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                    fallbacks.setdefault(key, span)
                elif suffix in ("txt", "cls", "json"):
                    content = archive.extractfile(member)
                    _add_text(texts.setdefault(key, {}), suffix, content.read() if content else b"", options)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise TesseraError(f"{file} is damaged, or compressed and must be unpacked first: {error}") from None
    images = {**images, **{key: span for key, span in fallbacks.items() if key not in images}}
    offsets, lengths = np.array(list(images.values()), np.int64).reshape(-1, 2).T
    captions, labels = ([texts.get(key, {}).get(name) for key in images] for name in ("caption", "label"))
    columns = {
        "offset": pa.array(offsets, pa.int64()),
        "length": pa.array(lengths, pa.int64()),
        "caption": pa.array(captions, pa.string()),
        "label": pa.array(labels, pa.string()),
    }
    return pa.table(columns)


def _add_text(texts: dict[str, str], suffix: str, content: bytes, options: LayoutOptions) -> None:
    """Add the caption and label of a member to a sample's texts. A .txt or .cls member has priority over .json."""
    text = content.decode("utf-8", errors="replace").strip()
    match suffix:
        case "txt" if options.caption is not None:
            texts["caption"] = text
        case "cls" if options.label is not None:
            texts["label"] = text
        case "json":
            with suppress(ValueError):
                fields = json.loads(text)
                if not isinstance(fields, dict):
                    return
                for name, column, defaults in (
                    ("caption", options.caption, tables.CAPTION_COLUMNS),
                    ("label", options.label, tables.LABEL_COLUMNS),
                ):
                    keys = defaults if column == "auto" else [column]
                    value = next((fields[key] for key in keys if fields.get(key) is not None), None)
                    if name not in texts and isinstance(value, str | int):
                        texts[name] = str(value)
