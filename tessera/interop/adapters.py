"""Adapters on a loaded model: which file, under which name, how strong."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tessera import adapter_files, adapters, bundle
from tessera.errors import TesseraError
from tessera.interop import lora_files, lora_keys, pixart_delta
from tessera.model import AdapterInfo, Model

ACCEPTED = (
    "expected the folder of a run that trained an adapter, of one of its checkpoints, or of an adapter, or an adapter "
    "of another program (PEFT, diffusers, kohya, LyCORIS)"
)


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter to load: a path, a name (None: that of the path) and a strength."""

    path: Path
    name: str | None = None
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "AdapterSpec":
        """From PATH, PATH:STRENGTH or NAME=PATH:STRENGTH; a text that is the path of something is that path. Raises
        TesseraError."""
        if Path(text).expanduser().exists():
            return cls(Path(text).expanduser())
        match = re.fullmatch(r"(?:([A-Za-z0-9][\w-]*)=)?(.+?)(?::(-?\d*\.?\d+(?:e-?\d+)?))?", text)
        if match is None:
            raise TesseraError(f"'{text}' is not an adapter: write PATH, PATH:STRENGTH or NAME=PATH:STRENGTH")
        name, path, strength = match.groups()
        return cls(Path(path).expanduser(), name, 1.0 if strength is None else float(strength))

    @property
    def default_name(self) -> str:
        """The name of the file or folder."""
        return re.sub(r"[^A-Za-z0-9_-]+", "-", self.path.resolve().stem).strip("-_") or "adapter"

    @property
    def label(self) -> str:
        """Name and strength, for the name of a folder of results."""
        return f"{self.name or self.default_name}-{self.strength:g}"


def find_file(path: Path) -> Path | None:
    """The file of the adapter at a path: itself, or the one that a run or checkpoint has trained; None for an adapter
    of another program, and for anything else."""
    for each in (path, path / bundle.ADAPTERS / bundle.TRAINED):
        if (file := adapter_files.find(each)) is not None:
            return file
    newest = next(iter(bundle.checkpoints(path)), None)
    return None if newest is None else find_file(newest)


def find_base(file: Path) -> Path | None:
    """The bundle with the weights below the adapter in a file, if it is that of a bundle or a checkpoint."""
    if file.parent.parent.name != bundle.ADAPTERS:
        return None
    folder = file.parents[2]
    return folder / (bundle.load_config(folder).base or ".") if (folder / bundle.CONFIG).exists() else None


def read(path: Path, model: Model) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """The facts and the state dict of an adapter for a model. Raises TesseraError."""
    if not path.exists():
        raise TesseraError(f"there is nothing at {path}: {ACCEPTED}")
    file = find_file(path)
    if file is not None:
        return adapter_files.read(file)
    if (control := pixart_delta.read(path)) is not None:
        return AdapterInfo(summary=pixart_delta.summary(control)), control
    if not lora_keys.is_adapter(path):
        raise TesseraError(f"{path} is not an adapter that Tessera can read: {ACCEPTED}")
    state = lora_files.read(path, model.network)
    return AdapterInfo(summary=lora_files.summary(state)), state


def attach_adapters(
    model: Model, specs: Sequence[str | AdapterSpec] | Mapping[str, float], any_base: bool = False
) -> None:
    """Attach adapters to the network of a model, in place.

    specs: as for `AdapterSpec.parse`, or strengths by path. any_base: also those that were trained on other weights,
    which must have the same shapes. Raises TesseraError, and then the model has none of them.
    """
    if isinstance(specs, Mapping):
        specs = [AdapterSpec(Path(path).expanduser(), None, strength) for path, strength in specs.items()]
    parsed = [AdapterSpec.parse(spec) if isinstance(spec, str) else spec for spec in specs]
    names = [spec.name or spec.default_name for spec in parsed]
    infos, layers = {}, []
    for name, spec in zip(names, parsed):
        infos[name], state = read(spec.path, model)
        layers.append(adapters.layers_from_state(model.network, state, str(spec.path)))
    for number, name in enumerate(names):
        if name in names[:number] or name in adapters.attached(model.network):
            raise TesseraError(f"there are two adapters with the name '{name}': give each its own, as in NAME=PATH:0.8")
    if not any_base:
        files = {name: find_file(spec.path) for name, spec in zip(names, parsed)}
        bases = {name: base for name, file in files.items() if file is not None and (base := find_base(file))}
        bundle.check_bases(model, infos, bases)
    for name, spec, each in zip(names, parsed, layers):
        adapters.attach(model.network, name, each)
        adapters.set_strengths(model.network, {name: spec.strength})
    model.adapters |= infos
