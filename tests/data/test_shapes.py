"""The drawn shapes: functions of split and index, balanced, inside and apart, and told by their captions."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest

from tessera.data import ShapesConfig
from tessera.data.shapes import (
    BORDER,
    CLASSES,
    COLOURS,
    GAP,
    GRID,
    RELATIONS,
    SHAPES,
    SIDE,
    SIZES,
    Description,
    Look,
    Object,
    Scene,
    masks,
    parse_caption,
    relation,
    render,
)
from tessera.errors import TesseraError

SPLITS = ("train", "test")
COUNT = 6000


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Those of both splits."""
    sources = [ShapesConfig(split=split, count=COUNT).open() for split in SPLITS]
    return [source.scene(index) for source in sources for index in range(COUNT)]


@pytest.fixture(scope="module")
def pairs(scenes) -> list[Scene]:
    return [scene for scene in scenes if len(scene.objects) == 2]


# Source


def test_pixels_are_what_the_loader_expects():
    source = ShapesConfig(count=3).open()
    assert len(source) == 3
    assert source.pixels(2).shape == (3, 32, 32)
    assert source.pixels(2).dtype == np.uint8
    assert source.name(2) == "shapes train 2"
    assert (ShapesConfig().size, ShapesConfig().channels, ShapesConfig().flip) == ((32, 32), 3, False)
    assert len(ShapesConfig().open()) == 50_000


@pytest.mark.parametrize("split", SPLITS)
def test_a_picture_depends_on_nothing_but_split_and_index(split):
    many, few = ShapesConfig(split=split, count=500).open(), ShapesConfig(split=split, count=40).open()
    for index in (39, 0, 17, 39):
        assert many.scene(index) == few.scene(index)
        np.testing.assert_array_equal(many.pixels(index), few.pixels(index))


def test_the_scenes_never_change():
    """Else a model would be judged on what another version of it learned from."""
    objects = (Object("circle", "red", "large", 23.5, 20.375), Object("cross", "yellow", "small", 20.875, 7.0))
    assert ShapesConfig().open().scene(0) == Scene(objects, 238)
    objects = (Object("circle", "green", "large", 13.625, 23.375), Object("cross", "cyan", "small", 13.375, 8.875))
    assert ShapesConfig(split="test").open().scene(5) == Scene(objects, 231)


def test_no_picture_is_in_both_splits(scenes):
    train, test = scenes[:COUNT], scenes[COUNT:]
    assert {scene.background % 2 for scene in train} == {0}
    assert {scene.background % 2 for scene in test} == {1}
    assert not {scene.objects for scene in train[:1000]} & {scene.objects for scene in test[:1000]}
    for scene in scenes[:50]:
        assert (render(scene)[:, 0] == scene.background).all()


def test_every_picture_is_another():
    source = ShapesConfig(count=2000).open()
    assert len({source.pixels(index).tobytes() for index in range(2000)}) == 2000


@pytest.mark.parametrize("split", SPLITS)
def test_classes_are_colour_and_shape_of_the_subject_and_balanced(split):
    source = ShapesConfig(split=split, count=10 * len(CLASSES)).open()
    assert source.class_names == tuple(f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES))
    assert set(Counter(source.label(index) for index in range(len(source))).values()) == {10}
    for index in range(len(source)):
        subject = source.scene(index).objects[0]
        assert source.class_names[source.label(index)] == f"{subject.colour} {subject.shape}"


# Scenes


def shares(values) -> dict:
    counts = Counter(values)
    return {value: count / counts.total() for value, count in counts.items()}


def test_attributes_are_evenly_spread(scenes, pairs):
    assert len(pairs) / len(scenes) == pytest.approx(0.5, abs=0.02)
    assert shares(scene.objects[0].size for scene in scenes) == pytest.approx(dict.fromkeys(SIZES, 0.5), abs=0.02)
    told = shares(scene.description.relation for scene in pairs)
    assert told == pytest.approx(dict.fromkeys(RELATIONS, 0.25), abs=0.03)
    others = shares((scene.objects[1].colour, scene.objects[1].shape) for scene in pairs)
    assert others == pytest.approx(dict.fromkeys(product(COLOURS, SHAPES), 1 / len(CLASSES)), abs=0.01)
    assert len({scene.background for scene in scenes}) == 22


def test_the_two_objects_are_of_two_classes(pairs):
    for scene in pairs:
        one, other = scene.objects
        assert (one.colour, one.shape) != (other.colour, other.shape)


def test_objects_stay_inside_and_apart(scenes, pairs):
    for scene in scenes:
        for one in scene.objects:
            reach = SIZES[one.size] + BORDER
            assert reach <= min(one.x, one.y) <= max(one.x, one.y) <= SIDE - reach
            assert (one.x * GRID).is_integer()
            assert (one.y * GRID).is_integer()
    for scene in pairs:
        one, other = scene.objects
        main = max(abs(one.x - other.x), abs(one.y - other.y))
        assert main >= SIZES[one.size] + SIZES[other.size] + GAP


def test_relations_are_beyond_doubt(pairs):
    for scene in pairs:
        one, other = scene.objects
        across, main = sorted((abs(one.x - other.x), abs(one.y - other.y)))
        assert across <= main / 2


def test_objects_reach_all_of_the_picture(scenes):
    small = np.array([(one.x, one.y) for scene in scenes for one in scene.objects if one.size == "small"])
    lowest = BORDER + SIZES["small"]
    assert small.min(0) == pytest.approx([lowest, lowest], abs=0.2)
    assert small.max(0) == pytest.approx([SIDE - lowest, SIDE - lowest], abs=0.2)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [(9, 1, "left of"), (-9, 1, "right of"), (1, 9, "above"), (-1, -9, "below"), (9, 8, "left of"), (8, -9, "below")],
)
def test_relations_are_told_by_the_longer_axis(x, y, expected):
    subject, other = Object("ring", "red", "small", 16, 16), Object("ring", "blue", "small", 16 + x, 16 + y)
    assert relation(subject, other) == expected


# Pictures


@pytest.mark.parametrize(
    ("shape", "area"),
    [("circle", math.pi), ("square", 4), ("triangle", 1.5), ("cross", 20 / 9), ("ring", 0.75 * math.pi)],
)
@pytest.mark.parametrize("size", SIZES)
def test_masks_have_the_area_of_their_shape_and_their_centre_where_they_say(shape, area, size):
    found = masks()[SHAPES.index(shape), tuple(SIZES).index(size)]
    assert found.min() == 0
    assert found.max() == 1
    np.testing.assert_allclose(found.sum((2, 3)), area * SIZES[size] ** 2, rtol=0.02)
    pixels = np.arange(found.shape[-1]) + 0.5 - found.shape[-1] / 2
    phases = (np.arange(len(found)) - len(found) / 2) / GRID
    centres = np.einsum("pqij,j->pq", found, pixels) / found.sum((2, 3))
    np.testing.assert_allclose(centres, np.broadcast_to(phases, centres.shape), atol=0.06)
    centres = np.einsum("pqij,i->pq", found, pixels) / found.sum((2, 3))
    np.testing.assert_allclose(centres, np.broadcast_to(phases[:, None], centres.shape), atol=0.06)


def test_a_square_covers_exactly_its_pixels():
    picture = render(Scene((Object("square", "blue", "small", 10, 20.5),), 240)).astype(int)
    assert (picture[:, 17:24, 6:14] == np.array(COLOURS["blue"])[:, None, None]).all()
    for row in (16, 24):  # half covered
        assert picture[:, row, 6] == pytest.approx((np.array(COLOURS["blue"]) + 240) / 2, abs=0.5)
    picture[:, 16:25, 6:14] = 240
    assert (picture == 240).all()


def test_a_triangle_points_up():
    picture = render(Scene((Object("triangle", "red", "large", 16, 16),), 240))[2].astype(int)
    widths = (240 - picture[10:19]).sum(1)
    assert (np.diff(widths) > 0).all()
    np.testing.assert_array_equal(picture[:, :16], picture[:, :15:-1])


def test_a_shift_by_whole_pixels_shifts_the_picture():
    one, other = (render(Scene((Object("cross", "cyan", "large", x, 14.125),))) for x in (10.625, 13.625))
    np.testing.assert_array_equal(one[:, :, :-3], other[:, :, 3:])


# Captions


def test_captions_parse_back(scenes):
    for scene in scenes[:500]:
        told, asked = parse_caption(str(scene.description)), scene.description
        assert str(told) == str(asked)
        assert told.relation == asked.relation
        for look, one in zip(told.looks, scene.objects, strict=True):
            assert (look.shape, look.colour, look.size) == (one.shape, one.colour, one.size)


def test_captions_in_words():
    circle, square = Look("circle", "red", "large"), Look("square", "blue", "small")
    assert parse_caption("a large red circle") == Description((circle,))
    both = parse_caption("a large red circle left of a small blue square")
    assert both == Description((circle, square), "left of")
    assert ShapesConfig().open().caption(1) == "a large red square left of a small blue circle"


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle",
        "a large red circle ",
        "a large red circle left of",
        "a large red circle near a small red ring",
    ],
)
def test_other_captions_are_an_error_that_shows_the_form(caption):
    with pytest.raises(TesseraError, match="is no caption of shapes; write for example 'a large red circle'"):
        parse_caption(caption)
