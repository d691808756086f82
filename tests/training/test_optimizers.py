"""Optimizers against those of torch and against singular value decompositions; learning rates against formulas."""

import math

import pytest
import torch
from torch import nn

from tessera.layers.modulation import Modulation
from tessera.training.optimizers import (
    AdamWConfig,
    MuonAndAdamW,
    MuonConfig,
    WarmupStableDecay,
    hidden_matrices,
    learning_rate,
    orthogonalize,
    set_learning_rate,
)

# The learning rate


def test_a_constant_rate():
    assert {learning_rate(AdamWConfig(learning_rate=0.3), step, 10) for step in range(10)} == {0.3}


def test_warm_up_rises_in_equal_steps_to_the_rate():
    config = AdamWConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(config, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_ends_one_step_above_zero():
    config = AdamWConfig(learning_rate=1.0, lr_schedule="linear")
    assert [learning_rate(config, step, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("warmup", [0, 5])
def test_cosine_decay_follows_the_cosine_after_the_warm_up(warmup):
    config = AdamWConfig(learning_rate=2.0, lr_schedule="cosine", warmup_steps=warmup)
    for at in range(warmup, 25):
        expected = 1.0 + math.cos(math.pi * (at - warmup) / (25 - warmup))
        assert learning_rate(config, at, 25) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("warmup", "cooldown"), [(0, 0.2), (10, 0.25), (0, 1.0)])
def test_wsd_is_constant_and_then_decays_as_one_minus_the_root(warmup, cooldown):
    steps = 110 if warmup else 100
    config = AdamWConfig(learning_rate=2.0, warmup_steps=warmup, lr_schedule=WarmupStableDecay(cooldown=cooldown))
    cooldown_steps = round(cooldown * 100)
    for at in range(warmup, steps):
        done = max(0, at - (steps - cooldown_steps))  # steps of the cooldown
        assert learning_rate(config, at, steps) == pytest.approx(2.0 * (1 - math.sqrt(done / cooldown_steps)), abs=1e-6)
    assert config.lr_schedule.factor(1.0) == 0.0


def test_the_constant_part_of_wsd_does_not_depend_on_the_length_of_the_run():
    config = AdamWConfig(learning_rate=1.0, warmup_steps=5, lr_schedule="wsd")
    assert [learning_rate(config, at, 100) for at in range(80)] == [learning_rate(config, at, 1000) for at in range(80)]


def test_a_run_shorter_than_its_warm_up():
    config = AdamWConfig(learning_rate=1.0, lr_schedule="cosine", warmup_steps=10)
    assert [learning_rate(config, step, 3) for step in range(3)] == [0.1, 0.2, 0.3]


# AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_optimizer_is_adamw(weight_decay):
    generator = torch.Generator().manual_seed(0)
    mine = torch.nn.Linear(5, 4)
    theirs = torch.nn.Linear(5, 4)
    theirs.load_state_dict(mine.state_dict())
    config = AdamWConfig(learning_rate=0.01, betas=(0.8, 0.95), weight_decay=weight_decay)
    ours = config.build(mine)
    reference = torch.optim.AdamW(
        theirs.parameters(), lr=0.01, betas=(0.8, 0.95), weight_decay=weight_decay, fused=False, foreach=False
    )
    for _ in range(6):
        for one, other in zip(mine.parameters(), theirs.parameters()):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        ours.step()
        reference.step()
        for one, other in zip(mine.parameters(), theirs.parameters()):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


# Muon


def newton_schulz(singular: torch.Tensor, steps: int) -> torch.Tensor:
    """The effect of the iteration on singular values."""
    for _ in range(steps):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    return singular


def random_matrix(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (24, 30), (16, 64), (1, 8)])
@pytest.mark.parametrize("condition", [1, 100, 1e5])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_orthogonalization_maps_the_singular_values_by_the_polynomial(rows, columns, condition, steps):
    u, _, vh = torch.linalg.svd(random_matrix(0, 3, rows, columns), full_matrices=False)
    singular = torch.logspace(0, -math.log10(condition), rows, dtype=torch.float64).expand(3, rows)
    matrices = (u * singular[:, None]) @ vh
    expected = (u * newton_schulz(singular / singular.norm(dim=-1, keepdim=True), steps)[:, None]) @ vh
    result = orthogonalize(matrices.float(), steps)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=3e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [40, 160])
def test_five_steps_bring_singular_values_near_one(columns, dtype):
    singular = torch.linalg.svdvals(orthogonalize(random_matrix(1, 4, 32, columns).float(), 5, dtype))
    assert singular.min() > 0.6
    assert singular.max() < 1.3


def test_a_zero_gradient_gives_a_zero_update():
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 8), 5), torch.zeros(2, 4, 8))


def set_gradients(network: nn.Module, seed: int) -> None:
    for number, weight in enumerate(network.parameters()):
        weight.grad = random_matrix(100 * seed + number, *weight.shape).float() if weight.requires_grad else None


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_that_of_torch_on_each_fused_projection(tiny_model, nesterov):
    """To the precision of bfloat16, in which torch iterates. The other parameters equal AdamW exactly."""
    network = tiny_model.network.requires_grad_(True)
    config = MuonConfig(
        learning_rate=0.01, adamw_learning_rate=0.003, weight_decay=0.1, momentum=0.9, nesterov=nesterov
    )
    matrices = {network.get_parameter(name): maps for name, maps in hidden_matrices(network).items()}
    before = {weight: weight.detach().clone() for weight in network.parameters()}
    parts = {
        weight: [nn.Parameter(part.clone()) for part in before[weight].chunk(maps)] for weight, maps in matrices.items()
    }
    rest = {weight: nn.Parameter(before[weight].clone()) for weight in before if weight not in matrices}
    muon = torch.optim.Muon(
        [part for chunks in parts.values() for part in chunks],
        lr=0.01, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    adamw = torch.optim.AdamW(rest.values(), lr=0.003, weight_decay=0.1, fused=False)
    ours = config.build(network)
    for seed in range(3):
        set_gradients(network, seed)
        for weight in before:
            for part, gradient in zip(parts.get(weight, ()), weight.grad.chunk(matrices.get(weight, 1))):
                part.grad = gradient.clone()
            if weight in rest:
                rest[weight].grad = weight.grad.clone()
        for optimizer in (ours, muon, adamw):
            optimizer.step()
    for weight, reference in rest.items():
        torch.testing.assert_close(weight, reference, rtol=0, atol=1e-6)
    for weight, chunks in parts.items():
        expected, update = torch.cat(list(chunks)) - before[weight], weight - before[weight]
        assert (update - expected).norm() < 0.06 * expected.norm()


def test_the_size_of_an_update_is_that_of_adamw(tiny_model):
    """0.2 learning rates on average, for every shape (Liu et al. 2025, section 2.2)."""
    network = tiny_model.network
    matrices = [network.get_parameter(name) for name in hidden_matrices(network)]
    before = {weight: weight.detach().clone() for weight in matrices}
    optimizer = MuonConfig(learning_rate=0.01).build(network)
    set_gradients(network, 0)
    optimizer.step()
    for weight, old in before.items():
        assert (weight - old).square().mean().sqrt().item() == pytest.approx(0.002, rel=0.25)


@pytest.mark.parametrize("block", ["in-context", "cross-attention", "adaln", "adaln-zero", "rope-swiglu"])
def test_muon_trains_the_matrices_that_map_tokens_and_adamw_the_rest(make_model, block):
    network = make_model({"block": block}).network
    optimizer = MuonConfig().build(network)
    assert isinstance(optimizer, MuonAndAdamW)
    groups = [set(group["params"]) for group in optimizer.param_groups]
    assert groups[0] | groups[1] == {weight for weight in network.parameters() if weight.requires_grad}
    assert not groups[0] & groups[1]
    modulation = {id(part.linear.weight) for part in network.modules() if isinstance(part, Modulation)}
    for name, weight in network.named_parameters():
        hidden = name.startswith("blocks.") and weight.ndim == 2 and name.endswith(".weight")
        assert (weight in groups[0]) == (hidden and id(weight) not in modulation), name
    width = network.config.hidden_size
    for name, maps in hidden_matrices(network).items():
        weight = network.get_parameter(name)
        assert maps == (3 if weight.shape == (3 * width, width) else maps)
        assert weight.shape[0] % maps == 0


def test_each_parameter_group_has_its_learning_rate(tiny_model):
    config = MuonConfig(learning_rate=0.02, adamw_learning_rate=0.005, warmup_steps=10)
    optimizer = config.build(tiny_model.network)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.005]
    set_learning_rate(optimizer, learning_rate(config, 4, 100))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.0025])
    equal = MuonConfig(learning_rate=0.02).build(tiny_model.network)
    assert [group["lr"] for group in equal.param_groups] == [0.02, 0.02]
