"""`--launch`: a command that runs as many tasks, each the same command with `--shard i/n`."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tessera.cli.options import print_error, progress
from tessera.errors import TesseraError

if TYPE_CHECKING:
    from tessera.launch.launcher import Launcher

FOLDER = "launch"  # beside the results: logs of tasks
OPTIONS = ("--launch", "--tasks", "--nodes", "--ranks-per-node", "--launch-option")
COMMON = ("cpus", "gpus", "retries")  # launch options of every launcher
RETRIES = 2


def own_words(argv: Sequence[str] | None = None) -> list[str]:
    """The words of this command without those of the launch: what one process would run."""
    words, result = iter(sys.argv[1:] if argv is None else argv), []
    for word in words:
        if word in OPTIONS:
            next(words, None)
        elif not any(word.startswith(f"{option}=") for option in OPTIONS):
            result.append(word)
    return result


def task_words(words: Sequence[str], index: int, count: int) -> tuple[str, ...]:
    """The words of task `index`, from 0, of `count`."""
    end = words.index("--") if "--" in words else len(words)
    return (*words[:end], "--shard", f"{index + 1}/{count}", *words[end:])


@dataclass(frozen=True)
class Launch:
    """kind: of the launcher. options: of --launch-option."""

    kind: str
    tasks: int
    options: Mapping[str, str]

    @classmethod
    def parse(
        cls, kind: str | None, tasks: int | None, options: Sequence[str] | None, shard: str | None = None
    ) -> Self | None:
        """The launch of the options of a command; None without --launch. Raises TesseraError."""
        if kind is None:
            if tasks is not None or options:
                raise TesseraError("--tasks and --launch-option are for --launch local, ray or slurm: add it")
            return None
        if tasks is None:
            raise TesseraError(f"--launch {kind} needs the number of tasks: add --tasks 4, for example")
        if shard is not None:
            raise TesseraError("--launch gives each task its --shard: leave --shard out")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise TesseraError("--launch starts processes of its own: leave torchrun out")
        launch = cls(kind, tasks, parse_options(options or ()))
        launch.check()
        return launch

    def number(self, name: str, default: int) -> int:
        """A launch option that is a number. Raises TesseraError."""
        text = self.options.get(name, str(default))
        if not text.isdecimal():
            raise TesseraError(f"--launch-option {name}={text} is not valid: expected a number, as in {name}=4")
        return int(text)

    def check(self) -> None:
        """Raise TesseraError if an option is not valid or the launcher is not installed."""
        allowed = (*COMMON, "parallel") if self.kind == "local" else COMMON
        for name in self.options:
            if self.kind != "slurm" and name not in allowed:
                raise TesseraError(
                    f"--launch-option {name} is not known to --launch {self.kind}; expected {', '.join(allowed)}"
                )
        for name in allowed:
            self.number(name, 1)
        if self.number("cpus", 1) < 1 or self.number("parallel" if self.kind == "local" else "cpus", 1) < 1:
            raise TesseraError("--launch-option cpus and parallel are at least 1")
        if self.kind == "ray":
            from tessera.launch.ray import import_ray

            import_ray()
        elif self.kind == "slurm":
            from tessera.launch.slurm import check_slurm

            check_slurm()

    def run(self, logs: Path, uses_gpu: bool = True) -> None:
        """Run all tasks, and wait for them. Afterwards the command finds their work done, and completes it.

        logs: a folder; on clusters, one that all machines share. uses_gpu: whether tasks of this machine get a GPU each
        if it has any. Raises TesseraError if tasks fail; Interrupted.
        """
        from tessera.launch import launcher as launching
        from tessera.launch.task import Task

        retries = self.number("retries", RETRIES)
        launcher, cpus, gpus = self._launcher(logs, retries, uses_gpu)
        words, width = own_words(), len(str(self.tasks))
        tasks = [
            Task(
                f"shard {index + 1}/{self.tasks}",
                task_words(words, index, self.tasks),
                Path.cwd(),
                (logs / f"shard-{index + 1:0{width}d}.log").absolute(),
                cpus,
                gpus,
            )
            for index in range(self.tasks)
        ]
        print_error(f"{self.tasks} tasks ({self.kind}); their logs are in {logs}")
        with progress() as start:
            launching.run(launcher, tasks, retries, start("tasks"), print_error)

    def _launcher(self, logs: Path, retries: int, uses_gpu: bool) -> tuple["Launcher", int, int]:
        """The launcher, and the CPU cores and GPUs of each task."""
        cpus = self.number("cpus", 1)
        if self.kind == "ray":
            from tessera.launch.ray import RayLauncher

            return RayLauncher(retries), cpus, self.number("gpus", 0)
        if self.kind == "slurm":
            from tessera.launch.slurm import SlurmLauncher

            options = {name: value for name, value in self.options.items() if name not in COMMON}
            return SlurmLauncher(logs / "jobs", options, "tessera"), cpus, self.number("gpus", 0)
        import torch

        from tessera import runtime
        from tessera.launch.local import LocalLauncher

        available, devices = runtime.available_cpus(), torch.cuda.device_count() if uses_gpu else 0
        gpus = self.number("gpus", 1 if devices else 0)
        parallel = self.number("parallel", devices // gpus if gpus and devices else available)
        parallel = min(parallel, self.tasks)
        if "cpus" not in self.options:
            cpus = max(1, available // max(parallel, 1))
        elif "parallel" not in self.options:
            parallel = min(parallel, max(1, available // cpus))
        return LocalLauncher(available, devices, max(parallel, 1)), cpus, gpus


def parse_options(options: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE words; a KEY alone is an option of sbatch without a value. Raises TesseraError."""
    result = {}
    for option in options:
        key, _, value = option.partition("=")
        if not key.strip("-"):
            raise TesseraError(f"--launch-option {option} is not valid: write KEY=VALUE, as in partition=gpu")
        result[key.strip("-").strip()] = value.strip()
    return result
