"""Distances against scipy, torchmetrics, prdc, closed forms, and simulations whose truth is known."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tessera.errors import TesseraError
from tessera.evaluation import distances
from tessera.evaluation.moments import Moments

SEEDS = st.integers(0, 2**32 - 1)


def _gaussian(width, seed, rank=None):
    """A mean and a covariance whose eigenvalues are near 1."""
    numbers = np.random.default_rng(seed)
    rows = numbers.normal(size=(rank or 3 * width, width))
    return numbers.normal(size=width), rows.T @ rows / len(rows)


def _samples(count, width, seed, kind=np.float32):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(kind)


def _rotation(width, seed):
    return np.linalg.qr(_samples(width, width, seed, np.float64))[0]


# Fréchet distance


@pytest.mark.parametrize("width", [1, 2, 16, 64])
def test_frechet_is_scipy_s_formula(width):
    linalg = pytest.importorskip("scipy.linalg")
    (mu1, cov1), (mu2, cov2) = _gaussian(width, 1), _gaussian(width, 2)
    expected = np.sum((mu1 - mu2) ** 2) + np.trace(cov1 + cov2 - 2 * linalg.sqrtm(cov1 @ cov2).real)
    assert distances.frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-6)


def test_frechet_is_torchmetrics_():
    fid = pytest.importorskip("torchmetrics.image.fid")
    arrays = [*_gaussian(32, 1), *_gaussian(32, 2)]
    expected = float(fid._compute_fid(*map(torch.from_numpy, arrays)))
    assert distances.frechet_distance(*arrays) == pytest.approx(expected, rel=1e-9)


@given(SEEDS)
def test_frechet_of_covariances_that_commute(seed):
    numbers = np.random.default_rng(seed)
    turn = _rotation(6, seed)
    a, b = numbers.uniform(0.1, 4, (2, 6))
    mu1, mu2 = numbers.normal(size=(2, 6))
    found = distances.frechet_distance(mu1, turn * a @ turn.T, mu2, turn * b @ turn.T)
    assert found == pytest.approx(np.sum((mu1 - mu2) ** 2) + np.sum((a**0.5 - b**0.5) ** 2), rel=1e-9)


def test_frechet_of_one_dimension_is_wasserstein_s():
    found = distances.frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([3.0]), np.array([[9.0]]))
    assert found == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2, rel=1e-12)


@given(SEEDS)
def test_frechet_is_symmetric_and_turns_with_the_axes(seed):
    (mu1, cov1), (mu2, cov2), turn = _gaussian(5, seed), _gaussian(5, seed + 1), _rotation(5, seed)
    found = distances.frechet_distance(mu1, cov1, mu2, cov2)
    assert distances.frechet_distance(mu2, cov2, mu1, cov1) == pytest.approx(found, rel=1e-9)
    turned = distances.frechet_distance(turn @ mu1, turn @ cov1 @ turn.T, turn @ mu2, turn @ cov2 @ turn.T)
    assert turned == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("rank", [None, 7])
def test_frechet_of_equals_is_zero(rank):
    mu, cov = _gaussian(32, 1, rank)
    assert distances.frechet_distance(mu, cov, mu, cov) == pytest.approx(0, abs=1e-12 * np.trace(cov))


@pytest.mark.parametrize(("n1", "n2"), [(20, 300), (300, 20), (20, 30), (2, 2)])
def test_frechet_of_fewer_rows_than_dimensions(n1, n2):
    """tr (S1 S2)^(1/2) is the nuclear norm of the centred rows' product, which takes no root of an eigenvalue."""
    x, y = _samples(n1, 100, 1, np.float64), 2 * _samples(n2, 100, 2, np.float64) + 0.1
    one, two = Moments.of(x), Moments.of(y)
    shared = np.linalg.norm((x - one.mean) @ (y - two.mean).T, "nuc") / ((n1 - 1) * (n2 - 1)) ** 0.5
    expected = np.sum((one.mean - two.mean) ** 2) + np.trace(one.cov) + np.trace(two.cov) - 2 * shared
    assert distances.frechet_distance(one.mean, one.cov, two.mean, two.cov) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_ill_conditioned_covariances():
    """Standard deviations from 1 to 1e-6. They commute, so the truth is known: all differ by a factor of two."""
    deviation, turn = np.logspace(0, -6, 64), _rotation(64, 1)
    one, two = turn * deviation**2 @ turn.T, turn * (2 * deviation) ** 2 @ turn.T
    one, two, mean = (one + one.T) / 2, (two + two.T) / 2, np.zeros(64)
    assert distances.frechet_distance(mean, one, mean, two) == pytest.approx(np.sum(deviation**2), rel=1e-6)


def test_frechet_where_scipy_s_root_fails():
    linalg = pytest.importorskip("scipy.linalg")
    x, mean = _samples(40, 100, 1, np.float64), np.zeros(100)
    cov = Moments.of(x).cov
    root = np.trace(linalg.sqrtm(cov @ cov))
    naive = float(np.real(2 * np.trace(cov) - 2 * root))
    assert not abs(naive) < 1e-6  # NaN, or noise of roots of what should be zero
    assert distances.frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-10)


def test_frechet_of_constant_features():
    mu, cov = _gaussian(8, 1)
    nothing = np.zeros((8, 8))
    expected = np.sum(mu**2) + np.trace(cov)
    assert distances.frechet_distance(mu, cov, np.zeros(8), nothing) == pytest.approx(expected, rel=1e-12)
    assert distances.frechet_distance(np.zeros(8), nothing, mu, cov) == pytest.approx(expected, rel=1e-12)
    assert distances.frechet_distance(np.zeros(8), nothing, np.ones(8), nothing) == 8


def test_frechet_of_covariances_with_nothing_in_common():
    """Each varies only where the other does not, so that nothing is shared."""
    turn, mean = _rotation(12, 1), np.zeros(12)
    one, two = turn[:, :5] @ turn[:, :5].T, turn[:, 5:] @ turn[:, 5:].T
    assert distances.frechet_distance(mean, one, mean, two) == pytest.approx(5 + 7, rel=1e-6)


def test_frechet_of_what_are_no_moments():
    mu, cov = _gaussian(4, 1)
    skew, nan = cov.copy(), mu.copy()
    skew[0, 1] += 0.1
    nan[0] = np.nan
    for wrong, told in (((mu[:3], cov), "expected"), ((mu, skew), "symmetric"), ((nan, cov), "NaN")):
        with pytest.raises(TesseraError, match=told):
            distances.frechet_distance(*wrong, mu, cov)
        with pytest.raises(TesseraError, match=told):
            distances.frechet_distance(mu, cov, *wrong)
    with pytest.raises(TesseraError, match="widths: 4 and 3"):
        distances.frechet_distance(mu, cov, *_gaussian(3, 1))


def test_the_measured_value_is_the_distance():
    samples, reference = _samples(50, 6, 1), Moments.of(_samples(60, 6, 2) * 2)
    own = Moments.of(samples)
    found = distances.frechet(samples, own, reference)
    assert found.value == distances.frechet_distance(own.mean, own.cov, reference.mean, reference.cov)
    assert found.low < found.value < found.high


def test_the_error_is_how_the_distance_changes_with_a_sample_s_weight():
    """The standard error against the jackknife, which leaves one sample out at a time."""
    samples, reference = _samples(400, 3, 1) * 1.5 + 0.3, Moments(0, np.zeros(3), np.eye(3))
    own = Moments.of(samples)
    found = distances.frechet(samples, own, reference)
    rest = [own.without(Moments.of(samples[i : i + 1])) for i in range(400)]
    left = [distances.frechet_distance(each.mean, each.cov, reference.mean, reference.cov) for each in rest]
    jackknife = np.sqrt(399 * np.var(left))
    assert (found.high - found.value) / 1.959964 == pytest.approx(jackknife, rel=0.02)


def test_at_infinity_the_bias_is_gone():
    """200 samples of 16 dimensions, where the distance itself is several times what it should be."""
    reference = Moments(0, np.zeros(16), np.eye(16))
    value, infinite = [], []
    for seed in range(40):
        samples = 1.1 * _samples(200, 16, seed)
        value.append(distances.frechet(samples, Moments.of(samples), reference).value)
        infinite.append(distances.frechet_infinity(samples, reference).value)
    truth = 16 * 0.1**2
    assert np.mean(value) > 3 * truth
    error = np.std(infinite) / 40**0.5
    assert abs(np.mean(infinite) - truth) < 3 * error
    assert error < truth / 10  # so that the line above could fail


def test_infinity_is_the_same_whenever_asked():
    samples, reference = _samples(200, 4, 1), Moments(0, np.zeros(4), np.eye(4))
    assert distances.frechet_infinity(samples, reference) == distances.frechet_infinity(samples, reference)
    other = distances.frechet_infinity(samples, reference, seed=1)
    assert other.value != distances.frechet_infinity(samples, reference).value


# Kernel distance


def _poly_mmd(x, y):
    kid = pytest.importorskip("torchmetrics.image.kid")
    return float(kid.poly_mmd(torch.from_numpy(x).double(), torch.from_numpy(y).double()))


def test_kernel_distance_is_torchmetrics_():
    x, y = _samples(80, 12, 1), 1.2 * _samples(80, 12, 2) + 0.1
    # poly_mmd is the unbiased one: the diagonal is left out of both sides
    assert distances.kernel_distance(x, y).value == pytest.approx(_poly_mmd(x, y), rel=1e-10)


def test_kernel_distance_pair_by_pair(monkeypatch):
    monkeypatch.setattr(distances, "PAIRS", 50)  # blocks of a few rows
    x, y = _samples(23, 5, 1, np.float64), _samples(31, 5, 2, np.float64) + 0.2

    def mean(a, b, own):
        return np.mean([(u @ v / 5 + 1) ** 3 for i, u in enumerate(a) for j, v in enumerate(b) if not own or i != j])

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert distances.kernel_distance(x, y).value == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_of_constant_features():
    x, y = np.zeros((5, 4)), np.ones((6, 4))
    found = distances.kernel_distance(x, y)
    assert found.value == pytest.approx(1 + 2**3 - 2, rel=1e-12)  # k(0, 0) + k(1, 1) - 2 k(0, 1)
    assert (found.low, found.high) == (found.value, found.value)


def test_kernel_distance_looks_at_the_rows_it_is_told_to():
    x, y = _samples(60, 4, 1), _samples(70, 4, 2)
    found = distances.kernel_distance(x, y, most=30)
    assert found == distances.kernel_distance(x, y, most=30)
    assert found != distances.kernel_distance(x, y)
    assert found != distances.kernel_distance(x, y, most=30, seed=1)
    assert distances.kernel_distance(x, y, most=70) == distances.kernel_distance(x, y)


def test_kernel_distance_of_one_distribution_is_zero_on_average():
    found = [
        distances.kernel_distance(_samples(40, 8, seed), _samples(60, 8, 1000 + seed)).value for seed in range(200)
    ]
    assert abs(np.mean(found)) < 3 * np.std(found) / 200**0.5


# Inception score


def test_inception_score_of_no_opinion_is_one():
    found = distances.inception_score(np.zeros((40, 7)))
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1), rel=1e-12)


def test_inception_score_of_all_classes_equally_often_is_their_number():
    certain = np.where(np.arange(60)[:, None] % 6 == np.arange(6), 1000.0, 0.0).astype(np.float32)
    assert distances.inception_score(certain, splits=1).value == pytest.approx(6, rel=1e-12)
    assert distances.inception_score(certain, splits=6).value < 6  # a split does not have them equally often


def test_inception_score_of_one_class_is_one():
    assert distances.inception_score(np.tile([1000.0, 0.0], (40, 1))).value == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("splits", [1, 4])
def test_inception_score_is_the_formula(splits, monkeypatch):
    monkeypatch.setattr(distances, "ROWS", 7)
    logits = 3 * _samples(101, 9, 1)
    found = distances.inception_score(logits, splits)
    order = distances.randomness.permutation(0, distances.STREAM, 0, 101).numpy()
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    scores = []
    for rows in np.array_split(order, splits):
        part = p[rows]
        scores.append(np.exp(np.mean(np.sum(part * np.log(part / part.mean(axis=0)), axis=1))))
    assert found.value == pytest.approx(np.mean(scores), rel=1e-10)


def test_inception_score_s_interval_holds_other_draws():
    def score(seed):
        return distances.inception_score(2 * _samples(300, 10, seed))

    found = [score(seed) for seed in range(200)]
    target = np.mean([each.value for each in found])
    assert 0.9 < np.mean([each.low <= target <= each.high for each in found]) < 0.99


# Neighbours


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_neighbours_are_prdc_s(k, scale, monkeypatch):
    prdc = pytest.importorskip("prdc")
    monkeypatch.setattr(distances, "PAIRS", 1000)
    real, fake = _samples(150, 6, 1), scale * _samples(120, 6, 2)
    expected = prdc.compute_prdc(real, fake, k)
    found = distances.precision_recall(fake, real, k) | distances.density_coverage(fake, real, k)
    assert {name: each.value for name, each in found.items()} == pytest.approx(expected, rel=1e-12)
    assert all(each.low <= each.value <= each.high for each in found.values())
    assert 0 < found["precision"].value < 1 or scale < 1
    assert 0 < found["recall"].value < 1


def test_each_has_the_k_of_its_paper():
    real, fake = _samples(150, 6, 1), _samples(120, 6, 2)
    assert distances.precision_recall(fake, real) == distances.precision_recall(fake, real, 3)
    assert distances.density_coverage(fake, real) == distances.density_coverage(fake, real, 5)


def test_neighbours_by_hand():
    reference, samples = np.array([[0.0], [1.0], [10.0], [12.0]]), np.array([[0.4], [11.0], [30.0]])
    found = distances.precision_recall(samples, reference, 1) | distances.density_coverage(samples, reference, 1)
    # the balls around the reference reach 1, 1, 2, 2; those around the samples 10.6, 10.6, 19
    assert found["precision"].value == pytest.approx(2 / 3)
    assert found["recall"].value == 1
    assert found["density"].value == pytest.approx(4 / 3)  # 0.4 is in two balls, 11 in two
    assert found["coverage"].value == 1
    assert distances.authenticity(samples, reference).value == pytest.approx(1 / 3)  # 30 alone is far from 12


def test_equal_rows_have_balls_of_no_size():
    reference = np.ones((5, 3))
    inside = distances.precision_recall(reference, reference, 3) | distances.density_coverage(reference, reference, 4)
    assert [each.value for each in inside.values()] == [1, 1, 5 / 4, 1]
    outside = distances.precision_recall(reference + 0.1, reference, 3)
    assert [each.value for each in outside.values()] == [0, 0]


@pytest.mark.parametrize("count", [1, 4])
def test_the_nearest_are_sklearn_s(count, monkeypatch):
    neighbours = pytest.importorskip("sklearn.neighbors")
    monkeypatch.setattr(distances, "PAIRS", 300)
    features, reference = _samples(70, 5, 1), _samples(90, 5, 2)
    tree = neighbours.NearestNeighbors(n_neighbors=count, algorithm="kd_tree").fit(reference.astype(np.float64))
    expected, rows = tree.kneighbors(features.astype(np.float64))
    distance, index = distances.nearest(features, reference, count)
    assert distance.shape == index.shape == ((70, count) if count > 1 else (70,))
    np.testing.assert_allclose(distance, expected.reshape(distance.shape), rtol=1e-10)
    np.testing.assert_array_equal(index, rows.reshape(index.shape))


def test_copies_are_found():
    reference = _samples(200, 16, 1) + 5
    copies = reference[[3, 7, 11]]
    distance, index = distances.nearest(copies, reference)
    assert distance.tolist() == [0, 0, 0]
    assert index.tolist() == [3, 7, 11]
    fresh = _samples(100, 16, 2) + 5
    assert distances.authenticity(copies, reference).value == 0
    assert distances.authenticity(copies, np.concatenate((reference, reference))).value == 0
    half = distances.authenticity(np.concatenate((fresh, reference[:100])), reference).value
    assert half == pytest.approx(distances.authenticity(fresh, reference).value / 2)
    assert 0.3 < distances.authenticity(fresh, reference).value < 0.8


@hypothesis_settings(max_examples=30)
@given(SEEDS)
def test_neighbours_do_not_change_when_all_is_moved_and_turned(seed):
    x, y, turn = _samples(30, 4, seed, np.float64), _samples(40, 4, seed + 1, np.float64), _rotation(4, seed)
    assert distances.precision_recall(x @ turn + 3, y @ turn + 3) == distances.precision_recall(x, y)
    assert distances.density_coverage(x @ turn + 3, y @ turn + 3) == distances.density_coverage(x, y)
    assert distances.authenticity(x @ turn + 3, y @ turn + 3) == distances.authenticity(x, y)


# What is asked of arrays

PAIRED = {
    "kernel": (distances.kernel_distance, 2, 2),
    "precision": (distances.precision_recall, 4, 4),
    "density": (distances.density_coverage, 2, 6),
    "nearest": (distances.nearest, 1, 1),
    "authenticity": (distances.authenticity, 1, 2),
}


@pytest.mark.parametrize("name", PAIRED)
def test_rows_must_be_enough_finite_and_of_one_width(name):
    measure, least, least_reference = PAIRED[name]
    x, y = _samples(least, 3, 1), _samples(least_reference, 3, 2)
    measure(x, y)
    with pytest.raises(TesseraError, match=f"at least {least} rows, not {least - 1}"):
        measure(x[1:], y)
    with pytest.raises(TesseraError, match=f"reference .*at least {least_reference} rows, not {least_reference - 1}"):
        measure(x, y[1:])
    with pytest.raises(TesseraError, match="widths: 3 and 2"):
        measure(x, y[:, :2])
    with pytest.raises(TesseraError, match=r"not \[3\]"):
        measure(x[0], y)
    x[0, 0] = np.nan
    with pytest.raises(TesseraError, match=f"1 of {least} rows"):
        measure(x, y)


def test_rows_of_the_others_must_be_enough():
    reference = Moments(0, np.zeros(30), np.eye(30))
    with pytest.raises(TesseraError, match="at least 120 rows, not 119"):
        distances.frechet_infinity(_samples(119, 30, 1), reference)
    distances.frechet_infinity(_samples(120, 30, 1), reference)
    with pytest.raises(TesseraError, match="at least 2 rows, not 1"):
        distances.frechet(_samples(1, 30, 1), Moments.of(_samples(1, 30, 1)), reference)
    with pytest.raises(TesseraError, match="widths: 4 and 30"):
        distances.frechet_infinity(_samples(100, 4, 1), reference)
    with pytest.raises(TesseraError, match="widths: 4 and 30"):
        distances.frechet(_samples(9, 4, 1), Moments.of(_samples(9, 30, 1)), reference)
    with pytest.raises(TesseraError, match="10 splits .*at least 20 rows, not 19"):
        distances.inception_score(_samples(19, 4, 1))


# Coverage: how often 95 % intervals hold the truth, in simulations; benchmarks/evaluation_distances.py runs more


def _coverage(apart, kind, repeats, count=320, width=8):
    """Shares of intervals that hold: FD's the mean FD, FD at infinity's the true FD, KID's the mean KID."""
    reference = Moments(0, np.zeros(width), np.eye(width))
    scale, shift = 1 + apart, apart
    truth = width * (shift**2 + (scale - 1) ** 2)
    found, infinite, kernel = [], [], []
    for seed in range(repeats):
        numbers = np.random.default_rng(seed)
        rows = numbers.normal(size=(count, width))
        if kind == "heavy":  # Student's t of 6 degrees of freedom, of variance 1
            rows *= np.sqrt(4 / numbers.chisquare(6, size=(count, 1)))
        rows = shift + scale * rows
        found.append(distances.frechet(rows, Moments.of(rows), reference))
        infinite.append(distances.frechet_infinity(rows, reference, seed))
        kernel.append(distances.kernel_distance(rows[:100], numbers.normal(size=(100, width))))

    def held(measured, target):
        return np.mean([each.low <= target <= each.high for each in measured])

    return held(found, np.mean([each.value for each in found])), held(infinite, truth), kernel


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("apart", [0.0, 0.3])
def test_intervals_hold_what_they_say(apart, kind):
    fd, infinite, kernel = _coverage(apart, kind, 200)
    # 3 standard errors of a share of 200 below 95 % is 90.4 %
    assert fd >= 0.9
    assert infinite >= 0.9
    assert fd <= 0.985 or apart == 0  # and not so wide that they always hold
    if kind == "normal":  # the cubic kernel of Student's t of 6 degrees has no variance
        target = np.mean([each.value for each in kernel]) if apart else 0.0
        assert np.mean([each.low <= target <= each.high for each in kernel]) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("apart", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("width", [8, 32])
def test_intervals_hold_what_they_say_in_many_repeats(apart, kind, width):
    fd, infinite, _ = _coverage(apart, kind, 1000, count=20 * width, width=width)
    assert fd >= 0.92  # 160 samples with heavy tails: 92.9 %
    assert infinite >= 0.92


@pytest.mark.parametrize("alike", [0.0, 0.95])
def test_pulls_tell_the_error_of_a_score_and_of_a_paired_difference(alike):
    """Two models that draw from the same noise: how much their difference varies, against what pulls say of it."""
    numbers = np.random.default_rng(1)
    reference = Moments(10_000, np.zeros(4), np.eye(4))
    differences, told = [], []
    for _ in range(400):
        shared, own, others = numbers.normal(size=(3, 200, 4))
        drawn = [0.3 + 1.2 * (alike * shared + (1 - alike**2) ** 0.5 * noise) for noise in (own, others)]
        moments = [Moments.of(rows) for rows in drawn]
        pulls = [distances.frechet_pulls(rows, its, reference) for rows, its in zip(drawn, moments)]
        found = [distances.frechet(rows, its, reference) for rows, its in zip(drawn, moments)]
        assert 1.96 * pulls[0].std(ddof=1) / 200**0.5 == pytest.approx(found[0].high - found[0].value, rel=1e-4)
        differences.append(found[0].value - found[1].value)
        told.append((pulls[0] - pulls[1]).std(ddof=1) / 200**0.5)
    assert np.mean(told) == pytest.approx(np.std(differences), rel=0.15)
