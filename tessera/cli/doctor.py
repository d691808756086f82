"""`tessera doctor`."""

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    run: Annotated[Path, typer.Argument(help="the folder of a run")],
    json: Annotated[bool, typer.Option("--json", help="print findings and facts as JSON")] = False,
) -> None:
    """Diagnose a run from its log files and suggest changes. Works during training, too."""
    from tessera.monitoring.doctor import as_json, as_text

    print(as_json(run) if json else as_text(run))
