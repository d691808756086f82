"""Parameters and multiply-adds: the published tables (Peebles & Xie 2023, tables 1 and 4), PyTorch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tessera.conditioning import Condition
from tessera.models.dit import DiT, DiTConfig
from tessera.models.network import parameter_count
from tessera.models.presets import PRESETS

# fmt: off
PUBLISHED = {  # parameters (exact, position table included), GMACs of one forward pass
    "DiT-S/8":  ( 33_148_160,   0.36), "DiT-S/4":  ( 32_945_024,  1.41), "DiT-S/2":  ( 32_963_360,   6.06),
    "DiT-B/8":  (130_881_536,   1.42), "DiT-B/4":  (130_475_648,  5.56), "DiT-B/2":  (130_512_416,  23.01),
    "DiT-L/8":  (458_594_816,   5.01), "DiT-L/4":  (458_053_760, 19.70), "DiT-L/2":  (458_102_816,  80.71),
    "DiT-XL/8": (675_683_072,   7.39), "DiT-XL/4": (675_074_432, 29.05), "DiT-XL/2": (675_129_632, 118.64),
}
DESIGNS = {  # XL/2: millions of parameters, GMACs
    "in-context":      (449.3, 119.37),
    "cross-attention": (598.1, 137.62),
    "adaln":           (600.7, 118.56),
    "adaln-zero":      (675.1, 118.64),
}
# fmt: on


def on_meta(**settings) -> DiT:
    with torch.device("meta"):
        return DiTConfig.model_validate(settings).build()


def test_presets_are_the_twelve_models_of_the_paper():
    assert set(PRESETS) == set(PUBLISHED)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_preset_counts(preset):
    parameters, gmacs = PUBLISHED[preset]
    network = on_meta(preset=preset)
    assert parameter_count(network) == parameters
    assert network.macs() / 1e9 == pytest.approx(gmacs, abs=0.02)


def test_xl2_at_512_pixels():
    assert on_meta(preset="DiT-XL/2", input_size=64).macs() / 1e9 == pytest.approx(524.54, abs=0.005)
    assert on_meta(preset="DiT-XL/2").macs((64, 64)) / 1e9 == pytest.approx(524.54, abs=0.005)


@pytest.mark.parametrize("design", DESIGNS)
def test_block_design_counts(design):
    millions, gmacs = DESIGNS[design]
    network = on_meta(preset="DiT-XL/2", block=design)
    assert parameter_count(network) / 1e6 == pytest.approx(millions, abs=0.05)
    assert network.macs() / 1e9 == pytest.approx(gmacs, abs=0.05)


def count_flops(network: DiT, size: tuple[int, int], backward: bool = False) -> int:
    """Floating-point operations of a forward pass, or of both, counted by PyTorch (without attention on a CPU)."""
    with torch.device("meta"):
        x, t = torch.empty(1, network.config.in_channels, *size), torch.empty(1)
        label = torch.empty(1, dtype=torch.int64) if network.config.num_classes else None
    with FlopCounterMode(display=False) as counter:
        raw = network(x, t, Condition(label))
        if backward:
            raw.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize("design", DESIGNS)
def test_macs_match_pytorch_flop_counter(design, classes, patch, size):
    network = on_meta(
        block=design,
        num_classes=classes,
        patch_size=patch,
        input_size=size,
        depth=2,
        hidden_size=24,
        num_heads=3,
        mlp_ratio=3,
        in_channels=3,
    )
    assert count_flops(network, size) == 2 * network.macs()
    other = (size[0] * 2, size[1])
    assert count_flops(network, other) == 2 * network.macs(other)


@pytest.mark.parametrize("design", DESIGNS)
def test_macs_of_the_full_model_match_pytorch_flop_counter(design):
    network = on_meta(preset="DiT-XL/2", block=design)
    assert count_flops(network, (32, 32)) == 2 * network.macs()


@pytest.mark.parametrize("design", [*DESIGNS, "adaln-single", "rope-swiglu"])
def test_forward_and_backward_cost_three_forward_passes(design):
    """To 1 %: the inputs of the first layers need no gradient."""
    network = on_meta(preset="DiT-S/2", block=design, depth=3)
    assert count_flops(network, (32, 32), backward=True) == pytest.approx(6 * network.macs(), rel=0.01)
