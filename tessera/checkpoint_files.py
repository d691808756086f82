"""Files of weights: safetensors, and pickles that cannot run a program as they are read."""

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tessera.errors import TesseraError


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names begin with a prefix, which is removed. Raises TesseraError."""
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (no mapping)
            return {name[len(prefix) :]: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise TesseraError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise TesseraError(f"{path} is damaged or not a safetensors file: {error}") from None


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError if the disk is full."""
    try:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        path.touch()
        mode = path.stat().st_mode  # safetensors creates files that only their owner may read
        save_file(contiguous, path, metadata={"format": "pt"})  # some readers require the metadata
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(None, str(error)) from None


def read_pickle(path: Path, allowed: Sequence[type] = ()) -> Any:
    """What torch.load returns, on the CPU, if it holds only tensors, plain containers and the allowed classes.

    Raises TesseraError for anything else: a pickle could otherwise run any program as it is read.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a pickle protocol other than torch's own
            # Memory-mapped: a training checkpoint holds four times the weights that are read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise TesseraError(f"{path} is missing") from None
    except Exception as error:  # torch.load raises many types for a damaged file: KeyError, EOFError, RuntimeError, ...
        unsafe = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if unsafe is not None:
            raise TesseraError(
                f"{path} is refused: it holds {unsafe[1]}, which could run a program as it is loaded; "
                "expected only tensors (save its state dict with torch.save)"
            ) from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise TesseraError(f"{path} is damaged or not a PyTorch file: {reason}") from None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file or a pickle of tensors. Raises TesseraError."""
    tensors = read_tensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise TesseraError(f"{path} holds {type(tensors).__name__}; expected a state dict: names and tensors")
    return tensors
