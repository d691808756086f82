"""Intervals and rank correlations against scipy, and their coverage by simulation."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from tessera.errors import TesseraError
from tessera.planning import statistics

NUMBERS = st.lists(st.integers(-5, 5), min_size=5, max_size=15)


@given(freedom=st.integers(1, 200), t=st.floats(0.001, 30))
def test_t_agrees_with_scipy(freedom, t):
    assert statistics.t_outside(t, freedom) == pytest.approx(2 * scipy.stats.t.sf(t, freedom), abs=1e-12)
    assert statistics.t_quantile(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=1e-9)
    assert statistics.t_quantile(freedom, 0.5) == pytest.approx(scipy.stats.t.ppf(0.75, freedom), rel=1e-9)


@given(x=NUMBERS, y=NUMBERS)
def test_rank_correlations_agree_with_scipy_with_ties(x, y):
    count = min(len(x), len(y))
    x, y = x[:count], y[:count]
    if len(set(x)) < 2 or len(set(y)) < 2:
        with pytest.raises(TesseraError, match="all .* are equal"):
            statistics.spearman(x, y)
        return
    assert statistics.ranks(x).tolist() == scipy.stats.rankdata(x).tolist()
    for measure, truth in (
        (statistics.spearman, scipy.stats.spearmanr),
        (statistics.kendall, scipy.stats.kendalltau),
    ):
        found = measure(x, y)
        assert found.value == pytest.approx(truth(x, y).statistic, abs=1e-12)
        assert -1 <= found.low <= found.value <= found.high <= 1


def test_a_perfect_order_of_few_is_not_certain():
    x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    four, six = statistics.spearman(x[:4], x[:4]), statistics.spearman(x, [-v for v in x])
    assert four.value == pytest.approx(1)
    assert four.low < 0  # one of 24 orders: two-sided p = 0.08
    assert six.value == pytest.approx(-1)
    assert -1 < six.high < -0.2


def test_intervals_of_rank_correlations_hold_the_truth():
    """Of normal pairs with correlation 0.7, whose rank correlations are known; 95 % within what 1000 trials allow."""
    random, inside = np.random.default_rng(0), np.zeros(2)
    truths = 6 / math.pi * math.asin(0.35), 2 / math.pi * math.asin(0.7)
    for _ in range(1000):
        x, noise = random.standard_normal((2, 15))
        y = 0.7 * x + math.sqrt(1 - 0.49) * noise
        found = statistics.spearman(x, y), statistics.kendall(x, y)
        inside += [estimate.holds(truth) for estimate, truth in zip(found, truths)]
    assert (inside > 920).all()
    assert (inside < 985).all()


def test_a_mean_has_the_interval_of_scipy():
    values = [0.3, -0.1, 0.8, 0.5]
    truth = scipy.stats.ttest_1samp(values, 0)
    found = statistics.mean(values)
    assert (found.low, found.high) == pytest.approx(tuple(truth.confidence_interval()))
    with pytest.raises(TesseraError, match="at least two"):
        statistics.mean([1.0])


def test_two_rows_are_the_paired_t_test():
    first, other = [1.0, 2.0, 4.0, 3.0], [1.5, 2.1, 5.0, 3.9]
    truth = scipy.stats.ttest_rel(other, first)
    ((found, p),) = statistics.differences_to_first([first, other])
    assert (found.low, found.high) == pytest.approx(tuple(truth.confidence_interval()))
    assert p == pytest.approx(truth.pvalue)
    assert statistics.differences_to_first([[1, 2], [2, 3]])[0][1] == 0
    assert statistics.differences_to_first([[1, 2], [1, 2]])[0][1] == 1


def test_many_rows_are_the_linear_model_of_rows_and_columns():
    """Against ordinary least squares with a dummy for each row and each column but the first."""
    table = np.random.default_rng(0).standard_normal((5, 3)) + np.arange(3)
    row, column = np.indices((5, 3))
    x = np.stack([np.ones(15), *(row.ravel() == n for n in range(1, 5)), *(column.ravel() == n for n in (1, 2))], 1)
    solved, squares, *_ = np.linalg.lstsq(x.astype(float), table.ravel(), rcond=None)
    errors = np.sqrt(squares[0] / 8 * np.diag(np.linalg.inv(x.T.astype(float) @ x)))
    for number, (found, p) in enumerate(statistics.differences_to_first(table), start=1):
        assert found.value == pytest.approx(solved[number])
        assert (found.high - found.low) / 2 == pytest.approx(scipy.stats.t.ppf(0.975, 8) * errors[number])
        assert p == pytest.approx(2 * scipy.stats.t.sf(abs(solved[number] / errors[number]), 8))


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1, 1]
    assert statistics.holm([]) == []
