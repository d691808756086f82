"""What lies in a folder of images and is no sample of it: hidden, packed or misnamed files, links to nothing."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from tessera.data import index
from tessera.data.files import FilesDataset

StrayKind = Literal[
    "hidden-files",
    "archives",
    "misnamed-images",
    "broken-link",
    "unreadable",
    "captions-without-image",
    "empty-folders",
    "other-files",
]

PACKED = {".zip", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".tar", ".zst"}
BESIDE = {".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".yaml", ".yml", ".cls", ".html", ".xml"}
BESIDE |= set(index.TABLE_SUFFIXES)


@dataclass(frozen=True)
class NonSample:
    kind: StrayKind
    name: str  # from the root of the data set
    detail: str = ""


def find_non_samples(source: FilesDataset) -> Iterator[NonSample]:
    """Everything below the folders of a data set that gives it no sample, but files that usually lie beside images."""
    taken = _Names(source)
    for told in source.config.paths:
        folder = Path(told).expanduser()
        if folder.is_dir():
            yield from _below(folder, source, taken)


class _Names:
    """Which paths are samples, and which have a sample of their name beside them: by hash, 8 bytes for each."""

    def __init__(self, source: FilesDataset) -> None:
        paths = source.table["path"].unique().to_pylist()
        self.paths = np.sort(np.fromiter((hash(path) for path in paths), np.int64, len(paths)))
        self.stems = np.sort(np.fromiter((hash(os.path.splitext(path)[0]) for path in paths), np.int64, len(paths)))
        captions = source.table["caption"]
        self.told_in_texts = captions.null_count < len(captions) and all(
            os.path.splitext(path)[1] not in (".parquet", ".arrow", ".tar") for path in paths[:1]
        )

    def is_sample(self, name: str) -> bool:
        return _holds(self.paths, name)

    def has_sample(self, name: str) -> bool:
        return _holds(self.stems, os.path.splitext(name)[0])


def _holds(hashes: np.ndarray, name: str) -> bool:
    place = np.searchsorted(hashes, hash(name))
    return bool(place < len(hashes) and hashes[place] == hash(name))


def _below(root: Path, source: FilesDataset, taken: _Names) -> Iterator[NonSample]:
    for folder, folders, names in os.walk(root, followlinks=True, onerror=None):
        here = os.path.realpath(folder)
        prefix = os.path.relpath(folder, source.root)
        prefix = "" if prefix == "." else prefix.replace(os.sep, "/") + "/"
        hidden = [name for name in folders if name.startswith(".")]
        yield from (NonSample("hidden-files", f"{prefix}{name}/", "a hidden folder") for name in hidden)
        for name in folders:
            if not os.access(os.path.join(folder, name), os.R_OK | os.X_OK):
                yield NonSample("unreadable", f"{prefix}{name}/", "a folder without permission to read it")
        within = [name for name in folders if name not in hidden]
        folders[:] = [name for name in within if not _holds_itself(here, os.path.join(folder, name))]
        if not folders and not names and folder != str(root):
            yield NonSample("empty-folders", prefix)
        for name in names:
            path = os.path.join(folder, name)
            if not taken.is_sample(prefix + name) and (stray := _kind(path, prefix + name, taken)) is not None:
                yield stray


def _holds_itself(here: str, path: str) -> bool:
    return Path(here).is_relative_to(os.path.realpath(path))


def _kind(path: str, name: str, taken: _Names) -> NonSample | None:
    """What a file is that is no sample; None for what usually lies beside images."""
    base = os.path.basename(path)
    if not os.path.exists(path):
        return NonSample("broken-link", name, f"a link to {os.readlink(path)}" if os.path.islink(path) else "")
    if not os.path.isfile(path):
        return NonSample("other-files", name, "no regular file")
    if base.startswith(".") or base in ("Thumbs.db", "desktop.ini"):
        return NonSample("hidden-files", name)
    ending = os.path.splitext(base)[1].lower()
    if ending in PACKED:
        return NonSample("archives", name)
    if ending == ".txt" and taken.told_in_texts and not taken.has_sample(name):
        return NonSample("captions-without-image", name)
    if ending in BESIDE:
        return None
    try:
        with Image.open(path) as image:
            return NonSample("misnamed-images", name, f"a {image.format} image, {image.width} x {image.height}")
    except Exception:  # whatever a decoder says: it is no image that can be read
        return NonSample("other-files", name)
