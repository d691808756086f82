"""Features of samples and of a reference to numbers: how far apart they are, how many are shared, which are copied.

Features are numpy [N, D] (logits [N, K]), float32 or float64, memory maps included; float64 blocks of them do the
work, on the CPU and as many threads as torch has. Every interval is at 95 %, and says in its function what it is of;
benchmarks/evaluation_distances.md holds how often simulated truths were inside. All functions raise TesseraError
where an array is not [N, D], has too few rows, another width than its partner, or NaN.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from tessera import randomness
from tessera.errors import TesseraError
from tessera.evaluation.intervals import Estimate
from tessera.evaluation.moments import Moments, finite

STREAM = 0x64697374  # of randomness: which rows are taken, and which are taken together
GROUPS, SPLITS = 20, 3  # of frechet_infinity: groups left out in turn, and times that they are split into halves
PAIRS = 2**23  # pairs of rows looked at together: 64 MiB
ROWS = 4096  # rows looked at together where there are no pairs


# Fréchet distance


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), means [D], covariances [D, D] (Heusel et al. 2017, eq. 6).

    Of any rank. Raises TesseraError for other shapes, numbers that are not finite, covariances that are not symmetric.
    """
    first, second = _gaussian(mu1, cov1), _gaussian(mu2, cov2)
    return _frechet(first, second, _root(second[1]))


def frechet(features: np.ndarray, moments: Moments, reference: Moments) -> Estimate:
    """Fréchet distance of n samples to a reference. features [n, D], at least 2; moments are theirs.

    It falls with n, so compare at equal n only. The interval is of what n samples of the same model give on average,
    the reference taken as exact: the delta method. It serves for n < D too; it is too wide (98 %) where samples are of
    the reference's own distribution, and too narrow (83 to 92 %) for few samples (16) with heavy tails.
    """
    _rows(features, 2, "the Fréchet distance")
    _same_width(features.shape[1], len(moments.mean))
    first, second = _gaussian(moments.mean, moments.cov), _gaussian(reference.mean, reference.cov)
    root = _root(second[1])
    return Estimate.normal(_frechet(first, second, root), _frechet_error(features, first, second, root))


def frechet_pulls(features: np.ndarray, moments: Moments, reference: Moments) -> np.ndarray:
    """How much each of n samples pulls at their Fréchet distance to a reference, float64 [n]; moments are theirs.

    std(pulls) / sqrt(n) is the standard error of `frechet`. Of two models that drew from the same seeds,
    std(pulls - others) / sqrt(n) is that of the difference: less, the more alike their pictures are.
    """
    _rows(features, 2, "the Fréchet distance")
    _same_width(features.shape[1], len(moments.mean))
    first, second = _gaussian(moments.mean, moments.cov), _gaussian(reference.mean, reference.cov)
    return _pulls(features, first, second, _root(second[1])).numpy()


def frechet_infinity(features: np.ndarray, reference: Moments, seed: int = 0) -> Estimate:
    """Fréchet distance that infinitely many samples would have. features [n, D], at least 4 D and 80.

    Chong & Forsyth (2020) lay a straight line in 1 / n through ever smaller samples. The bend that it misses is, in
    many dimensions, larger than the noise; so this is a parabola, through three sizes near n: all samples, all but
    one of 20 groups (each in turn), and halves (three times two). At each size every sample counts alike.

    The interval is of the true distance, the reference taken as exact; the error is that of `frechet`. Values may be
    below 0 where the truth is near it. The parabola too misses some: at worst (features alike in all directions) 1 %
    of the plain distance for n = 4 D, 0.2 % for 10 D. Where the truth is near 0 that can be more than the interval.
    """
    _rows(features, max(4 * features.shape[-1], 80), "the Fréchet distance at infinitely many samples")
    order = randomness.permutation(seed, STREAM, 0, len(features)).numpy()
    groups = [Moments.of(features[np.sort(rows)]) for rows in np.array_split(order, GROUPS)]
    whole = _merged(groups)
    second = _gaussian(reference.mean, reference.cov)
    root = _root(second[1])

    def at(parts: Iterable[Moments]) -> np.ndarray:
        """(size as a share of all, inverted; distance), averaged"""
        found = [(whole.count / part.count, _frechet(_gaussian(part.mean, part.cov), second, root)) for part in parts]
        return np.mean(found, axis=0)

    halves = []
    for split in range(SPLITS):
        half = _merged([groups[i] for i in randomness.permutation(seed, STREAM, 1 + split, GROUPS)[: GROUPS // 2]])
        halves += [half, whole.without(half)]
    points = np.stack((at([whole]), at(whole.without(group) for group in groups), at(halves)))
    value = float(np.polyfit(points[:, 0], points[:, 1], 2)[-1])
    return Estimate.normal(value, _frechet_error(features, _gaussian(whole.mean, whole.cov), second, root))


def _gaussian(mean: np.ndarray, cov: np.ndarray) -> tuple[Tensor, Tensor]:
    """float64 mean [D] and covariance [D, D], or TesseraError."""
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise TesseraError(
            f"a mean of {list(mean.shape)} and a covariance of {list(cov.shape)}; expected [D] and [D, D]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise TesseraError("a mean or covariance holds NaN or infinity; look at the features that it is of")
    if np.abs(cov - cov.T).max(initial=0) > 1e-8 * np.abs(cov).max(initial=0):
        raise TesseraError("a covariance is not symmetric; is it of other data, or damaged?")
    return _tensor(mean), _tensor(cov)


def _merged(parts: list[Moments]) -> Moments:
    merged = Moments()
    for part in parts:
        merged.merge(part)
    return merged


def _floor(values: Tensor) -> Tensor:
    """What rounding leaves of an eigenvalue that is zero: below it they are, as the root would make much of them."""
    return len(values) * torch.finfo(values.dtype).eps * values.amax() if len(values) else values.sum()


def _root(cov: Tensor) -> Tensor:
    """A [D, rank] with A A^T = cov."""
    root, failed = torch.linalg.cholesky_ex(cov)
    pivots = root.diagonal().square()
    if not failed and (pivots > _floor(pivots)).all():
        return root
    values, vectors = torch.linalg.eigh(cov)
    kept = values > _floor(values)
    return vectors[:, kept] * values[kept].sqrt()


def _frechet(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], root: Tensor) -> float:
    """root A is of the second: A^T cov1 A has the eigenvalues of cov1 cov2, and is symmetric."""
    (mu1, cov1), (mu2, cov2) = first, second
    _same_width(len(mu1), len(mu2))
    values = torch.linalg.eigvalsh(root.T @ cov1 @ root)
    shared = values[values > _floor(values)].sqrt().sum()
    return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * shared)


def _frechet_error(
    features: np.ndarray, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], root: Tensor
) -> float:
    """Standard error of the distance."""
    return float(_pulls(features, first, second, root).std()) / len(features) ** 0.5


def _pulls(features: np.ndarray, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], root: Tensor) -> Tensor:
    """How much each sample pulls at the distance, float64 [n]: its influence function, up to a constant.

    At x: 2 (mu1 - mu2).(x - mu1) + (x - mu1)^T (1 - T) (x - mu1), with T = A (A^T cov1 A)^(-1/2) A^T the optimal
    transport from the first Gaussian to the second.
    """
    (mu1, cov1), mu2 = first, second[0]
    values, vectors = torch.linalg.eigh(root.T @ cov1 @ root)
    kept = values > _floor(values)
    transport = root @ vectors[:, kept] * values[kept] ** -0.25  # its square is T
    pulls = []
    for start in range(0, len(features), ROWS):
        centred = _tensor(features[start : start + ROWS]) - mu1
        curved = centred.square().sum(dim=1) - (centred @ transport).square().sum(dim=1)
        pulls.append(2 * centred @ (mu1 - mu2) + curved)
    return torch.cat(pulls)


# Kernel distance


def kernel_distance(features: np.ndarray, reference: np.ndarray, most: int = 10_000, seed: int = 0) -> Estimate:
    """KID: the squared maximum mean discrepancy of the kernel (x.y / D + 1)^3 (Binkowski et al. 2018), unbiased.

    features [N, D], reference [M, D]; of each at most `most` rows, and at least 2. Over all pairs, not over subsets as
    peers do, so there is no noise of the choice. Values may be below 0 where the distributions agree.

    The interval is of the true discrepancy, both sides taken as samples: from the variance of each row's mean kernel
    (the first-order terms of the U-statistic). For equal distributions those vanish, and what noise leaves of them is
    twice the variance: the interval is then too wide (98 %). It is a little narrow (91 %) for some tens of rows.
    """
    x, y = _pair(_chosen(features, most, seed), _chosen(reference, most, seed), 2, "the kernel distance")
    n, m = len(x), len(y)
    over_y, over_x = _kernel_sums(x, y)
    pull_x = (_kernel_sums(x, x)[0] - _own_kernel(x)) / (n - 1) - over_y / m
    pull_y = (_kernel_sums(y, y)[0] - _own_kernel(y)) / (m - 1) - over_x / n
    error = 2 * (pull_x.var() / n + pull_y.var() / m).sqrt()
    return Estimate.normal(float(pull_x.mean() + pull_y.mean()), float(error))


def _kernel_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel of every pair, summed over y [N] and over x [M]."""
    over_y, over_x = [], torch.zeros(len(y), dtype=x.dtype)
    for rows in _blocks(x, y):
        kernel = (x[rows] @ y.T).div_(x.shape[1]).add_(1).pow_(3)
        over_y.append(kernel.sum(dim=1))
        over_x += kernel.sum(dim=0)
    return torch.cat(over_y), over_x


def _own_kernel(x: Tensor) -> Tensor:
    return (x.square().sum(dim=1) / x.shape[1] + 1) ** 3


# Inception score


def inception_score(logits: np.ndarray, splits: int = 10, seed: int = 0) -> Estimate:
    """exp of the mean KL divergence of p(class | picture) from p(class), averaged over splits (Salimans et al. 2016).

    logits [N, K] of a classifier, at least 2 rows a split. They are shuffled first, so that samples in the order of
    their classes are no special case. The interval is of what as many other samples would give on average: to first
    order a sample pulls at its split's score by its own divergence. Fewer samples a split give a lower score.
    """
    _rows(logits, 2 * splits, f"the Inception score of {splits} splits")
    order = randomness.permutation(seed, STREAM, 0, len(logits)).numpy()
    scores, pulls = [], []
    for rows in np.array_split(order, splits):
        part = logits[np.sort(rows)]
        average = torch.stack([told.exp().sum(dim=0) for told in _log_probabilities(part)]).sum(dim=0) / len(part)
        divergence = torch.cat([_divergence(told, average) for told in _log_probabilities(part)])
        score = divergence.mean().exp()
        scores.append(float(score))
        pulls.append(score * (divergence - divergence.mean()))
    return Estimate.normal(float(np.mean(scores)), float(torch.cat(pulls).std()) / len(logits) ** 0.5)


def _log_probabilities(logits: np.ndarray) -> Iterator[Tensor]:
    for start in range(0, len(logits), ROWS):
        yield _tensor(logits[start : start + ROWS]).log_softmax(dim=1)


def _divergence(told: Tensor, average: Tensor) -> Tensor:
    """KL(told || average) [N] of log-probabilities [N, K] and probabilities [K]."""
    p = told.exp()
    return (p * told - torch.xlogy(p, average)).sum(dim=1)  # xlogy: a class that is never told has the logarithm of 0


# Neighbours


def precision_recall(features: np.ndarray, reference: np.ndarray, k: int = 3) -> dict[str, Estimate]:
    """precision: the share of samples inside a ball around a reference row that reaches to its k-th nearest fellow;
    recall: the share of reference rows inside such a ball around a sample (Kynkäänniemi et al. 2019, k = 3 as there).

    features [N, D], reference [M, D], each at least k + 1; compare at equal N and M only. A ball holds its border, as
    in the paper (the package prdc leaves it out), so one of radius 0, where k fellows are equal, holds equal rows. The
    intervals are Wilson's, of these shares among infinitely many rows inside the same balls: that other rows would
    make other balls they do not cover.
    """
    x, y = _pair(features, reference, k + 1, f"precision and recall with k = {k}")
    x_reach, y_reach = _reach(x, k), _reach(y, k)
    inside, covered = 0, torch.zeros(len(y), dtype=torch.bool)
    for rows, squared in _squared(x, y):
        inside += int((squared <= y_reach).any(dim=1).sum())
        covered |= (squared <= x_reach[rows, None]).any(dim=0)
    return {"precision": Estimate.proportion(inside, len(x)), "recall": Estimate.proportion(int(covered.sum()), len(y))}


def density_coverage(features: np.ndarray, reference: np.ndarray, k: int = 5) -> dict[str, Estimate]:
    """density: in how many balls around reference rows a sample is, over k; coverage: the share of these balls that
    hold a sample (Naeem et al. 2020, k = 5 as there).

    features [N, D], at least 2; reference [M, D], at least k + 1. Balls as in `precision_recall`. The intervals take
    the balls as exact: normal for the density, of the mean of other samples; for coverage Wilson's, of the share among
    infinitely many reference rows.
    """
    x, y = _pair(features, reference, 2, f"density and coverage with k = {k}", k + 1)
    reach = _reach(y, k)
    around, closest = [], torch.full((len(y),), torch.inf, dtype=y.dtype)
    for _, squared in _squared(x, y):
        around.append((squared <= reach).sum(dim=1))
        closest = torch.minimum(closest, squared.amin(dim=0))
    density = torch.cat(around).to(x.dtype) / k
    return {
        "density": Estimate.normal(float(density.mean()), float(density.std()) / len(x) ** 0.5),
        "coverage": Estimate.proportion(int((closest <= reach).sum()), len(y)),
    }


def nearest(features: np.ndarray, reference: np.ndarray, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Distances to the nearest reference rows, float64 [N], and their numbers, int64 [N]; [N, count] where count > 1.

    features [N, D], at least 1; reference [M, D], at least count.
    """
    x, y = _pair(features, reference, 1, f"the {count} nearest", count)
    squared, index = _nearest(x, y, count)
    shape = (len(x), count) if count > 1 else (len(x),)
    return squared.sqrt().reshape(shape).numpy(), index.reshape(shape).numpy()


def authenticity(features: np.ndarray, reference: np.ndarray) -> Estimate:
    """The share of samples farther from their nearest reference row than that row is from its nearest fellow (Alaa et
    al. 2022): copies are not. Pictures held out of the reference reach no 100 % either: compare with theirs.

    features [N, D], at least 1; reference [M, D], at least 2. A sample equal to a reference row is a copy, also where
    that row has an equal fellow. Wilson's interval, of the share among infinitely many samples, the reference fixed.
    """
    x, y = _pair(features, reference, 1, "authenticity", 2)
    squared, index = _nearest(x, y, 1)
    return Estimate.proportion(int((squared > _reach(y, 1)[index]).sum()), len(x))


def _nearest(x: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Squared distances, ascending, and numbers of the nearest y, [N, count]."""
    found = [squared.topk(count, largest=False) for _, squared in _squared(x, y)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def _reach(x: Tensor, k: int) -> Tensor:
    """Squared distance of every row to the k-th nearest other [N]."""
    found = []
    for rows, squared in _squared(x, x):
        squared[:, rows].fill_diagonal_(torch.inf)
        found.append(squared.topk(k, largest=False).values[:, -1])
    return torch.cat(found)


def _squared(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of some rows of x to all of y, [rows, M], until all rows had their turn."""
    x_norm, y_norm = x.square().sum(dim=1), y.square().sum(dim=1)
    for rows in _blocks(x, y):
        norms = x_norm[rows, None] + y_norm
        squared = torch.addmm(norms, x[rows], y.T, alpha=-2)
        # Rounding leaves a little of the distance of equal rows; float32 features tell nothing below this apart.
        yield rows, squared.masked_fill_(squared < 1e-13 * norms, 0)


def _blocks(x: Tensor, y: Tensor) -> Iterator[slice]:
    step = max(1, PAIRS // len(y))
    return (slice(start, min(start + step, len(x))) for start in range(0, len(x), step))


# What is asked of arrays


def _rows(rows: np.ndarray, least: int, what: str) -> None:
    finite(rows)
    if len(rows) < least:
        width = rows.shape[1]
        raise TesseraError(f"{what} (width {width}) needs at least {least} rows, not {len(rows)}; take more pictures")


def _pair(
    features: np.ndarray, reference: np.ndarray, least: int, what: str, least_reference: int | None = None
) -> tuple[Tensor, Tensor]:
    """Both as float64."""
    _rows(features, least, what)
    _rows(reference, least if least_reference is None else least_reference, f"{what}, in the reference")
    _same_width(features.shape[1], reference.shape[1])
    return _tensor(features), _tensor(reference)


def _same_width(one: int, other: int) -> None:
    if one != other:
        raise TesseraError(f"features of different widths: {one} and {other}; take both from the same network")


def _chosen(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most so many rows, in order."""
    if len(rows) <= most:
        return rows
    return rows[np.sort(randomness.permutation(seed, STREAM, 0, len(rows))[:most].numpy())]


def _tensor(rows: np.ndarray) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)
