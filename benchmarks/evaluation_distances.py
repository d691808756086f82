"""Accuracy and cost of the distances of `tessera evaluate`.

    python benchmarks/evaluation_distances.py coverage [--widths 8 32 128] [--repeats 400]
    python benchmarks/evaluation_distances.py frechet [--widths 512 1024 2048] [--repeats 5]
    python benchmarks/evaluation_distances.py cost [--rows 10000] [--width 2048]

coverage: how often 95 % intervals contain the true value, in simulations where it is known. A cell has percentages for
samples from the reference's own distribution / near it / far from it. The reference has eigenvalues 1, 1/2, 1/3, ...;
the samples' covariance does not commute with it. Data are linear maps of independent normal numbers, of exponential
ones, and of multivariate Student's t with 6 degrees of freedom. The methods (Tessera uses those marked *):

    FD    of the mean of FD over sets of n samples: delta method*, the same with the transport of one half and the
          variance of the other (cross), 20-group jackknife
    FD∞   of the true distance, all with the error of the delta method: parabola*, the straight line through n and
          19/20 n (the jackknife's), the straight line through n, n/2, n/3, n/4 (Chong & Forsyth 2020)
    KID   of the true discrepancy (its mean over sets of samples; it is unbiased): at most 500 rows of each

frechet: seconds of the Fréchet distance of given moments against scipy.linalg.sqrtm(cov1 @ cov2), medians of
interleaved runs, and their relative difference. The last line has half as many samples as dimensions.

cost: seconds and the growth of peak memory of each distance, on random features in memory maps; each in a process
of its own.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from tessera.evaluation import distances
from tessera.evaluation.moments import Moments
from tessera.reporting.estimates import Z95, Estimate

NEAR, FAR = (0.1, 0.05), (0.6, 0.4)  # (how much of the covariance is another one, shift in deviations)
RATIOS = (0.5, 2, 5, 20)
DATA = {
    "normal": lambda numbers, n, d: numbers.normal(size=(n, d)),
    "exponential": lambda numbers, n, d: numbers.exponential(size=(n, d)) - 1,
    "Student's t": lambda numbers, n, d: numbers.normal(size=(n, d)) * np.sqrt(4 / numbers.chisquare(6, size=(n, 1))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, widths, repeats in (("coverage", (8, 32, 128), 400), ("frechet", (512, 1024, 2048), 5)):
        verb = verbs.add_parser(name)
        verb.add_argument("--widths", type=int, nargs="+", default=widths)
        verb.add_argument("--repeats", type=int, default=repeats)
    verb = verbs.add_parser("cost")
    verb.add_argument("--rows", type=int, nargs="+", default=(10_000,))
    verb.add_argument("--width", type=int, default=2048)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores\n")
    if options.verb == "coverage":
        coverage(options.widths, options.repeats)
    elif options.verb == "frechet":
        frechet(options.widths, options.repeats)
    else:
        cost(options.rows, options.width)


# Coverage


def coverage(widths: list[int], repeats: int) -> None:
    names = ("FD: delta*", "cross", "jackknife", "FD∞: parabola*", "line, jackknife", "line, n to n/4", "KID*")
    row("D", "n", "data", *names)
    row(*["---"] * (3 + len(names)))
    for width in widths:
        for ratio in RATIOS:
            count = int(width * ratio)
            if count < 16:
                continue
            for data in DATA:
                results = [simulate(width, count, data, apart, repeats) for apart in ((0, 0), NEAR, FAR)]
                row(width, count, data, *(" / ".join(each[name] for each in results) for name in names))


def simulate(width: int, count: int, data: str, apart: tuple[float, float], repeats: int) -> dict[str, str]:
    """How often the interval of each method holds, in percent."""
    mean, turn, reference = problem(width, *apart)
    truth = distances.frechet_distance(mean, turn @ turn.T, reference.mean, reference.cov)
    goal, root = torch_moments(reference), distances._root(torch.from_numpy(reference.cov))
    fd, fd_inf, kid = {}, {}, []
    for seed in range(repeats):
        numbers = np.random.default_rng(seed)
        rows = mean + DATA[data](numbers, count, width) @ turn.T
        whole = Moments.from_rows(rows)
        own = distances.frechet(rows, whole, reference)
        error = (own.high - own.value) / Z95
        parts = np.array_split(rows, 20)

        def distance(part: Moments) -> float:
            return distances._frechet(torch_moments(part), goal, root)

        left = np.array([distance(whole.without(Moments.from_rows(part))) for part in parts if count >= 20])
        halves = np.array_split(rows, 2)
        cross = [
            distances._frechet_error(one, torch_moments(Moments.from_rows(other)), goal, root) / 2
            for one, other in (halves, halves[::-1])
        ]
        append(fd, "FD: delta*", own)
        append(fd, "cross", Estimate.normal(own.value, float(np.hypot(*cross))))
        if len(left):
            append(fd, "jackknife", Estimate.normal(own.value, float(np.sqrt(19 * left.var()))))
        if count >= max(4 * width, 80):
            append(fd_inf, "FD∞: parabola*", distances.frechet_infinity(rows, reference, seed))
            append(fd_inf, "line, jackknife", Estimate.normal(20 * own.value - 19 * left.mean(), error))
            line = [
                np.mean([distance(Moments.from_rows(part)) for part in np.array_split(rows, n)]) for n in (1, 2, 3, 4)
            ]
            append(fd_inf, "line, n to n/4", Estimate.normal(float(np.polyfit((1, 2, 3, 4), line, 1)[1]), error))
        real = DATA[data](numbers, count, width) @ np.linalg.cholesky(reference.cov).T
        kid.append(distances.kernel_distance(rows[:500], real[:500]))
    mean_fd = np.mean([each.value for each in fd["FD: delta*"]])
    mean_kid = np.mean([each.value for each in kid]) if any(apart) else 0.0
    shares = {name: coverage_of(estimates, mean_fd) for name, estimates in fd.items()}
    shares |= {name: coverage_of(estimates, truth) for name, estimates in fd_inf.items()}
    missing = dict.fromkeys(("jackknife", "FD∞: parabola*", "line, jackknife", "line, n to n/4"), "–")
    return missing | shares | {"KID*": coverage_of(kid, float(mean_kid))}


def problem(width: int, mixed: float, shift: float) -> tuple[np.ndarray, np.ndarray, Moments]:
    """Mean and root of the covariance of the samples, moments of the reference."""
    numbers = np.random.default_rng(1)
    root = np.linalg.qr(numbers.normal(size=(width, width)))[0] / np.sqrt(np.arange(1, width + 1))
    reference = Moments(0, np.zeros(width), root @ root.T)
    other = numbers.normal(size=(width, 2 * width))
    within = (1 - mixed) * np.eye(width) + mixed * other @ other.T / (2 * width)
    return shift * root.sum(axis=1), root @ np.linalg.cholesky(within), reference


def torch_moments(moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(moments.mean), torch.from_numpy(moments.cov)


def append(results: dict[str, list[Estimate]], name: str, measured: Estimate) -> None:
    results.setdefault(name, []).append(measured)


def coverage_of(estimates: list[Estimate], target: float) -> str:
    return f"{100 * np.mean([each.low <= target <= each.high for each in estimates]):.0f}"


# Fréchet distance of given moments


def frechet(widths: list[int], repeats: int) -> None:
    from scipy.linalg import sqrtm

    row("D", "samples", "ours, s", "scipy, s", "ratio", "relative difference")
    row(*["---"] * 6)
    for width, count in [(width, 4 * width) for width in widths] + [(max(widths), max(widths) // 2)]:
        numbers = np.random.default_rng(0)
        spread = np.exp(np.linspace(1, -3, width))  # as of features: many directions of little variance
        one = Moments.from_rows(numbers.normal(size=(count, width)) * spread + 0.1)
        two = Moments.from_rows(numbers.normal(size=(4 * width, width)) * spread[::-1])

        def ours(one: Moments = one, two: Moments = two) -> float:
            return distances.frechet_distance(one.mean, one.cov, two.mean, two.cov)

        def scipy(one: Moments = one, two: Moments = two) -> float:
            shared = np.trace(sqrtm(one.cov @ two.cov)).real
            return float(np.sum((one.mean - two.mean) ** 2) + np.trace(one.cov) + np.trace(two.cov) - 2 * shared)

        seconds = [(clock(ours), clock(scipy)) for _ in range(repeats)]
        fast, slow = (statistics.median(column) for column in zip(*seconds))
        apart = abs(ours() / scipy() - 1)
        row(width, count, f"{fast:.2f}", f"{slow:.2f}", f"{slow / fast:.1f}", f"{apart:.0e}")


def clock(run: Callable[[], float]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


# Cost


def cost(counts: list[int], width: int) -> None:
    names = ("moments", "frechet", "frechet_infinity", "kernel_distance", "inception_score")
    names += ("precision_recall", "density_coverage", "nearest_neighbors", "authenticity")
    row("rows", "distance", "seconds", "MiB")
    row(*["---"] * 4)
    for count in counts:
        with tempfile.TemporaryDirectory() as scratch:
            for number, name in enumerate(("samples", "reference")):
                numbers = np.random.default_rng(number)
                file = np.lib.format.open_memmap(f"{scratch}/{name}.npy", "w+", np.float32, (count, width))
                for start in range(0, count, 4096):
                    file[start : start + 4096] = numbers.normal(size=file[start : start + 4096].shape)
            for name in names:
                with get_context("spawn").Pool(1) as pool:  # the peak of a process never falls
                    row(count, name, *pool.apply(measure, (name, Path(scratch))))


def measure(name: str, folder: Path) -> tuple[str, str]:
    samples, reference = (np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("samples", "reference"))
    width = samples.shape[1]
    known = Moments(0, np.zeros(width), np.eye(width))
    own = Moments(len(samples), np.zeros(width), np.eye(width) * 1.01) if name == "frechet" else Moments()
    runs: dict[str, Callable[[], object]] = {
        "moments": lambda: Moments.from_rows(samples),
        "frechet": lambda: distances.frechet(samples, own, known),
        "frechet_infinity": lambda: distances.frechet_infinity(samples, known),
        "inception_score": lambda: distances.inception_score(samples),
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    runs.get(name, lambda: getattr(distances, name)(samples, reference))()
    seconds = time.perf_counter() - began
    return f"{seconds:.1f}", f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.0f}"


def row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
