"""The verbs of `tessera`. Nothing heavy is imported before a verb needs it: `tessera --help` must answer at once."""

import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera import __version__
from tessera.errors import TesseraError

app = typer.Typer(
    name="tessera",
    help="The diffusion transformer, from a folder of images to a picture.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelPath = Annotated[str, typer.Argument(help="a bundle, a run's folder, an official .pt or a diffusers folder")]
Heads = Annotated[int | None, typer.Option(help="attention heads, where a .pt of unusual width cannot say")]
Codec = Annotated[
    str | None, typer.Option(help="autoencoder folder or hub id, or 'pixels', instead of the model's own")
]
MOST = 1_000_000  # pictures of one command: more is a slip of the finger
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(help="how long to train")] = 120,
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("demo"),
) -> None:
    """Train a small DiT on handwritten digits, draw with it, and score what it draws. Needs no download."""
    from tessera.demo import run

    run(out, seconds)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/your-images.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="dotted settings")] = None,
    resume: Annotated[str, typer.Option(help="auto, never, or the path of a run or checkpoint")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, tell time and memory")] = False,
) -> None:
    """Train a model as a recipe says. Run the same command again to go on after an interruption."""
    from tessera.training import estimate, loop
    from tessera.training.recipe import read

    settings = read(recipe, overrides or [])
    if dry_run:
        print(estimate.dry_run(settings, resume))
    else:
        print(loop.train(settings, resume))


@app.command()
def sample(
    model: ModelPath,
    classes: Annotated[str | None, typer.Option(help="numbers or names, as in 3,7, or all")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="pictures a class (1)")] = None,
    seeds: Annotated[str | None, typer.Option(help="as in 0-15 or 1,5,9; a seed is a picture")] = None,
    sampler: Annotated[str | None, typer.Option(help="ancestral or ddim (the model's own)")] = None,
    steps: Annotated[int | None, typer.Option(help="steps of the sampler")] = None,
    guidance: Annotated[float | None, typer.Option(help="classifier-free guidance; 1 is off")] = None,
    guidance_channels: Annotated[str | None, typer.Option(help="all, or 3 as in the official code")] = None,
    spacing: Annotated[str | None, typer.Option(help="even, leading or trailing")] = None,
    eta: Annotated[float | None, typer.Option(help="noise of ddim, 0 to 1")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels (the trained size)")] = None,
    batch: Annotated[int, typer.Option(min=1, help="pictures drawn at once")] = 16,
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or auto")] = "float32",
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="a folder, or a .png for the grid alone")] = Path("samples"),
    heads: Heads = None,
    codec: Codec = None,
) -> None:
    """Draw pictures: one PNG each and a grid. Every PNG says how to make it again (`tessera info PICTURE`)."""
    from tessera import drawing, pictures
    from tessera.bundle import weights_hash
    from tessera.interop.sources import load

    settings: dict[str, Any] = {
        "sampler": {"kind": "ddim", "eta": eta} if eta is not None else sampler,
        "steps": steps,
        "guidance_channels": guidance_channels and _whole_or_text(guidance_channels),
        "spacing": spacing,
    }
    if eta is not None and sampler not in (None, "ddim"):
        raise TesseraError(f"--eta belongs to ddim, not to {sampler}")
    if guidance is not None and not math.isfinite(guidance):
        raise TesseraError(f"--guidance is {guidance}; expected a number, such as 4; 1 is off")
    if precision not in ("float32", "bfloat16", "auto"):
        raise TesseraError(f"--precision is {precision}; expected float32, bfloat16 or auto")
    loaded = load(model, device=device, heads=heads, codec=codec)
    seed_list = _seeds(seeds, count)
    class_list = _classes(classes, loaded)
    shape = _size(size)
    asked: list[tuple[Any, int]] = [(told, seed) for told in class_list or [None] for seed in seed_list]
    used = drawing.settings(loaded, guidance=guidance, **settings)
    with _progress(f"drawing {len(asked)}") as progress:
        drawn = drawing.generate(
            loaded,
            None if class_list is None else [told for told, _ in asked],
            [seed for _, seed in asked],
            size=shape,
            guidance=guidance,
            precision=precision,
            batch=batch,
            progress=progress,
            **settings,
        )
    said = {"model": model, "tessera": __version__, "sampling": used.model_dump(mode="json"), "size": shape}
    said |= {"heads": heads, "codec": codec, "precision": precision, "weights": weights_hash(loaded.network)}
    columns = len(seed_list) if class_list is not None else min(len(seed_list), 8)
    sheet = pictures.grid(drawn, columns, zoom=max(1, 64 // drawn.shape[1]))
    if out.suffix.lower() == ".png":
        pictures.save_png(out, sheet, {**said, "classes": class_list, "seeds": seed_list})
        print(out)
        return
    for picture, (told, seed) in zip(drawn, asked):
        name = f"seed-{seed}.png" if told is None else f"class-{told}-seed-{seed}.png"
        pictures.save_png(out / name, picture, {**said, "classes": told if told is None else [told], "seeds": [seed]})
    pictures.save_png(out / "grid.png", sheet, {**said, "classes": class_list, "seeds": seed_list})
    print(f"{len(drawn)} pictures and grid.png in {out}")


@app.command()
def convert(
    source: ModelPath,
    target: Annotated[Path, typer.Argument(help="a new folder, or a .pt file for official")],
    to: Annotated[str, typer.Option("--to", help="bundle, official or diffusers")],
    approximate: Annotated[
        bool, typer.Option(help="write what the target cannot hold exactly, and say by how much")
    ] = False,
    heads: Heads = None,
    codec: Codec = None,
) -> None:
    """Turn a model into another format, weights bit by bit."""
    from tessera.interop import sources

    print(sources.convert(source, target, to, approximate=approximate, heads=heads, codec=codec))


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="a model, or a picture drawn by Tessera")],
    heads: Heads = None,
    codec: Codec = None,
) -> None:
    """Say what a model is and how it was trained, or how a picture was made."""
    if Path(model).suffix.lower() == ".png":
        print(_how_made(Path(model)))
        return
    from tessera.bundle import describe, weights_hash
    from tessera.interop.sources import load

    loaded = load(model, device="cpu", heads=heads, codec=codec)
    names = ", ".join(loaded.config.class_names[:12]) + (", …" if len(loaded.config.class_names) > 12 else "")
    facts = {**describe(loaded), "classes": names or "not named", "weights": weights_hash(loaded.network)}
    facts |= loaded.config.origin
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        print(f"{name:<{width}}{value}")


def _how_made(path: Path) -> str:
    from tessera.pictures import read_settings

    try:
        settings = read_settings(path)
    except OSError as error:
        raise TesseraError(f"cannot read {path}: {error}") from None
    if settings is None:
        raise TesseraError(f"{path} does not say how it was made: it was not drawn by `tessera sample`")
    sampling = settings["sampling"]
    words = ["tessera", "sample", settings["model"], "--seeds", ",".join(map(str, settings["seeds"]))]
    if settings["classes"] is not None:
        words += ["--classes", ",".join(map(str, settings["classes"]))]
    words += ["--sampler", sampling["sampler"]["kind"], "--steps", str(sampling["steps"])]
    if sampling["sampler"].get("eta"):
        words += ["--eta", str(sampling["sampler"]["eta"])]
    words += ["--guidance", str(sampling["guidance"]), "--guidance-channels", str(sampling["guidance_channels"])]
    words += ["--spacing", sampling["spacing"]]
    if settings["size"]:
        words += ["--size", "x".join(map(str, settings["size"]))]
    for name in ("heads", "codec", "precision"):
        if settings.get(name) not in (None, "float32"):
            words += [f"--{name}", str(settings[name])]
    weights = f"# weights {settings['weights']}: the same picture, if `tessera info` of the model says so too"
    return f"{shlex.join(words)}\n{weights}"


def _whole_or_text(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _seeds(text: str | None, count: int | None) -> list[int]:
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


def _classes(text: str | None, model: Any) -> list[int] | None:
    """'3,7', 'cat,dog' or 'all' -> numbers; a model without classes gives None."""
    from tessera import drawing

    known = model.config.network.classes
    if not known:
        if text is not None:
            raise TesseraError("this model is unconditional: leave --classes out")
        return None
    if text is None and known > 16:
        raise TesseraError(f"this model knows {known} classes: say which, for example --classes 0,1,2 or --classes all")
    if text is None or text == "all":
        return list(range(known))
    return drawing.labels(model, [part.strip() for part in text.split(",")])


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, found, width = text.lower().partition("x")
    if not height.isdecimal() or (found and not width.isdecimal()):
        raise TesseraError(f"--size {text} is not understood; write 256 or 256x384 (height x width)")
    return int(height), int(width or height)


def _progress(what: str):
    """A progress bar as a context; its value is called with (done, total). Silent where there is no terminal."""
    from contextlib import contextmanager

    @contextmanager
    def shown():
        if not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    return shown()


def main() -> None:
    """Run a verb; whatever a user can mend ends in one message and a non-zero exit."""
    try:
        app()
    except TesseraError as error:
        print(f"error: {error}" if not hasattr(error, "exit_code") else str(error), file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        print(f"error: cannot read or write{where}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)
