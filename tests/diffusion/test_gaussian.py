"""Gaussian diffusion against diffusers' tables, covariance matrices, and numerical integration."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from tessera.diffusion.gaussian import GaussianDiffusion, GaussianDiffusionConfig, binned_log_likelihood
from tessera.diffusion.process import Prediction
from tessera.errors import TesseraError
from tessera.settings import validate

PREDICTIONS = ["epsilon", "x0", "v"]


def gaussian(**settings) -> GaussianDiffusion:
    return GaussianDiffusionConfig.model_validate(settings).build()


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def all_times(steps=1000):
    return torch.arange(1, steps + 1, dtype=torch.float64) / steps


# Schedules


@pytest.mark.parametrize(("kind", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_alpha_bar_matches_diffusers(kind, theirs):
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule=theirs)
    expected = scheduler.alphas_cumprod.double()
    alpha = gaussian(schedule=kind).alpha(all_times())
    torch.testing.assert_close(alpha**2, expected, rtol=2e-4, atol=1e-9)  # theirs is computed in float32
    assert alpha.dtype == torch.float64


def test_cosine_matches_its_closed_form_until_beta_is_clamped():
    """alpha_bar(t) = f(t) / f(0) (Nichol & Dhariwal 2021, equation 17)."""
    t = np.arange(1000) / 1000
    shape = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    diffusion = gaussian(schedule="cosine")
    np.testing.assert_allclose(diffusion.alpha_bar[:1000].numpy(), shape / shape[0], rtol=1e-10)
    assert 1 - float(diffusion.alpha_bar[1000] / diffusion.alpha_bar[999]) == pytest.approx(0.999)


@pytest.mark.parametrize("steps", [250, 1000, 4000])
def test_linear_ends_at_the_same_noise_level_for_any_number_of_steps(steps):
    """-log alpha_bar(1) tends to the integral of beta, 1000 (1e-4 + 0.02) / 2."""
    assert float(-gaussian(num_timesteps=steps).alpha_bar[-1].log()) == pytest.approx(10.05, rel=0.03)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_total_variance_is_1(kind):
    diffusion = gaussian(schedule=kind)
    t = torch.cat((torch.zeros(1, dtype=torch.float64), all_times()))
    torch.testing.assert_close(
        diffusion.alpha(t) ** 2 + diffusion.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-15
    )
    assert (diffusion.alpha(t)[:1].item(), diffusion.sigma(t)[:1].item()) == (1, 0)
    assert (diffusion.alpha(t).diff() < 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "steps"), [("linear", 1000), ("cosine", 1000), ("linear", 7), ("cosine", 4999)])
def test_the_training_times_match_the_table_bit_for_bit(kind, steps, dtype):
    diffusion = gaussian(schedule=kind, num_timesteps=steps)
    bar = torch.cumprod(1 - diffusion.config.schedule.betas(steps), dim=0)
    t = (torch.arange(1, steps + 1) / steps).to(dtype)
    assert torch.equal(diffusion.alpha(t), bar.sqrt())
    assert torch.equal(diffusion.sigma(t), (1 - bar).sqrt())
    if steps > 7:  # also in a batch with a time between steps
        both = torch.stack((torch.full_like(t, 0.5 + 0.4 / steps), t), dim=1)
        assert torch.equal(torch.stack([diffusion.alpha(pair) for pair in both[::50]])[:, 1], bar.sqrt()[::50])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_alpha_bar_is_linear_between_the_training_times(kind):
    diffusion = gaussian(schedule=kind, num_timesteps=50)
    fine = torch.linspace(0, 1, 5001, dtype=torch.float64)
    bar = diffusion.alpha(fine) ** 2
    assert (bar.diff() < 0).all()
    expected = np.interp(fine.numpy(), np.arange(51) / 50, diffusion.alpha_bar.numpy())
    np.testing.assert_allclose(bar.numpy(), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(bar + diffusion.sigma(fine) ** 2, torch.ones_like(fine), rtol=0, atol=1e-15)
    assert diffusion.model_time(torch.tensor([0.02, 0.03, 0.5, 0.525])).tolist() == pytest.approx([0, 0.5, 24, 25.25])


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_time_from_nsr_inverts_the_noise_to_signal_ratio(kind, zero):
    diffusion = gaussian(schedule=kind, num_timesteps=100, prediction="v", zero_terminal_snr=zero)
    t = torch.linspace(0.01, 1, 991, dtype=torch.float64)  # all training times, and nine times between each two
    ratio = diffusion.sigma(t) / diffusion.alpha(t)
    torch.testing.assert_close(diffusion.time_from_nsr(ratio), t, rtol=0, atol=1e-10)
    beyond = torch.tensor([0.0, 1e-9, 1e12, math.inf])
    assert diffusion.time_from_nsr(beyond).tolist() == [0.01, 0.01, 1, 1]


# Zero terminal SNR


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [2, 10, 1000])
def test_zero_terminal_snr_matches_diffusers(kind, steps):
    betas = gaussian(schedule=kind, num_timesteps=steps).config.schedule.betas(steps)
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    diffusion = gaussian(schedule=kind, num_timesteps=steps, prediction="v", zero_terminal_snr=True)
    torch.testing.assert_close(diffusion.alpha_bar[1:], expected, rtol=1e-9, atol=1e-15)
    assert diffusion.alpha_bar[-1] == 0
    assert diffusion.alpha_bar[1] == pytest.approx(float(1 - betas[0]), rel=1e-12)  # the first step is unchanged


@pytest.mark.parametrize("kind", ["x0", "v"])
@pytest.mark.parametrize("variance", ["learned", "posterior", "beta"])
def test_everything_is_finite_in_pure_noise(kind, variance):
    diffusion = gaussian(prediction=kind, variance=variance, zero_terminal_snr=True, weighting="min-snr")
    x0, noise, t = normal(2, 1, 2, 2), normal(2, 1, 2, 2, seed=1), torch.ones(2)
    x = diffusion.add_noise(x0, noise, t)
    assert torch.equal(x, noise)
    raw = diffusion.training_target(x0, noise, t)
    raw = torch.cat((raw, torch.zeros_like(raw)), dim=1) if variance == "learned" else raw
    result = diffusion.predict(raw, x, t)
    torch.testing.assert_close(result.x0, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.eps, noise, rtol=0, atol=1e-12)
    mean, log_variance = diffusion.p_mean_variance(x, result, t, torch.full((2,), 0.9))
    assert torch.isfinite(mean).all()
    assert torch.isfinite(log_variance).all()
    assert torch.isfinite(diffusion.loss(raw, x0, noise, t).total).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_terminal_snr": True}, "needs prediction v or x0"),
        ({"zero_terminal_snr": True, "prediction": "x0", "num_timesteps": 1}, "needs 2 steps or more"),
        ({"weighting": {"kind": "min-snr", "gamma": 0}}, "greater than 0"),
        ({"weighting": "min-snrr"}, "min-snr"),
        ({"shift": 2}, "unknown key 'shift'"),
    ],
)
def test_invalid_settings_are_reported(settings, message):
    with pytest.raises(TesseraError) as caught:
        validate(GaussianDiffusionConfig, settings, "the process")
    assert message in str(caught.value)


# Times


@given(st.integers(1, 5000))
def test_model_time_is_the_step(steps):
    """Float32 times, as in training, give integers 0 .. steps - 1."""
    t = torch.arange(1, steps + 1) / steps
    assert gaussian(num_timesteps=steps).model_time(t).tolist() == list(range(steps))


@given(st.integers(1, 5000))
def test_training_times_include_the_first_and_last_step(steps):
    diffusion = gaussian(num_timesteps=steps)
    ends = torch.tensor([0.0, 1 - 2.0**-24])  # the smallest and largest uniform number of 24 bits
    assert diffusion.model_time(diffusion.sample_timesteps(ends)).tolist() == [0, steps - 1]


def test_all_times_are_equally_likely():
    diffusion = gaussian()
    times = diffusion.sample_timesteps((torch.arange(100_000) + 0.5) / 100_000)
    assert times.min() == torch.tensor(1 / 1000)
    assert times.max() == 1
    counts = torch.bincount(diffusion.model_time(times).long(), minlength=1000)
    assert counts.tolist() == [100] * 1000


# Predictions


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predict_inverts_the_training_target(kind, dtype):
    """Each row has its own time. B = C = H = W: a wrong broadcast gives wrong numbers, not an error."""
    diffusion = gaussian(prediction=kind, variance="posterior")
    x0, noise = normal(4, 4, 4, 4, dtype=dtype), normal(4, 4, 4, 4, seed=1, dtype=dtype)
    t = torch.tensor([0.001, 0.25, 0.5, 0.9])
    x = diffusion.add_noise(x0, noise, t)
    prediction = diffusion.predict(diffusion.training_target(x0, noise, t), x, t)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(prediction.x0, x0, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(prediction.eps, noise, rtol=tolerance, atol=tolerance * (1 if kind == "epsilon" else 20))
    assert prediction.var_fraction is None
    assert x.dtype == prediction.x0.dtype == dtype
    for row in range(4):  # each row with scalar formulas
        alpha, sigma = float(diffusion.alpha(t[row : row + 1])), float(diffusion.sigma(t[row : row + 1]))
        torch.testing.assert_close(x[row], alpha * x0[row] + sigma * noise[row], rtol=1e-5, atol=1e-6)
        expected = {"epsilon": noise[row], "x0": x0[row], "v": alpha * noise[row] - sigma * x0[row]}[kind]
        torch.testing.assert_close(diffusion.training_target(x0, noise, t)[row], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_x0_and_eps_are_consistent_for_any_raw_output(kind):
    """x = alpha x0 + sigma eps."""
    diffusion = gaussian(prediction=kind)
    x, raw = normal(4, 4, 4, 4), normal(4, 8, 4, 4, seed=1)
    t = torch.tensor([0.001, 0.3, 0.7, 1.0])
    prediction = diffusion.predict(raw, x, t)
    torch.testing.assert_close(diffusion.add_noise(prediction.x0, prediction.eps, t), x, rtol=1e-9, atol=1e-9)


def test_the_second_half_of_the_channels_is_the_variance_fraction():
    raw = torch.cat((torch.zeros(1, 2, 1, 1), torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1)), dim=1)
    fraction = gaussian().predict(raw, torch.ones(1, 2, 1, 1), torch.tensor([0.5])).var_fraction
    assert fraction.flatten().tolist() == [0, 1]


def test_out_channels():
    assert gaussian().out_channels(4) == 8
    assert gaussian(variance="beta").out_channels(4) == 4


# The reverse process


def chain(betas):
    """Means and covariances of x_0 .. x_n given x_0 = 1, from x_i = sqrt(1 - b_i) x_(i-1) + sqrt(b_i) e_i."""
    count = len(betas)
    mean, spread = np.ones(count + 1), np.zeros((count + 1, count))
    for i, beta in enumerate(betas):
        mean[i + 1] = math.sqrt(1 - beta) * mean[i]
        spread[i + 1] = math.sqrt(1 - beta) * spread[i]
        spread[i + 1, i] = math.sqrt(beta)
    return mean, spread @ spread.T


@pytest.mark.parametrize(("later", "earlier"), [(2, 1), (12, 11), (20, 19), (20, 3), (7, 1)])
def test_the_posterior_matches_bayes_rule(later, earlier):
    """q(x_s | x_t, x_0) by conditioning the joint Gaussian of the whole chain, for adjacent and distant steps."""
    diffusion = gaussian(num_timesteps=20)
    betas = np.linspace(50 * 1e-4, 50 * 0.02, 20).clip(max=0.999)
    mean, covariance = chain(betas)
    gain = covariance[earlier, later] / covariance[later, later]
    t, s = torch.tensor([later / 20]), torch.tensor([earlier / 20])
    x0, x = normal(1, 2, 3, 3), normal(1, 2, 3, 3, seed=1)
    expected = mean[earlier] * x0 + gain * (x - mean[later] * x0)
    torch.testing.assert_close(diffusion.posterior_mean(x0, x, t, s), expected, rtol=1e-9, atol=1e-9)
    variance = covariance[earlier, earlier] - gain * covariance[earlier, later]
    posterior, beta = diffusion.log_variances(t, s)
    assert math.exp(float(posterior)) == pytest.approx(variance, rel=1e-9)
    assert math.exp(float(beta)) == pytest.approx(1 - np.prod(1 - betas[earlier:later]), rel=1e-9)


def test_a_long_step_equals_two_short_steps():
    """Steps from t to r and from r to s, given x0, have the mean and variance of one step from t to s."""
    diffusion = gaussian()
    t, r, s = (torch.full((3,), value) for value in (0.8, 0.45, 0.1))
    x0, x = normal(3, 1, 3, 3), normal(3, 1, 3, 3, seed=1)
    two_steps = diffusion.posterior_mean(x0, diffusion.posterior_mean(x0, x, t, r), r, s)
    torch.testing.assert_close(two_steps, diffusion.posterior_mean(x0, x, t, s), rtol=1e-9, atol=1e-9)
    one, zero = torch.ones(3, 1, 1, 1, dtype=torch.float64), torch.zeros(3, 1, 1, 1, dtype=torch.float64)
    slope = diffusion.posterior_mean(zero, one, r, s).flatten()
    first, second, one_step = (diffusion.log_variances(*pair)[0].exp() for pair in ((t, r), (r, s), (t, s)))
    torch.testing.assert_close(second + slope**2 * first, one_step, rtol=1e-9, atol=0)


def test_the_last_step_returns_x0():
    diffusion = gaussian()
    x0, x = normal(2, 1, 3, 3), normal(2, 1, 3, 3, seed=1)
    t = torch.tensor([1 / 1000, 0.4])
    torch.testing.assert_close(diffusion.posterior_mean(x0, x, t, torch.zeros(2)), x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("variance", "theirs"), [("posterior", "fixed_small"), ("beta", "fixed_large")])
@pytest.mark.parametrize("stride", [1, 100])
def test_fixed_variances_match_diffusers(schedule, variance, theirs, stride):
    scheduler = DDPMScheduler(
        trained_betas=gaussian(schedule=schedule).config.schedule.betas(1000).numpy(), variance_type=theirs
    )
    scheduler.set_timesteps(1000 // stride)
    diffusion = gaussian(schedule=schedule, variance=variance)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for step in range(stride, 1000, max(stride, 37)):
        step -= step % stride
        t, s = torch.tensor([(step + 1) / 1000]), torch.tensor([(step - stride + 1) / 1000])
        _, log_variance = diffusion.p_mean_variance(x, Prediction(x0=x, eps=x), t, s)
        expected = float(scheduler._get_variance(torch.tensor(step)))
        assert math.exp(float(log_variance)) == pytest.approx(expected, rel=2e-3)  # theirs is computed in float32


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_the_variance_of_the_first_step_is_the_posterior_of_the_second(variance):
    """As in the official code. Only the likelihood of the pixels at that step uses it."""
    diffusion = gaussian(variance=variance)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    first = diffusion.p_mean_variance(x, Prediction(x0=x, eps=x), torch.tensor([0.001]), torch.tensor([0.0]))[1]
    betas = np.linspace(1e-4, 0.02, 1000)
    expected = betas[1] * betas[0] / (1 - (1 - betas[0]) * (1 - betas[1]))
    assert math.exp(float(first)) == pytest.approx(expected, rel=1e-9)


def test_the_learned_variance_interpolates_the_two_others():
    diffusion = gaussian()
    x = normal(3, 2, 4, 4)
    t, s = torch.tensor([0.002, 0.5, 1.0]), torch.tensor([0.001, 0.3, 0.999])
    smallest, largest = diffusion.log_variances(t, s)
    for fraction, expected in ((0.0, smallest), (1.0, largest), (0.25, 0.75 * smallest + 0.25 * largest)):
        prediction = Prediction(x0=x, eps=x, var_fraction=torch.full_like(x, fraction))
        _, log_variance = diffusion.p_mean_variance(x, prediction, t, s)
        torch.testing.assert_close(log_variance, expected.view(3, 1, 1, 1).expand_as(x), rtol=1e-12, atol=1e-12)


def test_a_process_of_one_step():
    diffusion = gaussian(num_timesteps=1)
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    mean, log_variance = diffusion.p_mean_variance(x, Prediction(x0=x + 3, eps=x), torch.ones(1), torch.zeros(1))
    assert mean.item() == pytest.approx(3)
    assert torch.isfinite(log_variance).all()


# Training


def posterior_by_product(x0: float, x: float, betas: np.ndarray, i: int) -> tuple[float, float]:
    """Mean and variance of q(x_(i-1) | x_i, x_0) by the product of two Gaussians. Step i counts from 1."""
    bar = np.prod(1 - betas[: i - 1])
    precision = (1 - betas[i - 1]) / betas[i - 1] + 1 / (1 - bar)
    mean = (math.sqrt(1 - betas[i - 1]) * x / betas[i - 1] + math.sqrt(bar) * x0 / (1 - bar)) / precision
    return mean, 1 / precision


def test_the_bound_matches_a_numerically_integrated_kl_divergence():
    """In bits, for single pixels, each at its own step. Mean and variance of the model from scalar formulas."""
    diffusion, betas = gaussian(), np.linspace(1e-4, 0.02, 1000)
    steps = np.array([2, 40, 400, 1000])
    t = torch.from_numpy(steps / 1000)
    x0, noise, raw = normal(4, 1, 1, 1), normal(4, 1, 1, 1, seed=1), normal(4, 2, 1, 1, seed=2)
    raw[:, :1] = noise + 0.3 * raw[:, :1]
    x = diffusion.add_noise(x0, noise, t)
    vb = diffusion.vlb_term(raw, x0, x, t)
    for row, i in enumerate(steps):
        bar = np.prod(1 - betas[:i])
        noisy = float(x[row])
        x0_prediction = (noisy - math.sqrt(1 - bar) * float(raw[row, 0])) / math.sqrt(bar)
        fraction = (float(raw[row, 1]) + 1) / 2
        true_mean, true_variance = posterior_by_product(float(x0[row]), noisy, betas, i)
        mean, _ = posterior_by_product(x0_prediction, noisy, betas, i)
        variance = math.exp(fraction * math.log(betas[i - 1]) + (1 - fraction) * math.log(true_variance))
        q, p = stats.norm(true_mean, math.sqrt(true_variance)), stats.norm(mean, math.sqrt(variance))
        width = 12 * q.std()
        kl, _ = integrate.quad(
            lambda z, q=q, p=p: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), q.mean() - width, q.mean() + width, epsabs=1e-12
        )
        assert float(vb[row]) == pytest.approx(kl / math.log(2), rel=1e-6, abs=1e-9)


def test_the_bound_of_the_first_step_is_the_likelihood_of_the_pixels_bin():
    """-log2 of the exact normal probability of the bin. The tanh approximation has errors of about 1e-3."""
    diffusion, betas = gaussian(), np.linspace(1e-4, 0.02, 1000)
    x0 = (torch.tensor([0, 1, 60, 200, 254, 255], dtype=torch.float64) / 127.5 - 1).view(6, 1, 1, 1)
    noise = normal(6, 1, 1, 1)
    t = torch.full((6,), 0.001)
    x = diffusion.add_noise(x0, noise, t)
    vb = diffusion.vlb_term(torch.cat((noise * 0.9, torch.zeros_like(noise)), dim=1), x0, x, t)
    smallest = math.log(betas[1] * betas[0] / (1 - (1 - betas[0]) * (1 - betas[1])))
    std = math.exp(0.25 * (smallest + math.log(betas[0])))
    for row in range(6):
        mean = (float(x[row]) - math.sqrt(betas[0]) * 0.9 * float(noise[row])) / math.sqrt(1 - betas[0])
        pixel = float(x0[row])
        below = -math.inf if row == 0 else pixel - 1 / 255
        above = math.inf if row == 5 else pixel + 1 / 255
        probability = stats.norm.cdf(above, mean, std) - stats.norm.cdf(below, mean, std)
        assert float(vb[row]) == pytest.approx(-math.log2(probability), abs=3e-3)


@given(st.floats(-1.5, 1.5), st.floats(-5, 1))
def test_the_probabilities_of_the_256_bins_sum_to_1(mean, log_std):
    bins = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, log_std = torch.full_like(bins, mean), torch.full_like(bins, log_std)
    total = binned_log_likelihood(bins, mean, log_std).exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-9)  # the clamp to 1e-12 adds at most 256 times that


def test_each_bin_has_the_probability_of_the_normal_distribution():
    bins = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, log_std = torch.full_like(bins, 0.2), torch.full_like(bins, math.log(0.3))
    probabilities = binned_log_likelihood(bins, mean, log_std).exp().numpy()
    edges = np.concatenate(([-np.inf], (bins.numpy()[1:] + bins.numpy()[:-1]) / 2, [np.inf]))
    expected = np.diff(stats.norm.cdf(edges, 0.2, 0.3))
    np.testing.assert_allclose(probabilities, expected, atol=2e-4)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_loss_is_the_mean_squared_error_of_each_sample(kind):
    diffusion = gaussian(prediction=kind, variance="beta")
    x0, noise, raw = normal(4, 4, 4, 4), normal(4, 4, 4, 4, seed=1), normal(4, 4, 4, 4, seed=2)
    t = torch.tensor([0.001, 0.25, 0.5, 1.0])
    losses = diffusion.loss(raw, x0, noise, t)
    assert losses.vb is None
    for row in range(4):
        bar = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: round(float(t[row]) * 1000)])
        velocity = math.sqrt(bar) * noise[row] - math.sqrt(1 - bar) * x0[row]
        target = {"epsilon": noise[row], "x0": x0[row], "v": velocity}[kind]
        expected = float(((raw[row] - target) ** 2).sum()) / 64
        assert float(losses.total[row]) == pytest.approx(expected, rel=1e-9)
        assert float(losses.mse[row]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_bound_trains_only_the_variance(kind):
    diffusion = gaussian(prediction=kind)
    x0, noise = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    t = torch.tensor([0.001, 0.5, 1.0])
    raw = normal(3, 4, 4, 4, seed=2)
    # Nearly the target: a likelihood far from the target has no gradient.
    raw[:, :2] = diffusion.training_target(x0, noise, t) + 1e-3 * raw[:, :2]
    raw.requires_grad_()
    losses = diffusion.loss(raw, x0, noise, t)
    torch.testing.assert_close(losses.total, losses.mse + losses.vb)
    (vb_gradient,) = torch.autograd.grad(losses.vb.sum(), raw, retain_graph=True)
    (mse_gradient,) = torch.autograd.grad(losses.mse.sum(), raw)
    assert not vb_gradient[:, :2].any()
    assert (vb_gradient[:, 2:].flatten(1).abs().amax(dim=1) > 0).all()
    assert not mse_gradient[:, 2:].any()
    assert (mse_gradient[:, :2].flatten(1).abs().amax(dim=1) > 0).all()


def test_the_bound_has_its_minimum_at_the_true_posterior():
    """With the exact mean, KL is zero if the variance is the posterior's (raw output -1)."""
    diffusion = gaussian()
    x0, noise = normal(2, 1, 2, 2), normal(2, 1, 2, 2, seed=1)
    t = torch.tensor([0.3, 0.9])
    x = diffusion.add_noise(x0, noise, t)

    def bound(variance):
        return diffusion.vlb_term(torch.cat((noise, torch.full_like(noise, variance)), dim=1), x0, x, t)

    torch.testing.assert_close(bound(-1.0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)
    assert (bound(0.0) > 0).all()


def test_the_loss_of_a_bfloat16_output_is_computed_in_float32():
    diffusion = gaussian()
    x0, noise = normal(2, 1, 4, 4, dtype=torch.float32), normal(2, 1, 4, 4, seed=1, dtype=torch.float32)
    raw = normal(2, 2, 4, 4, seed=2, dtype=torch.float32).bfloat16()
    t = torch.tensor([0.001, 0.9])
    losses = diffusion.loss(raw, x0, noise, t)
    assert losses.total.dtype == torch.float32
    torch.testing.assert_close(losses.total, diffusion.loss(raw.float(), x0, noise, t).total)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_min_snr_gives_every_prediction_the_same_weight_of_the_x0_error(kind, gamma):
    """min(SNR, gamma) times the squared error of x0, whatever is predicted (Hang et al. 2023, section 3.4)."""
    weighting = {"kind": "min-snr", "gamma": gamma}
    diffusion = gaussian(prediction=kind, variance="beta", weighting=weighting)
    x0, noise, raw = normal(4, 4, 4, 4), normal(4, 4, 4, 4, seed=1), normal(4, 4, 4, 4, seed=2)
    t = torch.tensor([0.001, 0.2, 0.5, 1.0])
    losses = diffusion.loss(raw, x0, noise, t)
    plain = gaussian(prediction=kind, variance="beta").loss(raw, x0, noise, t)
    assert torch.equal(losses.mse, plain.total)
    x0_prediction = diffusion.predict(raw, diffusion.add_noise(x0, noise, t), t).x0
    for row in range(4):
        bar = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: round(float(t[row]) * 1000)])
        snr = bar / (1 - bar)
        expected = min(snr, gamma) * float((x0_prediction[row] - x0[row]).square().mean())
        assert float(losses.total[row]) == pytest.approx(expected, rel=1e-6)
        # The weights in the paper and in diffusers' training scripts.
        weight = {"epsilon": min(snr, gamma) / snr, "x0": min(snr, gamma), "v": min(snr, gamma) / (snr + 1)}[kind]
        assert float(losses.total[row] / plain.total[row]) == pytest.approx(weight, rel=1e-9)


def test_min_snr_does_not_change_the_variance_loss():
    x0, noise, raw = normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1), normal(2, 2, 4, 4, seed=2)
    t = torch.tensor([0.05, 0.9])
    weighted, plain = (gaussian(weighting=kind).loss(raw, x0, noise, t) for kind in ("min-snr", "uniform"))
    assert torch.equal(weighted.vb, plain.vb)
    ratio = (weighted.total - weighted.vb) / plain.mse
    assert ratio[0] < 0.7  # a high SNR: the weight is 5 / SNR
    assert ratio[1] == pytest.approx(1)


def test_with_zero_terminal_snr_the_min_snr_weight_of_the_last_step_is_0():
    diffusion = gaussian(prediction="v", variance="beta", zero_terminal_snr=True, weighting="min-snr")
    x0, noise, raw = normal(1, 1, 4, 4), normal(1, 1, 4, 4, seed=1), normal(1, 1, 4, 4, seed=2)
    losses = diffusion.loss(raw, x0, noise, torch.ones(1))
    assert losses.total.item() == 0
    assert losses.mse.item() > 0
