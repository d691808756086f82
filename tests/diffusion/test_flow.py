"""Flow matching against scalar formulas, numerical derivatives, and the known optimum for Gaussian data.

Shapes are B = C = H = W, so that a wrong broadcast gives wrong numbers, not an error. Rows are compared one by one.
"""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from tessera import bundle, generation, model_card
from tessera.diffusion import FlowMatching, FlowMatchingConfig, GaussianDiffusion
from tessera.diffusion.flow import T_EPS, shift_timesteps
from tessera.errors import TesseraError
from tessera.sampling import DDIM, Heun, sample_loop
from tessera.sampling.timesteps import Uniform
from tessera.settings import validate
from tessera.training.recipe import Recipe, infer_pixel_channels, read_recipe, resolve_recipe

PATHS = ["linear", "gvp"]
QUANTITIES = ["velocity", "x0", "epsilon"]
TIMES = torch.tensor([0.06, 0.3, 0.7, 0.94], dtype=torch.float64)  # alpha and sigma are above min_weight


def flow(**settings) -> FlowMatching:
    return FlowMatchingConfig.model_validate(settings).build()


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def path_coefficients(path: str, t: float) -> tuple[float, float, float, float]:
    """alpha, sigma and their derivatives at one time, from the formulas."""
    if path == "linear":
        return 1 - t, t, -1.0, 1.0
    angle = t * math.pi / 2
    return math.cos(angle), math.sin(angle), -math.pi / 2 * math.sin(angle), math.pi / 2 * math.cos(angle)


# The path


@pytest.mark.parametrize("path", PATHS)
def test_time_0_is_the_data_and_time_1_the_noise_exactly(path):
    diffusion, ends = flow(path=path), torch.tensor([0.0, 1.0])
    assert diffusion.alpha(ends).tolist() == [1, 0]
    assert diffusion.sigma(ends).tolist() == [0, 1]
    assert diffusion.num_timesteps is None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_row_has_its_own_noise_level(path, dtype):
    diffusion, t = flow(path=path), TIMES.to(dtype)
    x0, noise = normal(4, 4, 4, 4, dtype=dtype), normal(4, 4, 4, 4, seed=1, dtype=dtype)
    x, target = diffusion.add_noise(x0, noise, t), diffusion.training_target(x0, noise, t)
    assert x.dtype == target.dtype == dtype
    assert diffusion.alpha(t).dtype == diffusion.sigma(t).dtype == torch.float64
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    for row in range(4):
        alpha, sigma, alpha_rate, sigma_rate = path_coefficients(path, float(TIMES[row]))
        torch.testing.assert_close(x[row], alpha * x0[row] + sigma * noise[row], rtol=0, atol=5 * tolerance)
        velocity = alpha_rate * x0[row] + sigma_rate * noise[row]
        torch.testing.assert_close(target[row], velocity, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("path", PATHS)
def test_schedule_derivative_matches_a_numerical_derivative(path):
    diffusion, t, h = flow(path=path), torch.linspace(0.01, 0.99, 23, dtype=torch.float64), 1e-5
    for rate, schedule in zip(diffusion.schedule_derivative(t), (diffusion.alpha, diffusion.sigma)):
        torch.testing.assert_close(rate, (schedule(t + h) - schedule(t - h)) / (2 * h), rtol=1e-8, atol=1e-8)
        assert rate.dtype == torch.float64


@pytest.mark.parametrize("path", PATHS)
def test_time_from_nsr_inverts_the_noise_to_signal_ratio(path):
    diffusion = flow(path=path)
    t = torch.cat((torch.linspace(0, 1, 101, dtype=torch.float64), torch.tensor([1e-9, 1 - 1e-9])))
    ratio = diffusion.sigma(t) / diffusion.alpha(t)
    assert math.isinf(ratio[100])  # pure noise
    torch.testing.assert_close(diffusion.time_from_nsr(ratio), t, rtol=1e-12, atol=1e-15)


# Predictions


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", QUANTITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predict_inverts_the_training_target(path, prediction, dtype):
    diffusion, t = flow(path=path, prediction=prediction), TIMES.to(dtype)
    x0, noise = normal(4, 4, 4, 4, dtype=dtype), normal(4, 4, 4, 4, seed=1, dtype=dtype)
    result = diffusion.predict(diffusion.training_target(x0, noise, t), diffusion.add_noise(x0, noise, t), t)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-5
    torch.testing.assert_close(result.x0, x0, rtol=0, atol=tolerance)
    torch.testing.assert_close(result.eps, noise, rtol=0, atol=tolerance)
    assert result.x0.dtype == result.eps.dtype == dtype
    assert result.var_fraction is None
    assert diffusion.out_channels(4) == 4


@pytest.mark.parametrize("path", PATHS)
def test_a_velocity_determines_data_and_noise_at_every_time(path):
    """Even at t = 0 and t = 1: there is no division by alpha or sigma."""
    diffusion, t = flow(path=path), torch.tensor([0.0, 1e-9, 1 - 1e-9, 1.0], dtype=torch.float64)
    x0, noise = normal(4, 4, 4, 4), normal(4, 4, 4, 4, seed=1)
    result = diffusion.predict(diffusion.training_target(x0, noise, t), diffusion.add_noise(x0, noise, t), t)
    torch.testing.assert_close(result.x0, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.eps, noise, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", QUANTITIES)
def test_x0_and_eps_are_consistent_for_any_raw_output(path, prediction):
    """x = alpha x0 + sigma eps."""
    diffusion = flow(path=path, prediction=prediction)
    x, raw = normal(4, 4, 4, 4), normal(4, 4, 4, 4, seed=1)
    result = diffusion.predict(raw, x, TIMES)
    torch.testing.assert_close(diffusion.add_noise(result.x0, result.eps, TIMES), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_epsilon_determines_the_data_at_every_time_but_1(path):
    """min_weight has no effect. In pure noise, where nothing determines x0, it is 0 and not infinite."""
    diffusion, t = flow(path=path, prediction="epsilon", min_weight=0.9), torch.tensor([1.0, 0.999, 0.5, 0.0]).double()
    x0, noise = normal(4, 4, 4, 4), normal(4, 4, 4, 4, seed=1)
    result = diffusion.predict(noise, diffusion.add_noise(x0, noise, t), t)
    assert not result.x0[0].any()
    torch.testing.assert_close(result.x0[1:], x0[1:], rtol=0, atol=1e-11)
    assert diffusion.predict(noise + 1, noise, t).x0.isfinite().all()


def sample_gaussian(path: str, steps: int, error: float, solver=None) -> torch.Tensor:
    """Samples of Gaussian data of mean 0.7 and standard deviation 0.4, by the exact epsilon with an error."""
    diffusion, start = flow(path=path, prediction="epsilon"), normal(1, 1, 1, 20_000)

    def denoise(x, t):
        alpha, sigma = float(diffusion.alpha(t)), float(diffusion.sigma(t))
        eps = sigma / (alpha**2 * 0.4**2 + sigma**2) * (x - alpha * 0.7)
        return diffusion.predict(eps + error, x, t)

    denoise.diffusion = diffusion
    times = Uniform()(steps, diffusion)
    return list(sample_loop(solver or DDIM(), denoise, start, times, lambda: start))[-1].x


@pytest.mark.parametrize("path", PATHS)
def test_sampling_with_epsilon_tolerates_a_small_error(path):
    """However short the first step is, an error is not divided by its alpha."""
    for steps in (10, 50, 1000):
        change = sample_gaussian(path, steps, 0.01) - sample_gaussian(path, steps, 0)
        assert float(change.abs().max()) < 0.05


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", [DDIM(), Heun()], ids=lambda solver: solver.kind)
def test_more_steps_with_epsilon_end_nearer_to_the_truth(path, solver):
    """The exact flow maps x at time 1 to 0.7 + 0.4 x."""
    truth = 0.7 + 0.4 * normal(1, 1, 1, 20_000)
    errors = [sample_gaussian(path, steps, 0, solver) - truth for steps in (25, 125, 625)]
    means = [abs(float(error.mean())) for error in errors]
    largest = [float(error.abs().max()) for error in errors]
    assert largest[0] > 4 * largest[1] > 16 * largest[2]
    assert means[1] < (2e-3 if solver.kind == "ddim" else 2e-4)


# Times


def test_model_time_is_in_the_units_of_the_network():
    t = torch.tensor([0.0, 0.25, 1.0])
    assert flow().model_time(t).tolist() == [0, 250, 1000]
    assert flow(network_times=(1, 0)).model_time(t).tolist() == [1, 0.75, 0]  # SiT's
    assert flow().model_time(t.double()).dtype == torch.float32


def test_uniform_times_are_the_uniform_numbers_except_near_0_and_1():
    diffusion, uniform = flow(), torch.tensor([0.0, 0.25, 1 - 2.0**-24])
    times = diffusion.sample_timesteps(uniform)
    assert times.tolist() == pytest.approx([T_EPS, 0.25, 1 - T_EPS], rel=1e-6)
    assert times.dtype == torch.float32
    assert ((times > 0) & (times < 1)).all()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.8), (1.2, 2.0)])
def test_logit_normal_times_have_the_quantiles_of_the_distribution(mean, std):
    diffusion = flow(timestep_sampling={"kind": "logit-normal", "mean": mean, "std": std})
    probability = np.linspace(0.001, 0.999, 999)
    times = diffusion.sample_timesteps(torch.from_numpy(probability)).numpy()
    np.testing.assert_allclose(times, 1 / (1 + np.exp(-stats.norm.ppf(probability, mean, std))), rtol=1e-9)


@pytest.mark.parametrize("std", [0.5, 30.0])
def test_logit_normal_times_stay_inside_the_limits(std):
    times = flow(timestep_sampling={"kind": "logit-normal", "std": std}).sample_timesteps(
        torch.tensor([0.0, 1 - 2.0**-24])
    )
    assert ((times >= T_EPS) & (times <= 1 - T_EPS + 1e-7)).all()
    assert times[0] < times[1]


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_shift_multiplies_the_noise_to_signal_ratio(factor):
    """An equivalent form of Esser et al. 2024, equation 23: t / (1 - t) is multiplied by shift."""
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    shifted = shift_timesteps(t, factor)
    torch.testing.assert_close(shifted / (1 - shifted), factor * t / (1 - t), rtol=1e-12, atol=0)
    torch.testing.assert_close(flow(shift=factor).sample_timesteps(t), shifted)
    # A shift of logit-normal times is a shift of their mean.
    both = flow(shift=factor, timestep_sampling="logit-normal").sample_timesteps(t)
    expected = flow(timestep_sampling={"kind": "logit-normal", "mean": math.log(factor)}).sample_timesteps(t)
    torch.testing.assert_close(both, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("channels", "size", "expected"),
    [(4, (32, 32), 1.0), (4, (64, 64), 2.0), (768, (16, 16), 6.93), (1, (8, 8), 0.125)],
)
def test_shift_by_dimension(channels, size, expected):
    config = FlowMatchingConfig(shift="dimension")
    assert config.resolve(channels, size).shift == pytest.approx(expected, rel=1e-3)
    assert FlowMatchingConfig(shift=2).resolve(channels, size).shift == 2
    with pytest.raises(ValueError, match="call FlowMatchingConfig.resolve"):
        config.build()


# The loss


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("prediction", "loss"), list(itertools.product(QUANTITIES, QUANTITIES)))
def test_every_prediction_with_every_loss_is_the_squared_error_of_the_loss_quantity(path, prediction, loss):
    """The raw output is converted to x0 and eps, and these to the quantity of the loss."""
    diffusion = flow(path=path, prediction=prediction, loss=loss)
    x0, noise, raw = normal(4, 4, 4, 4), normal(4, 4, 4, 4, seed=1), normal(4, 4, 4, 4, seed=2)
    losses = diffusion.loss(raw, x0, noise, TIMES)
    assert losses.vb is None
    for row in range(4):
        alpha, sigma, alpha_rate, sigma_rate = path_coefficients(path, float(TIMES[row]))
        x = alpha * x0[row] + sigma * noise[row]
        if prediction == "x0":
            data, eps = raw[row], (x - alpha * raw[row]) / sigma
        elif prediction == "epsilon":
            data, eps = (x - sigma * raw[row]) / alpha, raw[row]
        else:
            solution = torch.linalg.solve(
                torch.tensor([[alpha, sigma], [alpha_rate, sigma_rate]], dtype=torch.float64),
                torch.stack((x.flatten(), raw[row].flatten())),
            )
            data, eps = solution[0].view_as(x), solution[1].view_as(x)
        errors = {"x0": data - x0[row], "epsilon": eps - noise[row]}
        errors["velocity"] = alpha_rate * errors["x0"] + sigma_rate * errors["epsilon"]
        assert float(losses.total[row]) == pytest.approx(float(errors[loss].square().mean()), rel=1e-9)
        assert float(losses.mse[row]) == pytest.approx(float(errors[prediction].square().mean()), rel=1e-9)


def test_min_weight_limits_the_weight_of_a_converted_loss():
    """x0 with the velocity loss: the weight of its error is 1 / t^2, at most 1 / 0.05^2 (Li & He 2025)."""
    diffusion = flow(prediction="x0", loss="velocity")
    t = torch.tensor([T_EPS, 0.01, 0.05, 0.1], dtype=torch.float64)
    x0 = torch.zeros(4, 1, 2, 2, dtype=torch.float64)
    losses = diffusion.loss(x0 + 1, x0, normal(4, 1, 2, 2), t)
    torch.testing.assert_close(losses.total, torch.tensor([400.0, 400, 400, 100], dtype=torch.float64))
    assert losses.mse.tolist() == [1] * 4


@pytest.mark.parametrize("path", PATHS)
def test_the_loss_has_its_minimum_at_the_exact_velocity_of_gaussian_data(path):
    """For data of mean m and variance s^2 the optimal velocity is linear in x, known in closed form."""
    diffusion, mean, spread = flow(path=path), 0.7, 0.4
    count, time = 400_000, 0.6
    alpha, sigma, alpha_rate, sigma_rate = path_coefficients(path, time)
    x0 = mean + spread * normal(1, 1, 1, count)
    noise, t = normal(1, 1, 1, count, seed=1), torch.tensor([time], dtype=torch.float64)
    x = diffusion.add_noise(x0, noise, t)
    variance = alpha**2 * spread**2 + sigma**2
    deviation = x - alpha * mean
    best = alpha_rate * (mean + alpha * spread**2 / variance * deviation) + sigma_rate * sigma / variance * deviation
    slope, level = torch.zeros(2, dtype=torch.float64, requires_grad=True).unbind()
    total = diffusion.loss(best + slope * x + level, x0, noise, t).total.sum()
    gradient, minimum = torch.autograd.grad(total, (slope, level)), float(total.detach())
    assert max(abs(float(value)) for value in gradient) < 0.01  # zero, within the noise of 400 000 samples
    for change in (0.05, -0.05):
        assert float(diffusion.loss(best + change * x, x0, noise, t).total) > minimum + 1e-4
        assert float(diffusion.loss(best + change, x0, noise, t).total) > minimum + 1e-3


def test_the_loss_of_a_bfloat16_output_is_computed_in_float32():
    x0, noise = normal(2, 1, 4, 4, dtype=torch.float32), normal(2, 1, 4, 4, seed=1, dtype=torch.float32)
    raw, t = normal(2, 1, 4, 4, seed=2, dtype=torch.float32).bfloat16(), torch.tensor([0.1, 0.9])
    losses = flow().loss(raw, x0, noise, t)
    assert losses.total.dtype == torch.float32
    torch.testing.assert_close(losses.total, flow().loss(raw.float(), x0, noise, t).total)
    assert flow().predict(raw, x0, t).x0.dtype == torch.float32


# In a recipe

RECIPE = """
data: {kind: digits}
network: {patch_size: 4, hidden_size: 16, depth: 1, num_heads: 2}
diffusion: PROCESS
sampling: {num_steps: 5}
training:
  {steps: 60, global_batch_size: 32, optimizer: {learning_rate: 0.01}, ema: {decay: 0.5}, log_every: 1,
   sample_every: 1000, sample_seeds: 1, checkpoint_every: 1000, tensorboard: false, device: cpu}
"""


def recipe(tmp_path, diffusion: str, *overrides: str) -> Recipe:
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("PROCESS", diffusion))
    return read_recipe(tmp_path / "tiny.yaml", [f"run_dir={tmp_path / 'run'}", *overrides])


@pytest.mark.parametrize(
    "settings", ["{kind: gaussian, num_timesteps: 20, schedule: cosine}", "{num_timesteps: 20, prediction: v}"]
)
@pytest.mark.parametrize("override", ["diffusion=flow", "diffusion.kind=flow"])
def test_an_override_to_flow_drops_the_settings_of_the_gaussian_process(tmp_path, settings, override):
    assert recipe(tmp_path, settings, override).diffusion == FlowMatchingConfig()
    assert recipe(tmp_path, settings, override, "diffusion.path=gvp").diffusion == FlowMatchingConfig(path="gvp")
    assert isinstance(recipe(tmp_path, settings, "diffusion.kind=gaussian").diffusion.build(), GaussianDiffusion)
    assert recipe(tmp_path, settings, "diffusion.kind=gaussian").diffusion.num_timesteps == 20


@pytest.mark.parametrize(
    ("diffusion", "message"),
    [
        ("{kind: flow, steps: 20}", "unknown key 'steps'"),
        ("{kind: flow, shfit: 2}", "did you mean 'shift'"),
        ("{kind: flow, shift: 0}", "greater than 0"),
        ("{kind: flow, shift: size}", "dimension"),
        ("{kind: flow, path: straight}", "'linear' or 'gvp'"),
        ("{kind: flow, prediction: v}", "'velocity', 'x0' or 'epsilon'"),
        ("{kind: flow, timestep_sampling: {kind: logit-normal, std: 0}}", "greater than 0"),
        ("{kind: flow, timestep_sampling: lognormal}", "logit-normal"),
        ("{kind: flow, min_weight: 1}", "less than 1"),
        ("flwo", "did you mean 'flow'"),
    ],
)
def test_invalid_settings_are_reported(tmp_path, diffusion, message):
    with pytest.raises(TesseraError) as caught:
        recipe(tmp_path, diffusion)
    assert message in str(caught.value)


def test_shift_dimension_is_resolved_for_the_input_of_the_network(tmp_path, make_model):
    """Recipe and bundle store the word; a process that is built for a size has a number."""
    unresolved = infer_pixel_channels(recipe(tmp_path, "{kind: flow, shift: dimension}"))
    resolved = resolve_recipe(unresolved, unresolved.data.open(), unresolved.codec.build())
    assert resolved.diffusion == FlowMatchingConfig(shift="dimension")
    assert resolved.network.out_channels == 1
    for size, shift in ((8, 0.125), (16, 0.25)):  # the square root of 8 x 8 x 1 over 4096
        model = make_model(
            network={"out_channels": 1, "input_size": size}, sampling={"sampler": "euler", "num_steps": 2}
        )
        config = model.config.model_copy(update={"diffusion": FlowMatchingConfig(shift="dimension")})
        bundle.save(bundle.Model(config, model.network), tmp_path / f"{size}")
        loaded = bundle.load(tmp_path / f"{size}")
        assert json.loads((tmp_path / f"{size}" / bundle.CONFIG).read_text())["diffusion"]["shift"] == "dimension"
        assert loaded.diffusion.shift == shift
        assert loaded.config.diffusion.summary().endswith("shifted by dimension")
        assert generation.generate(loaded, [0]).shape == (1, size, size, 1)


@pytest.mark.parametrize(
    "diffusion",
    [
        "{kind: flow, shift: dimension, timestep_sampling: logit-normal}",
        "{kind: flow, path: gvp, prediction: x0, loss: velocity}",
    ],
)
def test_a_run_learns_and_its_bundle_generates_images(tmp_path, diffusion):
    from tessera.monitoring.logger import read_log
    from tessera.training import loop

    run = loop.train(recipe(tmp_path, diffusion))
    mse = [record["mse"] for record in read_log(run)]
    assert np.mean(mse[-10:]) < 0.9 * np.mean(mse[:5])
    folder = bundle.checkpoints(run)[0]
    stored = json.loads((folder / bundle.CONFIG).read_text())["diffusion"]
    assert stored["kind"] == "flow"
    assert stored["shift"] == ("dimension" if "dimension" in diffusion else 1.0)
    assert loop.train(recipe(tmp_path, diffusion)) == run  # resumes: the stored word equals the resolved one
    model = bundle.load(folder)
    assert model.config.diffusion == validate(FlowMatchingConfig, stored, "")
    assert model_card.describe(model)["diffusion"].startswith("flow, ")
    images = generation.generate(model, [3, 5], [0])
    assert images.shape == (2, 8, 8, 1)
    assert images.std() > 5
    with pytest.raises(TesseraError, match="ancestral sampling needs a Gaussian diffusion process"):
        generation.generate(model, [3], [0], sampler="ancestral")
    with pytest.raises(TesseraError, match="leading"):
        generation.generate(model, [3], [0], timestep_spacing="leading")
