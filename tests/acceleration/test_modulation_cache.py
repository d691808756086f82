"""Precomputed modulation equals computed modulation in every block design. Unknown times and labels are computed."""

from dataclasses import replace

import pytest
import torch

from tessera.acceleration.modulation_cache import PrecomputedModulation
from tessera.conditioning import Condition
from tessera.layers.modulation import Modulation
from tessera.models.dit import DiT, DiTConfig

BLOCK_KINDS = ["in-context", "cross-attention", "adaln", "adaln-zero", "adaln-single", "rope-swiglu"]
TIMES, GRID = torch.tensor([999.0, 500.25, 0.0]), (4, 4)


@pytest.fixture
def make(randomise):
    def build(block: str = "adaln-zero", num_classes: int = 3, input_size: int | tuple[int, ...] = 8) -> DiT:
        size = {
            "input_size": input_size,
            "in_channels": 2,
            "out_channels": 2,
            "patch_size": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 2,
        }
        return randomise(DiTConfig.model_validate({**size, "num_classes": num_classes, "block": block}).build())

    return build


@pytest.fixture
def modulation_rows(monkeypatch) -> list[int]:
    """The number of rows of every call of a modulation layer."""
    rows, original = [], Modulation.forward

    def record(self, c):
        rows.append(len(c))
        return original(self, c)

    monkeypatch.setattr(Modulation, "forward", record)
    return rows


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("block", BLOCK_KINDS)
def test_precomputed_modulation_gives_the_output_of_the_network(make, block, modulation_rows):
    network, label = make(block), torch.tensor([2, -1, 2, 0])
    precomputed = PrecomputedModulation(network, TIMES, Condition(torch.tensor([2, 0, -1, -1, 2])), GRID)
    assert set(modulation_rows) <= {9}  # all three times with all three labels, at once
    modulation_rows.clear()
    x, t, condition = normal(4, 2, 8, 8), torch.tensor([500.25, 999.0, 0.0, 999.0]), Condition(label)
    output = precomputed(x, t, condition)
    assert modulation_rows == []
    torch.testing.assert_close(output, network(x, t, condition), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_every_field_of_the_context_reaches_the_blocks(make):
    """Also one that the cache does not know, here the text tokens."""
    network, seen = make(), []
    embed, run = network.embed_condition, network.run_blocks
    network.embed_condition = lambda *inputs: replace(context := embed(*inputs), text=2 * context.c)
    network.run_blocks = lambda tokens, context: seen.append(context) or run(tokens, context)
    condition = Condition([2, 0, 1])
    PrecomputedModulation(network, TIMES, condition, GRID)(normal(3, 2, 8, 8), TIMES, condition)
    assert seen[0].text.shape == (3, 1, 32)
    torch.testing.assert_close(seen[0].text, 2 * seen[0].c)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3, 4])
def test_a_clip_of_any_number_of_frames(make, frames):
    """Condition tokens are one for each frame: those of another number are computed."""
    network, x = make("cross-attention", input_size=(3, 8, 8)), normal(3, 2, frames, 8, 8)
    condition = Condition([2, 0, 1])
    precomputed = PrecomputedModulation(network, TIMES, condition, (3, *GRID))
    torch.testing.assert_close(precomputed(x, TIMES, condition), network(x, TIMES, condition), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_network_without_classes(make):
    network = make(num_classes=0)
    precomputed = PrecomputedModulation(network, TIMES, Condition(), GRID)
    x, t = normal(3, 2, 8, 8), torch.tensor([0.0, 999.0, 500.25])
    torch.testing.assert_close(precomputed(x, t, Condition()), network(x, t, Condition()), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("times", "labels"), [([500.0, 999.0], [0, 1]), ([1000.0, 0.0], [0, 1]), ([999.0, 0.0], [0, 2])]
)
def test_unknown_times_and_labels_are_computed(make, times, labels):
    network = make()
    precomputed = PrecomputedModulation(network, TIMES, Condition(torch.tensor([0, 1])), GRID)
    x, t, condition = normal(2, 2, 8, 8), torch.tensor(times), Condition(labels)
    assert torch.equal(precomputed(x, t, condition), network(x, t, condition))


@torch.no_grad()
@pytest.mark.parametrize("block", BLOCK_KINDS)
def test_table_bytes_is_the_size_of_the_table(make, block):
    network = make(block)
    precomputed = PrecomputedModulation(network, TIMES, Condition(torch.tensor([0, 1])), GRID)
    table_bytes = sum(vectors.numel() * vectors.element_size() for vectors in precomputed.table.values())
    assert PrecomputedModulation.table_bytes(network, 3, Condition([0, 1, 1])) == table_bytes
