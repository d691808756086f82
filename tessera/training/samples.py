"""The grid of samples that a run saves: fixed seeds, one column per class."""

import numpy as np

from tessera import bundle, generation, images
from tessera.training.recipe import Recipe

MAX_COLUMNS = 16


def grid_shape(recipe: Recipe) -> tuple[int, int]:
    """Rows and columns of the grid of a resolved recipe."""
    return recipe.training.sample_seeds, min(recipe.network.num_classes, MAX_COLUMNS) or 8


def sample_grid(recipe: Recipe, model: bundle.Model) -> np.ndarray:
    """Sample the grid: uint8 [H, W, C]"""
    classes, (rows, columns) = recipe.network.num_classes, grid_shape(recipe)
    labels = [index * classes // columns for index in range(columns)] * rows if classes else None
    seeds = [row for row in range(rows) for _ in range(columns)] if classes else list(range(rows * columns))
    samples = generation.generate(model, labels, seeds)
    return images.grid(samples, columns, zoom=max(1, 32 // samples.shape[1]))
