"""Power laws against scipy and against known laws; coverage by simulation; the frontier by hand."""

import json
import math

import numpy as np
import pytest
import scipy.stats

from tessera.errors import TesseraError
from tessera.planning import published, scaling_law
from tessera.planning.scaling_law import EvalPoint, Law

X = [0.4, 1.0, 3.0, 8.0, 20.0, 60.0]


def test_the_fit_is_the_line_of_scipy_through_logarithms():
    y = [50.0, 33.0, 24.0, 14.0, 11.0, 6.0]
    expected = scipy.stats.linregress(np.log(X), np.log(y))
    half = scipy.stats.t.ppf(0.975, 4) * expected.stderr
    law = scaling_law.fit(X, y)
    assert law.exponent.value == pytest.approx(-expected.slope)
    assert (law.exponent.low, law.exponent.high) == pytest.approx((-expected.slope - half, -expected.slope + half))
    assert law.scale == pytest.approx(math.exp(expected.intercept))
    assert law(3.0) == pytest.approx(math.exp(expected.intercept + expected.slope * math.log(3.0)))
    assert (law.points, law.df, law.low, law.high) == (6, 4, 0.4, 60.0)
    assert law.extrapolation(2.0) == 1
    assert law.extrapolation(120.0) == pytest.approx(2)
    assert law.extrapolation(0.2) == pytest.approx(2)


@pytest.mark.parametrize("floor", [0.0, 3.0, 9.0])
def test_a_known_law_is_recovered(floor):
    y = [floor + 20 * x**-0.5 for x in X]
    law = scaling_law.fit(X, y, floor="fitted")
    assert law.floor == pytest.approx(floor, rel=0.02, abs=0.02)
    assert law.exponent.value == pytest.approx(0.5, rel=0.02)
    assert law(8.0) == pytest.approx(floor + 20 * 8**-0.5, rel=0.01)
    if floor == 0:
        assert scaling_law.fit(X, y).exponent.value == pytest.approx(0.5, rel=1e-9)


def test_intervals_have_their_coverage():
    """Exponent, line and new point each lie inside in 95 % of 1000 trials, within what 1000 trials allow."""
    random, covered = np.random.default_rng(0), np.zeros(3)
    for _ in range(1000):
        noise = np.exp(0.2 * random.standard_normal(len(X) + 1))
        law = scaling_law.fit(X, [20 * x**-0.4 * a for x, a in zip(X, noise)])
        new = 20 * 200.0**-0.4
        covered += [
            law.exponent.contains(0.4),
            law.confidence(200.0).contains(new),
            law.prediction(200.0).contains(new * noise[-1]),
        ]
    assert (covered > 925).all()
    assert (covered < 975).all()


def test_the_largest_points_are_held_out_and_predicted():
    y = [20 * x**-0.5 for x in X]
    y[-1] *= 2  # the largest breaks the law
    x = [X[-1], *X[:-1]]  # in any order
    (point,) = scaling_law.predict_held_out(x, [y[-1], *y[:-1]], scaling_law.largest_mask(x, 1))
    assert point.x == 60
    assert point.error == pytest.approx(-0.5)
    assert not point.inside
    assert scaling_law.largest_mask([3, 1, 2], 2) == [True, False, True]
    assert scaling_law.largest_mask([3, 1], 0) == [False, False]
    assert scaling_law.predict_held_out(X, y, [False] * 6) == []


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [3, 4], "at least 3 points, got 2"),
        ([1, 2, 3], [3, 4, 0.0], "above zero, got 0"),
        ([1, 2, 3], [3, 4, math.nan], "above zero, got nan"),
        ([2, 2, 2], [3, 4, 5], "all 3 points have the same compute, 2"),
    ],
)
def test_impossible_fits_are_refused(x, y, message):
    with pytest.raises(TesseraError, match=message):
        scaling_law.fit(x, y)


def test_the_table_of_the_paper_follows_a_law():
    gmacs, fid = [model.gmacs for model in published.MODELS], [model.fid for model in published.MODELS]
    expected = scipy.stats.linregress(np.log(gmacs), np.log(fid))
    assert scaling_law.fit(gmacs, fid).exponent.value == pytest.approx(-expected.slope)
    assert scaling_law.fit(gmacs, fid).exponent.contains(0.365)


# Compute-optimal


def chinchilla(sizes: int = 8, points: int = 12) -> list[EvalPoint]:
    """Loss = A gmacs^-0.4 + B samples^-0.4: the best size and the best number of samples both grow as compute^0.5."""
    return [
        EvalPoint(f"run {size}", gmacs, int(samples), gmacs**-0.4 + (samples / 1e6) ** -0.4)
        for size, gmacs in enumerate(np.geomspace(0.1, 10, sizes))
        for samples in np.geomspace(1e5, 1e7, points)
    ]


def test_the_frontier_by_hand():
    points = [EvalPoint("a", 1, 10, 5), EvalPoint("a", 1, 20, 4), EvalPoint("b", 4, 5, 4.5), EvalPoint("b", 4, 10, 3)]
    assert scaling_law.frontier(points) == [points[0], points[1], points[3]]  # at equal compute the lower
    assert scaling_law.frontier([]) == []


def test_the_best_size_of_a_known_law_is_recovered():
    law = Law("fd", "abcd", "a test", tuple(chinchilla()))
    assert -law.by_gmacs.exponent.value == pytest.approx(0.5, abs=0.08)
    middle = math.sqrt(law.range[0] * law.range[1])
    best = law.optimal(middle)
    expected = math.sqrt(middle / 6e9 / 1e6)  # where both terms are equal
    assert best.gmacs == pytest.approx(expected, rel=0.15)
    assert 6e9 * best.gmacs * best.samples == pytest.approx(middle)
    assert best.metric.contains(2 * expected**-0.4)
    assert best.extrapolation == 1
    assert law.optimal(10 * law.range[1]).extrapolation == pytest.approx(10)
    with pytest.raises(TesseraError, match="above zero"):
        law.optimal(0)


def test_a_law_survives_saving_and_reading(tmp_path):
    law = Law("fd", "abcd", "a test", tuple(chinchilla(3, 4)))
    law.save(tmp_path / scaling_law.LAW_FILE)
    assert scaling_law.read_law(tmp_path) == scaling_law.read_law(tmp_path / scaling_law.LAW_FILE) == law
    assert any(
        "frontier points of" in line for line in json.loads((tmp_path / scaling_law.LAW_FILE).read_text())["summary"]
    )


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "points": [{"run": "a"}]}'])
def test_a_file_that_is_not_a_law_is_refused(tmp_path, text):
    (tmp_path / scaling_law.LAW_FILE).write_text(text)
    with pytest.raises(TesseraError, match=r"law\.json is not a law"):
        scaling_law.read_law(tmp_path)


def test_a_missing_law_is_named(tmp_path):
    with pytest.raises(TesseraError, match="there is no law at"):
        scaling_law.read_law(tmp_path)


def test_the_best_size_at_equal_compute_is_the_minimum_of_a_parabola():
    values = [math.exp(1 + 0.3 * math.log(gmacs / 5) ** 2) for gmacs in X]
    assert scaling_law.best_size(X, values) == pytest.approx(5)
    assert scaling_law.best_size(X[::-1], values[::-1]) == pytest.approx(5)
    far = [*values[:1], *values[1:5], 1e6]  # is no neighbor of the lowest
    assert scaling_law.best_size(X, far) == pytest.approx(5)
    assert scaling_law.best_size(X, sorted(values)) is scaling_law.best_size(X, sorted(values)[::-1]) is None  # ends
    assert scaling_law.best_size(X[:2], values[:2]) is None


def test_a_best_size_needs_sizes_to_compare():
    once = [EvalPoint(f"run {gmacs}", gmacs, 100, 1 / gmacs) for gmacs in (1, 2, 3)]
    with pytest.raises(TesseraError, match="every run was scored once"):
        Law("fd", "abcd", "", tuple(once))
    alone = [EvalPoint("one", 1, samples, 1 / samples) for samples in (1, 2, 3)]
    with pytest.raises(TesseraError, match="3 points of 1 sizes"):
        Law("fd", "abcd", "", tuple(alone))
