"""Metrics on features: how far samples are from a reference, how much they overlap with it, which ones are copies.

Features are numpy [N, D] (logits [N, K]), float32 or float64, memory maps included. Computation is in float64 blocks on
the CPU, on all threads that torch uses. Every interval is a 95 % interval; each function states what it covers, and
benchmarks/evaluation_distances.md reports how often simulated truths were inside. All functions raise TesseraError
if an array is not [N, D], has too few rows, another width than the other array, or holds NaN.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tessera import randomness
from tessera.errors import TesseraError
from tessera.evaluation.moments import Moments, check_finite
from tessera.reporting.estimates import Estimate

STREAM = 0x64697374  # random stream: which rows are used, and which are grouped
GROUPS, SPLITS = 20, 3  # of frechet_infinity: groups left out one at a time, and random splits into halves
PAIRS = 2**23  # pairs of rows computed together: 64 MiB
ROWS = 4096  # rows computed together, where there are no pairs


# Fréchet distance


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), means [D], covariances [D, D] (Heusel et al. 2017, eq. 6).

    The covariances may have any rank. Raises TesseraError for other shapes, values that are not finite, or covariances
    that are not symmetric.
    """
    first, second = _gaussian(mu1, cov1), _gaussian(mu2, cov2)
    return _frechet(first, second, _root(second[1]))


def frechet(features: np.ndarray, moments: Moments, reference: Moments) -> Estimate:
    """Fréchet distance of n samples to a reference. features [n, D], n >= 2; moments are those of the features.

    It decreases with n, so compare at equal n only. The interval covers the expected distance of n samples of the same
    model, with the reference taken as exact (delta method). It is valid for n < D too. It is too wide (98 %) if samples
    have the reference's own distribution, and too narrow (83 to 92 %) for few samples (16) with heavy tails.
    """
    first, second, root = _frechet_terms(features, moments, reference)
    return Estimate.normal(_frechet(first, second, root), _frechet_error(features, first, second, root))


def frechet_influences(features: np.ndarray, moments: Moments, reference: Moments) -> np.ndarray:
    """The influence of each of n samples on their Fréchet distance to a reference, float64 [n].

    std(influences) / sqrt(n) is the standard error of `frechet`. For two models sampled with the same seeds,
    std(influences - others) / sqrt(n) is the standard error of the difference. It is smaller the more similar their
    images are.
    """
    return _influences(features, *_frechet_terms(features, moments, reference)).numpy()


def frechet_infinity(features: np.ndarray, reference: Moments, seed: int = 0) -> Estimate:
    """Fréchet distance extrapolated to infinitely many samples. features [n, D], n >= max(4 D, 80).

    Chong & Forsyth (2020) fit a straight line in 1 / n to ever smaller sample counts. In many dimensions the curvature
    that a line misses is larger than the noise. So this fits a parabola to three counts near n: all samples, all but
    one of 20 groups (each in turn), and halves (three times two). At each count every sample has the same weight.

    The interval covers the true distance, with the reference taken as exact; its error is that of `frechet`. Values may
    be below 0 if the truth is near it. The parabola is biased, too: at worst (features alike in all directions) by 1 %
    of the plain distance for n = 4 D, 0.2 % for 10 D. If the truth is near 0, that can exceed the interval.
    """
    _check_rows(features, max(4 * features.shape[-1], 80), "the Fréchet distance at infinitely many samples")
    order = randomness.permutation(seed, STREAM, 0, len(features)).numpy()
    groups = [Moments.from_rows(features[np.sort(rows)]) for rows in np.array_split(order, GROUPS)]
    full = _merge(groups)
    second = _gaussian(reference.mean, reference.cov)
    root = _root(second[1])

    def mean_point(subsets: Iterable[Moments]) -> np.ndarray:
        """(n / size of the subset, distance), averaged over subsets."""
        points = [(full.count / part.count, _frechet(_gaussian(part.mean, part.cov), second, root)) for part in subsets]
        return np.mean(points, axis=0)

    halves = []
    for split in range(SPLITS):
        half = _merge([groups[i] for i in randomness.permutation(seed, STREAM, 1 + split, GROUPS)[: GROUPS // 2]])
        halves += [half, full.without(half)]
    leave_one_out = (full.without(group) for group in groups)
    points = np.stack((mean_point([full]), mean_point(leave_one_out), mean_point(halves)))
    value = float(np.polyfit(points[:, 0], points[:, 1], 2)[-1])
    return Estimate.normal(value, _frechet_error(features, _gaussian(full.mean, full.cov), second, root))


Gaussian = tuple[Tensor, Tensor]  # mean [D], covariance [D, D]


def _gaussian(mean: np.ndarray, cov: np.ndarray) -> Gaussian:
    """Float64 tensors. Raises TesseraError for arrays that are not a mean and a covariance."""
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise TesseraError(
            f"a mean of {list(mean.shape)} and a covariance of {list(cov.shape)}; expected [D] and [D, D]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise TesseraError("a mean or covariance holds NaN or infinity; check the features that it was computed from")
    if np.abs(cov - cov.T).max(initial=0) > 1e-8 * np.abs(cov).max(initial=0):
        raise TesseraError("a covariance is not symmetric; was it made from other data, or is it damaged?")
    return _tensor(mean), _tensor(cov)


def _frechet_terms(features: np.ndarray, moments: Moments, reference: Moments) -> tuple[Gaussian, Gaussian, Tensor]:
    """Both Gaussians, and a root of the reference's covariance."""
    _check_rows(features, 2, "the Fréchet distance")
    _check_same_width(features.shape[1], len(moments.mean))
    second = _gaussian(reference.mean, reference.cov)
    return _gaussian(moments.mean, moments.cov), second, _root(second[1])


def _merge(parts: list[Moments]) -> Moments:
    merged = Moments()
    for part in parts:
        merged.merge(part)
    return merged


def _tolerance(values: Tensor) -> Tensor:
    """The rounding error of eigenvalues. Smaller values count as zero, because their square root would be large."""
    return len(values) * torch.finfo(values.dtype).eps * values.amax() if len(values) else values.sum()


def _root(cov: Tensor) -> Tensor:
    """A [D, rank] with A A^T = cov."""
    root, failed = torch.linalg.cholesky_ex(cov)
    pivots = root.diagonal().square()
    if not failed and (pivots > _tolerance(pivots)).all():
        return root
    values, vectors = torch.linalg.eigh(cov)
    nonzero = values > _tolerance(values)
    return vectors[:, nonzero] * values[nonzero].sqrt()


def _frechet(first: Gaussian, second: Gaussian, root: Tensor) -> float:
    """With A = root of the second: A^T cov1 A has the eigenvalues of cov1 cov2, and is symmetric."""
    (mu1, cov1), (mu2, cov2) = first, second
    _check_same_width(len(mu1), len(mu2))
    values = torch.linalg.eigvalsh(root.T @ cov1 @ root)
    trace_of_root = values[values > _tolerance(values)].sqrt().sum()
    return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_of_root)


def _frechet_error(features: np.ndarray, first: Gaussian, second: Gaussian, root: Tensor) -> float:
    """Standard error of the distance."""
    return float(_influences(features, first, second, root).std()) / len(features) ** 0.5


def _influences(features: np.ndarray, first: Gaussian, second: Gaussian, root: Tensor) -> Tensor:
    """The influence function of the distance at each sample, up to a constant, float64 [n].

    At x: 2 (mu1 - mu2).(x - mu1) + (x - mu1)^T (1 - T) (x - mu1), with T = A (A^T cov1 A)^(-1/2) A^T the optimal
    transport map from the first Gaussian to the second.
    """
    (mu1, cov1), mu2 = first, second[0]
    values, vectors = torch.linalg.eigh(root.T @ cov1 @ root)
    nonzero = values > _tolerance(values)
    transport = root @ vectors[:, nonzero] * values[nonzero] ** -0.25  # transport @ transport.T is T
    influences = []
    for start in range(0, len(features), ROWS):
        centered = _tensor(features[start : start + ROWS]) - mu1
        quadratic = centered.square().sum(dim=1) - (centered @ transport).square().sum(dim=1)
        influences.append(2 * centered @ (mu1 - mu2) + quadratic)
    return torch.cat(influences)


# Kernel distance


def kernel_distance(features: np.ndarray, reference: np.ndarray, max_rows: int = 10_000, seed: int = 0) -> Estimate:
    """KID: the unbiased squared maximum mean discrepancy of the kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    features [N, D], reference [M, D], N, M >= 2; at most `max_rows` rows of each are used. It is the mean over all
    pairs, not over random subsets as in other packages, so it has no subset noise. Values may be below 0 if the
    distributions agree.

    The interval covers the true discrepancy, with both sides taken as samples. It uses the variance of each row's mean
    kernel (the first-order terms of the U-statistic). These terms vanish for equal distributions: the noise in them is
    twice the variance, and the interval is too wide (98 %). It is slightly narrow (91 %) for some tens of rows.
    """
    x, y = _pair(
        _random_rows(features, max_rows, seed), _random_rows(reference, max_rows, seed), 2, "the kernel distance"
    )
    n, m = len(x), len(y)
    over_y, over_x = _kernel_sums(x, y)
    influence_x = (_kernel_sums(x, x)[0] - _self_kernel(x)) / (n - 1) - over_y / m
    influence_y = (_kernel_sums(y, y)[0] - _self_kernel(y)) / (m - 1) - over_x / n
    error = 2 * (influence_x.var() / n + influence_y.var() / m).sqrt()
    return Estimate.normal(float(influence_x.mean() + influence_y.mean()), float(error))


def _kernel_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel of every pair, summed over y [N] and over x [M]."""
    over_y, over_x = [], torch.zeros(len(y), dtype=x.dtype)
    for rows in _blocks(x, y):
        kernel = (x[rows] @ y.T).div_(x.shape[1]).add_(1).pow_(3)
        over_y.append(kernel.sum(dim=1))
        over_x += kernel.sum(dim=0)
    return torch.cat(over_y), over_x


def _self_kernel(x: Tensor) -> Tensor:
    """The kernel of each row with itself [N]."""
    return (x.square().sum(dim=1) / x.shape[1] + 1) ** 3


# Inception score


def inception_score(logits: np.ndarray, splits: int = 10, seed: int = 0) -> Estimate:
    """exp of the mean KL divergence of p(class | image) from p(class), averaged over splits (Salimans et al. 2016).

    logits [N, K] of a classifier, at least 2 rows per split. They are shuffled first, so the order of the samples does
    not matter. The interval covers the expected score of as many other samples: to first order, a sample's influence on
    its split's score is its own divergence. Fewer samples per split give a lower score.
    """
    _check_rows(logits, 2 * splits, f"the Inception score of {splits} splits")
    order = randomness.permutation(seed, STREAM, 0, len(logits)).numpy()
    scores, influences = [], []
    for rows in np.array_split(order, splits):
        part = logits[np.sort(rows)]
        marginal = torch.stack([log_p.exp().sum(dim=0) for log_p in _log_probabilities(part)]).sum(dim=0) / len(part)
        divergence = torch.cat([_divergence(log_p, marginal) for log_p in _log_probabilities(part)])
        score = divergence.mean().exp()
        scores.append(float(score))
        influences.append(score * (divergence - divergence.mean()))
    return Estimate.normal(float(np.mean(scores)), float(torch.cat(influences).std()) / len(logits) ** 0.5)


def _log_probabilities(logits: np.ndarray) -> Iterator[Tensor]:
    for start in range(0, len(logits), ROWS):
        yield _tensor(logits[start : start + ROWS]).log_softmax(dim=1)


def _divergence(log_p: Tensor, marginal: Tensor) -> Tensor:
    """KL(p || marginal) [N] of log-probabilities [N, K] and probabilities [K]."""
    p = log_p.exp()
    return (p * log_p - torch.xlogy(p, marginal)).sum(dim=1)  # xlogy(0, 0) is 0: a class that no image has


# Nearest neighbors


def precision_recall(features: np.ndarray, reference: np.ndarray, k: int = 3) -> dict[str, Estimate]:
    """precision: the fraction of samples inside a ball around a reference row, whose radius is the distance to that
    row's k-th nearest neighbor; recall: the fraction of reference rows inside such a ball around a sample (Kynkäänniemi
    et al. 2019, who use k = 3).

    features [N, D], reference [M, D], N, M >= k + 1; compare at equal N and M only. A ball includes its border, as in
    the paper (the package prdc excludes it), so a ball of radius 0, where k neighbors are equal, contains equal rows.
    The intervals are Wilson intervals of these fractions among infinitely many rows inside the same balls. They do not
    cover the randomness of the balls.
    """
    x, y = _pair(features, reference, k + 1, f"precision and recall with k = {k}")
    x_radius, y_radius = _kth_distance(x, k), _kth_distance(y, k)
    inside, covered = 0, torch.zeros(len(y), dtype=torch.bool)
    for rows, squared in _squared_distances(x, y):
        inside += int((squared <= y_radius).any(dim=1).sum())
        covered |= (squared <= x_radius[rows, None]).any(dim=0)
    return {"precision": Estimate.proportion(inside, len(x)), "recall": Estimate.proportion(int(covered.sum()), len(y))}


def density_coverage(features: np.ndarray, reference: np.ndarray, k: int = 5) -> dict[str, Estimate]:
    """density: the number of balls around reference rows that contain a sample, divided by k; coverage: the fraction of
    these balls that contain a sample (Naeem et al. 2020, who use k = 5).

    features [N, D], N >= 2; reference [M, D], M >= k + 1. The balls are those of `precision_recall`. The intervals take
    the balls as exact. For density they are normal and cover the mean of other samples; for coverage they are Wilson
    intervals of the fraction among infinitely many reference rows.
    """
    x, y = _pair(features, reference, 2, f"density and coverage with k = {k}", k + 1)
    radius = _kth_distance(y, k)
    counts, closest = [], torch.full((len(y),), torch.inf, dtype=y.dtype)
    for _, squared in _squared_distances(x, y):
        counts.append((squared <= radius).sum(dim=1))
        closest = torch.minimum(closest, squared.amin(dim=0))
    density = torch.cat(counts).to(x.dtype) / k
    return {
        "density": Estimate.normal(float(density.mean()), float(density.std()) / len(x) ** 0.5),
        "coverage": Estimate.proportion(int((closest <= radius).sum()), len(y)),
    }


def nearest_neighbors(features: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances to the nearest reference rows, float64 [N], and their indices, int64 [N]. features [N, D], N >= 1;
    reference [M, D], M >= 1.
    """
    squared, index = _nearest(*_pair(features, reference, 1, "the nearest neighbor"))
    return squared.sqrt().numpy(), index.numpy()


def authenticity(features: np.ndarray, reference: np.ndarray) -> Estimate:
    """The fraction of samples that are farther from their nearest reference row than that row is from its own nearest
    neighbor (Alaa et al. 2022); copies are not. Images held out of the reference do not reach 100 % either, so compare
    with their value.

    features [N, D], N >= 1; reference [M, D], M >= 2. A sample equal to a reference row is a copy, even if the row has
    an equal neighbor. Wilson interval of the fraction among infinitely many samples, with the reference fixed.
    """
    x, y = _pair(features, reference, 1, "authenticity", 2)
    squared, index = _nearest(x, y)
    return Estimate.proportion(int((squared > _kth_distance(y, 1)[index]).sum()), len(x))


def _nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances and indices of the nearest rows of y [N]."""
    blocks = [squared.topk(1, largest=False) for _, squared in _squared_distances(x, y)]
    return torch.cat([block.values[:, 0] for block in blocks]), torch.cat([block.indices[:, 0] for block in blocks])


def _kth_distance(x: Tensor, k: int) -> Tensor:
    """Squared distance of every row to the k-th nearest other row [N]."""
    distances = []
    for rows, squared in _squared_distances(x, x):
        squared[:, rows].fill_diagonal_(torch.inf)
        distances.append(squared.topk(k, largest=False).values[:, -1])
    return torch.cat(distances)


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of all rows of x to all of y, in blocks [rows, M]."""
    x_norm, y_norm = x.square().sum(dim=1), y.square().sum(dim=1)
    for rows in _blocks(x, y):
        norms = x_norm[rows, None] + y_norm
        squared = torch.addmm(norms, x[rows], y.T, alpha=-2)
        # Rounding leaves a small distance between equal rows; float32 features do not resolve anything below this.
        yield rows, squared.masked_fill_(squared < 1e-13 * norms, 0)


def _blocks(x: Tensor, y: Tensor) -> Iterator[slice]:
    step = max(1, PAIRS // len(y))
    return (slice(start, min(start + step, len(x))) for start in range(0, len(x), step))


# Checks of arrays


def _check_rows(rows: np.ndarray, minimum: int, what: str) -> None:
    check_finite(rows)
    if len(rows) < minimum:
        width = rows.shape[1]
        raise TesseraError(f"{what} (width {width}) needs at least {minimum} rows, not {len(rows)}; use more images")


def _pair(
    features: np.ndarray, reference: np.ndarray, minimum: int, what: str, minimum_reference: int | None = None
) -> tuple[Tensor, Tensor]:
    """Both as float64."""
    _check_rows(features, minimum, what)
    _check_rows(reference, minimum if minimum_reference is None else minimum_reference, f"{what}, in the reference")
    _check_same_width(features.shape[1], reference.shape[1])
    return _tensor(features), _tensor(reference)


def _check_same_width(first: int, second: int) -> None:
    if first != second:
        raise TesseraError(f"features of different widths: {first} and {second}; use the same network for both")


def _random_rows(rows: np.ndarray, max_rows: int, seed: int) -> np.ndarray:
    """At most `max_rows` rows, in their order."""
    if len(rows) <= max_rows:
        return rows
    return rows[np.sort(randomness.permutation(seed, STREAM, 0, len(rows))[:max_rows].numpy())]


def _tensor(rows: np.ndarray) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def wasserstein(groups: Sequence[np.ndarray], reference: np.ndarray) -> Estimate:
    """The Wasserstein distance of numbers, in their unit: the mean distance of their quantiles from the reference's.

    groups: of independent samples. The interval is that of leaving out one group at a time (jackknife); with one group
    it has no width. It covers the noise of the samples, with the reference taken as exact.
    """
    from scipy.stats import wasserstein_distance

    parts = [np.ravel(group) for group in groups]
    value = float(wasserstein_distance(np.concatenate(parts), reference))
    if len(parts) < 2:
        return Estimate.normal(value, 0.0)
    without = [np.concatenate(parts[:index] + parts[index + 1 :]) for index in range(len(parts))]
    values = np.array([wasserstein_distance(numbers, reference) for numbers in without])
    return Estimate.normal(value, float(np.sqrt((len(values) - 1) * values.var())))
