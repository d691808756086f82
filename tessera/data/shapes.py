"""The rendered data set: 32 x 32 images of one or two plain shapes, whose content and positions are known exactly.

Shapes: N scenes, P phases in eighths of a pixel, W pixels of the window that holds a mask.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt, SerializerFunctionWrapHandler, model_serializer

from tessera import randomness
from tessera.errors import TesseraError
from tessera.settings import Settings

if TYPE_CHECKING:
    from tessera.data.captions import EncodedCaptions

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = {  # far apart, and none near the middle of two others, so that a mixture is never mistaken for a color
    "red": (215, 40, 40),
    "green": (30, 155, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 200, 30),
    "purple": (170, 50, 190),
    "cyan": (60, 195, 225),
}
SIZES = {"small": 4.0, "large": 6.0}  # from the centroid to the farthest side, in pixels
RELATIONS = ("left of", "right of", "above", "below")
CLASSES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
# Never seen by a model trained with combinations: known, which sees each color in at least four other shapes.
HELD_OUT = ("red triangle", "green ring", "blue circle", "yellow square", "purple cross")
COMBINATIONS = {  # class ids of the objects
    "all": tuple(range(len(CLASSES))),
    "known": tuple(label for label, name in enumerate(CLASSES) if name not in HELD_OUT),
    "held-out": tuple(CLASSES.index(name) for name in HELD_OUT),
}

SIDE = 32
BORDER, GAP = 1.5, 2.0  # free pixels at the edge of the image and between two objects
BACKGROUNDS = range(226, 248, 2)  # levels of gray; those of the test split are odd, so no image is in both
STREAMS = {"train": 0x73687472, "test": 0x73687465}  # random streams

GRID = 8  # positions are multiples of 1 / GRID of a pixel
WINDOW, PHASES = 14, 16  # pixels from -7 to 7 around a whole number, and centers from -1 to 7/8 of a pixel from it
PAD = WINDOW // 2 + 1
_SAMPLES = 16  # along each side of a pixel


@dataclass(frozen=True)
class Appearance:
    """An object without its position."""

    shape: str
    color: str
    size: str

    @property
    def combination(self) -> str:
        """The name of its class."""
        return f"{self.color} {self.shape}"

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Object(Appearance):
    """x, y: the centroid, in pixels from the left and from the top"""

    x: float
    y: float


@dataclass(frozen=True)
class Description:
    """The content of a caption: one object, or two and where the first is relative to the second."""

    appearances: tuple[Appearance, ...]
    relation: str | None = None

    def __str__(self) -> str:
        return f" {self.relation} ".join(map(str, self.appearances))


@dataclass(frozen=True)
class Scene:
    """One or two objects, the subject first, on a level of gray."""

    objects: tuple[Object, ...]
    background: int = BACKGROUNDS[0]

    @property
    def description(self) -> Description:
        return Description(self.objects, relation(*self.objects) if len(self.objects) == 2 else None)


def relation(subject: Object, other: Object) -> str:
    """Where the subject is relative to the other object, along the axis on which they are farther apart."""
    x, y = other.x - subject.x, other.y - subject.y
    if abs(x) > abs(y):
        return "left of" if x > 0 else "right of"
    return "above" if y > 0 else "below"


_OBJECT = f"a ({'|'.join(SIZES)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(f"{_OBJECT}(?: ({'|'.join(RELATIONS)}) {_OBJECT})?")


def parse_caption(caption: str) -> Description:
    """The inverse of str(description). Raises TesseraError."""
    match = _CAPTION.fullmatch(caption)
    if match is None:
        raise TesseraError(
            f"'{caption}' is not a caption of shapes; expected for example 'a large red circle' or "
            "'a large red circle left of a small blue square'"
        )
    size, color, shape, where, *other = match.groups()
    first = Appearance(shape, color, size)
    return Description((first,)) if where is None else Description((first, Appearance(*reversed(other))), where)


class ShapesConfig(Settings):
    """Color, 32 x 32, one class per color and shape, never flipped: captions name left and right."""

    kind: Literal["shapes"] = "shapes"
    split: Literal["train", "test"] = Field(default="train", description="no image is in both")
    count: PositiveInt = Field(default=50_000, description="number of images; the first ones do not depend on it")
    combinations: Literal["all", "known", "held-out"] = Field(
        default="all",
        description=f"of color and shape, for every object: known is all but {', '.join(HELD_OUT)}, to train with, "
        "and held-out is these, to measure composition with",
    )

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the default of `combinations`: hashes of settings written before it existed stay valid."""
        settings = handler(self)
        return {name: value for name, value in settings.items() if (name, value) != ("combinations", "all")}

    @property
    def description(self) -> str:
        return f"shapes, split {self.split}" + f", {self.combinations} combinations" * (self.combinations != "all")

    @property
    def size(self) -> tuple[int, int]:
        return SIDE, SIDE

    @property
    def frames(self) -> None:
        return None

    @property
    def channels(self) -> Literal[3]:
        return 3

    @property
    def hflip(self) -> bool:
        return False

    def open(self) -> "ShapesDataset":
        return ShapesDataset(self)


class ShapesDataset:
    """Scenes as functions of split and index; images are rendered on demand.

    The class of a scene is the color and shape of its subject; the other object, if any, is of another class.
    """

    class_names = CLASSES
    text: "EncodedCaptions | None" = None
    image_sizes: np.ndarray | None = None

    def __init__(self, config: ShapesConfig) -> None:
        self.split, self._classes = config.split, COMBINATIONS[config.combinations]
        self._name = f"shapes {config.split}" + f" {config.combinations}" * (config.combinations != "all")
        self._objects, self._counts, self._backgrounds = _sample_scenes(config.split, config.count, self._classes)

    def __len__(self) -> int:
        return len(self._counts)

    def label(self, index: int) -> int:
        return self._classes[index % len(self._classes)]

    def name(self, index: int) -> str:
        return f"{self._name} {index}"

    def pixels(self, index: int) -> np.ndarray:
        return render(self.scene(index))

    def scene(self, index: int) -> Scene:
        rows = self._objects[index, : self._counts[index]].tolist()
        return Scene(tuple(_object(*row) for row in rows), int(self._backgrounds[index]))

    def caption(self, index: int) -> str:
        return str(self.scene(index).description)


def _object(label: int, size: int, x: int, y: int) -> Object:
    color, shape = CLASSES[label].split()
    return Object(shape, color, tuple(SIZES)[size], x / GRID, y / GRID)


def _sample_scenes(split: str, count: int, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first scenes of a split with objects of these classes: class, size, and grid position x, y of two objects,
    int16 [N, 2, 4]; the number of objects used [N]; the background [N]."""
    u = randomness.uniform(0, torch.arange(count), STREAMS[split], 10).numpy().astype(np.float64).T
    pair, horizontal, subject_first = u[:3] < 0.5
    background = np.asarray(BACKGROUNDS)[(u[3] * len(BACKGROUNDS)).astype(int)] + (split == "test")
    position = np.arange(count) % len(classes)
    other = (position + 1 + (u[4] * (len(classes) - 1)).astype(int)) % len(classes)
    label = np.asarray(classes)[np.stack((position, other))]  # [2, N]
    size = (u[5:7] < 0.5).astype(int)

    radius = np.asarray(tuple(SIZES.values()))[size]  # [2, N], as are low, high, along and across
    low, high = BORDER + radius, SIDE - BORDER - radius
    alone = _on_grid(low[0] + (high[0] - low[0]) * u[7])
    # Along the axis of the relation: one after the other, with the free space divided at random.
    apart = radius.sum(0) + GAP
    room = SIDE - 2 * BORDER - radius.sum(0) - apart
    start = np.where(subject_first, *low)
    first, second = (_on_grid(start + room * fraction) for fraction in np.sort(u[7:9], axis=0))
    second += apart
    along = np.where(subject_first, (first, second), (second, first))
    along[0] = np.where(pair, along[0], alone)
    # Across it: at most half as far apart, so that the relation is unambiguous.
    subject = _on_grid(low[0] + (high[0] - low[0]) * u[9])
    reach = _on_grid((second - first) / 2)
    least, most = np.maximum(low[1], subject - reach), np.minimum(high[1], subject + reach)
    across = np.stack((subject, _on_grid(least + (most - least) * u[8])))

    x, y = np.where(horizontal, (along, across), (across, along)) * GRID
    objects = np.stack((label, size, x, y), axis=-1).swapaxes(0, 1).astype(np.int16)
    return objects, np.where(pair, 2, 1), background


def _on_grid(position: np.ndarray) -> np.ndarray:
    """Round down, which keeps distances that are on the grid already."""
    return np.floor(position * GRID) / GRID


def render(scene: Scene) -> np.ndarray:
    """uint8 [3, 32, 32]; objects, whose centroids lie in the image, cover earlier ones and are cut off at the edge."""
    canvas = np.full((3, SIDE + 2 * PAD, SIDE + 2 * PAD), scene.background, np.float32)
    for item in scene.objects:
        (row, below), (column, beside) = cell(item.y), cell(item.x)
        mask = masks()[SHAPES.index(item.shape), tuple(SIZES).index(item.size), below, beside]
        top, left = row + PAD - WINDOW // 2, column + PAD - WINDOW // 2
        patch = canvas[:, top : top + WINDOW, left : left + WINDOW]
        patch += mask * (np.asarray(COLORS[item.color], np.float32)[:, None, None] - patch)
    return (canvas[:, PAD:-PAD, PAD:-PAD] + 0.5).astype(np.uint8)


def cell(position: float) -> tuple[int, int]:
    """The nearest whole number, and the phase index of the position's distance from it."""
    whole, phase = divmod(round(position * GRID) + GRID // 2, GRID)
    return whole, phase + (PHASES - GRID) // 2


@cache
def masks() -> np.ndarray:
    """The fraction of each pixel that a shape covers, float32 [shapes, sizes, P, P, W, W]: phases of y, of x, pixels.

    Counted from 16 x 16 samples per pixel. Sums over pixels at any phase are differences of one summed-area table.
    """
    extent = (WINDOW + 2) * _SAMPLES
    phase, pixel = np.arange(PHASES) - PHASES // 2, np.arange(WINDOW)
    start = (pixel + 1) * _SAMPLES - phase[:, None] * (_SAMPLES // GRID)  # [P, W]
    start, stop = start.ravel(), start.ravel() + _SAMPLES
    coordinates = ((np.arange(extent) + 0.5) / _SAMPLES - (WINDOW + 2) / 2).astype(np.float32)
    coverage = np.empty((len(SHAPES), len(SIZES), PHASES, PHASES, WINDOW, WINDOW), np.float32)
    for i, shape in enumerate(SHAPES):
        for j, radius in enumerate(SIZES.values()):
            sums = (
                np.pad(inside(shape, coordinates / radius, coordinates[:, None] / radius), ((1, 0), (1, 0)))
                .cumsum(0)
                .cumsum(1)
            )
            rows = sums[stop] - sums[start]
            counts = (rows[:, stop] - rows[:, start]).reshape(PHASES, WINDOW, PHASES, WINDOW)
            coverage[i, j] = counts.swapaxes(1, 2) / _SAMPLES**2
    return coverage


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points belong to a shape of radius 1 whose centroid is 0; y points down."""
    near, far = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
    match shape:
        case "circle":
            return x**2 + y**2 <= 1
        case "ring":
            return abs(x**2 + y**2 - 0.625) <= 0.375  # radius from a half to 1
        case "square":
            return far <= 1
        case "cross":
            return (far <= 1) & (near <= 1 / 3)
        case "triangle":
            return (abs(x) <= (y + 1) / 1.5) & (y <= 0.5)
    raise ValueError(shape)
