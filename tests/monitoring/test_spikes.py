"""What counts as a bad step, what is done about it, and that a run it befalls ends as one that never met it."""

import json
import math
import os
import re
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from tessera import bundle
from tessera.errors import TesseraError
from tessera.monitoring import spikes
from tessera.monitoring.logger import read_log
from tessera.monitoring.spikes import (
    SKIPPED_STEPS,
    SkippedSteps,
    SpikeDetector,
    StabilityConfig,
    StepRecord,
    read_skipped_steps,
)
from tessera.training import loop, step
from tessera.training.checkpoint import checkpoint
from tessera.training.checkpoint.checkpoint import read_state
from tessera.training.step import StepMetrics

CPU = torch.device("cpu")


def told(loss: float, norm: float, kept: bool = True) -> StepMetrics:
    numbers = {"loss": torch.tensor(loss), "gradient_norm": torch.tensor(norm)}
    return StepMetrics(numbers, torch.tensor(float(kept)), torch.tensor(0.0), torch.zeros(2, 10), torch.zeros(1))


def shown(watch: SpikeDetector, losses: Iterable[float], norms: Iterable[float], first: int = 1) -> list[StepRecord]:
    """Show so many steps, each kept out where it is above the limits that stand."""
    seen = []
    for number, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=first):
        loss, norm = float(loss), float(norm)
        kept = bool(loss <= watch.limits[0] and norm <= watch.limits[1])  # False of nan
        watch.send(number, 32 * (number - 1), told(loss, norm, kept))
        seen += watch.read()
    return seen


def heavy_tailed(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Losses that fall and gradient norms that do not, both log-normal, as float32."""
    draw = np.random.default_rng(seed)
    losses = (0.05 + np.exp(-np.arange(count) / 200)) * draw.lognormal(0, 0.4, count)
    return losses.astype(np.float32), draw.lognormal(0, 1, count).astype(np.float32)


# Limits


@pytest.mark.parametrize(("count", "window"), [(16, 16), (64, 256), (100, 64), (255, 256), (1000, 256)])
@pytest.mark.parametrize("spike", [3.0, 20.0])
def test_limits_are_robust_deviations_above_the_median_of_the_last_steps(count, window, spike):
    losses, norms = heavy_tailed(count)
    watch = SpikeDetector(StabilityConfig(window=window, spike_threshold=1e6), CPU)
    shown(watch, losses, norms)
    watch.config = StabilityConfig(window=window, spike_threshold=spike)
    watch._renew()
    last, last_norms = losses[-window:].astype(float), np.log(norms[-window:].astype(float))
    spread = max(stats.median_abs_deviation(last, scale="normal"), 0.05 * np.median(last))
    log_spread = max(stats.median_abs_deviation(last_norms, scale="normal"), 0.1)
    assert watch.limits[0] == pytest.approx(np.median(last) + spike * spread, rel=1e-5)
    assert watch.limits[1] == pytest.approx(np.exp(np.median(last_norms) + spike * log_spread), rel=1e-4)


@pytest.mark.parametrize(("window", "first"), [(16, 16), (64, 16), (256, 64), (300, 80)])
def test_there_are_no_limits_until_a_quarter_of_a_window_was_seen(window, first):
    watch = SpikeDetector(StabilityConfig(window=window), CPU)
    for count in range(1, first + 1):
        assert watch.limits == (math.inf, math.inf)
        shown(watch, [1.0], [1.0], count)
    assert math.isfinite(sum(watch.limits))


def test_however_alike_the_steps_were_a_loss_twice_as_large_and_a_gradient_seven_times_are_no_spikes():
    watch = SpikeDetector(StabilityConfig(), CPU)
    shown(watch, [0.5] * 64, [3.0] * 64)
    assert watch.limits == pytest.approx((1.0, 3 * math.exp(2)))


def test_spikes_among_the_steps_hardly_move_the_limits():
    losses, norms = heavy_tailed(400)
    few = np.arange(400) % 10 == 3
    limits = []
    for factor in (1, 1e6):
        watch = SpikeDetector(StabilityConfig(spike_threshold=1e9), CPU)  # so that all are kept
        shown(watch, np.where(few, factor * losses, losses), np.where(few, factor * norms, norms))
        watch.config = StabilityConfig()
        watch._renew()
        limits.append(watch.limits)
    assert limits[1][0] < 1.5 * limits[0][0]
    assert math.log(limits[1][1]) < 1.5 * math.log(limits[0][1])


@pytest.mark.parametrize("seed", range(3))
def test_healthy_heavy_tailed_steps_raise_no_alarm(seed):
    assert all(seen.applied for seen in shown(SpikeDetector(StabilityConfig(), CPU), *heavy_tailed(4000, seed)))


@pytest.mark.parametrize(
    ("factors", "why"),
    [((100, 1), "the loss is .*, above the limit of "), ((1, 1e9), "the gradient's length is .*, above the limit of "),
     ((math.nan, 1), "the loss is not a number"), ((1, math.inf), "the gradient's length is not a number")],
)  # fmt: skip
def test_an_injected_spike_is_the_one_step_that_is_kept_out_and_the_window_never_holds_it(factors, why):
    losses, norms = heavy_tailed(600)
    losses[500], norms[500] = losses[500] * factors[0], norms[500] * factors[1]
    watch = SpikeDetector(StabilityConfig(), CPU)
    bad = [seen for seen in shown(watch, losses, norms) if not seen.applied]
    assert [seen.step for seen in bad] == [501]
    assert re.match(why, bad[0].why)
    assert watch.state()["losses"] == np.delete(losses, 500)[-256:].tolist()
    assert watch.state()["gradient_norms"] == np.delete(norms, 500)[-256:].tolist()


def test_without_spikes_only_what_is_not_a_number_is_bad():
    watch = SpikeDetector(StabilityConfig(spike_threshold=None), CPU)
    losses, norms = heavy_tailed(600)
    shown(watch, losses * np.where(np.arange(600) > 300, 1e6, 1), norms)
    assert watch.limits == (math.inf, math.inf)


def test_what_a_watch_remembers_goes_through_json_and_sets_the_same_limits_bit_for_bit():
    losses, norms = heavy_tailed(900)
    losses[450] = math.nan
    for stop in (0, 10, 64, 100, 451, 777):
        whole, before = (SpikeDetector(StabilityConfig(), CPU) for _ in range(2))
        shown(whole, losses[:stop], norms[:stop])
        shown(before, losses[:stop], norms[:stop])
        after = SpikeDetector(StabilityConfig(), CPU)
        after.restore(json.loads(json.dumps(before.state(), allow_nan=False)))
        for number in range(stop, 900):
            assert (after.limits, after.consecutive_bad) == (whole.limits, whole.consecutive_bad)
            shown(whole, losses[number : number + 1], norms[number : number + 1], number)
            shown(after, losses[number : number + 1], norms[number : number + 1], number)
        assert after.state() == whole.state()
    after.restore({})
    assert after.state() == SpikeDetector(StabilityConfig(), CPU).state()


def test_bad_steps_must_follow_each_other_to_be_too_many():
    watch = SpikeDetector(StabilityConfig(max_consecutive_bad=3), CPU)
    lost = []
    for number, kept in enumerate((0, 0, 1, 0, 1, 0, 0, 0, 1)):
        watch.send(number, 32 * number, told(math.nan, 1.0, bool(kept)))
        watch.read()
        lost.append(watch.should_roll_back)
    assert lost == [False] * 7 + [True, False]


def test_a_gpu_is_read_two_steps_later_and_never_waited_for_sooner(monkeypatch):
    """The device is played: what it was asked is ready once it was waited for."""
    waited: list[int] = []

    class Event:
        made = 0

        def record(self) -> None:
            Event.made += 1
            self.number = Event.made

        def synchronize(self) -> None:
            waited.append(self.number)

    monkeypatch.setattr(spikes.torch.cuda, "Event", Event)
    watch = SpikeDetector(StabilityConfig(window=16), torch.device("cuda"))
    for number in range(1, 21):
        before = watch.limits
        watch.send(number, 32 * (number - 1), told(1.0, 1.0))
        seen = watch.read()
        assert [one.step for one in seen] == ([number - 2] if number > 2 else [])
        assert waited == list(range(1, number - 1))
        assert math.isfinite(before[0]) == (number > 18)  # set by steps 1 .. 16, after step 18
    last = watch.read(wait=True)
    assert [one.step for one in last] == [19, 20]
    assert [one.limits for one in last] == [(2.0, math.exp(2))] * 2  # those that stood when the step was taken
    assert watch.read(wait=True) == []


# The record


def record(step: int, position: int, loss: float = math.nan) -> StepRecord:
    return StepRecord(step, position, False, loss, 1.0, (2.0, 2.0))


def test_the_record_names_what_was_kept_out_and_what_is_passed_over(tmp_path):
    passed = SkippedSteps(tmp_path, 0)
    passed.write()
    assert not (tmp_path / SKIPPED_STEPS).exists()  # nothing to tell
    passed.add(record(3, 64), ["a", "b"])
    passed.add(record(9, 256, loss=5.0), ["c"], rollback=1)
    passed.write()
    lines = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / SKIPPED_STEPS).read_text().splitlines()
    ]
    assert lines == read_skipped_steps(tmp_path) == passed.records
    assert lines[0] == {
        "step": 3, "position": 64, "outcome": "skipped", "why": "the loss is not a number",
        "loss": None, "gradient_norm": 1.0, "samples": ["a", "b"],
    }  # fmt: skip
    assert "above the limit of 2" in lines[1]["why"]
    assert (passed.positions, passed.count, passed.rollbacks) == ({256}, 1, 1)
    again = SkippedSteps(tmp_path, 2)  # a run gone on from step 2 meets step 3 again, but never the batch at 256
    assert (again.positions, again.count) == ({256}, 0)
    assert SkippedSteps(tmp_path, 3).records == lines


def test_a_damaged_line_of_the_record_is_left_out(tmp_path):
    passed = SkippedSteps(tmp_path, 0)
    passed.add(record(9, 256), ["c"], rollback=1)
    passed.write()
    with (tmp_path / SKIPPED_STEPS).open("a") as file:
        file.write('{"step": 4, "posi')
    assert SkippedSteps(tmp_path, 9).positions == {256}


# Runs

WINDOW = ("training.stability.window=16", "training.stability.max_consecutive_bad=4")
BATCH = 32


def spoil(monkeypatch, factors: dict[int, float]) -> None:
    """Multiply the latents of the batches at these positions."""
    prepare = step.prepare_batch

    def spoilt(batch, task, device):
        x0, condition, position = prepare(batch, task, device)
        return x0 * factors.get(int(batch.position[0]), 1.0), condition, position

    monkeypatch.setattr(step, "prepare", spoilt)


def damage(monkeypatch, harms: Callable[[int], bool]) -> None:
    """Multiply the weights by 30 after each step whose batch starts at such a position."""
    train_step = loop.train_step

    def damaged(learner, batch, *rest):
        told = train_step(learner, batch, *rest)
        if harms(int(batch.position[0])):
            with torch.no_grad():
                for weight in learner.network.parameters():
                    weight.mul_(30)
        return told

    monkeypatch.setattr(loop, "train_step", damaged)


def tell_to_pass_over(run: Path, positions: Iterable[int]) -> None:
    """What a run finds that is begun with this record."""
    run.mkdir(parents=True)
    passed = SkippedSteps(run, 0)
    for position in positions:
        passed.add(record(1, position), [], rollback=0)
    passed.write()


def trained_part(state: dict[str, Any]) -> dict[str, Any]:
    """Weights and the optimizer's memory, without averages and place."""
    return {name: value for name, value in state.items() if "weights/" in name or "optimizer/" in name}


def untimed(run: Path) -> list[dict]:
    """The log without what differs from time to time, and without the count of what went wrong."""
    timed = ("images_per_second", "utilisation", "stalled", "memory", "rollbacks", "kept_out")
    return [{name: value for name, value in one.items() if name not in timed} for one in read_log(run)]


@pytest.mark.parametrize(
    "changes",
    [
        (),
        pytest.param(("diffusion.variance=posterior",), marks=pytest.mark.slow),
        pytest.param(("process={kind: flow}",), marks=pytest.mark.slow),
        ("training.optimizer={kind: muon, learning_rate: 0.01, adamw_learning_rate: 0.004}",),
    ],
    ids=["learned-variance", "posterior", "flow", "muon"],
)
def test_no_step_of_a_healthy_run_is_kept_out(tiny, changes):
    run = loop.train(tiny("run", "training.steps=200", "network.hidden_size=32", "training.optimizer.learning_rate=0.004",
                          "training.optimizer.warmup_steps=20", *WINDOW[:1], *changes))  # fmt: skip
    assert [one["kept_out"] for one in read_log(run)] == [0] * 200
    assert not (run / SKIPPED_STEPS).exists()
    kept = read_state(bundle.checkpoints(run)[0]).spike_detector
    assert kept["kept"] == 200
    assert all(math.isfinite(limit) for limit in kept["limits"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_batch_that_is_not_a_number_is_as_if_it_had_never_been(tiny, state, monkeypatch, capsys, optimizer):
    changes = (
        f"training.optimizer={{kind: {optimizer}, learning_rate: 0.001}}",
        "training.optimizer.lr_schedule=constant",
    )
    tell_to_pass_over(Path(tiny("without").output), [2 * BATCH])
    without = loop.train(tiny("without", *changes, "training.steps=5"))
    spoil(monkeypatch, {2 * BATCH: math.nan})
    capsys.readouterr()
    run = loop.train(tiny("run", *changes, "training.steps=6"))
    assert "step 3 is kept out of the weights: the loss is not a number" in capsys.readouterr().err
    assert trained_part(state(run)) == trained_part(state(without))
    assert len(trained_part(state(run))) > 10
    assert [one["kept_out"] for one in read_log(run)] == [0, 0, 1, 1, 1, 1]
    assert ["loss" in one for one in read_log(run)] == [True, True, False, True, True, True]
    (only,) = read_skipped_steps(run)
    source = tiny("run").data.open()
    names = [source.name(int(index)) for index in loop.build_run(tiny("other")).loader.order.batch(2 * BATCH)]
    assert only == {
        "step": 3, "position": 2 * BATCH, "outcome": "skipped", "why": "the loss is not a number",
        "loss": None, "gradient_norm": None, "samples": names,
    }  # fmt: skip


def test_a_spike_is_kept_out(tiny, state, monkeypatch):
    tell_to_pass_over(Path(tiny("without").output), [20 * BATCH])
    without = loop.train(tiny("without", *WINDOW, "training.steps=23"))
    spoil(monkeypatch, {20 * BATCH: 100.0})
    run = loop.train(tiny("run", *WINDOW, "training.steps=24"))
    (only,) = read_skipped_steps(run)
    assert (only["step"], only["position"], only["outcome"]) == (21, 20 * BATCH, "skipped")
    assert re.match(r"the loss is \d+(\.\d+)?, above the limit of", only["why"])
    assert only["loss"] > 50 * read_log(run)[19]["loss"]
    assert trained_part(state(run)) == trained_part(state(without))
    watches = [read_state(bundle.checkpoints(one)[0]).spike_detector for one in (run, without)]
    assert watches[0] == watches[1]


def test_without_the_watch_the_spike_is_learned(tiny, monkeypatch):
    spoil(monkeypatch, {20 * BATCH: 100.0})
    run = loop.train(tiny("run", *WINDOW, "training.stability.spike_threshold=null", "training.steps=24"))
    assert read_skipped_steps(run) == []
    assert read_log(run)[20]["loss"] > 50 * read_log(run)[19]["loss"]


GOES_BACK = (*WINDOW, "training.steps=40", "training.checkpoint_every=8", "training.keep_last=9",
             "training.optimizer.learning_rate=0.004", "training.health_every=4")  # fmt: skip
EARLY, LATE = 23 * BATCH, 27 * BATCH  # of steps 24, the last that a checkpoint knows of, and 28, between two of them


def test_damaged_weights_are_left_behind(tiny, state, monkeypatch, capsys):
    """Back to the last checkpoint, past the batches that did the harm, and on as a run that never meets them."""
    damage(monkeypatch, LATE.__eq__)
    run = loop.train(tiny("run", *GOES_BACK))
    said = capsys.readouterr().err
    assert re.search(r"bad steps in a row: 4, the last because .*: back to step 24 and past the batches before step 32 "
                     r"\(try 1 of 3\)", said)  # fmt: skip
    passed = read_skipped_steps(run)
    assert {(one["outcome"], one["rollback"]) for one in passed} == {("passed over", 1)}
    assert [one["position"] for one in passed] == list(range(LATE, LATE + 5 * BATCH, BATCH))
    assert all(len(one["samples"]) == BATCH for one in passed)
    monkeypatch.undo()
    tell_to_pass_over(Path(tiny("told").output), [one["position"] for one in passed])
    knew = loop.train(tiny("told", *GOES_BACK))
    assert state(run) == state(knew)
    assert untimed(run) == untimed(knew)
    assert [one["rollbacks"] for one in read_log(run)] == [0] * 24 + [1] * 16
    assert [one["step"] for one in read_log(run, "health.jsonl")] == list(range(4, 41, 4))
    assert [path.name for path in bundle.checkpoints(run)] == [path.name for path in bundle.checkpoints(knew)]


def test_a_checkpoint_that_holds_the_damage_is_left_behind_too(tiny, state, monkeypatch, capsys):
    """The harm is done by the very step that is saved; the second try passes over what came before the checkpoint."""
    damage(monkeypatch, EARLY.__eq__)
    run = loop.train(tiny("run", *GOES_BACK))
    said = capsys.readouterr().err
    assert re.findall(r"back to step (\d+) .* \(try (\d)", said) == [("24", "1"), ("16", "2")]
    passed = {one["position"] for one in read_skipped_steps(run)}
    assert EARLY in passed
    assert len(passed) == len(read_skipped_steps(run))
    monkeypatch.undo()
    tell_to_pass_over(Path(tiny("told").output), passed)
    assert state(run) == state(loop.train(tiny("told", *GOES_BACK)))


@pytest.mark.parametrize("stops", [34, 36])
def test_a_run_asked_to_stop_amid_the_trouble_ends_as_one_that_was_not(tiny, state, monkeypatch, stops):
    """Weights that may be bad are saved then, but not gone back to."""
    harm = 32 * BATCH
    damage(monkeypatch, harm.__eq__)
    whole = loop.train(tiny("whole", *GOES_BACK))
    damaged = loop.train_step

    def stopped(learner, batch, *rest):
        if int(batch.position[0]) == (stops - 1) * BATCH:
            monkeypatch.setattr(loop, "train_step", damaged)
            os.kill(os.getpid(), signal.SIGTERM)
        return damaged(learner, batch, *rest)

    monkeypatch.setattr(loop, "train_step", stopped)
    with pytest.raises(loop.Interrupted, match=f"stopped at step {stops}"):
        loop.train(tiny("run", *GOES_BACK))
    run = loop.train(tiny("run", *GOES_BACK))
    assert state(run) == state(whole)
    assert read_skipped_steps(run) == read_skipped_steps(whole)


def test_a_run_does_not_end_with_weights_that_the_last_step_found_bad(tiny, state, monkeypatch, capsys):
    damage(monkeypatch, (38 * BATCH).__eq__)
    run = loop.train(tiny("run", *GOES_BACK))
    assert "bad steps in a row: 1," in capsys.readouterr().err
    passed = [one["position"] for one in read_skipped_steps(run)]
    assert 38 * BATCH in passed
    monkeypatch.undo()
    tell_to_pass_over(Path(tiny("told").output), passed)
    assert state(run) == state(loop.train(tiny("told", *GOES_BACK)))


def test_damage_that_always_returns_ends_the_run_with_a_diagnosis_and_it_can_go_on(tiny, state, monkeypatch, tmp_path):
    damage(monkeypatch, LATE.__le__)
    run = tmp_path / "run"
    for _ in range(2):  # the same command finds the same
        with pytest.raises(TesseraError) as caught:
            loop.train(tiny("run", *GOES_BACK))
        said = str(caught.value)
        assert re.search(r"training diverged at step \d+: the .*, 4 steps in a row, and going back 3 times", said)
        assert "lower training.optimizer.learning_rate" in said
        newest = bundle.checkpoints(run)[0]
        assert newest.name in said
        assert checkpoint.verify(newest) == []
    passed = {one["position"] for one in read_skipped_steps(run) if one["outcome"] == "passed over"}
    assert LATE in passed
    monkeypatch.undo()
    loop.train(tiny("run", *GOES_BACK))
    tell_to_pass_over(tmp_path / "told", passed)
    assert state(run) == state(loop.train(tiny("told", *GOES_BACK)))


def test_trouble_after_a_window_of_good_steps_is_other_trouble():
    passed = SkippedSteps(Path("nowhere"), 0)
    assert passed.positions_of_rollbacks(5, 16) == []
    for rollback, (at, position) in enumerate(((10, 64), (20, 128), (15, 96), (40, 640)), start=1):
        passed.add(record(at, position), [], rollback)
    assert passed.positions_of_rollbacks(56, 16) == [[640]]
    assert passed.positions_of_rollbacks(57, 16) == []
    passed.records.pop()
    assert passed.positions_of_rollbacks(36, 16) == [[64], [128], [96]]


class Killed(BaseException):
    """As near to SIGKILL as a test comes that goes on: nothing handles it."""


def dies(*_: object) -> None:
    raise Killed


IN_SUITE = ((LATE, "five steps later"), (EARLY, "write"))
PROVED = [
    (harm, at)
    for harm in (LATE, EARLY)
    for at in ("drop_after", "write", "rewind", "the next step", "five steps later")
    if (harm, at) not in IN_SUITE
]


@pytest.mark.parametrize(("harm", "at"), [*IN_SUITE, *(pytest.param(*one, marks=pytest.mark.slow) for one in PROVED)])
def test_a_run_killed_while_it_goes_back_ends_as_one_that_was_not(tiny, state, monkeypatch, at, harm):
    damage(monkeypatch, harm.__eq__)
    whole = state(loop.train(tiny("whole", *GOES_BACK)))
    go_back, left = loop.Training._go_back, [1 if harm == LATE else 2]

    def watched(self: loop.Training, seen: StepRecord) -> None:
        left[0] -= 1
        if left[0] == 0:
            patched = {"drop_after": checkpoint, "write": self.passed, "rewind": self.journal}
            if at in patched:
                patch.setattr(patched[at], at, dies)
            else:
                later, train_step = [0 if at == "the next step" else 5], loop.train_step
                patch.setattr(loop, "train_step", lambda *given: dies() if counted(later) else train_step(*given))
        go_back(self, seen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Training, "_go_back", watched)
        with pytest.raises(Killed):
            loop.train(tiny("run", *GOES_BACK))
    run = loop.train(tiny("run", *GOES_BACK))
    assert state(run) == whole


def counted(left: list[int]) -> bool:
    """Whether it was asked so many times before."""
    left[0] -= 1
    return left[0] < 0


@pytest.mark.parametrize(
    ("change", "anew"),
    [("training.optimizer.learning_rate=0.002", True), ("training.global_batch_size=16", True), ("training.label_dropout=0", True),
     ("training.steps=30", False), ("training.seed=1", False)],
)  # fmt: skip
def test_going_on_with_other_losses_sets_limits_anew(tiny, change, anew):
    loop.train(tiny("run", *WINDOW, "training.steps=20"))
    run = loop.train(tiny("run", *WINDOW, "training.steps=30", change))
    watch = read_state(bundle.checkpoints(run)[0]).spike_detector
    assert watch["kept"] == (10 if anew else 30)
    assert (watch["limits"] == [None, None]) == anew
