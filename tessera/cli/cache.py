"""`tessera data cache`."""

import shlex
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tessera.cli.options import Device, Overrides, Shard, Size, parse_shard, parse_size, print_error, progress
from tessera.errors import Interrupted, TesseraError


def cache(
    target: Annotated[
        str, typer.Argument(help="a recipe, or any data (with --size and codec.source=...), or a cache to --verify")
    ],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="folder of caches (the recipe's data.cache, or latents)")] = None,
    size: Size = None,
    dtype: Annotated[Literal["float16", "bfloat16"], typer.Option()] = "float16",
    workers: Annotated[
        int | None, typer.Option(min=1, help="processes on the CPU, reader threads for a GPU (one per core)")
    ] = None,
    shard: Shard = None,
    shard_size: Annotated[int, typer.Option(min=1, help="samples per file")] = 512,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    device: Device = "auto",
    verify: Annotated[bool, typer.Option("--verify", help="only compare every file with its checksum")] = False,
) -> None:
    """Encode every image of a data set once. Training reads the latents with data.cache.

    To resume after an interruption, repeat the command. On several GPUs: torchrun --nproc-per-node 8 -m tessera data
    cache RECIPE.
    """
    from tessera import runtime
    from tessera.data import cache as latent_cache
    from tessera.data import latents

    index, count = parse_shard(shard)
    if verify and (Path(target) / latents.CACHE).exists():
        _verify(latents.LatentsDataset(Path(target)))
        return
    data, codec_config, dataset = _open(target, overrides or [], size)
    folder = out or Path(getattr(data, "cache", None) or "latents")
    try:
        with runtime.distributed_session() as ranks, progress() as start:
            torch_device = runtime.choose_device(device)
            codec = codec_config.build().to(torch_device)
            if verify:
                command = shlex.join(["tessera", *(word for word in sys.argv[1:] if word != "--verify")])
                _verify(latents.open_cache(folder, data, codec, dataset, command))
                return
            writer = latent_cache.CacheWriter(folder, data, dataset, codec_config, codec, dtype, shard_size)
            writer.begin()
            shards = range(index, len(writer), count)[ranks.rank :: ranks.world_size]
            report = start("checking existing files") if ranks.is_main else None
            missing = []
            for done, (number, absent) in enumerate(writer.missing(shards), start=1):
                missing += [number] if absent else []
                if report is not None:
                    report(done, len(shards))
            workers = workers or max(1, runtime.available_cpus() // ranks.world_size)
            if torch_device.type == "cpu":
                runtime.keep_freed_memory()
                counts = latent_cache.write_in_processes(writer, missing, workers, batch_size)
            else:
                counts = writer.write(missing, torch_device, batch_size, workers)
            report = start("encoding") if ranks.is_main else None
            done, total = 0, sum(len(writer.indices(number)) for number in missing)
            with closing(counts):
                for encoded in counts:
                    done += encoded
                    if report is not None:
                        report(done, total)
            ranks.barrier()
            if not ranks.is_main:
                return
            summary = writer.finish()
        if summary is None:
            existing = sum(writer.path(number).exists() for number in range(len(writer)))
            print_error(f"shard {index + 1}/{count} is done: {existing} of {len(writer)} files exist")
        else:
            print_error(_summary(summary, codec))
            print_error(f"to train on it: {shlex.quote(f'data.cache={folder}')}")
        print(writer.folder)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; the complete files are in {folder}: repeat the command to resume") from None


def _open(target: str, overrides: list[str], size: str | None) -> tuple[Any, Any, Any]:
    """The settings of data and codec, and the opened data. Raises TesseraError."""
    from tessera.codecs import AnyCodec, PixelsConfig
    from tessera.data import AnyData
    from tessera.data.resolve import open_data, resolve_data
    from tessera.settings import Settings, apply_overrides, validate
    from tessera.training import recipe

    class Sections(Settings):
        data: AnyData
        codec: AnyCodec

    if from_recipe := Path(target).suffix in (".yaml", ".yml"):
        if size is not None:
            raise TesseraError(f"--size has no effect with the recipe {target}: give data.size=")
        config: Any = recipe.read_recipe(Path(target), overrides)
    else:
        data = resolve_data(target, parse_size(size)).model_dump(mode="json")
        if not any(word.startswith("codec") for word in overrides):
            raise TesseraError(
                f"a codec is needed to encode {target}: give codec.source=FOLDER, or a hub id such as "
                "codec.source=stabilityai/sd-vae-ft-ema"
            )
        sections = {"data": data, "codec": {"kind": "autoencoder-kl"}}
        sections = apply_overrides(sections, overrides, Sections, "codec.source=FOLDER")
        config = validate(Sections, sections, "the command line")
    if isinstance(config.codec, PixelsConfig):
        raise TesseraError(f"the codec of {target} is pixels, which has no latents to cache: give codec.source=FOLDER")
    return config.data, config.codec, config.data.open() if from_recipe else open_data(config.data)


def _verify(dataset: Any) -> None:
    """Compare a complete cache with its checksums. Raises TesseraError if files are damaged."""
    from tessera.data.cache import damaged_shards

    with progress() as start:
        damaged = damaged_shards(dataset, start("verifying"))
    if damaged:
        raise TesseraError(
            f"{len(damaged)} of {len(dataset.shards)} files in {dataset.folder} are damaged: {', '.join(damaged[:8])}\n"
            "the `tessera data cache` command that wrote them writes them again"
        )
    print(f"{dataset.folder}: {len(dataset):,} samples in {len(dataset.shards)} files, all checksums match")


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
