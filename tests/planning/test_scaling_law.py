"""Power laws against scipy and against laws that made the numbers; coverage by simulation; the frontier by hand."""

import json
import math

import numpy as np
import pytest
import scipy.stats

from tessera.errors import TesseraError
from tessera.planning import published, scaling_law
from tessera.planning.scaling_law import EvalPoint, Law

X = [0.4, 1.0, 3.0, 8.0, 20.0, 60.0]


def test_the_fit_is_scipys_line_through_logarithms():
    y = [50.0, 33.0, 24.0, 14.0, 11.0, 6.0]
    truth = scipy.stats.linregress(np.log(X), np.log(y))
    half = scipy.stats.t.ppf(0.975, 4) * truth.stderr
    found = scaling_law.fit(X, y)
    assert found.exponent.value == pytest.approx(-truth.slope)
    assert (found.exponent.low, found.exponent.high) == pytest.approx((-truth.slope - half, -truth.slope + half))
    assert found.scale == pytest.approx(math.exp(truth.intercept))
    assert found(3.0) == pytest.approx(math.exp(truth.intercept + truth.slope * math.log(3.0)))
    assert (found.points, found.freedom, found.low, found.high) == (6, 4, 0.4, 60.0)
    assert found.beyond(2.0) == 1
    assert found.beyond(120.0) == pytest.approx(2)
    assert found.beyond(0.2) == pytest.approx(2)


@pytest.mark.parametrize("floor", [0.0, 3.0, 9.0])
def test_a_law_gives_back_the_numbers_it_was_made_of(floor):
    y = [floor + 20 * x**-0.5 for x in X]
    found = scaling_law.fit(X, y, floor="fitted")
    assert found.floor == pytest.approx(floor, rel=0.02, abs=0.02)
    assert found.exponent.value == pytest.approx(0.5, rel=0.02)
    assert found(8.0) == pytest.approx(floor + 20 * 8**-0.5, rel=0.01)
    if floor == 0:
        assert scaling_law.fit(X, y).exponent.value == pytest.approx(0.5, rel=1e-9)


def test_intervals_hold_what_they_should():
    """Exponent, line and new point each lie inside in 95 % of 1000 trials (within what so many allow)."""
    random, inside = np.random.default_rng(0), np.zeros(3)
    for _ in range(1000):
        away = np.exp(0.2 * random.standard_normal(len(X) + 1))
        found = scaling_law.fit(X, [20 * x**-0.4 * a for x, a in zip(X, away)])
        new = 20 * 200.0**-0.4
        inside += [
            found.exponent.contains(0.4),
            found.band(200.0).contains(new),
            found.prediction(200.0).contains(new * away[-1]),
        ]
    assert (inside > 925).all()
    assert (inside < 975).all()


def test_the_largest_are_held_out_and_predicted():
    y = [20 * x**-0.5 for x in X]
    y[-1] *= 2  # the largest breaks the law
    x = [X[-1], *X[:-1]]  # in any order
    (found,) = scaling_law.held_out(x, [y[-1], *y[:-1]], scaling_law.largest(x, 1))
    assert found.x == 60
    assert found.error == pytest.approx(-0.5)
    assert not found.inside
    assert scaling_law.largest([3, 1, 2], 2) == [True, False, True]
    assert scaling_law.largest([3, 1], 0) == [False, False]
    assert scaling_law.held_out(X, y, [False] * 6) == []


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        ([1, 2], [3, 4], "at least 3 points, got 2"),
        ([1, 2, 3], [3, 4, 0.0], "above zero, got 0"),
        ([1, 2, 3], [3, 4, math.nan], "above zero, got nan"),
        ([2, 2, 2], [3, 4, 5], "all 3 points stand at the same compute, 2"),
    ],
)
def test_no_law_is_said_instead_of_a_bad_one(x, y, said):
    with pytest.raises(TesseraError, match=said):
        scaling_law.fit(x, y)


def test_the_papers_table_follows_a_law():
    gmacs, fid = [model.gmacs for model in published.MODELS], [model.fid for model in published.MODELS]
    truth = scipy.stats.linregress(np.log(gmacs), np.log(fid))
    assert scaling_law.fit(gmacs, fid).exponent.value == pytest.approx(-truth.slope)
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


def test_the_best_size_grows_as_the_law_that_made_the_numbers():
    found = Law("fd", "abcd", "a test", tuple(chinchilla()))
    assert -found.by_gmacs.exponent.value == pytest.approx(0.5, abs=0.08)
    middle = math.sqrt(found.range[0] * found.range[1])
    best = found.optimal(middle)
    truth = math.sqrt(middle / 6e9 / 1e6)  # where both terms are equal
    assert best.gmacs == pytest.approx(truth, rel=0.15)
    assert 6e9 * best.gmacs * best.samples == pytest.approx(middle)
    assert best.metric.contains(2 * truth**-0.4)
    assert best.beyond == 1
    assert found.optimal(10 * found.range[1]).beyond == pytest.approx(10)
    with pytest.raises(TesseraError, match="above zero"):
        found.optimal(0)


def test_a_law_is_read_as_it_was_written(tmp_path):
    found = Law("fd", "abcd", "a test", tuple(chinchilla(3, 4)))
    found.save(tmp_path / scaling_law.FILE)
    assert scaling_law.read(tmp_path) == scaling_law.read(tmp_path / scaling_law.FILE) == found
    assert any("frontier points of" in line for line in json.loads((tmp_path / scaling_law.FILE).read_text())["says"])


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "points": [{"run": "a"}]}'])
def test_what_is_no_law_is_refused(tmp_path, text):
    (tmp_path / scaling_law.FILE).write_text(text)
    with pytest.raises(TesseraError, match=r"law\.json holds no law"):
        scaling_law.read(tmp_path)


def test_a_missing_law_is_named(tmp_path):
    with pytest.raises(TesseraError, match="there is no law at"):
        scaling_law.read(tmp_path)


def test_a_best_size_needs_sizes_to_compare():
    once = [EvalPoint(f"run {gmacs}", gmacs, 100, 1 / gmacs) for gmacs in (1, 2, 3)]
    with pytest.raises(TesseraError, match="every run was scored once"):
        Law("fd", "abcd", "", tuple(once))
    alone = [EvalPoint("one", 1, samples, 1 / samples) for samples in (1, 2, 3)]
    with pytest.raises(TesseraError, match="3 points of 1 sizes"):
        Law("fd", "abcd", "", tuple(alone))
