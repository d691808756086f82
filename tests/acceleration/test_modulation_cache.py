"""Steering vectors looked up are those computed, for every design, and nothing is looked up that is not there."""

import pytest
import torch

from tessera.acceleration.modulation_cache import PrecomputedModulation
from tessera.conditioning import Condition
from tessera.layers.modulation import Modulation
from tessera.models.dit import DiT, DiTConfig

BLOCKS = ["in-context", "cross-attention", "adaln", "adaln-zero", "adaln-single", "rope-swiglu"]
TIMES, GRID = torch.tensor([999.0, 500.25, 0.0]), (4, 4)


@pytest.fixture
def make(randomise):
    def made(block: str = "adaln-zero", classes: int = 3) -> DiT:
        size = {
            "input_size": 8,
            "in_channels": 2,
            "out_channels": 2,
            "patch_size": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 2,
        }
        return randomise(DiTConfig.model_validate({**size, "classes": classes, "block": block}).build())

    return made


@pytest.fixture
def regressions(monkeypatch) -> list[int]:
    """How many rows every regression of steering vectors was asked for."""
    asked, true = [], Modulation.forward

    def counted(self, c):
        asked.append(len(c))
        return true(self, c)

    monkeypatch.setattr(Modulation, "forward", counted)
    return asked


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("block", BLOCKS)
def test_a_tabulated_network_is_the_network(make, block, regressions):
    network, label = make(block), torch.tensor([2, -1, 2, 0])
    table = PrecomputedModulation(network, TIMES, torch.tensor([2, 0, -1, -1, 2]), GRID)
    assert set(regressions) <= {9}  # all three times with all three labels, at once
    regressions.clear()
    x, t, condition = normal(4, 2, 8, 8), torch.tensor([500.25, 999.0, 0.0, 999.0]), Condition(label)
    drawn = table(x, t, condition)
    assert regressions == []
    torch.testing.assert_close(drawn, network(x, t, condition), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_network_without_classes(make):
    network = make(classes=0)
    table = PrecomputedModulation(network, TIMES, None, GRID)
    x, t = normal(3, 2, 8, 8), torch.tensor([0.0, 999.0, 500.25])
    torch.testing.assert_close(table(x, t, Condition()), network(x, t, Condition()), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("times", "labels"), [([500.0, 999.0], [0, 1]), ([1000.0, 0.0], [0, 1]), ([999.0, 0.0], [0, 2])]
)
def test_what_is_in_no_table_is_computed(make, times, labels):
    network = make()
    table = PrecomputedModulation(network, TIMES, torch.tensor([0, 1]), GRID)
    x, t, condition = normal(2, 2, 8, 8), torch.tensor(times), Condition(labels)
    assert torch.equal(table(x, t, condition), network(x, t, condition))


@torch.no_grad()
@pytest.mark.parametrize("block", BLOCKS)
def test_the_size_said_is_the_size_made(make, block):
    network = make(block)
    table = PrecomputedModulation(network, TIMES, torch.tensor([0, 1]), GRID)
    made = sum(vectors.numel() * vectors.element_size() for vectors in table.table.values())
    assert PrecomputedModulation.size(network, 3, 2) == made
