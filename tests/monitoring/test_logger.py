"""What a run tells: the log, and the lines on a screen that is none."""

import json

import pytest

from tessera.monitoring import logger
from tessera.monitoring.logger import MetricLogger, format_duration, read_log


def test_records_are_read_back_in_order(tmp_path):
    written = MetricLogger(tmp_path, 0, 10, tensorboard=False)
    written.record(1, loss=0.5, images_per_second=3.0)
    written.record(2, loss=0.25, images_per_second=3.0)
    written.close()
    assert [(record["step"], record["loss"]) for record in read_log(tmp_path)] == [(1, 0.5), (2, 0.25)]


def test_a_record_is_on_disk_at_once(tmp_path):
    written = MetricLogger(tmp_path, 0, 10, tensorboard=False)
    written.record(1, loss=0.5, images_per_second=3.0)
    assert len(read_log(tmp_path)) == 1
    written.close()


def test_resuming_drops_what_will_be_made_again_and_what_was_cut_short(tmp_path):
    lines = [json.dumps({"step": step, "loss": step / 10}) for step in (2, 4, 6)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "lo')
    resumed = MetricLogger(tmp_path, 4, 10, tensorboard=False)
    resumed.record(6, loss=0.7, images_per_second=1.0)
    resumed.close()
    assert [(record["step"], record["loss"]) for record in read_log(tmp_path)] == [(2, 0.2), (4, 0.4), (6, 0.7)]


def test_no_log_holds_no_records(tmp_path):
    assert read_log(tmp_path) == []


def test_without_a_terminal_a_line_tells_step_loss_speed_and_time_left(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(logger.time, "monotonic", lambda: now[0])
    told = MetricLogger(tmp_path, 0, 100, tensorboard=False)
    for step in range(1, 101):
        now[0] += 1
        if step % 10 == 0:
            told.record(step, loss=1 / step, images_per_second=64.0)
        told.advance(step)
    told.close()
    lines = capsys.readouterr().err.splitlines()
    assert 100 / logger.PAUSE - 2 <= len(lines) <= 100 / logger.PAUSE + 2
    assert lines[-1].split("  ") == ["step 100/100", "loss 0.0100, 64 images/s", "0 s left"]
    middle = next(line for line in lines if line.startswith("step 5"))
    assert middle.split("  ")[2] == f"{100 - int(middle.split('/')[0].split()[1])} s left"


def test_time_left_counts_from_where_the_run_went_on(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logger.time, "monotonic", lambda: now[0])
    told = MetricLogger(tmp_path, 900, 1000, tensorboard=False)
    now[0] = 100.0
    told.advance(910)
    told.close()
    assert "15 min 0 s left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "0 s"), (42, "42 s"), (59.9, "59 s"), (200, "3 min 20 s"), (18600, "5 h 10 min"), (183600, "2 d 3 h")],
)
def test_time_as_people_say_it(seconds, said):
    assert format_duration(seconds) == said


def test_tensorboard_gets_the_numbers_and_resuming_purges_what_will_be_made_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = MetricLogger(tmp_path, 0, 10, tensorboard=True)
    for step in (1, 2, 3):
        first.record(step, loss=step / 10, images_per_second=1.0)
    first.close()
    second = MetricLogger(tmp_path, 1, 10, tensorboard=True)
    for step in (2, 3):
        second.record(step, loss=step / 100, images_per_second=1.0)
    second.close()
    told = EventAccumulator(str(tmp_path / "tensorboard"))
    told.Reload()
    values = [(event.step, round(event.value, 3)) for event in told.Scalars("loss")]
    assert values == [(1, 0.1), (2, 0.02), (3, 0.03)]
