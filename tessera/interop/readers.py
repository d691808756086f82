"""What all readers share: files that cannot run a program, the codec of a network, how far two networks are apart."""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.bundle import Model
from tessera.codecs import AnyCodec, AutoencoderConfig, PixelsConfig, StoredConfig
from tessera.conditioning import NULL_LABEL, Condition
from tessera.errors import TesseraError
from tessera.models.dit import DiT
from tessera.models.network import Network

AUTOENCODER = "stabilityai/sd-vae-ft-{}"  # the two decoders of the official code: ema and mse

Codec = str | AnyCodec


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object, or TesseraError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TesseraError(f"cannot read {path}: {error}") from None
    if not isinstance(data, dict):
        raise TesseraError(f"{path} holds {type(data).__name__}; expected an object")
    return data


def read_pickle(path: Path, allowed: Sequence[type] = ()) -> Any:
    """What torch.load finds, if that is tensors, plain containers and the allowed classes; on the CPU.

    Raises TesseraError for anything else: a pickle may otherwise run any program as it is read.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a pickle protocol other than torch's own
            # Mapped, because a training checkpoint holds four times the weights that are wanted.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise TesseraError(f"{path} is missing") from None
    except Exception as error:  # a damaged file makes torch.load raise anything: KeyError, EOFError, RuntimeError, ...
        unsafe = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if unsafe is not None:
            raise TesseraError(
                f"{path} is refused: it holds {unsafe[1]}, which could run a program as it is loaded; "
                "expected tensors alone (save its state dict with torch.save)"
            ) from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise TesseraError(f"{path} is damaged or no PyTorch file: {reason}") from None


def codec_for(told: Codec | None, channels: int, decoder: str = "ema") -> AnyCodec:
    """The codec of a network that sees so many channels: the one told, or the usual one. Nothing is loaded.

    told: "pixels", a folder (an autoencoder, a pipeline with vae/, a bundle with codec/), a hub id or a configuration.
    Raises TesseraError if it does not fit the channels.
    """
    if told is None:
        if channels in (1, 3):
            return PixelsConfig(channels=channels)
        if channels == 4:
            return AutoencoderConfig(source=AUTOENCODER.format(decoder))
        raise TesseraError(
            f"a network of {channels} channels has no usual codec: give codec= (--codec), a folder or hub id of an "
            "AutoencoderKL"
        )
    if told == "pixels":
        if channels not in (1, 3):
            raise TesseraError(f"this network sees {channels} channels; pixels have 1 (grey) or 3 (RGB)")
        return PixelsConfig(channels=channels)
    if isinstance(told, PixelsConfig):
        if told.channels != channels:
            raise TesseraError(f"this network sees {channels} channels, but the codec gives {told.channels}")
        return told
    if isinstance(told, StoredConfig):
        return told
    folder = Path(told).expanduser()
    if not folder.is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", told):
            raise TesseraError(f"no codec at {told}: give pixels, the folder of an AutoencoderKL, or its hub id")
        return AutoencoderConfig(source=told)
    for subfolder in (None, "vae", "codec"):
        place = folder / (subfolder or "") / "config.json"
        config = read_json(place) if place.exists() else {}
        if config.get("_class_name") == "AutoencoderKL":
            latent = config.get("latent_channels", 4)
            if latent != channels:
                raise TesseraError(f"this network sees {channels} channels, but {place.parent} makes {latent}")
            return AutoencoderConfig(source=str(folder.resolve()), subfolder=subfolder)
    raise TesseraError(f"{folder} holds no AutoencoderKL: expected its config.json there, in vae/ or in codec/")


def dit_of(model: Model, place: str) -> DiT:
    """The network of a model that is to be written where there is place for a DiT alone, or TesseraError."""
    if not isinstance(model.network, DiT):
        raise TesseraError(
            f"{place} holds a DiT, and this model is a {model.config.network.display_name}: convert to a bundle"
        )
    return model.network


@torch.no_grad()
def difference(network: Network, other: Callable[[Tensor, Tensor, Condition], Tensor]) -> float:
    """Relative L2 distance of two networks' raw outputs: at noise, at four times, told a class and told nothing."""
    config, device = network.config, next(network.parameters()).device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, config.in_channels, *config.input_size, generator=generator).to(device)
    t = torch.tensor([0.0, 250.0, 500.0, 999.0] * 2, device=device)
    label = torch.randint(max(config.num_classes, 1), (8,), generator=generator)
    if config.learn_null_class:
        label[4:] = NULL_LABEL
    condition = Condition(label=label.to(device) if config.num_classes else None)
    ours = network(x, t, condition)
    theirs = other(x.cpu(), t.cpu(), condition.to("cpu")).to(device)
    return float((ours - theirs).norm() / ours.norm().clamp(min=1e-12))
