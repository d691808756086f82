"""The image and mask that image-to-image and inpainting begin from.

Shapes: B images, C channels, H W height and width of the pixels, h w those of the latents.
"""

import numpy as np
import torch
from torch import Tensor

from tessera.errors import TesseraError
from tessera.generation.request import latent_size
from tessera.model import Model
from tessera.sampling import EditSource


def edit_source(
    model: Model,
    image: np.ndarray | None,
    strength: float | None,
    mask: np.ndarray | None,
    size: tuple[int, int] | None,
) -> EditSource | None:
    """The latents to begin from; None without an image. Raises TesseraError for inputs that do not match."""
    if image is None:
        if strength is not None or mask is not None:
            raise TesseraError(f"{'a mask' if strength is None else 'strength'} needs an image: pass init_image, too")
        return None
    pixels = as_images(model, image)
    image_size = (pixels.shape[1], pixels.shape[2])
    if size is not None and tuple(size) != image_size:
        raise TesseraError(f"size {size[0]} x {size[1]} is not that of the image, {image_size[0]} x {image_size[1]}")
    height, width = latent_size(model, image_size)
    strength = (0.6 if mask is None else 1.0) if strength is None else strength
    if not 0 < strength <= 1:
        raise TesseraError(f"strength is {strength}; expected more than 0 and at most 1, which begins in noise alone")
    data = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).to(model.device, torch.float32)
    latent_mask = None if mask is None else _latent_mask(model, mask, image_size, (height, width))
    return EditSource(model.codec.encode(data / 127.5 - 1), strength, latent_mask)


def as_images(model: Model, image: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, C] from the same or from one image [H, W, C]. Raises TesseraError."""
    pixels, channels = np.asarray(image), model.codec.pixel_channels
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != channels or not pixels.size:
        raise TesseraError(
            f"an image is uint8 [B, H, W, {channels}] or [H, W, {channels}]; got {pixels.dtype} {list(pixels.shape)}"
        )
    return pixels[None] if pixels.ndim == 3 else pixels


def as_masks(mask: np.ndarray) -> np.ndarray:
    """[B, H, W] from the same or from one mask [H, W]. Raises TesseraError."""
    masks = np.asarray(mask)
    if masks.ndim not in (2, 3):
        raise TesseraError(f"a mask is [B, H, W] or [H, W]; got {masks.dtype} {list(masks.shape)}")
    return masks[None] if masks.ndim == 2 else masks


def _latent_mask(model: Model, mask: np.ndarray, size: tuple[int, int], latents: tuple[int, int]) -> Tensor:
    """A mask of pixels as a mask of latents, bool [B or 1, 1, h, w]: true where any pixel of a latent is true."""
    masks = as_masks(mask)
    if masks.shape[-2:] != size or not np.isin(masks, (0, 1)).all():
        raise TesseraError(
            f"a mask is [B, {size[0]}, {size[1]}] or [{size[0]}, {size[1]}], 1 where to generate and 0 where the image "
            f"stays; got {masks.dtype} {list(masks.shape)}" + (" with other values" if masks.shape[-2:] == size else "")
        )
    factor = model.codec.factor
    blocks = torch.from_numpy(masks != 0).view(-1, 1, latents[0], factor, latents[1], factor)
    return blocks.amax(dim=(3, 5)).to(model.device)
