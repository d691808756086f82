"""`tessera evaluate`: pictures to numbers that say how they were made."""

import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tessera.cli.options import (
    EMA,
    MOST,
    Changes,
    ClassPolicy,
    Codec,
    Device,
    Eta,
    Guidance,
    GuidanceChannels,
    Heads,
    Precision,
    ReadAs,
    Sampler,
    Size,
    Spacing,
    Steps,
    checked,
    progress,
    sampler_settings,
    size_of,
)
from tessera.errors import TesseraError


class Verbs(TyperGroup):
    """`tessera evaluate TARGET` is `tessera evaluate score TARGET`: scoring is what the word means."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["score", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=Verbs,
    help="Score a model, a folder or an .npz of samples: tessera evaluate TARGET [options as for score].",
    no_args_is_help=True,
    rich_markup_mode=None,
)

DRAWING = (  # flags that mean something for a model only
    *("class_policy", "seed", "sampler", "steps", "guidance", "guidance_channels", "spacing", "eta", "changes"),
    *("precision", "ema", "read_as", "heads", "codec"),
)
Features = Annotated[
    str | None,
    typer.Option(help="inception, digits, shapes, a folder of features, or a Hugging Face vision model (by the data)"),
]
DataWord = Annotated[str, typer.Argument(help="a folder, .parquet, recipe, digits or shapes (as in digits:ceiling)")]


@app.command()
def score(
    ctx: typer.Context,
    target: Annotated[str, typer.Argument(help="a model, a folder or .npz of samples, or data")],
    reference: Annotated[str | None, typer.Option(help="data or statistics (what the model was trained on)")] = None,
    metrics: Annotated[
        str | None, typer.Option(help="of fd, fd_inf, sfid, kid, is, prdc, authenticity, oracle (those that apply)")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=2, max=MOST, help="samples: 50000 of a model, all that a folder holds")
    ] = None,
    features: Features = None,
    class_policy: ClassPolicy = "uniform",
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="of the first sample; the others follow")] = 0,
    sampler: Sampler = None,
    steps: Steps = None,
    guidance: Guidance = None,
    guidance_channels: GuidanceChannels = None,
    spacing: Spacing = None,
    eta: Eta = None,
    changes: Changes = None,
    size: Size = None,
    batch: Annotated[int, typer.Option(min=1, help="pictures drawn or looked at at once")] = 50,
    precision: Precision = "float32",
    device: Device = "auto",
    ema: EMA = None,
    read_as: ReadAs = None,
    heads: Heads = None,
    codec: Codec = None,
    out: Annotated[Path | None, typer.Option(help="folder for everything (evaluation/NAME)")] = None,
) -> None:
    """Compute scores with intervals and a fingerprint of how they were made; write scores.json and a report.

    Interrupted? The same command goes on. With torchrun, many processes share the work.
    """
    from tessera import runtime
    from tessera.evaluation import report, suite
    from tessera.evaluation.features import extractor
    from tessera.evaluation.reference import check_word
    from tessera.files import exclusive_lock
    from tessera.generation.bulk import BulkSamples, asked_by_policy
    from tessera.interop import load

    settings = sampler_settings(sampler, eta, steps, guidance, guidance_channels, spacing, changes)
    checked(guidance, precision, class_policy)
    names = suite.wanted(metrics)
    folder = out or Path("evaluation") / suite.name_of(target)
    suite.check_target(target)
    with runtime.distributed_session() as ranks, progress() as begin:
        chosen = runtime.choose_device(device)
        if load.is_model(target):
            model = load.load(target, device=chosen, ema=ema, read_as=read_as, heads=heads, codec=codec)
            more = {"settings": settings, "precision": precision, "size": size_of(size)}
            asked = asked_by_policy(model, count or 50_000, class_policy, seed, **more)  # pyright: ignore[reportArgumentType]
            subject = BulkSamples(model, asked, folder / "samples", batch, target)
            compared_with = reference or suite.trained_on(model)
        else:
            told = [name for name in DRAWING if _is_told(ctx, name)]
            if told:
                flags = ", ".join(param.opts[0] for param in ctx.command.params if param.name in told)
                raise TesseraError(f"{target} is no model: leave out what is of drawing ({flags})")
            subject, compared_with = suite.found(target, size_of(size), count), reference
            if compared_with is None:
                raise TesseraError(f"say what {target} is to be compared with: --reference DATA or statistics (.npz)")
        if isinstance(compared_with, str):
            check_word(compared_with)  # before features are loaded, which may mean to fetch them
        network = extractor(features or suite.usual_features(compared_with), chosen)
        with exclusive_lock(folder) if ranks.is_main else nullcontext():
            done = suite.evaluate(
                subject, compared_with, network, folder, names, ranks, batch, begin if ranks.is_main else None
            )
            if not ranks.is_main:
                return
            report.write(done, folder, shlex.join(["tessera", *sys.argv[1:]]))
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{'metric':<18}{'value':<12}{'95 % interval':<26}fingerprint")
    for made in done.scores:
        print(made)
    print(f"{done.samples.count} samples against {done.reference.where}; report in {folder / 'report.html'}")


@app.command()
def stats(
    data: DataWord,
    out: Annotated[Path, typer.Option(help="the .npz to write")],
    features: Features = None,
    size: Size = None,
    count: Annotated[int | None, typer.Option(min=2, help="pictures (all)")] = None,
    keep: Annotated[int, typer.Option(min=0, max=10_000, help="rows of features kept, for kid and prdc")] = 10_000,
    batch: Annotated[int, typer.Option(min=1, help="pictures looked at at once")] = 50,
    device: Device = "auto",
) -> None:
    """Save the statistics of a data set, to compare samples with; pytorch-fid, clean-fid and ADM read them too."""
    import shutil

    from tessera import runtime
    from tessera.evaluation import reference, suite
    from tessera.evaluation.features import extract, extractor

    if out.suffix != ".npz":
        raise TesseraError(f"--out {out} must end in .npz")
    if out.exists():
        raise TesseraError(f"{out} exists already: remove it or give another name")
    work = out.with_name(out.name + ".work")
    with runtime.distributed_session() as ranks, progress() as begin:
        chosen = runtime.choose_device(device)
        network = extractor(features or suite.usual_features(data), chosen)
        subject = suite.found(data, size_of(size), count)
        told = begin("looking") if ranks.is_main else None
        found = extract(subject, network, work, ranks, batch, told)
        if ranks.is_main:
            reference.save(found, out, keep)
            shutil.rmtree(work, ignore_errors=True)
            print(f"{found.count} pictures ({found.unusable} could not be used), features {network.name}: {out}")


@app.command()
def train_features(
    data: DataWord,
    out: Annotated[Path, typer.Option(help="a new folder for the network")],
    size: Size = None,
    grey: Annotated[bool, typer.Option("--grey", help="look at grey pictures")] = False,
    flip: Annotated[bool, typer.Option(help="mirror at random while learning")] = True,
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    batch: Annotated[int, typer.Option(min=2)] = 128,
    width: Annotated[int, typer.Option(min=8, help="a multiple of 8; features are up to four times as many")] = 24,
    device: Device = "auto",
) -> None:
    """Fit a small feature network to labelled data, for pictures that no pretrained one fits. Needs no download."""
    from tessera import runtime
    from tessera.data.resolve import resolve_data
    from tessera.evaluation.toy import feature_network

    config = resolve_data(data, size_of(size), 1 if grey else 3)
    chosen = runtime.choose_device(device)
    if out.exists():
        raise TesseraError(f"{out} exists already: remove it or give another name")
    with progress() as begin:
        network = feature_network.train(
            config.open(),
            config.size,
            config.channels,
            flip=flip and config.hflip,
            where=config.where,
            width=width,
            steps=steps,
            batch=batch,
            device=chosen,
            progress=begin("learning features"),
        )
    feature_network.save(network, out)
    print(
        f"tells {network.config.origin['held-out accuracy']:.1%} of unseen pictures right; use it with --features {out}"
    )


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="a scores.json, or the folder of an evaluation")],
    second: Annotated[Path, typer.Argument(help="another")],
) -> None:
    """Set two evaluations side by side, and say in what their protocols differ."""
    from tessera.evaluation import protocol

    print(protocol.compared(protocol.load(first), protocol.load(second)))


def _is_told(ctx: typer.Context, name: str) -> bool:
    """Whether a flag stands on the command line, not its default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
