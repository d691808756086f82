"""The first-block cache: exact with a threshold of 0, less exact with larger ones, and the same in any batch."""

import pytest
import torch
from torch import Tensor

from tessera.acceleration.first_block_cache import CachedResiduals, CacheStats, FirstBlockCache
from tessera.conditioning import Condition
from tessera.diffusion import FlowMatchingConfig
from tessera.models.dit import DiT, DiTConfig
from tessera.sampling import SAMPLERS, FirstBlockCaching, sample_loop
from tessera.sampling.denoiser import Denoiser, GuidanceModel
from tessera.sampling.timesteps import Uniform, timestep_grid

BLOCK_KINDS = ["in-context", "cross-attention", "adaln", "adaln-zero", "adaln-single", "rope-swiglu"]
DIFFUSION = FlowMatchingConfig().build()
FLOW_SAMPLERS = [kind for kind in SAMPLERS if kind not in ("ancestral", "jump")]


@pytest.fixture
def make(randomise):
    def build(block: str = "adaln-zero", depth: int = 3) -> DiT:
        size = {
            "input_size": 8,
            "in_channels": 2,
            "out_channels": 2,
            "num_classes": 3,
            "patch_size": 2,
            "hidden_size": 32,
            "num_heads": 2,
        }
        return randomise(DiTConfig.model_validate({**size, "depth": depth, "block": block}).build())

    return build


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(
    network, rows: slice = slice(0, 4), sampler: str = "ddim", steps: int = 12, unconditional=None, **guidance
) -> Tensor:
    """Some of four samples, each with its own noise."""
    x, condition = normal(4, 2, 8, 8)[rows], Condition(torch.tensor([0, 1, 2, 1])[rows])
    guidance_model = None if unconditional is None else GuidanceModel(unconditional, condition.null())
    scale = 1.0 if unconditional is None else 3.0
    denoise = Denoiser(network, DIFFUSION, condition, scale, guidance_model=guidance_model, **guidance)
    seeds = iter(range(1, 1000))
    grid = timestep_grid(Uniform(), steps, DIFFUSION)
    *_, last = sample_loop(SAMPLERS[sampler](), denoise, x, grid, lambda: normal(4, 2, 8, 8, seed=next(seeds))[rows])
    return last.x


class Remembered:
    """A cache with the state of its rows, called like a network."""

    def __init__(self, cache: FirstBlockCache) -> None:
        self.cache, self.state = cache, None

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        state = self.cache.empty_state(x) if self.state is None else self.state
        raw, self.state = self.cache.evaluate(x, t, condition, state)
        return raw


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("block", BLOCK_KINDS)
@pytest.mark.parametrize("order", [0, 1])
def test_a_threshold_of_0_is_exact_and_a_large_one_saves_work(make, block, order):
    network = make(block)
    exact, plain = FirstBlockCache(network, FirstBlockCaching(threshold=0, order=order)), sample(network)
    assert torch.equal(sample(exact), plain)
    assert exact.stats == CacheStats(requested=4 * 3 * 12, computed=4 * 3 * 12)
    rough = FirstBlockCache(network, FirstBlockCaching(threshold=1e9, order=order))
    assert error(sample(rough), plain) > 1e-6
    # the first step, and then first blocks
    assert rough.stats == CacheStats(requested=4 * 3 * 12, computed=4 * 12 + 4 * 2)


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
@pytest.mark.parametrize("order", [0, 1])
def test_a_larger_threshold_means_more_error_and_less_work(make, sampler, order):
    network = make()
    plain, errors, computed = sample(network, sampler=sampler, steps=30), [], []
    for threshold in (0.3, 0.5, 0.9):
        cached = FirstBlockCache(network, FirstBlockCaching(threshold=threshold, order=order))
        errors.append(error(sample(cached, sampler=sampler, steps=30), plain))
        computed.append(cached.stats.computed)
    assert computed == sorted(computed, reverse=True)
    assert computed[0] > computed[-1]
    assert errors[0] <= errors[1] + 1e-3
    assert errors[1] <= errors[2] + 1e-3
    assert errors[0] < 0.1


@pytest.mark.parametrize("block", BLOCK_KINDS)
def test_rows_are_independent(make, block):
    network = make(block)
    settings = FirstBlockCaching(threshold=0.6)
    together = FirstBlockCache(network, settings)
    all_rows, alone = sample(together), [FirstBlockCache(network, settings) for _ in range(4)]
    for row, one in enumerate(alone):
        part = slice(row, row + 1)
        torch.testing.assert_close(sample(one, part), all_rows[part], rtol=1e-4, atol=1e-4)
    assert together.stats.computed == sum(one.stats.computed for one in alone)
    assert together.stats.computed < together.stats.requested


def test_only_rows_that_change_are_computed(make):
    network = make()
    x, t, condition = normal(3, 2, 8, 8), torch.full((3,), 500.0), Condition([0, 1, 2])
    cached = FirstBlockCache(network, FirstBlockCaching(threshold=0.05))
    with torch.no_grad():
        call = Remembered(cached)
        first = call(x, t, condition)
        assert torch.equal(first, network(x, t, condition))
        moved = torch.stack((x[0], -x[1], x[2]))
        got, expected = call(moved, t, condition), network(moved, t, condition)
    assert cached.stats == CacheStats(requested=18, computed=9 + 3 + 2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_order_1_is_exact_for_a_linear_residual(make):
    """The first residual is constant, and that of the second block is linear in t."""
    network = make(depth=2)

    class Linear(torch.nn.Module):
        def __init__(self, slope: float) -> None:
            super().__init__()
            self.slope = slope

        def forward(self, x, context):
            return x + 0.1 + self.slope * context.c

    network.blocks = torch.nn.ModuleList([Linear(0.0), Linear(1.0)])
    network.t_embedder.forward = lambda t: (t / 1000)[..., None] * torch.linspace(-1, 1, 32)
    network.y_embedder.forward = lambda label: torch.zeros(len(label), 32)
    x, condition = normal(2, 2, 8, 8), Condition([0, 1])

    def at(t: float) -> Tensor:
        return torch.tensor([t, t + 50])

    with torch.no_grad():
        for order, exact in ((0, False), (1, True)):
            cached = FirstBlockCache(network, FirstBlockCaching(threshold=0, order=order))
            call = Remembered(cached)
            call(x, at(900.0), condition)
            call(x, at(800.0), condition)
            cached.settings = FirstBlockCaching(threshold=1e9, order=order)
            got, expected = call(x, at(650.0), condition), network(x, at(650.0), condition)
            assert (error(got, expected) < 1e-5) == exact
            again = call(x, at(800.0), condition)
            torch.testing.assert_close(again, network(x, at(800.0), condition), rtol=1e-4, atol=1e-4)


def test_each_half_of_guidance_has_its_own_cache(make):
    network = make()
    conditional_cache, unconditional_cache = (
        FirstBlockCache(network, FirstBlockCaching(threshold=0.3)) for _ in range(2)
    )
    got = sample(conditional_cache, unconditional=unconditional_cache, steps=30, guidance_interval=(0.3, 0.7))
    assert conditional_cache.stats.requested == 4 * 3 * 30
    assert 4 * 3 * 10 < unconditional_cache.stats.requested < 4 * 3 * 15
    assert error(got, sample(network, unconditional=network, steps=30, guidance_interval=(0.3, 0.7))) < 0.1


def test_rows_join_leave_and_change_places(make):
    """The state follows its rows: one that was reordered, joined by a new row and reduced gives the same as before."""
    network, t = make(), torch.full((3,), 500.0)
    cached = FirstBlockCache(network, FirstBlockCaching(threshold=0.9, order=1))
    x, condition = normal(3, 2, 8, 8), Condition([0, 1, 2])
    later, order = x + 0.05 * normal(3, 2, 8, 8, seed=1), torch.tensor([2, 0])
    with torch.no_grad():
        _, state = cached.evaluate(x, t, condition, cached.empty_state(x))
        expected, _ = cached.evaluate(later, t - 10, condition, state)
        new = normal(1, 2, 8, 8, seed=2)
        joined = CachedResiduals.cat([cached.empty_state(new), state[order]])
        got, _ = cached.evaluate(
            torch.cat((new, later[order])), t - 10, Condition.cat((Condition([1]), condition[order])), joined
        )
        torch.testing.assert_close(got[1:], expected[order], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[:1], network(new, t[:1] - 10, Condition([1])), rtol=1e-4, atol=1e-5)
        assert error(expected, network(later, t - 10, condition)) > 1e-6  # residuals were reused


def test_another_size_is_rejected(make):
    cached, t = FirstBlockCache(make(), FirstBlockCaching()), torch.full((3,), 500.0)
    x, condition = normal(3, 2, 8, 8), Condition([0, 1, 2])
    with torch.no_grad():
        _, state = cached.evaluate(x, t, condition, cached.empty_state(x))
        with pytest.raises(ValueError, match="a cache serves images of one size"):
            cached.evaluate(normal(3, 2, 4, 8), t, condition, state)


def test_a_network_of_one_block_is_unchanged(make):
    network = make(depth=1)
    cached = FirstBlockCache(network, FirstBlockCaching(threshold=1e9))
    torch.testing.assert_close(sample(cached), sample(network), rtol=1e-5, atol=1e-5)
    assert cached.stats.computed == cached.stats.requested
