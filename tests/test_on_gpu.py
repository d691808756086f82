"""Checks that need a GPU."""

import numpy as np
import pytest
import torch
from PIL import Image

from tessera import bundle, generation, runtime
from tessera.bundle import BundleConfig, Model
from tessera.checkpoint_files import read_tensors
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


def test_the_same_image_on_cpu_and_gpu(model, tmp_path):
    bundle.save(model, tmp_path / "bundle")
    cuda_model = bundle.load(tmp_path / "bundle", "cuda")
    cpu_images = generation.generate(model, [1, 2], [0, 1], num_steps=10, guidance_scale=2.0)
    gpu_images = generation.generate(cuda_model, [1, 2], [0, 1], num_steps=10, guidance_scale=2.0)
    assert np.abs(cpu_images.astype(int) - gpu_images.astype(int)).max() <= 2


def test_bfloat16_is_close_to_float32(model):
    network = model.network.to("cuda")
    x, t = torch.randn(8, 3, 32, 32, device="cuda"), torch.linspace(0, 999, 8, device="cuda")
    condition = Condition(label=torch.arange(8, device="cuda"))
    with torch.no_grad():
        expected = network(x, t, condition)
        with runtime.autocast(torch.bfloat16, x.device):
            result = network(x, t, condition)
    assert float((result.float() - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("config", [AdamWConfig(learning_rate=1e-3), MuonConfig(learning_rate=1e-3)])
def test_a_step_is_repeatable_on_the_gpu(config):
    def weights() -> list[torch.Tensor]:
        torch.manual_seed(0)
        network = CONFIG.build().to("cuda")
        objective = TrainingObjective(
            GaussianDiffusionConfig().build(),
            PixelsConfig(channels=3).build(),
            True,
            0.1,
            ("label",),
            0,
            torch.bfloat16,
        )
        state = TrainState(network, network, config.build(network), config, ParallelContext())
        for number in range(3):
            generator = torch.Generator().manual_seed(number)
            pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=generator)
            batch = Batch(pixels, Condition(torch.arange(16) % 10), torch.arange(16) + 16 * number)
            train_step(state, batch, objective, 16)
        return [parameter.detach().cpu() for parameter in network.parameters()]

    for first, second in zip(weights(), weights()):
        assert torch.allclose(first, second, atol=1e-6)


def test_orthogonalize_is_the_same_on_cpu_and_gpu():
    matrices = torch.randn(6, 128, 512, generator=torch.Generator().manual_seed(0))
    cpu_result, gpu_result = orthogonalize(matrices, 5), orthogonalize(matrices.cuda(), 5, torch.bfloat16).cpu()
    assert float((cpu_result - gpu_result).norm() / cpu_result.norm()) < 0.03


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, optimizer):
    """Up to rounding, because some kernels add in any order. Attention uses them for 256 tokens."""
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(16):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")

    def run(name: str, steps: int) -> dict[str, torch.Tensor]:
        data = {
            "run_dir": str(tmp_path / name),
            "data": {"kind": "folder", "path": str(tmp_path / "data"), "size": 32},
            "network": {"hidden_size": 128, "depth": 4, "num_heads": 4, "patch_size": 2},
            "sampling": {"num_steps": 2},
            "training": {"steps": steps, "global_batch_size": 16, "tensorboard": False, "device": "cuda"}
            | {"sample_every": 1000, "optimizer": optimizer, "ema": {"extra_decays": [0.9]}},
        }
        folder = loop.train(validate(Recipe, data, "the test's recipe"))
        (shard,) = (bundle.checkpoints(folder)[0] / "state").iterdir()
        return read_tensors(shard, "weights/")

    whole = run("whole", 8)
    run("part", 5)
    part = run("part", 8)
    difference = max(float((whole[name] - part[name]).abs().max()) for name in whole)
    print(f"largest difference of a weight after 8 steps: {difference:.3g} (0: bit for bit)")
    assert difference < 1e-4
