"""Several processes that work together, as under torchrun, forked from one interpreter that has imported the packages.

Their function is given by file and name, because test modules cannot be imported. Arguments and results are pickled.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import runpy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PATIENCE = 120  # seconds for which ranks may go on after one of them has failed
IMPORTED = ["pytest", "torch.distributed.fsdp", "sklearn.datasets", "tessera.cli", "tessera.training.loop"]


@dataclass(frozen=True)
class Outcome:
    """How one process ended."""

    code: int  # 0: success, 1: an exception, below 0: killed by that signal
    result: Any = None  # the return value
    error: str = ""  # the exception, as "Type: message"


@dataclass(frozen=True)
class ProcessGroup:
    """Running processes."""

    processes: list[BaseProcess]
    pipes: list[Connection]
    store: Any  # of the ranks; it ends with this object

    def kill(self, *ranks: int) -> None:
        """Send SIGKILL to these ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].kill()

    @property
    def alive(self) -> bool:
        """Whether any process still runs."""
        return any(process.is_alive() for process in self.processes)

    def outcomes(self) -> list[Outcome]:
        """Wait for all processes, and return how each ended."""
        results: list[dict[str, Any]] = [{} for _ in self.processes]
        waiting, failure = {pipe: rank for rank, pipe in enumerate(self.pipes)}, float("inf")
        while waiting:
            for pipe in multiprocessing.connection.wait(list(waiting), timeout=1):
                rank = waiting.pop(pipe)
                with contextlib.suppress(EOFError):  # killed before it sent a result
                    results[rank] = pipe.recv()
                if "result" not in results[rank]:
                    failure = min(failure, time.monotonic())
            if (
                waiting and time.monotonic() > failure + PATIENCE
            ):  # torchrun, too, ends the ranks that wait for a lost one
                self.kill(*waiting.values())
        for process in self.processes:
            process.join()
        return [Outcome(process.exitcode or 0, **result) for process, result in zip(self.processes, results)]


def start(count: int, function: Callable[..., Any], *arguments: Any) -> ProcessGroup:
    """Start `count` processes that call a module-level function, each with its rank in the environment."""
    from torch.distributed import TCPStore

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    # As torchrun does. If rank 0 opened a port that was free a moment ago, another process could take it first, and
    # the other ranks would wait for ever.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": store.port}
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        variables = {
            "environment": {**{name: str(value) for name, value in environment.items()}, "MASTER_ADDR": "127.0.0.1"},
            "pipe": theirs,
            "call": (function.__code__.co_filename, function.__name__, arguments),
        }
        process = context.Process(target=runpy.run_path, args=(__file__, variables, "process"), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    return ProcessGroup(processes, pipes, store)


def together(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of `count` processes in the order of ranks. All must succeed."""
    outcomes = start(count, function, *arguments).outcomes()
    assert [outcome.code for outcome in outcomes] == [0] * count, [outcome.error for outcome in outcomes]
    return [outcome.result for outcome in outcomes]


def program(
    words: Sequence[str],
    output: Path,
    log: Path,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Start a Python script with its arguments, or `tessera WORDS`, in a process that need not import torch first.

    Its output goes to files. folder: where it runs
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    call = {"words": list(words), "output": str(output), "log": str(log), "environment": dict(environment or {})}
    call["folder"] = str(folder or Path.cwd())
    process = context.Process(target=runpy.run_path, args=(__file__, {"call": call}, "program"))
    process.start()
    return process


def _program(words: list[str], output: str, log: str, folder: str, environment: dict[str, str]) -> None:
    """The main function of the process of a program."""
    import torch

    from tessera import cli

    torch.set_num_threads(1)
    os.environ.update(environment)
    os.chdir(folder)
    for path, stream in ((output, 1), (log, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
    if words[0].endswith(".py"):
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
    else:
        sys.argv = ["tessera", *words]
        cli.main()


def _work(environment: dict[str, str], pipe: Connection, call: tuple[str, str, tuple]) -> None:
    """The main function of a forked process."""
    import torch

    # One thread: the processes share few cores, and one that has used several and is forked then waits for ever at its
    # first convolution. The handler: see `conftest.py`, which these processes have not read.
    torch.set_num_threads(1)
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars, and gloo's messages about killed processes
    file, name, arguments = call
    result, code = {}, 0
    try:
        result = {"result": runpy.run_path(file, run_name="process")[name](*arguments)}
    except BaseException as error:
        result, code = {"error": f"{type(error).__name__}: {error}"}, 1
    pipe.send(result)
    pipe.close()
    os._exit(code)


if __name__ == "program":
    _program(**globals()["call"])
if __name__ == "process":
    _work(globals()["environment"], globals()["pipe"], globals()["call"])
