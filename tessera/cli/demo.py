"""`tessera demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    seconds: Annotated[float, typer.Option(help="training time")] = 60,
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("demo"),
    serve: Annotated[bool, typer.Option("--serve", help="afterwards, open the page of `tessera serve`")] = False,
) -> None:
    """Train a small DiT on handwritten digits, and look at samples.

    An independent classifier scores 1,000 samples. Needs no download.

    \b
    Example:
      tessera demo --serve
    """
    from tessera.cli.serve import check_installed
    from tessera.cli.serve import serve as serve_models
    from tessera.demo import run

    if serve:
        check_installed()
    run(out, seconds)
    if serve:
        serve_models([str(out / "run")], runs=out, out=out / "served", open_page=True)
