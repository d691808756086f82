"""The grid of samples that a run saves: fixed seeds, and a column for each class or a row for each prompt.

Clips are saved twice: as a sheet, whose rows are the frames of one clip each, and as an animation of the grid.
"""

from typing import Any

import numpy as np

from tessera import bundle, generation, images
from tessera.adapters import ControlConfig
from tessera.data.images import InvalidSample
from tessera.errors import TesseraError
from tessera.generation.bulk import default_condition
from tessera.training.recipe import Recipe

MAX_CLASSES, NUM_PROMPTS, NUM_UNCONDITIONAL = 16, 8, 8


def num_grids(recipe: Recipe) -> int:
    """The number of grids in a run: before the first step, at regular steps, and after the last step; 0: none"""
    config = recipe.training
    if config.sample_every is None:
        return 0
    return len({0, config.steps, *range(config.sample_every, config.steps + 1, config.sample_every)})


def images_per_grid(recipe: Recipe) -> int:
    return recipe.training.sample_seeds * _num_conditions(recipe)


def _num_conditions(recipe: Recipe) -> int:
    """The number of classes or prompts in a grid."""
    if recipe.network.uses_text:
        return len(recipe.training.sample_prompts) or NUM_PROMPTS
    return min(recipe.network.num_classes, MAX_CLASSES) or NUM_UNCONDITIONAL


def sample_grid(recipe: Recipe, model: bundle.Model, dataset: Any = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Sample the grid: uint8 [H, W, C]; and of clips the animation uint8 [T, H, W, C].

    dataset: what captions are chosen from, where the recipe has no prompts; a control gets its first images, with their
    own captions and classes
    """
    network, count, num_seeds = recipe.network, _num_conditions(recipe), recipe.training.sample_seeds
    classes, is_text = network.num_classes, network.uses_text
    # Rows of a grid are prompts, or seeds; without a condition each image has its own seed.
    if is_text:
        rows = [(index, seed) for index in range(count) for seed in range(num_seeds)]
    elif network.condition_fields:
        rows = [(index, seed) for seed in range(num_seeds) for index in range(count)]
    else:
        rows = [(index, index) for index in range(num_seeds * count)]
    seeds = [seed for _, seed in rows]
    inputs = {}
    if classes:
        inputs["label"] = [index * classes // count for index in range(count)]
    if is_text and recipe.training.sample_prompts:
        inputs["text"] = list(recipe.training.sample_prompts)
    controls = {}
    if isinstance(recipe.adapter, ControlConfig):
        numbers, photos = _first_images(dataset, count)
        controls[bundle.TRAINED] = photos[[index % count for index, _ in rows]]
        if classes:
            inputs["label"] = [max(dataset.label(number), 0) for number in numbers]
        if is_text and "text" not in inputs:
            inputs["text"] = [dataset.caption(number) or "" for number in numbers]
    others = {name for name in network.condition_fields if name not in inputs}
    if others:
        inputs = default_condition(model, range(count), "balanced", dataset) | inputs
    condition = {name: [values[index] for index, _ in rows] for name, values in inputs.items()}
    request = generation.SampleRequest(seeds, condition, controls=controls, cut_long=bool(controls))
    samples = generation.generate_request(model, request)
    zoom = max(1, 32 // samples.shape[-3])
    texts = inputs["text"] if is_text else None
    if samples.ndim == 4:
        return _sheet(samples, count, num_seeds, texts, zoom), None
    frames = [_sheet(samples[:, number], count, num_seeds, texts, zoom) for number in range(samples.shape[1])]
    if not is_text:  # the clips of a class below each other
        samples = samples.reshape(num_seeds, count, *samples.shape[1:]).swapaxes(0, 1).reshape(samples.shape)
    return _sheet(images.filmstrips(samples), 1 if texts is None else count, 1, texts, zoom), np.stack(frames)


def _sheet(samples: np.ndarray, count: int, num_seeds: int, texts: list[str] | None, zoom: int) -> np.ndarray:
    """Images in `count` columns; with texts, a row of `num_seeds` images below each."""
    if texts is None:
        return images.grid(samples, count, zoom=zoom)
    parts = np.split(samples, count)
    return images.with_captions([images.grid(part, num_seeds, zoom=zoom) for part in parts], texts)


def _first_images(dataset: Any, count: int) -> tuple[list[int], np.ndarray]:
    """The numbers and pixels uint8 [count, H, W, C] of the first images that can be read; few are repeated."""
    numbers, pixels = [], []
    for number in range(len(dataset)):
        try:
            pixels.append(np.moveaxis(dataset.pixels(number), 0, -1))
            numbers.append(number)
        except InvalidSample:
            continue
        if len(numbers) == count:
            break
    if not numbers:
        raise TesseraError("no image can be read to sample with")
    chosen = [index % len(numbers) for index in range(count)]
    return [numbers[index] for index in chosen], np.stack(pixels)[chosen]
