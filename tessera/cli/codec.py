"""`tessera codec`: an autoencoder of one's own, and what any autoencoder leaves of pictures."""

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.options import Device, Size, progress, size_of

app = typer.Typer(
    help="Fit an autoencoder to your images, or measure one.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/codec-emoji.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="dotted settings")] = None,
) -> None:
    """Fit a small KL autoencoder to the images of a recipe, score it on held-out ones, and print its folder.

    Run the same command again to go on after an interruption.
    """
    from tessera.runtime import choose_device, keep_freed_memory
    from tessera.training import codec

    settings = codec.read(recipe, overrides or [])
    if choose_device(settings.training.device).type == "cpu":
        keep_freed_memory()
    folder = codec.train(settings)
    print((folder.parent / codec.SCORES).read_text(encoding="utf-8"), end="")
    print(f"codec: {{kind: autoencoder-kl, source: {folder}}}")


@app.command()
def score(
    codec: Annotated[str, typer.Argument(help="folder of an autoencoder, a run or a bundle, or a hub id")],
    data: Annotated[str, typer.Argument(help="pictures: a folder, .parquet, recipe, digits or shapes")],
    size: Size = None,
    count: Annotated[int | None, typer.Option(min=1, help="so many of them, from everywhere (all)")] = None,
    features: Annotated[
        str | None, typer.Option(help="tell the Fréchet distance too, of these: shapes, inception, or a folder")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="pictures at once")] = 16,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="a .png: rows of pictures above their reconstructions")] = None,
) -> None:
    """Say what a codec leaves of pictures: PSNR, SSIM, and the spread of its latents, which should be near 1."""
    from tessera import images, runtime
    from tessera.codecs.resolve import resolve_codec
    from tessera.data.resolve import open_data
    from tessera.data.resolve import resolve_data as named_data
    from tessera.evaluation.features import extractor
    from tessera.evaluation.reconstruction import reconstruct, sheet
    from tessera.evaluation.sources import chosen
    from tessera.training.codec import in_words

    place = runtime.choose_device(device)
    built = resolve_codec(codec).build().to(place)
    source = open_data(named_data(data, size_of(size)))
    network = extractor(features, place) if features else None
    with progress() as begin:
        numbers = chosen(len(source), count).tolist()
        found = reconstruct(built, source, numbers, place, network, batch, begin("reconstructing"))
    if out is not None:
        images.save_png(out, images.grid(sheet(found), columns=8, gap=2))
    print(in_words(found, network))
