"""The samplers against diffusers' schedulers, and against data whose exact denoiser is known.

For data N(mu, s^2) the posterior mean of the noise given x at time t is
sigma (x - alpha mu) / (alpha^2 s^2 + sigma^2), and the probability-flow ODE keeps (x - alpha mu) / sqrt(alpha^2 s^2 +
sigma^2) constant: both the right distribution and the exact path from every starting point are known.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from tessera.conditioning import Condition
from tessera.diffusion import FlowMatchingConfig
from tessera.diffusion.gaussian import GaussianDiffusion, GaussianDiffusionConfig
from tessera.diffusion.process import Prediction
from tessera.errors import TesseraError
from tessera.sampling import DDIM, SAMPLERS, SDE, Ancestral, Euler, Heun, SamplingConfig, sample_loop
from tessera.sampling.denoiser import Denoiser
from tessera.sampling.timesteps import TIMESTEP_SPACINGS, Trailing, Uniform, timestep_grid
from tessera.times import expand

LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def process(**settings) -> GaussianDiffusion:
    return GaussianDiffusionConfig.model_validate(settings).build()


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """A smooth function that mixes channels and depends on time; twice the channels, as with learned variance."""
    raw = torch.cat((0.9 * x - 0.2 * x.flip(1), 0.8 * torch.tanh(x)), dim=1)
    return raw * (0.9 + 0.1 * torch.cos(t / 300)).view(-1, 1, 1, 1)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def noise_from(seed: int, shape):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator)


# Against diffusers


@pytest.mark.parametrize("kind", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_that_of_diffusers(kind, spacing, eta):
    theirs = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[kind]
    scheduler = DDIMScheduler(**LINEAR, clip_sample=False, timestep_spacing=spacing, prediction_type=theirs)
    scheduler.set_timesteps(20)
    x = start = normal(3, 2, 3, 3)
    noise = noise_from(7, start.shape)
    for t in scheduler.timesteps:
        raw = network(x, t.expand(3).float(), Condition())[:, :2]
        x = scheduler.step(raw, t, x, eta=eta, variance_noise=noise() if eta else None).prev_sample
    denoise = Denoiser(network, process(prediction=kind), Condition())
    *_, last = sample_loop(
        DDIM(eta=eta),
        denoise,
        start,
        timestep_grid(TIMESTEP_SPACINGS[spacing](), 20, denoise.diffusion),
        noise_from(7, start.shape),
    )
    assert relative(last.x, x) < 1e-4


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(
    ("variance", "theirs"), [("posterior", "fixed_small"), ("beta", "fixed_large"), ("learned", "learned_range")]
)
def test_ancestral_over_all_the_steps_is_ddpm_of_diffusers(schedule, variance, theirs):
    """x0 prediction, as float32 errors grow where alpha is small; tests/reference covers epsilon."""
    scheduler = DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule=schedule, clip_sample=False, variance_type=theirs,
        prediction_type="sample",
    )  # fmt: skip
    x = start = normal(3, 2, 3, 3)
    generator = torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        raw = network(x, t.expand(3).float(), Condition())
        raw = raw if variance == "learned" else raw[:, :2]
        x = scheduler.step(raw, t, x, generator=generator).prev_sample
    made = process(prediction="x0", variance=variance, schedule="linear" if schedule == "linear" else "cosine")
    denoise = Denoiser(network, made, Condition())
    *_, last = sample_loop(
        Ancestral(), denoise, start, timestep_grid(Uniform(), 1000, made), noise_from(7, start.shape)
    )
    assert relative(last.x, x) < 2e-3


@pytest.mark.parametrize(("variance", "stride"), [("posterior", 1), ("posterior", 50), ("learned", 1)])
def test_one_ancestral_step_is_ddpm_of_diffusers(variance, stride):
    """Epsilon prediction, over short and long steps, with diffusers' noise.

    Not with a learned variance over long steps: diffusers uses the upper bound of the short step, which is not the
    respaced process; tests/reference covers that case.
    """
    theirs = {"posterior": "fixed_small", "learned": "learned_range"}[variance]
    scheduler = DDPMScheduler(**LINEAR, clip_sample=False, variance_type=theirs)
    scheduler.set_timesteps(1000 // stride)
    denoise = Denoiser(network, process(variance=variance), Condition())
    x = normal(2, 2, 3, 3)
    for step in (950, 500, 100, 50):
        raw = network(x, torch.full((2,), float(step)), Condition())
        raw = raw if variance == "learned" else raw[:, :2]
        expected = scheduler.step(raw, step, x, generator=torch.Generator().manual_seed(step)).prev_sample
        t, s = torch.full((2,), (step + 1) / 1000), torch.full((2,), (step - stride + 1) / 1000)
        got, _ = Ancestral()(denoise, x, t, s, None, noise_from(step, x.shape))
        assert relative(got, expected) < 1e-4


# Against data whose denoiser is known


class Exact:
    """The best denoiser of data N(mu, s^2)."""

    def __init__(self, made: GaussianDiffusion, mu: float, s: float) -> None:
        self.diffusion, self.mu, self.s = made, mu, s

    def spread(self, t: Tensor) -> Tensor:
        return (self.diffusion.alpha(t) ** 2 * self.s**2 + self.diffusion.sigma(t) ** 2).sqrt()

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = expand(self.diffusion.alpha(t), x), expand(self.diffusion.sigma(t), x)
        eps = sigma * (x - alpha * self.mu) / expand(self.spread(t), x) ** 2
        return Prediction(x0=(x - sigma * eps) / alpha, eps=eps)

    def ode(self, x: Tensor, t: float) -> Tensor:
        """Where the exact flow takes x from time t to the data."""
        t = torch.full((len(x),), t)
        return self.mu + self.s * (x - expand(self.diffusion.alpha(t), x) * self.mu) / expand(self.spread(t), x)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("mu", "s"), [(0.5, 0.5), (-1.0, 1.5)])
def test_ddim_is_of_first_order(schedule, mu, s):
    """The error on the exact path falls like 1 / n."""
    exact = Exact(process(num_timesteps=4096, schedule=schedule, variance="posterior"), mu, s)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
    counts, errors = [32, 64, 128, 256, 512], []
    for count in counts:
        grid = timestep_grid(Trailing(), count, exact.diffusion)
        *_, last = sample_loop(DDIM(), exact, x, grid, None)
        errors.append(float((last.x - exact.ode(x, float(grid[0]))).abs().max()))
    slope, _ = np.polyfit(np.log(counts), np.log(errors), 1)
    assert slope == pytest.approx(-1, abs=0.15)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("mu_and_s", [(0.5, 0.5), (-1.0, 0.2)])
@pytest.mark.parametrize(
    ("step", "variance"),
    [(Ancestral(), "posterior"), (Ancestral(), "beta"), (DDIM(eta=1), "posterior"), (DDIM(eta=0.5), "posterior")],
    ids=lambda value: getattr(value, "kind", value),
)
def test_stochastic_samplers_end_in_the_distribution_of_the_data(mu_and_s, step, variance):
    mu, s = mu_and_s
    exact = Exact(process(variance=variance), mu, s)
    rows, generator = 10_000, torch.Generator().manual_seed(5)

    def noise():
        return torch.randn(rows, 1, 1, 1, dtype=torch.float64, generator=generator)

    *_, last = sample_loop(
        step, exact, noise(), timestep_grid(Uniform(), 250, GaussianDiffusionConfig().build()), noise
    )
    assert float(last.x.mean()) == pytest.approx(mu, abs=5 * s / math.sqrt(rows) + 0.005)
    assert float(last.x.std()) == pytest.approx(s, rel=5 / math.sqrt(2 * rows) + 0.02)


def test_ddim_ends_in_the_distribution_of_the_data():
    exact = Exact(process(variance="posterior"), 0.5, 0.25)
    x = normal(10_000, 1, 1, 1, dtype=torch.float64)
    *_, last = sample_loop(DDIM(), exact, x, timestep_grid(Uniform(), 250, GaussianDiffusionConfig().build()), None)
    assert float(last.x.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(last.x.std()) == pytest.approx(0.25, rel=0.05)


def test_eta_1_is_ancestral_sampling_with_the_posterior_variance():
    """Song et al. 2021, section 4.1: the two are one generative process, step for step."""
    denoise = Denoiser(network, process(variance="posterior"), Condition())
    x = normal(3, 2, 3, 3, dtype=torch.float64)
    t, s = torch.tensor([0.9, 0.5, 0.02]), torch.tensor([0.6, 0.499, 0.01])
    one = normal(3, 2, 3, 3, seed=1, dtype=torch.float64)
    ddim, _ = DDIM(eta=1)(denoise, x, t, s, None, lambda: one)
    ancestral, _ = Ancestral()(denoise, x, t, s, None, lambda: one)
    torch.testing.assert_close(ddim, ancestral, rtol=1e-9, atol=1e-9)


# The loop


@pytest.mark.parametrize("step", [Ancestral(), DDIM(), DDIM(eta=0.5)], ids=repr)
def test_sample_loop_yields_the_start_and_every_state(step):
    denoise = Denoiser(network, process(), Condition())
    x = normal(2, 2, 3, 3)
    states = list(
        sample_loop(
            step, denoise, x, timestep_grid(Uniform(), 7, GaussianDiffusionConfig().build()), noise_from(0, x.shape)
        )
    )
    assert [state.step for state in states] == list(range(8))
    assert {state.num_steps for state in states} == {7}
    assert torch.equal(states[0].x, x)
    assert [state.t for state in states] == timestep_grid(Uniform(), 7, GaussianDiffusionConfig().build()).tolist()
    assert states[0].t == 1
    assert states[-1].t == 0
    assert all(later.t < earlier.t for earlier, later in pairwise(states))


@pytest.mark.parametrize("step", [Ancestral(), DDIM(), DDIM(eta=0.7), Euler(), Heun(), SDE()], ids=repr)
def test_rows_at_different_times_equal_the_rows_alone(step):
    """As many rows as height and width, so a wrong broadcast would give numbers; one row ends at the data."""
    denoise = Denoiser(network, process(), Condition())
    x, one = normal(3, 2, 3, 3), normal(3, 2, 3, 3, seed=1)
    t, s = torch.tensor([1.0, 0.4, 0.001]), torch.tensor([0.9, 0.399, 0.0])
    together, _ = step(denoise, x, t, s, None, lambda: one)
    for row in range(3):
        part = slice(row, row + 1)
        alone, _ = step(denoise, x[part], t[part], s[part], None, lambda part=part: one[part])
        torch.testing.assert_close(together[part], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("step", [Ancestral(), DDIM(eta=1), SDE(), SDE(diffusion="constant")], ids=repr)
def test_the_last_step_adds_no_noise(step):
    denoise = Denoiser(network, process(), Condition())
    x, t = normal(2, 2, 3, 3), torch.full((2,), 0.05)
    got, _ = step(denoise, x, t, torch.zeros(2), None, lambda: torch.full_like(x, 1e6))
    torch.testing.assert_close(got, denoise(x, t).x0, rtol=1e-5, atol=1e-5)


def test_ddim_without_eta_uses_no_noise():
    denoise = Denoiser(network, process(), Condition())
    x = normal(2, 2, 3, 3)
    *_, last = sample_loop(
        DDIM(),
        denoise,
        x,
        timestep_grid(Uniform(), 3, GaussianDiffusionConfig().build()),
        lambda: pytest.fail("noise was requested"),
    )
    assert torch.isfinite(last.x).all()


def test_samplers_are_registered_by_their_kind():
    assert all(solver().kind == kind for kind, solver in SAMPLERS.items())
    assert {type(SamplingConfig.model_validate({"sampler": kind}).sampler) for kind in SAMPLERS} == {*SAMPLERS.values()}


def test_ancestral_sampling_is_refused_where_there_is_no_reverse_process():
    with pytest.raises(TesseraError, match="needs a Gaussian diffusion process, but this one is flow"):
        Ancestral().check(FlowMatchingConfig().build())
    for solver in SAMPLERS.values():
        solver().check(process())


# Numbers that are not finite


class NotFinite(Denoiser):
    """Row 1 is not finite in one call of the denoiser."""

    def __init__(self, at: int) -> None:
        super().__init__(network, process(), Condition())
        self.at = at

    def __call__(self, x: Tensor, t: Tensor, s: Tensor | None = None) -> Prediction:
        prediction = super().__call__(x, t, s)
        self.at -= 1
        if self.at == 0:
            prediction.x0[1, 0, 0, 0] = math.inf
            prediction.eps[1, 0, 0, 0] = math.nan
        return prediction


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_value_that_is_not_finite_is_an_error_that_names_the_step(kind):
    x, solver = normal(3, 2, 3, 3), SAMPLERS[kind]()
    grid = timestep_grid(Uniform(), 6, process())
    states, step = [], 4
    sampling = sample_loop(solver, NotFinite((step - 1) * solver.calls_per_step + 1), x, grid, noise_from(0, x.shape))
    with pytest.raises(TesseraError) as error:
        states.extend(state.step for state in sampling)
    assert str(error.value).startswith("1 of 3 images")
    assert f"after step {step} of 6 (time 0.401) of {kind}; try --precision float32" in str(error.value)
    assert states == [0, 1, 2, 3, 4, 5]  # checked once, at the end


def test_noise_that_is_not_finite_is_named():
    with pytest.raises(TesseraError, match="2 of 2 images .* in the noise of ddim"):
        list(
            sample_loop(
                DDIM(),
                Denoiser(network, process(), Condition()),
                torch.full((2, 2, 3, 3), math.nan),
                timestep_grid(Uniform(), 2, process()),
                None,
            )
        )
