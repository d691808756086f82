"""A run on disk, whole at every instant: each checkpoint is a bundle (the EMA, ready to draw from) with the state of
training beside it.

    RUN/recipe.yaml
    RUN/log.jsonl
    RUN/codec/                          the autoencoder, if it came from a local folder
    RUN/checkpoints/step-000001000/     config.json, model.safetensors, README.md: the bundle
                                        ema/: averages of other lengths
                                        training.safetensors: weights, optimizer; training.json: the place
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from tessera import bundle
from tessera.errors import TesseraError
from tessera.files import whole_folder
from tessera.models.dit import DiT
from tessera.training.ema import Average

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


def save(
    run: Path, place: Place, model: bundle.Model, network: DiT, average: Average, optimizer: torch.optim.Optimizer
) -> Path:
    """Write a checkpoint, whole or not at all; model holds the average that draws, as in `average`.

    A TesseraError leaves the others as they were.
    """
    target = path_of(run, place.step)
    with whole_folder(target) as partial:
        bundle.write(model, partial, codec_at=f"../../{bundle.CODEC}")
        for decay, mean in average.others.items():
            (partial / bundle.AVERAGES).mkdir(exist_ok=True)
            bundle.write_tensors(mean.state_dict(), partial / bundle.AVERAGES / f"{decay}.safetensors")
        tensors = {f"weights/{name}": tensor for name, tensor in network.state_dict().items()}
        for name, parameter in network.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = value
        bundle.write_tensors(tensors, partial / STATE)
        (partial / PLACE).write_text(json.dumps(asdict(place)), encoding="utf-8")
    return target


def restore(checkpoint: Path, network: DiT, average: Average, optimizer: torch.optim.Optimizer) -> Place:
    """Put weights, averages and optimizer back as they were; returns the place. TesseraError if something is missing.

    What the checkpoint never had begins here: an average it did not keep starts from the weights as they are, and
    another kind of optimizer without a memory of the parameters that it did not train (`begun_anew` names both).
    """
    _fill(network, checkpoint / STATE, "weights/")
    for mean, path in _averages_of(checkpoint, average).values():
        if path is None:
            mean.load_state_dict(network.state_dict())
        else:
            _fill(mean, path)
    held: dict[str, dict[str, Tensor]] = {}
    for place, value in bundle.read_tensors(checkpoint / STATE, "optimizer/").items():
        key, _, name = place.partition("/")
        held.setdefault(name, {})[key] = value
    names = {parameter: name for name, parameter in network.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state, keys = held.get(names[parameter], {}), group["keys"]
            if state and not state.keys() & set(keys):
                continue  # of another kind of optimizer
            if not state.keys() >= set(keys):
                raise TesseraError(f"{checkpoint / STATE} lacks the optimizer's state of {names[parameter]}")
            optimizer.state[parameter] = {key: state[key].to(parameter.device) for key in keys}
            if "step" in keys and not group["fused"]:
                optimizer.state[parameter]["step"] = state["step"]  # counts on the CPU
    return place_of(checkpoint)


def begun_anew(checkpoint: Path, network: DiT, average: Average, optimizer: torch.optim.Optimizer) -> list[str]:
    """What a restored run has that its checkpoint could not tell, for people."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    anew = [parameter for parameter in trained if parameter not in optimizer.state]
    told = [f"the optimizer's state of {len(anew)} of {len(trained)} tensors"] if anew else []
    averages = _averages_of(checkpoint, average)
    return told + [f"the average of decay {decay}" for decay, (_, path) in averages.items() if path is None]


def _averages_of(checkpoint: Path, average: Average) -> dict[float, tuple[DiT, Path | None]]:
    """Each average with the file that holds it, or None if the checkpoint never kept it.

    The first goes on from the one that drew before, if its own decay is new.
    """
    config = bundle.load_config(checkpoint)
    kept = bundle.averages(checkpoint, config)
    for decay in (config.recipe or {}).get("training", {}).get("ema", {}).get("also", ()):
        kept.setdefault(decay, checkpoint / bundle.AVERAGES / f"{decay}.safetensors")  # missing: an error that names it
    first = {average.config.decay: kept.get(average.config.decay, checkpoint / bundle.WEIGHTS)}
    return {decay: (mean, (kept | first).get(decay)) for decay, mean in average.networks.items()}


def _fill(network: DiT, path: Path, prefix: str = "") -> None:
    tensors = bundle.read_tensors(path, prefix)
    bundle.fit(network, tensors, str(path))
    network.load_state_dict(tensors)


def prune(run: Path, keep: int, best: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and that of the best step."""
    for old in bundle.checkpoints(run)[keep:]:
        if best is None or old != path_of(run, best):
            shutil.rmtree(old, ignore_errors=True)
