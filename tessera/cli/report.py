"""`tessera report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="the folder of a run")],
    out: Annotated[Path | None, typer.Option(help="the HTML file (default: RUN/report.html)")] = None,
) -> None:
    """Write an HTML report of a run.

    The page has curves, samples, diagnostics and settings. The command also works during training.

    \b
    Example:
      tessera report runs/mine
    """
    from tessera.monitoring import report
    from tessera.training.recipe import Recipe

    print(report.write(run, Recipe, out))
