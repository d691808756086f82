"""`load` recognizes a format and reads it; `convert` writes another one."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from tessera import bundle, power_ema, pretrained, runtime
from tessera.adapters import attached, merge
from tessera.bundle import Model
from tessera.checkpoint_files import SUFFIXES, find_weight_files, is_weights_file
from tessera.codecs.resolve import CodecSource, resolve_codec
from tessera.encoders.text import HUB_PREFIX, AnyTextEncoder, FolderConfig, MiniLMConfig
from tessera.errors import TesseraError
from tessera.files import read_json
from tessera.interop import diffusers, diffusers_folder, official, pixart_folder
from tessera.interop.adapters import AdapterSpec, attach_adapters
from tessera.interop.common import without_feature_head
from tessera.models.diffusers_network import DiffusersConfig
from tessera.models.dit import DiTConfig
from tessera.models.pixart import PixArtConfig
from tessera.settings import unknown_name

FORMATS = ("bundle", "official", "diffusers")
ACCEPTED = (
    "expected a bundle (a folder with config.json), a run's folder, an official checkpoint "
    f"({', '.join(SUFFIXES)}, or a folder of one), a folder of a diffusers pipeline (DiT, PixArt, SD3, FLUX, ...) "
    f"or its transformer, or a model that comes with Tessera: {', '.join(pretrained.names())}"
)
TYPE_IS_RECORDED = (
    "{} records what it was trained as ({}): leave out --checkpoint-type; it is for files of bare weights"
)
Format = Literal["bundle", "official", "diffusers"]
Average = dict[str, float | None]  # of the weights to load: its decay (ema) or its length (ema_length)

logger = logging.getLogger(__name__)


def load(
    path: str | Path,
    device: str | torch.device = "auto",
    *,
    ema: float | None = None,
    ema_length: float | None = None,
    checkpoint_type: str | None = None,
    num_heads: int | None = None,
    size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    codec: CodecSource | None = None,
    text_encoder: str | AnyTextEncoder | None = None,
    adapters: Sequence[str | AdapterSpec] | Mapping[str, float] = (),
    any_base: bool = False,
) -> Model:
    """Load a model: a shipped one by its name, a bundle, a run (its newest checkpoint), an official checkpoint, or a
    diffusers folder.

    device: auto, cpu, cuda or mps. ema: the decay of the EMA weights of a run that saved several (default: the first).
    ema_length: the length of the weights' power-function average (training.ema.kind=power), stored or computed.
    checkpoint_type: what a .pt was trained as, if it does not record it: dit, sit, sit-gvp, repa or repa-cosine.
    num_heads, size, num_classes: what weights alone may not determine (see `official.read`); elsewhere they must match
    the source. codec: instead of the source's own: "pixels", a folder or a hub id. text_encoder: likewise, a folder,
    hub:owner/name or "minilm". Nothing is downloaded. adapters: attached to it, as PATH, PATH:STRENGTH or
    NAME=PATH:STRENGTH, or strengths by path; any_base: also those that were trained on other weights.
    What was left out or assumed is in the provenance of the model, and logged as a warning.
    Raises TesseraError if no model is recognized, or the files are damaged.
    """
    path, device = bundle.localize(path, averages=ema_length is not None), runtime.choose_device(str(device))
    average = {"ema": ema, "ema_length": ema_length}
    options = {"checkpoint_type": checkpoint_type, "num_heads": num_heads, "size": size, "num_classes": num_classes}
    model = _load_official(path, device, average, codec=codec, **options)
    if model is None:
        model = _load_folder(path, device, codec, average)
        _check_options(path, model, **options)
        model = model if codec is None else _with_codec(model, codec)
    model = model if text_encoder is None else _with_text_encoder(model, text_encoder)
    model = without_feature_head(model)  # so that an adapter has the same base in training and sampling
    attach_adapters(model, adapters, any_base)
    return model


def _load_official(path: Path, device: torch.device, average: Average, **options: Any) -> Model | None:
    """The model of a file of weights, or of a folder that holds nothing else; None for other paths."""
    if not (is_weights_file(path) if path.is_file() else _is_weights_folder(path)):
        return None
    _reject_average(path, average)
    return _reported(path, official.read(path, device, **options))


def _is_weights_folder(path: Path) -> bool:
    """Whether a folder holds weights without any configuration."""
    names = (bundle.CONFIG, diffusers.INDEX, "checkpoints", "recipe.yaml")
    return not any((path / name).exists() for name in names) and find_weight_files(path) is not None


def _reported(path: Path, model: Model) -> Model:
    """The model, after a warning about what was left out or assumed."""
    provenance = model.config.provenance
    for what, text in (("left out", provenance.not_converted), ("assumed", provenance.assumed)):
        if text is not None:
            logger.warning("%s (%s): %s: %s", path, provenance.converted_from, what, text)
    return model


def _check_options(
    path: Path,
    model: Model,
    checkpoint_type: str | None,
    num_heads: int | None,
    size: int | tuple[int, int] | None,
    num_classes: int | None,
) -> None:
    """Raise TesseraError for options that contradict what a source records."""
    network = model.config.network
    if checkpoint_type is not None:
        raise TesseraError(TYPE_IS_RECORDED.format(path, model.config.diffusion.summary()))
    if num_heads is not None and not isinstance(network, DiTConfig):
        raise TesseraError(f"{path} holds a {network.display_name}, which has no num_heads: leave it out")
    if num_heads is not None and num_heads != getattr(network, "num_heads", None):
        raise TesseraError(f"{path} has num_heads {getattr(network, 'num_heads', None)}, not {num_heads}: leave it out")
    if size is not None and network.input_size not in (size, (size, size)):
        raise TesseraError(f"{path} has size {network.input_size}, not {size}: leave it out")
    if num_classes is not None and network.num_classes != num_classes:
        raise TesseraError(f"{path} has {network.num_classes} classes, not {num_classes}: leave out num_classes")


def ema_decays(path: str | Path) -> list[float]:
    """The decays of the EMA weights that a run saved, the one it samples with first; [] if there is only one."""
    path = pretrained.find(path) or Path(path).expanduser()
    folder = next(iter(bundle.checkpoints(path)), path)
    if not (folder / bundle.EMA_FOLDER).is_dir():
        return []
    return list(bundle.ema_weights(folder, bundle.load_config(folder)))


def ema_lengths(path: str | Path) -> tuple[list[float], list[float]]:
    """The lengths of the power-function averages in a bundle or the newest checkpoint of a run, the one it samples with
    first, and the shortest and the longest that `load` computes; [] if there are none."""
    path = pretrained.find(path) or Path(path).expanduser()
    folder = next(iter(bundle.checkpoints(path)), path)
    if not (folder / bundle.CONFIG).is_file() or "format" not in read_json(folder / bundle.CONFIG):
        return [], []
    config = bundle.load_config(folder)
    stored = bundle.stored_averages(folder, config)
    lengths = list(bundle.ema_weights(folder, config, "power"))
    possible = power_ema.possible_lengths(list(stored), config.provenance.steps or 0) if len(stored) > 1 else []
    return lengths, possible and [possible[0], possible[-1]]


def is_model(path: str | Path) -> bool:
    """Whether `load` is likely to read a path, judged by file names only."""
    path = pretrained.find(path) or Path(path).expanduser()
    names = (bundle.CONFIG, diffusers.INDEX, "checkpoints", "recipe.yaml")
    if path.is_file():
        return is_weights_file(path)
    return any((path / name).exists() for name in names) or _is_weights_folder(path)


def convert(
    source: Model | str | Path,
    target: str | Path,
    to: Format | str,
    approximate: bool = False,
    *,
    ema: float | None = None,
    ema_length: float | None = None,
    checkpoint_type: str | None = None,
    num_heads: int | None = None,
    size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    codec: CodecSource | None = None,
    text_encoder: str | AnyTextEncoder | None = None,
    adapters: Sequence[str | AdapterSpec] | Mapping[str, float] = (),
    any_base: bool = False,
    dtype: torch.dtype | None = None,
    about: str | None = None,
    license: str | None = None,
) -> str:
    """Write a model, or anything that `load` reads, in another format; returns a message about what was written.

    approximate: also write what the format cannot hold exactly, and measure how much one forward pass differs.
    Of a bundle: the weights are rounded to dtype (bfloat16 halves the file, int8 makes it a quarter); about and
    license are for its card.
    Adapters are merged into the weights. Raises TesseraError if the target exists, or the format cannot hold the model.
    """
    if to not in FORMATS:
        raise TesseraError(unknown_name("format", to, FORMATS))
    writers = {"official": official.write, "diffusers": _write_diffusers}
    if not isinstance(source, Model):
        options = {"checkpoint_type": checkpoint_type, "num_heads": num_heads, "size": size, "num_classes": num_classes}
        source = load(source, "cpu", ema=ema, ema_length=ema_length, codec=codec, text_encoder=text_encoder, **options)
        attach_adapters(source, adapters, any_base)
    elif ema is not None or ema_length is not None:
        name, value = ("ema", ema) if ema is not None else ("ema_length", ema_length)
        raise TesseraError(f"the weights of this model are loaded already: leave out {name} {value}")
    elif checkpoint_type is not None:
        raise TesseraError(TYPE_IS_RECORDED.format("this model", source.config.diffusion.summary()))
    else:
        source = source if codec is None else _with_codec(source, codec)
        source = source if text_encoder is None else _with_text_encoder(source, text_encoder)
    strengths = attached(source.network)
    if strengths:
        source = replace(source, network=copy.deepcopy(source.network), adapters={})
        merge(source.network)
    source = without_feature_head(source)
    if to == "bundle":
        lines = {name: text for name, text in (("about", about), ("license", license)) if text is not None}
        provenance = source.config.provenance.model_copy(update=lines)
        config = source.config.model_copy(update={"provenance": provenance})
        text = _write_bundle(replace(source, config=config), Path(target).expanduser(), dtype)
    elif any(value is not None for value in (dtype, about, license)):
        raise TesseraError(f"dtype, about and license are for bundles, not for {to}: leave them out")
    else:
        text = writers[to](source, Path(target).expanduser(), approximate)
    names = ", ".join(f"{name} ({strength:g})" for name, strength in strengths.items())
    return f"{text}; adapters are merged into its weights: {names}" if strengths else text


def _reject_average(path: Path, average: Average) -> None:
    for option, name in (("ema", "decay"), ("ema_length", "length")):
        if average[option] is not None:
            raise TesseraError(
                f"{path} holds one set of weights, not EMA weights of {name} {average[option]}: leave out "
                f"--{option.replace('_', '-')}"
            )


def _load_folder(path: Path, device: torch.device, codec: CodecSource | None, average: Average) -> Model:
    if not path.exists():
        raise TesseraError(f"there is nothing at {path}: {ACCEPTED}")
    if not path.is_dir():
        raise TesseraError(f"{path} is not a model that Tessera can read: {ACCEPTED}")
    config: dict[str, Any] = read_json(path / bundle.CONFIG) if (path / bundle.CONFIG).exists() else {}
    if "format" in config:
        return bundle.load(path, device, **average)
    if "_class_name" in config or (path / diffusers.INDEX).exists():
        _reject_average(path, average)
        read = pixart_folder.read if pixart_folder.is_pixart(path) else diffusers.read
        read = diffusers_folder.read if diffusers_folder.accepts(path) else read
        return _reported(path, read(path, device, codec=codec))
    if checkpoints := bundle.checkpoints(path):
        return bundle.load(checkpoints[0], device, **average)
    if (path / "checkpoints").is_dir() or (path / "recipe.yaml").exists():
        raise TesseraError(f"the run in {path} has no checkpoint yet: wait for the first, or resume the training")
    raise TesseraError(f"{path} holds no model that Tessera can read: {ACCEPTED}")


def _with_codec(model: Model, codec: CodecSource) -> Model:
    config = resolve_codec(codec, model.config.network.in_channels)
    return Model(model.config.model_copy(update={"codec": config}), model.network)


def _with_text_encoder(model: Model, source: str | AnyTextEncoder) -> Model:
    """A model with another text encoder. A string leaves the settings of the model's own as they are."""
    network, own = model.config.network, model.config.text
    if not network.uses_text:
        raise TesseraError("this model is not conditioned on text: leave out the text encoder (--text-encoder)")
    if source == "minilm":
        text: AnyTextEncoder = MiniLMConfig()
    elif isinstance(source, str):
        path = source if source.startswith(HUB_PREFIX) else str(Path(source).expanduser().resolve())
        if not isinstance(own, FolderConfig):
            own = FolderConfig(source=path, max_tokens=network.text_tokens or None)
        text = own.model_copy(update={"source": path, "subfolder": None, "tokenizer_subfolder": None, "revision": None})
    else:
        text = source
    return Model(model.config.model_copy(update={"text": text}), model.network, model.loaded_codec)


def _write_diffusers(model: Model, target: Path, approximate: bool) -> str:
    if isinstance(model.config.network, PixArtConfig):
        return pixart_folder.write(model, target)
    if isinstance(model.config.network, DiffusersConfig):
        return diffusers_folder.write(model, target)
    return diffusers.write(model, target, approximate)


def _write_bundle(model: Model, target: Path, dtype: torch.dtype | None) -> str:
    """Write a bundle, which is exact unless its weights are rounded."""
    bundle.save(model, target, dtype=dtype)
    rounding = "exact" if dtype is None else f"weights rounded to {str(dtype).removeprefix('torch.')}"
    return f"wrote {target}: a bundle, {rounding}"
