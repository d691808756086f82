"""Several processes that work together, as under torchrun, forked from one interpreter that has imported the packages.

Their function is given by file and name, because test modules cannot be imported. Arguments and results are pickled.
"""

import multiprocessing
import os
import runpy
import socket
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

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
        results = []
        for process, pipe in zip(self.processes, self.pipes):
            try:
                results.append(pipe.recv())
            except EOFError:  # killed before it sent a result
                results.append({})
            process.join()
        return [Outcome(process.exitcode or 0, **result) for process, result in zip(self.processes, results)]


def start(count: int, function: Callable[..., Any], *arguments: Any) -> ProcessGroup:
    """Start `count` processes that call a module-level function, each with its rank in the environment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, pipes = [], []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
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
    return ProcessGroup(processes, pipes)


def together(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of `count` processes in the order of ranks. All must succeed."""
    outcomes = start(count, function, *arguments).outcomes()
    assert [outcome.code for outcome in outcomes] == [0] * count, [outcome.error for outcome in outcomes]
    return [outcome.result for outcome in outcomes]


def _work(environment: dict[str, str], pipe: Connection, call: tuple[str, str, tuple]) -> None:
    """The main function of a forked process."""
    import torch

    from tessera import runtime

    os.environ.update(environment)
    torch.set_num_threads(1)  # the processes share few cores
    runtime.peak_flops = lambda *_: 1e9  # measuring it would take longer than the test
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


if __name__ == "process":
    _work(globals()["environment"], globals()["pipe"], globals()["call"])
