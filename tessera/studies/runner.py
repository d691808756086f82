"""Running a study: one member after another, each in its own process, resumed after any interruption.

A failed member is recorded and does not stop the others. Several commands may run one study at the same time, also on
several machines that share its folder: a lock gives each member to one command.
"""

import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

from tessera.errors import Interrupted, PartlyFailed
from tessera.files import InUse, atomic_write, exclusive_lock
from tessera.monitoring.logger import read_log
from tessera.reporting.text import format_duration
from tessera.studies import worker
from tessera.studies.results import read_results
from tessera.studies.study import Study
from tessera.studies.study_plan import MEMBERS, MemberPlan, StudyPlan
from tessera.training.signals import stop_signals

LOCKS = "locks"
START_METHOD = "spawn"  # a process that is forked while threads run may hang
POLL_SECONDS = 0.2

Log = Callable[[str], None]


class MembersFailed(PartlyFailed):
    """Members of a study failed; the others are done."""


def run_study(study: Study, plan: StudyPlan, names: Sequence[str], retry: bool, log: Log, wait: bool = False) -> None:
    """Run or resume these members, in this order. retry: also those that failed before. wait: until members that other
    commands run are done, and run those that such a command leaves unfinished.

    Raises Interrupted after Ctrl-C or SIGTERM, when everything is saved; MembersFailed at the end if members failed.
    """
    folder = Path(study.output)
    pending, busy = deque(enumerate(names, start=1)), set[str]()
    with stop_signals() as signals:
        while pending:
            number, name = pending.popleft()
            run_dir, member = folder / MEMBERS / name, plan.members[name]
            failed = run_dir / worker.FAILED
            try:
                with exclusive_lock(folder / LOCKS / name):
                    if worker.is_done(run_dir, member.steps, study.sampling_steps):
                        continue
                    if failed.exists() and not retry:
                        log(f"{name} failed before and is skipped; --retry runs it again")
                        continue
                    failed.unlink(missing_ok=True)
                    log(f"member {number} of {len(names)}: {name}, {_time_estimate(study, plan, name, names)}")
                    if (error := _run_in_process(study, member, signals)) is not None:
                        atomic_write(failed, error + "\n")
                        log(f"{name} failed: {error.splitlines()[0]}")
            except InUse:
                if name not in busy:
                    log(f"{name} is being run by another command" + (": waiting for it" if wait else ""))
                busy.add(name)
                if wait:
                    pending.append((number, name))
                    time.sleep(POLL_SECONDS)
            if signals:
                break
    states = {result.name: result.state for result in read_results(study, folder) if result.name in names}
    if signals:
        counts = Counter(states.values())
        text = ", ".join(f"{counts[s]} {s}" for s in ("done", "unfinished", "failed", "not started") if counts[s])
        raise Interrupted(f"stopped, everything saved in {folder}: {text}; run the same command again to resume")
    failures = [name for name in names if states[name] == "failed"]
    if failures:
        first = (folder / MEMBERS / failures[0] / worker.FAILED).read_text().splitlines()[0]
        raise MembersFailed(
            f"{len(failures)} of {len(names)} members failed: {', '.join(failures)}; {failures[0]}: {first}; "
            f"{folder / MEMBERS}/NAME/{worker.FAILED} has each error, --retry runs them again"
        )


def _run_in_process(study: Study, member: MemberPlan, signals: list[int]) -> str | None:
    """Run a member in its own process. Returns the error if it failed. A signal in `signals` is passed on."""
    context = multiprocessing.get_context(START_METHOD)
    connection, child_connection = context.Pipe()
    process = context.Process(target=worker.main, args=(member.recipe, study.sampling_steps, child_connection))
    with _block_signal(signal.SIGINT):  # until the process can handle it: see `worker.main`
        process.start()
    child_connection.close()
    terminated = False
    try:
        while process.is_alive():
            process.join(POLL_SECONDS)
            if signals and not terminated and process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGTERM)  # Ctrl-C in a terminal has reached it already
                terminated = True
        error = connection.recv() if connection.poll() else None
    except EOFError:
        error = None
    finally:
        process.kill()
        process.join()
        connection.close()
    code = process.exitcode
    if code == worker.STOPPED and not signals:
        signals.append(signal.SIGTERM)  # only the member's process received a signal
    if signals or code == 0:
        return None
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ": the system may have run out of memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return error or f"its process ended with code {code}"


@contextmanager
def _block_signal(number: signal.Signals) -> Iterator[None]:
    """Delay a signal, also in processes that start inside, where the system supports it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # multiprocessing starts it with the first process, and unblocks signals there
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _time_estimate(study: Study, plan: StudyPlan, name: str, names: Sequence[str]) -> str:
    """The planned time of a member, and the time left for all members, scaled by how wrong the plan was so far."""
    results = {result.name: result for result in read_results(study, Path(study.output))}
    done = [result for result in results.values() if result.state == "done" and result.points]
    actual, planned = sum(each.points[-1].seconds for each in done), sum(each.planned_seconds for each in done)
    ratio = actual / planned if planned else 1.0
    left = 0.0
    for each in names:
        if results[each].state in ("unfinished", "not started"):
            log, member = read_log(Path(study.output) / MEMBERS / each), plan.members[each]
            left += member.total_seconds * (1 - min(1.0, log[-1]["step"] / member.steps if log else 0.0))
    scale = f"; so far {ratio:.2g} times as long as planned" if done else ""
    total = format_duration(plan.members[name].total_seconds)
    return f"planned {total}, about {format_duration(left * ratio)} left in total{scale}"
