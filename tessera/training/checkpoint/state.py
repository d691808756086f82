"""The training state in a checkpoint: the position of the run (training.json), and weights and optimizer by name."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from tessera import __version__, adapters, bundle
from tessera.acceleration.compilation import CompileMode
from tessera.errors import TesseraError
from tessera.models.network import Network
from tessera.training import parallel

STATE_DIR, TRAINER_STATE = "state", "training.json"
FORMAT = 2  # of training.json; 0.6.0 and earlier wrote no number


class OtherFormat(TesseraError):
    """A checkpoint of another version of Tessera."""


@dataclass(frozen=True)
class TrainerState:
    """The position of a run: steps done, and samples read (steps x batch size, unless the batch size changed)."""

    step: int
    position: int
    spike_detector: dict[str, Any] = field(default_factory=dict)  # `SpikeDetector.state`
    compile_mode: CompileMode = "off"  # of the network; the modes differ in the last bit of the result
    data: dict[str, Any] = field(default_factory=dict)  # `data.index.fingerprint`; empty for data without an index


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:09d}"


def read_state(checkpoint: Path) -> TrainerState:
    """The position saved in a checkpoint. Raises TesseraError if it is damaged or not a training checkpoint."""
    data = read_training_json(checkpoint)
    return TrainerState(
        data["step"], data["position"], data["spike_detector"], data["compile_mode"], data.get("data", {})
    )


def read_training_json(checkpoint: Path) -> dict[str, Any]:
    """The content of training.json. Raises TesseraError, of which OtherFormat is not damage."""
    try:
        data = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
        data = {"format": None, **data, "step": int(data["step"]), "position": int(data["position"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise TesseraError(
            f"{checkpoint} is not a training checkpoint: {TRAINER_STATE} is missing or damaged"
        ) from None
    if data["format"] != FORMAT:
        version = f"Tessera {data.get('tessera_version', '0.6.0 or earlier')}"
        raise OtherFormat(
            f"{checkpoint} was written by {version}, and Tessera {__version__} cannot resume it: use that version, or "
            "start again with another run_dir="
        )
    return data


def training_state_dict(network: Network, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and optimizer state by name; tensors of a sharded network are DTensors."""
    state = {f"weights/{name}": tensor.detach() for name, tensor in saved_state(network).items()}
    for name, parameter, optimized, _ in optimized_parameters(network, optimizer):
        for key, value in optimizer.state.get(optimized, {}).items():
            state[f"optimizer/{key}/{name}"] = parallel.as_dtensor(value, parameter)
    return state


def saved_state(network: Network) -> dict[str, Tensor]:
    """The weights that a checkpoint holds, by name: those of an adapter that is trained, or all."""
    state, part = network.state_dict(), f".{adapters.ATTRIBUTE}.{bundle.TRAINED}."
    return {name: tensor for name, tensor in state.items() if part in f".{name}"} or state


def optimized_parameters(
    network: Network, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, nn.Parameter, nn.Parameter, dict[str, Any]]]:
    """(name, parameter of the network, its local shard in the optimizer, parameter group) of each trained parameter."""
    for group in optimizer.param_groups:
        for name, optimized in zip(group["param_names"], group["params"]):
            yield name, network.get_parameter(name), optimized, group


def file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def error_reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # holds the error of each rank
        error = next(iter(error.failures.values()))[0]
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def ignore_single_process_warning() -> None:
    """torch.distributed.checkpoint warns of a single process without a process group, which is intended here."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
