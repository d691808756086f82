"""An adapter as one safetensors file: its tensors, and in its header what it is and which base it was trained on."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tessera import __version__
from tessera.checkpoint_files import read_header, read_tensors, write_tensors
from tessera.errors import TesseraError
from tessera.model import AdapterInfo
from tessera.settings import validate

WEIGHTS, HEADER = "adapter.safetensors", "tessera_adapter"


def write(info: AdapterInfo, state: Mapping[str, Tensor], file: Path) -> None:
    """Write an adapter to a file. state: as `adapters.adapter_state`"""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = info.model_copy(update={"tessera_version": __version__}).model_dump_json()
    write_tensors(state, file, {HEADER: content})


def find(path: Path) -> Path | None:
    """The file of an adapter at a path: itself, or one in the folder; None if it is not one that `write` wrote.

    Raises TesseraError if the file is damaged.
    """
    file = path if path.suffix == ".safetensors" and path.is_file() else path / WEIGHTS
    return file if file.is_file() and HEADER in read_header(file) else None


def read(path: Path) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """The facts and the state dict of an adapter. Raises TesseraError if its file is missing or damaged."""
    return read_info(path), read_tensors(find(path) or path)


def read_info(path: Path) -> AdapterInfo:
    file = find(path)
    if file is None:
        raise TesseraError(f"{path} is not an adapter that Tessera wrote: expected its file {WEIGHTS}")
    try:
        content = json.loads(read_header(file)[HEADER])
    except ValueError as error:
        raise TesseraError(f"{file} is damaged: its header {HEADER} is not JSON: {error}") from None
    return validate(AdapterInfo, content, str(file))
