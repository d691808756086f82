"""Pixels to latents and back. A codec's scale and shift stand in the codec and nowhere else."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from tessera.codecs.autoencoder import AutoencoderConfig
from tessera.codecs.pixels import PixelsConfig
from tessera.settings import by_kind

AnyCodec = Annotated[PixelsConfig | AutoencoderConfig, BeforeValidator(by_kind), Field(discriminator="kind")]

__all__ = ["AnyCodec", "AutoencoderConfig", "PixelsConfig"]
