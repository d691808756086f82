"""What only a GPU can show; skipped, saying so, where there is none."""

import numpy as np
import pytest
import torch
from PIL import Image

from tessera import bundle, generation, runtime
from tessera.bundle import BundleConfig, Model
from tessera.codecs import PixelsConfig
from tessera.conditioning import Condition
from tessera.data import Batch
from tessera.diffusion.gaussian import GaussianDiffusionConfig
from tessera.models.dit import DiTConfig
from tessera.settings import validate
from tessera.training import loop
from tessera.training.objective import TrainingObjective
from tessera.training.optimizers import AdamWConfig, MuonConfig, orthogonalize
from tessera.training.parallel import ParallelContext
from tessera.training.recipe import Recipe
from tessera.training.step import TrainState, train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CONFIG = DiTConfig.model_validate(
    {
        "input_size": 32,
        "in_channels": 3,
        "out_channels": 6,
        "num_classes": 10,
        "hidden_size": 128,
        "depth": 4,
        "num_heads": 4,
        "patch_size": 4,
    }
)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    network = CONFIG.build().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn_like(parameter))
    return Model(
        BundleConfig(network=CONFIG, diffusion=GaussianDiffusionConfig(), codec=PixelsConfig(channels=3)), network
    )


def test_the_same_picture_on_processor_and_gpu(model, tmp_path):
    bundle.save(model, tmp_path / "bundle")
    there = bundle.load(tmp_path / "bundle", "cuda")
    here = generation.generate(model, [1, 2], [0, 1], steps=10, guidance_scale=2.0)
    gpu = generation.generate(there, [1, 2], [0, 1], steps=10, guidance_scale=2.0)
    assert np.abs(here.astype(int) - gpu.astype(int)).max() <= 2


def test_bfloat16_is_near_float32(model):
    network = model.network.to("cuda")
    x, t = torch.randn(8, 3, 32, 32, device="cuda"), torch.linspace(0, 999, 8, device="cuda")
    condition = Condition(label=torch.arange(8, device="cuda"))
    with torch.no_grad():
        exact = network(x, t, condition)
        with runtime.autocast(torch.bfloat16, x.device):
            rough = network(x, t, condition)
    assert float((rough.float() - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize("config", [AdamWConfig(learning_rate=1e-3), MuonConfig(learning_rate=1e-3)])
def test_a_step_is_repeatable_on_the_gpu(config):
    def weights() -> list[torch.Tensor]:
        torch.manual_seed(0)
        network = CONFIG.build().to("cuda")
        task = TrainingObjective(
            GaussianDiffusionConfig().build(), PixelsConfig(channels=3).build(), True, 0.1, 10, 0, torch.bfloat16
        )
        learner = TrainState(network, network, config.build(network), config, ParallelContext())
        for number in range(3):
            generator = torch.Generator().manual_seed(number)
            pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=generator)
            batch = Batch(pixels, torch.arange(16) % 10, torch.arange(16) + 16 * number)
            train_step(learner, batch, task, 16)
        return [parameter.detach().cpu() for parameter in network.parameters()]

    for first, second in zip(weights(), weights()):
        assert torch.allclose(first, second, atol=1e-6)


def test_orthogonal_on_the_gpu_as_on_the_processor():
    matrices = torch.randn(6, 128, 512, generator=torch.Generator().manual_seed(0))
    here, there = orthogonalize(matrices, 5), orthogonalize(matrices.cuda(), 5, torch.bfloat16).cpu()
    assert float((here - there).norm() / here.norm()) < 0.03


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_stopped_and_resumed_is_an_uninterrupted_one(tmp_path, optimizer):
    """To rounding: kernels that add in any order are allowed; tokens enough (256) for attention to use them."""
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(16):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")

    def run(output: str, steps: int) -> dict[str, torch.Tensor]:
        data = {
            "output": str(tmp_path / output),
            "data": {"kind": "folder", "path": str(tmp_path / "data"), "size": 32},
            "network": {"hidden_size": 128, "depth": 4, "num_heads": 4, "patch_size": 2},
            "sampling": {"steps": 2},
            "training": {"steps": steps, "batch": 16, "tensorboard": False, "device": "cuda", "sample_every": 1000}
            | {"optimizer": optimizer, "ema": {"also": [0.9]}},
        }
        folder = loop.train(validate(Recipe, data, "the test's recipe"))
        (shard,) = (bundle.checkpoints(folder)[0] / "state").iterdir()
        return bundle.read_tensors(shard, "weights/")

    whole = run("whole", 8)
    run("part", 5)
    part = run("part", 8)
    apart = max(float((whole[name] - part[name]).abs().max()) for name in whole)
    print(f"largest difference of a weight after 8 steps: {apart:.3g} (0: bit for bit)")
    assert apart < 1e-4
