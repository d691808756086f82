"""What a pretrained vision network sees in pictures, through transformers: DINOv2, CLIP, SigLIP, ViT, ConvNeXt, ...

Shapes: B pictures, C channels, H W height and width, D width of the feature.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tessera.errors import TesseraError, listed

FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as the files of preprocessing say them
REACH = {"bilinear": 1, "bicubic": 2}  # pixels to either side
ONE = 2**22  # Pillow computes in fixed point


@dataclass(frozen=True)
class Preparation:
    """From pictures to what a network was trained to see, as its file of preprocessing says.

    size: (height, width), or the length of the shorter side where the shape is kept.
    filter: bilinear or bicubic.
    crop: (height, width) of the middle that is kept, or None for the whole.
    mean, std: of each channel, at values of 0 .. 1.
    """

    size: tuple[int, int] | int
    filter: str
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pictures: Tensor) -> Tensor:
        """pictures uint8 [B, 3, H, W] -> float32 [B, 3, height, width]"""
        height, width = self._resized(*pictures.shape[2:])
        x = resize_like_pillow(pictures, (height, width), self.filter)
        if self.crop is not None:
            down, right = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            if min(down, right) < 0:
                raise TesseraError(
                    f"pictures of {height} x {width} are too small to cut {self._crop} from their middle"
                )
            x = x[:, :, down : down + self.crop[0], right : right + self.crop[1]]
        mean, std = (torch.tensor(each, device=x.device)[:, None, None] for each in (self.mean, self.std))
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
        to = f"shorter side to {self.size}" if isinstance(self.size, int) else f"to {self.size[0]} x {self.size[1]}"
        scaled = f", mean {self.mean}, std {self.std}"
        return f"{self.filter} as in Pillow, {to}" + (f", middle {self._crop}" if self.crop else "") + scaled


def resize_like_pillow(pictures: Tensor, size: tuple[int, int], filter: str) -> Tensor:
    """pictures uint8 [B, C, H, W] -> uint8 [B, C, *size], to the byte as Pillow resizes, on any device.

    Made smaller, a pixel is a weighted mean of all that it covers. Width first, then height, bytes after each.
    """
    height, width = size
    # Whole numbers below 2^53, so that float64 is exact in any order; MPS has none.
    x = pictures.to("cpu" if pictures.device.type == "mps" else pictures.device, torch.float64)
    if width != x.shape[3]:
        x = _bytes(x @ _shares(x.shape[3], width, filter).T.to(x.device))
    if height != x.shape[2]:
        x = _bytes(_shares(x.shape[2], height, filter).to(x.device) @ x)
    return x.to(pictures.device, torch.uint8)


def _bytes(x: Tensor) -> Tensor:
    """Fixed point, halves rounded up, to 0 .. 255."""
    return ((x + ONE // 2) / ONE).floor().clamp(0, 255)


def _shares(given: int, length: int, filter: str) -> Tensor:
    """What each pixel of a line has of each pixel given: [length, given], whole numbers, about ONE in a row."""
    scale = given / length
    widened = max(scale, 1.0)
    centre = (torch.arange(length, dtype=torch.float64) + 0.5)[:, None] * scale
    reach = REACH[filter] * widened
    pixel = torch.arange(given)
    inside = (pixel >= (centre - reach + 0.5).floor()) & (pixel < (centre + reach + 0.5).floor())
    d = ((pixel - centre + 0.5) / widened).abs()
    if filter == "bilinear":
        share = (1 - d).clamp(min=0)
    else:  # Keys' cubic with a = -1/2
        share = torch.where(d < 1, (1.5 * d - 2.5) * d**2 + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2) * (d < 2)
    share = share * inside
    share = share / share.sum(1, keepdim=True) * ONE
    return (share.abs() + 0.5).floor() * share.sign()


class Vision(nn.Module):
    """One feature for each picture.

    parts: the width of each kind of feature.
    name, resize: what numbers made with it depend on, beside the weights.
    """

    def __init__(self, network: Any, preparation: Preparation, name: str) -> None:
        super().__init__()
        self.network = network.float().eval().requires_grad_(False)
        self.preparation = preparation
        self.name, self.resize = name, str(preparation)
        self.parts = {"pool": self(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))["pool"].shape[1]}

    @torch.inference_mode()
    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """pictures uint8 [B, C, H, W], C 1 (grey) or 3 (RGB) -> {"pool": float32 [B, D]}:

        the image embedding of networks that join pictures and text (CLIP, SigLIP); the network's own pooled output
        where there is one, which for DINOv2 is the class token after the last norm, as FD-DINOv2 takes it (Stein et al.
        2023); else the mean of the tokens.
        Raises TesseraError for pictures of another type or shape.
        """
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] not in (1, 3):
            raise TesseraError(
                f"{self.name} was given {pictures.dtype} {list(pictures.shape)}; expected torch.uint8 "
                "[B, C, H, W] with C 1 (grey) or 3 (RGB)"
            )
        with torch.autocast(pictures.device.type, enabled=False):
            x = self.preparation(pictures.expand(-1, 3, -1, -1))
            joint = hasattr(self.network, "get_image_features")
            output = self.network.get_image_features(pixel_values=x) if joint else self.network(pixel_values=x)
            if not isinstance(output, Tensor):  # which get_image_features of transformers 4 gives
                pooled = output.pooler_output
                output = output.last_hidden_state.mean(1) if pooled is None else pooled
            return {"pool": output.flatten(1)}


def load(source: str, revision: str | None = None) -> Vision:
    """A vision network of a hub, by its id, or of a folder that transformers wrote; in float32, on the CPU.

    Raises TesseraError if it cannot be had, is incomplete, or does not see pictures.
    """
    try:
        from transformers import AutoImageProcessor, AutoModel
    except ImportError:
        raise TesseraError("a vision network needs transformers: pip install 'tessera[vision]'") from None
    with _explained(source):
        network, found = AutoModel.from_pretrained(source, revision=revision, output_loading_info=True)
    if not hasattr(network, "get_image_features") and network.main_input_name != "pixel_values":
        raise TesseraError(
            f"'{source}' is a {network.config.model_type} network, which sees no pictures; give a vision network, "
            "such as facebook/dinov2-large"
        )
    missing = sorted(found["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):
        network.pooler, missing = None, []  # a classifier's file: what transformers puts there is random
    if missing:
        raise TesseraError(f"the weights of '{source}' are incomplete; missing:{listed(missing)}")
    with _explained(source):
        # Read by transformers, which knows the defaults of every family; computed here, which takes no torchvision.
        processor = AutoImageProcessor.from_pretrained(source, revision=revision, backend="pil")
        return Vision(network, _preparation(processor), source)


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """What transformers raises, as a TesseraError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise TesseraError(
            f"cannot load the vision network '{source}': {reason}\n"
            "give a folder that holds config.json, model.safetensors and preprocessor_config.json, or a hub id this "
            "machine can reach"
        ) from None


def _preparation(processor: Any) -> Preparation:
    """What an image processor of transformers would do. Raises ValueError if that is not known here."""

    def told(name: str, default: Any = None) -> Any:
        value = getattr(processor, name, None)
        return default if value is None else value

    if not told("do_resize"):
        raise ValueError("its preprocessing does not resize")
    size = _size(processor.size)
    crop = _size(processor.crop_size) if told("do_center_crop") else None
    share = told("crop_pct")  # of ConvNeXt, in whose files an edge below 384 is what is left of a larger picture
    if share and isinstance(size, int):
        size, crop = (int(size / share), (size, size)) if size < 384 else ((size, size), None)
    if isinstance(crop, int):
        crop = (crop, crop)
    if processor.resample not in FILTERS:
        raise ValueError(f"its preprocessing resizes by filter {processor.resample}; known are {FILTERS}")
    scale = 255 * told("rescale_factor", 1 / 255) if told("do_rescale", True) else 255.0
    mean, std = (processor.image_mean, processor.image_std) if told("do_normalize") else ((0.0,) * 3, (1.0,) * 3)
    return Preparation(
        size, FILTERS[int(processor.resample)], crop, tuple(m / scale for m in mean), tuple(s / scale for s in std)
    )


def _size(told: Any) -> tuple[int, int] | int:
    """A size of transformers: of both sides, or of the shorter one."""
    sizes = dict(told)
    if set(sizes) == {"height", "width"}:
        return sizes["height"], sizes["width"]
    if set(sizes) == {"shortest_edge"}:
        return sizes["shortest_edge"]
    raise ValueError(f"its preprocessing asks for the size {sizes}; known are height and width, or shortest_edge")
