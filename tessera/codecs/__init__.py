"""Pixels to latents and back. A codec's scale and shift stand in the codec and nowhere else."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from tessera.codecs.autoencoder import AutoencoderConfig
from tessera.codecs.codec import Codec, StoredCodec, StoredConfig
from tessera.codecs.pixels import PixelsConfig
from tessera.codecs.tiny import TinyConfig
from tessera.settings import by_kind

AnyCodec = Annotated[
    PixelsConfig | AutoencoderConfig | TinyConfig, BeforeValidator(by_kind), Field(discriminator="kind")
]

__all__ = ["AnyCodec", "AutoencoderConfig", "Codec", "PixelsConfig", "StoredCodec", "StoredConfig", "TinyConfig"]
