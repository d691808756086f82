"""`tessera evaluate`: scores with intervals and the protocol they depend on."""

import shlex
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tessera.cli import launching
from tessera.cli.options import (
    EMA,
    MAX_SAMPLES,
    Adapters,
    AnyBase,
    CheckpointType,
    ClassPolicy,
    Codec,
    DataPath,
    Device,
    EMALength,
    Features,
    Launch,
    LaunchOptions,
    NumClasses,
    NumHeads,
    Precision,
    SampleSize,
    SamplingOverrides,
    Shard,
    Size,
    Tasks,
    TextEncoder,
    parse_sample_size,
    parse_shard,
    parse_size,
    print_error,
    progress,
)
from tessera.errors import TesseraError


class DefaultToScore(TyperGroup):
    """`tessera evaluate TARGET` is short for `tessera evaluate score TARGET`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["score", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=DefaultToScore,
    help="Score a model, or a folder or an .npz of samples. `tessera evaluate TARGET` is short for `tessera evaluate "
    "score TARGET`.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

MODEL_PARAMETERS = (  # that have no effect on existing samples
    *(
        "overrides",
        "captions",
        "class_policy",
        "seed",
        "precision",
        "ema",
        "ema_length",
        "checkpoint_type",
        "num_heads",
        "num_classes",
        "codec",
        "text_encoder",
        "adapter",
        "any_base",
    ),
)


@app.command()
def score(
    ctx: typer.Context,
    target: Annotated[
        str, typer.Argument(help="a model, also a shipped one by name, a folder or .npz of samples, or data")
    ],
    overrides: SamplingOverrides = None,
    reference: Annotated[
        str | None, typer.Option(help="data or statistics (default: the training data of the model)")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="some of fd, frame_fd, motion, fd_inf, sfid, kid, is, prdc, authenticity, oracle, alignment, law, "
            "clip_score (default: those that apply)"
        ),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(min=2, max=MAX_SAMPLES, help="default: 50000 for a model, all for a folder")
    ] = None,
    features: Features = None,
    captions: Annotated[
        str | None, typer.Option(help="data whose captions are the prompts for a text model (default: the reference)")
    ] = None,
    clip: Annotated[str | None, typer.Option(help="folder of a CLIP network, for clip_score")] = None,
    class_policy: ClassPolicy = "uniform",
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="seed of the first sample; the others count up")] = 0,
    size: SampleSize = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 50,
    precision: Precision = "float32",
    device: Device = "auto",
    ema: EMA = None,
    ema_length: EMALength = None,
    checkpoint_type: CheckpointType = None,
    num_heads: NumHeads = None,
    num_classes: NumClasses = None,
    codec: Codec = None,
    text_encoder: TextEncoder = None,
    adapter: Adapters = None,
    any_base: AnyBase = False,
    out: Annotated[Path | None, typer.Option(help="folder for all results (default: evaluation/NAME)")] = None,
    shard: Shard = None,
    launch: Launch = None,
    tasks: Tasks = None,
    launch_option: LaunchOptions = None,
) -> None:
    """Compute scores with 95 % intervals. Writes scores.json and an HTML report.

    To resume after an interruption, repeat the command. Sampling and features can be divided: among the ranks of
    torchrun, with --launch among tasks on this machine, in a Ray cluster or on SLURM, or by --shard 1/4 to 4/4.

    \b
    Examples:
      tessera evaluate runs/mine --num-samples 10000
      tessera evaluate samples.npz --reference my-images --features inception
    """
    from tessera import runtime
    from tessera.evaluation import protocol, report, suite
    from tessera.evaluation.captions import caption_data
    from tessera.evaluation.features import load_extractor
    from tessera.evaluation.reference import check_reference
    from tessera.files import exclusive_lock
    from tessera.generation.bulk import BulkSamples, bulk_request
    from tessera.interop import load
    from tessera.interop.adapters import AdapterSpec

    part = parse_shard(shard)
    launched = launching.Launch.parse(launch, tasks, launch_option, shard)
    names = suite.parse_metrics(metrics)
    specs = [AdapterSpec.parse(text) for text in adapter or ()]
    name = "+".join([suite.evaluation_name(target), *(spec.label for spec in specs)])
    folder = out or Path("evaluation") / name
    suite.check_target(target)
    with runtime.distributed_session() as ranks, progress() as start:
        torch_device = runtime.choose_device(device)
        if load.is_model(target):
            model = load.load(
                target,
                device=torch_device,
                ema=ema,
                ema_length=ema_length,
                checkpoint_type=checkpoint_type,
                num_heads=num_heads,
                num_classes=num_classes,
                codec=codec,
                text_encoder=text_encoder,
                adapters=specs,
                any_base=any_base,
            )
            data = reference or suite.training_data(model)
            request = bulk_request(
                model,
                num_samples or 50_000,
                class_policy,
                seed,
                caption_data(captions, data, model),
                settings={"overrides": overrides or []},
                precision=precision,
                size=parse_sample_size(size),
            )
            samples = BulkSamples(model, request, folder / "samples", batch_size, target)
        else:
            if options := _options_on_command_line(ctx, MODEL_PARAMETERS):
                raise TesseraError(f"{target} is not a model, so sampling options do not apply: remove {options}")
            samples, data = suite.open_samples(target, parse_size(size), num_samples), reference
            if data is None:
                raise TesseraError(f"{target} needs something to compare with: --reference DATA or statistics (.npz)")
        if isinstance(data, str):
            check_reference(data)  # before features are loaded, which may download them
        extractor = load_extractor(features or suite.default_features(data, names), torch_device)
        if shard is not None:
            if ranks.world_size > 1:
                raise TesseraError("the processes of torchrun are the shards: leave --shard out")
            suite.extract_shard(samples, data, extractor, folder, part, names, batch_size, start, clip)
            print(f"shard {shard} of {target} is done; when all are done, run the command without --shard")
            return
        with exclusive_lock(folder) if ranks.is_main else nullcontext():
            if launched is not None:
                launched.run(folder / launching.FOLDER)
            start = start if ranks.is_main else None
            result = suite.evaluate(samples, data, extractor, folder, names, ranks, batch_size, start, clip=clip)
            if not ranks.is_main:
                return
            report.write(result, folder, shlex.join(["tessera", *launching.own_words()]))
    for note in result.notes:
        print_error(f"note: {note}")
    print(protocol.score_table(result.scores))
    print(f"{result.samples.count} samples against {result.reference.description}; report in {folder / 'report.html'}")


@app.command()
def stats(
    data: DataPath,
    out: Annotated[Path, typer.Option(help="the .npz to write")],
    features: Features = None,
    size: Size = None,
    num_samples: Annotated[int | None, typer.Option(min=2, help="number of images (default: all)")] = None,
    num_rows: Annotated[int, typer.Option(min=0, max=10_000, help="feature rows to store, for kid and prdc")] = 10_000,
    batch_size: Annotated[int, typer.Option(min=1)] = 50,
    device: Device = "auto",
) -> None:
    """Save the statistics of a data set as a reference, in the format of pytorch-fid, clean-fid and ADM.

    \b
    Example:
      tessera evaluate stats my-images --size 64 --out reference.npz
    """
    from tessera import runtime
    from tessera.evaluation import reference, suite
    from tessera.evaluation.features import extract, load_extractor

    if out.suffix != ".npz":
        raise TesseraError(f"--out {out} must end in .npz")
    _check_new(out)
    folder = out.with_name(out.name + ".work")
    with runtime.distributed_session() as ranks, progress() as start:
        extractor = load_extractor(features or suite.default_features(data), runtime.choose_device(device))
        source = suite.open_samples(data, parse_size(size), num_samples)
        report = start("extracting features") if ranks.is_main else None
        result = extract(source, extractor, folder, ranks, batch_size, report)
        if ranks.is_main:
            reference.save_statistics(result, out, num_rows)
            shutil.rmtree(folder, ignore_errors=True)
            print(f"{result.count} images ({result.num_invalid} invalid), features {extractor.name}: {out}")


@app.command()
def train_features(
    data: DataPath,
    out: Annotated[Path, typer.Option(help="a new folder for the network")],
    size: Size = None,
    grayscale: Annotated[bool, typer.Option("--grayscale", help="convert images to grayscale")] = False,
    hflip: Annotated[bool, typer.Option(help="augment by random horizontal flips")] = True,
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    batch_size: Annotated[int, typer.Option(min=2)] = 128,
    width: Annotated[int, typer.Option(min=8, help="a multiple of 8; up to four times as many features")] = 24,
    device: Device = "auto",
) -> None:
    """Train a small feature network on labeled data, if no pretrained network fits. Needs no download.

    \b
    Example:
      tessera evaluate train-features my-images --out features
    """
    from tessera import runtime
    from tessera.data.resolve import resolve_data
    from tessera.evaluation.toy import feature_network

    config = resolve_data(data, parse_size(size), 1 if grayscale else 3)
    torch_device = runtime.choose_device(device)
    _check_new(out)
    with progress() as start:
        network = feature_network.train(
            config.open(),
            config.size,
            config.channels,
            hflip=hflip and config.hflip,
            description=config.description,
            width=width,
            steps=steps,
            batch_size=batch_size,
            device=torch_device,
            progress=start("training"),
        )
    feature_network.save(network, out)
    accuracy = network.config.origin["held_out_accuracy"]
    print(f"accuracy on held-out images {accuracy:.1%}; use it with --features {out}")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="a scores.json, or the folder of an evaluation")],
    second: Annotated[Path, typer.Argument(help="another one")],
) -> None:
    """Compare two evaluations, and list the differences of their protocols.

    \b
    Example:
      tessera evaluate compare evaluation/mine evaluation/other
    """
    from tessera.evaluation import protocol

    print(protocol.compare(protocol.load(first), protocol.load(second)))


def _check_new(path: Path) -> None:
    if path.exists():
        raise TesseraError(f"{path} exists already: remove it or give another name")


def _options_on_command_line(ctx: typer.Context, names: tuple[str, ...]) -> str:
    """Those of the parameters that are not at their defaults, as a user writes them."""
    words = {param.name: "key=value" if param.name == "overrides" else param.opts[0] for param in ctx.command.params}
    sources = {name: ctx.get_parameter_source(name) for name in names}
    return ", ".join(words[name] for name, source in sources.items() if source and source.name == "COMMANDLINE")
