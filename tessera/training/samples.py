"""The grid of samples that a run saves: fixed seeds, one column per class."""

import numpy as np

from tessera import bundle, generation, images
from tessera.training.recipe import Recipe

MAX_COLUMNS = 16


def num_grids(recipe: Recipe) -> int:
    """The number of grids in a run: before the first step, at regular steps, and after the last step."""
    config = recipe.training
    return len({0, config.steps, *range(config.sample_every, config.steps + 1, config.sample_every)})


def images_per_grid(recipe: Recipe) -> int:
    return recipe.training.sample_seeds * _columns(recipe)


def _columns(recipe: Recipe) -> int:
    return min(recipe.network.num_classes, MAX_COLUMNS) or 8


def sample_grid(recipe: Recipe, model: bundle.Model) -> np.ndarray:
    """Sample the grid: uint8 [H, W, C]"""
    classes, rows, columns = recipe.network.num_classes, recipe.training.sample_seeds, _columns(recipe)
    labels = [index * classes // columns for index in range(columns)] * rows if classes else None
    seeds = [row for row in range(rows) for _ in range(columns)] if classes else list(range(rows * columns))
    network = model.config.network
    condition = {
        name: rules.default_inputs(seeds, "balanced", model.config)
        for name, rules in network.condition_type.rules().items()
        if name in network.condition_fields
    }
    condition |= {} if labels is None else {"label": labels}
    samples = generation.generate_request(model, generation.SampleRequest(seeds, condition))
    return images.grid(samples, columns, zoom=max(1, 32 // samples.shape[-3]))
