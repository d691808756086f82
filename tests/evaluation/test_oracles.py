"""The judge of digits, and the interval of a share."""

import numpy as np
import pytest

from tessera.data.digits import DigitsConfig
from tessera.evaluation.oracles import wilson


@pytest.fixture(scope="module")
def judge():
    pytest.importorskip("sklearn")
    from tessera.evaluation.oracles import DigitJudge

    return DigitJudge()


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


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (10, 10), (1, 7), (93, 100), (500, 1000), (2900, 3000)])
@pytest.mark.parametrize("level", [0.95, 0.99])
def test_the_interval_is_wilson_s(hits, count, level):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(hits, count).proportion_ci(level, method="wilson")
    z = stats.norm.ppf(0.5 + level / 2)
    assert wilson(hits / count, count, z) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_interval_is_of_95_percent_by_default():
    assert wilson(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)  # Newcombe 1998's method 3


def test_the_interval_stays_within_all_and_nothing():
    assert wilson(0.0, 5)[0] == 0.0
    assert wilson(1.0, 5)[1] == 1.0
