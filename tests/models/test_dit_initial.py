"""The official initial weights: a new adaLN-Zero block is the identity, a new network predicts zero."""

import math

import pytest
import torch
from torch import nn

from tessera.conditioning import Condition
from tessera.layers.positions import sincos_grid
from tessera.models.blocks import Context
from tessera.models.dit import DiT, DiTConfig

DESIGNS = ["in-context", "cross-attention", "adaln", "adaln-zero"]


def new_network(**settings) -> DiT:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"input_size": (8, 12), "depth": 2, "hidden_size": 32, "num_heads": 4, "num_classes": 5}
        return DiTConfig.model_validate({**sizes, **settings}).build()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_new_adaln_zero_block_is_exactly_the_identity():
    network = new_network(block="adaln-zero")
    x, c = normal(3, 24, 32), normal(3, 1, 32, seed=1)
    for block in network.blocks:
        assert torch.equal(block(x, Context(c=c, cond_tokens=c, grid=(4, 6))), x)


@pytest.mark.parametrize("design", ["in-context", "cross-attention", "adaln"])
def test_new_blocks_of_other_designs_are_not_the_identity(design):
    block = new_network(block=design).blocks[0]
    x, c = normal(3, 24, 32), normal(3, 1, 32, seed=1)
    assert (block(x, Context(c=c, cond_tokens=c, grid=(4, 6))) - x).abs().mean() > 0.1


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("design", DESIGNS)
def test_new_network_predicts_zero(design, classes):
    network = new_network(block=design, num_classes=classes)
    label = torch.tensor([0, 4, -1]) if classes else None
    raw = network(normal(3, 4, 8, 12), torch.tensor([0.0, 500.0, 999.0]), Condition(label))
    assert raw.shape == (3, 8, 8, 12)
    assert torch.equal(raw, torch.zeros_like(raw))


def check_xavier(weight: torch.Tensor) -> None:
    """Uniform within sqrt(6 / (fan in + fan out)) (Glorot & Bengio 2010, equation 16), of a weight matrix."""
    fan_out, fan_in = weight.shape
    bound = math.sqrt(6 / (fan_in + fan_out))
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.99 * bound
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert abs(float(weight.mean())) < 5 * bound / math.sqrt(3 * weight.numel())


def check_normal(weight: torch.Tensor, std: float) -> None:
    assert float(weight.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel()))
    assert abs(float(weight.mean())) < 5 * std / math.sqrt(weight.numel())
    assert weight.abs().max() > 3 * std  # not uniform


@pytest.mark.parametrize("design", DESIGNS)
def test_initial_weights(design):
    network = new_network(block=design, hidden_size=128, num_classes=100)
    special = {network.t_embedder.mlp[0], network.t_embedder.mlp[2], network.final_layer.linear}
    for module in (*network.blocks, network.final_layer):
        if getattr(module, "adaLN_modulation", None) is not None:
            special.add(module.adaLN_modulation[1])
            assert not module.adaLN_modulation[1].weight.any()
            assert not module.adaLN_modulation[1].bias.any()
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    assert sum(module not in special for module in linears) == 2 * (7 if design == "cross-attention" else 4)
    for module in linears:
        assert not module.bias.any()
        if module not in special:
            check_xavier(module.weight.detach())
    assert not network.final_layer.linear.weight.any()
    check_normal(network.t_embedder.mlp[0].weight.detach(), 0.02)
    check_normal(network.t_embedder.mlp[2].weight.detach(), 0.02)
    check_normal(network.y_embedder.embedding_table.weight.detach(), 0.02)


def test_patch_convolution_is_initialised_as_a_xavier_matrix():
    network = new_network(hidden_size=256, patch_size=4)
    check_xavier(network.x_embedder.proj.weight.detach().view(256, 4 * 4 * 4))
    assert not network.x_embedder.proj.bias.any()


def test_position_table_is_a_frozen_parameter_in_the_state_dict():
    network = new_network()
    assert torch.equal(network.pos_embed[0], sincos_grid((4, 6), 32))
    assert not network.pos_embed.requires_grad
    assert "pos_embed" in network.state_dict()


def test_network_can_be_built_after_one_on_the_meta_device():
    """Loading a model builds its network on the meta device; the next network must still get real positions."""
    with torch.device("meta"):
        new_network(input_size=(14, 22))
    assert torch.equal(new_network(input_size=(14, 22)).pos_embed[0], sincos_grid((7, 11), 32))
