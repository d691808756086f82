"""`tessera study`: a grid of runs planned, run or gone on with, scored alike, and told in one report."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.options import progress


def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="a study, such as recipes/studies/scaling.yaml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]...", help="dotted settings (set.training.global_batch_size=64)"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan, and end")] = False,
    shard: Annotated[str | None, typer.Option(help="i/n: the members of part i of n, split by planned cost")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="try members again that failed")] = False,
    report: Annotated[bool, typer.Option("--report", help="write the report of what is there, and end")] = False,
    hardware: Annotated[str | None, typer.Option(help="plan for this, as in `tessera plan` (this machine)")] = None,
) -> None:
    """Run a grid of recipes, score all members alike, and write one report: does it scale, which is better?

    It plans first, and refuses what does not fit. Interrupted? The same command goes on.
    """
    from tessera.studies import runner, study_plan
    from tessera.studies import study as studies

    asked = studies.read(file, overrides or [])
    part = study_plan.shard_of(shard or "1/1")
    folder = Path(asked.output)
    if report:
        _report(asked)
        return
    prepared, before = study_plan.prepare(asked), None if dry_run else study_plan.kept(folder)
    with progress() as begin:
        planned = study_plan.planned(asked, prepared, before, hardware, begin("planning"))
    names = study_plan.share(planned, part)
    study_plan.check(asked, planned)
    if dry_run:
        print(study_plan.table(planned))
        if shard is not None:
            print(f"part {shard}: {', '.join(names) or 'nothing, there are fewer members'}")
        return
    if before is None:
        _say(study_plan.table(planned))
    study_plan.begin(asked, planned)
    try:
        runner.run_study(asked, planned, names, retry, _say)
    except runner.Failed:
        _report(asked)
        raise
    _report(asked)


def _report(asked: Any) -> None:
    """Write the report of what a study's folder holds, and say where it is."""
    from tessera.files import wait_for_lock
    from tessera.studies import report, results

    folder = Path(asked.output)
    results.read(asked, folder)  # raises where nothing was begun: nothing is made there
    with wait_for_lock(folder):  # shards may end at once
        print(report.write(asked, results.read(asked, folder), folder))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
