"""An adapter as a folder: what it is and which base it was trained on, in adapter.json; its tensors, in safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tessera import __version__
from tessera.checkpoint_files import read_tensors, write_tensors
from tessera.files import read_json
from tessera.model import AdapterInfo
from tessera.settings import validate

INFO, WEIGHTS = "adapter.json", "adapter.safetensors"


def write(info: AdapterInfo, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the files of an adapter into a folder. state: as `adapters.adapter_state`"""
    folder.mkdir(parents=True, exist_ok=True)
    content = info.model_copy(update={"tessera_version": __version__}).model_dump(mode="json")
    (folder / INFO).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_tensors(state, folder / WEIGHTS)


def read(folder: Path) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """The facts and the state dict of an adapter in a folder. Raises TesseraError if a file is missing or damaged."""
    return read_info(folder), read_tensors(folder / WEIGHTS)


def read_info(folder: Path) -> AdapterInfo:
    return validate(AdapterInfo, read_json(folder / INFO), str(folder / INFO))
