"""A trained model as one folder that holds everything needed to sample from it.

config.json              the network, diffusion process, codec and sampling settings
model.safetensors        the weights (the EMA of training), float32, or rounded: 16 bits, or 8 (int8_weights.py)
adapters/NAME            adapters on these weights, with their strengths in config.json
codec/                   the autoencoder, if it came from a local folder; a hub id stays an id
text/                    the text encoder, likewise
README.md                the model card
ema/0.999.safetensors    in a checkpoint of a run: the EMA with another decay, here 0.999
ema/length-0.1.safetensors   likewise, of power-function averages: another length, here 0.1

A checkpoint of an adapter has no weights of its own: `base` in config.json is the bundle that has them.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tessera import __version__, adapter_files, adapters, int8_weights, model_card, power_ema, pretrained, storage
from tessera.checkpoint_files import read_tensors, write_tensors
from tessera.codecs import StoredConfig
from tessera.encoders.text import FolderConfig
from tessera.errors import TesseraError, bullet_list
from tessera.files import atomic_folder, read_json
from tessera.model import FORMAT, AdapterInfo, BundleConfig, Model, Provenance
from tessera.settings import validate

CONFIG, WEIGHTS, CARD, CODEC, EMA_FOLDER = "config.json", "model.safetensors", "README.md", "codec", "ema"
TEXT, ADAPTERS, BASE = "text", "adapters", "base"
EMA_FILES = {"exponential": "{}.safetensors", "power": "length-{}.safetensors"}  # of a decay, or a length
TRAINED = "adapter"  # the name of an adapter in the run that trains it

__all__ = [
    "AdapterInfo",
    "BundleConfig",
    "Model",
    "Provenance",
    "checkpoints",
    "load",
    "load_config",
    "localize",
    "save",
    "weights_hash",
    "write",
]


def checkpoints(run: Path) -> list[Path]:
    """The bundles that training saved in a run's folder, newest first."""
    return sorted(Path(run).glob("checkpoints/step-" + "[0-9]" * 9), reverse=True)


def save(model: Model, folder: Path | str, shared_folder: str | None = None, dtype: torch.dtype | None = None) -> None:
    """Write a bundle, whole or not at all; a codec and a text encoder in local folders are copied in.

    shared_folder: the folder with copies of both, relative to the bundle, if they are not to be copied.
    dtype: the weights are rounded to it in the file (default: as they are), int8 in blocks with a scale each; `load`
    gives float32. Raises TesseraError if the folder exists or cannot be written.
    """
    if storage.is_remote(place := storage.locate(folder)):
        _upload(model, place, dtype)
        return
    with atomic_folder(Path(folder)) as partial:
        write(model, partial, shared_folder, dtype)


def _upload(model: Model, place: Path, dtype: torch.dtype | None) -> None:
    """Write a bundle into a bucket. config.json, without which it is none, is uploaded last."""
    url = storage.address(place)
    if storage.listing(place):
        raise TesseraError(f"{url} exists already: remove it or give another name")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(model, folder, dtype=dtype)
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        storage.upload_folder(folder, url, [name for name in names if name != CONFIG])
        storage.upload(folder / CONFIG, f"{url}/{CONFIG}")


def localize(path: str | Path, averages: bool = False) -> Path:
    """The path of a model; of a shipped one its folder, of one in a bucket that of a downloaded copy, of a run
    there its newest whole checkpoint. averages: download also those that the run saved, to compute others.

    Raises TesseraError if the bucket has no such model.
    """
    place = storage.locate(path)
    if not storage.is_remote(place):
        return pretrained.find(path) or place
    if not (names := storage.listing(place)):
        return storage.fetch(place)
    steps = sorted(name.split("/")[1] for name in names if re.fullmatch(r"checkpoints/step-\d{9}/training\.json", name))
    model = f"checkpoints/{steps[-1]}/" if steps else ""
    own = (CODEC, TEXT, BASE, power_ema.SNAPSHOTS) if averages else (CODEC, TEXT, BASE)
    parts = tuple(f"{part}/" for part in own)  # of a run
    for name in names:
        if (name.startswith(model) and "/state/" not in name) or name.startswith(parts):
            storage.fetch(place / name)
    for path in (place / power_ema.SNAPSHOTS).glob("*") if averages else ():
        if f"{power_ema.SNAPSHOTS}/{path.name}" not in names:
            path.unlink()  # of steps that the run has trained again
    return place / model


def write(model: Model, folder: Path, shared_folder: str | None = None, dtype: torch.dtype | None = None) -> None:
    """Write the files of a bundle into an existing folder; dtype: see `save`.

    The weights below an adapter that is being trained are not written again: the shared folder has them.
    """
    if shared_folder is None:
        copy_parts(model.config, folder)
    config, parts = model.config, shared_folder or "."
    codec, text = config.codec, config.text
    if isinstance(codec, StoredConfig) and codec.folder is not None:
        codec = codec.model_copy(update={"source": f"{parts}/{CODEC}", "subfolder": None})
    if isinstance(text, FolderConfig) and text.folder is not None:
        names = {"source": f"{parts}/{TEXT}", "subfolder": None, "tokenizer_subfolder": None}
        text = text.model_copy(update=names)
    strengths = adapters.attached(model.network)
    base = f"{parts}/{BASE}" if shared_folder is not None and TRAINED in strengths else None
    parts_and_version = {"codec": codec, "text": text, "tessera_version": __version__}
    config = config.model_copy(update={**parts_and_version, "base": base, "adapters": strengths})
    (folder / CONFIG).write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    if base is None:
        state = adapters.base_state(model.network)
        if dtype == torch.int8:
            state = int8_weights.quantize(state)
        elif dtype is not None:
            state = {name: tensor.to(dtype) for name, tensor in state.items()}
        write_tensors(state, folder / WEIGHTS)
    for name in strengths:
        info = model.adapters.get(name, AdapterInfo())
        adapter_files.write(
            info, adapters.adapter_state(model.network, name), folder / ADAPTERS / name / adapter_files.WEIGHTS
        )
    card = model_card.render(replace(model, config=model.config.model_copy(update={"codec": codec})))
    (folder / CARD).write_text(card, encoding="utf-8")


def save_base(config: BundleConfig, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the weights below an adapter that is being trained as a bundle in the folder of its run."""
    with torch.device("meta"):
        network = config.network.build()
    network.load_state_dict(dict(state), assign=True)
    save(Model(config.model_copy(update={"recipe": None}), network), folder, shared_folder="..")


def copy_parts(config: Any, target: Path) -> None:
    """Copy the codec and the text encoder that are in local folders, unless copies are there.

    config: of a bundle, or a recipe.
    """
    codec, text = config.codec, config.text
    if isinstance(codec, StoredConfig) and codec.folder is not None and not (target / CODEC).exists():
        with atomic_folder(target / CODEC) as partial:
            copy_codec(codec, partial)
    if isinstance(text, FolderConfig) and text.folder is not None and not (target / TEXT).exists():
        with atomic_folder(target / TEXT) as partial:
            text.save(partial)


def copy_codec(codec: StoredConfig, target: Path) -> None:
    """Copy the files of an autoencoder in a local folder; pickled weights become safetensors."""
    source = codec.folder
    if source is None or not any(source.glob("*.safetensors")):
        codec.build().save(target)
        return
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob("*.json")) + sorted(source.glob("*.safetensors")):
        shutil.copyfile(file, target / file.name)


def load(
    folder: Path, device: torch.device | str = "cpu", ema: float | None = None, ema_length: float | None = None
) -> Model:
    """Read a bundle. ema: the decay of the weights to load, where there are several (default: those of the bundle).
    ema_length: the length of their power-function average, which is computed if it is not stored.

    Raises TesseraError if the bundle is incomplete, damaged, of another format or architecture, or lacks that decay or
    length.
    """
    folder = Path(folder)
    config = load_config(folder)
    weights, trained = trained_weights(folder, config), None
    if ema is not None and ema_length is not None:
        raise TesseraError(f"got a decay ({ema}) and a length ({ema_length}) of averaged weights: give one of them")
    if ema_length is not None:
        trained = averaged_state(folder, config, ema_length)
        provenance = config.provenance.model_copy(update={"ema_decay": None, "ema_length": ema_length})
        config = config.model_copy(update={"provenance": provenance})
    if ema is not None:
        by_decay = ema_weights(folder, config)
        if ema not in by_decay:
            known = ", ".join(map(str, by_decay)) or "weights of unknown decay"
            raise TesseraError(f"{folder} has no EMA weights of decay {ema}; it has {known}")
        weights = by_decay[ema]
        provenance = config.provenance.model_copy(update={"ema_decay": ema, "ema_length": None})
        config = config.model_copy(update={"provenance": provenance})
    trained = read_weights(weights) if trained is None else trained
    state = trained
    if config.base is not None:
        if not (base := folder / config.base / WEIGHTS).exists():
            raise TesseraError(f"{folder} holds an adapter, and its base is missing: expected {base.resolve()}")
        state = read_weights(base)
    model = assemble(config.model_copy(update={"base": None, "adapters": {}}), state, str(folder), device)
    model.adapters = {name: adapter_files.read_info(folder / ADAPTERS / name) for name in config.adapters}
    check_bases(model, model.adapters)
    for name in config.adapters:
        is_trained = config.base is not None and name == TRAINED
        state = trained if is_trained else read_tensors(folder / ADAPTERS / name / adapter_files.WEIGHTS)
        adapters.attach(model.network, name, adapters.layers_from_state(model.network, state, str(folder)))
    adapters.set_strengths(model.network, config.adapters)
    return model


def check_bases(model: Model, infos: Mapping[str, AdapterInfo], bases: Mapping[str, Path] | None = None) -> None:
    """Raise TesseraError if an adapter was trained on other weights than those of a model.

    bases: the bundles that adapters were trained on, as far as they are known, for the message.
    """
    if any(info.base for info in infos.values()):
        own = weights_hash(adapters.base_state(model.network))
        for name, info in infos.items():
            if info.base not in (None, own):
                where = "that model" if name not in (bases or {}) else f"that model, {(bases or {})[name].resolve()}"
                raise TesseraError(
                    f"the adapter {name} was trained on other weights ({info.base}, {info.base_network}) "
                    f"than those of this model ({own}, {model.config.network.summary()}): use it with {where}, or "
                    "with --any-base (any_base=True) with any of the same shapes"
                )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of weights; those in 8 bits are float32. Raises TesseraError."""
    return int8_weights.dequantize(read_tensors(path), str(path))


def trained_weights(folder: Path, config: BundleConfig) -> Path:
    """The file of a bundle with the weights that training changed."""
    return folder / WEIGHTS if config.base is None else folder / ADAPTERS / TRAINED / adapter_files.WEIGHTS


def trained_state(network: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes, with the names in that file: of an adapter that is trained, or all."""
    is_adapter = TRAINED in adapters.attached(network)
    return adapters.adapter_state(network, TRAINED) if is_adapter else network.state_dict()


def ema_path(folder: Path, kind: str, average: float) -> Path:
    """The file of averaged weights in a bundle. average: their decay, or their length if the kind is power."""
    return folder / EMA_FOLDER / EMA_FILES[kind].format(average)


def ema_weights(folder: Path, config: BundleConfig, kind: str = "exponential") -> dict[float, Path]:
    """The files of averaged weights in a bundle, by decay, or by length if the kind is power; those that the bundle
    samples with come first."""
    own = config.provenance.ema_decay if kind == "exponential" else config.provenance.ema_length
    files = {} if own is None else {own: trained_weights(folder, config)}
    before, after = EMA_FILES[kind].split("{}")
    paths = sorted((folder / EMA_FOLDER).glob(EMA_FILES[kind].format("[0-9]*")))
    return files | {float(path.name.removeprefix(before).removesuffix(after)): path for path in paths}


def stored_averages(folder: Path, config: BundleConfig) -> dict[power_ema.Profile, power_ema.Stored]:
    """The power-function averages in a bundle and, if it is a checkpoint of a run, those that the run saved before."""
    step = config.provenance.steps or 0
    own = ema_weights(folder, config, "power")
    averages = {power_ema.Profile(step, length): power_ema.Stored(path) for length, path in own.items()}
    parent = folder.resolve().parent
    return (power_ema.snapshots(parent.parent, step) if averages and parent.name == "checkpoints" else {}) | averages


def averaged_state(folder: Path, config: BundleConfig, length: float) -> dict[str, Tensor]:
    """The trained weights of a bundle as a power-function average of a length: stored, or computed from those stored.

    Raises TesseraError if they are not enough for that length.
    """
    stored = stored_averages(folder, config)
    if not stored:
        decay = config.provenance.ema_decay
        weights = "one set of weights" if decay is None else f"exponential averages (decay {decay})"
        raise TesseraError(
            f"{folder} has {weights}, of which there is no length {length}: leave it out, or train with "
            "training.ema.kind=power"
        )
    step, lengths = config.provenance.steps or 0, sorted({profile.length for profile in stored})
    target, text = power_ema.Profile(step, length), f"lengths {', '.join(map(str, lengths))}"
    if not 0 < length < power_ema.MAX_LENGTH:
        raise TesseraError(f"an average has no length {length}: expected one above 0 and below 0.288")
    if target not in stored and len(stored) == 1:
        raise TesseraError(
            f"{folder} has one average, of length {lengths[0]}, and {length} cannot be computed from it: take the run "
            "that it is from, which has more"
        )
    if target not in stored and not step:
        raise TesseraError(f"{folder} is of step 0, before any training: leave out the length {length}")
    if target in stored and stored[target].path == trained_weights(folder, config):
        return read_weights(stored[target].path)
    factors, error = power_ema.fit(list(stored), target)
    if error > power_ema.MAX_ERROR:
        possible = power_ema.possible_lengths(list(stored), step)
        limits = f"expected one from {possible[0]} to {possible[-1]}" if possible else "there is no other, either"
        raise TesseraError(
            f"{folder} has averages of {text} after {len({profile.step for profile in stored})} steps, which give "
            f"length {length} with an error of {error:.0%}: {limits}; a run that saves them more often "
            "(training.ema.snapshot_every) has more"
        )
    return power_ema.combine({stored[profile]: factor for profile, factor in zip(stored, factors) if factor})


def load_config(folder: Path) -> BundleConfig:
    """The configuration of a bundle; the paths of its codec and text encoder are made absolute. Raises TesseraError."""
    data = read_json(folder / CONFIG)
    if (number := data.get("format", FORMAT)) != FORMAT:
        writer = f"Tessera {data.get('tessera_version', '0.6.0 or earlier')}"
        remedy = f"install {writer}"
        if isinstance(number, int) and number < FORMAT:
            remedy = "train it again, or let that version convert it (--to official or diffusers) and load the result"
        raise TesseraError(
            f"{folder} has bundle format {number}, written by {writer}; Tessera {__version__} reads format {FORMAT}: "
            + remedy
        )
    config = validate(BundleConfig, data, str(folder / CONFIG))
    for name, kind in (("codec", StoredConfig), ("text", FolderConfig)):
        part = getattr(config, name)
        if isinstance(part, kind) and part.source.startswith(("./", "../")):
            source = str((folder / part.source).resolve())
            config = config.model_copy(update={name: part.model_copy(update={"source": source})})
    return config


def assemble(
    config: BundleConfig, tensors: dict[str, Tensor], source: str, device: torch.device | str = "cpu"
) -> Model:
    """A float32 model from its configuration and its network's state dict. Raises TesseraError if they do not match."""
    with torch.device("meta"):  # no time spent on initial weights that are replaced at once
        network = config.network.build()
    check_state_dict(network.state_dict(), tensors, source)
    network.load_state_dict({name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}, assign=True)
    return Model(config, network.eval())


def check_state_dict(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise TesseraError that lists the tensors in which what a file holds and the state dict of a network differ."""
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in shapes]
    problems += [f"unexpected {name} {shape}" for name, shape in shapes.items() if name not in expected]
    problems += [
        f"{name} is {tensors[name].dtype}, expected floating-point numbers"
        for name, tensor in state.items()
        if tensor.is_floating_point() and name in tensors and not tensors[name].is_floating_point()
    ]
    problems += [
        f"{name} is {shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    if problems:
        raise TesseraError(f"{source} holds another architecture than its configuration:{bullet_list(problems)}")


def weights_hash(network: nn.Module | Mapping[str, Tensor]) -> str:
    """A short hash of all weights, or of a state dict: two networks with the same hash generate the same images."""
    digest = hashlib.sha256()
    state: Mapping[str, Any] = network.state_dict() if isinstance(network, nn.Module) else network
    strengths = adapters.attached(network) if isinstance(network, nn.Module) else {}
    for name, strength in strengths.items():
        digest.update(f"{name}:{strength}".encode())
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy())  # also without axes
    return digest.hexdigest()[:16]
