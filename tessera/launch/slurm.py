"""Tasks as a SLURM job array, submitted by submitit. All machines share the folder of the logs.

A job that reaches its time limit, is preempted or loses its machine is queued again and resumes.
"""

import pickle
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.errors import TesseraError
from tessera.launch import task as tasks_module
from tessera.launch.task import Outcome, Task, run_task, stop

POLL_SECONDS = 2.0
LATE_SECONDS = 60.0  # for a result to appear in a shared folder after its job has ended
DEFAULT_MINUTES = 240  # of a job without the option time
REQUEUES = 1000  # after a time limit: the task resumes each time
ACTIVE = {  # states of a job that has not ended, or is about to be queued again
    "PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
    "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "PREEMPTED", "SPECIAL_EXIT",
}  # fmt: skip


@dataclass(frozen=True)
class SlurmTask:
    """What submitit calls in a job."""

    task: Task

    def __call__(self) -> Outcome:
        return run_task(self.task)

    def checkpoint(self) -> Any:
        """Called before the time limit and at a preemption: the task saves, and the job is queued again."""
        from submitit.helpers import DelayedSubmission

        if (process := tasks_module.running.process) is not None:
            stop(process)
        return DelayedSubmission(self)


def check_slurm() -> None:
    """Raise TesseraError if submitit is not installed or this machine has no SLURM."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise TesseraError(
            "--launch slurm needs submitit, which is not installed: pip install 'tessera[slurm]'"
        ) from None
    require_program("sbatch")


def require_program(name: str) -> None:
    """Raise TesseraError if a program of SLURM is not on this machine."""
    if shutil.which(name) is None:
        raise TesseraError(f"--launch slurm needs SLURM's {name}, which is not on this machine: run it on a login node")


def minutes(text: str) -> int:
    """SLURM's times, as in 90, 90:00, 4:00:00, 1-12 or 1-12:30:00 -> minutes, rounded up. Raises TesseraError."""
    days, dash, rest = text.partition("-") if "-" in text else ("0", "", text)
    try:
        numbers = [int(part) for part in rest.split(":")]
        if dash:
            hours, mins, secs = [*numbers, 0, 0][:3]
        else:
            hours, mins, secs = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
        total = (int(days) * 24 + hours) * 60 + mins + (secs > 0)
    except (ValueError, KeyError):
        total = 0
    if total < 1:
        raise TesseraError(f"time={text} is not valid: write minutes, HH:MM:SS or D-HH:MM:SS, at least a minute")
    return total


class SlurmLauncher:
    """folder: for scripts, results and logs of the jobs. options: of sbatch, without dashes, as in partition=gpu."""

    def __init__(self, folder: Path, options: Mapping[str, str], name: str = "tessera") -> None:
        check_slurm()
        from submitit import SlurmExecutor

        options = dict(options)
        self.executor = SlurmExecutor(folder.absolute(), max_num_timeout=REQUEUES)
        self.executor.update_parameters(
            job_name=name,
            time=minutes(options.pop("time", str(DEFAULT_MINUTES))),
            stderr_to_stdout=True,
            additional_parameters={"requeue": True, **{key: value or True for key, value in options.items()}},
        )
        self._jobs: dict[str, tuple[Any, Task]] = {}  # by the number of the job
        self._ended: dict[str, float] = {}  # when a job without a result was first known to have ended

    def submit(self, tasks: Sequence[Task]) -> None:
        resources = {"cpus_per_task": max(task.cpus for task in tasks)}
        if gpus := max(task.gpus for task in tasks):
            resources["gpus_per_node"] = gpus
        self.executor.update_parameters(**resources, array_parallelism=len(tasks))
        try:
            jobs = self.executor.submit_array([SlurmTask(task) for task in tasks])
        except subprocess.CalledProcessError as error:
            raise TesseraError(f"sbatch refused the job: {_text(error.stderr or error.output)}") from None
        except Exception as error:
            if type(error).__module__.startswith("submitit"):
                raise TesseraError(f"sbatch refused the job: {error}") from None
            raise
        self._jobs |= {job.job_id: (job, task) for job, task in zip(jobs, tasks)}

    def wait(self) -> list[Outcome]:
        while True:
            states = self._states()
            outcomes = [outcome for number in list(self._jobs) if (outcome := self._outcome(number, states))]
            if outcomes:
                return outcomes
            time.sleep(POLL_SECONDS)

    def _outcome(self, number: str, states: dict[str, str] | None) -> Outcome | None:
        """The outcome of a job that has ended, None if it has not. states: None if they are not known."""
        job, task = self._jobs[number]
        outcome = None
        if job.paths.result_pickle.exists():
            with job.paths.result_pickle.open("rb") as file:
                status, result = pickle.load(file)  # which a job of ours wrote
            outcome = result if status == "success" else Outcome(task, 1, str(result))
        elif states is not None and (state := states.get(number, "unknown to SLURM")) not in ACTIVE:
            since = self._ended.setdefault(number, time.monotonic())
            if time.monotonic() - since > LATE_SECONDS:
                outcome = Outcome(task, 1, f"job {number} ended without a result: {state}; log: {job.paths.stdout}")
        else:
            self._ended.pop(number, None)
        if outcome is not None:
            del self._jobs[number]
            self._ended.pop(number, None)
        return outcome

    def _states(self) -> dict[str, str] | None:
        """The state of each job that SLURM still lists; None if the controller does not answer.

        From squeue, because sacct needs a database that not every cluster has.
        """
        numbers = ",".join(sorted({number.partition("_")[0] for number in self._jobs}))
        done = subprocess.run(
            ["squeue", "--noheader", "--array", "--states=all", f"--jobs={numbers}", "--format=%i %T"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode and "Invalid job id" not in done.stderr:
            return None
        return dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line.strip())

    def stop(self) -> None:
        numbers = sorted(self._jobs)
        if numbers:
            subprocess.run(["scancel", *numbers], capture_output=True, check=False)
        deadline = time.monotonic() + tasks_module.STOP_SECONDS
        while numbers and time.monotonic() < deadline:
            states = self._states()
            if states is not None and all(states.get(number) not in ACTIVE for number in numbers):
                return
            time.sleep(POLL_SECONDS)


def _text(output: Any) -> str:
    return (output.decode(errors="replace") if isinstance(output, bytes) else str(output or "")).strip()
