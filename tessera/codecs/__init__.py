"""Codecs: pixels to latents and back. Scale and shift of the latents belong to the codec alone."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from tessera.codecs.autoencoder import AutoencoderConfig
from tessera.codecs.codec import Codec, StoredCodec, StoredConfig
from tessera.codecs.diffusers_autoencoder import DiffusersAutoencoderConfig
from tessera.codecs.pixels import PixelsConfig
from tessera.codecs.tiny import TinyConfig
from tessera.settings import expand_kind

AnyCodec = Annotated[
    PixelsConfig | AutoencoderConfig | TinyConfig | DiffusersAutoencoderConfig,
    BeforeValidator(expand_kind),
    Field(discriminator="kind"),
]

__all__ = [
    "AnyCodec", "AutoencoderConfig", "Codec", "DiffusersAutoencoderConfig", "PixelsConfig", "StoredCodec",
    "StoredConfig", "TinyConfig",
]  # fmt: skip
