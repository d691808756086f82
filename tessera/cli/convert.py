"""`tessera convert`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tessera.cli.options import (
    EMA,
    Adapters,
    AnyBase,
    CheckpointType,
    Codec,
    EMALength,
    ModelPath,
    NumClasses,
    NumHeads,
    TextEncoder,
)
from tessera.errors import TesseraError


def convert(
    source: ModelPath,
    target: Annotated[
        Path,
        typer.Argument(help="a new folder; a .pt for official; a .safetensors for an adapter of other programs"),
    ],
    to: Annotated[
        str,
        typer.Option("--to", help="bundle, official, diffusers; for an adapter: adapter, peft, diffusers, kohya"),
    ],
    approximate: Annotated[
        bool, typer.Option(help="also write what the format cannot hold exactly, and report the difference")
    ] = False,
    ema: EMA = None,
    ema_length: EMALength = None,
    checkpoint_type: CheckpointType = None,
    num_heads: NumHeads = None,
    num_classes: NumClasses = None,
    codec: Codec = None,
    text_encoder: TextEncoder = None,
    adapter: Adapters = None,
    any_base: AnyBase = False,
    base: Annotated[Path | None, typer.Option(help="the model that an adapter belongs to")] = None,
    alpha: Annotated[float | None, typer.Option(help="alpha of an adapter whose file does not state it")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "int8"] | None,
        typer.Option(help="for a bundle: round the weights in the file; in memory they are float32 again"),
    ] = None,
    about: Annotated[str | None, typer.Option(help="for a bundle: what the model generates, for its card")] = None,
    license: Annotated[str | None, typer.Option(help="for a bundle: the license of the weights, for its card")] = None,
) -> None:
    """Convert a model, or an adapter, to another format.

    The weights stay bit-identical, unless adapters are merged into them or --dtype rounds them.

    \b
    Examples:
      tessera convert runs/mine mine.pt --to official
      tessera convert runs/lora style.safetensors --to diffusers
    """
    import torch

    from tessera.interop import adapter_conversion, load
    from tessera.settings import unknown_name

    known = dict.fromkeys((*load.FORMATS, *adapter_conversion.ALL_FORMATS))
    if to not in known:
        raise TesseraError(unknown_name("format", to, known))
    only_adapters = to in adapter_conversion.ONLY_ADAPTERS or target.suffix == ".safetensors"
    if only_adapters or adapter_conversion.is_adapter(source):
        if dtype or about or license:
            raise TesseraError("--dtype, --about and --license are for bundles of models: leave them out")
        print(adapter_conversion.convert(source, target, to, base, alpha, any_base))
        return
    if base is not None or alpha is not None:
        raise TesseraError(f"--base and --alpha are for adapters, and {source} is a model: leave them out")
    print(
        load.convert(
            source,
            target,
            to,
            approximate=approximate,
            ema=ema,
            ema_length=ema_length,
            checkpoint_type=checkpoint_type,
            num_heads=num_heads,
            num_classes=num_classes,
            codec=codec,
            text_encoder=text_encoder,
            adapters=adapter or (),
            any_base=any_base,
            dtype=None if dtype in (None, "float32") else getattr(torch, dtype),
            about=about,
            license=license,
        )
    )
