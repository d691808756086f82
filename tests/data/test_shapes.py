"""The rendered shapes: functions of split and index, balanced, inside the image, apart, and described by captions."""

import hashlib
import math
from collections import Counter
from itertools import product

import numpy as np
import pytest

from tessera.data import ShapesConfig
from tessera.data.shapes import (
    BORDER,
    CLASSES,
    COLORS,
    GAP,
    GRID,
    HELD_OUT,
    RELATIONS,
    SHAPES,
    SIDE,
    SIZES,
    Appearance,
    Description,
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
    """The scenes of both splits."""
    datasets = [ShapesConfig(split=split, count=COUNT).open() for split in SPLITS]
    return [dataset.scene(index) for dataset in datasets for index in range(COUNT)]


@pytest.fixture(scope="module")
def pairs(scenes) -> list[Scene]:
    return [scene for scene in scenes if len(scene.objects) == 2]


# Data set


def test_pixels_are_what_the_loader_expects():
    dataset = ShapesConfig(count=3).open()
    assert len(dataset) == 3
    assert dataset.pixels(2).shape == (3, 32, 32)
    assert dataset.pixels(2).dtype == np.uint8
    assert dataset.name(2) == "shapes train 2"
    assert (ShapesConfig().size, ShapesConfig().channels, ShapesConfig().hflip) == ((32, 32), 3, False)
    assert len(ShapesConfig().open()) == 50_000


@pytest.mark.parametrize("split", SPLITS)
def test_an_image_depends_on_split_and_index_only(split):
    many, few = ShapesConfig(split=split, count=500).open(), ShapesConfig(split=split, count=40).open()
    for index in (39, 0, 17, 39):
        assert many.scene(index) == few.scene(index)
        np.testing.assert_array_equal(many.pixels(index), few.pixels(index))


def test_the_scenes_never_change():
    """Otherwise a model could be scored on images that another version used for training."""
    objects = (Object("circle", "red", "large", 23.5, 20.375), Object("cross", "yellow", "small", 20.875, 7.0))
    assert ShapesConfig().open().scene(0) == Scene(objects, 238)
    objects = (Object("circle", "green", "large", 13.625, 23.375), Object("cross", "cyan", "small", 13.375, 8.875))
    assert ShapesConfig(split="test").open().scene(5) == Scene(objects, 231)


def test_no_image_is_in_both_splits(scenes):
    train, test = scenes[:COUNT], scenes[COUNT:]
    assert {scene.background % 2 for scene in train} == {0}
    assert {scene.background % 2 for scene in test} == {1}
    assert not {scene.objects for scene in train[:1000]} & {scene.objects for scene in test[:1000]}
    for scene in scenes[:50]:
        assert (render(scene)[:, 0] == scene.background).all()


def test_all_images_are_different():
    dataset = ShapesConfig(count=2000).open()
    assert len({dataset.pixels(index).tobytes() for index in range(2000)}) == 2000


@pytest.mark.parametrize("split", SPLITS)
def test_classes_are_color_and_shape_of_the_subject_and_balanced(split):
    dataset = ShapesConfig(split=split, count=10 * len(CLASSES)).open()
    assert dataset.class_names == tuple(f"{color} {shape}" for color, shape in product(COLORS, SHAPES))
    assert set(Counter(dataset.label(index) for index in range(len(dataset))).values()) == {10}
    for index in range(len(dataset)):
        subject = dataset.scene(index).objects[0]
        assert dataset.class_names[dataset.label(index)] == f"{subject.color} {subject.shape}"


# Held-out combinations


def combinations(setting: str, count: int = 3000) -> list[set[str]]:
    """The combinations in each scene, by class names."""
    dataset = ShapesConfig(combinations=setting, count=count).open()
    return [{f"{one.color} {one.shape}" for one in dataset.scene(index).objects} for index in range(count)]


def test_held_out_combinations_never_occur_but_their_words_do():
    known = combinations("known")
    assert set().union(*known) == set(CLASSES) - set(HELD_OUT)
    colors, shapes = zip(*(name.split() for name in set().union(*known)))
    assert set(Counter(shapes).values()) == {len(COLORS) - 1}  # one color of each shape is held out
    assert min(Counter(colors).values()) >= len(SHAPES) - 1
    assert len(HELD_OUT) == len(CLASSES) / 6
    held_out = combinations("held-out")
    assert set().union(*held_out) == set(HELD_OUT)
    assert sum(len(names) == 2 for names in held_out) / len(held_out) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("setting", ["known", "held-out"])
def test_data_with_some_combinations_keep_the_classes_and_are_balanced(setting):
    dataset = ShapesConfig(combinations=setting, count=1000).open()
    assert dataset.class_names == CLASSES
    counts = Counter(dataset.class_names[dataset.label(index)] for index in range(1000))
    assert set(counts.values()) == {1000 // len(counts)}
    for index in range(50):
        subject = dataset.scene(index).objects[0]
        assert dataset.class_names[dataset.label(index)] == f"{subject.color} {subject.shape}"
    assert dataset.name(3) == f"shapes train {setting} 3"
    assert setting in ShapesConfig(combinations=setting).description


def test_the_setting_changes_neither_images_nor_hashes_where_it_is_not_used():
    digest = hashlib.sha256()
    dataset = ShapesConfig(split="test", count=200).open()
    for index in range(200):
        digest.update(dataset.pixels(index).tobytes() + dataset.caption(index).encode())
    assert digest.hexdigest()[:16] == "ac1a3dcb28f391c8"  # computed before the setting existed
    assert ShapesConfig().model_dump_json() == '{"kind":"shapes","split":"train","count":50000}'
    assert ShapesConfig(combinations="known").model_dump()["combinations"] == "known"


# Scenes


def fractions(values) -> dict:
    counts = Counter(values)
    return {value: count / counts.total() for value, count in counts.items()}


def test_attributes_are_evenly_spread(scenes, pairs):
    assert len(pairs) / len(scenes) == pytest.approx(0.5, abs=0.02)
    assert fractions(scene.objects[0].size for scene in scenes) == pytest.approx(dict.fromkeys(SIZES, 0.5), abs=0.02)
    relations = fractions(scene.description.relation for scene in pairs)
    assert relations == pytest.approx(dict.fromkeys(RELATIONS, 0.25), abs=0.03)
    others = fractions((scene.objects[1].color, scene.objects[1].shape) for scene in pairs)
    assert others == pytest.approx(dict.fromkeys(product(COLORS, SHAPES), 1 / len(CLASSES)), abs=0.01)
    assert len({scene.background for scene in scenes}) == 22


def test_the_two_objects_have_different_classes(pairs):
    for scene in pairs:
        one, other = scene.objects
        assert (one.color, one.shape) != (other.color, other.shape)


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


def test_relations_are_unambiguous(pairs):
    for scene in pairs:
        one, other = scene.objects
        across, main = sorted((abs(one.x - other.x), abs(one.y - other.y)))
        assert across <= main / 2


def test_objects_reach_all_of_the_image(scenes):
    small = np.array([(one.x, one.y) for scene in scenes for one in scene.objects if one.size == "small"])
    lowest = BORDER + SIZES["small"]
    assert small.min(0) == pytest.approx([lowest, lowest], abs=0.2)
    assert small.max(0) == pytest.approx([SIDE - lowest, SIDE - lowest], abs=0.2)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [(9, 1, "left of"), (-9, 1, "right of"), (1, 9, "above"), (-1, -9, "below"), (9, 8, "left of"), (8, -9, "below")],
)
def test_relations_follow_the_longer_axis(x, y, expected):
    subject, other = Object("ring", "red", "small", 16, 16), Object("ring", "blue", "small", 16 + x, 16 + y)
    assert relation(subject, other) == expected


# Images


@pytest.mark.parametrize(
    ("shape", "area"),
    [("circle", math.pi), ("square", 4), ("triangle", 1.5), ("cross", 20 / 9), ("ring", 0.75 * math.pi)],
)
@pytest.mark.parametrize("size", SIZES)
def test_masks_have_the_area_of_their_shape_and_the_right_centroid(shape, area, size):
    mask = masks()[SHAPES.index(shape), tuple(SIZES).index(size)]
    assert mask.min() == 0
    assert mask.max() == 1
    np.testing.assert_allclose(mask.sum((2, 3)), area * SIZES[size] ** 2, rtol=0.02)
    pixels = np.arange(mask.shape[-1]) + 0.5 - mask.shape[-1] / 2
    phases = (np.arange(len(mask)) - len(mask) / 2) / GRID
    centers = np.einsum("pqij,j->pq", mask, pixels) / mask.sum((2, 3))
    np.testing.assert_allclose(centers, np.broadcast_to(phases, centers.shape), atol=0.06)
    centers = np.einsum("pqij,i->pq", mask, pixels) / mask.sum((2, 3))
    np.testing.assert_allclose(centers, np.broadcast_to(phases[:, None], centers.shape), atol=0.06)


def test_a_square_covers_exactly_its_pixels():
    image = render(Scene((Object("square", "blue", "small", 10, 20.5),), 240)).astype(int)
    assert (image[:, 17:24, 6:14] == np.array(COLORS["blue"])[:, None, None]).all()
    for row in (16, 24):  # half covered
        assert image[:, row, 6] == pytest.approx((np.array(COLORS["blue"]) + 240) / 2, abs=0.5)
    image[:, 16:25, 6:14] = 240
    assert (image == 240).all()


def test_a_triangle_points_up():
    image = render(Scene((Object("triangle", "red", "large", 16, 16),), 240))[2].astype(int)
    widths = (240 - image[10:19]).sum(1)
    assert (np.diff(widths) > 0).all()
    np.testing.assert_array_equal(image[:, :16], image[:, :15:-1])


def test_a_shift_by_whole_pixels_shifts_the_image():
    one, other = (render(Scene((Object("cross", "cyan", "large", x, 14.125),))) for x in (10.625, 13.625))
    np.testing.assert_array_equal(one[:, :, :-3], other[:, :, 3:])


# Captions


def test_captions_parse_back(scenes):
    for scene in scenes[:500]:
        parsed, expected = parse_caption(str(scene.description)), scene.description
        assert str(parsed) == str(expected)
        assert parsed.relation == expected.relation
        for appearance, one in zip(parsed.appearances, scene.objects, strict=True):
            assert (appearance.shape, appearance.color, appearance.size) == (one.shape, one.color, one.size)


def test_captions_in_words():
    circle, square = Appearance("circle", "red", "large"), Appearance("square", "blue", "small")
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
def test_other_captions_are_an_error_with_an_example(caption):
    with pytest.raises(TesseraError, match="is not a caption of shapes; expected for example 'a large red circle'"):
        parse_caption(caption)
