"""The judge of shapes: exact on real pictures, calm about small faults, and not to be fooled by broken pictures."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tessera.data.shapes import CLASSES, COLOURS, SIDE, SIZES, Object, Scene, ShapesConfig, ShapesSource, render
from tessera.evaluation.toy.shape_reader import Reading, ShapesEvaluator, read

COUNT = 2400


@pytest.fixture(scope="module")
def source() -> ShapesSource:
    return ShapesConfig(split="test", count=COUNT).open()


@pytest.fixture(scope="module")
def pictures(source) -> np.ndarray:
    return np.stack([source.pixels(index) for index in range(COUNT)]).transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def singles(source) -> list[Scene]:
    """Scenes of one object."""
    scenes = [source.scene(index) for index in range(COUNT)]
    return [scene for scene in scenes if len(scene.objects) == 1][:300]


def drawn(*scenes: Scene) -> np.ndarray:
    """uint8 [B, H, W, 3]"""
    return np.stack([render(scene) for scene in scenes]).transpose(0, 2, 3, 1)


def levels(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)


def other_colour(scene: Scene, step: int) -> Scene:
    """A scene of one object, which gets a colour some steps further on in the palette."""
    names = list(COLOURS)
    colour = names[(names.index(scene.objects[0].colour) + step) % len(names)]
    return replace(scene, objects=(replace(scene.objects[0], colour=colour),))


def impossible(pictures: np.ndarray) -> float:
    return ShapesEvaluator().judge(pictures, None)["impossible"].value


# Real pictures


def test_every_attribute_of_real_pictures_is_read(source, pictures):
    exact = 0
    for index, picture in enumerate(pictures):
        found = read(picture)
        exact += sorted(map(str, found.objects)) == sorted(map(str, source.scene(index).objects))
    assert exact / COUNT > 0.995
    judged = ShapesEvaluator().judge_captions(pictures, [source.caption(index) for index in range(COUNT)])
    assert set(judged) == {"shape", "colour", "size", "relation", "all", "impossible"}
    assert judged.pop("impossible").value < 0.005
    assert min(share.value for share in judged.values()) > 0.995


def test_positions_are_read_to_an_eighth_of_a_pixel(source, pictures):
    right = 0
    for index, picture in enumerate(pictures[:500]):
        found = {(one.x, one.y) for one in read(picture).objects}
        right += found == {(one.x, one.y) for one in source.scene(index).objects}
    assert right / 500 > 0.99


def blurred(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.7)))


def jpeg(picture: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="jpeg", quality=90)
    return np.asarray(Image.open(buffer))


@pytest.mark.parametrize(
    ("fault", "floor"), [("noise", 0.995), ("blur", 0.995), ("jpeg", 0.96), ("shift", 0.995), ("all but jpeg", 0.98)]
)
def test_small_faults_do_not_matter(source, pictures, fault, floor):
    random, pictures = np.random.default_rng(0), pictures[:600]
    if fault in ("blur", "all but jpeg"):
        pictures = np.stack([blurred(picture) for picture in pictures])
    if fault == "jpeg":
        pictures = np.stack([jpeg(picture) for picture in pictures])
    if fault in ("shift", "all but jpeg"):
        pictures = levels(pictures + random.choice([-10.0, 10.0], (len(pictures), 1, 1, 3)))
    if fault in ("noise", "all but jpeg"):
        pictures = levels(pictures + random.normal(0, 8, pictures.shape))
    captions = [source.caption(index) for index in range(len(pictures))]
    assert ShapesEvaluator().judge_captions(pictures, captions)["all"].value > floor


# Broken pictures


def test_noise_is_impossible():
    random = np.random.default_rng(0)
    assert impossible(random.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)) == 1
    assert impossible(levels(random.normal(236, 60, (200, 32, 32, 3)))) == 1


@pytest.mark.parametrize("level", [0, 128, 236, 255])
def test_blank_pictures_are_impossible(level):
    assert read(np.full((32, 32, 3), level, np.uint8)).impossible in ("no object", "background not pale grey")


def test_three_objects_are_impossible():
    corners = [Object("ring", "red", "small", 6, 6), Object("cross", "blue", "small", 26, 6)]
    corners += [Object("square", "green", "small", 6, 26), Object("circle", "cyan", "small", 26, 26)]
    for left_out in range(4):
        three = Scene(tuple(corners[:left_out] + corners[left_out + 1 :]))
        assert read(drawn(three)[0]) == Reading(impossible="3 objects")


def test_half_blends_are_impossible(pictures):
    one = pictures.astype(np.float32)
    assert impossible(levels((one[:600] + one[7:607]) / 2)) > 0.99
    assert impossible(levels(0.7 * one[:600] + 0.3 * one[7:607])) > 0.98


@pytest.mark.parametrize("lost", [1, 3])
def test_cut_objects_are_impossible(singles, lost):
    cut = []
    for scene in singles:
        one = scene.objects[0]
        place = SIZES[one.size] - lost
        cut += [replace(one, x=place), replace(one, x=SIDE - place), replace(one, y=place)]
    found = [read(picture) for picture in drawn(*(Scene((one,)) for one in cut))]
    assert np.mean([reading.impossible == "object cut by the border" for reading in found]) > 0.99


@pytest.mark.parametrize("step", [1, 2, 3])
def test_colours_half_way_to_another_are_impossible(singles, step):
    one, other = drawn(*singles), drawn(*(other_colour(scene, step) for scene in singles))
    found = [read(picture) for picture in levels((one.astype(np.float32) + other) / 2)]
    assert np.mean([reading.impossible.startswith("no known colour") for reading in found]) > 0.99


def test_objects_of_two_colours_are_impossible(singles):
    one, other = drawn(*singles), drawn(*(other_colour(scene, 1) for scene in singles))
    middle = np.array([round(scene.objects[0].x) for scene in singles])
    right = np.arange(SIDE) >= middle[:, None, None]  # of the object's centre, [B, 1, W]
    assert impossible(np.where(right[..., None], other, one)) > 0.97


def test_half_objects_and_unknown_shapes_are_impossible(singles):
    half, turned = [], []
    for scene in singles:
        (picture,) = drawn(scene)
        half.append(np.where((np.arange(SIDE) < round(scene.objects[0].x))[:, None], picture, scene.background))
        if scene.objects[0].shape in ("square", "cross", "triangle"):
            (picture,) = drawn(replace(scene, objects=(replace(scene.objects[0], x=16, y=16),)))
            fill = (scene.background,) * 3
            turned.append(np.asarray(Image.fromarray(picture).rotate(45, Image.Resampling.BICUBIC, fillcolor=fill)))
    for wrong in (half, turned):
        assert np.mean([read(picture.astype(np.uint8)).impossible == "no known shape" for picture in wrong]) > 0.98


def test_objects_that_touch_are_impossible(singles):
    both = [
        Scene((replace(scene.objects[0], x=10, y=16), Object("square", "blue", "large", 10 + reach, 16)))
        for scene in singles
        for reach in (6, 8)
        if scene.objects[0].shape != "triangle"
    ]
    assert impossible(drawn(*both)) > 0.99


def test_a_stain_is_impossible_and_a_single_wrong_pixel_is_not():
    scene = Scene((Object("ring", "purple", "large", 10, 10),), 240)
    (picture,) = drawn(scene)
    picture[25, 25] = 90
    assert not read(picture).impossible
    picture[25:28, 25] = 90
    assert read(picture).impossible == "stain on the background"
    (picture,) = drawn(scene)
    picture[20:28, 20:28] = 210  # a ghost too faint to be an object
    assert read(picture).impossible == "stain on the background"


# The judge


def test_the_ceiling_is_measured_on_the_test_split():
    assert ShapesEvaluator().ceiling > 0.995


def test_either_object_of_a_picture_may_be_the_one_asked_for():
    ring, cross = Object("ring", "red", "small", 8, 8), Object("cross", "cyan", "large", 22, 22)
    two, alone, broken = drawn(Scene((ring, cross)), Scene((cross,)), Scene((replace(cross, x=2),)))
    pictures = np.stack([two, two, two, alone, alone, broken])
    names = ["red ring", "cyan cross", "red cross", "red ring", "cyan cross", "cyan cross"]
    judged = ShapesEvaluator().judge(pictures, [CLASSES.index(name) for name in names])
    assert judged["as asked"].value == pytest.approx(3 / 6)
    assert judged["impossible"].value == pytest.approx(1 / 6)
    assert judged["as asked"].low < 3 / 6 < judged["as asked"].high
    assert set(ShapesEvaluator().judge(pictures, None)) == {"impossible"}


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("a small red ring left of a large cyan cross", ""),
        ("a large cyan cross right of a small red ring", ""),
        ("a large cyan cross left of a small red ring", "relation"),
        ("a small red ring above a large cyan cross", "relation"),
        ("a small blue ring left of a large cyan cross", "colour"),
        ("a small red circle left of a large cyan cross", "shape"),
        ("a small red ring left of a small cyan cross", "size"),
        ("a small cyan ring left of a large red cross", "colour"),
        ("a small red ring", "shape colour size"),
        ("a large cyan cross", "shape colour size"),
    ],
)
def test_captions_are_judged_part_by_part(caption, wrong):
    pictures = drawn(Scene((Object("cross", "cyan", "large", 22, 16), Object("ring", "red", "small", 8, 14))))
    judged = ShapesEvaluator().judge_captions(pictures, [caption])
    values = {key: share.value for key, share in judged.items()}
    assert values.pop("impossible") == 0
    assert values.pop("all") == (not wrong)
    assert ("relation" in values) == (" of " in caption or "above" in caption)
    assert {key for key, value in values.items() if value == 0} == set(wrong.split())


def test_in_an_impossible_picture_nothing_is_right():
    blank = np.full((1, 32, 32, 3), 236, np.uint8)
    judged = ShapesEvaluator().judge_captions(blank, ["a small red ring left of a large cyan cross"])
    assert {key: share.value for key, share in judged.items()} == {
        **dict.fromkeys(("shape", "colour", "size", "relation", "all"), 0.0),
        "impossible": 1.0,
    }
