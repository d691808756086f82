"""The oracle of the lanes: exact on real clips, robust to small faults, and a law that each violation breaks."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tessera.data import LanesConfig
from tessera.data.lanes import BAR_COLUMNS, COLORS, Disc, positions, render_clip
from tessera.errors import TesseraError
from tessera.evaluation.distances import frechet
from tessera.evaluation.features import load_extractor
from tessera.evaluation.moments import Moments
from tessera.evaluation.toy.lane_reader import HIDDEN, INVALID, hidden_interval, path_colors, read_clips

ROOT = Path(__file__).parents[2]
FRAMES = np.arange(24)


@pytest.fixture(scope="module")
def dataset():
    return LanesConfig(split="test", count=200).open()


@pytest.fixture(scope="module")
def clips(dataset) -> np.ndarray:
    return np.stack([np.moveaxis(dataset.pixels(index), 0, -1) for index in range(200)])


def clip_of(*discs: Disc, frames: int = 24) -> np.ndarray:
    return np.moveaxis(render_clip(discs, frames), 0, -1)[None]


def test_real_clips_are_read_exactly(dataset, clips):
    readings = read_clips(clips)
    assert readings.lawful.all()
    assert 0.8 < readings.occluded.mean() < 0.95
    discs = [dataset.discs(index)[0] for index in range(200)]
    assert list(path_colors(readings)) == [disc.color for disc in discs]
    np.testing.assert_allclose(readings.speeds, [disc.speed for disc in discs], atol=0.01)
    paths = np.stack([positions(disc.start + disc.speed * FRAMES) for disc in discs])
    low, high = hidden_interval()
    assert np.nanmax(np.abs(readings.centers - paths)) < 0.3
    deep = np.abs(paths - (low + high) / 2) > (high - low) / 2 + 1.5  # discs of which half or more is visible
    assert np.nanmax(np.abs(readings.centers - paths)[deep]) < 0.05
    is_hidden = (low < paths) & (paths < high)
    edge = np.minimum(np.abs(paths - low), np.abs(paths - high)) < 0.3  # hardly visible: either reading is right
    assert ((readings.colors == HIDDEN) == is_hidden)[~edge].all()
    assert np.nanmean(readings.step_errors) < 0.04
    assert readings.steps.max() < 2.3


def test_every_lane_of_a_clip_is_read():
    dataset = LanesConfig(split="test", count=6, lanes=4).open()
    readings = read_clips(np.stack([np.moveaxis(dataset.pixels(index), 0, -1) for index in range(6)]))
    assert readings.lawful.shape == (24,)
    assert list(path_colors(readings)) == [disc.color for index in range(6) for disc in dataset.discs(index)]


def test_noise_and_blur_are_tolerated(clips):
    random = np.random.default_rng(0)
    noisy = np.clip(clips + random.normal(0, 10, clips.shape), 0, 255).astype(np.uint8)
    assert read_clips(noisy).lawful.mean() > 0.97
    soft = clips.astype(float)
    soft[..., 1:-1, :] = (soft[..., :-2, :] + 2 * soft[..., 1:-1, :] + soft[..., 2:, :]) / 4
    soft[..., BAR_COLUMNS, :] = clips[..., BAR_COLUMNS, :]
    assert read_clips(soft.astype(np.uint8)).lawful.mean() > 0.8


RED = Disc("red", 2.0, 1.2)  # enters the bar and leaves it


def test_the_law_holds_for_the_clip_that_is_then_broken():
    readings = read_clips(clip_of(RED))
    assert readings.lawful.all()
    assert readings.occluded.all()


@pytest.mark.parametrize(
    ("condition", "second"),
    [
        ("one_color", Disc("blue", 2.0, 1.2)),  # another color after the bar
        ("distances", Disc("red", 6.0, 1.2)),  # a jump of four pixels
        ("distances", Disc("red", -2.0 - 24 * 1.2, 1.2)),  # turns around behind the bar
        ("visible", None),  # never appears again
    ],
)
def test_each_violation_behind_the_bar_breaks_the_law(condition, second):
    """The disc is another one from the frame on in which it is hidden."""
    clip = clip_of(RED)
    hidden = int(np.argmax(read_clips(clip).colors[0] == HIDDEN))
    empty = clip_of(Disc("red", 13.0, 0.0))  # behind the bar
    clip[:, hidden + 2 :] = (empty if second is None else clip_of(second))[:, hidden + 2 :]
    readings = read_clips(clip)
    assert not readings.lawful.any()
    if condition == "distances":
        assert readings.distances[0] > 0.5 or not readings.visible[0]
        assert readings.one_color.all()
    else:
        assert not getattr(readings, condition).any()


def test_a_disc_that_vanishes_outside_the_bar_breaks_the_law():
    clip = clip_of(RED)
    clip[:, 2] = clip_of(Disc("red", 13.0, 0.0))[:, 0]
    readings = read_clips(clip)
    assert not readings.visible.any()
    assert not readings.lawful.any()


@pytest.mark.parametrize(("speed", "lawful"), [(0.0, False), (0.4, False), (0.8, True), (2.0, True), (2.4, False)])
def test_speeds_that_the_data_does_not_have_break_the_law(speed, lawful):
    readings = read_clips(clip_of(Disc("red", 3.0, speed)))
    assert readings.speeds[0] == pytest.approx(speed, abs=0.02)
    assert readings.lawful[0] == lawful


def test_a_frame_that_is_no_frame_of_lanes_is_invalid():
    two = clip_of(RED)
    two[:, 5] = np.where(two[:, 5] == two[:, 18], two[:, 5], np.minimum(two[:, 5], two[:, 18]))  # two discs at once
    before_bar = clip_of(RED)
    before_bar[:, 12, 2:6, 14:19] = COLORS["red"]  # a disc in front of the bar
    half = ((clip_of(RED)[:, 5:6].astype(int) + clip_of(RED)[:, 20:21]) // 2).astype(np.uint8)  # both half transparent
    for clip in (two, before_bar, np.concatenate((clip_of(RED)[:, :5], half, clip_of(RED)[:, 6:]), axis=1)):
        readings = read_clips(clip)
        assert (readings.colors == INVALID).sum() == 1
        assert not readings.readable.any()
        assert not readings.lawful.any()


def test_clips_without_any_disc():
    readings = read_clips(np.full((2, 24, 8, 32, 3), 128, np.uint8))
    assert not readings.lawful.any()
    assert list(path_colors(readings)) == [None, None]
    assert not len(readings.steps)


def test_other_clips_are_an_error():
    with pytest.raises(TesseraError, match=r"these are clips \[2, 3, 8, 8, 3\]; the reader of lanes expects"):
        read_clips(np.zeros((2, 3, 8, 8, 3), np.uint8))


# Ideal samplers of limited context: the reader orders them as theory does


@pytest.fixture(scope="module")
def oracle():
    spec = importlib.util.spec_from_file_location("lanes_oracle", ROOT / "benchmarks/lanes_oracle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lanes_oracle"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("real", 1.0, 1.0),
        ("independent frames + class", 0.0, 0.0),
        ("still copy", 0.0, 0.0),
        ("sees 1 previous frame", 0.0, 0.0),
        ("sees 2 previous frames", 0.0, 0.16),
        ("last-frame chaining of 8", 0.0, 0.12),
        ("prefix-4 extension", 0.5, 0.9),
        ("real + 0.5 px jitter", 0.55, 0.9),
    ],
)
def test_ideal_samplers(oracle, name, least, most):
    clips = oracle.sample_clips(name, 80)
    readings = read_clips(clips)
    assert least <= readings.lawful.mean() <= most
    assert readings.occluded.any() == (name != "still copy")
    if name == "still copy":  # which the flicker score ranks best
        assert oracle.flicker(clips) == 1.0
        assert readings.steps.max() == 0


def test_the_features_of_clips_see_motion_and_those_of_frames_do_not(oracle):
    """The built-in 3-D network: shuffled frames are far from real clips, but frame by frame they are the same."""
    extractor = load_extractor("lanes", torch.device("cpu"))
    real, other = (oracle.sample_clips("real", 60, seed) for seed in (0, 1))
    shuffled = np.stack([clip[np.random.default_rng(row).permutation(24)] for row, clip in enumerate(real)])
    reference, same, mixed = (extractor(clips, 30) for clips in (other, real, shuffled))

    def distance(features: dict[str, np.ndarray], kind: str) -> float:
        x, y = (values[kind].reshape(-1, 32) for values in (features, reference))
        return frechet(x, Moments.from_rows(x), Moments.from_rows(y)).value

    assert distance(mixed, "pool") > 5 * distance(same, "pool")
    assert distance(mixed, "frames") < 4 * distance(same, "frames")
    assert mixed["motion"].mean() > 2 * same["motion"].mean()
