"""`tessera data`: look at a data set before training on it."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.cache import Interrupted, cache
from tessera.cli.options import Size, progress, size_of
from tessera.errors import TesseraError

app = typer.Typer(help="Look at a data set before training on it.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def root() -> None:
    """Look at a data set before training on it."""


app.command()(cache)


@app.command()
def check(
    data: Annotated[str, typer.Argument(metavar="PATH", help="images in any layout, or a recipe")],
    against: Annotated[str | None, typer.Option(help="validation data that must not be in it")] = None,
    apply: Annotated[Path | None, typer.Option(help="write an index of what is kept: OUT.parquet")] = None,
    drop: Annotated[
        str, typer.Option(help="findings whose samples are not kept, by comma")
    ] = "corrupt,duplicates,leaks",
    out: Annotated[Path | None, typer.Option(help="folder for report and decisions (check/NAME)")] = None,
    size: Size = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes (the processor cores)")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: look at part i of n only, from 0; any machine")] = None,
    json: Annotated[bool, typer.Option("--json", help="for programs: the findings")] = False,
) -> None:
    """Find what is wrong with a data set, and say what to do about each. Changes nothing.

    Interrupted? The same command goes on. Over machines: --shard 0/4 to 3/4 anywhere, then once without.
    """
    from tessera import runtime
    from tessera.data.check import FINDINGS, REPORT, CheckRequest, report_findings, scan_data
    from tessera.data.check.findings import droppable
    from tessera.data.check.scan import ScanShard

    words = [word.strip() for word in drop.split(",") if word.strip()]
    droppable(words)
    if apply is not None and apply.suffix != ".parquet":
        raise TesseraError(f"--apply {apply} must end in .parquet")
    folder = out or Path("check") / (Path(data).stem or "data")
    asked = CheckRequest(data, folder, against, size_of(size))
    checked = None
    with runtime.distributed_session() as ranks, progress() as begin:
        if shard is not None and ranks.world_size > 1:
            raise TesseraError("the processes of torchrun are the shards: leave out --shard")
        part = ScanShard(ranks.rank, ranks.world_size) if shard is None else ScanShard(*_shard(shard))
        try:
            scan_data(asked, workers or cores() // ranks.world_size or 1, part, begin if ranks.is_main else None)
            ranks.barrier()
            if shard is None and ranks.is_main:
                checked = report_findings(asked, words, shlex.join(["tessera", *sys.argv[1:]]), apply)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped, with what was seen kept in {folder}: run the same command to go on") from None
    if shard is not None:
        print(
            f"shard {shard} of {data} is looked at; after all of them the command without --shard tells what was found"
        )
    if checked is None:
        return
    if json:
        print((folder / FINDINGS).read_text(encoding="utf-8"), end="")
        return
    _print(checked)
    print(f"{checked.keep.sum():,} of {len(checked.keep):,} samples are kept; report in {folder / REPORT}")
    if apply is not None:
        print(f"to train on what is kept: data.path={apply}")
    elif not checked.keep.all():
        print("nothing was changed; --apply kept.parquet writes an index of what is kept")


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _shard(text: str) -> tuple[int, int]:
    """'0/4' -> the first of four."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise TesseraError(f"--shard {text} is not understood; write 0/4 to 3/4 for four shards")
    return int(index), int(count)


def _print(checked: Any) -> None:
    """The findings as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for name, value in checked.summary:
        console.print(f"{name:<16}{value}", highlight=False, markup=False)
    if not checked.findings:
        print("nothing was found")
        return
    table = Table("", "finding", "count", "what")
    colours = {"wrong": "red", "doubtful": "yellow", "note": "dim"}
    for finding in checked.findings:
        severity = Text(finding.severity, style=colours[finding.severity])
        table.add_row(severity, Text(finding.kind), f"{finding.count:,}", Text(finding.what))
    console.print(table)
    print("what to do:")  # outside the table, so that lines may be copied
    for finding in checked.findings:
        print(f"  {finding.kind}")
        for line in finding.advice:
            print(f"    {line}")
