"""`tessera codec`: train an autoencoder, and measure the reconstructions of any."""

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.options import DataPath, Device, Overrides, Size, parse_size, progress

app = typer.Typer(
    help="Train an autoencoder on your images, or measure one.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="a recipe, such as recipes/codec-emoji.yaml")],
    overrides: Overrides = None,
) -> None:
    """Train a small KL autoencoder from a recipe, score it on held-out images, and print its folder.

    To resume an interrupted run, repeat the command.

    \b
    Example:
      tessera codec train recipes/codec-emoji.yaml data.path=my-images
    """
    from tessera.runtime import choose_device, keep_freed_memory
    from tessera.training import codec

    config = codec.read_codec_recipe(recipe, overrides or [])
    if choose_device(config.training.device).type == "cpu":
        keep_freed_memory()
    folder = codec.train_codec(config)
    print((folder.parent / codec.SCORES).read_text(encoding="utf-8"), end="")
    print(f"codec: {{kind: autoencoder-kl, source: {folder}}}")


@app.command()
def score(
    codec: Annotated[str, typer.Argument(help="folder of an autoencoder, a run or a bundle, or a hub id")],
    data: DataPath,
    size: Size = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="number of images, evenly spaced in the data (default: all)")
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="also report the Fréchet distance of these: shapes, inception, or a folder")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="a .png with rows of images above their reconstructions")] = None,
) -> None:
    """Measure the reconstructions of a codec (PSNR, SSIM) and the spread of its latents, which should be near 1.

    \b
    Example:
      tessera codec score runs/codec-emoji/codec my-images --size 64
    """
    from tessera import images, runtime
    from tessera.codecs.resolve import resolve_codec
    from tessera.data.resolve import open_data, resolve_data
    from tessera.evaluation.features import load_extractor
    from tessera.evaluation.reconstruction import comparison_rows, reconstruct
    from tessera.evaluation.sources import subset_indices
    from tessera.training.codec import format_scores

    torch_device = runtime.choose_device(device)
    built = resolve_codec(codec).build().to(torch_device)
    dataset = open_data(resolve_data(data, parse_size(size)))
    extractor = load_extractor(features, torch_device) if features else None
    with progress() as start:
        indices = subset_indices(len(dataset), num_samples).tolist()
        result = reconstruct(built, dataset, indices, torch_device, extractor, batch_size, start("reconstructing"))
    if out is not None:
        images.save_png(out, images.grid(comparison_rows(result), columns=8, gap=2))
    print(format_scores(result, extractor))
