"""The limits of the spike detector, and the record of skipped steps."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from tessera.monitoring import spikes
from tessera.monitoring.spikes import (
    SKIPPED_STEPS,
    SkippedSteps,
    SpikeDetector,
    StabilityConfig,
    StepRecord,
    read_skipped_steps,
)

CPU = torch.device("cpu")


def send(detector: SpikeDetector, step: int, loss: float, norm: float, applied: bool = True) -> None:
    detector.send(step, 32 * (step - 1), *(torch.tensor(float(value)) for value in (applied, loss, norm)))


def process(
    detector: SpikeDetector, losses: Iterable[float], norms: Iterable[float], first: int = 1
) -> list[StepRecord]:
    """Send steps, each of them applied if it is within the current limits."""
    records = []
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=first):
        loss, norm = float(loss), float(norm)
        applied = bool(loss <= detector.limits[0] and norm <= detector.limits[1])  # False for nan
        send(detector, step, loss, norm, applied)
        records += detector.read()
    return records


def heavy_tailed(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Decreasing losses and constant gradient norms, both log-normal, as float32."""
    rng = np.random.default_rng(seed)
    losses = (0.05 + np.exp(-np.arange(count) / 200)) * rng.lognormal(0, 0.4, count)
    return losses.astype(np.float32), rng.lognormal(0, 1, count).astype(np.float32)


# Limits


@pytest.mark.parametrize(("count", "window"), [(16, 16), (64, 256), (100, 64), (255, 256), (1000, 256)])
@pytest.mark.parametrize("threshold", [3.0, 20.0])
def test_limits_are_robust_deviations_above_the_median_of_recent_steps(count, window, threshold):
    losses, norms = heavy_tailed(count)
    detector = SpikeDetector(StabilityConfig(window=window, spike_threshold=1e6), CPU)
    process(detector, losses, norms)
    detector.config = StabilityConfig(window=window, spike_threshold=threshold)
    detector._update_limits()
    last, last_norms = losses[-window:].astype(float), np.log(norms[-window:].astype(float))
    spread = max(stats.median_abs_deviation(last, scale="normal"), 0.05 * np.median(last))
    log_spread = max(stats.median_abs_deviation(last_norms, scale="normal"), 0.1)
    assert detector.limits[0] == pytest.approx(np.median(last) + threshold * spread, rel=1e-5)
    assert detector.limits[1] == pytest.approx(np.exp(np.median(last_norms) + threshold * log_spread), rel=1e-4)


@pytest.mark.parametrize(("window", "first"), [(16, 16), (64, 16), (256, 64), (300, 80)])
def test_there_are_no_limits_for_a_quarter_of_a_window(window, first):
    detector = SpikeDetector(StabilityConfig(window=window), CPU)
    for count in range(1, first + 1):
        assert detector.limits == (math.inf, math.inf)
        process(detector, [1.0], [1.0], count)
    assert math.isfinite(sum(detector.limits))


def test_twice_the_loss_and_seven_times_the_gradient_norm_are_never_spikes():
    detector = SpikeDetector(StabilityConfig(), CPU)
    process(detector, [0.5] * 64, [3.0] * 64)
    assert detector.limits == pytest.approx((1.0, 3 * math.exp(2)))


def test_spikes_in_the_window_hardly_change_the_limits():
    losses, norms = heavy_tailed(400)
    few = np.arange(400) % 10 == 3
    limits = []
    for factor in (1, 1e6):
        detector = SpikeDetector(StabilityConfig(spike_threshold=1e9), CPU)  # so that all are applied
        process(detector, np.where(few, factor * losses, losses), np.where(few, factor * norms, norms))
        detector.config = StabilityConfig()
        detector._update_limits()
        limits.append(detector.limits)
    assert limits[1][0] < 1.5 * limits[0][0]
    assert math.log(limits[1][1]) < 1.5 * math.log(limits[0][1])


@pytest.mark.parametrize("seed", range(3))
def test_heavy_tailed_steps_without_spikes_are_all_applied(seed):
    assert all(record.applied for record in process(SpikeDetector(StabilityConfig(), CPU), *heavy_tailed(4000, seed)))


@pytest.mark.parametrize(
    ("factors", "reason"),
    [((100, 1), "the loss is .*, above the limit of "), ((1, 1e9), "the gradient norm is .*, above the limit of "),
     ((math.nan, 1), "the loss is not finite"), ((1, math.inf), "the gradient norm is not finite")],
)  # fmt: skip
def test_a_spike_is_the_only_skipped_step_and_is_not_in_the_window(factors, reason):
    losses, norms = heavy_tailed(600)
    losses[500], norms[500] = losses[500] * factors[0], norms[500] * factors[1]
    detector = SpikeDetector(StabilityConfig(), CPU)
    bad = [record for record in process(detector, losses, norms) if not record.applied]
    assert [record.step for record in bad] == [501]
    assert re.match(reason, bad[0].reason)
    assert detector.state()["losses"] == np.delete(losses, 500)[-256:].tolist()
    assert detector.state()["grad_norms"] == np.delete(norms, 500)[-256:].tolist()


def test_without_a_threshold_there_are_no_limits():
    detector = SpikeDetector(StabilityConfig(spike_threshold=None), CPU)
    losses, norms = heavy_tailed(600)
    process(detector, losses * np.where(np.arange(600) > 300, 1e6, 1), norms)
    assert detector.limits == (math.inf, math.inf)


def test_a_restored_state_gives_the_same_limits_bit_for_bit():
    losses, norms = heavy_tailed(900)
    losses[450] = math.nan
    for stop in (0, 10, 64, 100, 451, 777):
        whole, before = (SpikeDetector(StabilityConfig(), CPU) for _ in range(2))
        process(whole, losses[:stop], norms[:stop])
        process(before, losses[:stop], norms[:stop])
        after = SpikeDetector(StabilityConfig(), CPU)
        after.restore(json.loads(json.dumps(before.state(), allow_nan=False)))
        for number in range(stop, 900):
            assert (after.limits, after.consecutive_bad) == (whole.limits, whole.consecutive_bad)
            process(whole, losses[number : number + 1], norms[number : number + 1], number)
            process(after, losses[number : number + 1], norms[number : number + 1], number)
        assert after.state() == whole.state()
    after.restore({})
    assert after.state() == SpikeDetector(StabilityConfig(), CPU).state()


def test_a_rollback_needs_consecutive_bad_steps():
    detector = SpikeDetector(StabilityConfig(max_consecutive_bad=3), CPU)
    rollbacks = []
    for number, applied in enumerate((0, 0, 1, 0, 1, 0, 0, 0, 1)):
        send(detector, number, math.nan, 1.0, bool(applied))
        detector.read()
        rollbacks.append(detector.should_roll_back)
    assert rollbacks == [False] * 7 + [True, False]


def test_results_of_a_gpu_are_read_two_steps_later(monkeypatch):
    """With fake events that record when they are waited for."""
    waited: list[int] = []

    class Event:
        count = 0

        def record(self) -> None:
            Event.count += 1
            self.number = Event.count

        def synchronize(self) -> None:
            waited.append(self.number)

    monkeypatch.setattr(spikes.torch.cuda, "Event", Event)
    detector = SpikeDetector(StabilityConfig(window=16), torch.device("cuda"))
    for number in range(1, 21):
        before = detector.limits
        send(detector, number, 1.0, 1.0)
        assert [record.step for record in detector.read()] == ([number - 2] if number > 2 else [])
        assert waited == list(range(1, number - 1))
        assert math.isfinite(before[0]) == (number > 18)  # set from steps 1 .. 16, after step 18
    last = detector.read(wait=True)
    assert [record.step for record in last] == [19, 20]
    assert [record.limits for record in last] == [(2.0, math.exp(2))] * 2  # the limits at the time of the step
    assert detector.read(wait=True) == []


# The record


def record(step: int, position: int, loss: float = math.nan) -> StepRecord:
    return StepRecord(step, position, False, loss, 1.0, (2.0, 2.0))


def test_the_record_has_skipped_and_excluded_batches(tmp_path):
    skipped = SkippedSteps(tmp_path, 0)
    skipped.write()
    assert not (tmp_path / SKIPPED_STEPS).exists()  # nothing to write
    skipped.add(record(3, 64), ["a", "b"])
    skipped.add(record(9, 256, loss=5.0), ["c"], rollback=1)
    skipped.write()
    lines = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / SKIPPED_STEPS).read_text().splitlines()
    ]
    assert lines == read_skipped_steps(tmp_path) == skipped.records
    assert lines[0] == {
        "step": 3, "position": 64, "outcome": "skipped", "reason": "the loss is not finite",
        "loss": None, "grad_norm": 1.0, "samples": ["a", "b"],
    }  # fmt: skip
    assert "above the limit of 2" in lines[1]["reason"]
    assert (skipped.positions, skipped.count, skipped.rollbacks) == ({256}, 1, 1)
    resumed = SkippedSteps(tmp_path, 2)  # step 3 will be repeated, the batch at 256 not
    assert (resumed.positions, resumed.count) == ({256}, 0)
    assert SkippedSteps(tmp_path, 3).records == lines


def test_a_damaged_line_of_the_record_is_ignored(tmp_path):
    skipped = SkippedSteps(tmp_path, 0)
    skipped.add(record(9, 256), ["c"], rollback=1)
    skipped.write()
    with (tmp_path / SKIPPED_STEPS).open("a") as file:
        file.write('{"step": 4, "posi')
    assert SkippedSteps(tmp_path, 9).positions == {256}


def test_rollbacks_before_a_window_of_good_steps_do_not_count():
    skipped = SkippedSteps(Path("nowhere"), 0)
    assert skipped.positions_of_rollbacks(5, 16) == []
    for rollback, (step, position) in enumerate(((10, 64), (20, 128), (15, 96), (40, 640)), start=1):
        skipped.add(record(step, position), [], rollback)
    assert skipped.positions_of_rollbacks(56, 16) == [[640]]
    assert skipped.positions_of_rollbacks(57, 16) == []
    skipped.records.pop()
    assert skipped.positions_of_rollbacks(36, 16) == [[64], [128], [96]]
