"""`tessera distill`."""

import os
from typing import Annotated

import typer

from tessera.cli.options import Overrides, print_error


def distill(
    model: Annotated[str, typer.Argument(help="the model to distill: a run, a bundle or another project's checkpoint")],
    to: Annotated[str, typer.Option("--to", help="folder of the new run")],
    overrides: Overrides = None,
    resume: Annotated[str, typer.Option(help="auto, never, or the path of a run or checkpoint")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything and estimate time and memory")] = False,
) -> None:
    """Train a model that samples in one or a few steps from a trained one, on the same data.

    The guidance of MODEL is learned, too: samples need no second evaluation. Settings follow from the recipe of MODEL;
    any can be changed, for example training.distillation.guidance_scale=2 training.steps=5000.
    """
    from tessera.training import loop
    from tessera.training.dry_run import dry_run as estimate_run
    from tessera.training.run import set_memory_policy
    from tessera.training.students import distillation_recipe

    recipe = distillation_recipe(model, to, overrides or [])
    set_memory_policy(recipe)
    if dry_run:
        print(estimate_run(recipe, resume, log=print_error))
        return
    folder = loop.train(recipe, resume)
    if os.environ.get("RANK", "0") == "0":
        print(folder)
