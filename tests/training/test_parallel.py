"""How many processes train, and how they share the weights, changes nothing: what is learned, shown, saved, drawn."""

import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tessera import runtime
from tessera.errors import TesseraError
from tessera.monitoring import history
from tessera.monitoring.logger import read_log
from tessera.training import loop
from tessera.training.checkpoint import checkpoint
from tessera.training.run import build_run
from tessera.training.step import train_step

pytest.importorskip("sklearn")

# All at once: accumulation, parts of unequal size, clipped gradients, several averages, recomputation.
RICH = (
    "training.steps=6",
    "training.global_batch_size=30",
    "training.micro_batch_size=5",
    "training.optimizer.grad_clip_norm=0.3",
    "training.ema={decay: 0.9, also: [0.5, 0.99]}",
    "training.activation_checkpointing=blocks",
    "network.depth=2",
)
SOON = {((4, 2), "adamw", "adaln-zero"), ((2, "all"), "muon", "rope-swiglu")}  # the others are proven by `make prove`
LAYOUTS = [(2, 1), (2, "all"), (4, 1), (4, 2), (4, "all")]  # processes, and how many of them hold one copy


# What runs in the processes


def everything(network, average, optimizer) -> dict[str, np.ndarray]:
    """Weights, averages and the optimizer's memory, whole."""
    held = checkpoint.state_of(network, optimizer)
    for decay, mean in average.networks.items():
        held |= {f"average {decay}/{name}": tensor for name, tensor in mean.state_dict().items()}
    whole = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in held.items()}
    return {name: tensor.numpy(force=True).copy() for name, tensor in whole.items()}


def train(recipe, stop: int | None = None) -> dict[str, Any]:
    """Train; the last process alone is asked to stop in step `stop`. What was restored, what was saved last, and which
    picture was shown at each position that fell to this process.
    """
    told: dict[str, Any] = {"restored": {}, "saved": {}, "shown": {}}
    save, restore, step = loop.save, checkpoint.restore, loop.train_step
    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)

    def saving(run, writer, place):
        told["saved"] = everything(run.network, run.average, run.learner.optimizer)
        save(run, writer, place)

    def restoring(found, network, average, optimizer):
        place = restore(found, network, average, optimizer)
        told["restored"] = everything(network, average, optimizer)
        return place

    def stepping(learner, batch, *rest):
        positions = batch.position.tolist()
        assert not told["shown"].keys() & set(positions)
        told["shown"] |= dict(zip(positions, (picture.numpy().tobytes() for picture in batch.pixels)))
        if last and positions[0] // recipe.training.global_batch_size + 1 == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return step(learner, batch, *rest)

    loop.save, checkpoint.restore, loop.train_step = saving, restoring, stepping
    try:
        loop.train(recipe)
    except loop.Interrupted:
        assert stop is not None
    return told


class Messages(TorchDispatchMode):
    """Counts what processes ask of each other, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            (group,) = (one for one in args if isinstance(one, torch.ScriptObject) and "Group" in str(one._type()))
            self.counts[func.overloadpacket.__name__] += ProcessGroup.unbox(group).size() > 1
        return func(*args, **(kwargs or {}))


def messages(recipes) -> list[dict[str, int]]:
    """What is asked of other processes in the second step of each recipe, by name."""
    found = []
    with runtime.distributed_session() as ranks:
        for recipe in recipes:
            run = build_run(recipe, ranks=ranks)
            batch = run.loader.read(0)
            for _ in range(2):  # the first also finds out the order of things
                with Messages() as seen:
                    train_step(
                        run.state, batch, run.objective, recipe.training.global_batch_size, run.accumulation_steps
                    )
            found.append({**seen.counts, "rounds": run.accumulation_steps, "groups": len(run.network.blocks) + 1})
    return found


def refused(recipe) -> str:
    """What a run that cannot begin says."""
    with pytest.raises(TesseraError) as told:
        loop.train(recipe)
    return str(told.value)


# The same on any number


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Where the runs of one process lie that others are compared with, by name; not to be changed."""
    return tmp_path_factory.mktemp("alone")


def logged(run: Path, *names: str) -> np.ndarray:
    return np.array([[record[name] for name in names] for record in read_log(run) if "loss" in record])


@pytest.mark.parametrize(
    ("layout", "optimizer", "block"),
    [
        pytest.param(
            layout,
            optimizer,
            block,
            marks=[] if (layout, optimizer, block) in SOON else pytest.mark.slow,
            id=f"{layout[0]} by {layout[1]}, {optimizer}, {block}",
        )
        for layout in LAYOUTS
        for optimizer in ("adamw", "muon")
        for block in ("adaln-zero", "rope-swiglu")
    ],
)
def test_any_number_of_processes_learns_the_same(processes, tiny, tmp_path, alone, layout, optimizer, block):
    count, shard = layout
    changes = (*RICH, f"training.optimizer.kind={optimizer}", f"network.block={block}")
    whole = alone / f"{optimizer} {block}"
    if not whole.exists():
        (told,) = processes.together(1, train, tiny("whole", *changes))
        shutil.copytree(tmp_path / "whole", whole)
        np.savez(whole / "saved.npz", **told["saved"])
    told = processes.together(count, train, tiny("run", *changes, f"training.fsdp={shard}"))
    names = ("loss", "mse", "vb", "gradient_norm", "clipped", "epoch")
    np.testing.assert_allclose(logged(tmp_path / "run", *names), logged(whole, *names), rtol=1e-5)
    assert logged(whole, "clipped").any()
    assert all(same(one["saved"], told[0]["saved"]) for one in told)
    expected = np.load(whole / "saved.npz")
    assert set(told[0]["saved"]) == set(expected)
    for name, tensor in told[0]["saved"].items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=1e-5 * abs(expected[name]).max(), err_msg=name)


def test_the_number_of_processes_may_change_whenever_a_run_goes_on(processes, tiny, tmp_path):
    """Nothing is lost or learned anew, no sample is left out or shown twice in an epoch, no loss changes."""
    changes = (
        "training.global_batch_size=240",
        "training.steps=16",
        "training.optimizer.kind=muon",
        "training.ema.extra_decays=0.9",
    )
    legs = [(4, "all", 3), (2, 1, 8), (1, 1, 15), (4, 2, None)]  # processes, shard, the step that is asked to stop
    shown: dict[int, bytes] = {}
    saved: dict[str, np.ndarray] = {}
    for count, shard, stop in legs:
        told = processes.together(count, train, tiny("run", *changes, f"training.fsdp={shard}"), stop)
        assert all(same(one["restored"], saved) for one in told)  # bit for bit
        assert all(same(one["saved"], told[0]["saved"]) for one in told)
        saved = told[0]["saved"]
        for one in told:
            assert not shown.keys() & one["shown"].keys()
            shown |= one["shown"]
    assert sorted(shown) == list(range(16 * 240))
    recipe = tiny("run", *changes)
    source = recipe.data.open()
    pictures = sorted(source.pixels(index).tobytes() for index in range(len(source)))
    assert len(source) % 240
    for epoch in range(16 * 240 // len(source)):
        places = range(epoch * len(source), (epoch + 1) * len(source))
        assert sorted(shown[place] for place in places) == pictures
    processes.together(1, train, tiny("whole", *changes))
    assert logged(tmp_path / "run", "step")[:, 0].tolist() == list(range(1, 17))
    np.testing.assert_allclose(
        logged(tmp_path / "run", "loss", "gradient_norm"),
        logged(tmp_path / "whole", "loss", "gradient_norm"),
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    ("count", "shard"),
    [pytest.param(*layout, marks=[] if layout == (2, "all") else pytest.mark.slow) for layout in LAYOUTS],
)
def test_a_run_of_many_processes_that_is_stopped_twice_ends_bit_for_bit(
    processes, tiny, whole_state, tmp_path, count, shard
):
    changes = (*RICH, f"training.fsdp={shard}", "training.optimizer.kind=muon", "network.block=rope-swiglu")
    processes.together(count, train, tiny("whole", *changes))
    for stop in (2, 3, None):
        told = processes.together(count, train, tiny("run", *changes), stop)
        assert bool(told[0]["restored"]) == (stop != 2)
    assert whole_state(tmp_path / "run") == whole_state(tmp_path / "whole")
    names = ("step", "loss", "mse", "vb", "gradient_norm", "learning_rate")
    np.testing.assert_array_equal(logged(tmp_path / "run", *names), logged(tmp_path / "whole", *names))


# What it costs


def test_accumulation_makes_no_extra_reduction(processes, tiny):
    """Gradients go from process to process once a step, a message each for every block and for the rest."""
    shards = (1, "all")
    recipes = [
        tiny("run", *RICH, f"training.micro_batch_size={micro}", f"training.fsdp={shard}")
        for shard in shards
        for micro in (30, 10, 3)
    ]
    for counts in processes.together(2, messages, recipes):
        for number, shard in enumerate(shards):
            alike = counts[3 * number : 3 * number + 3]
            assert [count["rounds"] for count in alike] == [1, 2, 5]
            for count in alike:
                sums = 1  # of what is told
                if shard == 1:
                    assert count["allreduce_"] == count["groups"] + sums
                else:
                    assert count["_reduce_scatter_base_"] == count["groups"]
                    assert count["allreduce_"] == sums


# What is drawn, scored and seen on the way


def test_pictures_scores_and_health_are_those_of_one_process(processes, tiny, tmp_path):
    changes = (
        "training.global_batch_size=64",  # so that half of it has as many samples as a probe looks at
        "training.steps=4",
        "training.sample_every=2",
        "training.health_every=2",
        "training.ema.decay=0.5",
        "evaluation={every: 4, count: 20, batch: 10, metrics: [kid, fd], reference: digits:ceiling}",
    )
    processes.together(1, train, tiny("whole", *changes))
    processes.together(2, train, tiny("run", *changes, "training.fsdp=all"))
    whole, run = tmp_path / "whole", tmp_path / "run"
    sheets = sorted(path.name for path in (whole / "samples").iterdir())
    assert sheets == sorted(path.name for path in (run / "samples").iterdir())
    _, *later = ([np.array(Image.open(place / "samples" / name), int) for place in (run, whole)] for name in sheets)
    assert (run / "samples" / sheets[0]).read_bytes() == (whole / "samples" / sheets[0]).read_bytes()
    assert len(later) == 2
    for drawn, expected in later:
        assert abs(drawn - expected).max() <= 1  # weights differ in the last bit by then
    scores = [[record for record in read_log(place) if "fd" in record] for place in (run, whole)]
    assert len(scores[0]) == 1
    assert scores[0][0] == pytest.approx(scores[1][0], rel=1e-3)
    seen, expected = (history.read(place).health for place in (run, whole))
    assert [record["step"] for record in seen] == [2, 4]
    for one, other in zip(seen, expected):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(flat(one[name]), flat(other[name]), rtol=1e-3, atol=1e-6, err_msg=name)


# What cannot be


def test_processes_that_cannot_be_divided_are_refused_by_each(processes, tiny):
    assert (
        processes.together(3, refused, tiny("run", "training.fsdp=2"))
        == ["training.fsdp is 2, but 3 processes cannot be divided into groups of 2: choose a divisor, or all"] * 3
    )


def test_a_batch_smaller_than_the_processes_is_refused_by_each(processes, tiny):
    for said in processes.together(3, refused, tiny("run", "training.global_batch_size=2")):
        assert said.startswith(
            "training.global_batch_size 2 is too small for 3 processes: some would have nothing to do"
        )
        assert "\n" not in said


def flat(value: Any) -> np.ndarray:
    """Numbers of a record, in lists or by name; None is not a number."""
    return np.array(list(value.values()) if isinstance(value, dict) else value, dtype=float)


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether two sets of tensors are the same bit for bit."""
    return one.keys() == other.keys() and all(np.array_equal(tensor, other[name]) for name, tensor in one.items())
