"""`tessera train`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tessera.cli.options import Overrides, print_error

if TYPE_CHECKING:
    from tessera.training.recipe import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/modern.yaml")],
    overrides: Overrides = None,
    resume: Annotated[str, typer.Option(help="auto, never, or the path of a run or checkpoint")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything and estimate time and memory")] = False,
) -> None:
    """Train a model from a recipe. To resume an interrupted run, repeat the command.

    On several GPUs: torchrun --nproc-per-node 8 -m tessera train RECIPE.

    \b
    Examples:
      tessera train recipes/modern.yaml data.path=my-images --dry-run
      tessera train recipes/modern.yaml data.path=my-images training.steps=20000
    """
    from tessera.training.recipe import read_recipe

    train_recipe(read_recipe(recipe, overrides or []), resume, dry_run)


def train_recipe(config: "Recipe", resume: str, dry_run: bool) -> None:
    """Train and print the folder of the run, or print the estimate of a dry run."""
    from tessera.training import loop
    from tessera.training.dry_run import dry_run as estimate_run
    from tessera.training.run import set_memory_policy

    set_memory_policy(config)
    if dry_run:
        print(estimate_run(config, resume, log=print_error))
        return
    folder = loop.train(config, resume)
    if os.environ.get("RANK", "0") == "0":
        print(folder if folder == Path(config.run_dir) else config.run_dir)  # of one in a bucket not the copy
