"""A codec by the folder or hub id where its weights lie, as commands take it."""

import json
from pathlib import Path

from tessera.codecs.autoencoder import AutoencoderConfig
from tessera.codecs.codec import StoredConfig
from tessera.codecs.tiny import TinyConfig
from tessera.errors import TesseraError

KINDS: dict[str, type[AutoencoderConfig] | type[TinyConfig]] = {
    "AutoencoderKL": AutoencoderConfig,
    "AutoencoderTiny": TinyConfig,
}
INSIDE = ("", "codec", "vae")  # where the autoencoder of a run, a bundle or a pipeline lies


def resolve_codec(text: str) -> StoredConfig:
    """The configuration of a folder's autoencoder, or of the one inside a run, a bundle or a pipeline; of a hub id,
    which is taken for an AutoencoderKL. Nothing is loaded. Raises TesseraError.
    """
    folder = Path(text).expanduser()
    if not folder.is_dir():
        if folder.exists() or len(folder.parts) != 2:
            raise TesseraError(f"no codec at {text}: give the folder of an autoencoder, or its hub id")
        return AutoencoderConfig(source=text)
    for place in (folder / name for name in INSIDE):
        if (place / "config.json").is_file():
            try:
                told = json.loads((place / "config.json").read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise TesseraError(f"cannot read {place / 'config.json'}: {error}") from None
            kind = KINDS.get(told.get("_class_name", "")) if isinstance(told, dict) else None
            if kind is not None:
                return kind(source=str(place))
        elif any(place.glob("*encoder.pth")) or any(place.glob("*encoder.safetensors")):
            return TinyConfig(source=str(place))
    raise TesseraError(
        f"{folder} holds no codec: expected the config.json of an {' or '.join(KINDS)}, or *_encoder and "
        "*_decoder files"
    )
