"""The samples of WebDataset tars: members with the same key, which is the path up to the first dot of the name
(https://github.com/webdataset/webdataset)."""

import json
import os
import tarfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tessera import storage
from tessera.data import tables
from tessera.data.columns import (
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    ColumnOptions,
    decode_text,
    find_key,
    read_texts,
    unused_columns,
)
from tessera.data.folders import sample_suffixes
from tessera.data.index import arrow
from tessera.data.notes import printable
from tessera.errors import TesseraError
from tessera.files import atomic_file, this_writer

if TYPE_CHECKING:
    import pyarrow

MIN_CACHED_MEMBERS = 1000  # a tar with as many samples has its members cached: listing takes about 0.1 ms a member
FORMAT = 4  # of the cache
REPORT_KEY = b"report"
TEXT_MEMBERS = ("txt", "cls", "json")  # in any case


@dataclass
class TarReport:
    """Members that are not read as they are: their names, and the number by suffix of others."""

    collisions: list[str] = field(default_factory=list)  # images with the key of another image
    guessed: list[str] = field(default_factory=list)  # texts whose encoding was guessed
    unreadable: list[str] = field(default_factory=list)  # texts that cannot be decoded, and damaged JSON
    links: list[str] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)
    is_cut: bool = False  # it does not end as a tar does
    unused: dict[str, str] = field(default_factory=dict)  # `caption` or `label` by the JSON key that looks like it


def read_tar(file: Path, options: ColumnOptions) -> tuple["pyarrow.Table", TarReport]:
    """Offset, length, caption and label (as text) of the images in a tar; cached if there are many."""
    import pyarrow.parquet as parquet

    reads_clips = () if options.frames is None else ("clips",)
    cached = tables.cache_path(file, "tars", ".parquet", FORMAT, options.caption, options.label, *reads_clips)
    if cached.exists():
        with suppress(OSError, ValueError, KeyError, TypeError):  # damaged: written again
            members = parquet.read_table(cached)
            return members, TarReport(**json.loads(members.schema.metadata[REPORT_KEY]))
    members, report = _list_tar(file, options)
    if len(members) >= MIN_CACHED_MEMBERS or storage.is_remote(file):
        # Without space, the tar is listed again next time.
        with suppress(TesseraError), atomic_file(cached, this_writer()) as partial:
            metadata = {REPORT_KEY: json.dumps(vars(report)).encode()}
            parquet.write_table(members.replace_schema_metadata(metadata), partial)
    return members, report


def _list_tar(file: Path, options: ColumnOptions) -> tuple["pyarrow.Table", TarReport]:
    pa = arrow()
    images: dict[str, tuple[int, int]] = {}  # offset and length by key
    fallbacks: dict[str, tuple[int, int]] = {}  # such as 0001.mask.png, the image of a sample without 0001.png
    fallback_names: dict[str, str] = {}
    texts: dict[str, dict[str, Any]] = {}  # caption, or a list of several, and label by key
    report, unread, suffixes = TarReport(), Counter(), sample_suffixes(options.frames)
    try:
        with tarfile.open(storage.fetch(file), "r:") as opened:
            archive: Any = opened
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile keeps them, so memory would grow with their number
                member_name = printable(member.name)
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                suffix = suffix.lower()
                key, span = f"{folder}/{stem}", (member.offset_data, member.size)
                if member.islnk() or member.issym():
                    report.links.append(member_name)
                if not member.isreg() or not stem:
                    continue
                if f".{suffix}" in suffixes:
                    if key in images:
                        report.collisions.append(member_name)
                    images.setdefault(key, span)
                elif os.path.splitext(name)[1].lower() in suffixes:
                    if key in fallbacks:
                        report.collisions.append(member_name)
                    else:
                        fallbacks[key], fallback_names[key] = span, member_name
                elif suffix in TEXT_MEMBERS:
                    content = archive.extractfile(member)
                    raw = content.read() if content else b""
                    _add_text(texts.setdefault(key, {}), suffix, raw, options, member_name, report)
                else:
                    unread[f".{suffix}" if suffix else "no ending"] += 1
            # tarfile takes a file that was cut between two members, or within a header, for a whole one.
            archive.fileobj.seek(archive.offset)
            report.is_cut = archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE
    except (tarfile.TarError, EOFError, OSError) as error:
        raise TesseraError(f"{file} is damaged, or compressed and must be unpacked first: {error}") from None
    report.unread = dict(unread)
    used = {name for fields in texts.values() for name in fields}
    report.unused = {name: kind for name, kind in report.unused.items() if kind not in used}
    report.collisions += [name for key, name in fallback_names.items() if key in images]
    images = {**images, **{key: span for key, span in fallbacks.items() if key not in images}}
    spans = list(images.values())
    captions, labels = ([texts.get(key, {}).get(name) for key in images] for name in ("caption", "label"))
    captions = [each if each is None or isinstance(each, list) else [each] for each in captions]
    columns = {
        "offset": pa.array([offset for offset, _ in spans], pa.int64()),
        "length": pa.array([length for _, length in spans], pa.int64()),
        "label": pa.array(labels, pa.string()),
    }
    texts_by_row = read_texts(pa.array(captions, pa.list_(pa.string()))).captions
    columns |= {name: texts_by_row[name] for name in texts_by_row.column_names}
    return pa.table(columns), report


def _add_text(
    texts: dict[str, Any], suffix: str, content: bytes, options: ColumnOptions, name: str, report: TarReport
) -> None:
    """Add the caption and label of a member to a sample's texts. A .txt or .cls member has priority over .json."""
    text, is_guessed = decode_text(content)
    if text is None:
        report.unreadable.append(name)
        return
    if is_guessed:
        report.guessed.append(name)
    match suffix:
        case "txt" if options.caption is not None:
            texts["caption"] = text.strip()
        case "cls" if options.label is not None:
            texts["label"] = text.strip()
        case "json":
            try:
                fields = json.loads(text)
            except (ValueError, RecursionError):
                report.unreadable.append(name)
                return
            if not isinstance(fields, dict):
                return
            for key, column, defaults in (
                ("caption", options.caption, CAPTION_COLUMNS),
                ("label", options.label, LABEL_COLUMNS),
            ):
                present = [name for name, value in fields.items() if value is not None]
                name_used = find_key(column, defaults, present)
                value = fields.get(name_used) if name_used else None
                if key not in texts:
                    report.unused.update(unused_columns(present, {key: name_used}, options))
                values = value if isinstance(value, list) and key == "caption" else [value]
                decoded = [
                    str(each).encode("utf-8", "replace").decode()
                    for each in values
                    if isinstance(each, str | int | float)
                ]
                if key not in texts and decoded:
                    texts[key] = decoded if len(decoded) > 1 else decoded[0]
