"""The law of lanes as a metric: counts what the reader reads, beside real clips, and a still clip does not win."""

import numpy as np
import pytest
import torch

from tessera.data import LanesConfig
from tessera.data.lanes import COLORS
from tessera.errors import TesseraError
from tessera.evaluation import distances, law, suite
from tessera.evaluation.features import load_extractor
from tessera.evaluation.sources import DatasetSource, NpzSource
from tessera.generation.bulk import BulkSamples, bulk_request


def clips_of(count: int, **options) -> tuple[np.ndarray, list[int]]:
    dataset = LanesConfig(split="train", count=count, **options).open()
    clips = np.stack([np.moveaxis(dataset.pixels(index), 0, -1) for index in range(count)])
    return clips, [dataset.label(index) for index in range(count)]


def test_real_clips_obey_the_law():
    scores, rows = law.measure(*clips_of(200))
    assert [scores[name].value for name in ("law", "law_occluded", "class_accuracy")] == [1, 1, 1]
    assert scores["law_occluded"].low > 0.97
    assert scores["step_error"].value < 0.04
    assert scores["speed_distance"].value < 0.05
    assert {row[4] for row in rows if row[1] != law.MEANING["class"]} == {"100.0%"}


def test_the_scores_of_half_broken_clips():
    """Every second clip changes its color behind the bar, or stands still."""
    clips, labels = clips_of(200)
    other = clips_of(200)[0][..., ::-1]  # red and blue exchanged
    broken = clips.copy()
    broken[::2, 12:] = other[::2, 12:]
    scores, _ = law.measure(broken, labels)
    changed = np.mean([COLORS[name][0] != COLORS[name][2] for name in np.array(list(COLORS))[labels[::2]]])
    assert scores["law"].value == pytest.approx(1 - changed / 2, abs=0.05)
    still = clips.copy()
    still[::2] = still[::2, :1]
    scores, _ = law.measure(still, labels)
    assert scores["law"].value == pytest.approx(0.5)
    assert scores["law_occluded"].value == 1  # nothing is hidden and seen again in a still clip
    assert scores["speed_distance"].value > 0.4
    assert scores["speed_distance"].low < scores["speed_distance"].value < scores["speed_distance"].high


def test_held_out_clips_are_counted_apart():
    for setting, group in (("held-out-speeds", law.UNSEEN_SPEEDS), ("held-out-pairs", law.UNSEEN_PAIRS)):
        _, rows = law.measure(*clips_of(80, combinations=setting))
        counts = {
            row[0].partition(",")[0]: int(row[2]) for row in rows if row[0].endswith(law.OCCLUDED) and "," in row[0]
        }
        assert counts[group] >= 0.95 * sum(counts.values())
    _, rows = law.measure(*clips_of(80, combinations="known"))
    assert {row[0].partition(",")[0] for row in rows if "," in row[0]} <= {law.KNOWN}


def test_wasserstein_and_its_interval():
    random = np.random.default_rng(0)
    x, y = random.uniform(0, 1, 4000), random.uniform(0.3, 1.3, 4000)
    estimate = distances.wasserstein(np.split(x, 20), y)
    assert estimate.value == pytest.approx(0.3, abs=0.02)
    assert estimate.contains(0.3)
    assert 0.005 < estimate.high - estimate.low < 0.06


def test_evaluation_of_an_npz_and_of_data(make_npz, tmp_path):
    clips, labels = clips_of(40, lanes=2)
    extractor = load_extractor(suite.default_features("lanes", ["law"]), torch.device("cpu"))
    for source in (
        NpzSource(make_npz("clips.npz", clips, np.array(labels))),
        DatasetSource(LanesConfig(split="train", lanes=2, count=40)),
    ):
        evaluation = suite.evaluate(source, LanesConfig(lanes=2), extractor, tmp_path / source.description[:5], ["law"])
        scores = {score.metric: score for score in evaluation.scores}
        assert (scores["law"].value, scores["class_accuracy"].value) == (1, 1)
        assert scores["law"].low > 0.95  # of 80 lanes
        assert scores["law"].protocol.definition["distance"] == "rms < 0.5 px"
        assert not scores["law"].protocol.features
        assert evaluation.details


def test_an_untrained_model_breaks_the_law(make_model, tmp_path):
    network = {"input_size": (24, 8, 32), "in_channels": 3, "out_channels": 3, "num_classes": 8, "patch_size": 8}
    model = make_model(network, codec={"kind": "pixels", "channels": 3})
    samples = BulkSamples(model, bulk_request(model, 4, "balanced"), tmp_path / "samples")
    extractor = load_extractor("mean", torch.device("cpu"))
    evaluation = suite.evaluate(samples, "lanes", extractor, tmp_path / "work", ["law"])
    assert {score.metric: score.value for score in evaluation.scores}["law"] == 0


def test_other_samples_are_an_error(make_npz, tmp_path):
    extractor = load_extractor("mean", torch.device("cpu"))
    for shape, words in (((4, 8, 32, 3), "law needs clips of lanes"), ((4, 5, 8, 8, 3), "the reader of lanes expects")):
        path = make_npz("other.npz", np.zeros(shape, np.uint8))
        with pytest.raises(TesseraError, match=words):
            suite.evaluate(NpzSource(path), str(path), extractor, tmp_path / str(len(shape)), ["law"])
