"""The oracle of the shapes: exact on real images, robust to small faults, strict about invalid images."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tessera.data.shapes import (
    CLASSES,
    COLORS,
    SIDE,
    SIZES,
    Object,
    Scene,
    ShapesConfig,
    ShapesDataset,
    parse_caption,
    render,
)
from tessera.evaluation.toy.shape_reader import Detection, ShapesEvaluator, compare, detect

COUNT = 2400


@pytest.fixture(scope="module")
def dataset() -> ShapesDataset:
    return ShapesConfig(split="test", count=COUNT).open()


@pytest.fixture(scope="module")
def images(dataset) -> np.ndarray:
    return np.stack([dataset.pixels(index) for index in range(COUNT)]).transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def singles(dataset) -> list[Scene]:
    """Scenes of one object."""
    scenes = [dataset.scene(index) for index in range(COUNT)]
    return [scene for scene in scenes if len(scene.objects) == 1][:300]


def rendered(*scenes: Scene) -> np.ndarray:
    """uint8 [B, H, W, 3]"""
    return np.stack([render(scene) for scene in scenes]).transpose(0, 2, 3, 1)


def levels(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)


def other_color(scene: Scene, step: int) -> Scene:
    """A scene of one object with a color some steps later in the palette."""
    names = list(COLORS)
    color = names[(names.index(scene.objects[0].color) + step) % len(names)]
    return replace(scene, objects=(replace(scene.objects[0], color=color),))


def shown(images: np.ndarray, captions: list[str]) -> dict[str, float]:
    """The fraction of the images that show each part of their caption; of `relation`, of those with one."""
    results = [compare(detect(image).objects, parse_caption(caption)) for image, caption in zip(images, captions)]
    keys = {key for result in results for key in result}
    return {key: float(np.mean([result[key] for result in results if key in result])) for key in keys}


def invalid_fraction(images: np.ndarray) -> float:
    return ShapesEvaluator().score(images, None)["invalid"].value


# Real images


@pytest.mark.slow
def test_every_attribute_of_real_images_is_detected(dataset, images):
    exact = 0
    for index, image in enumerate(images):
        detection = detect(image)
        exact += sorted(map(str, detection.objects)) == sorted(map(str, dataset.scene(index).objects))
    assert exact / COUNT > 0.995
    scores = shown(images, [dataset.caption(index) for index in range(COUNT)])
    assert set(scores) == {"shape", "color", "size", "relation", "whole", "binding", "swapped"}
    assert scores.pop("swapped") < 0.25  # of objects of one color or one shape, the swapped caption is as right
    assert min(scores.values()) > 0.995
    assert invalid_fraction(images) < 0.005


def test_positions_are_exact_to_an_eighth_of_a_pixel(dataset, images):
    correct = 0
    for index, image in enumerate(images[:500]):
        positions = {(item.x, item.y) for item in detect(image).objects}
        correct += positions == {(item.x, item.y) for item in dataset.scene(index).objects}
    assert correct / 500 > 0.99


def blurred(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.7)))


def jpeg(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="jpeg", quality=90)
    return np.asarray(Image.open(buffer))


@pytest.mark.parametrize(
    ("fault", "floor"), [("noise", 0.995), ("blur", 0.995), ("jpeg", 0.96), ("shift", 0.995), ("all but jpeg", 0.98)]
)
def test_small_faults_do_not_matter(dataset, images, fault, floor):
    random, images = np.random.default_rng(0), images[:600]
    if fault in ("blur", "all but jpeg"):
        images = np.stack([blurred(image) for image in images])
    if fault == "jpeg":
        images = np.stack([jpeg(image) for image in images])
    if fault in ("shift", "all but jpeg"):
        images = levels(images + random.choice([-10.0, 10.0], (len(images), 1, 1, 3)))
    if fault in ("noise", "all but jpeg"):
        images = levels(images + random.normal(0, 8, images.shape))
    captions = [dataset.caption(index) for index in range(len(images))]
    assert shown(images, captions)["whole"] > floor


# Invalid images


def test_noise_is_invalid():
    random = np.random.default_rng(0)
    assert invalid_fraction(random.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)) == 1
    assert invalid_fraction(levels(random.normal(236, 60, (200, 32, 32, 3)))) == 1


@pytest.mark.parametrize("level", [0, 128, 236, 255])
def test_blank_images_are_invalid(level):
    assert detect(np.full((32, 32, 3), level, np.uint8)).invalid_reason in ("no object", "background not pale gray")


def test_three_objects_are_invalid():
    corners = [Object("ring", "red", "small", 6, 6), Object("cross", "blue", "small", 26, 6)]
    corners += [Object("square", "green", "small", 6, 26), Object("circle", "cyan", "small", 26, 26)]
    for omitted in range(4):
        three = Scene(tuple(corners[:omitted] + corners[omitted + 1 :]))
        assert detect(rendered(three)[0]) == Detection(invalid_reason="3 objects")


def test_blends_are_invalid(images):
    one = images.astype(np.float32)
    assert invalid_fraction(levels((one[:600] + one[7:607]) / 2)) > 0.99
    assert invalid_fraction(levels(0.7 * one[:600] + 0.3 * one[7:607])) > 0.98


@pytest.mark.parametrize("lost", [1, 3])
def test_cut_objects_are_invalid(singles, lost):
    cut = []
    for scene in singles:
        one = scene.objects[0]
        position = SIZES[one.size] - lost
        cut += [replace(one, x=position), replace(one, x=SIDE - position), replace(one, y=position)]
    detections = [detect(image) for image in rendered(*(Scene((one,)) for one in cut))]
    assert np.mean([detection.invalid_reason == "object cut by the border" for detection in detections]) > 0.99


@pytest.mark.parametrize("step", [1, 2, 3])
def test_colors_between_two_of_the_palette_are_invalid(singles, step):
    one, other = rendered(*singles), rendered(*(other_color(scene, step) for scene in singles))
    detections = [detect(image) for image in levels((one.astype(np.float32) + other) / 2)]
    assert np.mean([detection.invalid_reason.startswith("no known color") for detection in detections]) > 0.99


def test_objects_of_two_colors_are_invalid(singles):
    one, other = rendered(*singles), rendered(*(other_color(scene, 1) for scene in singles))
    middle = np.array([round(scene.objects[0].x) for scene in singles])
    right = np.arange(SIDE) >= middle[:, None, None]  # of the object's center, [B, 1, W]
    assert invalid_fraction(np.where(right[..., None], other, one)) > 0.97


def test_half_objects_and_unknown_shapes_are_invalid(singles):
    half, rotated = [], []
    for scene in singles:
        (image,) = rendered(scene)
        half.append(np.where((np.arange(SIDE) < round(scene.objects[0].x))[:, None], image, scene.background))
        if scene.objects[0].shape in ("square", "cross", "triangle"):
            (image,) = rendered(replace(scene, objects=(replace(scene.objects[0], x=16, y=16),)))
            fill = (scene.background,) * 3
            rotated.append(np.asarray(Image.fromarray(image).rotate(45, Image.Resampling.BICUBIC, fillcolor=fill)))
    for images in (half, rotated):
        assert np.mean([detect(image.astype(np.uint8)).invalid_reason == "no known shape" for image in images]) > 0.98


def test_touching_objects_are_invalid(singles):
    both = [
        Scene((replace(scene.objects[0], x=10, y=16), Object("square", "blue", "large", 10 + reach, 16)))
        for scene in singles
        for reach in (6, 8)
        if scene.objects[0].shape != "triangle"
    ]
    assert invalid_fraction(rendered(*both)) > 0.99


def test_a_stain_is_invalid_and_a_single_wrong_pixel_is_not():
    scene = Scene((Object("ring", "purple", "large", 10, 10),), 240)
    (image,) = rendered(scene)
    image[25, 25] = 90
    assert not detect(image).invalid_reason
    image[25:28, 25] = 90
    assert detect(image).invalid_reason == "stain on the background"
    (image,) = rendered(scene)
    image[20:28, 20:28] = 210  # too faint to be an object
    assert detect(image).invalid_reason == "stain on the background"


# Scores


def test_the_real_accuracy_is_measured_on_the_test_split():
    assert ShapesEvaluator().real_accuracy > 0.995


def test_either_object_of_an_image_can_be_the_requested_one():
    ring, cross = Object("ring", "red", "small", 8, 8), Object("cross", "cyan", "large", 22, 22)
    two, alone, broken = rendered(Scene((ring, cross)), Scene((cross,)), Scene((replace(cross, x=2),)))
    images = np.stack([two, two, two, alone, alone, broken])
    names = ["red ring", "cyan cross", "red cross", "red ring", "cyan cross", "cyan cross"]
    scores = ShapesEvaluator().score(images, [CLASSES.index(name) for name in names])
    assert scores["accuracy"].value == pytest.approx(3 / 6)
    assert scores["invalid"].value == pytest.approx(1 / 6)
    assert scores["accuracy"].low < 3 / 6 < scores["accuracy"].high
    assert set(ShapesEvaluator().score(images, None)) == {"invalid"}


@pytest.mark.parametrize(
    ("caption", "incorrect"),
    [
        ("a small red ring left of a large cyan cross", ""),
        ("a large cyan cross right of a small red ring", ""),
        ("a large cyan cross left of a small red ring", "relation"),
        ("a small red ring above a large cyan cross", "relation"),
        ("a small blue ring left of a large cyan cross", "color binding"),
        ("a small red circle left of a large cyan cross", "shape binding"),
        ("a small red ring left of a small cyan cross", "size"),
        ("a small cyan ring left of a large red cross", "color binding"),
        ("a large red ring left of a small cyan cross", "size"),
        ("a small red ring", "shape color size binding"),
        ("a large cyan cross", "shape color size binding"),
    ],
)
def test_captions_are_scored_by_attribute(caption, incorrect):
    images = rendered(Scene((Object("cross", "cyan", "large", 22, 16), Object("ring", "red", "small", 8, 14))))
    values = shown(images, [caption])
    assert values.pop("swapped") == (caption == "a small cyan ring left of a large red cross")
    assert values.pop("whole") == (not incorrect)
    assert ("relation" in values) == (" of " in caption or "above" in caption)
    assert {key for key, value in values.items() if value == 0} == set(incorrect.split())


def test_an_invalid_image_has_nothing_correct():
    blank = np.full((1, 32, 32, 3), 236, np.uint8)
    values = shown(blank, ["a small red ring left of a large cyan cross"])
    assert values == dict.fromkeys(("shape", "color", "size", "relation", "whole", "binding", "swapped"), 0)
