"""A trained model: in memory, and as one folder that holds everything needed to draw from it.

config.json        what the network, process, codec and sampler are
model.safetensors  the weights (the EMA of training)
codec/             the autoencoder, if it came from a folder; a hub id stays an id
README.md          the model card
ema/0.999.safetensors    in a run's checkpoint: the weights averaged over another length, here with decay 0.999
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tessera.codecs import AnyCodec, Codec, StoredConfig
from tessera.diffusion import AnyDiffusionConfig, DiffusionProcess
from tessera.errors import TesseraError, listed
from tessera.files import atomic_folder
from tessera.models import AnyNetwork, Network
from tessera.models.network import parameter_count
from tessera.sampling import SamplingConfig
from tessera.settings import Settings, validate

CONFIG, WEIGHTS, CARD, CODEC, AVERAGES = "config.json", "model.safetensors", "README.md", "codec", "ema"
DECAY = "EMA decay"  # the word in `origin` that tells which average the weights are


class BundleConfig(Settings):
    """What config.json says."""

    format: Literal[1] = 1
    network: AnyNetwork
    diffusion: AnyDiffusionConfig
    codec: AnyCodec
    sampling: SamplingConfig = SamplingConfig()
    class_names: tuple[str, ...] = ()
    origin: dict[str, Any] = Field(default_factory=dict, description="how it was trained, or where it came from")
    recipe: dict[str, Any] | None = Field(default=None, description="the resolved recipe of its training")


@dataclass
class Model:
    """A network with all it takes to draw: process, codec, class names and the best-known sampler settings."""

    config: BundleConfig
    network: Network
    loaded_codec: Codec | None = None

    @cached_property
    def diffusion(self) -> DiffusionProcess:
        seen = self.config.network
        return self.config.diffusion.resolved(seen.in_channels, seen.input_size).build()

    @property
    def codec(self) -> Codec:
        """Loaded when first asked for: it may be large, or on a hub."""
        if self.loaded_codec is None:
            self.loaded_codec = self.config.codec.build().to(self.device)
        return self.loaded_codec

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def class_names(self) -> list[str]:
        """One name for each class; the numbers themselves where none were given."""
        return list(self.config.class_names) or [str(i) for i in range(self.config.network.num_classes)]


def checkpoints(run: Path) -> list[Path]:
    """The bundles that training left in a run's folder, the newest first."""
    return sorted(Path(run).glob("checkpoints/step-" + "[0-9]" * 9), reverse=True)


def save(model: Model, folder: Path, codec_at: str | None = None) -> None:
    """Write a bundle, whole or not at all; a codec in a local folder is copied in.

    codec_at: where the codec stands already, relative to the bundle, if it is not to be copied.
    Raises TesseraError if the folder exists or cannot be written.
    """
    with atomic_folder(Path(folder)) as partial:
        write(model, partial, codec_at)


def write(model: Model, folder: Path, codec_at: str | None = None) -> None:
    """The files of a bundle, into a folder that is being made."""
    codec = model.config.codec
    if isinstance(codec, StoredConfig) and codec.folder is not None:
        if codec_at is None:
            copy_codec(codec, folder / CODEC)
            codec_at = f"./{CODEC}"
        codec = codec.model_copy(update={"source": codec_at, "subfolder": None})
    config = model.config.model_copy(update={"codec": codec})
    (folder / CONFIG).write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    write_tensors(model.network.state_dict(), folder / WEIGHTS)
    (folder / CARD).write_text(card(model), encoding="utf-8")


def copy_codec(codec: StoredConfig, target: Path) -> None:
    """The files of an autoencoder that stands in a local folder; a pickle of weights becomes safetensors."""
    source = codec.folder
    if source is None or not any(source.glob("*.safetensors")):
        codec.build().save(target)
        return
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob("*.json")) + sorted(source.glob("*.safetensors")):
        shutil.copyfile(file, target / file.name)


def load(folder: Path, device: torch.device | str = "cpu", ema: float | None = None) -> Model:
    """Read a bundle; ema: the decay of the average to take, where there are several (the one that the run draws with).

    Raises TesseraError if it is incomplete, damaged or of another architecture, or has no such average.
    """
    folder = Path(folder)
    config, weights = load_config(folder), folder / WEIGHTS
    if ema is not None:
        kept = ema_weights(folder, config)
        if ema not in kept:
            known = ", ".join(map(str, kept)) or "weights of which it does not say how they were averaged"
            raise TesseraError(f"{folder} has no average of decay {ema}; it has {known}")
        weights = kept[ema]
        config = config.model_copy(update={"origin": {**config.origin, DECAY: ema}})
    return assemble(config, read_tensors(weights), str(folder), device)


def ema_weights(folder: Path, config: BundleConfig) -> dict[float, Path]:
    """The averages of the weights that a bundle holds, by decay; the one that it draws with first."""
    own = config.origin.get(DECAY)
    kept = {} if own is None else {float(own): folder / WEIGHTS}
    return kept | {float(path.stem): path for path in sorted((folder / AVERAGES).glob("[0-9]*.safetensors"))}


def load_config(folder: Path) -> BundleConfig:
    """What a bundle's config.json says, its codec's place made absolute. Raises TesseraError."""
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TesseraError(f"cannot read {folder / CONFIG}: {error}") from None
    if isinstance(data, dict) and data.get("format", 1) != 1:
        raise TesseraError(f"{folder} has bundle format {data['format']}; this Tessera reads format 1: upgrade Tessera")
    config = validate(BundleConfig, data, str(folder / CONFIG))
    if isinstance(config.codec, StoredConfig) and config.codec.source.startswith(("./", "../")):
        here = str((folder / config.codec.source).resolve())
        config = config.model_copy(update={"codec": config.codec.model_copy(update={"source": here})})
    return config


def assemble(
    config: BundleConfig, tensors: dict[str, Tensor], source: str, device: torch.device | str = "cpu"
) -> Model:
    """A model from its configuration and its network's state dict; float32. Raises TesseraError if they do not fit."""
    with torch.device("meta"):  # no time spent on initial weights that are replaced at once
        network = config.network.build()
    fit(network, tensors, source)
    network.load_state_dict({name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}, assign=True)
    return Model(config, network.eval())


def fit(network: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Raise TesseraError that names the keys in which tensors and network differ."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    faults = [f"missing {name} {expected[name]}" for name in expected if name not in found]
    faults += [f"unexpected {name} {found[name]}" for name in found if name not in expected]
    faults += [
        f"{name} is {found[name]}, expected {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if faults:
        raise TesseraError(f"{source} holds another architecture than its configuration says:{listed(faults)}")


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names begin with a prefix, without it. TesseraError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (no mapping)
            return {name[len(prefix) :]: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise TesseraError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise TesseraError(f"{path} is damaged or no safetensors file: {error}") from None


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file; a full disk raises OSError."""
    try:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        path.touch()
        mode = path.stat().st_mode  # safetensors makes files that their owner alone may read
        save_file(contiguous, path, metadata={"format": "pt"})  # which some readers insist on
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(None, str(error)) from None


def weights_hash(network: nn.Module) -> str:
    """A short hash of every weight: two networks with one hash draw the same pictures."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def describe(model: Model) -> dict[str, str]:
    """The facts of a model, for the card and for `tessera info`."""
    config = model.config
    network, process = config.network, config.diffusion
    height, width = network.input_size
    classes = f"{network.num_classes} classes" if network.num_classes else "unconditional"
    codec = config.codec
    return {
        "network": network.summary(),
        "sees": f"{network.in_channels} x {height} x {width}, {classes}",
        "codec": codec.kind + (f" ({codec.source})" if isinstance(codec, StoredConfig) else ""),
        "process": process.summary(),
        "parameters": f"{parameter_count(model.network):,}",
        "Gflops": f"{model.network.macs() / 1e9:.4g} (multiply-adds of one forward pass, as the DiT paper counts)",
        "draws with": config.sampling.summary(),
    }


def card(model: Model) -> str:
    """The model card in Markdown: what it is, how it was trained, how to draw from it."""
    facts = "\n".join(f"| {name} | {value} |" for name, value in describe(model).items())
    origin = "\n".join(f"- **{name}**: {value}" for name, value in model.config.origin.items()) or "- not recorded"
    classes = ", ".join(model.class_names[:50]) + (", …" if len(model.class_names) > 50 else "")
    network = model.config.network
    example = "classes=[0], " if network.num_classes else ""
    return f"""---
library_name: tessera
tags: [diffusion, {network.kind}]
---
# A {network.display_name}

| | |
|---|---|
{facts}

## How it came to be
{origin}

## Classes
{classes or "none: unconditional"}

## How to draw from it
```
tessera sample FOLDER {"--classes all " if network.num_classes else ""}--count 4
```
```python
import tessera
model = tessera.load("FOLDER")
images = tessera.generate(model, {example}seeds=[0])  # uint8 [B, H, W, C]
```
"""
