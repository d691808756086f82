"""`tessera report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="the folder of a run")],
    out: Annotated[Path | None, typer.Option(help="the HTML file (RUN/report.html)")] = None,
) -> None:
    """Write an HTML report of a run.

    It has curves, samples, diagnostics and settings. Works during training, too.

    \b
    Example:
      tessera report runs/mine
    """
    from tessera.monitoring import report
    from tessera.training.recipe import Recipe

    print(report.write(run, Recipe, out))
