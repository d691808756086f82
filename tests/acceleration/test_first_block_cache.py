"""Reuse of residuals: exact where it must be, less and less exact where it may, and the same in any batch."""

import pytest
import torch
from torch import Tensor

from tessera.acceleration.first_block_cache import CacheStats, FirstBlockCache
from tessera.conditioning import Condition
from tessera.diffusion import FlowMatchingConfig
from tessera.models.dit import DiT, DiTConfig
from tessera.sampling import SAMPLERS, FirstBlockCaching, sample_loop
from tessera.sampling.denoiser import Denoiser, GuidanceModel
from tessera.sampling.timesteps import Uniform, timestep_grid

BLOCKS = ["in-context", "cross-attention", "adaln", "adaln-zero", "adaln-single", "rope-swiglu"]
PROCESS = FlowMatchingConfig().build()
FLOWING = [kind for kind in SAMPLERS if kind != "ancestral"]


@pytest.fixture
def make(randomise):
    def made(block: str = "adaln-zero", depth: int = 3) -> DiT:
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

    return made


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def draw(network, rows: slice = slice(0, 4), sampler: str = "ddim", steps: int = 12, guide=None, **guidance) -> Tensor:
    """Rows of four drawings, each with noise of its own."""
    x, condition = normal(4, 2, 8, 8)[rows], Condition(torch.tensor([0, 1, 2, 1])[rows])
    away = None if guide is None else GuidanceModel(guide, condition.null())
    scale = 1.0 if guide is None else 3.0
    denoise = Denoiser(network, PROCESS, condition, scale, guidance_model=away, **guidance)
    drawn = iter(range(1, 1000))
    grid = timestep_grid(Uniform(), steps, PROCESS)
    *_, last = sample_loop(SAMPLERS[sampler](), denoise, x, grid, lambda: normal(4, 2, 8, 8, seed=next(drawn))[rows])
    return last.x


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("order", [0, 1])
def test_a_threshold_of_0_changes_no_bit_and_a_large_one_saves(make, block, order):
    network = make(block)
    exact, plain = FirstBlockCache(network, FirstBlockCaching(threshold=0, order=order)), draw(network)
    assert torch.equal(draw(exact), plain)
    assert exact.tally == CacheStats(asked=4 * 3 * 12, computed=4 * 3 * 12)
    rough = FirstBlockCache(network, FirstBlockCaching(threshold=1e9, order=order))
    assert error(draw(rough), plain) > 1e-6
    assert rough.tally == CacheStats(asked=4 * 3 * 12, computed=4 * 12 + 4 * 2)  # the first step, and then first blocks


@pytest.mark.parametrize("sampler", FLOWING)
@pytest.mark.parametrize("order", [0, 1])
def test_the_error_grows_with_the_threshold_and_the_work_shrinks(make, sampler, order):
    network = make()
    plain, errors, computed = draw(network, sampler=sampler, steps=30), [], []
    for threshold in (0.3, 0.5, 0.9):
        cached = FirstBlockCache(network, FirstBlockCaching(threshold=threshold, order=order))
        errors.append(error(draw(cached, sampler=sampler, steps=30), plain))
        computed.append(cached.tally.computed)
    assert computed == sorted(computed, reverse=True)
    assert computed[0] > computed[-1]
    assert errors[0] <= errors[1] + 1e-3
    assert errors[1] <= errors[2] + 1e-3
    assert errors[0] < 0.1


@pytest.mark.parametrize("block", BLOCKS)
def test_every_row_is_decided_on_by_itself(make, block):
    network = make(block)
    settings = FirstBlockCaching(threshold=0.6)
    together = FirstBlockCache(network, settings)
    all_rows, alone = draw(together), [FirstBlockCache(network, settings) for _ in range(4)]
    for row, one in enumerate(alone):
        part = slice(row, row + 1)
        torch.testing.assert_close(draw(one, part), all_rows[part], rtol=1e-4, atol=1e-4)
    assert together.tally.computed == sum(one.tally.computed for one in alone)
    assert together.tally.computed < together.tally.asked


def test_rows_that_move_are_computed_and_rows_that_stand_are_not(make):
    network = make()
    x, t, condition = normal(3, 2, 8, 8), torch.full((3,), 500.0), Condition([0, 1, 2])
    cached = FirstBlockCache(network, FirstBlockCaching(threshold=0.05))
    with torch.no_grad():
        first = cached(x, t, condition)
        assert torch.equal(first, network(x, t, condition))
        moved = torch.stack((x[0], -x[1], x[2]))
        got, expected = cached(moved, t, condition), network(moved, t, condition)
    assert cached.tally == CacheStats(asked=18, computed=9 + 3 + 2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_order_1_is_exact_on_a_line(make):
    """Where the residual of the blocks changes linearly in t, the first block nothing, what is guessed is true."""
    network = make(depth=2)

    class Line(torch.nn.Module):
        def __init__(self, slope: float) -> None:
            super().__init__()
            self.slope = slope

        def forward(self, x, context):
            return x + 0.1 + self.slope * context.c

    network.blocks = torch.nn.ModuleList([Line(0.0), Line(1.0)])
    network.t_embedder.forward = lambda t: (t / 1000)[:, None] * torch.linspace(-1, 1, 32)
    network.y_embedder.forward = lambda label: torch.zeros(len(label), 32)
    x, condition = normal(2, 2, 8, 8), Condition([0, 1])

    def at(t: float) -> Tensor:
        return torch.tensor([t, t + 50])

    with torch.no_grad():
        for order, near in ((0, False), (1, True)):
            cached = FirstBlockCache(network, FirstBlockCaching(threshold=0, order=order))
            cached(x, at(900.0), condition)
            cached(x, at(800.0), condition)
            cached.settings = FirstBlockCaching(threshold=1e9, order=order)
            got, expected = cached(x, at(650.0), condition), network(x, at(650.0), condition)
            assert (error(got, expected) < 1e-5) == near
            again = cached(x, at(800.0), condition)
            torch.testing.assert_close(again, network(x, at(800.0), condition), rtol=1e-4, atol=1e-4)


def test_a_half_of_guidance_has_a_memory_of_its_own_and_sleeps_outside_the_interval(make):
    network = make()
    told, untold = (FirstBlockCache(network, FirstBlockCaching(threshold=0.3)) for _ in range(2))
    got = draw(told, guide=untold, steps=30, guidance_interval=(0.3, 0.7))
    assert told.tally.asked == 4 * 3 * 30
    assert 4 * 3 * 10 < untold.tally.asked < 4 * 3 * 15
    assert error(got, draw(network, guide=network, steps=30, guidance_interval=(0.3, 0.7))) < 0.1


def test_a_cache_of_another_drawing_is_refused(make):
    cached = FirstBlockCache(make(), FirstBlockCaching())
    with torch.no_grad():
        cached(normal(3, 2, 8, 8), torch.full((3,), 500.0), Condition([0, 1, 2]))
        with pytest.raises(ValueError, match="a cache serves one drawing"):
            cached(normal(2, 2, 8, 8), torch.full((2,), 500.0), Condition([0, 1]))


def test_a_network_of_one_block_is_itself(make):
    network = make(depth=1)
    cached = FirstBlockCache(network, FirstBlockCaching(threshold=1e9))
    torch.testing.assert_close(draw(cached), draw(network), rtol=1e-5, atol=1e-5)
    assert cached.tally.computed == cached.tally.asked
