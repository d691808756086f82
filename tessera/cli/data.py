"""`tessera data`: build and check a data set, and cache its latents."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli import launching
from tessera.cli.build import build
from tessera.cli.cache import cache
from tessera.cli.options import Launch, LaunchOptions, Shard, Size, Tasks, parse_shard, parse_size, progress
from tessera.errors import Interrupted, TesseraError

app = typer.Typer(
    help="Build and check a data set, and cache its latents.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for _command in (build, cache):
    app.command()(_command)


@app.command()
def check(
    data: Annotated[str, typer.Argument(metavar="PATH", help="images or clips in any layout, or a recipe")],
    reference: Annotated[str | None, typer.Option(help="validation data: report samples that are in both")] = None,
    write_index: Annotated[Path | None, typer.Option(help="write an index of the accepted samples: .parquet")] = None,
    exclude: Annotated[
        str, typer.Option(help="kinds of findings whose samples are rejected, separated by commas")
    ] = "corrupt,duplicates,leaks",
    out: Annotated[Path | None, typer.Option(help="folder for report and decisions (default: check/NAME)")] = None,
    size: Size = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="for clips: frames per clip in training (default: of the recipe)")
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="for clips: frames per second in training (default: of the recipe)")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes (default: one per CPU core)")] = None,
    shard: Shard = None,
    launch: Launch = None,
    tasks: Tasks = None,
    launch_option: LaunchOptions = None,
    json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
) -> None:
    """Find damaged, duplicate, leaked and unusual samples, and suggest remedies. Changes nothing.

    To resume after an interruption, repeat the command. On several machines: use --launch ray or slurm; or run it with
    --shard 1/4 to 4/4, then once without --shard.

    \b
    Example:
      tessera data check my-images --write-index clean.parquet
    """
    from tessera import runtime, storage
    from tessera.data.check import FINDINGS, REPORT, CheckRequest, report_findings, scan_data
    from tessera.data.check.decisions import excluded_kinds
    from tessera.data.check.scan import ScanShard

    kinds = [word.strip() for word in exclude.split(",") if word.strip()]
    excluded_kinds(kinds)
    index, count = parse_shard(shard)
    launched = launching.Launch.parse(launch, tasks, launch_option, shard)
    if write_index is not None and write_index.suffix != ".parquet":
        raise TesseraError(f"--write-index {write_index} must end in .parquet")
    folder = out or Path("check") / (Path(data).stem or "data")
    request = CheckRequest(data, folder, reference, parse_size(size), frames, fps)
    result = None
    if launched is not None:
        _ = request.dataset, request.reference_dataset  # errors are reported here, and the index is made once
        launched.run(folder / launching.FOLDER, uses_gpu=False)
    with runtime.distributed_session() as ranks, progress() as start:
        if shard is not None and ranks.world_size > 1:
            raise TesseraError("the processes of torchrun are the shards: leave --shard out")
        part = ScanShard(ranks.rank, ranks.world_size) if shard is None else ScanShard(index, count)
        workers = workers or runtime.available_cpus() // ranks.world_size or 1
        try:
            scan_data(request, workers, part, start if ranks.is_main else None)
            ranks.barrier()
            if shard is None and ranks.is_main:
                result = report_findings(request, kinds, shlex.join(["tessera", *launching.own_words()]), write_index)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; measurements so far are in {folder}: repeat the command to resume"
            ) from None
    if shard is not None:
        print(f"shard {shard} of {data} is done; when all are done, run the command without --shard for the report")
    if result is None:
        return
    if json:
        with (folder / FINDINGS).open(encoding="utf-8") as file:
            shutil.copyfileobj(file, sys.stdout)
        return
    _print_findings(result)
    print(f"{result.keep.sum():,} of {len(result.keep):,} samples accepted; report in {folder / REPORT}")
    if write_index is not None:
        address = storage.address(storage.locate(write_index))
        print(f"to train on the accepted samples: {shlex.quote(f'data.path={address}')}")
    elif not result.keep.all():
        print("nothing was changed; --write-index accepted.parquet writes an index of the accepted samples")


def _print_findings(result: Any) -> None:
    """Print the findings as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for name, value in result.summary:
        console.print(f"{name:<16}{value}", highlight=False, markup=False)
    if not result.findings:
        print("no findings")
        return
    table = Table("", "finding", "count", "description")
    colors = {"error": "red", "warning": "yellow", "note": "dim"}
    for finding in result.findings:
        severity = Text(finding.severity, style=colors[finding.severity])
        table.add_row(severity, Text(finding.kind), f"{finding.count:,}", Text(finding.message))
    console.print(table)
    print("what to do:")  # outside the table, so that commands can be copied
    for finding in result.findings:
        print(f"  {finding.kind}")
        for line in (finding.advice, *finding.commands):
            print(f"    {line}")
