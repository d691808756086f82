"""`tessera info`: facts of a model or an adapter, or the command that reproduces an image."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.options import EMA, CheckpointType, Codec, EMALength, NumClasses, NumHeads, TextEncoder
from tessera.errors import TesseraError

SETTINGS = {"model", "sampling", "options", "class_names", "prompts", "seeds", "weights"}  # of an image


def info(
    model: Annotated[str, typer.Argument(help="a model, an adapter, or an image or clip written by `tessera sample`")],
    ema: EMA = None,
    ema_length: EMALength = None,
    checkpoint_type: CheckpointType = None,
    num_heads: NumHeads = None,
    num_classes: NumClasses = None,
    codec: Codec = None,
    text_encoder: TextEncoder = None,
) -> None:
    """Print the facts of a model, an adapter, an image or a clip.

    For a model also how it was trained; for an image or clip also the command that reproduces it.

    \b
    Examples:
      tessera info runs/mine
      tessera info samples/class-cat-seed-0.png
    """
    from tessera.clips import ANIMATIONS, SIDE_FILE, VIDEOS

    path = Path(model)
    if path.suffix.lower() in {*ANIMATIONS, *VIDEOS} or (path / SIDE_FILE).exists():
        print(_command(path))
        return
    from tessera.bundle import weights_hash
    from tessera.interop import adapter_conversion
    from tessera.interop.load import ema_decays, ema_lengths, load
    from tessera.model_card import describe

    if adapter_conversion.is_adapter(model):
        _print(adapter_conversion.describe(model))
        return
    loaded = load(
        model,
        device="cpu",
        ema=ema,
        ema_length=ema_length,
        checkpoint_type=checkpoint_type,
        num_heads=num_heads,
        num_classes=num_classes,
        codec=codec,
        text_encoder=text_encoder,
    )
    class_names = loaded.config.class_names
    names = ", ".join(class_names[:12]) + (", …" if len(class_names) > 12 else "")
    facts = {**describe(loaded), "classes": names or "without names", "weights": weights_hash(loaded.network)}
    facts |= loaded.config.provenance.facts()
    if decays := ema_decays(model):
        facts["EMA decays"] = f"{', '.join(map(str, decays))} (select one with --ema)"
    lengths, limits = ema_lengths(model)
    if lengths:
        others = f"; {limits[0]} to {limits[1]} can be computed (--ema-length)" if limits else ""
        facts["EMA lengths"] = ", ".join(map(str, lengths)) + others
    _print(facts)


def _print(facts: dict[str, Any]) -> None:
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        print(f"{name:<{width}}{value}")


def _command(path: Path) -> str:
    """The `tessera sample` command that reproduces an image or clip."""
    from tessera import clips, images
    from tessera.generation.image_settings import sample_command

    try:
        is_image = path.suffix.lower() == ".png"
        settings = images.read_settings(path) if is_image else clips.read_settings(path)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise TesseraError(f"cannot read {path}: {error}") from None
    if not isinstance(settings, dict) or not settings.keys() >= SETTINGS:
        raise TesseraError(f"{path} holds no settings: it was not written by `tessera sample` of this version")
    return sample_command(settings)
