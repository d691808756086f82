"""`tessera.train`: training from Python."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tessera.errors import TesseraError
from tessera.training import loop
from tessera.training.recipe import Recipe, read_recipe


def train(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = (), resume: str = "auto") -> Path:
    """Train a model and return the folder of its run, which `tessera.load` reads.

    recipe: the path of a recipe file, a mapping with its content, or a Recipe. overrides: dotted settings such as
    "training.steps=1000". resume: "auto" continues the run of the folder, if there is one; "never" refuses such a
    folder; a path continues from that run or checkpoint. Raises TesseraError.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(Path(recipe) if isinstance(recipe, str) else recipe, overrides)
    elif overrides:
        raise TesseraError("overrides apply to a path or a mapping; change a Recipe with `read_recipe` or `model_copy`")
    return loop.train(recipe, resume)
