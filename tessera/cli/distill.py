"""`tessera distill`."""

from typing import Annotated

import typer

from tessera.cli.options import Overrides
from tessera.cli.train import train_recipe


def distill(
    model: Annotated[str, typer.Argument(help="the model to distill: a run, a bundle or another project's checkpoint")],
    to: Annotated[str, typer.Option("--to", help="folder of the new run")],
    overrides: Overrides = None,
    resume: Annotated[str, typer.Option(help="auto, never, or the path of a run or checkpoint")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything and estimate time and memory")] = False,
) -> None:
    """Train a model that samples in one or a few steps.

    The student learns from a trained model, on the same data.

    The student also learns the guidance of MODEL, so sampling needs no unconditional evaluation. Settings follow from
    the recipe of MODEL; any can be changed, for example training.distillation.guidance_scale=2 training.steps=5000.

    \b
    Example:
      tessera distill runs/mine --to runs/mine-few
    """
    from tessera.training.students import distillation_recipe

    train_recipe(distillation_recipe(model, to, overrides or []), resume, dry_run)
