"""A folder of images: one subfolder for each class, or all in one place without classes."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from tessera.data.images import ImagesConfig, read
from tessera.errors import TesseraError

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class FolderConfig(ImagesConfig):
    """Images below a folder, at any depth; the first level of subfolders names the classes."""

    kind: Literal["folder"] = "folder"
    path: str = Field(description="the folder")
    classes: Literal["auto", "folders", "none"] = Field(
        default="auto", description="auto: by subfolders, if there are any"
    )

    @property
    def where(self) -> str:
        return f"{self.kind} {self.path}"

    def open(self) -> "FolderSource":
        return FolderSource(self)


class FolderSource:
    """The images in the order of their paths, so that it is the same on every machine."""

    def __init__(self, config: FolderConfig) -> None:
        self.config = config
        root = Path(config.path).expanduser()
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise TesseraError(f"data.path {root} {what}; expected a folder of images, or of one subfolder per class")
        self.paths = sorted(_images_below(root))
        if not self.paths:
            raise TesseraError(
                f"data.path {root} holds no images; looked at every depth for {', '.join(sorted(ENDINGS))}"
            )
        parts = [path.relative_to(root).parts for path in self.paths]
        loose = sum(len(part) == 1 for part in parts)
        if config.classes == "none" or (config.classes == "auto" and loose == len(parts)):
            self.class_names: tuple[str, ...] = ()
            return
        if loose == len(parts):
            raise TesseraError(f"data.classes=folders, but {root} holds no class folders: its {loose} images are loose")
        if loose:
            raise TesseraError(
                f"{root} holds {loose} images beside its class folders, so their class is unknown: "
                "move them into a class folder, or set data.classes=none to train without classes"
            )
        self.class_names = tuple(sorted({part[0] for part in parts}))
        if len(self.class_names) == 1:
            raise TesseraError(
                f"{root} holds one class only ('{self.class_names[0]}'), which tells a network nothing: "
                "set data.classes=none to train without classes"
            )
        number = {name: index for index, name in enumerate(self.class_names)}
        self._labels = [number[part[0]] for part in parts]

    def __len__(self) -> int:
        return len(self.paths)

    def label(self, index: int) -> int:
        return self._labels[index] if self.class_names else 0

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def pixels(self, index: int) -> np.ndarray:
        return read(self.paths[index], self.config)


def _images_below(root: Path) -> Iterator[Path]:
    """Every image file at any depth but hidden ones; links to folders are followed, though never in a circle."""
    for folder, folders, names in os.walk(root, followlinks=True):
        here = Path(folder).resolve()
        folders[:] = [name for name in folders if name[0] != "." and not here.is_relative_to((here / name).resolve())]
        for name in names:
            path = Path(folder, name)
            if name[0] != "." and path.suffix.lower() in ENDINGS and path.is_file():
                yield path
