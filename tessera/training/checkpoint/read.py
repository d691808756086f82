"""Reading checkpoints: finding a valid one, and restoring the training state from it."""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from tessera import bundle
from tessera.errors import TesseraError
from tessera.models.network import Network
from tessera.runtime import SINGLE, Distributed
from tessera.training import parallel
from tessera.training.checkpoint.state import (
    STATE_DIR,
    OtherFormat,
    TrainerState,
    error_reason,
    file_checksum,
    ignore_single_process_warning,
    optimized_parameters,
    read_state,
    read_training_json,
    saved_state,
)
from tessera.training.ema import EMA

QUARANTINED = ".damaged"  # suffix of a damaged checkpoint that is no longer read


def verify(checkpoint: Path, world: Distributed = SINGLE) -> list[str]:
    """The damage of a checkpoint: missing files and wrong checksums. Every rank must call it and reads its share.

    Raises TesseraError if the checkpoint was written by another version of Tessera.
    """
    problems: list[str] = []
    try:
        checksums = sorted(read_training_json(checkpoint)["files"].items())
    except OtherFormat:
        raise
    except TesseraError as error:
        checksums, problems = [], [str(error)]
    for name, checksum in checksums[world.rank :: world.world_size]:
        try:
            if file_checksum(checkpoint / name) != checksum:
                problems.append(f"{name} has a wrong checksum")
        except OSError as error:
            problems.append(f"{name}: {error.strerror or error}")
    return sorted({problem for part in world.gather(problems) for problem in part})


def latest_valid(run_dir: Path, world: Distributed = SINGLE) -> tuple[Path | None, dict[Path, list[str]]]:
    """The newest valid checkpoint, and the damage of newer ones. Every rank must call it.

    Raises TesseraError if there are checkpoints but none is valid.
    """
    damaged: dict[Path, list[str]] = {}
    for checkpoint in world.broadcast(bundle.checkpoints(run_dir)):
        if not (problems := verify(checkpoint, world)):
            return checkpoint, damaged
        damaged[checkpoint] = problems
    if damaged:
        newest, problems = next(iter(damaged.items()))
        raise TesseraError(
            f"every checkpoint in {run_dir / 'checkpoints'} is damaged ({newest.name}: {'; '.join(problems[:3])}): "
            "start again with another run_dir="
        )
    return None, damaged


def quarantine(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that nothing reads it. Returns the new path."""
    target = checkpoint.with_name(checkpoint.name + QUARANTINED)
    shutil.rmtree(target, ignore_errors=True)
    return checkpoint.rename(target)


def restore(checkpoint: Path, network: Network, ema: EMA, optimizer: torch.optim.Optimizer) -> TrainerState:
    """Load weights, averages and optimizer state in place. Returns the position of the run. Raises TesseraError.

    State that was never saved begins here (see `missing_state`): a new average starts from the current weights, and a
    new kind of optimizer starts without state for parameters that the old one trained differently.
    """
    ignore_single_process_warning()
    folder = checkpoint / STATE_DIR
    reader = HuggingFaceStorageReader(str(folder))
    try:
        shapes = {
            name: tuple(metadata.size)  # pyright: ignore[reportAttributeAccessIssue]
            for name, metadata in reader.read_metadata().state_dict_metadata.items()
        }
    except (OSError, SafetensorError) as error:
        raise TesseraError(f"{folder} is damaged: {error}") from None
    weights, saved_keys = {}, dict[str, set[str]]()
    for path, shape in shapes.items():
        kind, _, name = path.partition("/")
        if kind == "weights":
            weights[name] = torch.empty(shape, device="meta")
        elif kind == "optimizer":
            key, _, name = name.partition("/")
            saved_keys.setdefault(name, set()).add(key)
    saved = saved_state(network)
    bundle.check_state_dict(saved, weights, str(folder))
    state = {f"weights/{name}": tensor.detach() for name, tensor in saved.items()}
    optimizer_state: dict[Tensor, dict[str, Tensor]] = {}
    for name, parameter, optimized, group in optimized_parameters(network, optimizer):
        keys, saved = group["state_keys"], saved_keys.get(name, set())
        optimizer.state.pop(optimized, None)
        if not saved_keys or (saved and not saved & set(keys)):
            continue  # saved before the first step, or by another kind of optimizer
        if not saved >= set(keys):
            raise TesseraError(f"{folder} has no optimizer state of {name}")
        tensors = {key: torch.empty_like(optimized) for key in keys if key != "step"}
        if "step" in keys:  # on the CPU, unless the optimizer is fused
            tensors["step"] = torch.zeros((), device=optimized.device if group["fused"] else "cpu")
        for key, value in tensors.items():
            state[f"optimizer/{key}/{name}"] = parallel.as_dtensor(value, parameter)
        optimizer_state[optimized] = tensors
    try:
        load(state, storage_reader=reader, no_dist=not distributed.is_initialized())
    except (CheckpointException, SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise TesseraError(f"{folder} cannot be read: {error_reason(error)}") from None
    optimizer.state.update(optimizer_state)
    for averaged, path in _ema_files(checkpoint, ema).values():
        if path is not None:
            load_weights(averaged, path)
            continue
        with torch.no_grad():
            for average, weight in zip(averaged.parameters(), network.parameters()):
                parallel.local_tensor(average).copy_(parallel.local_tensor(weight))
    return read_state(checkpoint)


def missing_state(checkpoint: Path, network: Network, ema: EMA, optimizer: torch.optim.Optimizer) -> list[str]:
    """The parts of a restored run that the checkpoint does not have, in words."""
    optimized = [parameter for _, _, parameter, _ in optimized_parameters(network, optimizer)]
    missing = [parameter for parameter in optimized if parameter not in optimizer.state]
    parts = []
    if missing and read_state(checkpoint).step > 0:
        parts = [f"the optimizer state of {len(missing)} of {len(optimized)} tensors"]
    name = "length" if ema.config.kind == "power" else "decay"
    files = _ema_files(checkpoint, ema)
    return parts + [f"the EMA of {name} {average}" for average, (_, path) in files.items() if not path]


def _ema_files(checkpoint: Path, ema: EMA) -> dict[float, tuple[Network, Path | None]]:
    """Each average with the file that holds it, or None if the checkpoint never had it.

    If the decay of the first average is new, it starts from the first average of the checkpoint. Power-function
    averages that are new all start from the weights: as if these had not changed until now, which is so for all alike.
    """
    config, kind = bundle.load_config(checkpoint), ema.config.kind
    paths = bundle.ema_weights(checkpoint, config, kind)
    saved = (config.recipe or {}).get("training", {}).get("ema", {})
    others = saved.get("extra_decays", ()) if kind == "exponential" else saved.get("lengths", ())[1:]
    for average in others:
        # Where the file is missing, reading it is an error that names it.
        paths.setdefault(average, bundle.ema_path(checkpoint, kind, average))
    if kind == "exponential":
        paths.setdefault(ema.config.averages[0], bundle.trained_weights(checkpoint, config))
    return {average: (network, paths.get(average)) for average, network in ema.networks.items()}


@torch.no_grad()
def load_weights(network: Network, path: Path) -> None:
    """Load whole trained weights from a safetensors file; each rank takes its shards. Raises TesseraError."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
            tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            targets = bundle.trained_state(network)
            bundle.check_state_dict(targets, tensors, str(path))
            for name, target in targets.items():
                whole = file.get_tensor(name).to(target.device)
                parallel.local_tensor(target).copy_(parallel.local_part(whole, target))
    except FileNotFoundError:
        raise TesseraError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise TesseraError(f"{path} is damaged or not a safetensors file: {error}") from None
