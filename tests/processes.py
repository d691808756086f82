"""Several processes that do something together, as under torchrun: forked from one interpreter that has imported all.

What runs in them is named by file and name, for test modules cannot be imported; arguments and results are pickled.
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
    """What became of one process."""

    code: int  # 0: well; 1: by an error; below 0: by that signal
    result: Any = None  # what its function returned
    error: str = ""  # or what it raised, as "Kind: message"


@dataclass(frozen=True)
class Fellows:
    """Processes at work."""

    processes: list[BaseProcess]
    pipes: list[Connection]

    def kill(self, *ranks: int) -> None:
        """SIGKILL to these, or to all."""
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].kill()

    @property
    def alive(self) -> bool:
        """Whether any has not ended."""
        return any(process.is_alive() for process in self.processes)

    def outcomes(self) -> list[Outcome]:
        """When all have ended, what became of each."""
        told = []
        for process, pipe in zip(self.processes, self.pipes):
            try:
                told.append(pipe.recv())
            except EOFError:  # killed before it could tell
                told.append({})
            process.join()
        return [Outcome(process.exitcode or 0, **one) for process, one in zip(self.processes, told)]


def start(count: int, function: Callable[..., Any], *arguments: Any) -> Fellows:
    """Have so many processes call a function at the top of a file, each with its rank in the environment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, pipes = [], []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        told = {
            "environment": {**{name: str(value) for name, value in environment.items()}, "MASTER_ADDR": "127.0.0.1"},
            "pipe": theirs,
            "call": (function.__code__.co_filename, function.__name__, arguments),
        }
        process = context.Process(target=runpy.run_path, args=(__file__, told, "process"), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    return Fellows(processes, pipes)


def together(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What each of so many processes returned, in the order of ranks; all must have ended well."""
    outcomes = start(count, function, *arguments).outcomes()
    assert [outcome.code for outcome in outcomes] == [0] * count, [outcome.error for outcome in outcomes]
    return [outcome.result for outcome in outcomes]


def _work(environment: dict[str, str], pipe: Connection, call: tuple[str, str, tuple]) -> None:
    """What a forked process does."""
    import torch

    from tessera import runtime

    os.environ.update(environment)
    torch.set_num_threads(1)  # all processes share few cores
    runtime.peak_flops = lambda *_: 1e9  # to measure it would take longer than all the rest
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars, and what gloo says of those that were killed
    file, name, arguments = call
    told, code = {}, 0
    try:
        told = {"result": runpy.run_path(file, run_name="process")[name](*arguments)}
    except BaseException as error:
        told, code = {"error": f"{type(error).__name__}: {error}"}, 1
    pipe.send(told)
    pipe.close()
    os._exit(code)


if __name__ == "process":
    _work(globals()["environment"], globals()["pipe"], globals()["call"])
