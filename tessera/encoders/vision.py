"""Image features of pretrained vision networks, through transformers: DINOv2, CLIP, SigLIP, ViT, ConvNeXt, ...

Shapes: B images, C channels, H W height and width, D width of the feature.
"""

import inspect
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from tessera.errors import TesseraError, bullet_list

FILTERS = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers, which preprocessor_config.json stores


@dataclass(frozen=True)
class Preprocessing:
    """From images to the inputs of a network, as its preprocessor_config.json specifies.

    size: (height, width), or the length of the shorter side, which keeps the aspect ratio.
    filter: bilinear or bicubic.
    crop: (height, width) of the center crop; None: no crop.
    mean, std: of each channel, for values of 0 .. 1.
    """

    size: tuple[int, int] | int
    filter: str
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """images uint8 [B, 3, H, W] -> float32 [B, 3, height, width]"""
        height, width = self._resized(*images.shape[2:])
        x = resize(images, (height, width), self.filter)
        if self.crop is not None:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            if min(top, left) < 0:
                raise TesseraError(f"images of {height} x {width} are too small for a center crop of {self._crop}")
            x = x[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (self.mean, self.std))
        return (x.float() / 255 - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size
        longer = self.size * max(height, width) // min(height, width)
        return (longer, self.size) if height > width else (self.size, longer)

    @property
    def _crop(self) -> str:
        return "" if self.crop is None else f"{self.crop[0]} x {self.crop[1]}"

    def __str__(self) -> str:
        size = f"shorter side to {self.size}" if isinstance(self.size, int) else f"to {self.size[0]} x {self.size[1]}"
        crop = f", center crop {self._crop}" if self.crop else ""
        return f"{self.filter} as in Pillow, {size}{crop}, mean {self.mean}, std {self.std}"


def resize(images: Tensor, size: tuple[int, int], filter: str) -> Tensor:
    """images uint8 [B, 3, H, W] -> uint8 [B, 3, *size], by Pillow in threads, on the device of the images."""
    resampling = Image.Resampling[filter.upper()]

    def resized(image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((size[1], size[0]), resampling))

    with ThreadPoolExecutor() as pool:
        arrays = list(pool.map(resized, images.permute(0, 2, 3, 1).contiguous().cpu().numpy()))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(images.device)


class VisionEncoder(nn.Module):
    """One feature vector per image.

    parts: the width of each kind of feature.
    name, resize: what scores depend on beside the weights.
    """

    def __init__(self, network: Any, preprocessing: Preprocessing, name: str) -> None:
        super().__init__()
        self.network = network.float().eval().requires_grad_(False)
        self.preprocessing = preprocessing
        self.name, self.resize = name, str(preprocessing)
        self.parts = {"pool": self(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))["pool"].shape[1]}

    @torch.inference_mode()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images uint8 [B, C, H, W], C 1 (gray) or 3 (RGB) -> {"pool": float32 [B, D]}

        The feature is the image embedding of image-text networks (CLIP, SigLIP); the pooled output of networks that
        have one, which for DINOv2 is the class token after the last norm, as in FD-DINOv2 (Stein et al. 2023); else the
        mean of the tokens. Raises TesseraError for images of another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise TesseraError(
                f"{self.name} got {images.dtype} {list(images.shape)}; expected torch.uint8 "
                "[B, C, H, W] with C 1 (gray) or 3 (RGB)"
            )
        with torch.autocast(images.device.type, enabled=False):
            x = self.preprocessing(images.expand(-1, 3, -1, -1))
            image_text = hasattr(self.network, "get_image_features")
            output = self.network.get_image_features(pixel_values=x) if image_text else self.network(pixel_values=x)
            if not isinstance(output, Tensor):  # get_image_features of transformers 4 returns a tensor
                pooled = output.pooler_output
                output = output.last_hidden_state.mean(1) if pooled is None else pooled
            return {"pool": output.flatten(1)}

    @torch.no_grad()
    def patches(self, images: Tensor) -> Tensor:
        """The features of the patches, of the last layer: images uint8 [B, C, H, W] -> float32 [B, D, h, w]

        Raises TesseraError if the network has no grid of features.
        """
        network = getattr(self.network, "vision_model", self.network)
        with torch.autocast(images.device.type, enabled=False):
            x = self.preprocessing(images.expand(-1, 3, -1, -1))
            arguments = {"interpolate_pos_encoding": True} if _interpolates_positions(network) else {}
            hidden = network(pixel_values=x, **arguments).last_hidden_state
            if hidden.ndim == 4:  # of a convolutional network
                return hidden
            patch = getattr(network.config, "patch_size", None)
            grid = tuple(side // patch for side in x.shape[2:]) if isinstance(patch, int) else (0, 0)
            count = math.prod(grid)
            if not 0 < count <= hidden.shape[1]:
                raise TesseraError(f"{self.name} has no grid of features: {list(hidden.shape)} for {list(x.shape)}")
            return hidden[:, -count:].mT.unflatten(2, grid)  # class and register tokens come first


def _interpolates_positions(network: nn.Module) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(network.forward).parameters


def load(source: str, revision: str | None = None, size: int | None = None) -> VisionEncoder:
    """A vision network from a hub id or a folder that transformers wrote; in float32, on the CPU.

    size: of the images that it gets, in place of the height and width of its configuration.
    Raises TesseraError if it cannot be loaded, is incomplete, or is not a vision network.
    """
    try:
        from transformers import AutoImageProcessor, AutoModel
    except ImportError:
        raise TesseraError("a vision network needs transformers: pip install 'tessera[vision]'") from None
    with clear_errors(source):
        network, info = AutoModel.from_pretrained(source, revision=revision, output_loading_info=True)
    if not hasattr(network, "get_image_features") and network.main_input_name != "pixel_values":
        raise TesseraError(
            f"'{source}' is a {network.config.model_type} network; expected a vision network, such as "
            "facebook/dinov2-large"
        )
    missing = sorted(info["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):
        network.pooler, missing = None, []  # the file of a classifier: transformers initializes the pooler randomly
    if missing:
        raise TesseraError(f"the weights of '{source}' are incomplete; missing:{bullet_list(missing)}")
    with clear_errors(source):
        # transformers reads the configuration, with the defaults of every family; computed here without torchvision.
        processor = AutoImageProcessor.from_pretrained(source, revision=revision, backend="pil")
        preprocessing = _preprocessing(processor)
        if size is not None:
            preprocessing = replace(preprocessing, size=(size, size), crop=None)
        return VisionEncoder(network, preprocessing, source)


@contextmanager
def clear_errors(
    source: str,
    what: str = "the vision network",
    files: str = "config.json, model.safetensors and preprocessor_config.json",
) -> Iterator[None]:
    """Turn exceptions of transformers into TesseraError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise TesseraError(
            f"cannot load {what} '{source}': {reason}\n"
            f"give a folder that holds {files}, or a hub id this machine can reach"
        ) from None


def _preprocessing(processor: Any) -> Preprocessing:
    """The steps of an image processor of transformers. Raises ValueError if one is not supported."""

    def setting(name: str, default: Any = None) -> Any:
        value = getattr(processor, name, None)
        return default if value is None else value

    if not setting("do_resize"):
        raise ValueError("its preprocessing does not resize")
    size = _size(processor.size)
    crop = _size(processor.crop_size) if setting("do_center_crop") else None
    crop_fraction = setting("crop_pct")  # of ConvNeXt: images below 384 pixels are cropped from larger ones
    if crop_fraction and isinstance(size, int):
        size, crop = (int(size / crop_fraction), (size, size)) if size < 384 else ((size, size), None)
    if isinstance(crop, int):
        crop = (crop, crop)
    if processor.resample not in FILTERS:
        raise ValueError(f"its preprocessing uses the filter {processor.resample}; supported are {FILTERS}")
    scale = 255 * setting("rescale_factor", 1 / 255) if setting("do_rescale", True) else 255.0
    mean, std = (processor.image_mean, processor.image_std) if setting("do_normalize") else ((0.0,) * 3, (1.0,) * 3)
    return Preprocessing(
        size, FILTERS[int(processor.resample)], crop, tuple(m / scale for m in mean), tuple(s / scale for s in std)
    )


def _size(size: Any) -> tuple[int, int] | int:
    """A size of transformers: of both sides, or of the shorter one."""
    sizes = dict(size)
    if set(sizes) == {"height", "width"}:
        return sizes["height"], sizes["width"]
    if set(sizes) == {"shortest_edge"}:
        return sizes["shortest_edge"]
    raise ValueError(f"its preprocessing has the size {sizes}; supported are height and width, or shortest_edge")
