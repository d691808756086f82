"""A run on disk, whole at every instant: each checkpoint is a bundle (the EMA, ready to draw from) with the state of
training beside it. Written behind the training's back, by every process its own part.

    RUN/recipe.yaml
    RUN/log.jsonl
    RUN/codec/                          the autoencoder, if it came from a local folder
    RUN/checkpoints/step-000001000/     config.json, model.safetensors, README.md: the bundle
                                        ema/: averages of other lengths
                                        state/: weights and optimizer, a file a process (torch.distributed.checkpoint)
                                        training.json: the place, and a checksum of every file

State is kept as safetensors, not as the pickles that are torch.distributed.checkpoint's default: what reads a
checkpoint runs no code from it. Any number of processes reads what any other number wrote.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from tessera import bundle, files
from tessera.acceleration.compilation import CompileMode
from tessera.errors import TesseraError, listed
from tessera.models.network import Network
from tessera.runtime import Distributed
from tessera.training import parallel
from tessera.training.ema import EMA

STATE, PLACE = "state", "training.json"
DAMAGED = ".damaged"  # the ending of a checkpoint that is kept, but no longer read


@dataclass(frozen=True)
class TrainerState:
    """Where a run stands: steps done, and samples taken from the data: step times batch, unless the batch changed."""

    step: int
    position: int
    spike_detector: dict[str, Any] = field(default_factory=dict)  # what `stability.Watch` remembers
    compile_mode: CompileMode = "off"  # how the network was compiled: other ways are as right, but not to the last bit


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:09d}"


def read_state(checkpoint: Path) -> TrainerState:
    """Where the run stood, as the checkpoint itself says. Raises TesseraError if it is no training checkpoint."""
    told = _told(checkpoint)
    return TrainerState(told["step"], told["position"], told.get("watch", {}), told.get("compiled", "off"))


def _told(checkpoint: Path) -> dict[str, Any]:
    try:
        told = json.loads((checkpoint / PLACE).read_text(encoding="utf-8"))
        return {**told, "step": int(told["step"]), "position": int(told["position"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise TesseraError(f"{checkpoint} is no training checkpoint: {PLACE} is missing or damaged") from None


# Writing


class CheckpointWriter:
    """Writes checkpoints while training goes on, one at a time.

    `save` copies what is to be written and returns; a thread of each process writes its part, the first one's makes
    it whole. Processes speak of it in a group of their own: messages of training and of writing must not mix.
    """

    def __init__(self, run: Path, ranks: Distributed = Distributed()) -> None:  # noqa: B008 (frozen)
        self.run, self.ranks = run, ranks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tessera-checkpoint")
        self._pending: Future[None] | None = None
        self._group: Any = None
        if ranks.world_size > 1:
            self._group = distributed.new_group(backend="gloo", timeout=timedelta(days=1))
        _expect_one_process()

    def save(
        self,
        place: TrainerState,
        model: bundle.Model,
        network: Network,
        average: EMA,
        optimizer: torch.optim.Optimizer,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Begin to write a checkpoint; every process must call it. `after` is called once it stands, by the first one.

        model: what describes the average that draws. Raises TesseraError if the one before could not be written.
        """
        self.wait()
        target = checkpoint_path(self.run, place.step)
        partial = files.begin(target) if self.ranks.is_main else target.with_name(target.name + files.PARTIAL)
        self.ranks.barrier()
        averages = {decay: parallel.full_network(mean) for decay, mean in average.networks.items()}
        if self.ranks.is_main:
            averages = {decay: _on_cpu(mean) for decay, mean in averages.items()}
        try:
            writing = async_save(
                state_of(network, optimizer),
                storage_writer=HuggingFaceStorageWriter(str(partial / STATE), save_distributed=True),
                process_group=self._group,
                no_dist=self.ranks.world_size == 1,
            )
        except OSError as error:
            raise self._failed(target, error) from error
        assert isinstance(writing, Future)

        def finish() -> None:
            self._finish(writing, place, model, averages, average.config.decay, partial, target)
            if after is not None and self.ranks.is_main:
                after()

        self._pending = self._thread.submit(finish)

    def _finish(
        self,
        writing: Future,
        place: TrainerState,
        model: bundle.Model,
        averages: dict[float, Network],
        drawing: float,
        partial: Path,
        target: Path,
    ) -> None:
        """Wait for all parts, add the bundle and the checksums, and give the folder its name."""
        fault: BaseException | None = None
        sums: dict[str, str] = {}
        try:
            writing.result()
            mine = sorted((partial / STATE).glob(f"shard-{self.ranks.rank + 1:05d}-*"))
            if self.ranks.is_main:
                described = bundle.Model(model.config, averages.pop(drawing))
                bundle.write(described, partial, codec_at=f"../../{bundle.CODEC}")
                mine += [partial / bundle.CONFIG, partial / bundle.WEIGHTS]
                for decay, mean in averages.items():
                    (partial / bundle.AVERAGES).mkdir(exist_ok=True)
                    mine.append(partial / bundle.AVERAGES / f"{decay}.safetensors")
                    bundle.write_tensors(mean.state_dict(), mine[-1])
            sums = {path.relative_to(partial).as_posix(): _checksum(path) for path in mine}
        except (Exception, CheckpointException) as error:  # which is no Exception
            fault = error
        faults, told = zip(*self._gather((None if fault is None else _reason(fault), sums)))
        worst = next((reason for reason in faults if reason is not None), None)
        if worst is None and self.ranks.is_main:
            try:
                checksums = {name: value for part in told for name, value in part.items()}
                text = json.dumps({**asdict(place), "processes": self.ranks.world_size, "files": checksums})
                (partial / PLACE).write_text(text, encoding="utf-8")
                files.commit(partial, target)
            except OSError as error:
                worst = _reason(error)
        worst = self._gather(worst)[0]
        if worst is not None:
            if self.ranks.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise self._failed(target, worst)

    def _gather(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        gathered: list[Any] = [None] * self.ranks.world_size
        distributed.all_gather_object(gathered, value, group=self._group)
        return gathered

    def _failed(self, target: Path, reason: object) -> TesseraError:
        present = bundle.checkpoints(self.run)
        return TesseraError(
            f"cannot write {target}: {reason}; "
            + (f"the last checkpoint is {present[0]}; " if present else "there is no checkpoint yet; ")
            + "mend that and run the same command again to go on"
        )

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._pending is not None and not self._pending.done()

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written; `wait` says why."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Until what was begun is written. Raises TesseraError if it could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let what was begun come to its end, whatever that is."""
        self._thread.shutdown(wait=True)


def _expect_one_process() -> None:
    """What torch.distributed.checkpoint warns of, one process without a group, is what is asked for."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _on_cpu(network: Network) -> Network:
    """A copy that training no longer touches."""
    with torch.device("meta"):
        copied = network.config.build()
    tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()}
    copied.load_state_dict(tensors, assign=True)
    return copied


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # holds what befell each process
        error = next(iter(error.failures.values()))[0]
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_of(network: Network, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of training by name, each tensor whole or as this process's part of it."""
    state = {f"weights/{name}": tensor.detach() for name, tensor in network.state_dict().items()}
    for name, parameter, held, _ in _trained(network, optimizer):
        for key, value in optimizer.state.get(held, {}).items():
            state[f"optimizer/{key}/{name}"] = parallel.divided(value, parameter)
    return state


def _trained(network: Network, optimizer: torch.optim.Optimizer):
    """(name, parameter of the network, what the optimizer holds of it, its group) of all that is trained."""
    for group in optimizer.param_groups:
        for name, held in zip(group["param_names"], group["params"]):
            yield name, network.get_parameter(name), held, group


# Reading


def verify(checkpoint: Path, ranks: Distributed = Distributed()) -> list[str]:  # noqa: B008 (frozen)
    """What is damaged in a checkpoint: files whose checksum is another, or that are gone. Every process must ask, and
    reads its share.
    """
    try:
        expected = sorted(_told(checkpoint).get("files", {}).items())
        found = []
    except TesseraError as error:
        expected, found = [], [str(error)]
    for name, checksum in expected[ranks.rank :: ranks.world_size]:
        try:
            if _checksum(checkpoint / name) != checksum:
                found.append(f"{name} is not what was written")
        except OSError as error:
            found.append(f"{name}: {error.strerror or error}")
    return sorted({fault for part in ranks.gather(found) for fault in part})


def latest_valid(
    run: Path,
    ranks: Distributed = Distributed(),  # noqa: B008 (frozen)
) -> tuple[Path | None, dict[Path, list[str]]]:
    """The newest checkpoint that is whole, and what is damaged in those that are newer. Every process must ask.

    Raises TesseraError if there are checkpoints and none is whole.
    """
    damaged: dict[Path, list[str]] = {}
    for checkpoint in ranks.broadcast(bundle.checkpoints(run)):
        if not (found := verify(checkpoint, ranks)):
            return checkpoint, damaged
        damaged[checkpoint] = found
    if damaged:
        first, found = next(iter(damaged.items()))
        raise TesseraError(
            f"every checkpoint in {run / 'checkpoints'} is damaged ({first.name}: {'; '.join(found[:3])}): start "
            "afresh with another output="
        )
    return None, damaged


def quarantine(checkpoint: Path) -> Path:
    """Give a damaged checkpoint a name by which nobody reads it; returns that."""
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def restore(checkpoint: Path, network: Network, average: EMA, optimizer: torch.optim.Optimizer) -> TrainerState:
    """Put weights, averages and optimizer back as they were; returns the place. TesseraError if something is missing.

    What the checkpoint never had begins here: an average it did not keep starts from the weights as they are, and
    another kind of optimizer without a memory of the parameters that it did not train (`begun_anew` names both).
    """
    _expect_one_process()
    # Before version 0.4 one file held the state.
    folder = checkpoint / STATE if (checkpoint / STATE).is_dir() else checkpoint
    reader = HuggingFaceStorageReader(str(folder))
    try:
        held = {
            name: tuple(told.size)  # pyright: ignore[reportAttributeAccessIssue]
            for name, told in reader.read_metadata().state_dict_metadata.items()
        }
    except (OSError, SafetensorError) as error:
        raise TesseraError(f"{folder} is damaged: {error}") from None
    _fits(network, {name.removeprefix("weights/"): shape for name, shape in held.items() if "/" in name}, str(folder))
    state = {f"weights/{name}": tensor.detach() for name, tensor in network.state_dict().items()}
    kept: dict[str, set[str]] = {}
    for place in held:
        if place.startswith("optimizer/"):
            _, key, name = place.split("/", 2)
            kept.setdefault(name, set()).add(key)
    fresh: dict[Tensor, dict[str, Tensor]] = {}
    for name, parameter, mine, group in _trained(network, optimizer):
        keys, remembered = group["keys"], kept.get(name, set())
        optimizer.state.pop(mine, None)
        if not kept or (remembered and not remembered & set(keys)):
            continue  # saved before the first step, or of another kind of optimizer
        if not remembered >= set(keys):
            raise TesseraError(f"{folder} lacks the optimizer's state of {name}")
        fresh[mine] = {key: torch.empty_like(mine) for key in keys if key != "step"}
        if "step" in keys:  # counts on the CPU, unless the optimizer is fused
            fresh[mine]["step"] = torch.zeros((), device=mine.device if group["fused"] else "cpu")
        for key, value in fresh[mine].items():
            state[f"optimizer/{key}/{name}"] = parallel.divided(value, parameter)
    try:
        load(state, storage_reader=reader, no_dist=not distributed.is_initialized())
    except (CheckpointException, SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise TesseraError(f"{folder} cannot be read: {_reason(error)}") from None
    optimizer.state.update(fresh)
    for mean, path in _averages_of(checkpoint, average).values():
        if path is None:
            with torch.no_grad():
                for own, live in zip(mean.parameters(), network.parameters()):
                    parallel.local(own).copy_(parallel.local(live))
        else:
            load_weights(mean, path)
    return read_state(checkpoint)


def missing_state(checkpoint: Path, network: Network, average: EMA, optimizer: torch.optim.Optimizer) -> list[str]:
    """What a restored run has that its checkpoint could not tell, for people."""
    trained = [held for _, _, held, _ in _trained(network, optimizer)]
    anew = [held for held in trained if held not in optimizer.state]
    told = []
    if anew and read_state(checkpoint).step > 0:
        told = [f"the optimizer's state of {len(anew)} of {len(trained)} tensors"]
    averages = _averages_of(checkpoint, average)
    return told + [f"the average of decay {decay}" for decay, (_, path) in averages.items() if path is None]


def _averages_of(checkpoint: Path, average: EMA) -> dict[float, tuple[Network, Path | None]]:
    """Each average with the file that holds it, or None if the checkpoint never kept it.

    The first goes on from the one that drew before, if its own decay is new.
    """
    config = bundle.load_config(checkpoint)
    kept = bundle.ema_weights(checkpoint, config)
    for decay in (config.recipe or {}).get("training", {}).get("ema", {}).get("extra_decays", ()):
        kept.setdefault(decay, checkpoint / bundle.AVERAGES / f"{decay}.safetensors")  # missing: an error that names it
    first = {average.config.decay: kept.get(average.config.decay, checkpoint / bundle.WEIGHTS)}
    return {decay: (mean, (kept | first).get(decay)) for decay, mean in average.networks.items()}


@torch.no_grad()
def load_weights(network: Network, path: Path) -> None:
    """Weights from a safetensors file that holds them whole, of which each process takes its parts. TesseraError."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
            _fits(network, shapes, str(path))
            for name, target in network.state_dict().items():
                parallel.local(target).copy_(parallel.part_of(file.get_tensor(name).to(target.device), target))
    except FileNotFoundError:
        raise TesseraError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise TesseraError(f"{path} is damaged or no safetensors file: {error}") from None


def _fits(network: nn.Module, shapes: dict[str, tuple[int, ...]], source: str) -> None:
    """Raise TesseraError that names the keys that a network needs and a file lacks, or holds in another shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    wrong = [f"missing {name} {shape}" for name, shape in expected.items() if name not in shapes]
    wrong += [
        f"{name} is {shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    if wrong:
        raise TesseraError(f"{source} holds another architecture than its configuration says:{listed(wrong)}")


def prune(run: Path, keep: int, every: int | None = None, best: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints, those of every so many steps, and that of the best step."""
    for old in bundle.checkpoints(run)[keep:]:
        step = int(old.name.removeprefix("step-"))
        if step != best and (every is None or step == 0 or step % every):
            shutil.rmtree(old, ignore_errors=True)


def delete_after(run: Path, step: int) -> None:
    """Remove the checkpoints past a step to which the run has gone back."""
    for later in bundle.checkpoints(run):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later, ignore_errors=True)
