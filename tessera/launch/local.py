"""Tasks as processes on this machine, some at a time."""

import os
import queue
import threading
from collections.abc import Sequence

from tessera.errors import TesseraError
from tessera.launch.task import Outcome, Task, run_task


class LocalLauncher:
    """cpus, gpus: of this machine. parallel: the largest number of tasks at a time; None: as many as fit."""

    def __init__(self, cpus: int, gpus: int, parallel: int | None = None) -> None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.devices = visible.split(",")[:gpus] if visible is not None else [str(number) for number in range(gpus)]
        self.cpus, self.parallel = cpus, parallel
        self._waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def submit(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self._waiting.put(task)
        if not self._threads:
            for devices in self._slots(tasks):
                thread = threading.Thread(target=self._run_slot, args=(devices,), daemon=True)
                thread.start()
                self._threads.append(thread)

    def _slots(self, tasks: Sequence[Task]) -> list[list[str]]:
        """The GPUs of each task that runs at the same time as others."""
        cpus, gpus = max(task.cpus for task in tasks), max(task.gpus for task in tasks)
        if gpus > len(self.devices):
            raise TesseraError(
                f"a task needs {gpus} GPUs, and this machine has {len(self.devices)}: lower --launch-option gpus={gpus}"
            )
        count = min(len(tasks), self.parallel or max(1, self.cpus // cpus))
        if gpus:
            count = min(count, len(self.devices) // gpus)
        return [self.devices[slot * gpus : (slot + 1) * gpus] for slot in range(count)]

    def _run_slot(self, devices: list[str]) -> None:
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
        while not self._stopped.is_set():
            try:
                task = self._waiting.get(timeout=0.1)
            except queue.Empty:
                continue
            try:
                self._ended.put(run_task(task, environment, self._stopped.is_set))
            except BaseException as error:
                self._ended.put(error)

    def wait(self) -> list[Outcome]:
        while True:
            try:
                ended = self._ended.get(timeout=0.5)  # a wait without end would defer Ctrl-C
            except queue.Empty:
                continue
            if isinstance(ended, BaseException):
                raise ended
            return [ended]

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()
