"""Tasks in a Ray cluster: Ray assigns cores and GPUs to them, and repeats those of a lost machine elsewhere."""

import logging
import os
from collections.abc import Sequence
from typing import Any

from tessera.errors import TesseraError
from tessera.launch.task import STOP_SECONDS, Outcome, Task, run_task

WAIT_SECONDS = 1.0
PASSED = ("PYTHONPATH", "OMP_NUM_THREADS")  # variables of this process for the tasks, beside TESSERA_*


def import_ray() -> Any:
    """Ray. Raises TesseraError if it is not installed."""
    try:
        import ray
    except ImportError:
        raise TesseraError("--launch ray needs Ray, which is not installed: pip install 'tessera[ray]'") from None
    return ray


def connect() -> Any:
    """Ray, connected to the cluster of RAY_ADDRESS, to one that runs on this machine, or to a new one of this machine.

    Raises TesseraError if it cannot be reached.
    """
    ray = import_ray()
    if not ray.is_initialized():
        try:
            ray.init(logging_level=logging.WARNING, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            address = os.environ.get("RAY_ADDRESS", "on this machine")
            raise TesseraError(f"cannot reach the Ray cluster {address}: {error}{_token_advice()}") from None
    return ray


def _token_advice() -> str:
    """What to do if the cluster wants a token, as those do that `ray start` begins where ~/.ray/auth_token exists."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() in ("token", "k8s"):
        return "; it may want another token: copy ~/.ray/auth_token of its first machine to this one"
    return (
        "; if the lines above speak of a token, copy ~/.ray/auth_token of its first machine and set RAY_AUTH_MODE=token"
    )


def passed_environment() -> dict[str, str]:
    """The variables of this process that tasks need on other machines."""
    return {name: value for name, value in os.environ.items() if name in PASSED or name.startswith("TESSERA_")}


class RayLauncher:
    """retries: how often Ray repeats a task whose machine or worker is lost."""

    def __init__(self, retries: int) -> None:
        self.ray, self.retries = connect(), retries
        self._tasks: dict[Any, Task] = {}  # by reference to the result

    @property
    def cpus(self) -> int:
        """CPU cores of the cluster."""
        return int(self.ray.cluster_resources().get("CPU", 0))

    def submit(self, tasks: Sequence[Task]) -> None:
        remote = self.ray.remote(run_task)
        for task in tasks:
            reference = remote.options(
                name=f"tessera {task.name}",
                num_cpus=task.cpus,
                num_gpus=task.gpus,
                max_retries=self.retries,
                scheduling_strategy="SPREAD",
                runtime_env={"env_vars": passed_environment()},
            ).remote(task)
            self._tasks[reference] = task

    def wait(self) -> list[Outcome]:
        done: list[Any] = []
        while not done:
            done, _ = self.ray.wait(list(self._tasks), num_returns=1, timeout=WAIT_SECONDS)
        return [self._outcome(reference, self._tasks.pop(reference)) for reference in done]

    def _outcome(self, reference: Any, task: Task) -> Outcome:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayError as error:  # lost more often than it is repeated, or no room for the log
            return Outcome(task, 1, str(error))

    def stop(self) -> None:
        for reference in self._tasks:
            self.ray.cancel(reference, force=False)  # raises KeyboardInterrupt in `run_task`
        if self._tasks:
            references = list(self._tasks)
            self.ray.wait(references, num_returns=len(references), timeout=STOP_SECONDS)
