"""Files and folders in a data set that are not samples: hidden, packed or misnamed files, broken links."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from tessera.data import index
from tessera.data.files import FilesDataset

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
COMPANION_SUFFIXES = {".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".yaml", ".yml", ".cls", ".html", ".xml"}
COMPANION_SUFFIXES |= set(index.TABLE_SUFFIXES)


@dataclass(frozen=True)
class NonSample:
    kind: NonSampleKind
    name: str  # relative to the root of the data set
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.detail})" if self.detail else self.name


def find_non_samples(dataset: FilesDataset) -> Iterator[NonSample]:
    """Everything in the folders of a data set that is not a sample, except files that usually accompany images."""
    samples = _SampleNames(dataset)
    for path in dataset.config.paths:
        folder = Path(path).expanduser()
        if folder.is_dir():
            yield from _search_folder(folder, dataset, samples)


class _SampleNames:
    """The paths of the samples, with and without suffix, as hashes of 8 bytes each."""

    def __init__(self, dataset: FilesDataset) -> None:
        paths = dataset.table["path"].unique().to_pylist()
        self.paths = np.sort(np.fromiter((hash(path) for path in paths), np.int64, len(paths)))
        self.stems = np.sort(np.fromiter((hash(os.path.splitext(path)[0]) for path in paths), np.int64, len(paths)))
        captions = dataset.table["caption"]
        self.has_caption_files = captions.null_count < len(captions) and all(
            os.path.splitext(path)[1] not in (*index.TABLE_SUFFIXES, ".tar") for path in paths[:1]
        )

    def has_path(self, name: str) -> bool:
        return _contains(self.paths, hash(name))

    def has_stem(self, name: str) -> bool:
        return _contains(self.stems, hash(os.path.splitext(name)[0]))


def _contains(hashes: np.ndarray, value: int) -> bool:
    position = np.searchsorted(hashes, value)
    return bool(position < len(hashes) and hashes[position] == value)


def _search_folder(root: Path, dataset: FilesDataset, samples: _SampleNames) -> Iterator[NonSample]:
    for folder, folders, names in os.walk(root, followlinks=True, onerror=None):
        real = Path(os.path.realpath(folder))
        prefix = os.path.relpath(folder, dataset.root)
        prefix = "" if prefix == "." else prefix.replace(os.sep, "/") + "/"
        hidden = [name for name in folders if name.startswith(".")]
        yield from (NonSample("hidden-files", f"{prefix}{name}/", "a hidden folder") for name in hidden)
        for name in folders:
            if not os.access(os.path.join(folder, name), os.R_OK | os.X_OK):
                yield NonSample("unreadable", f"{prefix}{name}/", "a folder without permission to read it")
        visible = [name for name in folders if name not in hidden]
        # A link to a folder that contains it would be followed forever.
        folders[:] = [name for name in visible if not real.is_relative_to(os.path.realpath(os.path.join(folder, name)))]
        if not folders and not names and folder != str(root):
            yield NonSample("empty-folders", prefix)
        for name in names:
            if not samples.has_path(prefix + name):
                non_sample = _classify(os.path.join(folder, name), prefix + name, samples)
                if non_sample is not None:
                    yield non_sample


def _classify(path: str, name: str, samples: _SampleNames) -> NonSample | None:
    """The kind of a file that is not a sample; None for files that usually accompany images."""
    base = os.path.basename(path)
    if not os.path.exists(path):
        return NonSample("broken-link", name, f"a link to {os.readlink(path)}" if os.path.islink(path) else "")
    if not os.path.isfile(path):
        return NonSample("other-files", name, "not a regular file")
    if base.startswith(".") or base in ("Thumbs.db", "desktop.ini"):
        return NonSample("hidden-files", name)
    suffix = os.path.splitext(base)[1].lower()
    if suffix in ARCHIVE_SUFFIXES:
        return NonSample("archives", name)
    if suffix == ".txt" and samples.has_caption_files and not samples.has_stem(name):
        return NonSample("captions-without-image", name)
    if suffix in COMPANION_SUFFIXES:
        return None
    try:
        with Image.open(path) as image:
            return NonSample("misnamed-images", name, f"a {image.format} image, {image.width} x {image.height}")
    except Exception:  # decoders raise anything on other content
        return NonSample("other-files", name)
