"""Runs that save power-function averages, from which others are computed after training."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tessera import bundle, power_ema
from tessera.errors import TesseraError
from tessera.planning import hardware
from tessera.power_ema import Profile, gamma
from tessera.training import loop, plan_recipe
from tessera.training.dry_run import dry_run
from tessera.training.ema import EMA
from tessera.training.recipe import read_recipe

POWER = ("training.ema={kind: power, lengths: [0.05, 0.1], snapshot_every: 2}", "training.steps=12",
         "training.optimizer.learning_rate=0.05")  # fmt: skip


def snapshots(run: Path) -> dict[int, dict[str, bytes]]:
    """The tensors of each snapshot, bit for bit."""
    files = power_ema.snapshot_files(run)
    return {
        step: {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
        for step, path in files.items()
    }


def relative(one: dict, other: dict, start: dict) -> float:
    """The distance of two sets of weights, relative to the distance of the second from a third."""
    distance = sum(float((one[name] - other[name]).square().sum()) for name in other)
    return (distance / sum(float((start[name] - other[name]).square().sum()) for name in other)) ** 0.5


def test_a_run_saves_averages_and_other_lengths_are_computed_from_them(tiny, monkeypatch):
    trajectory: list[dict[str, torch.Tensor]] = []
    update = EMA.update

    def update_and_record(self, step):
        names = [name for name, _ in self.network.named_parameters() if name != "pos_embed"]
        trajectory.append({name: weight.double() for name, weight in zip(names, self._weights, strict=True)})
        update(self, step)

    monkeypatch.setattr(EMA, "update", update_and_record)
    run = loop.train(tiny("run", *POWER, "training.keep_last=1"))
    newest = bundle.checkpoints(run)[0]
    assert list(snapshots(run)) == [2, 4, 6, 8, 10, 12]
    own, other = load_file(newest / "model.safetensors"), load_file(newest / "ema/length-0.1.safetensors")
    assert snapshots(run)[12] == {
        f"{length}/{name}": tensor.numpy().tobytes()
        for length, state in ((0.05, own), (0.1, other))
        for name, tensor in state.items()
    }
    for length, expected in ((0.05, own), (0.1, other)):
        model = bundle.load(newest, ema_length=length)
        assert all(torch.equal(model.network.state_dict()[name], tensor) for name, tensor in expected.items())
        assert (model.config.provenance.ema_length, model.config.provenance.ema_decay) == (length, None)
    for length in (0.07, 0.12):
        parts = np.diff((np.arange(13) / 12) ** (gamma(length) + 1))
        expected = {
            name: sum(part * weights[name] for part, weights in zip(parts, trajectory)) for name in trajectory[0]
        }
        computed = bundle.load(newest, ema_length=length).network.state_dict()
        assert relative(computed, expected, trajectory[-1]) < 0.05
        assert torch.equal(computed["pos_embed"], own["pos_embed"])


def test_other_lengths_of_an_adapter_are_sums_of_its_weights(tiny, monkeypatch):
    base = loop.train(tiny("base", "training.steps=2"))
    trajectory: list[list[torch.Tensor]] = []
    update = EMA.update

    def update_and_record(self, step):
        trajectory.append([weight.double() for weight in self._weights])
        update(self, step)

    monkeypatch.setattr(EMA, "update", update_and_record)
    adapter = ("adapter={kind: lora, rank: 2}", f"training.init_from={base}")
    settings = tiny("adapter", *POWER).model_dump(mode="json", exclude_unset=True)
    run = loop.train(read_recipe({name: settings[name] for name in settings if name != "network"}, list(adapter)))
    parts = np.diff((np.arange(13) / 12) ** (gamma(0.07) + 1))
    expected = [sum(part * weight for part, weight in zip(parts, weights)) for weights in zip(*trajectory)]
    weights = bundle.load(bundle.checkpoints(run)[0], ema_length=0.07).network.named_parameters()
    computed = [weight for name, weight in weights if "lora" in name]
    assert len(computed) == len(expected) > 0
    numbered = [dict(enumerate(weights)) for weights in (computed, expected, trajectory[-1])]
    assert relative(*numbered) < 0.05


def test_a_resumed_run_has_the_same_averages_bit_for_bit(tiny, state, monkeypatch, stop_after):
    whole = loop.train(tiny("whole", *POWER))
    stop_after(5)
    recipe = tiny("part", *POWER, "training.checkpoint_every=5")
    with pytest.raises(loop.Interrupted):
        loop.train(recipe)
    monkeypatch.undo()
    part = recipe.run_dir
    # A process that was killed: averages of later steps, and a file that it had begun.
    later, begun = power_ema.snapshot_path(Path(part), 11), power_ema.snapshot_path(Path(part), 9)
    later.write_bytes(power_ema.snapshot_path(Path(part), 2).read_bytes())
    begun.with_name(begun.name + ".partial").write_bytes(b"part")
    loop.train(recipe)
    assert state(Path(part)) == state(whole)
    assert snapshots(Path(part)) == snapshots(whole)
    assert sorted(os.listdir(Path(part) / power_ema.SNAPSHOTS)) == [
        f"step-{step:09d}.safetensors" for step in range(2, 13, 2)
    ]


def test_averages_begin_in_a_run_that_had_none_and_lengths_stay(tiny, capsys):
    loop.train(tiny("run"))
    more = [change for change in POWER if "steps" not in change or "snapshot" in change]
    run = loop.train(tiny("run", *more, "training.steps=8"))
    output = capsys.readouterr().err
    for length in (0.05, 0.1):
        assert re.search(f"not in the checkpoint.*: the EMA of length {length}", output)
    assert list(snapshots(run)) == [6, 8]
    changes = ("training.ema={kind: power, lengths: [0.05, 0.2]}", "training.steps=10")
    with pytest.raises(
        TesseraError, match=r"averages of the lengths 0\.05, 0\.1, and 0\.2 would lack .*leave training"
    ):
        loop.train(tiny("run", *changes))
    loop.train(tiny("run", "training.ema={kind: power, lengths: 0.1}", "training.steps=9"))
    assert list(
        bundle.ema_weights(bundle.checkpoints(run)[0], bundle.load_config(bundle.checkpoints(run)[0]), "power")
    ) == [0.1]


def test_a_roll_back_deletes_the_averages_of_steps_that_are_trained_again(tiny):
    from tessera.training.checkpoint import delete_after

    run = loop.train(tiny("run", *POWER))
    delete_after(run, 7)
    assert list(snapshots(run)) == [2, 4, 6]


def test_a_length_that_cannot_be_computed_is_an_error(tiny, tmp_path):
    run = loop.train(tiny("run", *POWER))
    newest = bundle.checkpoints(run)[0]
    with pytest.raises(
        TesseraError,
        match=r"averages of lengths 0\.05, 0\.1 after 6 steps, which give length 0\.01 with an error of \d+%: "
        r"expected one from 0\.0\d+ to 0\.1\d*; .*snapshot_every",
    ):
        bundle.load(newest, ema_length=0.01)
    for length in (-0.1, 0.0, 0.3):
        with pytest.raises(TesseraError, match=f"no length {length}: expected one above 0 and below 0.288"):
            bundle.load(newest, ema_length=length)
    with pytest.raises(TesseraError, match=r"a decay \(0\.9\) and a length \(0\.1\)"):
        bundle.load(newest, ema=0.9, ema_length=0.1)
    bundle.save(bundle.load(newest, ema_length=0.08), tmp_path / "alone")
    alone = bundle.load(tmp_path / "alone", ema_length=0.08)
    assert bundle.weights_hash(alone.network) == bundle.weights_hash(bundle.load(newest, ema_length=0.08).network)
    with pytest.raises(TesseraError, match=r"one average, of length 0\.08, and 0\.1 cannot be computed.*take the run"):
        bundle.load(tmp_path / "alone", ema_length=0.1)
    path = power_ema.snapshot_path(run, 4)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TesseraError, match="step-000000004.safetensors is damaged"):
        bundle.load(newest, ema_length=0.08)


def test_a_model_with_exponential_averages_has_no_lengths(tiny):
    newest = bundle.checkpoints(loop.train(tiny("run")))[0]
    with pytest.raises(TesseraError, match=r"exponential averages \(decay 0\.9999\), of which there is no length 0\.1: "
                                           r"leave it out, or train with training\.ema\.kind=power"):  # fmt: skip
        bundle.load(newest, ema_length=0.1)


def test_a_run_saves_about_32_times_whatever_its_length(tiny):
    ema = tiny("run", "training.ema.kind=power").training.ema
    for steps, count in ((8, 8), (400, 33), (400_000, 32)):
        assert ema.num_snapshots(steps, steps) == count
        assert [ema.num_snapshots(step, steps) for step in (0, steps // 2)] == [0, count // 2]


def test_plan_and_dry_run_include_the_disk_of_the_averages(tiny):
    recipe = tiny("run", *POWER)
    estimate = dry_run(recipe, steps=1)
    plan = plan_recipe.plan_for_recipe(recipe, hardware.find("h100"))
    weights = 4 * plan.parameters
    assert plan.snapshot_bytes == 2 * weights
    assert plan.disk_bytes == plan.checkpoint_bytes * plan.workload.num_checkpoints + 6 * 2 * weights
    assert estimate.num_snapshots == 6
    assert 2 * weights < estimate.snapshot_bytes < 2.5 * weights + 8192  # and the names of the tensors
    assert "for 6 snapshots of the EMA" in str(estimate)
    assert "snapshots" not in str(dry_run(tiny("other"), steps=1))
    assert Profile(12, 0.05) not in power_ema.snapshots(Path(recipe.run_dir), 13)  # nothing is left
