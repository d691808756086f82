"""From a path to an index: which layout the files there have, found automatically.

A layout is told by what lies there: an index, tables (parquet, arrow, a data set saved by Hugging Face's `datasets`),
tars (WebDataset), or images, whose captions and labels stand in metadata files, in text files or in folder names.
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
FILE_NAME = "file_name"  # the column of metadata files that names the image, from the folder they lie in
TEXT_TYPES = ("string", "large_string", "list<element: string>", "list<item: string>")  # types of columns of captions
HUB_PREFIX = "hub:"
MIN_CACHED_MEMBERS = 1000  # samples in a tar whose places are kept: reading through it takes about 0.1 ms a member

CHUNK = 1024  # text files that are read before the next are thought of: an interruption waits for no more

T = TypeVar("T")


class LayoutOptions(tables.ColumnOptions, Protocol):
    """What a configuration says of where and how to look."""

    @property
    def kind(self) -> str: ...
    @property
    def classes(self) -> str: ...
    @property
    def paths(self) -> list[str]: ...


def build_index(asked: LayoutOptions) -> "pyarrow.Table":
    """The index of all that the paths hold. Raises TesseraError if there is nothing, or it is not in good order."""
    if not asked.paths:
        raise TesseraError("data.path is an empty list; expected at least one folder or file")
    found = index.concat([_found(path, asked) for path in asked.paths])
    where = ", ".join(asked.paths)
    if not len(found):
        raise TesseraError(f"data.path {where} holds no rows")
    root, class_names = index.metadata(found)
    if asked.classes == "none" and class_names:
        nothing = arrow().nulls(len(found), arrow().int32())
        found = found.set_column(found.schema.get_field_index("label"), "label", nothing)
        found, class_names = index.with_metadata(found, root, ()), ()
    if len(class_names) == 1:
        raise TesseraError(
            f"{where} holds one class only ('{class_names[0]}'), which tells a network nothing: "
            "set data.classes=none to train without classes"
        )
    return found


def _found(told: str, asked: LayoutOptions) -> "pyarrow.Table":
    if told.startswith(HUB_PREFIX):
        return _hub(told.removeprefix(HUB_PREFIX), asked)
    path = Path(told).expanduser().absolute()
    if path.is_dir():
        return _folder(path, told, asked)
    if path.is_file() and path.suffix in index.TABLE_SUFFIXES:
        return index.read(path) if index.is_index(path) else _rows([path], path.parent, asked)
    if path.is_file() and path.suffix == ".tar":
        return _tars([path], path.parent, asked)
    if not path.exists() and (several := sorted(glob.glob(str(path)))):
        return index.concat([_found(one, asked) for one in several])
    if asked.kind == "parquet":
        raise TesseraError(f"data.path {told} holds no parquet file")
    if path.suffix in (".zip", ".tgz", ".gz", ".7z", ".rar") and path.exists():
        raise TesseraError(f"data.path {told} is packed, so its images cannot be read in any order: unpack it first")
    what = "is a file" if path.exists() else "does not exist"
    raise TesseraError(
        f"data.path {told} {what}; expected a folder of images, or of one subfolder per class, "
        "or .parquet or .tar files, or hub:owner/name"
    )


# Folders


def _shown(work: Iterable[T], total: int, many: int, what: str) -> Iterable[T]:
    """The work with a bar of its progress, where it is much and somebody watches."""
    console = Console(stderr=True)
    return track(work, what, total, console=console, transient=True, disable=total < many or not console.is_terminal)


@dataclass
class _Inside:
    """What a folder holds at any depth, as paths from it in order."""

    images: list[str] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    metadata: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)


def _folder(root: Path, told: str, asked: LayoutOptions) -> "pyarrow.Table":
    if (saved := _saved(root)) is not None and asked.kind != "folder":
        return _rows(saved, root, asked)
    inside = _look(root)
    rows = [root / path for path in inside.tables] if asked.kind != "folder" else []
    rows = [path for path in rows if not index.is_index(path)]
    if asked.kind == "parquet" and not rows:
        raise TesseraError(f"data.path {told} holds no parquet file")
    if asked.kind == "files":
        there = {"images": inside.images, "parquet files": rows, "tars": inside.tars}
        several = [f"{len(paths)} {name} (such as {paths[0]})" for name, paths in there.items() if paths]
        if len(several) > 1:
            raise TesseraError(
                f"data.path {told} holds {' and '.join(several)}: name the folder of those that are meant, "
                "or set data.kind to folder (images) or parquet"
            )
    if rows:
        return _rows(rows, root, asked)
    if inside.tars and not inside.images:
        return _tars([root / path for path in inside.tars], root, asked)
    if inside.metadata:
        return _metadata(root, inside, asked)
    if not inside.images:
        raise TesseraError(
            f"data.path {told} holds no images; looked at every depth for {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    captions = _texts(root, inside) if inside.texts and asked.caption is not None else None
    class_names, labels = _by_folders(inside.images, told, asked)
    return index.build(root, class_names, path=inside.images, label=labels, caption=captions)


def _look(root: Path) -> _Inside:
    inside = _Inside()
    for path in sorted(_below(root), key=lambda path: path.split("/")):
        name = path.rpartition("/")[2]
        ending = os.path.splitext(name)[1].lower()
        if ending in IMAGE_SUFFIXES:
            inside.images.append(path)
        elif name in METADATA_FILES:
            inside.metadata.append(path)
        elif ending in index.TABLE_SUFFIXES:
            inside.tables.append(path)
        elif ending == ".tar":
            inside.tars.append(path)
        elif ending == ".txt":
            inside.texts.add(path)
    return inside


def _below(root: Path) -> Iterator[str]:
    """Every file at any depth but hidden ones; links to folders are followed, though never in a circle."""
    real = os.path.realpath(root)
    # Folders, their paths from the root, and the real folders that they are and lie in.
    waiting: list[tuple[str, str, tuple[str, ...]]] = [(str(root), "", (real,))]
    while waiting:
        folder, prefix, within = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError:  # not ours to read
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(within[-1], entry.name)
                if real not in within:
                    waiting.append((entry.path, f"{prefix}{entry.name}/", (*within, real)))
            elif entry.is_file():
                yield prefix + entry.name


def _by_folders(paths: Sequence[str], told: str, asked: LayoutOptions) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Class names by the first level of folders, and the class of every image, int32 [N]."""
    if asked.classes == "none":
        return (), None
    firsts = [path.partition("/")[0] if "/" in path else "" for path in paths]
    loose = firsts.count("")
    if loose == len(paths):
        if asked.classes == "folders":
            raise TesseraError(f"data.classes=folders, but {told} holds no class folders: its {loose} images are loose")
        return (), None
    if loose:
        raise TesseraError(
            f"{told} holds {loose} images beside its class folders, so their class is unknown: "
            "move them into a class folder, or set data.classes=none to train without classes"
        )
    names = sorted(set(firsts))
    number = {name: place for place, name in enumerate(names)}
    return tuple(names), np.fromiter((number[first] for first in firsts), np.int32, len(firsts))


def _texts(root: Path, inside: _Inside) -> list[str | None]:
    """The caption of every image: the text file of its name beside it, if there is one."""

    def text(path: str) -> str | None:
        beside = os.path.splitext(path)[0] + ".txt"
        if beside not in inside.texts:
            return None
        try:
            return (root / beside).read_text(encoding="utf-8-sig", errors="replace").strip()
        except OSError:
            return None

    starts = range(0, len(inside.images), CHUNK)
    found: list[str | None] = []
    with ThreadPoolExecutor(8) as pool:
        for start in _shown(starts, len(starts), 20, "reading captions"):
            found.extend(pool.map(text, inside.images[start : start + CHUNK]))
    return found


# Metadata files


def _metadata(root: Path, inside: _Inside, asked: LayoutOptions) -> "pyarrow.Table":
    """The images that metadata files name, with their labels and captions."""
    pa, pc = arrow(), compute()
    paths, captions, labels = [], [], []
    for file in inside.metadata:
        rows = _metadata_rows(root / file)
        tables.find_column(FILE_NAME, (), rows.column_names, root / file, "path")
        folder = PurePosixPath(file).parent.as_posix()
        named = pc.replace_substring(rows[FILE_NAME].cast(pa.string()), "\\", "/")
        paths.append(named if folder == "." else pc.binary_join_element_wise(folder, named, "/"))
        caption, label = _caption_and_label(rows.schema, asked, root / file)
        captions.append(_captions(rows, caption, root / file))
        if label and asked.classes == "auto":
            labels.append(rows[label])
    names, numbers = (), None
    if labels:
        if len(labels) < len(inside.metadata):
            raise TesseraError(f"only {len(labels)} of the {len(inside.metadata)} metadata files in {root} have labels")
        names, numbers = tables.encode_labels(_joined(labels, root), (), "the metadata")
    path = _joined(paths, root)
    if asked.classes == "folders":
        names, numbers = _by_folders(path.to_pylist(), str(root), asked)
    return index.build(root, names, path=path, label=numbers, caption=_joined(captions, root))


def _metadata_rows(file: Path) -> "pyarrow.Table":
    pa = arrow()
    from pyarrow import csv, json

    try:
        if file.suffix == ".jsonl":
            return json.read_json(file)
        if file.suffix == ".csv":
            nothing = csv.ConvertOptions(null_values=[""], strings_can_be_null=True)
            return csv.read_csv(file, parse_options=csv.ParseOptions(newlines_in_values=True), convert_options=nothing)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise TesseraError(f"{file} is damaged: {error}") from None
    return tables.read_columns(file, tables.read_schema(file).names)


# Tables


def _rows(files: Sequence[Path], root: Path, asked: LayoutOptions) -> "pyarrow.Table":
    """The rows of parquet and arrow files."""
    if asked.classes == "folders":
        raise TesseraError(f"data.classes=folders, but {root} holds tables: give their column of labels as data.label")
    pa = arrow()
    paths, offsets, captions, labels, names = [], [], [], [], ()
    label = None
    for number, file in enumerate(files):
        found = tables.read_schema(file)
        tables.find_image_column(found, asked.image, file)
        caption, label = _caption_and_label(found, asked, file)
        if asked.classes == "none":
            label = None
        read = tables.read_columns(file, [name for name in (caption, label) if name])
        count = read.num_rows if caption or label else tables.count_rows(file)
        paths.append(_repeated(file.relative_to(root).as_posix(), count))
        offsets.append(np.arange(count))
        captions.append(_captions(read, caption, file) if caption else pa.chunked_array([pa.nulls(count, pa.string())]))
        if label:
            labels.append(read[label])
            names = names or tables.class_names(found, label)
        if 0 < len(labels) < number + 1:
            raise TesseraError(f"the files in {root} do not hold the same columns: not all have labels")
    class_names, numbers = (), None
    if labels:
        class_names, numbers = tables.encode_labels(_joined(labels, root), names, f"column '{label}'")
    return index.build(
        root,
        class_names,
        path=pa.chunked_array(paths, pa.string()),
        offset=np.concatenate(offsets),
        label=numbers,
        caption=_joined(captions, root),
    )


def _repeated(text: str, count: int) -> Any:
    pa = arrow()
    return pa.array([text], pa.string()).take(pa.array(np.zeros(count, np.int32)))


def _joined(columns: Sequence[Any], root: Path) -> Any:
    pa = arrow()
    try:
        chunks = [chunk for column in columns for chunk in column.chunks]
        return pa.chunked_array(chunks, type=columns[0].type)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise TesseraError(f"the files in {root} do not hold the same columns: {error}") from None


def _caption_and_label(found: "pyarrow.Schema", asked: LayoutOptions, file: Path) -> tuple[str | None, str | None]:
    """The columns of captions and labels; a caption that is not asked for by name has to be text."""
    text = [one.name for one in found if str(one.type) in TEXT_TYPES]
    known = text if asked.caption == "auto" else found.names
    return (
        tables.find_column(asked.caption, tables.CAPTION_COLUMNS, known, file, "caption"),
        tables.find_column(asked.label, tables.LABEL_COLUMNS, found.names, file, "label"),
    )


def _captions(rows: "pyarrow.Table", name: str | None, file: Path) -> Any:
    """A column of captions as text, of several captions the first; nulls without a column."""
    pa, pc = arrow(), compute()
    if name is None:
        return pa.chunked_array([pa.nulls(len(rows), pa.string())])
    try:
        if pa.types.is_list(rows[name].type):
            return pc.binary_join(pc.list_slice(rows[name], 0, 1), "").cast(pa.string())
        return rows[name].cast(pa.string())
    except pa.ArrowException as error:
        raise TesseraError(f"{file}: column '{name}' holds no text ({error}); set data.caption") from None


def _saved(root: Path) -> list[Path] | None:
    """The arrow files of a data set that `datasets` saved in a folder, of its split `train` if it has several."""
    try:
        if (root / "dataset_dict.json").is_file():
            splits = json.loads((root / "dataset_dict.json").read_text())["splits"]
            split = splits[0] if len(splits) == 1 else "train"
            if split not in splits:
                raise TesseraError(f"{root} holds the splits {', '.join(splits)}: give one of them, {root / splits[0]}")
            return _saved(root / split)
        if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
            return [root / each["filename"] for each in json.loads((root / "state.json").read_text())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TesseraError(f"the data set saved in {root} is damaged: {error}") from None
    return None


def _hub(told: str, asked: LayoutOptions) -> "pyarrow.Table":
    """A data set that Hugging Face's `datasets` loads: owner/name, owner/name/configuration, and :split behind them."""
    try:
        import datasets
    except ImportError:
        raise TesseraError(
            f"reading {HUB_PREFIX}{told} needs Hugging Face's datasets: pip install 'tessera[data]'"
        ) from None
    name, split = (told, "") if Path(told).exists() else told.partition(":")[::2]
    owner, config = name, None
    if name.count("/") == 2 and not Path(name).exists():
        owner, _, config = name.rpartition("/")
    try:
        loaded = datasets.load_dataset(owner, config, keep_in_memory=False)
    except Exception as error:  # of many kinds: no network, no such name, a layout it does not know
        raise TesseraError(f"{HUB_PREFIX}{told} cannot be loaded: {error}") from None
    splits = [str(name) for name in loaded]
    split = split or (splits[0] if len(splits) == 1 else "train")
    if split not in splits:
        raise TesseraError(
            f"{HUB_PREFIX}{name} has the splits {', '.join(splits)}: write {HUB_PREFIX}{name}:{splits[0]}"
        )
    files = [Path(each["filename"]) for each in loaded[split].cache_files]
    return _rows(files, Path(os.path.commonpath([file.parent for file in files])), asked)


# Tars


def _tars(files: Sequence[Path], root: Path, asked: LayoutOptions) -> "pyarrow.Table":
    """The images in tars of WebDataset, with their captions and labels."""
    pa = arrow()
    found = []
    for file in _shown(files, len(files), 2, "looking through tars"):
        members = _members(file, asked)
        found.append(members.append_column("path", _repeated(file.relative_to(root).as_posix(), len(members))))
    everything = pa.concat_tables(found)
    if not len(everything):
        raise TesseraError(f"the tars in {root} hold no images; looked for {', '.join(sorted(IMAGE_SUFFIXES))}")
    names, numbers, told = (), None, everything["label"]
    if asked.classes == "auto" and told.null_count < len(told):
        if all(word is None or word.isdecimal() for word in told.unique().to_pylist()):
            told = told.cast(pa.int64())
        names, numbers = tables.encode_labels(told, (), "the tars")
    if asked.classes == "folders":
        raise TesseraError(f"data.classes=folders, but {root} holds tars, where labels stand in .cls or .json files")
    kept = {name: everything[name] for name in ("path", "offset", "length", "caption")}
    return index.build(root, names, label=numbers, **kept)


def _members(file: Path, asked: LayoutOptions) -> "pyarrow.Table":
    """Offset, length, caption and label, as text, of the images in a tar, looked up once where they are many."""
    import pyarrow.parquet as parquet

    kept = tables.cache_path(file, "tars", ".parquet", asked.caption, asked.label)
    if kept.exists():
        with suppress(OSError, ValueError):  # damaged: made again
            return parquet.read_table(kept)
    found = _listed(file, asked)
    if len(found) >= MIN_CACHED_MEMBERS:
        with suppress(TesseraError), atomic_file(kept) as partial:  # no room for it: it is looked up again next time
            parquet.write_table(found, partial)
    return found


def _listed(file: Path, asked: LayoutOptions) -> "pyarrow.Table":
    """Members of one key, which is their path up to the first dot of the name, are one sample
    (https://github.com/webdataset/webdataset)."""
    pa = arrow()
    images: dict[str, tuple[int, int]] = {}
    others: dict[str, tuple[int, int]] = {}  # such as 0001.mask.png, the image of a sample that has no 0001.png
    words: dict[str, list[str | None]] = {}  # caption and label
    try:
        with tarfile.open(file, "r:") as opened:
            archive: Any = opened
            while (member := archive.next()) is not None:
                archive.members.clear()  # which tarfile keeps: memory would grow with their number
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                key, place = f"{folder}/{stem}", (member.offset_data, member.size)
                if not member.isreg() or not stem:
                    continue
                if f".{ending.lower()}" in IMAGE_SUFFIXES:
                    images.setdefault(key, place)
                elif os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                    others.setdefault(key, place)
                elif ending in ("txt", "cls", "json"):
                    content = archive.extractfile(member)
                    _note(words.setdefault(key, [None, None]), ending, content.read() if content else b"", asked)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise TesseraError(f"{file} is damaged, or packed and to be unpacked first: {error}") from None
    images |= {key: place for key, place in others.items() if key not in images}
    offsets, lengths = np.array(list(images.values()), np.int64).reshape(-1, 2).T
    captions, labels = zip(*(words.get(key, (None, None)) for key in images)) if images else ((), ())
    kinds = {"offset": pa.int64(), "length": pa.int64(), "caption": pa.string(), "label": pa.string()}
    made = (offsets, lengths, captions, labels)
    return pa.table({name: pa.array(column, kind) for (name, kind), column in zip(kinds.items(), made)})


def _note(words: list[str | None], ending: str, content: bytes, asked: LayoutOptions) -> None:
    """What a member beside an image says of it: its own text file goes before a field of its .json."""
    text = content.decode("utf-8", errors="replace").strip()
    match ending:
        case "txt" if asked.caption is not None:
            words[0] = text
        case "cls" if asked.label is not None:
            words[1] = text
        case "json":
            try:
                told = json.loads(text)
            except ValueError:
                return
            if isinstance(told, dict):
                for place, wanted, usual in (
                    (0, asked.caption, tables.CAPTION_COLUMNS),
                    (1, asked.label, tables.LABEL_COLUMNS),
                ):
                    names = usual if wanted == "auto" else [wanted]
                    value = next((told[name] for name in names if told.get(name) is not None), None)
                    if words[place] is None and isinstance(value, str | int):
                        words[place] = str(value)
