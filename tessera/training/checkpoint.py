"""A run on disk, whole at every instant: each checkpoint is a bundle (the EMA, ready to draw from) with the state of
training beside it.

    RUN/recipe.yaml
    RUN/log.jsonl
    RUN/codec/                          the autoencoder, if it came from a local folder
    RUN/checkpoints/step-000001000/     config.json, model.safetensors, README.md: the bundle
                                        training.safetensors: weights, optimizer; training.json: the place
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tessera import bundle
from tessera.errors import TesseraError
from tessera.files import whole_folder
from tessera.models.dit import DiT

STATE, PLACE = "training.safetensors", "training.json"


@dataclass(frozen=True)
class Place:
    """Where a run stands: steps done, and samples taken from the data: step times batch, unless the batch changed."""

    step: int
    position: int


def path_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:09d}"


def place_of(checkpoint: Path) -> Place:
    """Where the run stood, as the checkpoint itself says. Raises TesseraError if it is no training checkpoint."""
    try:
        told = json.loads((checkpoint / PLACE).read_text(encoding="utf-8"))
        return Place(int(told["step"]), int(told["position"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise TesseraError(f"{checkpoint} is no training checkpoint: {PLACE} is missing or damaged") from None


def save(run: Path, place: Place, model: bundle.Model, network: DiT, optimizer: torch.optim.Optimizer) -> Path:
    """Write a checkpoint, whole or not at all; model holds the EMA. A TesseraError leaves the others as they were."""
    target = path_of(run, place.step)
    with whole_folder(target) as partial:
        bundle.write(model, partial, codec_at=f"../../{bundle.CODEC}")
        tensors = {f"weights/{name}": tensor for name, tensor in network.state_dict().items()}
        for name, parameter in network.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = value
        bundle.write_tensors(tensors, partial / STATE)
        (partial / PLACE).write_text(json.dumps(asdict(place)), encoding="utf-8")
    return target


def restore(checkpoint: Path, network: DiT, average: DiT, optimizer: torch.optim.Optimizer) -> Place:
    """Put weights, EMA and optimizer back as they were; returns the place. TesseraError if one is missing."""
    weights = bundle.read_tensors(checkpoint / STATE, "weights/")
    mean = bundle.read_tensors(checkpoint / bundle.WEIGHTS)
    bundle.fit(network, weights, str(checkpoint / STATE))
    bundle.fit(average, mean, str(checkpoint / bundle.WEIGHTS))
    network.load_state_dict(weights)
    average.load_state_dict(mean)
    keys = ("step", "exp_avg", "exp_avg_sq")
    kept = {key: bundle.read_tensors(checkpoint / STATE, f"optimizer/{key}/") for key in keys}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            try:
                state = {key: kept[key][name] for key in keys}
            except KeyError:
                raise TesseraError(f"{checkpoint / STATE} lacks the optimizer's state of {name}") from None
            moments = {key: value.to(parameter.device) for key, value in state.items()}
            if not optimizer.defaults["fused"]:
                moments["step"] = state["step"]  # counts on the CPU
            optimizer.state[parameter] = moments
    return place_of(checkpoint)


def prune(run: Path, keep: int, best: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and that of the best step."""
    for old in bundle.checkpoints(run)[keep:]:
        if best is None or old != path_of(run, best):
            shutil.rmtree(old, ignore_errors=True)
