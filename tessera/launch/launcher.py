"""The interface of all launchers, and the loop that repeats failed tasks."""

import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from tessera.errors import Interrupted, PartlyFailed, TesseraError
from tessera.launch.task import Outcome, Task

DONE = (0, PartlyFailed.exit_code)  # exit codes of tasks that are not repeated


class Launcher(Protocol):
    """Where tasks run."""

    def submit(self, tasks: Sequence[Task]) -> None:
        """Start tasks as soon as there is room. Raises TesseraError."""
        ...

    def wait(self) -> list[Outcome]:
        """Wait until at least one task has ended. Each outcome is returned once."""
        ...

    def stop(self) -> None:
        """End all tasks and wait for them."""
        ...


def run(
    launcher: Launcher,
    tasks: Sequence[Task],
    retries: int,
    progress: Callable[[int, int], None],
    log: Callable[[str], None],
) -> list[Outcome]:
    """Run all tasks; a failed one is repeated up to `retries` times. progress: receives finished and all.

    Returns the outcomes in the order of the tasks. Raises TesseraError with the ends of the logs if tasks failed, after
    all others have ended; Interrupted after Ctrl-C or SIGTERM.
    """
    attempts: Counter[str] = Counter()
    outcomes: dict[str, Outcome] = {}
    failures: dict[str, Outcome] = {}
    try:
        with interrupt_on_sigterm():
            launcher.submit(tasks)
            while len(outcomes) + len(failures) < len(tasks):
                for outcome in launcher.wait():
                    task = outcome.task
                    attempts[task.name] += 1
                    if outcome.code in DONE:
                        outcomes[task.name] = outcome
                        progress(len(outcomes), len(tasks))
                        log(f"{task.name} is done: {len(outcomes)} of {len(tasks)}")
                    elif attempts[task.name] <= retries:
                        attempt = f"attempt {attempts[task.name] + 1} of {retries + 1}"
                        log(f"{task.name} failed with {describe_code(outcome.code)}; {attempt}")
                        launcher.submit([task])
                    else:
                        log(f"{task.name} failed with {describe_code(outcome.code)}, and is not repeated")
                        failures[task.name] = outcome
    except KeyboardInterrupt:
        log("stopping the tasks")
        launcher.stop()
        done = f"{len(outcomes)} of {len(tasks)} tasks were done"
        raise Interrupted(f"interrupted; {done}, and all work is saved: repeat the command to resume") from None
    except BaseException:
        launcher.stop()
        raise
    if failures:
        raise TesseraError(_describe_failures(list(failures.values()), len(tasks), retries))
    return [outcomes[task.name] for task in tasks]


def describe_code(code: int) -> str:
    """The exit code of a process in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"code {code}"


def _describe_failures(failures: Sequence[Outcome], count: int, retries: int) -> str:
    """All failed tasks, each with the end of its log."""
    times = "" if retries == 0 else f" {retries + 1} times"
    lines = [f"{len(failures)} of {count} tasks failed{times}; the others are done. Repeat the command to resume"]
    for outcome in failures[:4]:
        lines.append(f"{outcome.task.name}: {describe_code(outcome.code)}; log: {outcome.task.log}")
        lines += [f"    {line}" for line in outcome.tail.splitlines()]
    if len(failures) > 4:
        lines.append(f"and {', '.join(outcome.task.name for outcome in failures[4:])}")
    return "\n".join(lines)


@contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Handle SIGTERM as Ctrl-C, where this is the main thread."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
