"""Estimates against scipy and published examples."""

import pytest

from tessera.reporting.estimates import wilson


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (10, 10), (1, 7), (93, 100), (500, 1000), (2900, 3000)])
@pytest.mark.parametrize("level", [0.95, 0.99])
def test_the_interval_is_that_of_scipy(hits, count, level):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(hits, count).proportion_ci(level, method="wilson")
    z = stats.norm.ppf(0.5 + level / 2)
    assert wilson(hits / count, count, z) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_default_interval_is_95_percent():
    assert wilson(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)  # Newcombe 1998's method 3


def test_the_interval_stays_within_0_and_1():
    assert wilson(0.0, 5)[0] == 0.0
    assert wilson(1.0, 5)[1] == 1.0
