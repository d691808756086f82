"""The judge of drawn shapes: reads what stands in a picture by comparing it with exact masks; nothing is learned.

A mask explains pixels up to a colour, so shape, size and position are found by least squares before the colour is
known. What is left unexplained makes a picture impossible.

Shapes: B pictures, H W height and width, K masks, W pixels of their window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import numpy as np

from tessera.data import shapes
from tessera.data.shapes import COLOURS, GRID, PAD, PHASES, SIZES, WINDOW, Description, Object, ShapesConfig, relation
from tessera.evaluation.intervals import Estimate

# Distances are Euclidean, in levels of RGB. The palest colour is 180 from the background, two colours are 127 apart.
VISIBLE = 60.0  # from the background: a third of a pixel covered by the palest colour
OFF_COLOUR = 50.0  # from a colour of the palette: half-way to another is refused
# Means over 3 x 3 pixels: there noise and soft edges average out, and what is missing or too much does not.
STAIN = 35.0  # from the background
UNEXPLAINED = 0.3  # left by the mask, of the contrast; a mask of another shape leaves 0.35 (small circle, square: 0.29)
PALEST, UNEVEN = 200, 24.0  # the darkest level of a background, and how far its typical pixel may be from its middle
SEARCHED = 2  # phases to each side of the measured centre


@dataclass(frozen=True)
class Reading:
    """The objects found, or why the picture cannot be of this data: then there are none."""

    objects: tuple[Object, ...] = ()
    impossible: str = ""


class _Impossible(Exception):
    """The text says why."""


def read(picture: np.ndarray) -> Reading:
    """What stands in a picture uint8 [H, W, 3], whatever was asked for."""
    try:
        return Reading(_objects(picture.astype(np.float32)))
    except _Impossible as reason:
        return Reading(impossible=str(reason))


def _objects(picture: np.ndarray) -> tuple[Object, ...]:
    background = _background(picture)
    delta = picture - background
    visible = np.linalg.norm(delta, axis=-1) > VISIBLE
    parts = [part for part in _components(visible) if part.sum() > 3]  # what is smaller may only be a stain
    if not parts:
        raise _Impossible("no object")
    if len(parts) > 2:
        raise _Impossible(f"{len(parts)} objects")
    if _rim(visible).any():
        raise _Impossible("object cut by the border")
    parts = [_grown(part) for part in parts]  # with the soft edge around it
    rest = np.where(np.any(parts, axis=0)[..., None], 0, delta)
    if np.linalg.norm(_box_mean(rest), axis=-1).max() > STAIN:
        raise _Impossible("stain on the background")
    return tuple(_object(delta * part[..., None], background) for part in parts)


def _background(picture: np.ndarray) -> np.ndarray:
    """The middle colour of the rim, float [3]."""
    rim = _rim(picture)
    middle = np.median(rim, axis=0)
    if np.median(np.linalg.norm(rim - middle, axis=-1)) > UNEVEN:
        raise _Impossible("background not plain")
    if middle.min() < PALEST or np.ptp(middle) > OFF_COLOUR:
        raise _Impossible("background not pale grey")
    return middle


def _object(delta: np.ndarray, background: np.ndarray) -> Object:
    """The object whose mask explains most; delta [H, W, 3] is what differs from the background, elsewhere 0."""
    weight = np.linalg.norm(delta, axis=-1)
    y, x = (float(np.average(at + 0.5, weights=weight)) for at in np.indices(weight.shape))
    (row, below), (column, beside) = shapes.cell(y), shapes.cell(x)
    rest = np.pad(delta, ((PAD, PAD), (PAD, PAD), (0, 0)))
    top, left = row + PAD - WINDOW // 2, column + PAD - WINDOW // 2
    window = rest[top : top + WINDOW, left : left + WINDOW]  # a view
    below, beside = below - SEARCHED, beside - SEARCHED
    masks = shapes.masks()[:, :, below : below + 2 * SEARCHED + 1, beside : beside + 2 * SEARCHED + 1]
    kinds, masks = masks.shape[:4], masks.reshape(-1, WINDOW**2)  # [K, W * W]

    matched, energy = masks @ window.reshape(-1, 3), (masks**2).sum(1)  # [K, 3], [K]
    best = ((matched**2).sum(1) / energy).argmax()
    contrast = matched[best] / energy[best]
    window -= masks[best].reshape(WINDOW, WINDOW, 1) * contrast
    if np.linalg.norm(_box_mean(rest), axis=-1).max() > UNEXPLAINED * np.linalg.norm(contrast):
        raise _Impossible("no known shape")
    # The colour from sums, which soft edges leave as they are.
    colour = _colour(background + delta.sum((0, 1)) / masks[best].sum())
    shape, size, down, right = (int(index) for index in np.unravel_index(best, kinds))
    y, x = row + (below + down - PHASES // 2) / GRID, column + (beside + right - PHASES // 2) / GRID
    return Object(shapes.SHAPES[shape], colour, tuple(SIZES)[size], x, y)


def _colour(found: np.ndarray) -> str:
    """The name of the nearest colour; found [3]."""
    distance = {name: float(np.linalg.norm(found - colour)) for name, colour in COLOURS.items()}
    nearest = min(distance, key=distance.__getitem__)
    if distance[nearest] > OFF_COLOUR:
        raise _Impossible(f"no known colour, nearest {nearest}")
    return nearest


def _rim(array: np.ndarray) -> np.ndarray:
    """The outermost pixels, [2 (H + W), ...]."""
    return np.concatenate((array[0], array[-1], array[:, 0], array[:, -1]))


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask [H, W], corners included."""
    found = []
    while mask.any():
        part, larger = np.zeros_like(mask), np.zeros_like(mask)
        larger.flat[mask.argmax()] = True
        while (larger != part).any():
            part, larger = larger, _grown(larger) & mask
        found.append(part)
        mask = mask & ~part
    return found


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask and the pixels around it."""
    tall = mask.copy()
    tall[1:] |= mask[:-1]
    tall[:-1] |= mask[1:]
    wide = tall.copy()
    wide[:, 1:] |= tall[:, :-1]
    wide[:, :-1] |= tall[:, 1:]
    return wide


def _box_mean(values: np.ndarray) -> np.ndarray:
    """Means over 3 x 3 pixels, [H, W, C]."""
    padded = np.pad(values, ((1, 1), (1, 1), (0, 0)))
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


class ShapesEvaluator:
    """Counts how many pictures hold what was asked for, and how many are impossible.

    `ceiling` is its share on real pictures of the test split: no drawing can be expected to be read better.
    """

    reads = "an object of the asked colour and shape, by comparison with exact masks"
    held_out = 1000

    @cached_property
    def ceiling(self) -> float:
        source = ShapesConfig(split="test", count=self.held_out).open()
        pictures = np.stack([source.pixels(i) for i in range(self.held_out)]).transpose(0, 2, 3, 1)
        return self.judge(pictures, [source.label(i) for i in range(self.held_out)])["as asked"].value

    def judge(self, pictures: np.ndarray, asked: Sequence[int] | None) -> dict[str, Estimate]:
        """pictures uint8 [B, H, W, 3] -> shares: "impossible", and "as asked" of those that hold an object of the class
        asked for and are possible."""
        readings = [read(picture) for picture in pictures]
        right = {}
        if asked is not None:
            classes = [shapes.CLASSES[label] for label in asked]
            right["as asked"] = [
                any(f"{one.colour} {one.shape}" == name for one in reading.objects)
                for reading, name in zip(readings, classes, strict=True)
            ]
        return _shares(right | {"impossible": [bool(reading.impossible) for reading in readings]})

    def judge_captions(self, pictures: np.ndarray, captions: Sequence[str]) -> dict[str, Estimate]:
        """pictures uint8 [B, H, W, 3] -> shares: "impossible", and those right in "shape", "colour" and "size" of every
        object, in "relation" (of the captions that tell one; absent if none does) and in "all".

        In a picture with another number of objects than asked for nothing is right.
        """
        readings = [read(picture) for picture in pictures]
        asked = [shapes.parse_caption(caption) for caption in captions]
        marks = [_marks(reading.objects, told) for reading, told in zip(readings, asked, strict=True)]
        right = {key: [mark[key] for mark in marks if key in mark] for key in ("shape", "colour", "size", "relation")}
        right["all"] = [all(mark.values()) for mark in marks]
        return _shares(right | {"impossible": [bool(reading.impossible) for reading in readings]})


def _marks(objects: Sequence[Object], asked: Description) -> dict[str, bool]:
    """What is right, each object taken for the one asked for that it resembles most."""
    told = ("shape", "colour", "size", *(("relation",) if asked.relation else ()))
    if len(objects) != len(asked.looks):
        return dict.fromkeys(told, False)
    best, most = {}, (-1, False)
    for order in permutations(objects):
        right = {
            key: [getattr(one, key) == getattr(look, key) for one, look in zip(order, asked.looks)] for key in told[:3]
        }
        marks = {key: all(hits) for key, hits in right.items()}
        if asked.relation:
            marks["relation"] = relation(*order) == asked.relation
        resemblance = sum(map(sum, right.values())), marks.get("relation", True)
        if resemblance > most:
            best, most = marks, resemblance
    return best


def _shares(hits: dict[str, list[bool]]) -> dict[str, Estimate]:
    return {key: Estimate.proportion(sum(row), len(row)) for key, row in hits.items() if row}
