"""Work in several processes that end with this one, however it ends."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from typing import Any, TypeVar

from tessera.errors import TesseraError

T = TypeVar("T")


def run_in_processes(
    function: Callable[[T], Iterable[int]], items: Sequence[T], workers: int
) -> Generator[int, None, None]:
    """Call a function for each item in worker processes; yields what the calls yield, counts of finished work.

    function: must be picklable; each process unpickles it once. Raises TesseraError if it does or a process dies.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy locks held by threads of this process
    todo = deque(items)
    pipes, processes = [], []
    try:
        with _defer_interrupts():
            for _ in range(min(workers, len(items))):
                ours, theirs = context.Pipe()
                process = context.Process(target=_run_worker, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
        # Not as an argument of the process: a large one is written while this process itself holds the end that is
        # read, so if the new process dies, the write would never return.
        for pipe in pipes:
            pipe.send((function, todo.popleft()))
        while pipes:
            ready: list[Any] = connection.wait(pipes)
            for pipe in ready:
                message = pipe.recv()
                if message is None and todo:
                    pipe.send(todo.popleft())
                elif message is None:
                    pipes.remove(pipe)
                elif isinstance(message, TesseraError):
                    raise message
                else:
                    yield message
    except (EOFError, OSError):
        raise TesseraError(
            "a worker process died, probably for lack of memory: run the same command again with fewer --workers than "
            f"{workers}; finished work is not repeated"
        ) from None
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run_worker(pipe: Any) -> None:
    """A process that receives the function, then items one by one; sends counts, and None after each item."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        function, item = pipe.recv()
        while True:
            for count in function(item):
                pipe.send(count)
            pipe.send(None)
            item = pipe.recv()
    except TesseraError as error:
        pipe.send(error)
    except (EOFError, BrokenPipeError):
        pass


def _exit_with_parent() -> None:
    """A parent that was killed cannot end its children."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _defer_interrupts() -> Iterator[None]:
    """Handle Ctrl-C after this context. Processes started in it never receive it, although it is sent to every process
    of a terminal: this process ends them."""
    received: list[int] = []
    try:
        before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    except ValueError:  # not the main thread, which is the only one that is interrupted
        yield
        return
    resource_tracker.ensure_running()  # the first process would start it, and it unblocks Ctrl-C in this thread
    mask = None
    if hasattr(signal, "pthread_sigmask"):  # not on Windows; for the children, as other threads here still receive it
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
        if received:
            signal.raise_signal(signal.SIGINT)
