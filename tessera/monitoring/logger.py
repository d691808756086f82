"""What a run tells while it goes: log.jsonl, TensorBoard, and a line on the screen."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tessera.errors import TesseraError
from tessera.files import atomic_write
from tessera.reporting.text import format_duration

LOG, HEALTH = "log.jsonl", "health.jsonl"
PAUSE = 5.0  # seconds between lines where there is no terminal
PART = 20.0  # and between lines of work beside the steps


def read_log(run: Path, name: str = LOG) -> list[dict[str, Any]]:
    """The records of a run, oldest first; a line cut short by a kill is left out."""
    records = []
    path = run / name
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


class MetricLogger:
    """Writes one record at a time. On resuming, records past the resumed step are dropped: they will be made again.

    Of several processes one speaks; the journals of the others are `silent`.
    """

    def __init__(self, run: Path, step: int, steps: int, tensorboard: bool, silent: bool = False) -> None:
        self.run, self.steps, self.silent = run, steps, silent
        self._tensorboard = tensorboard and not silent
        self._files: dict[str, TextIO] = {}
        self._board = None
        self._screen = None if silent else ProgressDisplay(step, steps)
        self._told = time.monotonic()
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Go on from a step: what was recorded past it is dropped."""
        if self.silent or self._screen is None:
            return
        self._close_files()
        for name in (LOG, HEALTH):
            kept = [record for record in read_log(self.run, name) if record["step"] <= step]
            if kept or name == LOG or (self.run / name).exists():
                atomic_write(self.run / name, "".join(json.dumps(record) + "\n" for record in kept))
        self._board = _tensorboard(self.run, step) if self._tensorboard else None
        self._screen.start(step)

    def record(self, step: int, **values: float) -> None:
        """Write numbers at a step."""
        self._write(LOG, {"step": step, **values})
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._screen is not None:
            self._screen.set_metrics(step, values)

    def health(self, step: int, values: dict[str, Any]) -> None:
        """Write what was measured of the run's health at a step: numbers, lists and dictionaries of numbers."""
        self._write(HEALTH, {"step": step, **values})
        if self._board is not None:
            for name, value in values.items():
                for place, number in _numbers(f"health/{name}", value):
                    self._board.add_scalar(place, number, step)

    def _write(self, name: str, record: dict[str, Any]) -> None:
        if self.silent:
            return
        try:
            if name not in self._files:
                self._files[name] = (self.run / name).open("a", encoding="utf-8", buffering=1)
            self._files[name].write(json.dumps(record) + "\n")
        except OSError as error:
            raise TesseraError(
                f"cannot write {self.run / name}: {error.strerror or error}; mend that and run the same command again "
                "to go on"
            ) from error

    def image(self, step: int, sheet) -> None:
        """A grid of samples, uint8 [H, W, C], for TensorBoard."""
        if self._board is not None:
            self._board.add_image("samples", sheet, step, dataformats="HWC")

    def start(self, step: int) -> None:
        """The steps begin now: what came before does not count towards the time left."""
        if self._screen is not None:
            self._screen.start(step)

    def advance(self, step: int) -> None:
        """A step is done."""
        if self._screen is not None:
            self._screen.advance(step)

    def progress(self, what: str) -> Callable[[int, int], None]:
        """Work beside the steps, of which (done, total) is told now and then."""

        def told(done: int, total: int) -> None:
            now = time.monotonic()
            if now - self._told > PART:
                self._told = now
                self.info(f"  {what}: {done} of {total}")

        return told

    def info(self, text: str) -> None:
        """A sentence for the person who watches."""
        if self._screen is not None:
            self._screen.info(text)

    def close(self) -> None:
        if self._screen is not None:
            self._screen.close()
        self._close_files()

    def _close_files(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # of what could not be written, and was told
                file.close()
        self._files = {}
        if self._board is not None:
            self._board.close()
        self._board = None


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The single numbers in what was measured, each with a name."""
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _numbers(f"{name}/{key}", part)
    elif isinstance(value, list):
        for place, part in enumerate(value):
            yield from _numbers(f"{name}/{place}", part)


class ProgressDisplay:
    """A progress bar on a terminal; elsewhere a plain line now and then."""

    def __init__(self, step: int, steps: int) -> None:
        self.steps, self._numbers, self._last, self._started = steps, "", 0.0, (time.monotonic(), step)
        self._bar = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=steps, completed=step, numbers="")
            self._bar.start()

    def start(self, step: int) -> None:
        self._started = (time.monotonic(), step)

    def set_metrics(self, step: int, values: dict[str, float]) -> None:
        if "loss" in values:
            self._numbers = f"loss {values['loss']:.4f}, {values['images_per_second']:.4g} images/s"
            if "utilisation" in values:
                self._numbers += f", {values['utilisation']:.0%} of the peak"

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=self._numbers)
            return
        now = time.monotonic()
        if now - self._last < PAUSE and step < self.steps:
            return
        self._last = now
        began, first = self._started
        left = (now - began) / max(step - first, 1) * (self.steps - step)
        self._print(f"step {step}/{self.steps}  {self._numbers}  {format_duration(left)} left")

    def info(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _tensorboard(run: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
