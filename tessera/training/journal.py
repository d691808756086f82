"""What a run tells while it goes: log.jsonl, TensorBoard, and a line on the screen."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tessera.files import write_whole

LOG = "log.jsonl"
PAUSE = 5.0  # seconds between lines where there is no terminal
PART = 20.0  # and between lines of work beside the steps


def read_log(run: Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; a line cut short by a kill is left out."""
    records = []
    path = run / LOG
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


class Journal:
    """Writes one record at a time. On resuming, records past the resumed step are dropped: they will be made again."""

    def __init__(self, run: Path, step: int, steps: int, tensorboard: bool) -> None:
        self.step, self.steps = step, steps
        kept = [record for record in read_log(run) if record["step"] <= step]
        write_whole(run / LOG, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = (run / LOG).open("a", encoding="utf-8", buffering=1)
        self._board = _tensorboard(run, step) if tensorboard else None
        self._screen = Screen(step, steps)
        self._told = time.monotonic()

    def record(self, step: int, **values: float) -> None:
        """Write numbers at a step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        self._screen.numbers(step, values)

    def picture(self, step: int, sheet) -> None:
        """A grid of samples, uint8 [H, W, C], for TensorBoard."""
        if self._board is not None:
            self._board.add_image("samples", sheet, step, dataformats="HWC")

    def start(self, step: int) -> None:
        """The steps begin now: what came before does not count towards the time left."""
        self._screen.start(step)

    def advance(self, step: int) -> None:
        """A step is done."""
        self._screen.advance(step)

    def part(self, what: str) -> Callable[[int, int], None]:
        """Work beside the steps, of which (done, total) is told now and then."""

        def told(done: int, total: int) -> None:
            now = time.monotonic()
            if now - self._told > PART:
                self._told = now
                self._screen.say(f"  {what}: {done} of {total}")

        return told

    def say(self, text: str) -> None:
        """A sentence for the person who watches."""
        self._screen.say(text)

    def close(self) -> None:
        self._screen.close()
        self._file.close()
        if self._board is not None:
            self._board.close()


class Screen:
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

    def numbers(self, step: int, values: dict[str, float]) -> None:
        if "loss" in values:
            self._numbers = f"loss {values['loss']:.4f}, {values['images_per_second']:.4g} images/s"

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
        self._print(f"step {step}/{self.steps}  {self._numbers}  {clock(left)} left")

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def clock(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 5 h 10 min, 2 d 3 h."""
    for size, name, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {name} {int(seconds % size // smaller_size)} {smaller}"
    return f"{int(seconds)} s"


def _tensorboard(run: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
