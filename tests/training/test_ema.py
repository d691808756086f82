"""The EMA against an explicit loop, and power-function averages against the sum that defines them."""

import pytest
import torch

from tessera.power_ema import gamma
from tessera.training.ema import EMA
from tessera.training.recipe import EMAConfig, PowerEMAConfig


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, False), (0.9, True), (0.0, False), (0.5, True)])
def test_the_ema_equals_an_explicit_loop(tiny_model, decay, warmup):
    network = tiny_model.network
    network.pos_embed.requires_grad_(False)
    ema = EMA(network, EMAConfig(decay=decay, warmup=warmup))
    expected = {name: weight.detach().double().clone() for name, weight in network.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 8):
        with torch.no_grad():
            for weight in network.parameters():
                if weight.requires_grad:
                    weight += torch.randn(weight.shape, generator=generator)
        ema.update(step)
        factor = min(decay, (1 + step) / (10 + step)) if warmup else decay
        for name, weight in network.named_parameters():
            expected[name] = factor * expected[name] + (1 - factor) * weight.double()
    for name, average in ema.network.named_parameters():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_power_function_averages_are_sums_over_all_steps(tiny_model):
    network, steps = tiny_model.network, 30
    ema = EMA(network, PowerEMAConfig(lengths=(0.05, 0.2)))
    expected = {length: {name: 0 for name, _ in network.named_parameters()} for length in (0.05, 0.2)}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for weight in network.parameters():
                weight += torch.randn(weight.shape, generator=generator) if weight.requires_grad else 0
        ema.update(step)
        for length, sums in expected.items():
            part = (step / steps) ** (gamma(length) + 1) - ((step - 1) / steps) ** (gamma(length) + 1)
            for name, weight in network.named_parameters():
                sums[name] += part * weight.detach().double()
    assert ema.network is ema.networks[0.05]
    for length, sums in expected.items():
        for name, average in ema.networks[length].named_parameters():
            torch.testing.assert_close(average.double(), sums[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("warmup", [False, True])
def test_several_decays_do_not_affect_each_other(tiny_model, warmup):
    network = tiny_model.network
    together = EMA(network, EMAConfig(decay=0.9, extra_decays=(0.5, 0.99), warmup=warmup))
    alone = {decay: EMA(network, EMAConfig(decay=decay, warmup=warmup)) for decay in (0.9, 0.5, 0.99)}
    assert together.network is together.networks[0.9]
    assert set(together.networks) == {0.9, 0.5, 0.99}
    for step in range(1, 20):
        with torch.no_grad():
            for weight in network.parameters():
                weight += torch.randn_like(weight) if weight.requires_grad else 0
        for ema in (together, *alone.values()):
            ema.update(step)
    for decay, ema in alone.items():
        mine, theirs = together.networks[decay].parameters(), ema.network.parameters()
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs))


def test_the_ema_network_is_separate_and_not_trained(tiny_model):
    ema = EMA(tiny_model.network, EMAConfig())
    assert not any(weight.requires_grad for weight in ema.network.parameters())
    assert not ema.network.training
    with torch.no_grad():
        tiny_model.network.final_layer.linear.weight.add_(1)
    difference = tiny_model.network.final_layer.linear.weight - ema.network.final_layer.linear.weight
    torch.testing.assert_close(difference, torch.ones_like(difference))
