"""The order of every solver, and its error with few calls of the denoiser, on data with a known exact denoiser.

    python benchmarks/solver_orders.py

The data is a mixture of two Gaussians in one dimension. Errors are the largest distance of nine starting points from
the exact probability-flow path, computed by 2000 steps of the classical Runge-Kutta method along the angle of (alpha,
sigma). "slope" is measured between the times 0.9 and 0.1, on times uniform in log SNR, where only the solver limits it.
The errors are those of sampling from noise to data, on trailing times (Heun has half as many steps for as many calls).
For stochastic solvers the table has the error of the standard deviation of samples from one Gaussian, which is computed
without sampling, because every step is affine there.
"""

import argparse
import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tessera.diffusion import DiffusionProcess, FlowMatchingConfig, GaussianDiffusionConfig
from tessera.diffusion.gaussian import CosineBetas
from tessera.diffusion.process import Prediction
from tessera.sampling import DDIM, SDE, DPMSolver, DPMSolverSDE, Euler, Heun, UniPC, sample_loop
from tessera.sampling.solver import Solver
from tessera.sampling.timesteps import Karras, Trailing, timestep_grid
from tessera.times import expand

PROCESSES: dict[str, DiffusionProcess] = {
    "Gaussian, linear": GaussianDiffusionConfig().build(),
    "Gaussian, cosine": GaussianDiffusionConfig(schedule=CosineBetas()).build(),
    "flow, linear": FlowMatchingConfig().build(),
    "flow, gvp": FlowMatchingConfig(path="gvp").build(),
}
MIXTURE, GAUSSIAN = [(0.3, -1.0, 0.4), (0.7, 0.8, 0.3)], [(1.0, 0.5, 0.6)]  # weight, mean, standard deviation
SOLVERS: list[tuple[str, Solver, str]] = [
    ("euler (= ddim)", Euler(), "1"),
    ("heun", Heun(), "2"),
    ("dpm++ order 2", DPMSolver(), "2"),
    ("dpm++ order 3", DPMSolver(order=3), "3 after its start"),
    ("unipc order 2", UniPC(), "3"),
    ("unipc order 3", UniPC(order=3), "4 after its start"),
]
NOISY: list[tuple[str, Solver, str]] = [
    ("ddim eta 1", DDIM(eta=1), "1"),
    ("sde", SDE(), "1"),
    ("sde constant", SDE(diffusion="constant"), "1/2 at the data"),
    ("dpm++-sde", DPMSolverSDE(), "2"),
]
CALLS = (5, 10, 20, 40)
COUNTS = (40, 80, 160)


class Exact:
    """The best denoiser of a mixture of Gaussians, at any alpha and sigma."""

    def __init__(self, process: DiffusionProcess, mixture: list[tuple[float, float, float]]) -> None:
        self.diffusion = process
        self.weight, self.mean, self.std = torch.tensor(mixture, dtype=torch.float64).T

    def at(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
        alpha, sigma, away = alpha[..., None], sigma[..., None], x[..., None] - alpha[..., None] * self.mean
        variance = (alpha * self.std) ** 2 + sigma**2
        share = torch.softmax(self.weight.log() - 0.5 * variance.log() - 0.5 * away**2 / variance, dim=-1)
        x0 = self.mean + alpha * self.std**2 * away / variance
        return Prediction((share * x0).sum(-1), (share * sigma * away / variance).sum(-1))

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        return self.at(x, expand(self.diffusion.alpha(t), x), expand(self.diffusion.sigma(t), x))

    def path(self, x: Tensor, t: float, s: float, steps: int = 2000) -> Tensor:
        """The exact flow of x [B, ...] from time t to time s."""
        ends = torch.tensor([t, s], dtype=torch.float64)
        alpha, sigma = self.diffusion.alpha(ends), self.diffusion.sigma(ends)
        angle, size = torch.atan2(sigma, alpha), torch.hypot(sigma, alpha)
        grid, z = torch.lerp(angle[0], angle[1], torch.linspace(0, 1, steps + 1, dtype=torch.float64)), x / size[0]

        def rate(z: Tensor, angle: Tensor) -> Tensor:
            prediction = self.at(z, angle.cos(), angle.sin())
            return prediction.eps * angle.cos() - prediction.x0 * angle.sin()

        for a, b in pairwise(grid):
            h, middle = b - a, (a + b) / 2
            k1 = rate(z, a)
            k2 = rate(z + h / 2 * k1, middle)
            k3 = rate(z + h / 2 * k2, middle)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(z + h * k3, b))
        return z * size[1]


def inside(process: DiffusionProcess, count: int) -> Tensor:
    """Times uniform in log SNR from 0.9 to 0.1."""
    ends = torch.tensor([0.9, 0.1], dtype=torch.float64)
    ratio = (process.sigma(ends) / process.alpha(ends)).log()
    return process.time_from_nsr(
        torch.lerp(ratio[0], ratio[1], torch.linspace(0, 1, count + 1, dtype=torch.float64)).exp()
    )


def spread(solver: Solver, process: DiffusionProcess, grid: Tensor) -> float:
    """The standard deviation of samples from the Gaussian: one row for the mean, one for each noise."""
    _, mu, s = GAUSSIAN[0]
    x = torch.full((len(grid) + 1, 1, 1, 1), float(process.alpha(grid[:1])) * mu, dtype=torch.float64)
    x[1] += torch.hypot(process.alpha(grid[:1]) * s, process.sigma(grid[:1]))
    rows = iter(range(2, len(x)))

    def noise() -> Tensor:
        one = torch.zeros_like(x)
        one[next(rows)] = 1
        return one

    *_, last = sample_loop(solver, Exact(process, GAUSSIAN), x, grid, noise)
    mean, *added = last.x.flatten()
    return float(torch.stack([one - mean for one in added]).norm())


def slope(counts: tuple[int, ...], errors: list[float]) -> float:
    return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--counts", type=int, nargs="+", default=COUNTS, help="numbers of steps that the slope is measured over"
    )
    parser.add_argument(
        "--noise-counts", type=int, nargs="+", default=(125, 250, 500), help="the same for stochastic solvers"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)

    def error(solver: Solver, exact: Exact, grid: Tensor, truth: Tensor) -> float:
        *_, last = sample_loop(solver, exact, x, grid, lambda: torch.zeros_like(x))
        return float((last.x - truth).abs().max())

    print("| process | solver | order | slope | " + " | ".join(f"{calls} calls" for calls in CALLS) + " | 10, karras |")
    print("|---|---|---|---|" + "---|" * (len(CALLS) + 1))
    for name, process in PROCESSES.items():
        exact = Exact(process, MIXTURE)
        middle, whole = exact.path(x, 0.9, 0.1), exact.path(x, 1.0, 0.0)
        for words, solver, order in SOLVERS:
            measured = slope(options.counts, [error(solver, exact, inside(process, n), middle) for n in options.counts])
            steps = [math.ceil((calls + 1) / 2) if solver.calls_per_step == 2 else calls for calls in CALLS]
            few = [error(solver, exact, timestep_grid(Trailing(), n, process), whole) for n in steps]
            few.append(error(solver, exact, timestep_grid(Karras(), steps[1], process), whole))
            print(f"| {name} | {words} | {order} | {measured:.2f} | " + " | ".join(f"{one:.2g}" for one in few) + " |")
    print("\n| process | stochastic solver | order | slope | " + " | ".join(f"{calls} calls" for calls in CALLS) + " |")
    print("|---|---|---|---|" + "---|" * len(CALLS))
    for name, process in PROCESSES.items():
        for words, solver, order in NOISY:
            far, few = (
                [abs(spread(solver, process, timestep_grid(Trailing(), n, process)) / GAUSSIAN[0][2] - 1) for n in some]
                for some in (options.noise_counts, CALLS)
            )
            cells = " | ".join(f"{one:.1%}" for one in few)
            print(f"| {name} | {words} | {order} | {slope(options.noise_counts, far):.2f} | {cells} |")


if __name__ == "__main__":
    main()
