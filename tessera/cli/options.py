"""Arguments and options that several commands share. Imports nothing heavy."""

import csv
import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

import typer

from tessera.errors import TesseraError

QUOTING = "write a name with a comma in double quotes, and a double quote in it twice: '\"red, blue\",cat'"
MAX_SAMPLES = 1_000_000  # per command; more is most likely a typing error

ModelPath = Annotated[
    str,
    typer.Argument(help="a bundle, a run, an official .pt, a diffusers folder, or a name of `tessera models`"),
]
DataPath = Annotated[
    str,
    typer.Argument(help="a folder, a .parquet, a recipe, digits, shapes or lanes, or a split such as digits:ceiling"),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="settings of the recipe")]
SamplingOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value]...",
        help="sampling settings instead of the model's own: num_steps=20 guidance_scale=2 sampler=dpm++ "
        "sampler.order=3 timestep_spacing=karras ...",
    ),
]
EMA = Annotated[
    float | None, typer.Option("--ema", help="decay of the EMA to load, if a run has several (default: the first)")
]
EMALength = Annotated[
    float | None,
    typer.Option(
        help="length of the EMA to load, such as 0.08, for a run with training.ema.kind=power; also lengths that were "
        "not saved"
    ),
]
NumHeads = Annotated[int | None, typer.Option(help="attention heads, for a .pt of unusual width")]
CheckpointType = Annotated[
    str | None,
    typer.Option(help="type of a .pt that does not record it: dit, sit, sit-gvp, repa, repa-cosine"),
]
NumClasses = Annotated[
    int | None,
    typer.Option(help="classes of a .pt, without the null label (default: the rows of its label table minus one)"),
]
Codec = Annotated[str | None, typer.Option(help="autoencoder folder, hub id or 'pixels', instead of the model's own")]
TextEncoder = Annotated[
    str | None, typer.Option(help="text encoder folder, hub:owner/name or 'minilm', instead of the model's own")
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="[NAME=]PATH[:STRENGTH]",
        help="a trained adapter (a run or an adapter file) and its strength; repeatable",
    ),
]
AnyBase = Annotated[bool, typer.Option("--any-base", help="accept adapters that were trained on another model")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps")]
Precision = Annotated[Literal["float32", "bfloat16", "auto"], typer.Option(help="precision of the network")]
Size = Annotated[str | None, typer.Option(metavar="HEIGHTxWIDTH", help="in pixels: 256 or 256x384")]
SampleSize = Annotated[
    str | None,
    typer.Option(metavar="[FRAMESx]HEIGHTxWIDTH", help="in pixels: 256 or 256x384; for clips also 16x256x384"),
]
ClassPolicy = Annotated[
    Literal["uniform", "balanced", "data"],
    typer.Option(help="classes at random, the same number of samples of each, or as often as in the training data"),
]
Features = Annotated[
    str | None,
    typer.Option(
        help="inception, digits, shapes, a folder, or a Hugging Face vision model (default: depends on the data)"
    ),
]
Shard = Annotated[
    str | None,
    typer.Option(metavar="I/N", help="do only part I of N, counted from 1; other parts may run on other machines"),
]

Launch = Annotated[
    Literal["local", "ray", "slurm"] | None,
    typer.Option("--launch", help="run as --tasks N: processes here, a Ray cluster, or a SLURM job array"),
]
Tasks = Annotated[
    int | None, typer.Option("--tasks", min=1, max=100_000, help="number of tasks for --launch; each does a part")
]
LaunchOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--launch-option",
        metavar="KEY=VALUE",
        help="cpus or gpus per task; retries (default: 2); with local: parallel; with slurm: any option of sbatch, "
        "such as partition=gpu",
    ),
]


def parse_shard(text: str | None) -> tuple[int, int]:
    """'1/4' -> (0, 4): index from 0 and count. None is the only shard. Raises TesseraError."""
    index, _, count = ("1/1" if text is None else text).partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise TesseraError(f"--shard {text} is not valid: write I/N with I from 1 to N, for example 1/4")
    return int(index) - 1, int(count)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """'256' or '256x384' -> height and width. Raises TesseraError."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise TesseraError(f"--size {text} is not valid: write 256 or 256x384 (height x width)")
    return int(sides[0]), int(sides[-1])


def parse_sample_size(text: str | None) -> tuple[int, ...] | None:
    """As `parse_size`, and '16x256x384' -> frames, height and width. Raises TesseraError."""
    if text is None or text.count("x") + text.count("X") < 2:
        return parse_size(text)
    sides = text.lower().split("x")
    if len(sides) > 3 or not all(side.isdecimal() for side in sides):
        raise TesseraError(f"--size {text} is not valid: write 256x384 (height x width) or 16x256x384 (with frames)")
    return tuple(map(int, sides))


def split_names(option: str, text: str) -> list[str]:
    """Names that are separated by commas, as in CSV: '"red, blue",cat' -> ['red, blue', 'cat']. Raises TesseraError."""
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise TesseraError(f"{option} {text!r} is not valid: {error}; {QUOTING}") from None
    if len(rows) > 1:
        raise TesseraError(f"{option} {text!r} has several lines; {QUOTING}")
    return rows[0] if rows and rows[0] else [""]


def print_error(text: str) -> None:
    """Print to stderr: progress, notes and warnings."""
    print(text, file=sys.stderr, flush=True)


LOG_INTERVAL = 10.0  # seconds between lines of progress, without a terminal


@contextmanager
def progress() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Yield a function that starts a progress bar: `start(description)(done, total)`.

    Without a terminal, a line is printed every LOG_INTERVAL seconds instead.
    """
    if not sys.stderr.isatty():
        yield ProgressLines
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("left"), console=Console(stderr=True), transient=True) as bars:

        def start(description: str) -> Callable[[int, int], None]:
            task = bars.add_task(description, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield start


class ProgressLines:
    """Progress as lines of text, for logs."""

    def __init__(self, description: str) -> None:
        self.description, self.start_time = description, time.monotonic()
        self.first_done: int | None = None
        self.last_time = self.start_time

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.first_done is None:
            self.first_done = done  # items that existed already do not count for the speed
        if now - self.last_time < LOG_INTERVAL:
            return
        self.last_time = now
        from tessera.reporting.text import format_duration

        left = (now - self.start_time) / max(done - self.first_done, 1) * (total - done)
        print_error(f"{self.description}: {done} of {total}, {format_duration(left)} left")
