"""Images that users give: to begin from, masks and control images.

Shapes: H W height and width, C channels.
"""

from pathlib import Path

import numpy as np

from tessera import images
from tessera.data import images as data_images
from tessera.data.images import ImagesConfig, InvalidSample, center_crop
from tessera.errors import TesseraError
from tessera.model import Model


def images_config(model: Model) -> ImagesConfig:
    """How the training of a model read its images."""
    background = ((model.config.recipe or {}).get("data") or {}).get("background", (255, 255, 255))
    return ImagesConfig(channels=1 if model.codec.pixel_channels == 1 else 3, background=background)


def read_image(name: str, file: Path | bytes, config: ImagesConfig) -> np.ndarray:
    """uint8 [H, W, C] of an image file, by path or content, read as training reads it. Raises TesseraError."""
    if isinstance(file, Path) and not file.exists():
        raise TesseraError(f"cannot read {name}: there is no such file")
    try:
        pixels = np.array(data_images.read_image(file, config))
    except InvalidSample as error:
        raise TesseraError(f"cannot read {name}: {error}") from None
    return pixels if pixels.ndim == 3 else pixels[..., None]


def read_mask(name: str, file: Path | bytes) -> np.ndarray:
    """uint8 [H, W, 1] of a mask. Raises TesseraError if it is transparent somewhere: what that means is not defined."""
    backgrounds = ((0, 0, 0), (255, 255, 255))
    black, white = (read_image(name, file, ImagesConfig(channels=1, background=level)) for level in backgrounds)
    if (black != white).any():
        raise TesseraError(f"{name} has transparent pixels; expected white where the image changes, else black")
    return white


def crop(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, C] scaled and cropped to a size; unchanged if it has that size."""
    if pixels.shape[:2] == size:
        return pixels
    cropped = np.array(center_crop(images.to_pil(pixels), size))
    return cropped if cropped.ndim == 3 else cropped[..., None]
