"""`tessera study`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli import launching
from tessera.cli.options import Launch, LaunchOptions, Shard, Tasks, parse_shard, print_error, progress


def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="a study, such as recipes/studies/scaling.yaml")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...", help="settings of the study: budget.steps=500 set.training.global_batch_size=64"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and exit")] = False,
    shard: Shard = None,
    launch: Launch = None,
    tasks: Tasks = None,
    launch_option: LaunchOptions = None,
    retry: Annotated[bool, typer.Option("--retry", help="run failed members again")] = False,
    report: Annotated[bool, typer.Option("--report", help="write the report of the results so far and exit")] = False,
    hardware: Annotated[
        str | None, typer.Option(help="plan for this, as in `tessera plan` (default: this machine)")
    ] = None,
) -> None:
    """Train and compare a grid of recipes.

    All members are scored with one protocol. The report has scaling laws or comparisons.

    A study that would take longer than its limit_minutes is refused before it starts. To resume, repeat the command. On
    several GPUs or machines: --launch local, ray or slurm.

    \b
    Example:
      tessera study recipes/studies/scaling.yaml --dry-run
    """
    from tessera.studies import runner, study_plan
    from tessera.studies import study as studies

    config = studies.read_study(file, overrides or [])
    part = parse_shard(shard)
    launched = launching.Launch.parse(launch, tasks, launch_option, shard)
    if report:
        _report(config)
        return
    prepared = study_plan.resolve_members(config)
    previous = None if dry_run else study_plan.read_plan(Path(config.output))
    with progress() as start:
        plan = study_plan.plan_study(config, prepared, previous, hardware, start("planning"))
    names = study_plan.shard_members(plan, part)
    if dry_run:
        print(study_plan.format_plan(plan), flush=True)
    elif previous is None:
        print_error(study_plan.format_plan(plan))
    study_plan.check_limits(config, plan)
    if dry_run:
        if shard is not None:
            print(f"shard {shard}: {', '.join(names) or 'empty, as there are fewer members'}")
        return
    study_plan.write_plan(config, plan)
    if launched is not None:
        launched.run(Path(config.output) / launching.FOLDER)
        retry = False  # the tasks have
    try:
        runner.run_study(config, plan, names, retry, print_error, wait=shard is not None)
    except runner.MembersFailed:
        _report(config)
        raise
    _report(config)


def _report(config: Any) -> None:
    """Write the report of a study's results and print its path."""
    from tessera.files import exclusive_lock
    from tessera.studies import report, results

    folder = Path(config.output)
    results.read_results(config, folder)  # raises before the folder is created
    with exclusive_lock(folder, on_wait=lambda: None):  # several shards may finish at the same time
        print(report.write(config, results.read_results(config, folder), folder))
