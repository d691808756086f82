"""SiT's network, losses and samplers against arrays that its official code (willisma/SiT, 947f95b) computed.

`config` holds the settings of the network, and each weight is generated from its name, as in `test_official`. SiT's
time t runs from noise (0) to data (1): Tessera's is 1 - t, and the velocity has the other sign. nK in a name is SiT's
num_steps, a grid of K points: K - 1 steps. What differs by convention is in
docs/explanation/conventions.md.
"""

import json
import math
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tessera.conditioning import Condition
from tessera.diffusion import FlowMatchingConfig
from tessera.interop import official
from tessera.models.dit import DiTConfig
from tessera.sampling import Euler, Heun, sample_loop
from tessera.sampling.denoiser import Denoiser

STEPS = 10  # n11


def fill(shape, name: str, scale: float) -> Tensor:
    generator = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
    return torch.from_numpy((scale * generator.standard_normal(tuple(shape))).astype(np.float32))


class SiT:
    """The imported model of one path, and the numbers of the official code."""

    def __init__(self, path: str, prediction: str, folder: Path) -> None:
        arrays = np.load(Path(__file__).parent / "sit.npz")
        config = json.loads(str(arrays["config"]))
        self.numbers = {name: torch.from_numpy(arrays[name]) for name in arrays.files if arrays[name].dtype.kind != "U"}
        network = DiTConfig(
            input_size=config["input_size"],
            hidden_size=config["hidden_size"],
            depth=config["depth"],
            num_heads=config["num_heads"],
            num_classes=config["num_classes"],
        ).build()
        weights = {
            name: fill(tensor.shape, name, 0.2 if "embedding_table" in name else 0.06)
            for name, tensor in network.state_dict().items()
        }
        weights["pos_embed"] = self.numbers["pos_embed"]
        torch.save(weights, folder / "sit.pt")
        kind = {"linear": "sit", "gvp": "sit-gvp"}[path]
        model = official.read(folder / "sit.pt", checkpoint_type=kind, num_heads=config["num_heads"], num_classes=7)
        self.path, self.network, self.diffusion = path, model.network, model.diffusion
        if prediction == "noise":  # the same weights, read as a predictor of the noise
            raw = {"path": path, "prediction": "epsilon", "loss": "epsilon", "network_times": (1, 0)}
            self.diffusion = FlowMatchingConfig.model_validate(raw).build()
            for parameter in (self.network.final_layer.linear.weight, self.network.final_layer.linear.bias):
                parameter.neg_()

    def __getitem__(self, name: str) -> Tensor:
        """An array of this path, or of both."""
        return self.numbers[f"{self.path}_{name}"] if f"{self.path}_{name}" in self.numbers else self.numbers[name]

    def denoiser(self, guidance: float = 1.0, label: Tensor | None = None) -> Denoiser:
        condition = Condition(label=self["y"] if label is None else label)
        return Denoiser(self.network, self.diffusion, condition, guidance, 3 if guidance != 1 else "all")

    def sample(self, solver, times, guidance: float = 1.0) -> Tensor:
        *_, last = sample_loop(solver, self.denoiser(guidance), self["noise"], torch.as_tensor(times), lambda: None)
        return last.x

    def velocity_and_score(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """SiT's drift and score at its time t, from Tessera's prediction."""
        time = torch.full((len(x),), 1 - t, dtype=torch.float64)
        prediction = self.denoiser()(x, time)
        alpha_rate, sigma_rate = (float(rate[0]) for rate in self.diffusion.schedule_derivative(time))
        sigma = float(self.diffusion.sigma(time)[0])
        return -(alpha_rate * prediction.x0 + sigma_rate * prediction.eps), -prediction.eps / max(sigma, 1e-12)

    def form(self, name: str, t: float) -> float:
        """SiT's diffusion coefficient at its time t."""
        sigma = float(self.diffusion.sigma(torch.tensor(1 - t)))
        return {"sigma": sigma, "linear": 1 - t, "decreasing": 0.25 * (math.cos(math.pi * t) + 1) ** 2}[name]


@pytest.fixture(params=["linear", "gvp"])
def sit(request, tmp_path):
    with torch.no_grad():
        yield SiT(request.param, "velocity", tmp_path)


@pytest.fixture(params=["linear", "gvp"])
def noise_sit(request, tmp_path):
    with torch.no_grad():
        yield SiT(request.param, "noise", tmp_path)


def check(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert float((actual - expected).norm() / expected.norm()) < tolerance


def uniform(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def test_the_velocity_with_a_class_without_one_and_guided_on_three_channels(sit):
    t = 1 - sit["t"].double()
    check(-sit.denoiser().raw(sit["x"], t), sit["velocity"])
    check(-sit.denoiser(label=torch.full((3,), -1)).raw(sit["x"], t), sit["velocity_null"])
    check(-sit.denoiser(float(sit["cfg_scale"])).raw(sit["x"], t), sit["cfg"][:3])


def test_the_path_and_the_loss(sit):
    t = 1 - sit["t"].double()
    x_t = sit.diffusion.add_noise(sit["x"], sit["noise"], t).float()
    check(x_t, sit["xt"])
    check(-sit.diffusion.training_target(sit["x"], sit["noise"], t).float(), sit["ut"])
    raw = sit.denoiser().raw(x_t, t)
    check(sit.diffusion.loss(raw, sit["x"], sit["noise"], t).total, sit["loss"])


@pytest.mark.parametrize(("name", "steps"), [("n11", 10), ("n10", 9)])
def test_euler_on_the_linear_path(tmp_path, name, steps):
    with torch.no_grad():
        sit = SiT("linear", "velocity", tmp_path)
        check(sit.sample(Euler(), uniform(steps)), sit[f"euler_{name}"])
        if name == "n11":
            check(sit.sample(Euler(), uniform(steps), float(sit["cfg_scale"])), sit["cfg_euler_n11"])


@pytest.mark.parametrize(("name", "steps"), [("n11", 10), ("n10", 9)])
def test_heun_on_the_linear_path_but_for_the_last_step(tmp_path, name, steps):
    """SiT evaluates its network at the data (t = 1) in the last step; Tessera's last step is Euler's."""
    with torch.no_grad():
        sit = SiT("linear", "velocity", tmp_path)
        x, dt = sit.sample(Heun(), uniform(steps)[:-1]), 1 / steps
        velocity, _ = sit.velocity_and_score(x, 1 - dt)
        at_data, _ = sit.velocity_and_score(x + dt * velocity, 1.0)
        check(x + dt * (velocity + at_data) / 2, sit[f"heun_{name}"])
        check(sit.sample(Heun(), uniform(steps)), x + dt * velocity)


def test_on_the_gvp_path_tessera_steps_in_alpha_and_sigma(tmp_path):
    """SiT's ODE methods step along the velocity. Both converge to the same image; with 10 steps they differ."""
    with torch.no_grad():
        sit = SiT("gvp", "velocity", tmp_path)
        x = sit["noise"]
        for step in range(STEPS):
            x = x + sit.velocity_and_score(x, step / STEPS)[0] / STEPS
        check(x, sit["euler_n11"])  # SiT's method with Tessera's velocity
        fine = sit.sample(Heun(), uniform(400))
        for solver, name, limit in ((Euler(), "euler_n11", 0.12), (Heun(), "heun_n11", 0.02)):
            check(sit.sample(solver, uniform(STEPS)), fine, limit)
            check(sit[name], fine, limit)


def steps_of_the_sde(sit: SiT, form: str, end: float, heun: bool = False) -> Tensor:
    """SiT's Euler-Maruyama or Heun steps from 0 to a time, with Tessera's velocity and score."""
    x, dt = sit["noise"], end / STEPS

    def drift(x: Tensor, t: float) -> Tensor:
        velocity, score = sit.velocity_and_score(x, t)
        return velocity + sit.form(form, t) * score

    for step in range(STEPS):
        t, noise = step * dt, math.sqrt(2 * sit.form(form, step * dt) * dt) * fill(x.shape, f"sit/step{step}", 1.0)
        if heun:
            x = x + noise
            first = drift(x, t)
            x = x + dt * (first + drift(x + dt * first, t + dt)) / 2
        else:
            x = x + dt * drift(x, t) + noise
    return x


@pytest.mark.parametrize("form", ["sigma", "linear", "decreasing"])
def test_the_sde_and_its_mean_last_step(sit, form):
    x = steps_of_the_sde(sit, form, 0.96)
    velocity, score = sit.velocity_and_score(x, 0.96)
    mean = x + 0.04 * (velocity + sit.form(form, 0.96) * score)
    check(mean, sit["em_n11" if form == "sigma" else f"em_{form}_n11"])
    if form == "sigma":
        check(x, sit["em_n11_before"])
        check(x + 0.04 * velocity, sit["em_n11_euler"])
        time = torch.full((3,), 0.04, dtype=torch.float64)
        check(sit.denoiser()(x, time).x0, sit["em_n11_tweedie"])
        # Tessera's own last step, to the data without new noise, is Tweedie's.
        check(Euler()(sit.denoiser(), x, time, torch.zeros(3, dtype=torch.float64), None, lambda: None)[0],
              sit["em_n11_tweedie"])  # fmt: skip


def test_the_sde_without_a_last_step_and_by_heun(sit):
    check(steps_of_the_sde(sit, "sigma", 1.0), sit["em_n11_none"])
    x = steps_of_the_sde(sit, "sigma", 0.96, heun=True)
    velocity, score = sit.velocity_and_score(x, 0.96)
    check(x + 0.04 * (velocity + sit.form("sigma", 0.96) * score), sit["sdeheun_n11"])


def test_noise_prediction(noise_sit):
    sit, t = noise_sit, 1 - noise_sit["t"].double()
    check(sit.denoiser().raw(sit["x"], t), sit["velocity"])
    raw = sit.denoiser().raw(sit.diffusion.add_noise(sit["x"], sit["noise"], t).float(), t)
    check(sit.diffusion.loss(raw, sit["x"], sit["noise"], t).total, sit["noise_loss_none"])
    x, grid = sit["noise"], np.linspace(0.001, 0.999, STEPS + 1)
    for begin, end in pairwise(grid):
        x = x + (end - begin) * sit.velocity_and_score(x, begin)[0]
    check(x, sit["noise_euler_n11"], 1e-4)
    if sit.path == "linear":
        check(sit.sample(Euler(), 1 - grid), sit["noise_euler_n11"], 1e-4)
