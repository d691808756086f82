"""The image and mask that image-to-image and inpainting begin from.

Shapes: B images, C channels, H W height and width of the pixels, h w those of the latents.
"""

import torch
from torch import Tensor

from tessera.errors import TesseraError
from tessera.generation.request import SampleRows, latent_size
from tessera.model import Model
from tessera.sampling import EditSource


def edit_source(model: Model, rows: SampleRows) -> EditSource | None:
    """The latents to begin from; None without an image. Raises TesseraError for inputs that do not match."""
    request = rows.request
    if rows.image is None:
        if request.strength is not None or rows.mask is not None:
            name = "a mask" if request.strength is None else "strength"
            raise TesseraError(f"{name} needs an image: pass init_image, too")
        return None
    size = check_images(model, rows.image)
    if request.size is not None and tuple(request.size) != size:
        requested, actual = (" x ".join(map(str, each)) for each in (request.size, size))
        raise TesseraError(f"size {requested} is not that of the image, {actual}")
    latents = latent_size(model, size)
    strength = (0.6 if rows.mask is None else 1.0) if request.strength is None else request.strength
    if not 0 < strength <= 1:
        raise TesseraError(f"strength is {strength}; expected more than 0 and at most 1, which begins in noise alone")
    data = rows.image.movedim(-1, 1).contiguous().to(model.device, torch.float32)
    mask = None if rows.mask is None else _latent_mask(model, rows.mask, size, latents)
    return EditSource(model.codec.encode(data / 127.5 - 1), strength, mask)


def given_latents(model: Model, rows: SampleRows) -> tuple[Tensor, list[int]] | None:
    """The latents [B, C, F, h, w] of the given frames, and the numbers of these frames of latents."""
    if rows.frames is None:
        return None
    numbers = rows.request.given_numbers(model)
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    data = rows.frames[:, order].movedim(-1, 1).contiguous().to(model.device, torch.float32)
    latents = model.codec.encode(data / 127.5 - 1)
    return latents, sorted(numbers) if model.codec.frame_factor == 1 else list(range(latents.shape[2]))


def check_images(model: Model, images: Tensor) -> tuple[int, ...]:
    """The size (H, W) of images [B, H, W, C], or (T, H, W) of clips. Raises TesseraError for other contents."""
    channels, axes = model.codec.pixel_channels, 3 + model.config.network.is_temporal
    if images.dtype != torch.uint8 or images.ndim != axes + 1 or images.shape[-1] != channels or not images.numel():
        shape = "T, H, W" if axes == 4 else "H, W"
        dtype = str(images.dtype).removeprefix("torch.")
        hint = ", with size=(T, H, W) for one clip" if axes == 4 else ""
        raise TesseraError(
            f"an image is uint8 [B, {shape}, {channels}] or [{shape}, {channels}]{hint}; got {dtype} "
            f"{list(images.shape)}"
        )
    return tuple(images.shape[1:-1])


def _latent_mask(model: Model, mask: Tensor, size: tuple[int, ...], latents: tuple[int, ...]) -> Tensor:
    """A mask of pixels as a mask of latents, bool [B, 1, h, w]: true where any pixel of a latent is true."""
    if tuple(mask.shape[1:]) != size:
        shape = ", ".join(map(str, size))
        raise TesseraError(
            f"a mask is [B, {shape}] or [{shape}], 1 where to generate and 0 where the image stays; got shape "
            f"{list(mask.shape)}"
        )
    factor = model.codec.factor
    blocks = mask.unflatten(-1, (latents[-1], factor)).unflatten(-3, (latents[-2], factor))
    return blocks.amax(dim=(-3, -1))[:, None].to(model.device)
