"""Flow matching against plain numbers, numerical derivatives, and the optimum that is known for Gaussian data.

Shapes are B = C = H = W: a wrong broadcast then gives numbers, which are compared row by row.
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
from tessera.diffusion.flow import T_EPS, shifted
from tessera.errors import TesseraError
from tessera.sampling import DDIM, sample_loop
from tessera.sampling.timesteps import Uniform
from tessera.settings import validate
from tessera.training.recipe import Recipe, infer_pixel_channels, read_recipe, resolve_recipe

PATHS = ["linear", "gvp"]
QUANTITIES = ["velocity", "x0", "epsilon"]
TIMES = torch.tensor([0.06, 0.3, 0.7, 0.94], dtype=torch.float64)  # where no share is below the floor


def flow(**settings) -> FlowMatching:
    return FlowMatchingConfig.model_validate(settings).build()


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shares(path: str, t: float) -> tuple[float, float, float, float]:
    """alpha, sigma and their slopes at one time, from the formulas."""
    if path == "linear":
        return 1 - t, t, -1.0, 1.0
    turned = t * math.pi / 2
    return math.cos(turned), math.sin(turned), -math.pi / 2 * math.sin(turned), math.pi / 2 * math.cos(turned)


# The path


@pytest.mark.parametrize("path", PATHS)
def test_data_at_0_and_noise_at_1_to_the_bit(path):
    made, ends = flow(path=path), torch.tensor([0.0, 1.0])
    assert made.alpha(ends).tolist() == [1, 0]
    assert made.sigma(ends).tolist() == [0, 1]
    assert made.steps is None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_mixed_in_row_by_row(path, dtype):
    made, t = flow(path=path), TIMES.to(dtype)
    x0, noise = normal(4, 4, 4, 4, dtype=dtype), normal(4, 4, 4, 4, seed=1, dtype=dtype)
    x, target = made.add_noise(x0, noise, t), made.training_target(x0, noise, t)
    assert x.dtype == target.dtype == dtype
    assert made.alpha(t).dtype == made.sigma(t).dtype == torch.float64
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    for row in range(4):
        alpha, sigma, alpha_rate, sigma_rate = shares(path, float(TIMES[row]))
        torch.testing.assert_close(x[row], alpha * x0[row] + sigma * noise[row], rtol=0, atol=5 * tolerance)
        velocity = alpha_rate * x0[row] + sigma_rate * noise[row]
        torch.testing.assert_close(target[row], velocity, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("path", PATHS)
def test_rates_are_the_derivatives(path):
    made, t, h = flow(path=path), torch.linspace(0.01, 0.99, 23, dtype=torch.float64), 1e-5
    for rate, share in zip(made.schedule_derivative(t), (made.alpha, made.sigma)):
        torch.testing.assert_close(rate, (share(t + h) - share(t - h)) / (2 * h), rtol=1e-8, atol=1e-8)
        assert rate.dtype == torch.float64


@pytest.mark.parametrize("path", PATHS)
def test_time_at_undoes_the_ratio_of_noise_to_data(path):
    made = flow(path=path)
    t = torch.cat((torch.linspace(0, 1, 101, dtype=torch.float64), torch.tensor([1e-9, 1 - 1e-9])))
    ratio = made.sigma(t) / made.alpha(t)
    assert math.isinf(ratio[100])  # pure noise
    torch.testing.assert_close(made.time_from_nsr(ratio), t, rtol=1e-12, atol=1e-15)


# What a raw output means


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", QUANTITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_perfect_output_gives_back_data_and_noise(path, prediction, dtype):
    made, t = flow(path=path, prediction=prediction), TIMES.to(dtype)
    x0, noise = normal(4, 4, 4, 4, dtype=dtype), normal(4, 4, 4, 4, seed=1, dtype=dtype)
    found = made.predict(made.training_target(x0, noise, t), made.add_noise(x0, noise, t), t)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-5
    torch.testing.assert_close(found.x0, x0, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.eps, noise, rtol=0, atol=tolerance)
    assert found.x0.dtype == found.eps.dtype == dtype
    assert found.var_fraction is None
    assert made.out_channels(4) == 4


@pytest.mark.parametrize("path", PATHS)
def test_a_velocity_tells_both_ends_at_every_time(path):
    """Even in pure data and in pure noise: there is no division by a share."""
    made, t = flow(path=path), torch.tensor([0.0, 1e-9, 1 - 1e-9, 1.0], dtype=torch.float64)
    x0, noise = normal(4, 4, 4, 4), normal(4, 4, 4, 4, seed=1)
    found = made.predict(made.training_target(x0, noise, t), made.add_noise(x0, noise, t), t)
    torch.testing.assert_close(found.x0, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.eps, noise, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", QUANTITIES)
def test_any_output_is_a_consistent_pair(path, prediction):
    """x = alpha x0 + sigma eps holds for whatever the network says."""
    made = flow(path=path, prediction=prediction)
    x, raw = normal(4, 4, 4, 4), normal(4, 4, 4, 4, seed=1)
    found = made.predict(raw, x, TIMES)
    torch.testing.assert_close(made.add_noise(found.x0, found.eps, TIMES), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_an_error_in_epsilon_is_not_blown_up_in_pure_noise(path):
    """There x0 is read off nothing: its error stays below that of the floor, 1 / 0.05 times the network's."""
    made, t = flow(path=path, prediction="epsilon"), torch.ones(2)
    noise = normal(2, 1, 4, 4)
    found = made.predict(noise + 0.01, noise, t)
    torch.testing.assert_close(found.x0, torch.full_like(noise, -0.01 / 0.05), rtol=1e-9, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_drawing_by_epsilon_bears_a_small_error(path):
    """Gaussian data, the exact epsilon and one off by 0.01: without the floor the second draws a mean near -7."""
    mean, spread = 0.7, 0.4
    made = flow(path=path, prediction="epsilon")
    start = normal(1, 1, 1, 20_000)

    def drawn(error: float) -> torch.Tensor:
        def denoise(x, t):
            alpha, sigma = (float(share) for share in (made.alpha(t), made.sigma(t)))
            eps = sigma / (alpha**2 * spread**2 + sigma**2) * (x - alpha * mean)
            return made.predict(eps + error, x, t)

        denoise.diffusion = made
        return list(sample_loop(DDIM(), denoise, start, Uniform()(50, made), lambda: start))[-1].x

    assert float(drawn(0).mean()) == pytest.approx(mean, abs=0.05)
    assert float(drawn(0).std()) == pytest.approx(spread, abs=0.02)
    assert float((drawn(0.01) - drawn(0)).abs().max()) < 0.05


# Times


def test_the_network_is_told_times_in_its_own_units():
    t = torch.tensor([0.0, 0.25, 1.0])
    assert flow().model_time(t).tolist() == [0, 250, 1000]
    assert flow(network_times=(1, 0)).model_time(t).tolist() == [1, 0.75, 0]  # SiT's
    assert flow().model_time(t.double()).dtype == torch.float32


def test_uniform_times_are_the_uniform_numbers_and_stay_off_the_ends():
    made, uniform = flow(), torch.tensor([0.0, 0.25, 1 - 2.0**-24])
    drawn = made.sample_timesteps(uniform)
    assert drawn.tolist() == pytest.approx([T_EPS, 0.25, 1 - T_EPS], rel=1e-6)
    assert drawn.dtype == torch.float32
    assert ((drawn > 0) & (drawn < 1)).all()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.8), (1.2, 2.0)])
def test_logit_normal_times_have_its_quantiles(mean, std):
    made = flow(timestep_sampling={"kind": "logit-normal", "mean": mean, "std": std})
    share = np.linspace(0.001, 0.999, 999)
    drawn = made.sample_timesteps(torch.from_numpy(share)).numpy()
    np.testing.assert_allclose(drawn, 1 / (1 + np.exp(-stats.norm.ppf(share, mean, std))), rtol=1e-9)


@pytest.mark.parametrize("std", [0.5, 30.0])
def test_logit_normal_times_are_finite_at_both_ends(std):
    drawn = flow(timestep_sampling={"kind": "logit-normal", "std": std}).sample_timesteps(
        torch.tensor([0.0, 1 - 2.0**-24])
    )
    assert ((drawn >= T_EPS) & (drawn <= 1 - T_EPS + 1e-7)).all()
    assert drawn[0] < drawn[1]


@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_shift_multiplies_the_ratio_of_noise_to_data(factor):
    """Esser et al. 2024, equation 23, said otherwise: t / (1 - t) becomes shift times that."""
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    moved = shifted(t, factor)
    torch.testing.assert_close(moved / (1 - moved), factor * t / (1 - t), rtol=1e-12, atol=0)
    torch.testing.assert_close(flow(shift=factor).sample_timesteps(t), moved)
    both = flow(shift=factor, timestep_sampling="logit-normal").sample_timesteps(
        t
    )  # a shift of logit-normal times moves their mean
    torch.testing.assert_close(
        both,
        flow(timestep_sampling={"kind": "logit-normal", "mean": math.log(factor)}).sample_timesteps(t),
        rtol=1e-12,
        atol=0,
    )


@pytest.mark.parametrize(
    ("channels", "size", "expected"),
    [(4, (32, 32), 1.0), (4, (64, 64), 2.0), (768, (16, 16), 6.93), (1, (8, 8), 0.125)],
)
def test_shift_by_dimension(channels, size, expected):
    config = FlowMatchingConfig(shift="dimension")
    assert config.resolved(channels, size).shift == pytest.approx(expected, rel=1e-3)
    assert FlowMatchingConfig(shift=2).resolved(channels, size).shift == 2
    with pytest.raises(ValueError, match="resolved"):
        config.build()


# The loss


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("prediction", "loss"), list(itertools.product(QUANTITIES, QUANTITIES)))
def test_any_prediction_under_any_loss_is_that_squared_error(path, prediction, loss):
    """The raw output is read as x0 and eps, by hand, and these as the quantity of the loss."""
    made = flow(path=path, prediction=prediction, loss=loss)
    x0, noise, raw = normal(4, 4, 4, 4), normal(4, 4, 4, 4, seed=1), normal(4, 4, 4, 4, seed=2)
    losses = made.loss(raw, x0, noise, TIMES)
    assert losses.vb is None
    for row in range(4):
        alpha, sigma, alpha_rate, sigma_rate = shares(path, float(TIMES[row]))
        x = alpha * x0[row] + sigma * noise[row]
        if prediction == "x0":
            found, eps = raw[row], (x - alpha * raw[row]) / sigma
        elif prediction == "epsilon":
            found, eps = (x - sigma * raw[row]) / alpha, raw[row]
        else:
            ends = torch.linalg.solve(
                torch.tensor([[alpha, sigma], [alpha_rate, sigma_rate]], dtype=torch.float64),
                torch.stack((x.flatten(), raw[row].flatten())),
            )
            found, eps = ends[0].view_as(x), ends[1].view_as(x)
        meant = {"x0": (found, x0[row]), "epsilon": (eps, noise[row])}
        meant["velocity"] = tuple(alpha_rate * a + sigma_rate * b for a, b in ((found, eps), (x0[row], noise[row])))
        told, true = meant[loss]
        assert float(losses.total[row]) == pytest.approx(float((told - true).square().mean()), rel=1e-9)
        told, true = meant[prediction]
        assert float(losses.mse[row]) == pytest.approx(float((told - true).square().mean()), rel=1e-9)


def test_below_the_floor_a_converted_loss_grows_no_further():
    """x0 under the velocity loss weighs its error by 1 / t^2, and by 1 / 0.05^2 at most (Li & He 2025)."""
    made = flow(prediction="x0", loss="velocity")
    t = torch.tensor([T_EPS, 0.01, 0.05, 0.1], dtype=torch.float64)
    x0 = torch.zeros(4, 1, 2, 2, dtype=torch.float64)
    losses = made.loss(x0 + 1, x0, normal(4, 1, 2, 2), t)
    torch.testing.assert_close(losses.total, torch.tensor([400.0, 400, 400, 100], dtype=torch.float64))
    assert losses.mse.tolist() == [1] * 4


@pytest.mark.parametrize("path", PATHS)
def test_the_loss_is_least_at_the_exact_velocity_of_gaussian_data(path):
    """For data of mean m and variance s^2 the best velocity is a line in x, known in closed form."""
    made, mean, spread = flow(path=path), 0.7, 0.4
    count, at = 400_000, 0.6
    alpha, sigma, alpha_rate, sigma_rate = shares(path, at)
    x0 = mean + spread * normal(1, 1, 1, count)
    noise, t = normal(1, 1, 1, count, seed=1), torch.tensor([at], dtype=torch.float64)
    x = made.add_noise(x0, noise, t)
    variance = alpha**2 * spread**2 + sigma**2
    off = x - alpha * mean
    best = alpha_rate * (mean + alpha * spread**2 / variance * off) + sigma_rate * sigma / variance * off
    slope, level = torch.zeros(2, dtype=torch.float64, requires_grad=True).unbind()
    lowest = made.loss(best + slope * x + level, x0, noise, t).total.sum()
    gradient, least = torch.autograd.grad(lowest, (slope, level)), float(lowest.detach())
    assert max(abs(float(value)) for value in gradient) < 0.01  # flat, within the chance of 400 000 draws
    for change in (0.05, -0.05):
        assert float(made.loss(best + change * x, x0, noise, t).total) > least + 1e-4
        assert float(made.loss(best + change, x0, noise, t).total) > least + 1e-3


def test_raw_outputs_in_bfloat16_are_weighed_in_float32():
    x0, noise = normal(2, 1, 4, 4, dtype=torch.float32), normal(2, 1, 4, 4, seed=1, dtype=torch.float32)
    raw, t = normal(2, 1, 4, 4, seed=2, dtype=torch.float32).bfloat16(), torch.tensor([0.1, 0.9])
    losses = flow().loss(raw, x0, noise, t)
    assert losses.total.dtype == torch.float32
    torch.testing.assert_close(losses.total, flow().loss(raw.float(), x0, noise, t).total)
    assert flow().predict(raw, x0, t).x0.dtype == torch.float32


# As a choice in a recipe

RECIPE = """
data: {kind: digits}
network: {patch_size: 4, hidden_size: 16, depth: 1, num_heads: 2}
diffusion: PROCESS
sampling: {num_steps: 5}
training:
  {steps: 60, global_batch_size: 32, optimizer: {learning_rate: 0.01}, ema: {decay: 0.5}, log_every: 1, sample_every:
  1000,
   sample_seeds: 1, checkpoint_every: 1000, tensorboard: false, device: cpu}
"""


def recipe(tmp_path, diffusion: str, *overrides: str) -> Recipe:
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("PROCESS", diffusion))
    return read_recipe(tmp_path / "tiny.yaml", [f"run_dir={tmp_path / 'run'}", *overrides])


@pytest.mark.parametrize(
    "told", ["{kind: gaussian, num_timesteps: 20, schedule: cosine}", "{num_timesteps: 20, prediction: v}"]
)
@pytest.mark.parametrize("chosen", ["diffusion=flow", "diffusion.kind=flow"])
def test_choosing_flow_drops_what_was_of_the_gaussian_process(tmp_path, told, chosen):
    assert recipe(tmp_path, told, chosen).diffusion == FlowMatchingConfig()
    assert recipe(tmp_path, told, chosen, "diffusion.path=gvp").diffusion == FlowMatchingConfig(path="gvp")
    assert isinstance(recipe(tmp_path, told, "diffusion.kind=gaussian").diffusion.build(), GaussianDiffusion)
    assert recipe(tmp_path, told, "diffusion.kind=gaussian").diffusion.num_timesteps == 20


@pytest.mark.parametrize(
    ("diffusion", "said"),
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
def test_faults_are_named(tmp_path, diffusion, said):
    with pytest.raises(TesseraError) as caught:
        recipe(tmp_path, diffusion)
    assert said in str(caught.value)


def test_the_dimension_is_that_of_what_the_network_sees(tmp_path, make_model):
    """It stays a word in recipe and bundle, and is a number in each process that is built for a size."""
    told = infer_pixel_channels(recipe(tmp_path, "{kind: flow, shift: dimension}"))
    resolved = resolve_recipe(told, told.data.open(), told.codec.build())
    assert resolved.diffusion == FlowMatchingConfig(shift="dimension")
    assert resolved.network.out_channels == 1
    for size, shift in ((8, 0.125), (16, 0.25)):  # the root of 8 x 8 x 1 over 4096
        model = make_model(
            network={"out_channels": 1, "input_size": size}, sampling={"sampler": "euler", "num_steps": 2}
        )
        config = model.config.model_copy(update={"diffusion": FlowMatchingConfig(shift="dimension")})
        bundle.save(bundle.Model(config, model.network), tmp_path / f"{size}")
        read = bundle.load(tmp_path / f"{size}")
        assert json.loads((tmp_path / f"{size}" / bundle.CONFIG).read_text())["diffusion"]["shift"] == "dimension"
        assert (read.diffusion.shift, read.config.diffusion.summary().endswith("shifted by dimension")) == (shift, True)
        assert generation.generate(read, [0]).shape == (1, size, size, 1)


@pytest.mark.parametrize(
    "diffusion",
    [
        "{kind: flow, shift: dimension, timestep_sampling: logit-normal}",
        "{kind: flow, path: gvp, prediction: x0, loss: velocity}",
    ],
)
def test_a_run_learns_and_its_bundle_draws(tmp_path, diffusion):
    from tessera.monitoring.logger import read_log
    from tessera.training import loop

    run = loop.train(recipe(tmp_path, diffusion))
    mse = [record["mse"] for record in read_log(run)]
    assert np.mean(mse[-10:]) < 0.9 * np.mean(mse[:5])
    folder = bundle.checkpoints(run)[0]
    stored = json.loads((folder / bundle.CONFIG).read_text())["diffusion"]
    assert stored["kind"] == "flow"
    assert stored["shift"] == ("dimension" if "dimension" in diffusion else 1.0)
    assert loop.train(recipe(tmp_path, diffusion)) == run, "the word agrees with itself when the run goes on"
    model = bundle.load(folder)
    assert model.config.diffusion == validate(FlowMatchingConfig, stored, "")
    assert model_card.describe(model)["diffusion"].startswith("flow, ")
    pictures = generation.generate(model, [3, 5], [0])
    assert pictures.shape == (2, 8, 8, 1)
    assert pictures.std() > 5
    with pytest.raises(TesseraError, match="ancestral sampling needs a Gaussian diffusion process"):
        generation.generate(model, [3], [0], sampler="ancestral")
    with pytest.raises(TesseraError, match="leading"):
        generation.generate(model, [3], [0], timestep_spacing="leading")
