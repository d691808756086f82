"""U-Nets of the same size as DiTs: the presets and `match_unet`."""

import pytest

from tessera.errors import TesseraError
from tessera.models.dit import DiTConfig
from tessera.models.matching import match_unet, network_size
from tessera.models.presets import PRESETS, UNET_PRESETS
from tessera.models.unet import UNetConfig


def test_every_dit_preset_has_two_unet_presets():
    assert set(UNET_PRESETS) == {
        name.replace("DiT", "UNet") + f"-{by}" for name in PRESETS for by in ("gmacs", "parameters")
    }


@pytest.mark.parametrize("name", UNET_PRESETS)
def test_unet_preset_has_the_size_of_its_dit(name):
    size, by = name.removeprefix("UNet-").split("-")
    dit = DiTConfig.model_validate({"preset": f"DiT-{size}"})
    unet = UNetConfig.model_validate({"preset": name})
    assert network_size(unet, by) == pytest.approx(network_size(dit, by), rel=0.03)


def test_match_unet_reproduces_a_preset():
    dit = DiTConfig.model_validate({"preset": "DiT-B/2"})
    assert match_unet(dit, "gmacs") == UNetConfig.model_validate({"preset": "UNet-B/2-gmacs"})


@pytest.mark.parametrize("by", ["gmacs", "parameters"])
@pytest.mark.parametrize(
    "dit",
    [
        {
            "input_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "num_classes": 10,
            "hidden_size": 96,
            "depth": 4,
            "num_heads": 4,
            "patch_size": 1,
        },
        {
            "input_size": 8,
            "in_channels": 1,
            "out_channels": 2,
            "num_classes": 10,
            "hidden_size": 48,
            "depth": 2,
            "num_heads": 4,
            "patch_size": 2,
        },
        {
            "input_size": (24, 32),
            "in_channels": 3,
            "out_channels": 3,
            "num_classes": 0,
            "hidden_size": 96,
            "depth": 9,
            "num_heads": 4,
            "patch_size": 2,
        },
    ],
)
def test_match_unet_for_small_networks(dit, by):
    config = DiTConfig.model_validate(dit)
    unet = match_unet(config, by)
    assert network_size(unet, by) == pytest.approx(network_size(config, by), rel=0.03)
    for name in ("input_size", "in_channels", "out_channels", "num_classes", "learn_null_class"):
        assert getattr(unet, name) == getattr(config, name)


def test_dit_smaller_than_any_unet_is_an_error():
    dit = DiTConfig.model_validate(
        {"input_size": 8, "in_channels": 1, "hidden_size": 4, "depth": 1, "num_heads": 1, "patch_size": 8}
    )
    with pytest.raises(TesseraError, match=r"no U-Net has as many gmacs as this DiT .*: the nearest, U-Net, width 1 "):
        match_unet(dit, "gmacs")
