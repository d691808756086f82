"""`tessera train`."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tessera.cli import launching
from tessera.cli.options import Overrides, print_error
from tessera.errors import TesseraError

if TYPE_CHECKING:
    from tessera.training.recipe import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/modern.yaml")],
    overrides: Overrides = None,
    resume: Annotated[str, typer.Option(help="auto, never, or the path of a run or checkpoint")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything and estimate time and memory")] = False,
    launch: Annotated[
        Literal["ray", "slurm"] | None,
        typer.Option("--launch", help="train on --nodes machines of a Ray or SLURM cluster"),
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="number of machines for --launch")] = None,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="for --launch: ranks on each machine, one per GPU")] = 1,
    launch_option: Annotated[
        list[str] | None,
        typer.Option(
            "--launch-option",
            metavar="KEY=VALUE",
            help="cpus or gpus per machine; retries (default: 3); with slurm: any option of sbatch, such as "
            "partition=gpu",
        ),
    ] = None,
) -> None:
    """Train a model from a recipe. To resume an interrupted run, repeat the command.

    On several GPUs: torchrun --nproc-per-node 8 -m tessera train RECIPE. On several machines: --launch slurm --nodes 2
    --ranks-per-node 8, or --launch ray.

    \b
    Examples:
      tessera train recipes/modern.yaml data.path=my-images --dry-run
      tessera train recipes/modern.yaml data.path=my-images training.steps=20000
    """
    from tessera.training.recipe import read_recipe

    config = read_recipe(recipe, overrides or [])
    if launch is None and (nodes is not None or launch_option):
        raise TesseraError("--nodes and --launch-option are for --launch ray or slurm: add it")
    if launch is None or dry_run:
        train_recipe(config, resume, dry_run)
        return
    if resume == "never":
        raise TesseraError("--resume never would refuse the restart of a launched training: give another run_dir")
    _launch(config, launch, nodes, ranks_per_node, launching.parse_options(launch_option or ()))


def _launch(config: "Recipe", kind: str, nodes: int | None, ranks: int, options: dict[str, str]) -> None:
    """Train on several machines: submit a SLURM job, or wait for tasks of a Ray cluster."""
    from tessera import storage
    from tessera.launch.training import Training, submit, train_on_ray

    if nodes is None:
        raise TesseraError(f"--launch {kind} needs the number of machines: add --nodes 2, for example")
    if nodes > 1 and storage.is_remote(storage.locate(config.run_dir)):
        raise TesseraError(
            f"run_dir={config.run_dir} is in a bucket, which works for the processes of one machine: give a folder "
            "that all machines share, or --nodes 1"
        )
    launched = launching.Launch(kind, nodes, options)
    launched.check()
    training = Training(
        tuple(launching.own_words()),
        Path.cwd(),
        storage.locate(config.run_dir).absolute().with_name(Path(config.run_dir).name + ".launch") / "train.log",
        nodes,
        ranks,
        launched.number("cpus", ranks),
        launched.number("gpus", 0 if config.training.device == "cpu" else ranks),
        launched.number("retries", 3),
        {name: value for name, value in options.items() if name not in launching.COMMON},
    )
    if kind == "ray":
        train_on_ray(training, print_error)
        print(config.run_dir)
        return
    job = submit(training)
    print_error(f"job {job}; log: {training.log}; `squeue --jobs {job}` shows its state, `scancel {job}` ends it")
    print_error(
        f"when it runs: tessera report {shlex.quote(config.run_dir)}, tessera doctor {shlex.quote(config.run_dir)}"
    )
    print(job)


def train_recipe(config: "Recipe", resume: str, dry_run: bool) -> None:
    """Train and print the folder of the run, or print the estimate of a dry run."""
    from tessera.training import loop
    from tessera.training.dry_run import dry_run as estimate_run
    from tessera.training.run import set_memory_policy

    set_memory_policy(config)
    if dry_run:
        print(estimate_run(config, resume, log=print_error))
        return
    folder = loop.train(config, resume)
    if os.environ.get("RANK", "0") == "0":
        print(folder if folder == Path(config.run_dir) else config.run_dir)  # of one in a bucket not the copy
