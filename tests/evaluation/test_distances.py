"""Metrics against scipy, torchmetrics, prdc, closed forms, and simulations with a known truth."""

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
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(rank or 3 * width, width))
    return rng.normal(size=width), rows.T @ rows / len(rows)


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
    rng = np.random.default_rng(seed)
    rotation = _rotation(6, seed)
    a, b = rng.uniform(0.1, 4, (2, 6))
    mu1, mu2 = rng.normal(size=(2, 6))
    result = distances.frechet_distance(mu1, rotation * a @ rotation.T, mu2, rotation * b @ rotation.T)
    assert result == pytest.approx(np.sum((mu1 - mu2) ** 2) + np.sum((a**0.5 - b**0.5) ** 2), rel=1e-9)


def test_frechet_of_one_dimension_is_wasserstein_s():
    result = distances.frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([3.0]), np.array([[9.0]]))
    assert result == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2, rel=1e-12)


@given(SEEDS)
def test_frechet_is_symmetric_and_invariant_under_rotation(seed):
    (mu1, cov1), (mu2, cov2), rotation = _gaussian(5, seed), _gaussian(5, seed + 1), _rotation(5, seed)
    result = distances.frechet_distance(mu1, cov1, mu2, cov2)
    assert distances.frechet_distance(mu2, cov2, mu1, cov1) == pytest.approx(result, rel=1e-9)
    rotated = distances.frechet_distance(
        rotation @ mu1, rotation @ cov1 @ rotation.T, rotation @ mu2, rotation @ cov2 @ rotation.T
    )
    assert rotated == pytest.approx(result, rel=1e-9)


@pytest.mark.parametrize("rank", [None, 7])
def test_frechet_of_equal_gaussians_is_zero(rank):
    mu, cov = _gaussian(32, 1, rank)
    assert distances.frechet_distance(mu, cov, mu, cov) == pytest.approx(0, abs=1e-12 * np.trace(cov))


@pytest.mark.parametrize(("n1", "n2"), [(20, 300), (300, 20), (20, 30), (2, 2)])
def test_frechet_of_fewer_rows_than_dimensions(n1, n2):
    """tr (S1 S2)^(1/2) is the nuclear norm of the centered rows' product, which needs no root of an eigenvalue."""
    x, y = _samples(n1, 100, 1, np.float64), 2 * _samples(n2, 100, 2, np.float64) + 0.1
    one, two = Moments.from_rows(x), Moments.from_rows(y)
    shared = np.linalg.norm((x - one.mean) @ (y - two.mean).T, "nuc") / ((n1 - 1) * (n2 - 1)) ** 0.5
    expected = np.sum((one.mean - two.mean) ** 2) + np.trace(one.cov) + np.trace(two.cov) - 2 * shared
    assert distances.frechet_distance(one.mean, one.cov, two.mean, two.cov) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_ill_conditioned_covariances():
    """Standard deviations from 1 to 1e-6. They commute, so the truth is known: all differ by a factor of two."""
    deviation, rotation = np.logspace(0, -6, 64), _rotation(64, 1)
    one, two = rotation * deviation**2 @ rotation.T, rotation * (2 * deviation) ** 2 @ rotation.T
    one, two, mean = (one + one.T) / 2, (two + two.T) / 2, np.zeros(64)
    assert distances.frechet_distance(mean, one, mean, two) == pytest.approx(np.sum(deviation**2), rel=1e-6)


def test_frechet_where_scipy_s_root_fails():
    linalg = pytest.importorskip("scipy.linalg")
    x, mean = _samples(40, 100, 1, np.float64), np.zeros(100)
    cov = Moments.from_rows(x).cov
    root = np.trace(linalg.sqrtm(cov @ cov))
    naive = float(np.real(2 * np.trace(cov) - 2 * root))
    assert not abs(naive) < 1e-6  # NaN, or noise of roots of what should be zero
    assert distances.frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-10)


def test_frechet_of_constant_features():
    mu, cov = _gaussian(8, 1)
    zero = np.zeros((8, 8))
    expected = np.sum(mu**2) + np.trace(cov)
    assert distances.frechet_distance(mu, cov, np.zeros(8), zero) == pytest.approx(expected, rel=1e-12)
    assert distances.frechet_distance(np.zeros(8), zero, mu, cov) == pytest.approx(expected, rel=1e-12)
    assert distances.frechet_distance(np.zeros(8), zero, np.ones(8), zero) == 8


def test_frechet_of_covariances_without_common_directions():
    """Each varies only where the other does not."""
    rotation, mean = _rotation(12, 1), np.zeros(12)
    one, two = rotation[:, :5] @ rotation[:, :5].T, rotation[:, 5:] @ rotation[:, 5:].T
    assert distances.frechet_distance(mean, one, mean, two) == pytest.approx(5 + 7, rel=1e-6)


def test_invalid_moments_are_an_error():
    mu, cov = _gaussian(4, 1)
    skew, nan = cov.copy(), mu.copy()
    skew[0, 1] += 0.1
    nan[0] = np.nan
    for invalid, message in (((mu[:3], cov), "expected"), ((mu, skew), "symmetric"), ((nan, cov), "NaN")):
        with pytest.raises(TesseraError, match=message):
            distances.frechet_distance(*invalid, mu, cov)
        with pytest.raises(TesseraError, match=message):
            distances.frechet_distance(mu, cov, *invalid)
    with pytest.raises(TesseraError, match="widths: 4 and 3"):
        distances.frechet_distance(mu, cov, *_gaussian(3, 1))


def test_the_value_of_the_estimate_is_the_distance():
    samples, reference = _samples(50, 6, 1), Moments.from_rows(_samples(60, 6, 2) * 2)
    own = Moments.from_rows(samples)
    result = distances.frechet(samples, own, reference)
    assert result.value == distances.frechet_distance(own.mean, own.cov, reference.mean, reference.cov)
    assert result.low < result.value < result.high


def test_the_standard_error_is_that_of_the_jackknife():
    samples, reference = _samples(400, 3, 1) * 1.5 + 0.3, Moments(0, np.zeros(3), np.eye(3))
    own = Moments.from_rows(samples)
    result = distances.frechet(samples, own, reference)
    others = [own.without(Moments.from_rows(samples[i : i + 1])) for i in range(400)]
    leave_one_out = [distances.frechet_distance(m.mean, m.cov, reference.mean, reference.cov) for m in others]
    jackknife = np.sqrt(399 * np.var(leave_one_out))
    assert (result.high - result.value) / 1.959964 == pytest.approx(jackknife, rel=0.02)


def test_frechet_infinity_is_unbiased():
    """200 samples of 16 dimensions, where the plain distance is several times the truth."""
    reference = Moments(0, np.zeros(16), np.eye(16))
    value, infinite = [], []
    for seed in range(40):
        samples = 1.1 * _samples(200, 16, seed)
        value.append(distances.frechet(samples, Moments.from_rows(samples), reference).value)
        infinite.append(distances.frechet_infinity(samples, reference).value)
    truth = 16 * 0.1**2
    assert np.mean(value) > 3 * truth
    error = np.std(infinite) / 40**0.5
    assert abs(np.mean(infinite) - truth) < 3 * error
    assert error < truth / 10  # so that the line above could fail


def test_frechet_infinity_is_deterministic():
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
    # poly_mmd is unbiased: it excludes both diagonals
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
    result = distances.kernel_distance(x, y)
    assert result.value == pytest.approx(1 + 2**3 - 2, rel=1e-12)  # k(0, 0) + k(1, 1) - 2 k(0, 1)
    assert (result.low, result.high) == (result.value, result.value)


def test_kernel_distance_uses_at_most_max_rows():
    x, y = _samples(60, 4, 1), _samples(70, 4, 2)
    result = distances.kernel_distance(x, y, max_rows=30)
    assert result == distances.kernel_distance(x, y, max_rows=30)
    assert result != distances.kernel_distance(x, y)
    assert result != distances.kernel_distance(x, y, max_rows=30, seed=1)
    assert distances.kernel_distance(x, y, max_rows=70) == distances.kernel_distance(x, y)


def test_kernel_distance_of_one_distribution_is_zero_on_average():
    result = [
        distances.kernel_distance(_samples(40, 8, seed), _samples(60, 8, 1000 + seed)).value for seed in range(200)
    ]
    assert abs(np.mean(result)) < 3 * np.std(result) / 200**0.5


# Inception score


def test_inception_score_of_uniform_probabilities_is_one():
    result = distances.inception_score(np.zeros((40, 7)))
    assert (result.value, result.low, result.high) == pytest.approx((1, 1, 1), rel=1e-12)


def test_inception_score_of_certain_balanced_classes_is_their_number():
    certain = np.where(np.arange(60)[:, None] % 6 == np.arange(6), 1000.0, 0.0).astype(np.float32)
    assert distances.inception_score(certain, splits=1).value == pytest.approx(6, rel=1e-12)
    assert distances.inception_score(certain, splits=6).value < 6  # a split is not balanced


def test_inception_score_of_one_class_is_one():
    assert distances.inception_score(np.tile([1000.0, 0.0], (40, 1))).value == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("splits", [1, 4])
def test_inception_score_is_the_formula(splits, monkeypatch):
    monkeypatch.setattr(distances, "ROWS", 7)
    logits = 3 * _samples(101, 9, 1)
    result = distances.inception_score(logits, splits)
    order = distances.randomness.permutation(0, distances.STREAM, 0, 101).numpy()
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    scores = []
    for rows in np.array_split(order, splits):
        part = p[rows]
        scores.append(np.exp(np.mean(np.sum(part * np.log(part / part.mean(axis=0)), axis=1))))
    assert result.value == pytest.approx(np.mean(scores), rel=1e-10)


def test_the_interval_of_the_inception_score_covers_other_samples():
    def score(seed):
        return distances.inception_score(2 * _samples(300, 10, seed))

    result = [score(seed) for seed in range(200)]
    target = np.mean([e.value for e in result])
    assert 0.9 < np.mean([e.low <= target <= e.high for e in result]) < 0.99


# Nearest neighbors


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_neighbor_metrics_are_those_of_prdc(k, scale, monkeypatch):
    prdc = pytest.importorskip("prdc")
    monkeypatch.setattr(distances, "PAIRS", 1000)
    real, fake = _samples(150, 6, 1), scale * _samples(120, 6, 2)
    expected = prdc.compute_prdc(real, fake, k)
    result = distances.precision_recall(fake, real, k) | distances.density_coverage(fake, real, k)
    assert {name: each.value for name, each in result.items()} == pytest.approx(expected, rel=1e-12)
    assert all(each.low <= each.value <= each.high for each in result.values())
    assert 0 < result["precision"].value < 1 or scale < 1
    assert 0 < result["recall"].value < 1


def test_the_default_k_is_that_of_each_paper():
    real, fake = _samples(150, 6, 1), _samples(120, 6, 2)
    assert distances.precision_recall(fake, real) == distances.precision_recall(fake, real, 3)
    assert distances.density_coverage(fake, real) == distances.density_coverage(fake, real, 5)


def test_neighbor_metrics_by_hand():
    reference, samples = np.array([[0.0], [1.0], [10.0], [12.0]]), np.array([[0.4], [11.0], [30.0]])
    result = distances.precision_recall(samples, reference, 1) | distances.density_coverage(samples, reference, 1)
    # radii around the reference: 1, 1, 2, 2; around the samples: 10.6, 10.6, 19
    assert result["precision"].value == pytest.approx(2 / 3)
    assert result["recall"].value == 1
    assert result["density"].value == pytest.approx(4 / 3)  # 0.4 is in two balls, 11 in two
    assert result["coverage"].value == 1
    assert distances.authenticity(samples, reference).value == pytest.approx(1 / 3)  # 30 alone is far from 12


def test_equal_rows_have_balls_of_radius_zero():
    reference = np.ones((5, 3))
    inside = distances.precision_recall(reference, reference, 3) | distances.density_coverage(reference, reference, 4)
    assert [each.value for each in inside.values()] == [1, 1, 5 / 4, 1]
    outside = distances.precision_recall(reference + 0.1, reference, 3)
    assert [each.value for each in outside.values()] == [0, 0]


def test_nearest_neighbors_are_those_of_sklearn(monkeypatch):
    sklearn = pytest.importorskip("sklearn.neighbors")
    monkeypatch.setattr(distances, "PAIRS", 300)
    features, reference = _samples(70, 5, 1), _samples(90, 5, 2)
    tree = sklearn.NearestNeighbors(n_neighbors=1, algorithm="kd_tree").fit(reference.astype(np.float64))
    expected, rows = tree.kneighbors(features.astype(np.float64))
    distance, index = distances.nearest_neighbors(features, reference)
    assert distance.shape == index.shape == (70,)
    np.testing.assert_allclose(distance, expected.reshape(distance.shape), rtol=1e-10)
    np.testing.assert_array_equal(index, rows.reshape(index.shape))


def test_copies_have_distance_zero_and_are_not_authentic():
    reference = _samples(200, 16, 1) + 5
    copies = reference[[3, 7, 11]]
    distance, index = distances.nearest_neighbors(copies, reference)
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
def test_neighbor_metrics_are_invariant_under_shift_and_rotation(seed):
    x, y, rotation = _samples(30, 4, seed, np.float64), _samples(40, 4, seed + 1, np.float64), _rotation(4, seed)
    assert distances.precision_recall(x @ rotation + 3, y @ rotation + 3) == distances.precision_recall(x, y)
    assert distances.density_coverage(x @ rotation + 3, y @ rotation + 3) == distances.density_coverage(x, y)
    assert distances.authenticity(x @ rotation + 3, y @ rotation + 3) == distances.authenticity(x, y)


# Invalid arrays

PAIRED = {
    "kernel": (distances.kernel_distance, 2, 2),
    "precision": (distances.precision_recall, 4, 4),
    "density": (distances.density_coverage, 2, 6),
    "nearest": (distances.nearest_neighbors, 1, 1),
    "authenticity": (distances.authenticity, 1, 2),
}


@pytest.mark.parametrize("name", PAIRED)
def test_invalid_rows_are_an_error(name):
    metric, minimum, minimum_reference = PAIRED[name]
    x, y = _samples(minimum, 3, 1), _samples(minimum_reference, 3, 2)
    metric(x, y)
    with pytest.raises(TesseraError, match=f"at least {minimum} rows, not {minimum - 1}"):
        metric(x[1:], y)
    with pytest.raises(
        TesseraError, match=f"reference .*at least {minimum_reference} rows, not {minimum_reference - 1}"
    ):
        metric(x, y[1:])
    with pytest.raises(TesseraError, match="widths: 3 and 2"):
        metric(x, y[:, :2])
    with pytest.raises(TesseraError, match=r"not \[3\]"):
        metric(x[0], y)
    x[0, 0] = np.nan
    with pytest.raises(TesseraError, match=f"1 of {minimum} rows"):
        metric(x, y)


def test_too_few_rows_of_other_metrics_are_an_error():
    reference = Moments(0, np.zeros(30), np.eye(30))
    with pytest.raises(TesseraError, match="at least 120 rows, not 119"):
        distances.frechet_infinity(_samples(119, 30, 1), reference)
    distances.frechet_infinity(_samples(120, 30, 1), reference)
    with pytest.raises(TesseraError, match="at least 2 rows, not 1"):
        distances.frechet(_samples(1, 30, 1), Moments.from_rows(_samples(1, 30, 1)), reference)
    with pytest.raises(TesseraError, match="widths: 4 and 30"):
        distances.frechet_infinity(_samples(100, 4, 1), reference)
    with pytest.raises(TesseraError, match="widths: 4 and 30"):
        distances.frechet(_samples(9, 4, 1), Moments.from_rows(_samples(9, 30, 1)), reference)
    with pytest.raises(TesseraError, match="10 splits .*at least 20 rows, not 19"):
        distances.inception_score(_samples(19, 4, 1))


# Coverage of the 95 % intervals in simulations; benchmarks/evaluation_distances.py runs more


def _coverage(shift, kind, repeats, count=320, width=8):
    """Fractions of intervals that cover the mean FD and (at infinity) the true FD, and estimates of KID."""
    reference = Moments(0, np.zeros(width), np.eye(width))
    scale = 1 + shift
    truth = width * (shift**2 + (scale - 1) ** 2)
    plain, infinite, kernel = [], [], []
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(count, width))
        if kind == "heavy":  # Student's t of 6 degrees of freedom, of variance 1
            rows *= np.sqrt(4 / rng.chisquare(6, size=(count, 1)))
        rows = shift + scale * rows
        plain.append(distances.frechet(rows, Moments.from_rows(rows), reference))
        infinite.append(distances.frechet_infinity(rows, reference, seed))
        kernel.append(distances.kernel_distance(rows[:100], rng.normal(size=(100, width))))

    def coverage(estimates, target):
        return np.mean([e.low <= target <= e.high for e in estimates])

    return coverage(plain, np.mean([e.value for e in plain])), coverage(infinite, truth), kernel


@pytest.mark.parametrize(("kind", "shift"), [("normal", 0.3), ("heavy", 0.0)])
def test_intervals_cover_the_truth(shift, kind):
    fd, infinite, kernel = _coverage(shift, kind, 200)
    # 95 % minus 3 standard errors of a fraction of 200 is 90.4 %
    assert fd >= 0.9
    assert infinite >= 0.9
    assert fd <= 0.985 or shift == 0  # and they are not too wide
    if kind == "normal":  # the cubic kernel of Student's t of 6 degrees has no variance
        target = np.mean([each.value for each in kernel]) if shift else 0.0
        assert np.mean([each.low <= target <= each.high for each in kernel]) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("shift", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("width", [8, 32])
def test_intervals_cover_the_truth_in_many_repeats(shift, kind, width):
    fd, infinite, _ = _coverage(shift, kind, 1000, count=20 * width, width=width)
    assert fd >= 0.92  # 160 samples with heavy tails: 92.9 %
    assert infinite >= 0.92


@pytest.mark.parametrize("correlation", [0.0, 0.95])
def test_influences_give_the_error_of_a_score_and_of_a_paired_difference(correlation):
    """Two models with the same noise: the spread of their difference against the error from influences."""
    rng = np.random.default_rng(1)
    reference = Moments(10_000, np.zeros(4), np.eye(4))
    differences, errors = [], []
    for _ in range(400):
        shared, *noises = rng.normal(size=(3, 200, 4))
        models = [0.3 + 1.2 * (correlation * shared + (1 - correlation**2) ** 0.5 * noise) for noise in noises]
        moments = [Moments.from_rows(rows) for rows in models]
        influences = [distances.frechet_influences(rows, its, reference) for rows, its in zip(models, moments)]
        result = [distances.frechet(rows, its, reference) for rows, its in zip(models, moments)]
        assert 1.96 * influences[0].std(ddof=1) / 200**0.5 == pytest.approx(result[0].high - result[0].value, rel=1e-4)
        differences.append(result[0].value - result[1].value)
        errors.append((influences[0] - influences[1]).std(ddof=1) / 200**0.5)
    assert np.mean(errors) == pytest.approx(np.std(differences), rel=0.15)
