"""The order of every solver, on data whose exact denoiser is known: a mixture of two Gaussians, and one Gaussian.

The truth is the probability-flow ODE by 250 steps of the classical Runge-Kutta method, in polar coordinates: with
alpha = c cos(angle) and sigma = c sin(angle), z = x / c obeys dz / d(angle) = eps cos(angle) - x0 sin(angle).
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tessera.diffusion import DiffusionProcess, FlowMatchingConfig, GaussianDiffusionConfig
from tessera.diffusion.gaussian import CosineBetas
from tessera.diffusion.process import Prediction
from tessera.sampling import DDIM, SDE, Ancestral, DPMSolver, DPMSolverSDE, Euler, Heun, UniPC, sample_loop
from tessera.sampling.exponential import History, NoiseLevel
from tessera.sampling.timesteps import Trailing, Uniform, timestep_grid
from tessera.sampling.unipc import PredictorState
from tessera.times import expand

PROCESSES = {
    "cosine": GaussianDiffusionConfig(num_timesteps=4096, schedule=CosineBetas()),
    "linear": GaussianDiffusionConfig(num_timesteps=4096),
    "flow": FlowMatchingConfig(),
    "gvp": FlowMatchingConfig(path="gvp"),
}
processes = pytest.mark.parametrize("name", PROCESSES)
two_processes = pytest.mark.parametrize(  # and the others in `make prove`
    "name", ["linear", "flow", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cosine", "gvp"))]
)
MIXTURE = [(0.3, -1.0, 0.4), (0.7, 0.8, 0.3)]  # weight, mean, standard deviation
GAUSSIAN = [(1.0, 0.5, 0.6)]


class Exact:
    """The best denoiser of a mixture of Gaussians, at any alpha and sigma."""

    def __init__(self, process: DiffusionProcess, mixture: list[tuple[float, float, float]]) -> None:
        self.diffusion = process
        self.weight, self.mean, self.std = torch.tensor(mixture, dtype=torch.float64).T

    def at(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
        """x [B, ...]; alpha and sigma broadcast over it."""
        alpha, sigma, away = alpha[..., None], sigma[..., None], x[..., None] - alpha[..., None] * self.mean
        variance = (alpha * self.std) ** 2 + sigma**2
        posterior = torch.softmax(self.weight.log() - 0.5 * variance.log() - 0.5 * away**2 / variance, dim=-1)
        x0 = self.mean + alpha * self.std**2 * away / variance
        return Prediction((posterior * x0).sum(-1), (posterior * sigma * away / variance).sum(-1))

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        return self.at(x, expand(self.diffusion.alpha(t), x), expand(self.diffusion.sigma(t), x))

    def path(self, x: Tensor, t: float, s: float, steps: int = 250) -> Tensor:
        """Where the exact flow takes x [B, ...] from time t to time s."""
        ends = torch.tensor([t, s], dtype=torch.float64)
        angle = torch.atan2(self.diffusion.sigma(ends), self.diffusion.alpha(ends))
        size = torch.hypot(self.diffusion.sigma(ends), self.diffusion.alpha(ends))
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


def starts() -> Tensor:
    """float64 [9, 1, 1, 1]: the number of rows differs from all other sizes."""
    return torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)


def inside(process: DiffusionProcess, count: int, t: float = 0.9, s: float = 0.1) -> Tensor:
    """Times uniform in log SNR, away from both ends, where only the solver limits the order."""
    ends = torch.tensor([t, s], dtype=torch.float64)
    ratio = (process.sigma(ends) / process.alpha(ends)).log()
    return process.time_from_nsr(
        torch.lerp(ratio[0], ratio[1], torch.linspace(0, 1, count + 1, dtype=torch.float64)).exp()
    )


def slope(counts: list[int], errors: list[float]) -> float:
    return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


def no_noise() -> Tensor:
    return torch.zeros(9, 1, 1, 1, dtype=torch.float64)


# Deterministic solvers


@processes
def test_the_truth_is_the_closed_form_of_one_gaussian(name):
    """The flow keeps (x - alpha mu) / sqrt(alpha^2 s^2 + sigma^2)."""
    process, (_, mu, s) = PROCESSES[name].build(), GAUSSIAN[0]
    exact, ends, x = Exact(process, GAUSSIAN), torch.tensor([1.0, 0.2], dtype=torch.float64), starts()
    alpha, spread = process.alpha(ends), torch.hypot(process.alpha(ends) * s, process.sigma(ends))
    expected = alpha[1] * mu + (x - alpha[0] * mu) / spread[0] * spread[1]
    torch.testing.assert_close(exact.path(x, 1.0, 0.2), expected, rtol=1e-7, atol=1e-7)


@two_processes
@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_every_solver_has_its_declared_order(name, data):
    """The first steps of dpm++ 3 and unipc 3 are of lower order; they are tested with an exact history."""
    exact, x = Exact(PROCESSES[name].build(), data), starts()
    truth, counts = exact.path(x, 0.9, 0.1), [25, 50, 100]
    for solver in (Euler(), DDIM(), SDE(strength=0), Heun(), DPMSolver(), UniPC(), UniPC(variant="bh1")):
        order, errors = solver.convergence_order, []
        for count in counts:
            *_, last = sample_loop(solver, exact, x, inside(exact.diffusion, count), no_noise)
            errors.append(float((last.x - truth).abs().max()))
        assert slope(counts, errors) > order - 0.25, (solver, errors)
        assert slope(counts, errors) < order + 0.5, (solver, errors)


@two_processes
@pytest.mark.parametrize("solver", [DPMSolver(), DPMSolver(order=3), UniPC(order=3)], ids=str)
def test_with_an_exact_history_every_step_is_of_the_full_order(name, solver):
    exact, x = Exact(PROCESSES[name].build(), MIXTURE), starts()
    truth, counts, errors = exact.path(x, 0.9, 0.1), [80, 160, 320], []
    for count in counts:
        grid = inside(exact.diffusion, count)
        points, on_path = [(grid[0].expand(9), x)], x
        for before, after in pairwise(grid[:4].tolist()):
            on_path = exact.path(on_path, before, after, 10)
            points.insert(0, (torch.full((9,), after, dtype=torch.float64), on_path))
        (_, x_t), *older = points
        history = History(
            tuple(NoiseLevel.at(exact.diffusion, t) for t, _ in older), tuple(exact(x, t).x0 for t, x in older)
        )
        memory = PredictorState(older[0][1], history) if solver.kind == "unipc" else history
        for t, s in pairwise(grid[3:]):
            x_t, memory = solver(exact, x_t, t.expand(9), s.expand(9), memory, no_noise)
        errors.append(float((x_t - truth).abs().mean()))
    assert slope(counts, errors) == pytest.approx(solver.convergence_order, abs=0.35)


@processes
@pytest.mark.parametrize(
    ("solver", "order", "worst"),
    [(Euler(), 1, 0.05), (Heun(), 1.25, 0.01), (DPMSolver(), 1.25, 0.02), (UniPC(), 1, 0.02)],
    ids=lambda value: getattr(value, "kind", None),
)
def test_from_noise_to_data(name, solver, order, worst):
    """From 1 to 0 on uniform times. The last step limits the order, most of all where sigma grows like sqrt(t)."""
    exact, x = Exact(PROCESSES[name].build(), MIXTURE), starts()
    truth, counts, errors = exact.path(x, 1.0, 0.0), [80, 160], []
    for count in counts:
        *_, last = sample_loop(solver, exact, x, timestep_grid(Trailing(), count, exact.diffusion), no_noise)
        errors.append(float((last.x - truth).abs().max()))
    assert slope(counts, errors) > order - 0.1
    assert errors[0] < worst


def test_heun_is_the_classical_method_on_the_linear_path():
    """The mean of the velocities v = eps - x0 at both ends."""
    exact, x = Exact(FlowMatchingConfig().build(), MIXTURE), starts()
    t, s = torch.linspace(1, 0.3, 9, dtype=torch.float64), torch.linspace(0.8, 0.1, 9, dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        prediction = exact(x, t)
        return prediction.eps - prediction.x0

    length, here = expand(s - t, x), velocity(x, t)
    expected = x + length / 2 * (here + velocity(x + length * here, s))
    got, _ = Heun()(exact, x, t, s, None, no_noise)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_euler_is_the_classical_method_on_the_linear_path():
    exact, x = Exact(FlowMatchingConfig().build(), MIXTURE), starts()
    t, s = torch.linspace(1, 0.3, 9, dtype=torch.float64), torch.linspace(0.8, 0, 9, dtype=torch.float64)
    prediction = exact(x, t)
    got, _ = Euler()(exact, x, t, s, None, no_noise)
    torch.testing.assert_close(got, x + expand(s - t, x) * (prediction.eps - prediction.x0), rtol=1e-12, atol=1e-12)


class ExactNetwork(Exact):
    """The best raw output of a network, converted by the process."""

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        best = super().__call__(x, t)
        return self.diffusion.predict(self.diffusion.training_target(best.x0, best.eps, t), x, t)


@pytest.mark.parametrize("path", ["linear", pytest.param("gvp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("prediction", ["velocity", "x0", "epsilon"])
def test_every_prediction_of_a_flow_has_the_same_order_from_pure_noise(path, prediction):
    """Although epsilon does not determine x0 at time 1. The first step limits the order to 2 for every prediction."""
    process = FlowMatchingConfig(path=path, prediction=prediction).build()
    exact, x = ExactNetwork(process, MIXTURE), starts()
    truth, counts = exact.path(x, 1.0, 0.1), [40, 80, 160]
    for solver in (Euler(), DDIM(), SDE(strength=0), Heun(), DPMSolver(), DPMSolver(order=3), UniPC(), UniPC(order=3)):
        errors = []
        for count in counts:
            *_, last = sample_loop(solver, exact, x, torch.linspace(1, 0.1, count + 1, dtype=torch.float64), no_noise)
            errors.append(float((last.x - truth).abs().max()))
        order = min(solver.convergence_order, 2)
        assert slope(counts, errors) > order - 0.4 or errors[-1] < 2e-5, (solver, errors)
        assert errors[-1] < (8e-3 if order == 1 else 4e-4), (solver, errors)


class Counted(Exact):
    calls = 0

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        assert (t > 0).all(), "the network was called at time 0"
        self.calls += 1
        return super().__call__(x, t)


@pytest.mark.parametrize(("solver", "calls"), [(Heun(), 15), (DPMSolver(order=3), 8), (UniPC(order=3), 8)], ids=str)
def test_calls_of_the_denoiser(solver, calls):
    """Heun's last step is Euler's; the corrector of UniPC costs none."""
    counted = Counted(FlowMatchingConfig().build(), MIXTURE)
    list(sample_loop(solver, counted, starts(), timestep_grid(Uniform(), 8, counted.diffusion), no_noise))
    assert counted.calls == calls


# Stochastic solvers


def moments(solver, process: DiffusionProcess, grid: Tensor, denoiser: type[Exact] = Exact) -> tuple[float, float]:
    """Mean and standard deviation of a solver's samples of the Gaussian, without random numbers.

    Every step is affine in x and in its noise: one row holds the mean, and each other row the effect of one noise.
    """
    _, mu, s = GAUSSIAN[0]
    x = torch.full((len(grid) + 1, 1, 1, 1), float(process.alpha(grid[:1])) * mu, dtype=torch.float64)
    x[1] += torch.hypot(process.alpha(grid[:1]) * s, process.sigma(grid[:1]))
    rows = iter(range(2, len(x)))

    def noise() -> Tensor:
        one = torch.zeros_like(x)
        one[next(rows)] = 1
        return one

    *_, last = sample_loop(solver, denoiser(process, GAUSSIAN), x, grid, noise)
    mean, *added = last.x.flatten()
    return float(mean), float(torch.stack([one - mean for one in added]).norm())


stochastic_solvers = pytest.mark.parametrize(
    "solver",
    [
        DDIM(eta=0.5), DDIM(eta=1), SDE(), SDE(strength=0.3), SDE(diffusion="linear"), SDE(diffusion="constant"),
        DPMSolverSDE(),
    ],
    ids=repr,
)  # fmt: skip


@processes
@stochastic_solvers
def test_stochastic_solvers_end_in_the_distribution_of_the_data(name, solver):
    process, (_, mu, s) = PROCESSES[name].build(), GAUSSIAN[0]
    counts, errors = [125, 250], []
    for count in counts:
        mean, std = moments(solver, process, timestep_grid(Trailing(), count, process))
        assert mean == pytest.approx(mu, abs=1e-3)
        errors.append(abs(std - s))
    assert slope(counts, errors) > solver.convergence_order - 0.15
    assert errors[-1] < (0.05 if solver.convergence_order < 1 else 0.02)


@pytest.mark.parametrize("path", ["linear", "gvp"])
@stochastic_solvers
def test_stochastic_solvers_end_in_the_distribution_of_the_data_with_epsilon(path, solver):
    process, (_, mu, s) = FlowMatchingConfig(path=path, prediction="epsilon").build(), GAUSSIAN[0]
    errors = []
    for count in (50, 250):
        mean, std = moments(solver, process, timestep_grid(Uniform(), count, process), ExactNetwork)
        errors.append(math.hypot(mean - mu, std - s))
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] < (0.05 if solver.convergence_order < 1 else 0.02)


def test_ancestral_sampling_has_the_same_distribution_as_eta_1():
    process = GaussianDiffusionConfig(variance="posterior").build()
    grid = timestep_grid(Uniform(), 50, process)
    assert moments(Ancestral(), process, grid) == pytest.approx(moments(DDIM(eta=1), process, grid), abs=1e-9)


@processes
def test_a_short_sde_step_is_that_of_euler_and_maruyama(name):
    """x - (v + w eps / (2 sigma)) dt + sqrt(w dt) z with w = 2 strength sigma, to the second order in dt."""
    process, x = PROCESSES[name].build(), starts()
    exact, one, t = Exact(process, MIXTURE), torch.ones_like(x), torch.full((9,), 0.6, dtype=torch.float64)
    counts, of_x, of_noise = [32, 64, 128], [], []
    for count in counts:
        dt = 1 / count
        prediction, sigma, w = exact(x, t), float(process.sigma(t)[0]), 2 * 0.7 * float(process.sigma(t)[0])
        drift = Euler()(exact, x, t, t - dt, None, no_noise)[0] - x
        still, _ = SDE(strength=0.7)(exact, x, t, t - dt, None, no_noise)
        noisy, _ = SDE(strength=0.7)(exact, x, t, t - dt, None, lambda: one)
        of_x.append(float((still - (x + drift - dt * w / (2 * sigma) * prediction.eps)).abs().max()))
        of_noise.append(abs(float((noisy - still)[0]) - math.sqrt(w * dt)))
    assert slope(counts, of_x) > 1.8
    assert slope(counts, of_noise) > 1.3
