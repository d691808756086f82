"""Labels and captions from columns of any type. What cannot be read is counted, and no value is changed unsaid.

Shapes: N rows.
"""

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tessera.data.index import arrow, compute
from tessera.data.notes import Note, about

if TYPE_CHECKING:
    import pyarrow

MAX_CLASSES = 100_000  # larger labels are identifiers of rows, not classes
# Columns that `auto` selects, in order of preference and in any case, and columns that hold the same in other data.
LABEL_COLUMNS, CAPTION_COLUMNS = ("label", "class"), ("caption", "text")
LABEL_LIKE = {
    *("labels", "classes", "fine_label", "coarse_label", "label_name", "label_id", "class_name", "class_label"),
    *("class_id", "class_idx", "classname", "category", "categories", "target", "targets", "species", "y", "cls"),
    *LABEL_COLUMNS,
}
CAPTION_LIKE = {
    *("captions", "texts", "prompt", "prompts", "description", "descriptions", "title", "alt", "alt_text"),
    *("sentence", "sentences", "txt", *CAPTION_COLUMNS),
}
GUESSED = "cp1252"  # of text that is neither UTF-8 nor begins with a byte order mark: the code page of Windows
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is the start of this one
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Numbers in text files: without leading zeros, which names of classes may have.
NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?|nan", re.IGNORECASE)


class ColumnOptions(Protocol):
    """Column settings of a configuration: a name, `auto`, or null for none."""

    @property
    def image(self) -> str: ...
    @property
    def label(self) -> str | None: ...
    @property
    def caption(self) -> str | None: ...
    @property
    def frames(self) -> int | None: ...


def decode_text(content: bytes) -> tuple[str | None, bool]:
    """Text from bytes, None if it is none, and whether its encoding was guessed."""
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    for name in (encoding, GUESSED):
        try:
            text = content.decode(name)
        except UnicodeDecodeError:
            continue
        return (None, False) if "\0" in text else (text, name == GUESSED)
    return None, False


def is_text(kind: Any) -> bool:
    """Whether an arrow type is text or bytes."""
    types = arrow().types
    return any(
        test(kind)
        for test in (
            *(types.is_string, types.is_large_string, types.is_string_view),
            *(types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary),
        )
    )


def _plain(column: Any) -> Any:
    """A chunked column without dictionaries."""
    pa = arrow()
    column = column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


# Which columns


def find_key(name: str | None, defaults: Sequence[str], known: Sequence[str]) -> str | None:
    """The column to read: the named one, or for `auto` the first of the defaults that exists, in any case; or None."""
    if name != "auto":
        return name if name in known else None
    by_lower = {each.lower(): each for each in reversed(known)}
    column = next((default for default in defaults if default in by_lower), None)
    return column if column is None or column in known else by_lower[column]


def unused_columns(known: Sequence[str], used: Mapping[str, str | None], options: ColumnOptions) -> dict[str, str]:
    """`label` or `caption` by the column that looks like it and is not read.

    used: the column that is read, by `label` and `caption`. No other is expected where the user names one.
    """
    similar = {"label": LABEL_LIKE, "caption": CAPTION_LIKE}
    return {
        name: kind
        for kind, column in used.items()
        for name in known
        if getattr(options, kind) == "auto" and name != column and name.lower() in similar[kind]
    }


# Captions


@dataclass
class TextColumn:
    """Text of each row, an arrow array of strings [N], and the rows that are not read as they are."""

    texts: Any  # of rows with several, the first
    guessed: list[int] = field(default_factory=list)  # read as GUESSED
    unreadable: list[int] = field(default_factory=list)
    others: Any = None  # further texts of each row, an arrow array of lists [N]; None: no row has several

    @property
    def captions(self) -> "pyarrow.Table":
        """The columns `caption` and `other_captions` of an index."""
        return caption_columns(self.texts, self.others)


def caption_columns(texts: Any, others: Any = None) -> "pyarrow.Table":
    """A table of captions, and of further ones; None: none"""
    pa = arrow()
    others = pa.nulls(len(texts), pa.list_(pa.string())) if others is None else others
    return pa.table({"caption": texts, "other_captions": others})


def can_be_text(kind: Any) -> bool:
    """Whether `read_texts` reads a column of this arrow type."""
    types = arrow().types
    while types.is_dictionary(kind) or _is_list(kind):
        kind = kind.value_type
    return is_text(kind) or types.is_primitive(kind) or types.is_decimal(kind) or types.is_null(kind)


def _is_list(kind: Any) -> bool:
    types = arrow().types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def read_texts(column: Any) -> TextColumn:
    """A column as text; lists are several texts of a row. Raises ArrowException for types that are not text."""
    pa = arrow()
    column = _plain(column)
    if _is_list(column.type):
        return _join_texts([_read_lists(chunk) for chunk in column.chunks])
    if not is_text(column.type):
        return TextColumn(column.cast(pa.string()))
    try:
        return TextColumn(column.cast(pa.large_binary()).cast(pa.string()))  # from bytes: only this looks for UTF-8
    except pa.ArrowException:
        pass
    result = TextColumn(None)
    texts: list[str | None] = []
    for row, content in enumerate(column.cast(pa.large_binary()).to_pylist()):
        text, guessed = (None, False) if content is None else decode_text(content)
        texts.append(text)
        if guessed:
            result.guessed.append(row)
        if content is not None and text is None:
            result.unreadable.append(row)
    result.texts = pa.chunked_array([pa.array(texts, pa.string())])
    return result


def _read_lists(column: Any) -> TextColumn:
    """An array of lists of texts, of any depth: those that are not null. An empty list is an empty text."""
    pa, pc = arrow(), compute()
    count, values, parents = len(column), column, np.arange(len(column))
    is_empty = pc.equal(pc.list_value_length(column), 0).fill_null(False).to_numpy(zero_copy_only=False)
    while _is_list(values.type):
        lengths = pc.list_value_length(values).cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
        parents, values = np.repeat(parents, lengths), pc.list_flatten(values)
    flat = read_texts(values)
    is_valid = flat.texts.is_valid().to_numpy()
    rows, texts = parents[is_valid], flat.texts.drop_null().combine_chunks()
    is_first = np.diff(rows, prepend=-1) > 0
    places = np.full(count, -1)
    places[rows[is_first]] = np.flatnonzero(is_first)
    first = pc.if_else(pa.array(is_empty & (places < 0)), "", texts.take(pa.array(places, mask=places < 0)))
    result = TextColumn(pa.chunked_array([first]))
    result.guessed, result.unreadable = (
        sorted(set(parents[each].tolist())) for each in (flat.guessed, flat.unreadable)
    )
    if not is_first.all():
        counts = np.bincount(rows[~is_first], minlength=count)
        ends = np.concatenate(([0], counts.cumsum()))
        offsets = pa.array(ends, pa.int32(), mask=np.append(counts == 0, False))  # null: no list
        result.others = pa.chunked_array([pa.ListArray.from_arrays(offsets, texts.filter(pa.array(~is_first)))])
    return result


def _join_texts(parts: Sequence[TextColumn]) -> TextColumn:
    """Consecutive parts of a column."""
    pa = arrow()
    starts = np.cumsum([0, *(len(part.texts) for part in parts)]).tolist()
    tables = [part.captions for part in parts] or [caption_columns(pa.array([], pa.string()))]
    result = TextColumn(pa.concat_tables(tables)["caption"])
    for start, part in zip(starts, parts):
        result.guessed += [start + row for row in part.guessed]
        result.unreadable += [start + row for row in part.unreadable]
    if any(part.others is not None for part in parts):
        result.others = pa.concat_tables(tables)["other_captions"]
    return result


def encoding_notes(where: Any, guessed: Sequence[str], unreadable: Sequence[str]) -> list[Note]:
    """Notes about texts that are not UTF-8, by the names of their files or rows."""
    return [
        *about("encoding", where, "texts are not UTF-8 and were read as Windows-1252", guessed, "save them as UTF-8"),
        *about("unreadable-text", where, "texts cannot be decoded and are left out", unreadable, "save them as UTF-8"),
    ]


# Labels


@dataclass
class Labels:
    """class_names: empty if no label is usable; ids: the class of every row, int32 [N], -1 without one."""

    class_names: tuple[str, ...]
    ids: np.ndarray
    notes: list[Note]


@dataclass
class _Part:
    """The labels of one file: words, or numbers with or without names."""

    codes: np.ndarray  # int64 [N], -1: no label
    names: list[str] | None  # by code; None: the numbers have no names
    is_declared: bool  # whether the file lists its classes in this order
    reasons: dict[int, str]  # by row
    guessed: list[int] = field(default_factory=list)  # rows read as GUESSED


def encode_labels(columns: Sequence[tuple[Any, Sequence[str]]], what: str) -> Labels:
    """Classes from labels that are names or numbers. Labels of several files are joined by name.

    columns: of each file, the labels and the class names of numbers, if known. Labels are an arrow array [N], or a list
    of text from a file without types, where `1` and `1.0` may be numbers. what: for messages, "column 'label'".
    """
    untyped = _parse_numbers([values for values, _ in columns if isinstance(values, list)])
    parts = [_read_labels(next(untyped) if isinstance(values, list) else values, names) for values, names in columns]
    used = [part for part in parts if (part.codes >= 0).any()]
    named = [part for part in used if part.names is not None]
    notes = []
    if named and len(named) < len(used):
        text = f"{what} has different columns in different files: names of classes, and numbers without names"
        notes.append(Note("label-types", "error", f"{text}: use one of them, or set data.classes=none", names=(what,)))
    if named:
        for part in used:
            part.names = part.names or [str(number) for number in range(part.codes.max() + 1)]
        declared = [name for part in used if part.is_declared for name in part.names or ()]
        words = {name for part in used for name in part.names or () if name.strip()}
        class_names = tuple(dict.fromkeys([*declared, *sorted(words)]))
    else:
        class_names = tuple(str(number) for number in range(max((part.codes.max() + 1 for part in used), default=0)))
    number = {name: index for index, name in enumerate(class_names)}
    ids, reasons = [], {}
    for part in parts:
        start = sum(map(len, ids))
        reasons |= {start + row: reason for row, reason in part.reasons.items()}
        notes += encoding_notes(what, [f"row {row}" for row in part.guessed], [])
        ids.append(part.codes if part.names is None else _renumbered(part, number))
    all_ids = np.concatenate(ids).astype(np.int32) if ids else np.zeros(0, np.int32)
    return Labels(class_names, all_ids, notes + _label_notes(all_ids, reasons, what))


def _renumbered(part: _Part, number: Mapping[str, int]) -> np.ndarray:
    numbers = np.array([number.get(name, -1) for name in part.names or ()] + [-1])  # the last for rows without label
    return numbers[part.codes]


def _label_notes(ids: np.ndarray, reasons: Mapping[int, str], what: str) -> list[Note]:
    rows = np.flatnonzero(ids < 0).tolist()
    if not rows:
        return []
    row, reason = next(iter(reasons.items()), (0, ""))
    example = f" (such as row {row}: {reason})" if reason else ""
    if len(rows) == len(ids) and reasons:
        text = f"{what} contains neither class numbers nor names{example}; set data.label"
        return [Note("invalid-labels", "error", text, names=(what,))]
    text = (
        f"{len(rows)} of {len(ids)} rows have no label in {what}{example}; "
        "give them one, or set data.classes=none to train without classes"
    )
    details = {row: reasons.get(row, "no label") for row in rows}
    return [Note("missing-labels", "error", text, f"samples without a usable label in {what}", rows=details)]


def _parse_numbers(columns: Sequence[list[str | None]]) -> "Any":
    """Columns of text, each as an arrow array: of numbers if all texts of all columns are numbers."""
    pa = arrow()
    words = {text.strip() for texts in columns for text in texts if text}
    is_numeric = all(NUMBER.fullmatch(word) for word in words if word)
    for texts in columns:
        if not is_numeric:
            yield pa.array(texts, pa.string())
            continue
        yield pa.array([float(text) if text and text.strip() else None for text in texts], pa.float64())


def _read_labels(values: Any, names: Sequence[str]) -> _Part:
    """The labels of one file. values: an arrow array [N] of any type; names: of numbers."""
    pa, pc = arrow(), compute()
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    count = len(values)
    if is_text(kind):
        column = read_texts(values)
        coded = column.texts.dictionary_encode().combine_chunks()  # in order of first appearance
        coded = coded if isinstance(coded, pa.DictionaryArray) else pa.concat_arrays(coded.chunks)
        words = coded.dictionary.to_pylist()
        codes = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        blank = [code for code, word in enumerate(words) if not word.strip()]
        reasons = dict.fromkeys(np.flatnonzero(np.isin(codes, blank)).tolist(), "blank")
        codes[list(reasons)] = -1
        reasons |= dict.fromkeys(column.unreadable, "text that cannot be decoded")
        return _Part(codes, words, False, reasons, column.guessed)
    if pa.types.is_boolean(kind):
        values, names = values.cast(pa.int64()), ("False", "True")
    elif pa.types.is_decimal(kind) or pa.types.is_float16(kind):
        values = values.cast(pa.float64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        present = np.flatnonzero(values.is_valid().to_numpy(zero_copy_only=False)).tolist()
        return _Part(np.full(count, -1), None, False, dict.fromkeys(present, f"a value of type {kind}"))
    numbers = pc.cast(values, pa.float64(), safe=False).fill_null(np.nan).to_numpy()  # larger integers are no classes
    limit = len(names) or MAX_CLASSES
    with np.errstate(invalid="ignore"):
        usable = (numbers >= 0) & (numbers < limit) & (numbers == np.floor(numbers))
    reasons = {}
    for row in np.flatnonzero(~usable & ~np.isnan(numbers)).tolist():
        value = values[row].as_py()
        if value < 0 or not float(value).is_integer():
            reasons[row] = f"{value}"
        elif names:
            reasons[row] = f"class {int(value)}, but the file names {len(names)} classes"
        else:
            reasons[row] = f"{int(value)}, which is not a class number"
    codes = np.where(usable, numbers, -1).astype(np.int64)
    return _Part(codes, list(names) or None, bool(names), reasons)


class LayoutOptions(ColumnOptions, Protocol):
    """The settings that select what is read from a path."""

    @property
    def kind(self) -> str: ...
    @property
    def classes(self) -> str: ...
    @property
    def split(self) -> str | None: ...
    @property
    def paths(self) -> list[str]: ...


Indexed = tuple["pyarrow.Table", list[Note]]  # an index, and what it leaves out
