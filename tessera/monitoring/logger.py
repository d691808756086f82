"""Logging of a run: log.jsonl, TensorBoard, and a progress line on the terminal."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tessera.errors import TesseraError
from tessera.files import atomic_write
from tessera.reporting.text import format_duration

LOG, HEALTH = "log.jsonl", "health.jsonl"
LINE_INTERVAL = 5.0  # seconds between progress lines without a terminal
TASK_INTERVAL = 20.0  # seconds between lines about work other than steps


def read_log(run: Path, name: str = LOG) -> list[dict[str, Any]]:
    """The records of a run, oldest first. A line that is incomplete because the run was killed is ignored."""
    records = []
    path = run / name
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


class ProgressDisplay:
    """A progress bar on a terminal; otherwise a line every LINE_INTERVAL seconds. A silent one shows nothing."""

    def __init__(self, step: int, steps: int, silent: bool = False) -> None:
        self.steps, self.silent = steps, silent
        self._metrics, self._last, self._started = "", 0.0, (time.monotonic(), step)
        self._bar = None
        if sys.stderr.isatty() and not silent:
            columns = (
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.fields[metrics]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=steps, completed=step, metrics="")
            self._bar.start()

    def start(self, step: int) -> None:
        """Start the clock of the remaining time, just before the first step."""
        self._started = (time.monotonic(), step)

    def set_metrics(self, values: dict[str, float]) -> None:
        if "loss" in values:
            self._metrics = f"loss {values['loss']:.4f}, {values['images_per_second']:.4g} images/s"
            if "mfu" in values:
                self._metrics += f", {values['mfu']:.0%} MFU"

    def advance(self, step: int) -> None:
        """Show that a step is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=self._metrics)
            return
        now = time.monotonic()
        if now - self._last < LINE_INTERVAL and step < self.steps:
            return
        self._last = now
        start_time, first = self._started
        left = (now - start_time) / max(step - first, 1) * (self.steps - step)
        self.info(f"step {step}/{self.steps}  {self._metrics}  {format_duration(left)} left")

    def info(self, text: str) -> None:
        """Print a message."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self.silent:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class MetricLogger(ProgressDisplay):
    """Writes one record at a time. On resuming, records after the resumed step are removed, since they are repeated.

    Only one rank writes and prints; the loggers of the others are `silent`.
    """

    def __init__(self, run: Path, step: int, steps: int, tensorboard: bool, silent: bool = False) -> None:
        super().__init__(step, steps, silent)
        self.run, self._use_tensorboard = run, tensorboard
        self._files: dict[str, TextIO] = {}
        self._tensorboard = None
        self._last_task_line = time.monotonic()
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Continue from a step: remove the records after it."""
        if self.silent:
            return
        self._close_files()
        for name in (LOG, HEALTH):
            records = [record for record in read_log(self.run, name) if record["step"] <= step]
            if records or name == LOG or (self.run / name).exists():
                atomic_write(self.run / name, "".join(json.dumps(record) + "\n" for record in records))
        self._tensorboard = _open_tensorboard(self.run, step) if self._use_tensorboard else None
        self.start(step)

    def record(self, step: int, **values: float) -> None:
        """Write metrics of a step."""
        self._write(LOG, {"step": step, **values})
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        self.set_metrics(values)

    def health(self, step: int, values: dict[str, Any]) -> None:
        """Write health metrics of a step: numbers, lists and dictionaries of numbers."""
        self._write(HEALTH, {"step": step, **values})
        if self._tensorboard is not None:
            for name, value in values.items():
                for tag, number in _scalars(f"health/{name}", value):
                    self._tensorboard.add_scalar(tag, number, step)

    def _write(self, name: str, record: dict[str, Any]) -> None:
        if self.silent:
            return
        try:
            if name not in self._files:
                self._files[name] = (self.run / name).open("a", encoding="utf-8", buffering=1)
            self._files[name].write(json.dumps(record) + "\n")
        except OSError as error:
            raise TesseraError(
                f"cannot write {self.run / name}: {error.strerror or error}; fix the cause and run the same command "
                "again to resume"
            ) from error

    def image(self, step: int, grid: np.ndarray) -> None:
        """Write a grid of samples, uint8 [H, W, C], to TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.add_image("samples", grid, step, dataformats="HWC")

    def progress(self, task: str) -> Callable[[int, int], None]:
        """A callback (done, total) for work other than steps; it prints a line every TASK_INTERVAL seconds."""

        def report(done: int, total: int) -> None:
            now = time.monotonic()
            if now - self._last_task_line > TASK_INTERVAL:
                self._last_task_line = now
                self.info(f"  {task}: {done} of {total}")

        return report

    def close(self) -> None:
        super().close()
        self._close_files()

    def _close_files(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # a failed write was already reported
                file.close()
        self._files = {}
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._tensorboard = None


def _scalars(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in a nested value, each with its own name."""
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _scalars(f"{name}/{key}", part)


def _open_tensorboard(run: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
