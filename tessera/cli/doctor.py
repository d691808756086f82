"""`tessera doctor`."""

from pathlib import Path
from typing import Annotated

import typer

from tessera.errors import TesseraError


def doctor(
    run: Annotated[Path | None, typer.Argument(help="the folder of a run")] = None,
    json: Annotated[bool, typer.Option("--json", help="print findings and facts as JSON")] = False,
    system: Annotated[
        bool, typer.Option("--system", help="check this machine and this installation, not a run")
    ] = False,
) -> None:
    """Diagnose a run, or this machine.

    For a run, it reads the log files and suggests changes; this works during training, too. With --system, it checks
    versions and devices, and lists what each missing extra would add.

    \b
    Examples:
      tessera doctor runs/mine
      tessera doctor --system
    """
    if system:
        if run is not None or json:
            raise TesseraError("--system checks this machine: leave out the run and --json")
        from tessera.monitoring.system import describe_system

        print(describe_system())
        return
    if run is None:
        raise TesseraError("nothing to diagnose: give the folder of a run, or --system for this machine")
    from tessera.monitoring.doctor import as_json, as_text

    print(as_json(run) if json else as_text(run))
