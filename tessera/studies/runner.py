"""A study runs: one member after another, each in a process of its own, gone on with after whatever ended it.

A member that fails is noted and does not end the others. Several commands may work at one study, also on several
machines that share its folder: a member is held by one of them at a time.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

from tessera.errors import Interrupted, TesseraError
from tessera.files import InUse, atomic_write, exclusive_lock
from tessera.monitoring.logger import read_log
from tessera.reporting.text import format_duration
from tessera.studies import worker as apart
from tessera.studies.results import MemberResult, read_results
from tessera.studies.study import Study
from tessera.studies.study_plan import MEMBERS, MemberPlan, StudyPlan
from tessera.training.signals import stop_signals

LOCKS = "locks"
START_METHOD = "spawn"  # how a process begins: from nothing, as one that is forked amid threads may hang
PAUSE = 0.2  # seconds between looks at a member's process

Say = Callable[[str], None]


class MembersFailed(TesseraError):
    """Members of a study failed; the others are done."""


def run_study(study: Study, planned: StudyPlan, names: Sequence[str], retry: bool, say: Say) -> None:
    """Run or go on with the members of these names, in this order. retry: also those that failed before.

    Raises Interrupted when asked to stop by Ctrl-C or SIGTERM, all being saved; Failed at the end if members failed.
    """
    folder = Path(study.output)
    with stop_signals() as stopping:
        for number, name in enumerate(names, start=1):
            run, member = folder / MEMBERS / name, planned.members[name]
            try:
                with exclusive_lock(folder / LOCKS / name):
                    if apart.is_done(run, member.steps, study.sampling_steps):
                        continue
                    if (run / apart.FAILED).exists() and not retry:
                        say(f"{name} failed before and is passed over; --retry tries it again")
                        continue
                    (run / apart.FAILED).unlink(missing_ok=True)
                    say(f"member {number} of {len(names)}: {name}, {_times(study, planned, name, names)}")
                    if (fault := _process_of(study, member, stopping)) is not None:
                        atomic_write(run / apart.FAILED, fault + "\n")
                        say(f"{name} failed: {fault.splitlines()[0]}")
            except InUse:
                say(f"{name} is being run by another command")
            if stopping:
                break
    results = {result.name: result for result in read_results(study, folder)}
    if stopping:
        raise Interrupted(
            f"stopped, everything saved in {folder}: {_standing([results[name] for name in names])}; run the same "
            "command again to go on"
        )
    failed = [name for name in names if results[name].state == "failed"]
    if failed:
        raise MembersFailed(
            f"{len(failed)} of {len(names)} members failed: {', '.join(failed)}; "
            f"{folder / MEMBERS}/NAME/{apart.FAILED} says why, --retry tries them again"
        )


def _process_of(study: Study, member: MemberPlan, stopping: list[int]) -> str | None:
    """Run a member in a process of its own; why it failed, if it did. What arrives in `stopping` is handed on."""
    context = multiprocessing.get_context(START_METHOD)
    here, there = context.Pipe()
    process = context.Process(target=apart.main, args=(member.recipe, study.sampling_steps, there))
    with _held_back(signal.SIGINT):  # until it can take it: see `member.process`
        process.start()
    there.close()
    told = False
    try:
        while process.is_alive():
            process.join(PAUSE)
            if stopping and not told and process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGTERM)  # Ctrl-C in a terminal has reached it already
                told = True
        fault = here.recv() if here.poll() else None
    except EOFError:
        fault = None
    finally:
        process.kill()
        process.join()
        here.close()
    code = process.exitcode
    if code == apart.STOPPED and not stopping:
        stopping.append(signal.SIGTERM)  # the process alone was asked
    if stopping or code == 0:
        return None
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"its process was ended by {name}" + (
            ": the system may have run out of memory" if name == "SIGKILL" else ""
        )
    return fault or f"its process ended with code {code}"


@contextmanager
def _held_back(number: signal.Signals) -> Iterator[None]:
    """A signal waits, also in a process that begins here, where the system can."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # which multiprocessing begins with the first process, letting signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _times(study: Study, planned: StudyPlan, name: str, names: Sequence[str]) -> str:
    """What the member was planned to take, and what the whole still takes if planned times are as wrong as so far."""
    results = {result.name: result for result in read_results(study, Path(study.output))}
    finished = [result for result in results.values() if result.state == "done" and result.points]
    took, meant = sum(one.points[-1].seconds for one in finished), sum(one.planned_seconds for one in finished)
    ratio = took / meant if meant else 1.0
    left = 0.0
    for other in names:
        member, result = planned.members[other], results[other]
        if result.state in ("unfinished", "not begun"):
            log = read_log(Path(study.output) / MEMBERS / other)
            left += member.total_seconds * (1 - min(1.0, log[-1]["step"] / member.steps if log else 0.0))
    scaled = f"; so far {ratio:.2g} times as long as planned" if finished else ""
    return f"planned {format_duration(planned.members[name].total_seconds)}, about {format_duration(left * ratio)} left of all{scaled}"


def _standing(results: Sequence[MemberResult]) -> str:
    """How many members are where."""
    states = ("done", "unfinished", "failed", "not begun")
    counts = {state: sum(result.state == state for result in results) for state in states}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)
