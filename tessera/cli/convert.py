"""`tessera convert`."""

from pathlib import Path
from typing import Annotated

import typer

from tessera.cli.options import (
    EMA,
    Adapters,
    AnyBase,
    CheckpointType,
    Codec,
    ModelPath,
    NumClasses,
    NumHeads,
    TextEncoder,
)


def convert(
    source: ModelPath,
    target: Annotated[Path, typer.Argument(help="a new folder, or a .pt file for official")],
    to: Annotated[str, typer.Option("--to", help="bundle, official or diffusers")],
    approximate: Annotated[
        bool, typer.Option(help="also write what the format cannot hold exactly, and report the difference")
    ] = False,
    ema: EMA = None,
    checkpoint_type: CheckpointType = None,
    num_heads: NumHeads = None,
    num_classes: NumClasses = None,
    codec: Codec = None,
    text_encoder: TextEncoder = None,
    adapter: Adapters = None,
    any_base: AnyBase = False,
) -> None:
    """Convert a model to another format. The weights stay bit-identical, unless adapters are merged into them."""
    from tessera.interop import load

    print(
        load.convert(
            source,
            target,
            to,
            approximate=approximate,
            ema=ema,
            checkpoint_type=checkpoint_type,
            num_heads=num_heads,
            num_classes=num_classes,
            codec=codec,
            text_encoder=text_encoder,
            adapters=adapter or (),
            any_base=any_base,
        )
    )
