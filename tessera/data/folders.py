"""The files of a folder at any depth, listed by one rule for training and for `tessera data check`."""

import functools
import os
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from tessera import storage
from tessera.data.notes import Note, about, printable

# Folders and files of systems and network storage, in lower case; names that begin with a dot are hidden, too.
SYSTEM_NAMES = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "$recycle.bin", "lost+found", "__macosx"),
    *("system volume information", "thumbs.db", "desktop.ini"),
}
# Formats of Pillow without pixels that it decodes itself: stubs, films, and vector graphics.
NO_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of all images that Pillow reads, in lower case."""
    Image.init()
    readable = (Image.OPEN.keys() | {"MPO"}) - NO_PIXELS  # JPEG opens MPO, photos of two views
    return frozenset(suffix for suffix, name in Image.EXTENSION.items() if name in readable)


VIDEO_SUFFIXES = frozenset({
    ".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ogv", ".wmv", ".flv", ".3gp", ".mts", ".m2ts",
})  # fmt: skip


def sample_suffixes(frames: int | None) -> frozenset[str]:
    """The suffixes of the files that are samples: images, and where the data are clips (with frames) videos, too."""
    return image_suffixes() if frames is None else image_suffixes() | VIDEO_SUFFIXES


def no_samples(frames: int | None) -> str:
    """What was expected where a folder or tar has no samples."""
    if frames is None:
        return f"no images at any depth ({', '.join(sorted(image_suffixes()))})"
    return f"no clips at any depth ({', '.join(sorted(VIDEO_SUFFIXES))}, .gif, .webp, .png)"


@dataclass
class FolderListing:
    """Paths relative to the folder, with '/'; those of folders end in '/'. Files are sorted part by part."""

    root: Path
    files: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)  # links to folders that are listed already, or contain the root
    broken: list[str] = field(default_factory=list)  # links whose target does not exist
    special: list[str] = field(default_factory=list)  # neither files nor folders
    invalid: list[str] = field(default_factory=list)  # names that are not UTF-8, escaped

    def notes(self, where: str) -> list[Note]:
        """What is not read."""
        return [
            *about("hidden-files", where, "hidden files, which are ignored", self.hidden, "", "note", self.root),
            *about("empty-folders", where, "folders without files", self.empty, "", "note", self.root),
            *about("other-files", where, "names that are not files", self.special, "", "note", self.root),
            *about("broken-link", where, "links whose target does not exist", self.broken, folder=self.root),
            *about(
                *("unreadable", where, "folders without permission to read them", self.unreadable),
                *("give yourself the permission", "warning", self.root),
            ),
            *about(
                *("repeated-folders", where, "links to folders that are read at another place", self.repeated),
                "each folder is read once",
            ),
            *about(
                *("invalid-names", where, "names that are not valid UTF-8, which cannot be read", self.invalid),
                "rename them (convmv -f cp1252 -t utf8)",
            ),
        ]


def list_folder(root: Path) -> FolderListing:
    """List a folder. Links to folders are followed, but each folder is listed once: at its own place if it is in the
    root, otherwise at the first link to it."""
    listing = FolderListing(root)
    if storage.is_remote(root):
        for name in storage.listing(root):
            hidden = any(part.startswith(".") or part.lower() in SYSTEM_NAMES for part in name.split("/"))
            (listing.hidden if hidden else listing.files).append(name)
        listing.files.sort(key=lambda path: path.split("/"))
        return listing
    real_root = os.path.realpath(root)
    listed = {real_root}
    # Path, path relative to the root, and real path of each folder; links wait until there are no other folders.
    folders: list[tuple[str, str, str]] = [(str(root), "", real_root)]
    links: list[tuple[str, str]] = []
    while folders or links:
        if folders:
            folder, prefix, real = folders.pop()
        else:
            links.sort(reverse=True)
            prefix, folder = links.pop()
            real = os.path.realpath(folder)
            if real in listed or (real_root + os.sep).startswith(real.rstrip(os.sep) + os.sep):
                listing.repeated.append(prefix)
                continue
            listed.add(real)
        try:
            entries = list(os.scandir(folder))
        except OSError:  # no permission
            listing.unreadable.append(prefix)
            continue
        if not entries and prefix:
            listing.empty.append(prefix)
        for entry in entries:
            name = prefix + entry.name
            is_folder = _is_folder(entry)
            ending = "/" if is_folder else ""
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM_NAMES:
                listing.hidden.append(printable(name) + ending)
            elif printable(name) != name:
                listing.invalid.append(printable(name) + ending)
            elif is_folder and entry.is_symlink():
                links.append((f"{name}/", entry.path))
            elif is_folder and os.path.join(real, entry.name) in listed:
                listing.repeated.append(f"{name}/")
            elif is_folder:
                listed.add(os.path.join(real, entry.name))
                folders.append((entry.path, f"{name}/", os.path.join(real, entry.name)))
            elif os.path.isfile(entry.path):
                listing.files.append(name)
            else:
                (listing.broken if entry.is_symlink() else listing.special).append(name)
    listing.files.sort(key=lambda path: path.split("/"))
    names = (listing.hidden, listing.empty, listing.unreadable, listing.repeated)
    for paths in (*names, listing.broken, listing.special, listing.invalid):
        paths.sort()
    return listing


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
