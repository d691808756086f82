"""The judge of digits, and which data have a judge."""

import numpy as np
import pytest

from tessera.data import FilesConfig, ShapesConfig
from tessera.data.digits import DigitsConfig


@pytest.fixture(scope="module")
def judge():
    pytest.importorskip("sklearn")
    from tessera.evaluation.toy.digit_classifier import DigitClassifier

    return DigitClassifier()


def test_the_judge_reads_digits_that_it_has_not_seen(judge):
    assert judge.held_out == 297
    assert judge.ceiling >= 0.95


def test_the_judge_reads_the_digits_that_models_learn_from(judge):
    source = DigitsConfig(split="model").open()
    pictures = source.images.transpose(0, 2, 3, 1)
    assert judge.share(pictures, source.labels) >= 0.95
    assert judge.share(pictures, (source.labels + 1) % 10) <= 0.05


def test_noise_is_not_taken_for_what_was_asked(judge):
    noise = np.random.default_rng(0).integers(0, 256, (500, 8, 8, 1), dtype=np.uint8)
    assert judge.share(noise, np.arange(500) % 10) < 0.25


def test_a_share_is_that_of_the_pictures_read_as_asked(judge):
    pictures = DigitsConfig(split="ceiling").open().images.transpose(0, 2, 3, 1)[:10]
    read = judge.read(pictures)
    assert read.shape == (10,)
    asked = np.where(np.arange(10) < 4, read, (read + 1) % 10)
    assert judge.share(pictures, asked) == pytest.approx(0.4)


def test_judging_is_the_share_with_its_interval(judge):
    pictures = DigitsConfig(split="ceiling").open().images.transpose(0, 2, 3, 1)[:10]
    asked = np.where(np.arange(10) < 4, judge.read(pictures), (judge.read(pictures) + 1) % 10)
    judged = judge.judge(pictures, asked)
    assert set(judged) == {"as asked"}
    assert judged["as asked"].value == pytest.approx(0.4)
    assert (judged["as asked"].low, judged["as asked"].high) == pytest.approx((0.168, 0.687), abs=1e-3)
    assert judge.judge(pictures, None) == {}


def test_data_of_known_truth_have_a_judge():
    pytest.importorskip("sklearn")
    from tessera.evaluation.toy.digit_classifier import DigitClassifier, oracle_for
    from tessera.evaluation.toy.shape_reader import ShapesEvaluator

    for data, kind in ((DigitsConfig(), DigitClassifier), (ShapesConfig(split="train"), ShapesEvaluator)):
        found = oracle_for(data)
        assert isinstance(found, kind)
        assert found.reads
        assert found.ceiling > 0.9
    assert oracle_for(FilesConfig(path="pictures")) is None
