"""`tessera data cache`."""

import shlex
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer

from tessera.cli import launching
from tessera.cli.options import (
    Device,
    Launch,
    LaunchOptions,
    Overrides,
    Shard,
    Size,
    Tasks,
    parse_shard,
    parse_size,
    print_error,
    progress,
)
from tessera.errors import Interrupted, TesseraError


def cache(
    target: Annotated[
        str, typer.Argument(help="a recipe, or any data (with --size and codec.source=...), or a cache to --verify")
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of caches (default: the recipe's data.cache, or latents)")
    ] = None,
    size: Size = None,
    dtype: Annotated[Literal["float16", "bfloat16"], typer.Option()] = "float16",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="processes on the CPU, or reader threads for a GPU (default: one per core)"),
    ] = None,
    shard: Shard = None,
    launch: Launch = None,
    tasks: Tasks = None,
    launch_option: LaunchOptions = None,
    shard_size: Annotated[int, typer.Option(min=1, help="samples per file")] = 512,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    device: Device = "auto",
    verify: Annotated[bool, typer.Option("--verify", help="only compare every file with its checksum")] = False,
) -> None:
    """Encode every image or clip of a data set once, and every caption if the recipe has a frozen text encoder.
    Training reads them with data.cache.

    To resume after an interruption, repeat the command. On several GPUs: --launch local --tasks 8, or torchrun
    --nproc-per-node 8 -m tessera data cache RECIPE. On several machines: --launch ray or slurm.

    \b
    Example:
      tessera data cache mine.yaml
    """
    from tessera import runtime, storage
    from tessera.data import cache as latent_cache
    from tessera.data import latents, text_cache
    from tessera.data.captions import Captions

    index, count = parse_shard(shard)
    launched = launching.Launch.parse(launch, tasks, launch_option, shard)
    if verify and storage.exists(storage.locate(target) / latents.CACHE):
        _verify(latents.LatentsDataset(storage.locate(target)))
        return
    if verify and storage.exists(storage.locate(target) / text_cache.SUMMARY):
        _verify(text_cache.CachedTokens(storage.locate(target)), "captions")
        return
    data, codec_config, text, dataset = _open(target, overrides or [], size)
    images_folder = storage.locate(out or getattr(data, "cache", None) or "latents")
    text_folder = storage.locate(out or (text and text.cache) or images_folder)
    command = shlex.join(["tessera", *(word for word in launching.own_words() if word != "--verify")])
    options = _Options(index, count, workers, batch_size)
    folder = images_folder
    if not verify:
        storage.check_writable(storage.address(images_folder if codec_config is not None else text_folder))
    if launched is not None and not verify:
        launched.run((images_folder if codec_config is not None else text_folder) / launching.FOLDER)
    try:
        with runtime.distributed_session() as ranks, progress() as start:
            torch_device = runtime.choose_device(device)
            if codec_config is not None:
                codec = codec_config.build().to(torch_device)
                if verify:
                    _verify(latents.open_cache(folder, data, codec, dataset, command))
                else:
                    writer = latent_cache.CacheWriter(folder, data, dataset, codec_config, codec, dtype, shard_size)
                    if (summary := _write(writer, options, torch_device, ranks, start, "encoding")) is not None:
                        print_error(_summary(summary, codec))
                        print_error(f"to train on it: {shlex.quote(f'data.cache={storage.address(folder)}')}")
            if text is not None:
                folder = text_folder
                captions, encoder = Captions.of(dataset, data.description), text.build()
                if verify:
                    _verify(text_cache.open_text_cache(folder, captions, encoder, command), "captions")
                    return
                writer = text_cache.TextCacheWriter(folder, captions, text, encoder, data.description)
                summary = _write(writer, options, torch_device, ranks, start, "encoding captions")
                if summary is not None:
                    cut = f", {summary['cut']:,} of them cut at {encoder.max_tokens} tokens" if summary["cut"] else ""
                    print_error(f"{summary['count']:,} different captions, {summary['tokens']:,} tokens{cut}")
                if summary is not None and (codec_config is None or folder != images_folder):
                    print_error(f"to train on it: {shlex.quote(f'text.cache={storage.address(folder)}')}")
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; the complete files are in {storage.address(folder)}: repeat the command to resume"
        ) from None


class _Options(NamedTuple):
    """part, parts: which of how many parts of the work is done; workers: None: one per core"""

    part: int
    parts: int
    workers: int | None
    batch_size: int


def _write(writer: Any, options: _Options, device: Any, ranks: Any, start: Any, label: str) -> dict[str, Any] | None:
    """Write the missing files of a cache, and print its folder. Returns its summary if it is complete."""
    from tessera import runtime
    from tessera.data import cache as latent_cache
    from tessera.files import exclusive_lock

    writer.begin()
    shards = range(options.part, len(writer), options.parts)[ranks.rank :: ranks.world_size]
    report = start("checking existing files") if ranks.is_main else None
    missing = []
    for done, (number, absent) in enumerate(writer.missing(shards), start=1):
        missing += [number] if absent else []
        if report is not None:
            report(done, len(shards))
    workers = options.workers or max(1, runtime.available_cpus() // ranks.world_size)
    if device.type == "cpu":
        runtime.keep_freed_memory()
        counts = latent_cache.write_in_processes(writer, missing, workers, options.batch_size)
    else:
        counts = writer.write(missing, device, options.batch_size, workers)
    report = start(label) if ranks.is_main else None
    done, total = 0, sum(len(writer.indices(number)) for number in missing)
    with closing(counts):
        for encoded in counts:
            done += encoded
            if report is not None:
                report(done, total)
    ranks.barrier()
    if not ranks.is_main:
        return None
    with exclusive_lock(writer.folder, on_wait=lambda: None):  # several shards may finish at the same time
        summary = writer.finish()
    if summary is None:
        existing = sum(writer.path(number).exists() for number in range(len(writer)))
        part = f"shard {options.part + 1}/{options.parts}"
        print_error(f"{part} is done: {existing} of {len(writer)} files exist")
    print(writer.folder)
    return summary


def _open(target: str, overrides: list[str], size: str | None) -> tuple[Any, Any, Any, Any]:
    """The settings of data, codec and frozen text encoder, and the opened data. Raises TesseraError.

    The codec is None if the images need no cache, the text encoder if there is none.
    """
    from tessera.codecs import AnyCodec, PixelsConfig
    from tessera.data import AnyData
    from tessera.data.resolve import open_data, resolve_data
    from tessera.encoders.text import FrozenConfig
    from tessera.settings import Settings, apply_overrides, validate
    from tessera.training import recipe

    class Sections(Settings):
        data: AnyData
        codec: AnyCodec

    if from_recipe := Path(target).suffix in (".yaml", ".yml"):
        if size is not None:
            raise TesseraError(f"--size has no effect with the recipe {target}: give data.size=")
        config: Any = _with_initial_settings(recipe.read_recipe(Path(target), overrides))
    else:
        data = resolve_data(target, parse_size(size)).model_dump(mode="json", exclude_unset=True)
        if not any(word.startswith("codec") for word in overrides):
            raise TesseraError(
                f"a codec is needed to encode {target}: give codec.source=FOLDER, or a hub id such as "
                "codec.source=stabilityai/sd-vae-ft-ema"
            )
        sections = {"data": data, "codec": {"kind": "autoencoder-kl"}}
        sections = apply_overrides(sections, overrides, Sections, "codec.source=FOLDER")
        config = validate(Sections, sections, "the command line")
    text = config.text if from_recipe and isinstance(config.text, FrozenConfig) else None
    codec = None if isinstance(config.codec, PixelsConfig) else config.codec
    if codec is None and text is None:
        raise TesseraError(f"the codec of {target} is pixels, which has no latents to cache: give codec.source=FOLDER")
    return config.data, codec, text, config.data.open() if from_recipe else open_data(config.data)


def _with_initial_settings(config: Any) -> Any:
    """A recipe with the codec, the text encoder and the size of the model that training.init_from names."""
    from tessera.training import initialization
    from tessera.training.recipe import infer_pixel_channels, inherit_text
    from tessera.training.run import load_init_model

    model = load_init_model(config, None)
    if model is None:
        return config
    config = inherit_text(infer_pixel_channels(initialization.inherit_settings(config, model)), model.config.text)
    return initialization.inherit_size(config, model.config, config.codec.build())


def _verify(dataset: Any, unit: str = "samples") -> None:
    """Compare a complete cache with its checksums. Raises TesseraError if files are damaged."""
    from tessera.data.cache import damaged_shards

    with progress() as start:
        damaged = damaged_shards(dataset, start("verifying"))
    if damaged:
        raise TesseraError(
            f"{len(damaged)} of {len(dataset.shards)} files in {dataset.folder} are damaged: {', '.join(damaged[:8])}\n"
            "the `tessera data cache` command that wrote them writes them again"
        )
    print(f"{dataset.folder}: {len(dataset):,} {unit} in {len(dataset.shards)} files, all checksums match")


def _summary(summary: dict[str, Any], codec: Any) -> str:
    """The number of samples, the statistics of the latents, and the scale and shift that would normalize them."""
    from tessera.data import cache, latents

    samples = f"{summary['count']:,} samples"
    if summary["skipped"]:
        samples += f", {summary['skipped']:,} invalid images, listed in {latents.SKIPPED}"
    statistics = summary["statistics"]
    means, stds = cache.scaled_statistics(statistics, codec)
    lines = [samples, f"{'channel':<9}{'mean':>10}{'std':>10}{'scaled mean':>14}{'scaled std':>12}"]
    for channel, numbers in enumerate(zip(statistics["mean"], statistics["sample_std"], means, stds)):
        lines.append("{:<9}{:>10.4f}{:>10.4f}{:>14.3f}{:>12.3f}".format(channel, *numbers))
    far = [str(c) for c, (mean, std) in enumerate(zip(means, stds)) if abs(mean) > 0.5 or not 0.5 <= std <= 2]
    if far:
        lines.append(f"note: the scaled latents of channels {', '.join(far)} are far from mean 0 and std 1")
    shift = ", ".join(f"{mean:.5g}" for mean in statistics["mean"])
    scale = ", ".join(f"{1 / max(std, 1e-9):.5g}" for std in statistics["sample_std"])
    lines.append(f"for mean 0 and std 1 in every channel:\ncodec:\n  shift: [{shift}]\n  scale: [{scale}]")
    return "\n".join(lines)
