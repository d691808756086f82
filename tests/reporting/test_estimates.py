"""Intervals and rank correlations against scipy, tables and simulation."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from tessera.errors import TesseraError
from tessera.reporting.estimates import (
    Estimate,
    differences_to_first,
    holm,
    kendall,
    spearman,
    t_quantile,
    wilson,
)

NUMBERS = st.lists(st.integers(-5, 5), min_size=5, max_size=15)


@pytest.mark.parametrize(("df", "expected"), [(1, 12.7062), (4, 2.77645), (30, 2.04227), (1000, 1.96234)])
def test_quantiles_of_student_s_t_are_those_of_the_tables(df, expected):
    assert t_quantile(df) == pytest.approx(expected, rel=1e-5)


@given(x=NUMBERS, y=NUMBERS)
def test_rank_correlations_lie_in_their_intervals_also_with_ties(x, y):
    count = min(len(x), len(y))
    x, y = x[:count], y[:count]
    for correlation, expected in ((spearman, scipy.stats.spearmanr), (kendall, scipy.stats.kendalltau)):
        if len(set(x)) < 2 or len(set(y)) < 2:
            with pytest.raises(TesseraError, match="all .* are equal"):
                correlation(x, y)
            continue
        estimate = correlation(x, y)
        assert estimate.value == pytest.approx(expected(x, y).statistic, abs=1e-12)
        assert -1 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_a_perfect_order_of_few_pairs_is_not_certain():
    x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    four, six = spearman(x[:4], x[:4]), spearman(x, [-v for v in x])
    assert four.value == pytest.approx(1)
    assert four.low < 0  # one of 24 orders: two-sided p = 0.08
    assert six.value == pytest.approx(-1)
    assert -1 < six.high < -0.2


def test_intervals_of_rank_correlations_have_their_coverage():
    """Of normal pairs with correlation 0.7, whose rank correlations are known: 95 %, within what 1000 trials allow."""
    random, covered = np.random.default_rng(0), np.zeros(2)
    expected = 6 / math.pi * math.asin(0.35), 2 / math.pi * math.asin(0.7)
    for _ in range(1000):
        x, noise = random.standard_normal((2, 15))
        y = 0.7 * x + math.sqrt(1 - 0.49) * noise
        estimates = spearman(x, y), kendall(x, y)
        covered += [estimate.contains(value) for estimate, value in zip(estimates, expected)]
    assert (covered > 920).all()
    assert (covered < 985).all()


def test_a_mean_has_the_interval_of_scipy():
    values = [0.3, -0.1, 0.8, 0.5]
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    estimate = Estimate.mean(values)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(expected))
    with pytest.raises(TesseraError, match="at least two"):
        Estimate.mean([1.0])


def test_two_rows_are_the_paired_t_test():
    first, other = [1.0, 2.0, 4.0, 3.0], [1.5, 2.1, 5.0, 3.9]
    expected = scipy.stats.ttest_rel(other, first)
    ((difference, p),) = differences_to_first([first, other])
    assert (difference.low, difference.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert p == pytest.approx(expected.pvalue)
    assert differences_to_first([[1, 2], [2, 3]])[0][1] == 0
    assert differences_to_first([[1, 2], [1, 2]])[0][1] == 1


def test_many_rows_are_the_linear_model_of_rows_and_columns():
    """Against ordinary least squares with a dummy for each row and each column but the first."""
    table = np.random.default_rng(0).standard_normal((5, 3)) + np.arange(3)
    row, column = np.indices((5, 3))
    x = np.stack([np.ones(15), *(row.ravel() == n for n in range(1, 5)), *(column.ravel() == n for n in (1, 2))], 1)
    solution, squares, *_ = np.linalg.lstsq(x.astype(float), table.ravel(), rcond=None)
    errors = np.sqrt(squares[0] / 8 * np.diag(np.linalg.inv(x.T.astype(float) @ x)))
    for number, (difference, p) in enumerate(differences_to_first(table), start=1):
        assert difference.value == pytest.approx(solution[number])
        assert (difference.high - difference.low) / 2 == pytest.approx(scipy.stats.t.ppf(0.975, 8) * errors[number])
        assert p == pytest.approx(2 * scipy.stats.t.sf(abs(solution[number] / errors[number]), 8))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (10, 10), (1, 7), (93, 100), (500, 1000), (2900, 3000)])
@pytest.mark.parametrize("level", [0.95, 0.99])
def test_wilson_s_interval_is_that_of_scipy(hits, count, level):
    expected = scipy.stats.binomtest(hits, count).proportion_ci(level, method="wilson")
    z = scipy.stats.norm.ppf(0.5 + level / 2)
    assert wilson(hits / count, count, z) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_s_default_interval_is_95_percent():
    assert wilson(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)  # Newcombe 1998's method 3


def test_wilson_s_interval_ends_exactly_at_0_without_hits_and_at_1_with_hits_only():
    counts = range(1, 1000)
    assert {wilson(0.0, count)[0] for count in counts} == {0.0}
    assert {wilson(1.0, count)[1] for count in counts} == {1.0}
