"""Schedules of the frames of a clip: which frame has which time in which step."""

import pytest
import torch

from tessera.sampling.frames import Autoregressive, Pyramid, Sliding, Together, given_mask

TIMES = torch.tensor([1.0, 0.6, 0.3, 0.0], dtype=torch.float64)
SCHEDULES = [
    Together(), Pyramid(), Pyramid(delay=3), Autoregressive(), Autoregressive(chunk=3), Autoregressive(window=4),
    Autoregressive(chunk=2, window=3), Sliding(window=3), Sliding(window=4, overlap=1), Sliding(window=20), Sliding(),
]  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("indices", [[], [0], [8], [0, 8], [3, 4], [0, 1, 2, 6]], ids=str)
def test_every_frame_that_is_not_given_takes_all_steps_once(schedule, indices):
    is_given, paths = given_mask(9, indices), [[] for _ in range(9)]
    current = torch.where(is_given, 0.0, 1.0).double()
    for stage in schedule.stages(TIMES, is_given, 5):
        frames = slice(stage.start, stage.stop)
        assert torch.equal(stage.times[0], current[frames])  # a stage begins where the others ended
        assert (stage.times.diff(dim=0) <= 0).all()
        moved = stage.times[0] > stage.times[-1]
        assert (stage.times[-1][moved] == 0).all()
        assert stage.sampled == [stage.start + int(frame) for frame in moved.nonzero()[:, 0]]
        for frame in stage.sampled:
            paths[frame] += stage.times[:, frame - stage.start].unique(sorted=True).flip(0).tolist()
        current[frames] = stage.times[-1]
    for frame, path in enumerate(paths):
        assert path == ([] if frame in indices else TIMES.tolist())


def test_together():
    [stage] = Together().stages(TIMES, given_mask(3, [1]), 3)
    assert stage.times.tolist() == [[time, 0, time] for time in TIMES.tolist()]


def test_pyramid():
    [stage] = Pyramid(delay=2).stages(TIMES, given_mask(4, [1]), 4)
    ends, one = [0.0] * 4, [1.0] * 2
    assert stage.times[:, 0].tolist() == TIMES.tolist() + ends
    assert stage.times[:, 1].tolist() == [0.0] * 8
    assert stage.times[:, 2].tolist() == one + TIMES.tolist() + ends[:2]
    assert stage.times[:, 3].tolist() == one + one + TIMES.tolist()


def test_autoregressive():
    stages = Autoregressive(chunk=2).stages(TIMES, given_mask(6, [0, 3]), 6)
    assert [stage.sampled for stage in stages] == [[1, 2], [4, 5]]
    assert [(stage.start, stage.stop) for stage in stages] == [(0, 6)] * 2
    first, second = (stage.times[1].tolist() for stage in stages)
    assert first == [0, 0.6, 0.6, 0, 1, 1]  # earlier frames are clean, later ones noise
    assert second == [0, 0, 0, 0, 0.6, 0.6]
    stages = Autoregressive(chunk=2, window=3).stages(TIMES, given_mask(6, []), 6)
    assert [(stage.start, stage.stop, stage.sampled) for stage in stages] == [
        (0, 3, [0, 1]), (1, 4, [2, 3]), (3, 6, [4, 5]),
    ]  # fmt: skip
    assert stages[0].times[1].tolist() == [0.6, 0.6, 1]
    assert stages[1].times[1].tolist() == [0, 0.6, 0.6]


@pytest.mark.parametrize(
    ("total", "windows"),
    [
        (10, [(0, 4), (3, 7), (6, 10)]),
        (9, [(0, 4), (3, 7), (5, 9)]),  # the last window ends with the clip
        (4, [(0, 4)]),
        (3, [(0, 3)]),
        (5, [(0, 4), (1, 5)]),
    ],
)
def test_sliding(total, windows):
    stages = Sliding(window=4, overlap=1).stages(TIMES, given_mask(total, []), 8)
    assert [(stage.start, stage.stop) for stage in stages] == windows
    for stage, before in zip(stages[1:], windows):
        assert stage.sampled == list(range(before[1], stage.stop))
        assert (stage.times[:, : before[1] - stage.start] == 0).all()


def test_the_default_window_is_that_of_the_training_with_half_of_it_given():
    stages = Sliding().stages(TIMES, given_mask(12, []), 6)
    assert [(stage.start, stage.stop) for stage in stages] == [(0, 6), (3, 9), (6, 12)]
