"""What several verbs take, and how it is read. Nothing heavy is imported here."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from tessera.errors import TesseraError

ModelPath = Annotated[str, typer.Argument(help="a bundle, a run's folder, an official .pt or a diffusers folder")]
EMA = Annotated[float | None, typer.Option("--ema", help="decay of the average, of a run with several (its first)")]
Heads = Annotated[int | None, typer.Option(help="attention heads, where a .pt of unusual width cannot say")]
ReadAs = Annotated[
    str | None, typer.Option("--as", help="what a .pt was trained as: dit, sit or sit-gvp (dit, or as the file says)")
]
Codec = Annotated[
    str | None, typer.Option(help="autoencoder folder or hub id, or 'pixels', instead of the model's own")
]
MOST = 1_000_000  # pictures of one command: more is a slip of the finger
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps")]
Sampler = Annotated[
    str | None, typer.Option(help="ancestral, ddim, euler, heun, dpm++, dpm++-sde, unipc or sde (the model's own)")
]
Steps = Annotated[int | None, typer.Option(help="steps of the sampler")]
Guidance = Annotated[float | None, typer.Option(help="classifier-free guidance; 1 is off")]
GuidanceChannels = Annotated[str | None, typer.Option(help="all, or 3 as in the official code")]
Spacing = Annotated[
    str | None, typer.Option(help="even, leading, trailing, quadratic, shifted, karras or logsnr (the model's own)")
]
Eta = Annotated[float | None, typer.Option(help="noise of ddim, 0 to 1")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="any setting of a recipe's sampling section (sampler.order=3); repeatable"
    ),
]
Guide = Annotated[
    str | None, typer.Option(help="a worse model of the same kind to lead away from, such as an early checkpoint")
]
From = Annotated[str | None, typer.Option("--from", help="a picture to begin from; cropped to --size")]
Strength = Annotated[
    float | None, typer.Option(help="how far the picture of --from may change, 0 to 1 (0.6, or 1 with --mask)")
]
Mask = Annotated[str | None, typer.Option(help="a picture that is white where to draw and black where --from stays")]
Compile = Annotated[bool, typer.Option("--compile", help="compile the network first: for many pictures")]
Size = Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels (the trained size)")]
Precision = Annotated[str, typer.Option(help="float32, bfloat16 or auto")]
ClassPolicy = Annotated[str, typer.Option(help="how classes are chosen: uniform (at random) or balanced")]


def sampler_settings(
    sampler: str | None,
    eta: float | None,
    steps: int | None,
    guidance: float | None,
    channels: str | None,
    spacing: str | None,
    changes: list[str] | None,
) -> dict[str, Any]:
    """The changes to a model's sampler that flags ask for, those of --set last."""
    if eta is not None and sampler not in (None, "ddim"):
        raise TesseraError(f"--eta belongs to ddim, not to {sampler}")
    flags = {
        "sampler": sampler if eta is None else "ddim",
        "sampler.eta": eta,
        "num_steps": steps,
        "guidance_scale": guidance,
        "guidance_channels": channels,
        "timestep_spacing": spacing,
    }
    told = [f"{name}={value}" for name, value in flags.items() if value is not None]
    return {"overrides": [*told, *(changes or [])]}


def assignments(name: str, value: Any) -> list[str]:
    """A setting as the words after --set that make it: the kind of a choice first, as it drops what it replaces."""
    if not isinstance(value, dict):
        return [f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    told = [f"{name}={value['kind']}"] if "kind" in value else []
    return told + [word for key in value if key != "kind" for word in assignments(f"{name}.{key}", value[key])]


def checked(guidance: float | None, precision: str, class_policy: str = "uniform") -> None:
    """Raise TesseraError for values that no drawing can take."""
    if guidance is not None and not math.isfinite(guidance):
        raise TesseraError(f"--guidance is {guidance}; expected a number, such as 4; 1 is off")
    if precision not in ("float32", "bfloat16", "auto"):
        raise TesseraError(f"--precision is {precision}; expected float32, bfloat16 or auto")
    if class_policy not in ("uniform", "balanced"):
        raise TesseraError(f"--class-policy is {class_policy}; expected uniform or balanced")


def seeds_of(text: str | None, count: int | None) -> list[int]:
    """'0-15' or '1,5,9' -> numbers; without it 0 .. count - 1."""
    if text is None:
        return list(range(count or 1))
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 2**63):
            raise TesseraError(f"--seeds {text} is not understood; write 0-15 or 1,5,9 (below 2^63)")
        if int(last) - int(first) >= MOST:
            raise TesseraError(f"--seeds {text} asks for more than {MOST:,} pictures at once")
        found += range(int(first), int(last) + 1)
    if count is not None and count != len(found):
        raise TesseraError(f"--seeds names {len(found)} seeds, --count says {count}: give one of the two")
    return found


def classes_of(text: str | None, model: Any) -> list[int] | None:
    """'3,7', 'cat,dog' or 'all' -> numbers; a model without classes gives None."""
    from tessera.generation import pipeline

    known = model.config.network.num_classes
    if not known:
        if text is not None:
            raise TesseraError("this model is unconditional: leave --classes out")
        return None
    if text is None and known > 16:
        raise TesseraError(f"this model knows {known} classes: say which, for example --classes 0,1,2 or --classes all")
    if text is None or text == "all":
        return list(range(known))
    return pipeline.class_labels(model, [part.strip() for part in text.split(",")])


def size_of(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, found, width = text.lower().partition("x")
    if not height.isdecimal() or (found and not width.isdecimal()):
        raise TesseraError(f"--size {text} is not understood; write 256 or 256x384 (height x width)")
    return int(height), int(width or height)


PAUSE = 10.0  # seconds between lines where there is no terminal


@contextmanager
def progress() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Bars with the time left: `progress()(what)` begins one, whose value is called with (done, total).

    Where there is no terminal a line now and then, on work that takes longer than some seconds.
    """
    if not sys.stderr.isatty():
        yield Lines
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("left"), console=Console(stderr=True), transient=True) as bars:

        def begin(what: str) -> Callable[[int, int], None]:
            task = bars.add_task(what, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield begin


class Lines:
    """A progress bar for logs."""

    def __init__(self, what: str) -> None:
        self.what, self.began, self.first = what, time.monotonic(), 0
        self.last = self.began

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        self.first = self.first or done  # what stood there already says nothing of the time left
        if now - self.last < PAUSE:
            return
        self.last = now
        from tessera.monitoring.logger import format_duration

        left = (now - self.began) / max(done - self.first, 1) * (total - done)
        print(f"{self.what}: {done} of {total}, {format_duration(left)} left", file=sys.stderr, flush=True)
