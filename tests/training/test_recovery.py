"""Recovery from bad steps: a run that had them ends like a run without their batches."""

import math
import os
import re
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera import bundle
from tessera.errors import Interrupted, TesseraError
from tessera.monitoring.logger import read_log
from tessera.monitoring.spikes import SKIPPED_STEPS, SkippedSteps, StepRecord, read_skipped_steps
from tessera.training import checkpoint, loop, recovery, step
from tessera.training.checkpoint import read_state
from tessera.training.run import build_run

WINDOW = ("training.stability.window=16", "training.stability.max_consecutive_bad=4")
BATCH = 32


def scale_latents(monkeypatch, factors: dict[int, float]) -> None:
    """Multiply the latents of the batches at these positions."""
    prepare_batch = step.prepare_batch

    def scaled(batch, objective, device):
        x0, condition, position = prepare_batch(batch, objective, device)
        return x0 * factors.get(int(batch.position[0]), 1.0), condition, position

    monkeypatch.setattr(step, "prepare_batch", scaled)


def damage_weights(monkeypatch, condition: Callable[[int], bool]) -> None:
    """Multiply the weights by 30 after each step whose batch position satisfies a condition."""
    train_step = loop.train_step

    def damaged(state, batch, *rest):
        metrics = train_step(state, batch, *rest)
        if condition(int(batch.position[0])):
            with torch.no_grad():
                for weight in state.network.parameters():
                    weight.mul_(30)
        return metrics

    monkeypatch.setattr(loop, "train_step", damaged)


def exclude(run_dir: Path, positions: Iterable[int]) -> None:
    """Write the record of a run that excludes these batches from the start."""
    run_dir.mkdir(parents=True)
    skipped = SkippedSteps(run_dir, 0)
    for position in positions:
        skipped.add(StepRecord(1, position, False, math.nan, 1.0, (2.0, 2.0)), [], rollback=0)
    skipped.write()


def trained_part(state: dict[str, Any]) -> dict[str, Any]:
    """Weights and optimizer state, without EMA and position."""
    return {name: value for name, value in state.items() if "weights/" in name or "optimizer/" in name}


def untimed(run: Path) -> list[dict]:
    """The log without timings and without the counts of bad steps."""
    ignored = ("images_per_second", "mfu", "data_wait", "memory", "rollbacks", "skipped_steps")
    return [{name: value for name, value in record.items() if name not in ignored} for record in read_log(run)]


@pytest.mark.parametrize(
    "changes",
    [
        (),
        pytest.param(("diffusion.variance=posterior",), marks=pytest.mark.slow),
        pytest.param(("diffusion={kind: flow}",), marks=pytest.mark.slow),
        ("training.optimizer={kind: muon, learning_rate: 0.01, adamw_learning_rate: 0.004}",),
    ],
    ids=["learned-variance", "posterior", "flow", "muon"],
)
def test_no_step_of_a_healthy_run_is_skipped(tiny, changes):
    overrides = ("training.steps=200", "network.hidden_size=32", "training.optimizer.learning_rate=0.004")
    run = loop.train(tiny("run", *overrides, "training.optimizer.warmup_steps=20", *WINDOW[:1], *changes))
    assert [record["skipped_steps"] for record in read_log(run)] == [0] * 200
    assert not (run / SKIPPED_STEPS).exists()
    state = read_state(bundle.checkpoints(run)[0]).spike_detector
    assert state["num_applied"] == 200
    assert all(math.isfinite(limit) for limit in state["limits"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_batch_with_nan_has_no_effect(tiny, state, monkeypatch, capsys, optimizer):
    changes = (
        f"training.optimizer={{kind: {optimizer}, learning_rate: 0.001}}",
        "training.optimizer.lr_schedule=constant",
    )
    exclude(Path(tiny("without").run_dir), [2 * BATCH])
    without = loop.train(tiny("without", *changes, "training.steps=5"))
    scale_latents(monkeypatch, {2 * BATCH: math.nan})
    capsys.readouterr()
    run = loop.train(tiny("run", *changes, "training.steps=6"))
    assert "step 3 is skipped: the loss is not finite" in capsys.readouterr().err
    assert trained_part(state(run)) == trained_part(state(without))
    assert len(trained_part(state(run))) > 10
    assert [record["skipped_steps"] for record in read_log(run)] == [0, 0, 1, 1, 1, 1]
    assert ["loss" in record for record in read_log(run)] == [True, True, False, True, True, True]
    (only,) = read_skipped_steps(run)
    dataset = tiny("run").data.open()
    order = build_run(tiny("other")).loader.order
    names = [dataset.name(int(index)) for index in order.batch(2 * BATCH)]
    assert only == {
        "step": 3, "position": 2 * BATCH, "outcome": "skipped", "reason": "the loss is not finite",
        "loss": None, "grad_norm": None, "samples": names,
    }  # fmt: skip


def test_a_spike_is_skipped(tiny, state, monkeypatch):
    exclude(Path(tiny("without").run_dir), [20 * BATCH])
    without = loop.train(tiny("without", *WINDOW, "training.steps=23"))
    scale_latents(monkeypatch, {20 * BATCH: 100.0})
    run = loop.train(tiny("run", *WINDOW, "training.steps=24"))
    (only,) = read_skipped_steps(run)
    assert (only["step"], only["position"], only["outcome"]) == (21, 20 * BATCH, "skipped")
    assert re.match(r"the loss is \d+(\.\d+)?, above the limit of", only["reason"])
    assert only["loss"] > 50 * read_log(run)[19]["loss"]
    assert trained_part(state(run)) == trained_part(state(without))
    detectors = [read_state(bundle.checkpoints(path)[0]).spike_detector for path in (run, without)]
    assert detectors[0] == detectors[1]


def test_without_a_threshold_the_spike_is_learned(tiny, monkeypatch):
    scale_latents(monkeypatch, {20 * BATCH: 100.0})
    run = loop.train(tiny("run", *WINDOW, "training.stability.spike_threshold=null", "training.steps=24"))
    assert read_skipped_steps(run) == []
    assert read_log(run)[20]["loss"] > 50 * read_log(run)[19]["loss"]


ROLLS_BACK = (*WINDOW, "training.steps=40", "training.checkpoint_every=8", "training.keep_last=9",
             "training.optimizer.learning_rate=0.004", "training.health_every=4")  # fmt: skip
EARLY, LATE = 23 * BATCH, 27 * BATCH  # steps 24, just before a checkpoint, and 28, between two checkpoints


def test_damaged_weights_are_rolled_back(tiny, state, monkeypatch, capsys):
    """To the last checkpoint; the run then continues like one without the batches that caused the damage."""
    damage_weights(monkeypatch, LATE.__eq__)
    run = loop.train(tiny("run", *ROLLS_BACK))
    output = capsys.readouterr().err
    assert re.search(
        r"4 bad steps in a row, .*: rolled back to step 24; .* before step 32 .*\(rollback 1 of 3\)", output
    )
    skipped = read_skipped_steps(run)
    assert {(record["outcome"], record["rollback"]) for record in skipped} == {("excluded", 1)}
    assert [record["position"] for record in skipped] == list(range(LATE, LATE + 5 * BATCH, BATCH))
    assert all(len(record["samples"]) == BATCH for record in skipped)
    monkeypatch.undo()
    exclude(Path(tiny("excluding").run_dir), [record["position"] for record in skipped])
    excluding = loop.train(tiny("excluding", *ROLLS_BACK))
    assert state(run) == state(excluding)
    assert untimed(run) == untimed(excluding)
    assert [record["rollbacks"] for record in read_log(run)] == [0] * 24 + [1] * 16
    assert [record["step"] for record in read_log(run, "health.jsonl")] == list(range(4, 41, 4))
    assert [path.name for path in bundle.checkpoints(run)] == [path.name for path in bundle.checkpoints(excluding)]


def test_a_damaged_checkpoint_is_rolled_back_too(tiny, state, monkeypatch, capsys):
    """The damage happens in the saved step itself; the second rollback excludes batches before the checkpoint."""
    damage_weights(monkeypatch, EARLY.__eq__)
    run = loop.train(tiny("run", *ROLLS_BACK))
    rollbacks = re.findall(r"rolled back to step (\d+);.* \(rollback (\d)", capsys.readouterr().err)
    assert rollbacks == [("24", "1"), ("16", "2")]
    excluded = {record["position"] for record in read_skipped_steps(run)}
    assert EARLY in excluded
    assert len(excluded) == len(read_skipped_steps(run))
    monkeypatch.undo()
    exclude(Path(tiny("excluding").run_dir), excluded)
    assert state(run) == state(loop.train(tiny("excluding", *ROLLS_BACK)))


@pytest.mark.parametrize("stops", [34, 36])
def test_a_run_stopped_between_bad_steps_ends_like_one_that_was_not(tiny, state, monkeypatch, stops):
    """It saves weights that may be bad, but never rolls back to them."""
    damage_weights(monkeypatch, (32 * BATCH).__eq__)
    whole = loop.train(tiny("whole", *ROLLS_BACK))
    damaged = loop.train_step

    def stopped(state, batch, *rest):
        if int(batch.position[0]) == (stops - 1) * BATCH:
            monkeypatch.setattr(loop, "train_step", damaged)
            os.kill(os.getpid(), signal.SIGTERM)
        return damaged(state, batch, *rest)

    monkeypatch.setattr(loop, "train_step", stopped)
    with pytest.raises(Interrupted, match=f"stopped at step {stops}"):
        loop.train(tiny("run", *ROLLS_BACK))
    run = loop.train(tiny("run", *ROLLS_BACK))
    assert state(run) == state(whole)
    assert read_skipped_steps(run) == read_skipped_steps(whole)


def test_a_run_does_not_end_with_bad_weights(tiny, state, monkeypatch, capsys):
    damage_weights(monkeypatch, (38 * BATCH).__eq__)
    run = loop.train(tiny("run", *ROLLS_BACK))
    assert "1 bad steps in a row" in capsys.readouterr().err
    excluded = [record["position"] for record in read_skipped_steps(run)]
    assert 38 * BATCH in excluded
    monkeypatch.undo()
    exclude(Path(tiny("excluding").run_dir), excluded)
    assert state(run) == state(loop.train(tiny("excluding", *ROLLS_BACK)))


def test_repeated_damage_ends_the_run_with_a_diagnosis_and_it_can_be_resumed(tiny, state, monkeypatch, tmp_path):
    damage_weights(monkeypatch, LATE.__le__)
    run = tmp_path / "run"
    for _ in range(2):  # the same command has the same result
        with pytest.raises(TesseraError) as caught:
            loop.train(tiny("run", *ROLLS_BACK))
        message = str(caught.value)
        assert re.search(r"training diverged at step \d+: the .*, 4 steps in a row, and 3 rollbacks", message)
        assert "lower training.optimizer.learning_rate" in message
        newest = bundle.checkpoints(run)[0]
        assert newest.name in message
        assert checkpoint.verify(newest) == []
    excluded = {record["position"] for record in read_skipped_steps(run) if record["outcome"] == "excluded"}
    assert LATE in excluded
    monkeypatch.undo()
    loop.train(tiny("run", *ROLLS_BACK))
    exclude(tmp_path / "excluding", excluded)
    assert state(run) == state(loop.train(tiny("excluding", *ROLLS_BACK)))


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


def die(*_: object) -> None:
    raise Killed


FAST = ((LATE, "five steps later"), (EARLY, "write"))
SLOW = [
    (damaged, when)
    for damaged in (LATE, EARLY)
    for when in ("delete_after", "write", "rewind", "next step", "five steps later")
    if (damaged, when) not in FAST
]


@pytest.mark.parametrize(("damaged", "when"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_run_killed_during_a_rollback_ends_like_one_that_was_not(tiny, state, monkeypatch, damaged, when):
    damage_weights(monkeypatch, damaged.__eq__)
    whole = state(loop.train(tiny("whole", *ROLLS_BACK)))
    roll_back, remaining = recovery.Recovery._roll_back, [1 if damaged == LATE else 2]

    def killed(self: recovery.Recovery, record: StepRecord):
        remaining[0] -= 1
        if remaining[0] == 0:
            patched = {"delete_after": checkpoint, "write": self.skipped, "rewind": self.logger}
            if when in patched:
                patch.setattr(patched[when], when, die)
            else:
                delay, train_step = [0 if when == "next step" else 5], loop.train_step
                patch.setattr(loop, "train_step", lambda *args: die() if elapsed(delay) else train_step(*args))
        return roll_back(self, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery.Recovery, "_roll_back", killed)
        with pytest.raises(Killed):
            loop.train(tiny("run", *ROLLS_BACK))
    run = loop.train(tiny("run", *ROLLS_BACK))
    assert state(run) == whole


def elapsed(counter: list[int]) -> bool:
    """Count down; True once the counter has passed zero."""
    counter[0] -= 1
    return counter[0] < 0


@pytest.mark.parametrize(
    ("change", "reset"),
    [("training.optimizer.learning_rate=0.002", True), ("training.global_batch_size=16", True),
     ("training.condition_dropout=0", True), ("training.steps=30", False), ("training.seed=1", False)],
)  # fmt: skip
def test_changes_that_affect_the_loss_reset_the_limits(tiny, change, reset):
    loop.train(tiny("run", *WINDOW, "training.steps=20"))
    run = loop.train(tiny("run", *WINDOW, "training.steps=30", change))
    state = read_state(bundle.checkpoints(run)[0]).spike_detector
    assert state["num_applied"] == (10 if reset else 30)
    assert (state["limits"] == [None, None]) == reset
