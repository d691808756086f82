"""The log of a run, and its lines without a terminal."""

import json
import time

import pytest

from tessera.monitoring import logger
from tessera.monitoring.logger import MetricLogger, read_log


def test_records_are_read_back_in_order(tmp_path):
    written = MetricLogger(tmp_path, 0, 10, tensorboard=False)
    written.record(1, loss=0.5, images_per_second=3.0)
    written.record(2, loss=0.25, images_per_second=3.0)
    written.close()
    assert [(record["step"], record["loss"]) for record in read_log(tmp_path)] == [(1, 0.5), (2, 0.25)]


def test_a_record_is_written_immediately(tmp_path):
    written = MetricLogger(tmp_path, 0, 10, tensorboard=False)
    written.record(1, loss=0.5, images_per_second=3.0)
    assert len(read_log(tmp_path)) == 1
    written.close()


def test_resuming_removes_later_and_incomplete_records(tmp_path):
    lines = [json.dumps({"step": step, "loss": step / 10}) for step in (2, 4, 6)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "lo')
    resumed = MetricLogger(tmp_path, 4, 10, tensorboard=False)
    resumed.record(6, loss=0.7, images_per_second=1.0)
    resumed.close()
    assert [(record["step"], record["loss"]) for record in read_log(tmp_path)] == [(2, 0.2), (4, 0.4), (6, 0.7)]


def test_a_missing_log_has_no_records(tmp_path):
    assert read_log(tmp_path) == []


def test_without_a_terminal_a_line_has_step_loss_speed_and_time_left(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(logger.time, "monotonic", lambda: now[0])
    metrics = MetricLogger(tmp_path, 0, 100, tensorboard=False)
    for step in range(1, 101):
        now[0] += 1
        if step % 10 == 0:
            metrics.record(step, loss=1 / step, images_per_second=64.0)
        metrics.advance(step)
    metrics.close()
    lines = capsys.readouterr().err.splitlines()
    assert 100 / logger.LINE_INTERVAL - 2 <= len(lines) <= 100 / logger.LINE_INTERVAL + 2
    assert lines[-1].split("  ") == ["step 100/100", "loss 0.0100, 64 images/s", "0 s left"]
    middle = next(line for line in lines if line.startswith("step 5"))
    assert middle.split("  ")[2] == f"{100 - int(middle.split('/')[0].split()[1])} s left"


def test_time_left_counts_from_the_resumed_step(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logger.time, "monotonic", lambda: now[0])
    resumed = MetricLogger(tmp_path, 900, 1000, tensorboard=False)
    now[0] = 100.0
    resumed.advance(910)
    resumed.close()
    assert "15 min 0 s left" in capsys.readouterr().err


def test_tensorboard_gets_the_metrics_and_resuming_purges_later_ones(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = MetricLogger(tmp_path, 0, 10, tensorboard=True)
    for step in (1, 2, 3):
        first.record(step, loss=step / 10, images_per_second=1.0)
    first.close()
    # TensorBoard reads files by name: seconds, then a counter as text, where "10" is before "9".
    time.sleep(1.1)
    second = MetricLogger(tmp_path, 1, 10, tensorboard=True)
    for step in (2, 3):
        second.record(step, loss=step / 100, images_per_second=1.0)
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    values = [(event.step, round(event.value, 3)) for event in events.Scalars("loss")]
    assert values == [(1, 0.1), (2, 0.02), (3, 0.03)]
