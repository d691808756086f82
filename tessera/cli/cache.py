"""`tessera data cache`: latents of a data set computed once."""

import shlex
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.options import Device, Size, progress, size_of
from tessera.errors import TesseraError


class Interrupted(TesseraError):
    """The user asked to stop."""

    exit_code = 130  # as a shell reports Ctrl-C


def cache(
    target: Annotated[
        str, typer.Argument(help="a recipe, or any data (with --size and codec.source=...), or a cache to --verify")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="dotted settings")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of caches (the recipe's data.cache, or latents)")] = None,
    size: Size = None,
    dtype: Annotated[str, typer.Option(help="float16 or bfloat16")] = "float16",
    workers: Annotated[
        int | None, typer.Option(min=1, help="processes on the CPU; threads that read for a GPU (all cores)")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="of N independent runs, such as machines, this is number I from 0")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="of the data, in a file: the unit of work")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="images encoded at once")] = 16,
    device: Device = "auto",
    verify: Annotated[bool, typer.Option("--verify", help="only compare every file with its checksum")] = False,
) -> None:
    """Encode every image of a data set once; training reads the latents (data.cache).

    Interrupted? The same command goes on. On several GPUs: torchrun --nproc-per-node 8 -m tessera data cache RECIPE.
    """
    from tessera import runtime
    from tessera.data import cache as caching
    from tessera.data import latents

    if dtype not in latents.DTYPES:
        raise TesseraError(f"--dtype is {dtype}; expected {' or '.join(latents.DTYPES)}")
    part, parts = part_of(shard)
    if verify and (Path(target) / latents.CACHE).exists():
        _verify(latents.LatentsSource(Path(target)))
        return
    data, codec_config, source = _to_cache(target, overrides or [], size)
    folder = out or Path(getattr(data, "cache", None) or "latents")
    try:
        with runtime.distributed_session() as ranks, progress() as begin:
            where = runtime.choose_device(device)
            codec = codec_config.build().to(where)
            if verify:
                _verify(latents.open_cache(folder, data, codec, source, _again()))
                return
            work = caching.Cache(folder, data, source, codec_config, codec, dtype, samples)
            work.begin()
            share = range(part, len(work), parts)[ranks.rank :: ranks.world_size]
            checked = begin("looking for what is there") if ranks.is_main else None
            missing = []
            for done, (number, absent) in enumerate(work.missing(share), start=1):
                missing += [number] if absent else []
                if checked is not None:
                    checked(done, len(share))
            workers = workers or max(1, caching.cores() // ranks.world_size)
            if where.type == "cpu":
                runtime.keep_freed_memory()
                written = caching.spread(work, missing, workers, batch)
            else:
                written = work.write(missing, where, batch, workers)
            encoded = begin("encoding") if ranks.is_main else None
            done, total = 0, sum(len(work.numbers(number)) for number in missing)
            with closing(written):
                for count in written:
                    done += count
                    if encoded is not None:
                        encoded(done, total)
            ranks.barrier()
            if not ranks.is_main:
                return
            told = work.finish()
        if told is None:
            there = sum(work.path(number).exists() for number in range(len(work)))
            print(f"part {part} of {parts} is done: {there} of {len(work)} files are there", file=sys.stderr)
        else:
            print(_summary(told, codec), file=sys.stderr)
            print(f"a recipe reads it with data.cache={folder}", file=sys.stderr)
        print(work.folder)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped, with all whole files kept in {folder}: run the same command to go on") from None


def part_of(shard: str | None) -> tuple[int, int]:
    """'0/2' -> (0, 2): which of how many independent runs."""
    if shard is None:
        return 0, 1
    part, found, parts = shard.partition("/")
    if not (found and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise TesseraError(f"--shard {shard} is not understood; write 0/4 to 3/4 for four runs")
    return int(part), int(parts)


def _to_cache(target: str, overrides: list[str], size: str | None) -> tuple[Any, Any, Any]:
    """The settings of data and codec that are asked for, and the data opened."""
    from tessera.codecs import AnyCodec, PixelsConfig
    from tessera.data import AnyData
    from tessera.data.resolve import open_data, resolve_data
    from tessera.settings import Settings, override, validate
    from tessera.training import recipe

    class Sections(Settings):
        data: AnyData
        codec: AnyCodec

    if from_recipe := Path(target).suffix in (".yaml", ".yml"):
        if size is not None:
            raise TesseraError(f"--size is for data that is no recipe: {target} says it itself, or give data.size=")
        read: Any = recipe.read_recipe(Path(target), overrides)
    else:
        data = resolve_data(target, size_of(size)).model_dump(mode="json")
        usual = {"data": data, "codec": {"kind": "autoencoder-kl"}}
        if not any(word.startswith("codec") for word in overrides):
            raise TesseraError(
                f"say by which codec {target} is to be encoded: codec.source=FOLDER, or a hub id such as "
                "codec.source=stabilityai/sd-vae-ft-ema"
            )
        read = validate(Sections, override(usual, overrides, "codec.source=FOLDER"), f"what is asked of {target}")
    if isinstance(read.codec, PixelsConfig):
        raise TesseraError(f"the codec of {target} is pixels: there are no latents to cache; give codec.source=FOLDER")
    return read.data, read.codec, read.data.open() if from_recipe else open_data(read.data)


def _verify(source: Any) -> None:
    """Compare a finished cache with its checksums, and say so."""
    from tessera.data.cache import damaged

    with progress() as begin:
        faults = damaged(source, begin("comparing"))
    if faults:
        raise TesseraError(
            f"{len(faults)} of {len(source.shards)} files in {source.folder} are damaged: {', '.join(faults[:8])}\n"
            "the `tessera data cache` that made them writes them again"
        )
    print(f"{source.folder}: {len(source):,} samples in {len(source.shards)} files, all as they were written")


def _again() -> str:
    """This command, without --verify."""
    return shlex.join(["tessera", *(word for word in sys.argv[1:] if word != "--verify")])


def _summary(told: dict[str, Any], codec: Any) -> str:
    """What was cached, the statistics of the latents, and the scale and shift that follow from them."""
    from tessera.data import cache, latents

    told_of = f"{told['count']:,} samples"
    if told["skipped"]:
        told_of += f", {told['skipped']:,} images could not be used: {latents.SKIPPED} says why"
    found = told["statistics"]
    mean, deviation = cache.normalised(found, codec)
    lines = [told_of, f"{'channel':<9}{'mean':>10}{'std':>10}{'scaled mean':>14}{'scaled std':>12}"]
    for channel, numbers in enumerate(zip(found["mean"], found["std of draws"], mean, deviation)):
        lines.append("{:<9}{:>10.4f}{:>10.4f}{:>14.3f}{:>12.3f}".format(channel, *numbers))
    far = [
        str(channel)
        for channel, (middle, width) in enumerate(zip(mean, deviation))
        if abs(middle) > 0.5 or not 0.5 <= width <= 2
    ]
    if far:
        lines.append(f"note: scaled latents are far from mean 0 and deviation 1 in channels {', '.join(far)}")
    shift = ", ".join(f"{number:.5g}" for number in found["mean"])
    scale = ", ".join(f"{1 / max(number, 1e-9):.5g}" for number in found["std of draws"])
    lines.append(f"these lines in a recipe make them so exactly:\ncodec:\n  shift: [{shift}]\n  scale: [{scale}]")
    return "\n".join(lines)
