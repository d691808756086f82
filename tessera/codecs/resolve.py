"""The codec that a command, a function or a network's number of channels selects."""

import re
from pathlib import Path

from tessera.codecs import AnyCodec
from tessera.codecs.autoencoder import AutoencoderConfig
from tessera.codecs.diffusers_autoencoder import CLIPS, IMAGES, DiffusersAutoencoderConfig
from tessera.codecs.pixels import PixelsConfig
from tessera.codecs.tiny import TinyConfig
from tessera.errors import TesseraError
from tessera.files import read_json

SD_VAE = "stabilityai/sd-vae-ft-{}"  # the two decoders of the official DiT code: ema and mse
KINDS = {"AutoencoderKL": AutoencoderConfig, "AutoencoderTiny": TinyConfig}
SUBFOLDERS = ("", "codec", "vae")  # of a codec, a bundle or run, and a diffusers pipeline

CodecSource = str | AnyCodec  # "pixels", a folder, a hub id, or a configuration


def resolve_codec(source: CodecSource | None, channels: int | None = None, decoder: str = "ema") -> AnyCodec:
    """The configuration of a codec. No weights are loaded.

    source: "pixels", a hub id of an AutoencoderKL, or a folder: an autoencoder, or a run, bundle or pipeline that holds
    one. None selects the default: pixels for 1 or 3 channels, the official code's autoencoder for 4.
    channels: of the latents, if known. decoder: of the official autoencoder, ema or mse.
    Raises TesseraError if there is no such codec, or it has other channels.
    """
    if source is None:
        if channels not in (1, 3, 4):
            raise TesseraError(
                f"a network of {channels} channels has no default codec: give --codec, a folder or a hub id"
            )
        return AutoencoderConfig(source=SD_VAE.format(decoder)) if channels == 4 else PixelsConfig(channels=channels)
    if source == "pixels":
        if channels not in (None, 1, 3):
            raise TesseraError(f"the network has {channels} channels, but pixels have 1 (gray) or 3 (RGB)")
        return PixelsConfig(channels=channels or 3)
    if isinstance(source, str):
        return _stored_codec(source, channels)
    if isinstance(source, PixelsConfig):
        _check_channels(source.channels, channels, "pixels")
    return source


def _stored_codec(source: str, channels: int | None) -> AutoencoderConfig | TinyConfig | DiffusersAutoencoderConfig:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
            raise TesseraError(f"no codec at {source}: give pixels, the folder of an autoencoder, or its hub id")
        return AutoencoderConfig(source=source)
    for path in (folder.resolve() / name for name in SUBFOLDERS):
        if (path / "config.json").is_file():
            data = read_json(path / "config.json")
            if (name := data.get("_class_name", "")) in (*IMAGES, *CLIPS):
                return DiffusersAutoencoderConfig(source=str(path), class_name=name)
            if kind := KINDS.get(name):
                _check_channels(data.get("latent_channels", 4), channels, str(path))
                return kind(source=str(path))
        elif any(path.glob("*encoder.pth")) or any(path.glob("*encoder.safetensors")):
            return TinyConfig(source=str(path))
    raise TesseraError(
        f"{folder} holds no codec: expected the config.json of an {' or '.join(KINDS)} (or "
        f"{', '.join(IMAGES + CLIPS)}), or *_encoder and "
        "*_decoder files"
    )


def _check_channels(channels: int, expected: int | None, source: str) -> None:
    if expected not in (None, channels):
        raise TesseraError(f"the network has {expected} channels, but the codec {source} has {channels}")
