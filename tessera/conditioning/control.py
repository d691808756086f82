"""Control images: edges, masks and others. What makes them of an image, and the fields of a condition that hold them.

Shapes: B rows, K controls, C channels, H W height and width, h w those of the latents.
"""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt
from torch import Tensor

from tessera.conditioning.fields import ConditionField
from tessera.settings import Settings, expand_kind


class ControlField(ConditionField):
    """Latents of control images, float32 [B, K, C, h, w]; NaN where a row has none.

    A network with controls needs no control image, so the field is none of its `condition_fields`.
    """

    null: ClassVar[float] = float("nan")
    data_name: ClassVar[str] = "controls"


class ControlStrengthField(ConditionField):
    """How strong each control is, float32 [B, K]. Unconditional rows keep theirs: they have no image."""

    def null_like(self, value: Tensor) -> Tensor:
        return value


class ControlImage(Settings, ABC):
    """What a control image shows of an image."""

    kind: str

    @abstractmethod
    def convert(self, image: Image.Image) -> Image.Image:
        """The control image of an image, of the same size."""

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [..., C, H, W] -> the control images, of the same shape"""
        channels = pixels.shape[-3]
        mode, result = {1: "L", 3: "RGB"}[channels], np.empty_like(pixels)
        for index in np.ndindex(pixels.shape[:-3]):
            image = Image.fromarray(pixels[index][0] if channels == 1 else np.moveaxis(pixels[index], 0, -1))
            control = np.asarray(self.convert(image).convert(mode))
            result[index] = control if channels == 1 else np.moveaxis(control, -1, 0)
        return result


class Edges(ControlImage):
    """Outlines, white on black: the largest gradient of the channels, after a Gaussian blur."""

    kind: Literal["edges"] = "edges"  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)
    sigma: PositiveFloat = Field(default=1.0, description="standard deviation of the blur, in pixels")

    def convert(self, image: Image.Image) -> Image.Image:
        from scipy.ndimage import gaussian_gradient_magnitude

        # A step from black to white has the gradient 255 / (sqrt(2 pi) sigma): a contrast of 60 % is white.
        channels = [np.asarray(channel, np.float32) for channel in image.split()]
        edges = np.max([gaussian_gradient_magnitude(channel, self.sigma) for channel in channels], axis=0)
        return Image.fromarray((edges * 4 * self.sigma).clip(0, 255).astype(np.uint8))


class Grey(ControlImage):
    """The image without its colors."""

    kind: Literal["grey"] = "grey"  # pyright: ignore[reportIncompatibleVariableOverride]

    def convert(self, image: Image.Image) -> Image.Image:
        return image.convert("L")


class LowResolution(ControlImage):
    """The image reduced, and enlarged to its size again."""

    kind: Literal["low-resolution"] = "low-resolution"  # pyright: ignore[reportIncompatibleVariableOverride]
    factor: PositiveInt = Field(default=4, description="by which height and width are reduced")
    enlargement: ClassVar[Image.Resampling] = Image.Resampling.BICUBIC

    def convert(self, image: Image.Image) -> Image.Image:
        width, height = (max(1, side // self.factor) for side in image.size)
        return image.resize((width, height), Image.Resampling.BOX).resize(image.size, self.enlargement)


class Blocks(LowResolution):
    """Blocks of one color each."""

    kind: Literal["blocks"] = "blocks"  # pyright: ignore[reportIncompatibleVariableOverride]
    enlargement: ClassVar[Image.Resampling] = Image.Resampling.NEAREST


class Mask(ControlImage):
    """White where the image is darker than a threshold, else black."""

    kind: Literal["mask"] = "mask"  # pyright: ignore[reportIncompatibleVariableOverride]
    threshold: int = Field(default=128, ge=1, le=255, description="the gray level below which the mask is white")

    def convert(self, image: Image.Image) -> Image.Image:
        return image.convert("L").point([255] * self.threshold + [0] * (256 - self.threshold))


class Paired(ControlImage):
    """An image of a folder with one for each training image, of the same name."""

    kind: Literal["paired"] = "paired"  # pyright: ignore[reportIncompatibleVariableOverride]
    path: str = Field(description="the folder; below it, each image has the path that it has in the data")

    def convert(self, image: Image.Image) -> Image.Image:
        """The image as it is: it cannot be made of another, so what a user gives is one."""
        return image


class Unchanged(ControlImage):
    """The image itself, for image prompts."""

    kind: Literal["image"] = "image"  # pyright: ignore[reportIncompatibleVariableOverride]

    def convert(self, image: Image.Image) -> Image.Image:
        return image


AnyControlImage = Annotated[
    Edges | Grey | LowResolution | Blocks | Mask | Paired | Unchanged,
    BeforeValidator(expand_kind),
    Field(discriminator="kind"),
]
