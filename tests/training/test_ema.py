"""The moving average, against an explicit loop."""

import pytest
import torch

from tessera.training.ema import EMA
from tessera.training.recipe import EMAConfig


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, False), (0.9, True), (0.0, False), (0.5, True)])
def test_the_average_is_that_of_an_explicit_loop(tiny_model, decay, warmup):
    network = tiny_model.network
    network.pos_embed.requires_grad_(False)
    average = EMA(network, EMAConfig(decay=decay, warmup=warmup))
    expected = {name: weight.detach().double().clone() for name, weight in network.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 8):
        with torch.no_grad():
            for weight in network.parameters():
                if weight.requires_grad:
                    weight += torch.randn(weight.shape, generator=generator)
        average.update(step)
        share = min(decay, (1 + step) / (10 + step)) if warmup else decay
        for name, weight in network.named_parameters():
            expected[name] = share * expected[name] + (1 - share) * weight.double()
    for name, mean in average.network.named_parameters():
        torch.testing.assert_close(mean.double(), expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("warmup", [False, True])
def test_several_averages_are_each_what_it_would_be_alone(tiny_model, warmup):
    network = tiny_model.network
    together = EMA(network, EMAConfig(decay=0.9, extra_decays=(0.5, 0.99), warmup=warmup))
    alone = {decay: EMA(network, EMAConfig(decay=decay, warmup=warmup)) for decay in (0.9, 0.5, 0.99)}
    assert together.network is together.networks[0.9]
    assert set(together.others) == {0.5, 0.99}
    for step in range(1, 20):
        with torch.no_grad():
            for weight in network.parameters():
                weight += torch.randn_like(weight) if weight.requires_grad else 0
        for average in (together, *alone.values()):
            average.update(step)
    for decay, average in alone.items():
        mine, theirs = together.networks[decay].parameters(), average.network.parameters()
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs))


def test_the_average_is_a_network_of_its_own_that_is_not_trained(tiny_model):
    average = EMA(tiny_model.network, EMAConfig())
    assert not any(weight.requires_grad for weight in average.network.parameters())
    assert not average.network.training
    with torch.no_grad():
        tiny_model.network.final_layer.linear.weight.add_(1)
    difference = tiny_model.network.final_layer.linear.weight - average.network.final_layer.linear.weight
    torch.testing.assert_close(difference, torch.ones_like(difference))
