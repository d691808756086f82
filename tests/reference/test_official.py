"""Network, diffusion process and samplers against arrays that the official code computed.

`config` holds the settings of the network, and x, noise, t, y are the inputs. Each weight is generated from its name,
so that both codes use equal weights. The official code ran in float32 with float64 schedules: one forward pass agrees
to 1e-5, the loops to 1e-4, relative.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tessera.conditioning import Condition
from tessera.diffusion.gaussian import GaussianDiffusion, GaussianDiffusionConfig
from tessera.models.dit import DiT, DiTConfig
from tessera.sampling import DDIM, Ancestral, sample_loop
from tessera.sampling.denoiser import Denoiser
from tessera.sampling.timesteps import Uniform, timestep_grid

FOLDER = Path(__file__).parent

GRID = timestep_grid(Uniform(), 10, GaussianDiffusionConfig().build())


def fill(shape: tuple[int, ...], name: str, scale: float) -> Tensor:
    generator = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
    return torch.from_numpy((scale * generator.standard_normal(shape)).astype(np.float32))


@dataclass
class Official:
    name: str
    numbers: dict[str, Tensor]
    network: DiT
    diffusion: GaussianDiffusion

    def __getitem__(self, name: str) -> Tensor:
        return self.numbers[name]

    @property
    def times(self) -> Tensor:
        return (self["t"] + 1) / 1000

    def denoiser(self, guidance: float = 1.0, channels="all") -> Denoiser:
        return Denoiser(self.network, self.diffusion, Condition(self["y"]), guidance, channels)


@pytest.fixture(scope="module", params=["tiny", "patch4"])
def official(request) -> Official:
    numbers = np.load(FOLDER / f"{request.param}.npz")
    config = json.loads(str(numbers["config"]))
    network = DiTConfig(
        input_size=config["input_size"],
        patch_size=config["patch_size"],
        num_classes=config["num_classes"],
        hidden_size=config["hidden_size"],
        depth=config["depth"],
        num_heads=config["num_heads"],
    ).build()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name != "pos_embed":
                scale = 0.2 if name == "y_embedder.embedding_table.weight" else 0.06
                parameter.copy_(fill(tuple(parameter.shape), name, scale))
    arrays = {name: torch.from_numpy(numbers[name]) for name in numbers.files if name != "config"}
    return Official(request.param, arrays, network.eval(), GaussianDiffusionConfig().build())


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def check(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).norm() / expected.norm()) < tolerance


def test_reference_includes_the_first_timestep(official):
    assert official["t"][0] == 0
    assert len(official["t"]) > 1


def test_forward(official):
    check(official.network(official["x"], official["t"].float(), Condition(official["y"])), official["forward"], 1e-5)


def test_guidance_on_three_channels(official):
    check(official.denoiser(4.0, 3).raw(official["x"], official.times), official["cfg3"], 1e-5)


def test_guidance_on_all_channels_differs(official):
    """Guidance on three channels only, as in the official code, is not our default."""
    raw = official.denoiser(4.0).raw(official["x"], official.times)
    assert (raw[:, :3] - official["cfg3"][:, :3]).norm() / official["cfg3"][:, :3].norm() < 1e-5
    assert (raw[:, 3] - official["cfg3"][:, 3]).norm() / official["cfg3"][:, 3].norm() > 0.01


def test_noising(official):
    check(official.diffusion.add_noise(official["x"], official["noise"], official.times), official["q_sample"], 1e-6)


def test_losses(official):
    x = official.diffusion.add_noise(official["x"], official["noise"], official.times)
    raw = official.network(x, official.diffusion.model_time(official.times), Condition(official["y"]))
    losses = official.diffusion.loss(raw, official["x"], official["noise"], official.times)
    for actual, name in ((losses.total, "train_loss"), (losses.mse, "train_mse"), (losses.vb, "train_vb")):
        torch.testing.assert_close(actual, official[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("count", [10, 250])
def test_respaced_steps(official, count):
    grid = timestep_grid(Uniform(), count, GaussianDiffusionConfig().build())
    assert grid[-1] == 0
    assert official.diffusion.model_time(grid[:-1]).tolist() == sorted(
        official[f"respace{count}"].tolist(), reverse=True
    )


def test_reverse_distribution(official):
    grid = GRID
    index = 10 - 1 - 6  # the reference numbers the steps from the data
    x = official["noise"]
    t, s = grid[index].expand(len(x)), grid[index + 1].expand(len(x))
    prediction = official.denoiser()(x, t)
    mean, log_variance = official.diffusion.p_mean_variance(x, prediction, t, s)
    check(prediction.x0, official["p_pred_xstart"], 1e-5)
    check(mean, official["p_mean"], 1e-5)
    check(log_variance, official["p_log_variance"], 1e-5)


def test_ten_steps_of_ddim(official):
    *_, last = sample_loop(DDIM(), official.denoiser(), official["noise"], GRID, noise=None)
    check(last.x, official["ddim10"], 1e-4)


def test_ten_ancestral_steps(official):
    shape, step = tuple(official["noise"].shape), iter(range(10))

    def noise() -> Tensor:
        return fill(shape, f"{official.name}/step{next(step)}", 1.0)

    *_, last = sample_loop(Ancestral(), official.denoiser(), official["noise"], GRID, noise)
    check(last.x, official["ancestral10"], 1e-4)
