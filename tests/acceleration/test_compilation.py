"""A compiled network has the same outputs and gradients. Without a compiler nothing changes."""

import copy
from collections.abc import Callable

import pytest
import torch

from tessera.acceleration import compilation
from tessera.acceleration.compilation import compile_network, time_modes
from tessera.conditioning import Condition

INPUTS = torch.ones(2, 1, 8, 8), torch.tensor([500.0, 20.0]), Condition([0, 1])


@pytest.fixture
def graphs(monkeypatch) -> list[Callable]:
    """The graphs that are compiled, with a backend that generates no code, because that takes a minute."""
    compiled_graphs, original = [], torch.compile

    def backend(graph, examples):
        compiled_graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda function, **options: original(function, backend=backend, **options))
    torch._dynamo.reset()
    yield compiled_graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["blocks", "whole"])
def test_without_a_compiler_the_reason_is_returned_and_nothing_changes(mode, tiny_model, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler\nand a long explanation")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: pytest.fail("compiled after all"))
    assert compile_network(tiny_model.network, mode) == (tiny_model.network, "no C++ compiler")


@pytest.mark.parametrize(("mode", "count"), [("blocks", 1), ("whole", 1)])
def test_outputs_gradients_and_names_stay(mode, count, tiny_model, graphs):
    """Blocks share the code of the first."""
    network, names = tiny_model.network, list(tiny_model.network.state_dict())
    gradients = []
    for each in ("off", mode):
        forward, reason = compile_network(network, each)
        assert reason is None
        graphs.clear()  # of the test for a compiler
        network.zero_grad(set_to_none=True)
        forward(*INPUTS).square().mean().backward()
        gradients.append([weight.grad for weight in network.parameters() if weight.requires_grad])
    assert len(graphs) == count
    assert list(network.state_dict()) == names
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_blocks_of_a_unet_with_the_same_shapes_are_compiled_once(make_model, graphs):
    """There are more shapes than PyTorch's default limit of recompilations of one function."""
    network = make_model({"kind": "unet", "channel_mult": (1, 2, 3), "attention_levels": (2, 4)}).network
    variants = {
        (block.level, block.residual.resampling, *(weight.shape for weight in block.parameters()))
        for block in network.blocks
    }
    assert len(variants) > 8
    expected = network(*INPUTS)
    forward, _ = compile_network(network, "blocks")
    graphs.clear()
    torch.testing.assert_close(forward(*INPUTS), expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == len(variants)


def test_off_removes_the_compiled_blocks(tiny_model, graphs):
    network = tiny_model.network
    compile_network(network, "blocks")
    assert compile_network(network, "off") == (network, None)
    graphs.clear()
    with torch.no_grad():
        network(*INPUTS)
    assert graphs == []


@pytest.mark.parametrize(("dynamic_shapes", "count"), [(False, 3), (True, 2)])
def test_dynamic_shapes_need_one_recompilation(dynamic_shapes, count, tiny_model, graphs):
    forward, _ = compile_network(tiny_model.network, "blocks", dynamic_shapes)
    graphs.clear()
    x, t, _ = INPUTS
    with torch.no_grad():
        for rows in (2, 3, 4):
            forward(x[:1].expand(rows, -1, -1, -1), t[:1].expand(rows), Condition([0] * rows))
    assert len(graphs) == count


def test_a_copy_of_compiled_blocks_is_not_compile_network(tiny_model, graphs):
    """Such as the EMA of a run."""
    compile_network(tiny_model.network, "blocks")
    copied = copy.deepcopy(tiny_model.network)
    graphs.clear()
    with torch.no_grad():
        copied(*INPUTS)
    assert graphs == []


class FakeClock:
    """A clock that each compile mode advances by its cost. `turns` records the order of the modes."""

    def __init__(self, costs: dict[str, float], broken: str | None = None) -> None:
        self.now, self.costs, self.broken, self.turns = 0.0, costs, broken, []

    def run(self, network) -> Callable:
        def once(forward) -> None:
            mode = "blocks" if any(block._compiled_call_impl for block in network.blocks) else "off"
            mode = mode if forward is network else "whole"
            if mode == self.broken:
                raise RuntimeError("out of registers\nand more")
            self.now += self.costs[mode]
            self.turns.append(mode)
            assert all(weight.grad is None for weight in network.parameters())  # as in a step
            next(network.parameters()).grad = torch.zeros_like(next(network.parameters()))

        return once


@pytest.fixture
def without_compiler(monkeypatch):
    """torch.compile that only wraps the function."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *inputs: function(*inputs))


@pytest.mark.parametrize(
    ("costs", "fastest", "text"),
    [
        (
            {"off": 4, "blocks": 2, "whole": 1},
            "whole",
            "whole (blocks 2.00 times as fast as off; whole 4.00 times as fast as off)",
        ),
        (
            {"off": 4, "blocks": 3, "whole": 5},
            "blocks",
            "blocks (blocks 1.33 times as fast as off; whole 0.80 times as fast as off)",
        ),
        (
            {"off": 4, "blocks": 5, "whole": 8},
            "off",
            "off (blocks 0.80 times as fast as off; whole 0.50 times as fast as off)",
        ),
    ],
)
def test_modes_are_timed_in_turns(costs, fastest, text, tiny_model, without_compiler, monkeypatch):
    clock = FakeClock(costs)
    monkeypatch.setattr(compilation.time, "perf_counter", lambda: clock.now)
    timings = time_modes(tiny_model.network, clock.run(tiny_model.network), lambda: None, rounds=3)
    assert timings.fastest == fastest
    assert timings.seconds == costs
    assert str(timings) == f"compile: {text}"
    assert clock.turns[6:] == ["off", "blocks", "whole"] * 3
    assert not any(block._compiled_call_impl for block in tiny_model.network.blocks)
    assert all(weight.grad is None for weight in tiny_model.network.parameters())


def test_a_mode_that_fails_is_reported(tiny_model, without_compiler, monkeypatch):
    clock = FakeClock({"off": 4, "blocks": 2}, broken="whole")
    monkeypatch.setattr(compilation.time, "perf_counter", lambda: clock.now)
    timings = time_modes(tiny_model.network, clock.run(tiny_model.network), lambda: None)
    assert str(timings) == "compile: blocks (blocks 2.00 times as fast as off; whole failed: out of registers)"
    clock = FakeClock({}, broken="off")
    with pytest.raises(RuntimeError, match="out of registers"):
        time_modes(tiny_model.network, clock.run(tiny_model.network), lambda: None)
