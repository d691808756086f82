"""`tessera data build`."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli import launching
from tessera.cli.options import (
    Launch,
    LaunchOptions,
    Overrides,
    Shard,
    Tasks,
    parse_shard,
    print_error,
    progress,
)
from tessera.errors import Interrupted, TesseraError


def build(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe such as recipes/build.yaml")],
    overrides: Overrides = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes (default: one per CPU core)")] = None,
    shard: Shard = None,
    launch: Launch = None,
    tasks: Tasks = None,
    launch_option: LaunchOptions = None,
) -> None:
    """Build a data set: read sources in any layout, leave out damaged images and copies, resize, and write shards of
    even size with an index.

    To resume after an interruption, repeat the command. On several machines: use --launch ray or slurm; or run it with
    --shard 1/4 to 4/4, which measures, and then with the same shards again, or once without --shard, which writes.

    \b
    Example:
      tessera data build recipes/build.yaml sources=my-images output=built size=256
    """
    from tessera import runtime, storage
    from tessera.data.build import Builder, read_recipe
    from tessera.data.build import build as build_data
    from tessera.data.check.scan import ScanShard

    index, count = parse_shard(shard)
    launched = launching.Launch.parse(launch, tasks, launch_option, shard)
    config = read_recipe(recipe, overrides)
    if launched is not None:
        builder = Builder(config)
        if launched.kind != "local" and config.work is None and storage.is_remote(builder.output):
            raise TesseraError(
                f"output {config.output} is in a bucket, and the tasks share their measurements in a folder: set work= "
                "to a folder that all machines see under the same path, or build with --launch local"
            )
        builder.begin()
        for name in ("measure", "write") if builder.missing_parts() else ("write",):
            # Of a bucket, too, the work is a folder that all machines share.
            launched.run(builder.work / launching.FOLDER / name, uses_gpu=config.captioner is not None)
    try:
        with progress() as start:
            built = build_data(config, workers or runtime.available_cpus(), ScanShard(index, count), start)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; what is complete is in {config.output}: repeat the command to resume"
        ) from None
    if built.waiting:
        print(
            f"shard {shard} is measured; {built.waiting:,} parts of 512 samples are missing. Samples are selected when "
            "all are measured: run the other shards, then the same command again, or once without --shard"
        )
    elif built.summary is None:
        print(f"shard {shard} is written: {built.written} of {built.shards} files exist")
    else:
        _print_summary(built.summary, config.output)


def _print_summary(summary: dict[str, Any], output: str) -> None:
    """What was written and what was left out."""
    for note in summary["notes"]:
        print_error(f"data: {note}")
    shards = len(summary["shards"])
    print(f"{summary['written']:,} of {summary['samples']:,} samples in {shards:,} files, {summary['bytes']:,} bytes")
    for reason, number in summary["left_out"].items():
        print(f"  left out: {number:>12,} {reason}")
    if summary["left_out"]:
        print(f"their names and details are in {output}/left-out.jsonl")
    print(f"to train on it: {shlex.quote(f'data.path={output}/index.parquet')}")
