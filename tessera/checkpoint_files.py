"""Files of weights: safetensors, and pickles that cannot run a program as they are read."""

import argparse
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tessera.errors import TesseraError
from tessera.files import read_json

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pt.tar", ".pth.tar")
STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")  # of weights in folders of accelerate and Hugging Face
# What training programs save beside tensors, by the names in pickles of several versions. None can run a program.
PLAIN_TYPES = [
    argparse.Namespace,
    np.dtype,
    *(getattr(np.dtypes, f"{name}DType") for name in ("Float32", "Float64", "Int64", "Bool")),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((pathlib.PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((pathlib.PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
]


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


def read_header(path: Path) -> dict[str, str]:
    """The text that a safetensors file has beside its tensors. Raises TesseraError."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise TesseraError(f"{path} is damaged or not a safetensors file: {error}") from None


def write_tensors(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. header: text beside the tensors. Raises OSError if the disk is full."""
    try:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        path.touch()
        mode = path.stat().st_mode  # safetensors creates files that only their owner may read
        save_file(contiguous, path, metadata={"format": "pt", **(header or {})})  # some readers require the metadata
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(None, str(error)) from None


def read_pickle(path: Path, allowed: Sequence[Any] = ()) -> Any:
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


def is_weights_file(path: Path) -> bool:
    """Whether a path is named like a file of weights, in any case."""
    return path.name.lower().endswith(SUFFIXES)


def read_stored(path: Path) -> Any:
    """What a file of weights holds: tensors in dictionaries, and the plain types that training programs add.

    Raises TesseraError.
    """
    return read_tensors(path) if path.suffix.lower() == ".safetensors" else read_pickle(path, PLAIN_TYPES)


class WeightFiles(NamedTuple):
    """The files of one set of weights in a folder: one, or shards."""

    files: list[Path]
    variant: str | None  # such as fp16

    def read(self) -> Any:
        """What the file holds, or the tensors of all shards. Raises TesseraError."""
        if len(self.files) == 1:
            return read_stored(self.files[0])
        tensors: dict[str, Any] = {}
        for path in self.files:
            shard = read_stored(path)
            if not isinstance(shard, dict):
                raise TesseraError(f"{path} holds {type(shard).__name__}; expected a shard: names and tensors")
            tensors |= shard
        return tensors


def find_weight_files(folder: Path, stems: Sequence[str] = STEMS) -> WeightFiles | None:
    """The weights of a folder, such as model.safetensors: safetensors are preferred to pickles, files without a variant
    to those with one (model.fp16.safetensors), one file to shards. None if there are none.

    DeepSpeed's are in the folder that `latest` names. Raises TesseraError for several variants, or a damaged index.
    """
    matches: dict[str, list[tuple[bool, bool, Path]]] = {}
    pattern = re.compile(
        rf"(?:{'|'.join(map(re.escape, stems))})(?:\.([\w-]+?))?\.(safetensors|bin)(\.index(?:\.([\w-]+))?\.json)?"
    )
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = pattern.fullmatch(path.name)
        if match is not None and path.is_file() and not re.search(r"-\d+-of-\d+\.", path.name):
            before, suffix, index, after = match.groups()
            matches.setdefault(before or after or "", []).append((suffix == "bin", index is not None, path))
    if not matches:
        return _deepspeed_files(folder)
    if "" not in matches and len(matches) > 1:
        raise TesseraError(
            f"{folder} holds weights of the variants {', '.join(matches)}: keep the files of one of them"
        )
    variant = "" if "" in matches else next(iter(matches))
    _, is_index, path = min(matches[variant])
    return WeightFiles(_shards(path) if is_index else [path], variant or None)


def _shards(index: Path) -> list[Path]:
    """The files that an index lists."""
    shards = read_json(index).get("weight_map")
    files = sorted(set(shards.values()), key=str) if isinstance(shards, dict) else []
    if not files or not all(isinstance(file, str) and file == Path(file).name for file in files):
        raise TesseraError(f"{index} lists no files: expected a weight_map from tensors to files beside it")
    return [index.parent / file for file in files]


def _deepspeed_files(folder: Path) -> WeightFiles | None:
    """The weights of a folder of DeepSpeed, unless they are split between ranks."""
    latest = folder / "latest"
    name = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    root = folder / name if name and name == Path(name).name else folder
    folders = (root, root / "checkpoint", root / "pytorch_model")  # the last two as Lightning and accelerate name them
    files = [path for each in folders for path in sorted(each.glob("*model_states.pt"))]
    if not files:
        return None
    if len(files) > 1:
        raise TesseraError(
            f"{root} holds weights that are split between {len(files)} files (DeepSpeed): join them with "
            "zero_to_fp32.py, which DeepSpeed writes beside them"
        )
    return WeightFiles(files, None)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file or a pickle of tensors. Raises TesseraError."""
    tensors = read_stored(path)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise TesseraError(f"{path} holds {type(tensors).__name__}; expected a state dict: names and tensors")
    return tensors
