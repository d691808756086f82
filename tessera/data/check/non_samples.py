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
    stems = {os.path.splitext(path)[0] for path in dataset.table["path"].unique().to_pylist()}
    has_captions = dataset.table["caption"].null_count < len(dataset)
    for note in dataset.notes:
        if note.folder is None:
            continue
        prefix = os.path.relpath(note.folder, dataset.root).replace(os.sep, "/") + "/"
        prefix = "" if prefix == "./" else prefix
        for name in note.names:
            path = note.folder / name
            if note.kind == "ignored-files":
                is_text = path.suffix.lower() in CAPTION_SUFFIXES
                without_image = is_text and has_captions and os.path.splitext(prefix + name)[0] not in stems
                if without_image:
                    yield NonSample("captions-without-image", prefix + name)
                else:
                    yield _classify(path, prefix + name)
            elif note.kind == "broken-link":
                yield NonSample("broken-link", prefix + name, f"a link to {os.readlink(path)}")
            elif note.kind in ("hidden-files", "empty-folders", "other-files", "unreadable"):
                yield NonSample(note.kind, prefix + name, DETAILS.get(note.kind, ""))


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
