"""The verbs of `tessera`. Nothing heavy is imported before a verb needs it: `tessera --help` must answer at once."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from tessera import __version__
from tessera.cli.codec import app as codec_app
from tessera.cli.data import app as data_app
from tessera.cli.evaluate import app as evaluate_app
from tessera.cli.options import (
    EMA,
    MOST,
    Changes,
    ClassPolicy,
    Codec,
    Compile,
    Device,
    Eta,
    From,
    Guidance,
    GuidanceChannels,
    Guide,
    Heads,
    Mask,
    ModelPath,
    Precision,
    ReadAs,
    Sampler,
    Size,
    Spacing,
    Steps,
    Strength,
    assignments,
    checked,
    sampler_settings,
    size_of,
)
from tessera.cli.plan import plan
from tessera.cli.study import study
from tessera.cli.tune import tune
from tessera.errors import TesseraError

app = typer.Typer(
    name="tessera",
    help="The diffusion transformer, from a folder of images to a picture.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(codec_app, name="codec")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(data_app, name="data")
app.add_typer(data_app, name="data")
app.command()(plan)
app.command()(tune)
app.command()(study)


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
    recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/modern.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="dotted settings")] = None,
    resume: Annotated[str, typer.Option(help="auto, never, or the path of a run or checkpoint")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, tell time and memory")] = False,
) -> None:
    """Train a model as a recipe says. Run the same command again to go on after an interruption.

    On several GPUs: torchrun --nproc-per-node 8 -m tessera train RECIPE.
    """
    from tessera.runtime import choose_device, keep_freed_memory
    from tessera.training import loop
    from tessera.training.dry_run import dry_run as estimate_run
    from tessera.training.recipe import read_recipe

    settings = read_recipe(recipe, overrides or [])
    if dry_run:
        print(estimate_run(settings, resume))
        return
    if choose_device(settings.training.device).type == "cpu":
        keep_freed_memory()
    folder = loop.train(settings, resume)
    if not _process():
        print(folder)


@app.command()
def sample(
    model: ModelPath,
    classes: Annotated[str | None, typer.Option(help="numbers or names, as in 3,7, or all")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="pictures a class (1)")] = None,
    seeds: Annotated[str | None, typer.Option(help="as in 0-15 or 1,5,9; a seed is a picture")] = None,
    total: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="pictures in all, their classes by --class-policy")
    ] = None,
    class_policy: ClassPolicy = "uniform",
    sampler: Sampler = None,
    steps: Steps = None,
    guidance: Guidance = None,
    guidance_channels: GuidanceChannels = None,
    spacing: Spacing = None,
    eta: Eta = None,
    changes: Changes = None,
    size: Size = None,
    batch: Annotated[int, typer.Option(min=1, help="pictures drawn at once")] = 16,
    precision: Precision = "float32",
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="a folder, or a .png for the grid alone")] = Path("samples"),
    npz: Annotated[Path | None, typer.Option(help="instead, one .npz as the ADM suite takes it")] = None,
    guide: Guide = None,
    image: From = None,
    strength: Strength = None,
    mask: Mask = None,
    compile_: Compile = False,
    ema: EMA = None,
    read_as: ReadAs = None,
    heads: Heads = None,
    codec: Codec = None,
) -> None:
    """Draw pictures: one PNG each and a grid. Every PNG says how to make it again (`tessera info PICTURE`).

    Interrupted? The same command goes on. With torchrun, --npz is drawn by many processes.
    """
    from tessera.cli import sampling

    settings = sampler_settings(sampler, eta, steps, guidance, guidance_channels, spacing, changes)
    checked(guidance, precision, class_policy)
    if total is not None and (classes or count or seeds):
        raise TesseraError("--total chooses classes and seeds by itself: leave out --classes, --count and --seeds")
    loaded = sampling.loaded(model, device, ema, read_as, heads, codec)
    asked = sampling.asked(loaded, classes, count, seeds, total, class_policy, settings, precision, size_of(size))
    extras = sampling.extras(loaded, guide, image, strength, mask, asked.size)
    if compile_:
        sampling.compiled(loaded)
    if npz is not None:
        if extras:
            raise TesseraError("--npz draws from noise and one model: leave out --guide, --from, --strength and --mask")
        if told := sampling.packed(loaded, asked, npz, batch, model):
            print(told)
    else:
        said = {"model": model, "num_heads": heads, "codec": codec, **({"as": read_as} if read_as else {})}
        said |= {} if ema is None else {"ema": ema}
        print(sampling.pictured(loaded, asked, out, batch, said, extras))


@app.command()
def convert(
    source: ModelPath,
    target: Annotated[Path, typer.Argument(help="a new folder, or a .pt file for official")],
    to: Annotated[str, typer.Option("--to", help="bundle, official or diffusers")],
    approximate: Annotated[
        bool, typer.Option(help="write what the target cannot hold exactly, and say by how much")
    ] = False,
    ema: EMA = None,
    read_as: ReadAs = None,
    heads: Heads = None,
    codec: Codec = None,
) -> None:
    """Turn a model into another format, weights bit by bit."""
    from tessera.interop import load

    print(load.convert(source, target, to, approximate=approximate, ema=ema, read_as=read_as, heads=heads, codec=codec))


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="a model, or a picture drawn by Tessera")],
    ema: EMA = None,
    read_as: ReadAs = None,
    heads: Heads = None,
    codec: Codec = None,
) -> None:
    """Say what a model is and how it was trained, or how a picture was made."""
    if Path(model).suffix.lower() == ".png":
        print(_how_made(Path(model)))
        return
    from tessera.bundle import describe, weights_hash
    from tessera.interop.load import ema_decays, load

    loaded = load(model, device="cpu", ema=ema, read_as=read_as, heads=heads, codec=codec)
    names = ", ".join(loaded.config.class_names[:12]) + (", …" if len(loaded.config.class_names) > 12 else "")
    facts = {**describe(loaded), "classes": names or "not named", "weights": weights_hash(loaded.network)}
    facts |= loaded.config.origin
    if kept := ema_decays(model):
        facts["averages kept"] = f"{', '.join(map(str, kept))} (--ema takes one of them)"
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        print(f"{name:<{width}}{value}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="the folder of a run: what `tessera train` writes")],
    out: Annotated[Path | None, typer.Option(help="the page's file (RUN/report.html)")] = None,
) -> None:
    """Tell a run as one HTML page: curves, pictures, health, settings. Also while it goes on."""
    from tessera.monitoring import report

    print(report.write(run, out))


@app.command()
def doctor(
    run: Annotated[Path, typer.Argument(help="the folder of a run: what `tessera train` writes")],
    json: Annotated[bool, typer.Option("--json", help="for programs: findings and facts")] = False,
) -> None:
    """Say what is wrong with a run, from the files it leaves, and what to change. Also while it goes on."""
    from tessera.monitoring.doctor import as_json, page

    print(as_json(run) if json else page(run))


def _how_made(path: Path) -> str:
    from tessera.images import read_settings

    try:
        settings = read_settings(path)
    except OSError as error:
        raise TesseraError(f"cannot read {path}: {error}") from None
    if settings is None:
        raise TesseraError(f"{path} does not say how it was made: it was not drawn by `tessera sample`")
    sampling = dict(settings["sampling"])
    words = ["tessera", "sample", settings["model"], "--seeds", ",".join(map(str, settings["seeds"]))]
    if settings["classes"] is not None:
        words += ["--classes", ",".join(map(str, settings["classes"]))]
    told = []  # what has no flag; everything is said, as the model's own settings may differ
    for name in ("sampler", "num_steps", "guidance_scale", "guidance_channels", "timestep_spacing"):
        value = sampling.pop(name)
        first, *more = assignments(name, value)
        words += [f"--{name.replace('_', '-')}", first.partition("=")[2]]
        told += more
    if (eta := next((word for word in told if word.startswith("sampler.eta=")), None)) is not None:
        told.remove(eta)
        words += ["--eta", eta.partition("=")[2]]
    for name, value in sampling.items():
        told += assignments(name, value)
    for word in told:
        words += ["--set", word]
    if settings["size"]:
        words += ["--size", "x".join(map(str, settings["size"]))]
    for name in ("ema", "as", "heads", "codec", "precision", "guide", "from", "strength", "mask"):
        if settings.get(name) not in (None, "float32"):
            words += [f"--{name}", str(settings[name])]
    weights = f"# weights {settings['weights']}: the same picture, if `tessera info` of the model says so too"
    return f"{shlex.join(words)}\n{weights}"


def _process() -> int:
    """The number of this process among those that torchrun started; 0 for one alone."""
    return int(os.environ.get("RANK", 0))


def main() -> None:
    """Run a verb; whatever a user can mend ends in one message and a non-zero exit."""
    try:
        app()
    except TesseraError as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            which = f"process {_process()}: " if _process() else ""
            print(f"{which}error: {error}", file=sys.stderr)
        elif not _process():  # no fault: all stop alike, and one says so
            print(error, file=sys.stderr)
        sys.exit(1 if code is None else code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        print(f"error: cannot read or write{where}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)
