"""The rendered lanes: functions of split and index, exact, without overlap of the splits and with held-out speeds."""

import hashlib
from collections import Counter
from typing import Literal, get_args

import numpy as np
import pytest

from tessera.data import LanesConfig
from tessera.data.lanes import (
    BACKGROUND,
    BAR,
    BAR_COLUMNS,
    COLORS,
    GRID,
    HELD_OUT_PAIRS,
    HELD_OUT_SPEEDS,
    HIGH,
    LANE,
    LOW,
    PERIOD,
    RADIUS,
    SPEEDS,
    WIDTH,
    Combinations,
    Disc,
    allowed_speeds,
    coverage,
    positions,
    render_clip,
)

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def discs(combinations: Combinations, split: Split = "train", count: int = 2000) -> list[Disc]:
    dataset = LanesConfig(combinations=combinations, split=split, count=count).open()
    return [dataset.discs(index)[0] for index in range(count)]


def test_clips_are_what_the_loader_expects():
    config = LanesConfig(count=3, lanes=4)
    dataset = config.open()
    assert (config.size, config.frames, config.channels, config.hflip) == ((32, 32), 24, 3, False)
    assert (dataset.pixels(2).shape, dataset.pixels(2).dtype) == ((3, 24, 32, 32), np.uint8)
    assert LanesConfig(frames=5).open().pixels(0).shape == (3, 5, LANE, WIDTH)
    assert dataset.name(2) == "lanes train 2"
    assert len(dataset) == 3
    for index in range(3):
        assert dataset.class_names[dataset.label(index)] == dataset.discs(index)[0].color


@pytest.mark.parametrize("split", SPLITS)
def test_a_clip_depends_on_split_and_index_only(split):
    many, few = (LanesConfig(split=split, count=count).open() for count in (500, 40))
    for index in (39, 0, 17):
        assert many.discs(index) == few.discs(index)
        np.testing.assert_array_equal(many.pixels(index), few.pixels(index))
    more_frames = LanesConfig(split=split, frames=30).open().pixels(3)
    np.testing.assert_array_equal(more_frames[:, :24], many.pixels(3))


def test_the_clips_never_change():
    """Otherwise a model could be scored on clips that another version used for training."""
    digest = hashlib.sha256()
    for config in (
        LanesConfig(split="train", combinations="known", count=40, lanes=2),
        LanesConfig(split="test", combinations="all", count=40, lanes=2),
        LanesConfig(split="test", combinations="held-out-pairs", count=40, lanes=2),
    ):
        dataset = config.open()
        for index in range(40):
            digest.update(dataset.pixels(index).tobytes())
    assert digest.hexdigest()[:16] == "75d37a8dc3337519"


def test_no_clip_is_in_both_splits():
    """A start in one split is never one in the other, and no other start has its center."""
    starts = [{round(disc.start * GRID) for disc in discs("all", split)} for split in SPLITS]
    assert {start % 2 for start in starts[0]} == {0}
    assert {start % 2 for start in starts[1]} == {1}
    assert (PERIOD * GRID) % 2 == 0  # so the opposite phase has the same parity
    train, test = (LanesConfig(split=split, count=600).open() for split in SPLITS)
    both = [{dataset.pixels(index).tobytes() for index in range(600)} for dataset in (train, test)]
    assert [len(part) for part in both] == [600, 600]
    assert not both[0] & both[1]


# Speeds and colors


def test_speeds_starts_and_colors_are_evenly_spread():
    everything = discs("all", count=4000)
    speeds, starts = (np.array([getattr(disc, name) for disc in everything]) for name in ("speed", "start"))
    assert np.histogram(speeds, 6, SPEEDS)[0] / 4000 == pytest.approx(np.full(6, 1 / 6), abs=0.03)
    assert np.histogram(starts, 4, (0, PERIOD))[0] / 4000 == pytest.approx(np.full(4, 1 / 4), abs=0.03)
    assert set(Counter(disc.color for disc in everything).values()) == {500}


def is_held_out(disc: Disc) -> tuple[bool, bool]:
    low, high = HELD_OUT_PAIRS.get(disc.color, (0, 0))
    return HELD_OUT_SPEEDS[0] <= disc.speed < HELD_OUT_SPEEDS[1], low <= disc.speed < high


def test_held_out_speeds_and_pairs_never_occur_in_known_clips():
    known = discs("known", count=4000)
    assert not any(any(is_held_out(disc)) for disc in known)
    assert all(is_held_out(disc)[0] for disc in discs("held-out-speeds"))
    pairs = discs("held-out-pairs")
    assert all(is_held_out(disc)[1] for disc in pairs)
    assert {disc.color for disc in pairs} == set(HELD_OUT_PAIRS)
    for low, high in HELD_OUT_PAIRS.values():  # each of these speeds occurs with other colors
        assert len({disc.color for disc in known if low <= disc.speed < high}) == 6
    assert {disc.color for disc in known} == set(COLORS)
    assert any(any(is_held_out(disc)) for disc in discs("all"))


@pytest.mark.parametrize("color", COLORS)
def test_the_allowed_speeds_are_what_nothing_holds_out(color):
    total = sum(high - low for low, high in allowed_speeds(color, "known"))
    pair = HELD_OUT_PAIRS.get(color, (0, 0))
    expected = SPEEDS[1] - SPEEDS[0] - (HELD_OUT_SPEEDS[1] - HELD_OUT_SPEEDS[0]) - (pair[1] - pair[0])
    assert total == pytest.approx(expected)


# Motion and images


def test_a_disc_moves_at_constant_speed_and_is_reflected_by_the_walls():
    path = positions(5.0 + 1.5 * np.arange(60))
    assert path.min() >= LOW
    assert path.max() <= HIGH
    steps = np.abs(np.diff(path))
    assert np.median(steps) == pytest.approx(1.5)
    assert (np.diff(np.sign(np.diff(path))) != 0).sum() >= 3
    assert positions(np.array([0, PERIOD / 2, PERIOD])) == pytest.approx([LOW, HIGH, LOW])


@pytest.mark.parametrize("center", [LOW, 5.3, 9.1, 25.77, HIGH])
def test_coverage_is_the_exact_area_in_each_pixel(center):
    """Against 64 x 64 samples of each pixel."""
    samples = 64
    x, y = ((np.arange(size * samples) + 0.5) / samples for size in (WIDTH, LANE))
    inside = (x - center) ** 2 + (y[:, None] - LANE / 2) ** 2 <= RADIUS**2
    expected = inside.reshape(LANE, samples, WIDTH, samples).mean((1, 3))
    expected[:, BAR_COLUMNS] = 0
    np.testing.assert_allclose(coverage(np.array([center]))[0], expected, atol=0.003)


def test_the_bar_hides_the_disc():
    clip = render_clip((Disc("red", 10.0, 1.0), Disc("white", 23.0, 0.8)), 24)
    assert (clip[..., BAR_COLUMNS] == BAR).all()
    assert (clip[:, 4, :LANE] == render_clip((Disc("blue", 10.0, 1.0),), 24)[:, 4]).all()  # both behind the bar
    assert (clip[:, 0, LANE:, 24:28].reshape(3, -1) == np.array(COLORS["white"])[:, None]).sum() > 40
    assert (clip[:, 0, :, :3] == BACKGROUND).all()


def test_a_shift_by_whole_pixels_shifts_the_image():
    one, other = (render_clip((Disc("green", start, 0.0),), 1)[:, 0, :, :10] for start in (0.375, 2.375))
    np.testing.assert_array_equal(one[:, :, :6], other[:, :, 2:8])
