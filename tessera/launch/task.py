"""One task: a `tessera` command that does a part of a work, in a process of its own.

A task is idempotent: what it has done lies on disk, a repetition skips it, and two that run at once write the same
bytes. So a task may be repeated anywhere, after any failure.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

CHILD = "TESSERA_TASK"  # set in the process of a task
CPUS = "TESSERA_CPUS"  # see `runtime.available_cpus`
POLL_SECONDS = 0.1
STOP_SECONDS = 60.0  # for a task to save what it has done
TAIL_LINES = 12  # of the log of a failed task


@dataclass(frozen=True)
class Task:
    """words: of the command, without `tessera`. folder: its working directory. log: of its output, appended to.

    cpus: CPU cores that it uses. gpus: GPUs that it needs. module: what Python runs.
    """

    name: str
    words: tuple[str, ...]
    folder: Path
    log: Path
    cpus: int = 1
    gpus: int = 0
    module: str = "tessera"


@dataclass(frozen=True)
class Outcome:
    """How a task ended. code: of its process; below 0: killed by that signal. tail: the end of its log."""

    task: Task
    code: int
    tail: str = ""


@dataclass
class _Running:
    """The process of a task in this process, for signal handlers."""

    process: subprocess.Popen | None = field(default=None)


running = _Running()


def never() -> bool:
    """A task that runs to its end."""
    return False


def run_task(
    task: Task, environment: Mapping[str, str] | None = None, is_stopped: Callable[[], bool] = never
) -> Outcome:
    """Run a task and wait for it. If this process ends, so does the task.

    environment: variables beside those of this process. is_stopped: called repeatedly; the task is ended once it
    is true, as it is by any exception, such as Ctrl-C.
    """
    variables = {"OMP_NUM_THREADS": str(task.cpus), **os.environ, CPUS: str(task.cpus), CHILD: "1"}
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("ab") as log:
        start = os.fstat(log.fileno()).st_size
        process = subprocess.Popen(
            [sys.executable, "-m", task.module, *task.words],
            cwd=task.folder,
            env={**variables, **(environment or {})},
            stdin=subprocess.PIPE,  # closes when this process ends: see `exit_with_parent`
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone
        )
        running.process = process
        try:
            while process.poll() is None and not is_stopped():
                time.sleep(POLL_SECONDS)
        finally:
            stop(process)
            running.process = None
    return Outcome(task, process.returncode, _tail(task.log, start))


def stop(process: subprocess.Popen) -> None:
    """End a task and everything that it started; it may first save what it has done."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _tail(log: Path, start: int) -> str:
    """The last lines of a log behind a position."""
    with log.open("rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - 8192))
        text = file.read().decode("utf-8", "replace")
    return "\n".join(text.strip().splitlines()[-TAIL_LINES:])


def exit_with_parent() -> None:
    """In the process of a task: end it, and what it started, when the process that started it ends in any way."""
    if os.environ.pop(CHILD, None) is None:
        return
    if hasattr(signal, "SIGUSR2"):  # SLURM sends it to all processes, and submitit handles it in the one above
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    stdin = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    threading.Thread(target=wait_for_end, args=(stdin,), daemon=True).start()


def wait_for_end(stdin: int) -> None:
    """Kill this process and what it started when the process that started it exits, which writes nothing to `stdin`."""
    with contextlib.suppress(OSError):
        os.read(stdin, 1)
    os.killpg(0, signal.SIGKILL)
