"""The oracle of the shapes data set: detects the objects of an image by comparison with exact masks, without training.

A mask explains pixels up to a color. So shape, size and position are found by least squares before the color is known.
Pixels that remain unexplained make an image invalid.

Shapes: B images, H W height and width, K masks, W pixels of their window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import numpy as np

from tessera.data import shapes
from tessera.data.shapes import COLORS, GRID, PAD, PHASES, SIZES, WINDOW, Description, Object, ShapesConfig, relation
from tessera.reporting.estimates import Estimate

# Distances are Euclidean, in levels of RGB. The palest color is 180 from the background, two colors are 127 apart.
VISIBLE = 60.0  # from the background: a third of a pixel covered by the palest color
OFF_COLOR = 50.0  # from a color of the palette: less than half the distance to another color
# Means over 3 x 3 pixels, where noise and soft edges average out, but missing and extra parts do not.
STAIN = 35.0  # from the background
UNEXPLAINED = 0.3  # residual over contrast; the mask of another shape leaves 0.35 (small circle as square: 0.29)
MIN_LEVEL, UNEVEN = 200, 24.0  # the darkest level of a background; distance of its median pixel from its median color
SEARCH_RADIUS = 2  # phases to each side of the measured center


@dataclass(frozen=True)
class Detection:
    """The objects of an image, or the reason why the image cannot be from this data set (then there are no objects)."""

    objects: tuple[Object, ...] = ()
    invalid_reason: str = ""


class _Invalid(Exception):
    """Raised with the reason."""


def detect(image: np.ndarray) -> Detection:
    """The objects in an image uint8 [H, W, 3]."""
    try:
        return Detection(_detect_objects(image.astype(np.float32)))
    except _Invalid as reason:
        return Detection(invalid_reason=str(reason))


def _detect_objects(image: np.ndarray) -> tuple[Object, ...]:
    background = _background(image)
    delta = image - background
    visible = np.linalg.norm(delta, axis=-1) > VISIBLE
    parts = [part for part in _components(visible) if part.sum() > 3]  # smaller ones may be stains
    if not parts:
        raise _Invalid("no object")
    if len(parts) > 2:
        raise _Invalid(f"{len(parts)} objects")
    if _border(visible).any():
        raise _Invalid("object cut by the border")
    parts = [_dilate(part) for part in parts]  # with their soft edges
    residual = np.where(np.any(parts, axis=0)[..., None], 0, delta)
    if np.linalg.norm(_box_mean(residual), axis=-1).max() > STAIN:
        raise _Invalid("stain on the background")
    return tuple(_fit_object(delta * part[..., None], background) for part in parts)


def _background(image: np.ndarray) -> np.ndarray:
    """The median color of the border, float [3]."""
    border = _border(image)
    median = np.median(border, axis=0)
    if np.median(np.linalg.norm(border - median, axis=-1)) > UNEVEN:
        raise _Invalid("background not plain")
    if median.min() < MIN_LEVEL or np.ptp(median) > OFF_COLOR:
        raise _Invalid("background not pale gray")
    return median


def _fit_object(delta: np.ndarray, background: np.ndarray) -> Object:
    """The object whose mask explains most; delta [H, W, 3] is the difference from the background, 0 elsewhere."""
    weight = np.linalg.norm(delta, axis=-1)
    y, x = (float(np.average(position + 0.5, weights=weight)) for position in np.indices(weight.shape))
    (row, phase_y), (column, phase_x) = shapes.cell(y), shapes.cell(x)
    residual = np.pad(delta, ((PAD, PAD), (PAD, PAD), (0, 0)))
    top, left = row + PAD - WINDOW // 2, column + PAD - WINDOW // 2
    window = residual[top : top + WINDOW, left : left + WINDOW]  # a view
    phase_y, phase_x = phase_y - SEARCH_RADIUS, phase_x - SEARCH_RADIUS
    count = 2 * SEARCH_RADIUS + 1
    masks = shapes.masks()[:, :, phase_y : phase_y + count, phase_x : phase_x + count]
    layout, masks = masks.shape[:4], masks.reshape(-1, WINDOW**2)  # [K, W * W]

    matched, energy = masks @ window.reshape(-1, 3), (masks**2).sum(1)  # [K, 3], [K]
    best = ((matched**2).sum(1) / energy).argmax()
    contrast = matched[best] / energy[best]
    window -= masks[best].reshape(WINDOW, WINDOW, 1) * contrast
    if np.linalg.norm(_box_mean(residual), axis=-1).max() > UNEXPLAINED * np.linalg.norm(contrast):
        raise _Invalid("no known shape")
    color = _nearest_color(background + delta.sum((0, 1)) / masks[best].sum())  # soft edges do not change sums
    shape, size, down, right = (int(index) for index in np.unravel_index(best, layout))
    y, x = row + (phase_y + down - PHASES // 2) / GRID, column + (phase_x + right - PHASES // 2) / GRID
    return Object(shapes.SHAPES[shape], color, tuple(SIZES)[size], x, y)


def _nearest_color(color: np.ndarray) -> str:
    """The name of the palette's nearest color; color [3]."""
    distance = {name: float(np.linalg.norm(color - rgb)) for name, rgb in COLORS.items()}
    nearest = min(distance, key=distance.__getitem__)
    if distance[nearest] > OFF_COLOR:
        raise _Invalid(f"no known color, nearest {nearest}")
    return nearest


def _border(array: np.ndarray) -> np.ndarray:
    """The outermost pixels, [2 (H + W), ...]."""
    return np.concatenate((array[0], array[-1], array[:, 0], array[:, -1]))


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """The connected components of a mask [H, W], including diagonal neighbors."""
    components = []
    while mask.any():
        part, larger = np.zeros_like(mask), np.zeros_like(mask)
        larger.flat[mask.argmax()] = True
        while (larger != part).any():
            part, larger = larger, _dilate(larger) & mask
        components.append(part)
        mask = mask & ~part
    return components


def _dilate(mask: np.ndarray) -> np.ndarray:
    """The mask and the pixels around it."""
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
    """Measures the fraction of images that show the requested object, and the fraction that is invalid.

    `real_accuracy` is its accuracy on real images of the test split: generated ones cannot be expected to do better.
    """

    description = "an object of the requested color and shape, by comparison with exact masks"
    num_real = 1000

    @cached_property
    def real_accuracy(self) -> float:
        dataset = ShapesConfig(split="test", count=self.num_real).open()
        images = np.stack([dataset.pixels(i) for i in range(self.num_real)]).transpose(0, 2, 3, 1)
        return self.score(images, [dataset.label(i) for i in range(self.num_real)])["accuracy"].value

    def score(self, images: np.ndarray, labels: Sequence[int] | None) -> dict[str, Estimate]:
        """images uint8 [B, H, W, 3] -> fractions: "invalid", and with labels "accuracy", the valid images that show an
        object of their class.
        """
        detections = [detect(image) for image in images]
        hits = {}
        if labels is not None:
            hits["accuracy"] = [
                any(f"{item.color} {item.shape}" == shapes.CLASSES[label] for item in detection.objects)
                for detection, label in zip(detections, labels, strict=True)
            ]
        return _fractions(hits | {"invalid": [bool(detection.invalid_reason) for detection in detections]})


def compare(objects: Sequence[Object], expected: Description) -> dict[str, bool]:
    """What objects show of a caption: shape, color and size of every object; relation, of captions with one; whole:
    all of these. With objects assigned to the expected ones so that most is correct.

    binding: color and shape of every object together. swapped: the same after the colors of two objects are exchanged.
    With the wrong number of objects nothing is correct.
    """
    pairs = [(item.color, item.shape) for item in expected.appearances]
    colors, names = zip(*pairs)
    swapped = list(zip(reversed(colors), names))
    shown = [(item.color, item.shape) for item in objects]
    result = _matches(objects, expected)
    result["whole"] = all(result.values())
    result["binding"] = sorted(shown) == sorted(pairs)
    result["swapped"] = len(pairs) == 2 and sorted(shown) == sorted(swapped)
    return result


def _matches(objects: Sequence[Object], expected: Description) -> dict[str, bool]:
    attributes = ("shape", "color", "size")
    if len(objects) != len(expected.appearances):
        return dict.fromkeys((*attributes, "relation") if expected.relation else attributes, False)
    best, best_rank = {}, (-1, False)
    for order in permutations(objects):
        equal = {
            key: [getattr(item, key) == getattr(other, key) for item, other in zip(order, expected.appearances)]
            for key in attributes
        }
        result = {key: all(values) for key, values in equal.items()}
        if expected.relation:
            result["relation"] = relation(*order) == expected.relation
        rank = sum(map(sum, equal.values())), result.get("relation", True)
        if rank > best_rank:
            best, best_rank = result, rank
    return best


def _fractions(hits: dict[str, list[bool]]) -> dict[str, Estimate]:
    return {key: Estimate.proportion(sum(values), len(values)) for key, values in hits.items() if values}
