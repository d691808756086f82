"""The ControlNet files of PixArt-delta (Chen et al. 2024) <-> a control of the kind `copy`.

The official .pth holds the base, too: `base_model.*` and `controlnet.{i}.copied_block.*`, `controlnet.0.before_proj.*`,
`controlnet.{i}.after_proj.*`. The folder of diffusers' PixArt ControlNet (`PixArtControlNetAdapterModel`) holds the
control alone, with the names of diffusers.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tessera import adapters
from tessera.adapters.control import CopyControl
from tessera.checkpoint_files import is_weights_file, read_stored, read_tensors, write_tensors
from tessera.errors import TesseraError
from tessera.files import atomic_file, atomic_folder, read_json
from tessera.interop.diffusers import (
    CONFIG,
    WEIGHTS,
    TensorMapping,
    from_mappings,
    to_mappings,
    write_json,
)
from tessera.interop.pixart import from_official, to_official
from tessera.interop.pixart_folder import block_mappings, both
from tessera.interop.weights import find_weights
from tessera.model import Model
from tessera.models.pixart import PixArt

FOLDER_CLASS = "PixArtControlNetAdapterModel"
REQUIRED = ("controlnet.0.before_proj.weight", "controlnet.0.after_proj.weight")
NAMES = (  # official, ours
    (re.compile(r"controlnet\.(\d+)\.copied_block\.(.+)"), "copy.blocks.{}.{}"),
    (re.compile(r"controlnet\.0\.(before_proj)\.(.+)"), "copy.{}.{}"),
    (re.compile(r"controlnet\.(\d+)\.after_proj\.(.+)"), "copy.after_proj.{}.{}"),
)


def read(path: Path) -> dict[str, Tensor] | None:
    """The state dict of the control in a file or folder, without the base; None if it is something else.

    Raises TesseraError.
    """
    if (path / CONFIG).is_file():
        return _read_folder(path)
    if not (path.is_file() and is_weights_file(path)):
        return None
    tensors = find_weights(read_stored(path), REQUIRED, str(path)).tensors
    if not all(name in tensors for name in REQUIRED):
        return None
    state = {}
    for name, tensor in tensors.items():
        if name.startswith("base_model."):
            continue
        ours = _our_name(name)
        if ours is None:
            raise TesseraError(f"{path} has a weight of an unknown name: {name}")
        state[ours] = tensor
    return state


def write(path: Path, model: Model, name: str) -> None:
    """Write a control of a PixArt: a .pth or .safetensors as the official code reads it, with its base; any other name
    is a folder of diffusers, of the control alone. Raises TesseraError.
    """
    network = model.network
    control = network.controls.get(name)
    if not isinstance(network, PixArt) or not isinstance(control, CopyControl):
        raise TesseraError(f"PixArt-delta files hold controls of the kind copy for a PixArt, which '{name}' is not")
    if path.suffix.lower() not in (".pth", ".safetensors"):
        _write_folder(path, adapters.adapter_state(network, name))
        return
    tensors = {f"base_model.{to_official(key)}": tensor for key, tensor in adapters.base_state(network).items()}
    for key, tensor in adapters.adapter_state(network, name).items():
        part, _, rest = key.removeprefix("copy.").partition(".")
        number, _, inner = rest.partition(".")
        match part:
            case "blocks":
                official = to_official(f"blocks.{rest}").removeprefix(f"blocks.{number}.")
                tensors[f"controlnet.{number}.copied_block.{official}"] = tensor
            case "before_proj":
                tensors[f"controlnet.0.{part}.{rest}"] = tensor
            case _:
                tensors[f"controlnet.{number}.{part}.{inner}"] = tensor
    with atomic_file(path) as partial:
        if path.suffix.lower() == ".safetensors":
            write_tensors(tensors, partial)
        else:
            torch.save({"state_dict": tensors}, partial)


def _mappings(copies: int) -> Iterator[TensorMapping]:
    """Every tensor of a control with its names in the folder of diffusers."""
    yield from both("copy.before_proj", "controlnet_blocks.0.before_proj")
    for number in range(copies):
        yield from block_mappings(f"copy.blocks.{number}", f"controlnet_blocks.{number}.transformer_block")
        yield from both(f"copy.after_proj.{number}", f"controlnet_blocks.{number}.after_proj")


def _read_folder(path: Path) -> dict[str, Tensor] | None:
    config = read_json(path / CONFIG)
    if config.get("_class_name") != FOLDER_CLASS:
        return None
    file = path / f"{WEIGHTS}.safetensors"
    return from_mappings(list(_mappings(int(config.get("num_layers", 13)))), read_tensors(file), str(path))


def _write_folder(path: Path, state: Mapping[str, Tensor]) -> None:
    copies = _count(state)
    with atomic_folder(path) as folder:
        write_json(folder / CONFIG, FOLDER_CLASS, {"num_layers": copies})
        write_tensors(to_mappings(list(_mappings(copies)), dict(state)), folder / f"{WEIGHTS}.safetensors")


def _our_name(name: str) -> str | None:
    for pattern, ours in NAMES:
        if match := pattern.fullmatch(name):
            first, last = match.groups()
            if ours.startswith("copy.blocks"):
                last = from_official(f"blocks.{first}.{last}").removeprefix(f"blocks.{first}.")
            return ours.format(first, last)
    return None


def summary(state: Mapping[str, Tensor]) -> str:
    return f"control by copies of {_count(state)} blocks, from a PixArt-delta file"


def _count(state: Mapping[str, Tensor]) -> int:
    return sum(name.startswith("copy.after_proj.") and name.endswith(".weight") for name in state)
