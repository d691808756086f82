"""The ControlNet files of PixArt-delta (Chen et al. 2024) <-> a control of the kind `copy`.

The official .pth holds the base, too: `base_model.*` and `controlnet.{i}.copied_block.*`, `controlnet.0.before_proj.*`,
`controlnet.{i}.after_proj.*`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tessera import adapters
from tessera.adapters.control import CopyControl
from tessera.checkpoint_files import is_weights_file, read_stored, write_tensors
from tessera.errors import TesseraError
from tessera.files import atomic_file
from tessera.interop.pixart import from_official, to_official
from tessera.interop.weights import find_weights
from tessera.model import Model
from tessera.models.pixart import PixArt

REQUIRED = ("controlnet.0.before_proj.weight", "controlnet.0.after_proj.weight")
NAMES = (  # official, ours
    (re.compile(r"controlnet\.(\d+)\.copied_block\.(.+)"), "copy.blocks.{}.{}"),
    (re.compile(r"controlnet\.0\.(before_proj)\.(.+)"), "copy.{}.{}"),
    (re.compile(r"controlnet\.(\d+)\.after_proj\.(.+)"), "copy.after_proj.{}.{}"),
)


def read(path: Path) -> dict[str, Tensor] | None:
    """The state dict of the control in a file, without the base; None if it is another file. Raises TesseraError."""
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
    """Write a control of a PixArt as the official code reads it, with its base. Raises TesseraError."""
    network = model.network
    control = network.controls.get(name)
    if not isinstance(network, PixArt) or not isinstance(control, CopyControl):
        raise TesseraError(f"PixArt-delta files hold controls of the kind copy for a PixArt, which '{name}' is not")
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


def _our_name(name: str) -> str | None:
    for pattern, ours in NAMES:
        if match := pattern.fullmatch(name):
            first, last = match.groups()
            if ours.startswith("copy.blocks"):
                last = from_official(f"blocks.{first}.{last}").removeprefix(f"blocks.{first}.")
            return ours.format(first, last)
    return None


def summary(state: Mapping[str, Tensor]) -> str:
    count = sum(name.startswith("copy.after_proj.") and name.endswith(".weight") for name in state)
    return f"control by copies of {count} blocks, from a PixArt-delta file"
