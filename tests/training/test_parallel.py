"""The number of ranks and the sharding change nothing: weights, batches, checkpoints, samples, scores."""

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
from safetensors.torch import load_file
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tessera import bundle, power_ema, runtime
from tessera.errors import Interrupted, TesseraError
from tessera.monitoring import history
from tessera.monitoring.logger import read_log
from tessera.training import checkpoint, loop
from tessera.training.run import build_run
from tessera.training.step import train_step
from tessera.training.students import distillation_recipe

pytest.importorskip("sklearn")

# Everything at once: accumulation, parts of unequal size, clipped gradients, several decays, recomputation.
RICH = (
    "training.steps=6",
    "training.global_batch_size=30",
    "training.micro_batch_size=5",
    "training.optimizer.grad_clip_norm=0.3",
    "training.ema={decay: 0.9, extra_decays: [0.5, 0.99]}",
    "training.activation_checkpointing=blocks",
    "network.depth=2",
)
FAST = {((4, 2), "adamw", "adaln-zero"), ((2, "full"), "muon", "rope-swiglu")}  # the others run in `make prove`
LAYOUTS = [(2, 1), (2, "full"), (4, 1), (4, 2), (4, "full")]  # number of ranks, training.fsdp


# Functions of the processes


def training_state(network, ema, optimizer) -> dict[str, np.ndarray]:
    """Weights, averages and optimizer state, whole."""
    tensors = checkpoint.training_state_dict(network, optimizer)
    for decay, averaged in ema.networks.items():
        tensors |= {f"ema {decay}/{name}": tensor for name, tensor in averaged.state_dict().items()}
    whole = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
    return {name: tensor.numpy(force=True).copy() for name, tensor in whole.items()}


def train(recipe, stop: int | None = None) -> dict[str, Any]:
    """Train; only the last rank receives a signal, in step `stop`. Returns the restored and the last saved state, and
    the image that this rank read at each position.
    """
    result: dict[str, Any] = {"restored": {}, "saved": {}, "images": {}}
    save_checkpoint, restore, train_step = loop.save_checkpoint, checkpoint.restore, loop.train_step
    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)

    def save(run, writer, state):
        result["saved"] = training_state(run.network, run.ema, run.state.optimizer)
        save_checkpoint(run, writer, state)

    def record_restore(path, network, ema, optimizer):
        state = restore(path, network, ema, optimizer)
        result["restored"] = training_state(network, ema, optimizer)
        return state

    def step(state, batch, *rest):
        positions = batch.position.tolist()
        assert not result["images"].keys() & set(positions)
        result["images"] |= dict(zip(positions, (image.numpy().tobytes() for image in batch.pixels)))
        if last and positions[0] // recipe.training.global_batch_size + 1 == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(state, batch, *rest)

    loop.save_checkpoint, checkpoint.restore, loop.train_step = save, record_restore, step
    try:
        loop.train(recipe)
    except Interrupted:
        assert stop is not None
    return result


class Collectives(TorchDispatchMode):
    """Counts the collective operations between ranks, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            (group,) = (arg for arg in args if isinstance(arg, torch.ScriptObject) and "Group" in str(arg._type()))
            self.counts[func.overloadpacket.__name__] += ProcessGroup.unbox(group).size() > 1
        return func(*args, **(kwargs or {}))


def count_collectives(recipes) -> list[dict[str, int]]:
    """The collective operations in the second step of each recipe, by name."""
    results = []
    with runtime.distributed_session() as world:
        for recipe in recipes:
            run = build_run(recipe, world=world)
            batch, batch_size = run.loader.load_batch(0), recipe.training.global_batch_size
            for _ in range(2):  # FSDP learns the order of the modules in the first step
                with Collectives() as collectives:
                    train_step(run.state, batch, run.objective, batch_size, run.accumulation_steps)
            groups = len(run.network.blocks) + 1
            results.append({**collectives.counts, "accumulation": run.accumulation_steps, "groups": groups})
    return results


def error_message(recipe) -> str:
    """The message of a run that cannot begin."""
    with pytest.raises(TesseraError) as caught:
        loop.train(recipe)
    return str(caught.value)


# Equal results


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The folder of single-process runs for comparison, by name. Tests must not change them."""
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
            marks=[] if (layout, optimizer, block) in FAST else pytest.mark.slow,
            id=f"{layout[0]} by {layout[1]}, {optimizer}, {block}",
        )
        for layout in LAYOUTS
        for optimizer in ("adamw", "muon")
        for block in ("adaln-zero", "rope-swiglu")
    ],
)
def test_any_number_of_ranks_trains_the_same_weights(processes, tiny, tmp_path, alone, layout, optimizer, block):
    count, fsdp = layout
    changes = (*RICH, f"training.optimizer.kind={optimizer}", f"network.block={block}")
    whole = alone / f"{optimizer} {block}"
    if not whole.exists():
        (result,) = processes.together(1, train, tiny("whole", *changes))
        shutil.copytree(tmp_path / "whole", whole)
        np.savez(whole / "saved.npz", **result["saved"])
    results = processes.together(count, train, tiny("run", *changes, f"training.fsdp={fsdp}"))
    names = ("loss", "mse", "vb", "grad_norm", "clipped", "epoch")
    np.testing.assert_allclose(logged(tmp_path / "run", *names), logged(whole, *names), rtol=1e-5)
    assert logged(whole, "clipped").any()
    assert all(equal(result["saved"], results[0]["saved"]) for result in results)
    expected = np.load(whole / "saved.npz")
    assert set(results[0]["saved"]) == set(expected)
    for name, tensor in results[0]["saved"].items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=1e-5 * abs(expected[name]).max(), err_msg=name)


def test_snapshots_of_sharded_averages_are_whole(processes, tiny, tmp_path):
    changes = ("training.steps=4", "training.ema={kind: power, snapshot_every: 2}")
    processes.together(2, train, tiny("two", *changes, "training.fsdp=full"))
    processes.together(1, train, tiny("one", *changes))
    for step in (2, 4):
        one, two = (load_file(power_ema.snapshot_path(tmp_path / name, step)) for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
    newest = bundle.checkpoints(tmp_path / "two")[0]
    for length in (0.05, 0.1):
        network = bundle.load(newest, ema_length=length).network
        assert all(torch.equal(two[f"{length}/{name}"], tensor) for name, tensor in network.state_dict().items())


def test_features_of_sharded_averages_are_those_of_a_single_process(processes, tiny, tmp_path):
    """The average is gathered again in each step, in which it has changed, and the alignment ends at once for all."""
    changes = (*RICH, "training.alignment={kind: self, until: 0.7}")
    processes.together(2, train, tiny("two", *changes, "training.fsdp=full"))
    processes.together(1, train, tiny("one", *changes))
    names = ("loss", "mse", "alignment", "grad_norm")
    np.testing.assert_allclose(logged(tmp_path / "two", *names), logged(tmp_path / "one", *names), rtol=1e-5)
    assert (logged(tmp_path / "one", "alignment")[:, 0] > 0).tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("weights", ["average", "current"])
def test_a_sharded_student_has_the_targets_of_a_single_process(processes, tiny, tmp_path, weights):
    """With one sample per rank, only one of the ranks trains a step, and both gather the weights equally often."""
    settings = (*RICH, "diffusion=flow", "sampling.guidance_scale=2")
    teacher = loop.train(tiny("teacher", *settings))

    def student(name: str, *changes: str):
        changes = (*changes, "training.steps=5", "training.global_batch_size=2", "training.micro_batch_size=null")
        changes = (*changes, f"training.distillation.target_weights={weights}", "training.log_every=1")
        return distillation_recipe(str(teacher), str(tmp_path / name), changes)

    processes.together(2, train, student("two", "training.fsdp=full"))
    processes.together(1, train, student("one"))
    names = ("loss", "mse", "grad_norm")
    np.testing.assert_allclose(logged(tmp_path / "two", *names), logged(tmp_path / "one", *names), rtol=1e-5)
    assert len(logged(tmp_path / "one", "mse")) == 5


def test_a_run_can_be_resumed_with_another_number_of_ranks(processes, tiny, tmp_path):
    """The state is restored bit for bit, each epoch reads each sample once, and the losses stay the same."""
    changes = (
        "training.global_batch_size=240",
        "training.steps=16",
        "training.optimizer.kind=muon",
        "training.ema.extra_decays=0.9",
    )
    parts = [(4, "full", 3), (2, 1, 8), (1, 1, 15), (4, 2, None)]  # ranks, training.fsdp, the step that stops
    images: dict[int, bytes] = {}
    saved: dict[str, np.ndarray] = {}
    for count, fsdp, stop in parts:
        results = processes.together(count, train, tiny("run", *changes, f"training.fsdp={fsdp}"), stop)
        assert all(equal(result["restored"], saved) for result in results)  # bit for bit
        assert all(equal(result["saved"], results[0]["saved"]) for result in results)
        saved = results[0]["saved"]
        for result in results:
            assert not images.keys() & result["images"].keys()
            images |= result["images"]
    assert sorted(images) == list(range(16 * 240))
    dataset = tiny("run", *changes).data.open()
    expected = sorted(dataset.pixels(index).tobytes() for index in range(len(dataset)))
    assert len(dataset) % 240
    for epoch in range(16 * 240 // len(dataset)):
        positions = range(epoch * len(dataset), (epoch + 1) * len(dataset))
        assert sorted(images[position] for position in positions) == expected
    processes.together(1, train, tiny("whole", *changes))
    assert logged(tmp_path / "run", "step")[:, 0].tolist() == list(range(1, 17))
    np.testing.assert_allclose(
        logged(tmp_path / "run", "loss", "grad_norm"),
        logged(tmp_path / "whole", "loss", "grad_norm"),
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    ("count", "fsdp"),
    [pytest.param(*layout, marks=[] if layout == (2, "full") else pytest.mark.slow) for layout in LAYOUTS],
)
def test_a_distributed_run_that_is_stopped_twice_ends_bit_for_bit_the_same(
    processes, tiny, whole_state, tmp_path, count, fsdp
):
    changes = (*RICH, f"training.fsdp={fsdp}", "training.optimizer.kind=muon", "network.block=rope-swiglu")
    processes.together(count, train, tiny("whole", *changes))
    for stop in (2, 3, None):
        results = processes.together(count, train, tiny("run", *changes), stop)
        assert bool(results[0]["restored"]) == (stop != 2)
    assert whole_state(tmp_path / "run") == whole_state(tmp_path / "whole")
    names = ("step", "loss", "mse", "vb", "grad_norm", "learning_rate")
    np.testing.assert_array_equal(logged(tmp_path / "run", *names), logged(tmp_path / "whole", *names))


# Communication


def test_accumulation_makes_no_extra_reduction(processes, tiny):
    """Gradients are reduced once per step: one operation for each block and one for the rest."""
    layouts = (1, "full")
    recipes = [
        tiny("run", *RICH, f"training.micro_batch_size={micro}", f"training.fsdp={fsdp}")
        for fsdp in layouts
        for micro in (30, 10, 3)
    ]
    for counts in processes.together(2, count_collectives, recipes):
        for number, fsdp in enumerate(layouts):
            same_layout = counts[3 * number : 3 * number + 3]
            assert [count["accumulation"] for count in same_layout] == [1, 2, 5]
            for count in same_layout:
                metrics = 1  # one all-reduce for all metrics
                if fsdp == 1:
                    assert count["allreduce_"] == count["groups"] + metrics
                else:
                    assert count["_reduce_scatter_base_"] == count["groups"]
                    assert count["allreduce_"] == metrics


# Samples, scores and health


def test_samples_scores_and_health_are_those_of_one_process(processes, tiny, tmp_path):
    changes = (
        "training.global_batch_size=64",  # so that half of it is enough for a probe
        "training.steps=4",
        "training.sample_every=2",
        "training.health_every=2",
        "training.ema.decay=0.5",
        "evaluation={every: 4, num_samples: 20, batch_size: 10, metrics: [kid, fd], reference: digits:ceiling}",
    )
    processes.together(1, train, tiny("whole", *changes))
    processes.together(2, train, tiny("run", *changes, "training.fsdp=full"))
    whole, run = tmp_path / "whole", tmp_path / "run"
    grids = sorted(path.name for path in (whole / "samples").iterdir())
    assert grids == sorted(path.name for path in (run / "samples").iterdir())
    assert (run / "samples" / grids[0]).read_bytes() == (whole / "samples" / grids[0]).read_bytes()
    assert len(grids) == 3
    for name in grids[1:]:
        samples, expected = (np.array(Image.open(folder / "samples" / name), int) for folder in (run, whole))
        assert abs(samples - expected).max() <= 1  # the weights differ in the last bit by then
    scores = [[record for record in read_log(folder) if "fd" in record] for folder in (run, whole)]
    assert len(scores[0]) == 1
    assert scores[0][0] == pytest.approx(scores[1][0], rel=1e-3)
    records, expected = (history.read_history(folder).health for folder in (run, whole))
    assert [record["step"] for record in records] == [2, 4]
    for record, other in zip(records, expected):
        assert record.keys() == other.keys()
        for name in record:
            np.testing.assert_allclose(flat(record[name]), flat(other[name]), rtol=1e-3, atol=1e-6, err_msg=name)


# Errors


def test_fsdp_that_does_not_divide_the_ranks_is_an_error_of_each_rank(processes, tiny):
    assert (
        processes.together(3, error_message, tiny("run", "training.fsdp=2"))
        == ["training.fsdp is 2, but 3 processes cannot be divided into groups of 2: choose a divisor, or full"] * 3
    )


def test_a_batch_smaller_than_the_number_of_ranks_is_an_error_of_each_rank(processes, tiny):
    for message in processes.together(3, error_message, tiny("run", "training.global_batch_size=2")):
        assert message.startswith("training.global_batch_size 2 is too small for 3 processes")
        assert "\n" not in message


def flat(value: Any) -> np.ndarray:
    """The values of a record, in lists or by name; None becomes nan."""
    return np.array(list(value.values()) if isinstance(value, dict) else value, dtype=float)


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return one.keys() == other.keys() and all(np.array_equal(tensor, other[name]) for name, tensor in one.items())
