"""Files and folders in a data set that are not samples: hidden, packed or misnamed files, captions without images."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from tessera.data.files import FilesDataset
from tessera.data.layouts import CAPTION_SUFFIXES

NonSampleKind = Literal[
    "hidden-files",
    "archives",
    "misnamed-images",
    "broken-link",
    "unreadable",
    "captions-without-image",
    "empty-folders",
    "other-files",
]

ARCHIVE_SUFFIXES = {".zip", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".tar", ".zst"}
CHUNK = 1 << 16  # paths in memory at once
DETAILS = {"unreadable": "a folder without permission to read it"}


@dataclass(frozen=True)
class NonSample:
    kind: NonSampleKind
    name: str  # relative to the root of the data set
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})" if self.detail else self.name


def find_non_samples(dataset: FilesDataset) -> Iterator[NonSample]:
    """Everything in the folders of a data set that is not a sample, except documents."""
    has_captions = dataset.table["caption"].null_count < len(dataset)
    without_image = _texts_without_image(dataset) if has_captions else set()
    for note in dataset.notes:
        if note.folder is None:
            continue
        prefix = _prefix(note.folder, dataset)
        for name in note.names:
            path = note.folder / name
            if note.kind == "ignored-files":
                if prefix + name in without_image:
                    yield NonSample("captions-without-image", prefix + name)
                else:
                    yield _classify(path, prefix + name)
            elif note.kind == "broken-link":
                yield NonSample("broken-link", prefix + name, f"a link to {os.readlink(path)}")
            elif note.kind in ("hidden-files", "empty-folders", "other-files", "unreadable"):
                yield NonSample(note.kind, prefix + name, DETAILS.get(note.kind, ""))


def _prefix(folder: Path, dataset: FilesDataset) -> str:
    """What precedes the names of a folder in the paths of an index."""
    prefix = os.path.relpath(folder, dataset.root).replace(os.sep, "/") + "/"
    return "" if prefix == "./" else prefix


def _texts_without_image(dataset: FilesDataset) -> set[str]:
    """Files with the suffix of a caption that are ignored, and are not beside a sample of the same name."""
    texts = {
        _prefix(note.folder, dataset) + name
        for note in dataset.notes
        if note.kind == "ignored-files" and note.folder is not None
        for name in note.names
        if os.path.splitext(name)[1].lower() in CAPTION_SUFFIXES
    }
    stems = {os.path.splitext(name)[0] for name in texts}
    for batch in dataset.table.select(["path"]).to_batches(CHUNK) if stems else ():
        stems -= {os.path.splitext(path)[0] for path in batch["path"].to_pylist()}
    return {name for name in texts if os.path.splitext(name)[0] in stems}


def _classify(path: Path, name: str) -> NonSample:
    """The kind of a file that is not a sample."""
    suffix = path.suffix.lower()
    if suffix in ARCHIVE_SUFFIXES:
        return NonSample("archives", name)
    try:
        with Image.open(path) as image:
            return NonSample("misnamed-images", name, f"a {image.format} image, {image.width} x {image.height}")
    except Exception:  # decoders raise anything on other content
        return NonSample("other-files", name)
