"""Splits of a data set (train, validation, test) from the names of its files and folders.

The words are those of Hugging Face's `datasets` (data_files.py).
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tessera.data.notes import Note
from tessera.errors import TesseraError

TRAIN = "train"
SPLITS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_COLUMN = "split"  # of metadata files
SPLIT_OF_WORD = {word: split for split, words in SPLITS.items() for word in words}
IN_FILE_NAME = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(SPLIT_OF_WORD)})(?=[-._ 0-9]|$)")


def split_of_file(path: str) -> str | None:
    """The split of a table or tar, from its name or else from a folder: train-00000-of-00002.parquet, val/0.tar"""
    *folders, name = path.lower().split("/")
    if match := IN_FILE_NAME.search(name):
        return SPLIT_OF_WORD[match[1]]
    return next((SPLIT_OF_WORD[folder] for folder in folders if folder in SPLIT_OF_WORD), None)


def split_depth(paths: Sequence[str]) -> int | None:
    """The first depth at which the folder of every path is named as a split; None if there is none."""
    folders = [folder.lower().split("/") if folder else [] for folder in {path.rpartition("/")[0] for path in paths}]
    depths = range(min(map(len, folders), default=0))
    return next((depth for depth in depths if all(parts[depth] in SPLIT_OF_WORD for parts in folders)), None)


def split_at(path: str, depth: int) -> str | None:
    """The split that the folder at a depth of a path names."""
    folders = path.lower().split("/")[:-1]
    return SPLIT_OF_WORD.get(folders[depth]) if depth < len(folders) else None


def choose_split(
    splits: Sequence[str | None], requested: str | None, where: str | Path, unit: str
) -> tuple[set[str | None], list[Note]]:
    """Which of the splits of files are read: the requested one, or the only one, or that for training.

    splits: of each file, None where it names none: it is for training. unit: what `splits` lists, for messages.
    Raises TesseraError if the split does not exist, or if one must be chosen.
    """
    counts = Counter(splits)
    names = [name for name in counts if name is not None]
    requested = SPLIT_OF_WORD.get(requested.lower(), requested) if requested else None
    if requested is not None and requested not in names:
        known = f"it has {', '.join(names)}" if names else "its files and folders name none"
        raise TesseraError(f"{where} has no split '{requested}' (data.split): {known}")
    if requested is not None:
        chosen: set[str | None] = {requested}
    elif len(counts) == 1:
        chosen = set(counts)
    elif TRAIN in counts or None in counts:
        chosen = {TRAIN, None}
    else:
        raise TesseraError(f"{where} has the splits {', '.join(names)}: give one of them, data.split={names[0]}")
    others = {name: count for name, count in counts.items() if name not in chosen}
    if not others:
        return chosen, []
    rest = ", ".join(f"{name or 'none'} ({count:,} {unit})" for name, count in others.items())
    used = requested or TRAIN
    text = f"{where}: the split {used} is read, and not {rest}; data.split selects another"
    message = f"splits that are not read; the split {used} is"
    return chosen, [
        Note("other-splits", "warning" if requested is None else "note", text, message, tuple(rest.split(", ")))
    ]
