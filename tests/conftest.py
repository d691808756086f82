"""What every test may use: small networks with random weights, and models that draw in milliseconds."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings as hypothesis_settings
from torch import nn

from tessera.bundle import BundleConfig, Model

hypothesis_settings.register_profile("tessera", deadline=None)  # speed lives in benchmarks/
hypothesis_settings.load_profile("tessera")
torch.set_num_threads(1)  # tests are tiny: threads only wait for each other


@torch.no_grad()
def _randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every trained weight normal, so that nothing is hidden behind the zeros a fresh network starts with."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return network.eval()


@pytest.fixture
def randomise() -> Callable[..., nn.Module]:
    return _randomise


@pytest.fixture
def make_model() -> Callable[..., Model]:
    """A model of 8 x 8 pixels with random weights; sections of its configuration may be changed."""

    def make(network=None, process=None, codec=None, seed: int = 0, **changes) -> Model:
        network = {"size": 8, "channels": 1, "outputs": 2, "classes": 3, "patch": 2, "depth": 2, **(network or {})}
        network = {"width": 32, "heads": 2, **network}
        # x0 prediction keeps the pictures of an untrained network inside the range of pixels.
        process = {"prediction": "x0", **(process or {})}
        config = BundleConfig.model_validate(
            {
                "network": network,
                "process": process,
                "codec": codec or {"kind": "pixels", "channels": network["channels"]},
                "sampling": {"steps": 6},
                "class_names": ("cat", "dog", "emu")[: network["classes"]],
                **changes,
            }
        )
        return Model(config, _randomise(config.network.build(), seed))

    return make


@pytest.fixture
def tiny_model(make_model) -> Model:
    """Grey, three classes named cat, dog and emu, learned variance; samples by DDIM in 6 steps."""
    return make_model()


@pytest.fixture(scope="session")
def autoencoder_folder(tmp_path_factory) -> Path:
    """A saved AutoencoderKL of 4 latent channels, 2 pixels a latent, tiles of 16 pixels; not to be written into."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.5,
    )
    folder = tmp_path_factory.mktemp("autoencoder")
    autoencoder.save_pretrained(folder)
    return folder
