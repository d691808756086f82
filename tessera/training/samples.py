"""The grid of samples that a run saves: fixed seeds, and a column for each class or a row for each prompt."""

from typing import Any

import numpy as np

from tessera import bundle, generation, images
from tessera.generation.bulk import default_condition
from tessera.training.recipe import Recipe

MAX_CLASSES, NUM_PROMPTS, NUM_UNCONDITIONAL = 16, 8, 8


def num_grids(recipe: Recipe) -> int:
    """The number of grids in a run: before the first step, at regular steps, and after the last step."""
    config = recipe.training
    return len({0, config.steps, *range(config.sample_every, config.steps + 1, config.sample_every)})


def images_per_grid(recipe: Recipe) -> int:
    return recipe.training.sample_seeds * _num_conditions(recipe)


def _num_conditions(recipe: Recipe) -> int:
    """The number of classes or prompts in a grid."""
    if recipe.network.uses_text:
        return len(recipe.training.sample_prompts) or NUM_PROMPTS
    return min(recipe.network.num_classes, MAX_CLASSES) or NUM_UNCONDITIONAL


def sample_grid(recipe: Recipe, model: bundle.Model, dataset: Any = None) -> np.ndarray:
    """Sample the grid: uint8 [H, W, C]. dataset: what captions are chosen from, where the recipe has no prompts"""
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
    others = {name for name in network.condition_fields if name not in inputs}
    if others:
        inputs = default_condition(model, range(count), "balanced", dataset) | inputs
    condition = {name: [values[index] for index, _ in rows] for name, values in inputs.items()}
    samples = generation.generate_request(model, generation.SampleRequest(seeds, condition))
    zoom = max(1, 32 // samples.shape[-3])
    if not is_text:
        return images.grid(samples, count, zoom=zoom)
    parts = np.split(samples, count)
    return images.with_captions([images.grid(part, num_seeds, zoom=zoom) for part in parts], inputs["text"])
