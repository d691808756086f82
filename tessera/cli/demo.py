"""`tessera demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    seconds: Annotated[float, typer.Option(help="training time")] = 120,
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("demo"),
) -> None:
    """Train a small DiT on handwritten digits, sample from it and score the samples. Needs no download."""
    from tessera.demo import run

    run(out, seconds)
