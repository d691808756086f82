"""Control images of training: made of the images, or read from a folder beside them.

Shapes: B images, C channels, H W height and width.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tessera.conditioning.control import ControlImage, Paired
from tessera.data.files import FilesDataset
from tessera.data.images import InvalidSample, image_shape, load_image
from tessera.errors import TesseraError

ControlImages = Callable[[np.ndarray, Sequence[int]], np.ndarray]  # of images [B, C, H, W] and their numbers


def control_images(image: ControlImage, dataset: Any) -> ControlImages:
    """What gives the control images of samples of a data set, uint8 [B, C, H, W]. Raises TesseraError."""
    if isinstance(image, Paired):
        return PairedImages(Path(image.path).expanduser(), dataset)
    return lambda pixels, samples: image(pixels)


class PairedImages:
    """A control image in another folder for each image: the same path below that folder, whatever the suffix."""

    def __init__(self, folder: Path, dataset: Any) -> None:
        if not isinstance(dataset, FilesDataset):
            raise TesseraError("adapter.image.kind=paired needs images in files (data.kind=folder)")
        if not folder.is_dir():
            raise TesseraError(f"adapter.image.path {folder} is not a folder")
        files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.*"))}
        self.dataset, self.files = dataset, []
        for number in range(len(dataset)):
            name = dataset.name(number)
            try:
                key = Path(name).relative_to(dataset.root).with_suffix("").as_posix()
            except ValueError:
                key = name
            if key not in files:
                raise TesseraError(
                    f"{folder} has no control image for {name}: expected {folder / key}, with any suffix"
                )
            self.files.append(files[key])

    def __call__(self, pixels: np.ndarray, samples: Sequence[int]) -> np.ndarray:
        height, width = pixels.shape[-2:]
        return np.stack([self._read(sample, (height, width)) for sample in samples])

    def _read(self, sample: int, size: tuple[int, int]) -> np.ndarray:
        path = self.files[sample]
        try:
            (height, width), shape = self.dataset.shape(sample), image_shape(path)
            if abs(height * shape[1] / (width * shape[0]) - 1) > 0.02:
                raise TesseraError(
                    f"the control image {path} has {shape[0]} x {shape[1]} pixels (height x width), and its image "
                    f"{height} x {width}: both need the same ratio"
                )
            return load_image(path, self.dataset.config.model_copy(update={"upscale": True}), size)
        except InvalidSample as error:
            raise TesseraError(f"cannot read the control image {path}: {error}") from None
