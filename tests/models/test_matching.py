"""U-Nets as large as DiTs: the presets of the paper's twelve, and whatever else a study compares."""

import pytest

from tessera.errors import TesseraError
from tessera.models.dit import DiTConfig
from tessera.models.matching import matched, size_of
from tessera.models.presets import PRESETS, UNETS
from tessera.models.unet import UNetConfig


def test_every_dit_has_two_unets():
    assert set(UNETS) == {name.replace("DiT", "UNet") + f"-{by}" for name in PRESETS for by in ("gmacs", "parameters")}


@pytest.mark.parametrize("name", UNETS)
def test_a_preset_is_as_large_as_its_dit(name):
    size, by = name.removeprefix("UNet-").split("-")
    dit = DiTConfig.model_validate({"preset": f"DiT-{size}"})
    unet = UNetConfig.model_validate({"preset": name})
    assert size_of(unet, by) == pytest.approx(size_of(dit, by), rel=0.03)


def test_the_presets_are_what_the_search_finds():
    dit = DiTConfig.model_validate({"preset": "DiT-B/2"})
    assert matched(dit, "gmacs") == UNetConfig.model_validate({"preset": "UNet-B/2-gmacs"})


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
def test_small_networks_are_matched_too(dit, by):
    wanted = DiTConfig.model_validate(dit)
    found = matched(wanted, by)
    assert size_of(found, by) == pytest.approx(size_of(wanted, by), rel=0.03)
    for fact in ("input_size", "in_channels", "out_channels", "num_classes", "learn_null_class"):
        assert getattr(found, fact) == getattr(wanted, fact)


def test_what_is_smaller_than_any_unet_is_refused():
    dit = DiTConfig.model_validate(
        {"input_size": 8, "in_channels": 1, "hidden_size": 4, "depth": 1, "num_heads": 1, "patch_size": 8}
    )
    with pytest.raises(TesseraError, match=r"no U-Net has as many gmacs as this DiT .*: the nearest, U-Net, width 1 "):
        matched(dit, "gmacs")
