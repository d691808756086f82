"""Compiled, a network draws and learns what it did before; without a compiler nothing changes."""

import copy
from collections.abc import Callable

import pytest
import torch

from tessera.acceleration import compilation
from tessera.acceleration.compilation import compiled, fastest
from tessera.conditioning import Condition

ASKED = torch.ones(2, 1, 8, 8), torch.tensor([500.0, 20.0]), Condition([0, 1])


@pytest.fixture
def graphs(monkeypatch) -> list[Callable]:
    """Whatever is handed to a compiler from now on; which is none, as code takes a minute to make."""
    made, true = [], torch.compile

    def backend(graph, examples):
        made.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda function, **more: true(function, backend=backend, **more))
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["blocks", "whole"])
def test_without_a_compiler_the_reason_is_told_and_nothing_changed(how, tiny_model, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler\nand a long explanation")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: pytest.fail("compiled after all"))
    assert compiled(tiny_model.network, how) == (tiny_model.network, "no C++ compiler")


@pytest.mark.parametrize(("how", "count"), [("blocks", 1), ("whole", 1)])
def test_outputs_gradients_and_names_stay(how, count, tiny_model, graphs):
    """Blocks share what is made for the first."""
    network, names = tiny_model.network, list(tiny_model.network.state_dict())
    gradients = []
    for each in ("off", how):
        forward, reason = compiled(network, each)
        assert reason is None
        graphs.clear()  # of the probe for a compiler
        network.zero_grad(set_to_none=True)
        forward(*ASKED).square().mean().backward()
        gradients.append([held.grad for held in network.parameters() if held.requires_grad])
    assert len(graphs) == count
    assert list(network.state_dict()) == names
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_all_blocks_of_a_unet_are_compiled_each_make_once(make_model, graphs):
    """There are more makes than PyTorch compiles of one function if it is not told."""
    network = make_model({"kind": "unet", "channel_mult": (1, 2, 3), "attention_levels": (2, 4)}).network
    makes = {
        (block.halvings, block.residual.resampling, *(weight.shape for weight in block.parameters()))
        for block in network.blocks
    }
    assert len(makes) > 8
    expected = network(*ASKED)
    forward, _ = compiled(network, "blocks")
    graphs.clear()
    torch.testing.assert_close(forward(*ASKED), expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == len(makes)


def test_off_takes_the_compiled_blocks_away(tiny_model, graphs):
    network = tiny_model.network
    compiled(network, "blocks")
    assert compiled(network, "off") == (network, None)
    graphs.clear()
    with torch.no_grad():
        network(*ASKED)
    assert graphs == []


@pytest.mark.parametrize(("sizes", "count"), [("fixed", 3), ("changing", 2)])
def test_other_sizes_are_compiled_anew_or_once_for_all(sizes, count, tiny_model, graphs):
    forward, _ = compiled(tiny_model.network, "blocks", sizes)
    graphs.clear()
    x, t, _ = ASKED
    with torch.no_grad():
        for rows in (2, 3, 4):
            forward(x[:1].expand(rows, -1, -1, -1), t[:1].expand(rows), Condition([0] * rows))
    assert len(graphs) == count


def test_a_copy_of_compiled_blocks_is_not_compiled(tiny_model, graphs):
    """As the averages of a run are."""
    compiled(tiny_model.network, "blocks")
    copied = copy.deepcopy(tiny_model.network)
    graphs.clear()
    with torch.no_grad():
        copied(*ASKED)
    assert graphs == []


class Costs:
    """A clock that each way moves by what it costs; `turns` says who had it when."""

    def __init__(self, costs: dict[str, float], broken: str | None = None) -> None:
        self.now, self.costs, self.broken, self.turns = 0.0, costs, broken, []

    def run(self, network) -> Callable:
        def once(forward) -> None:
            how = "blocks" if any(block._compiled_call_impl for block in network.blocks) else "off"
            how = how if forward is network else "whole"
            if how == self.broken:
                raise RuntimeError("out of registers\nand more")
            self.now += self.costs[how]
            self.turns.append(how)
            assert all(held.grad is None for held in network.parameters())  # as in a step
            next(network.parameters()).grad = torch.zeros_like(next(network.parameters()))

        return once


@pytest.fixture
def without_compiler(monkeypatch):
    """Compiling that only wraps."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *inputs: function(*inputs))


@pytest.mark.parametrize(
    ("costs", "best", "words"),
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
def test_the_fastest_is_found_in_turns(costs, best, words, tiny_model, without_compiler, monkeypatch):
    clock = Costs(costs)
    monkeypatch.setattr(compilation.time, "perf_counter", lambda: clock.now)
    trial = fastest(tiny_model.network, clock.run(tiny_model.network), lambda: None, rounds=3)
    assert trial.best == best
    assert trial.seconds == costs
    assert str(trial) == f"compile: {words}"
    assert clock.turns[6:] == ["off", "blocks", "whole"] * 3
    assert not any(block._compiled_call_impl for block in tiny_model.network.blocks)
    assert all(held.grad is None for held in tiny_model.network.parameters())


def test_what_fails_is_passed_over(tiny_model, without_compiler, monkeypatch):
    clock = Costs({"off": 4, "blocks": 2}, broken="whole")
    monkeypatch.setattr(compilation.time, "perf_counter", lambda: clock.now)
    trial = fastest(tiny_model.network, clock.run(tiny_model.network), lambda: None)
    assert str(trial) == "compile: blocks (blocks 2.00 times as fast as off; no whole: out of registers)"
    clock = Costs({}, broken="off")
    with pytest.raises(RuntimeError, match="out of registers"):
        fastest(tiny_model.network, clock.run(tiny_model.network), lambda: None)
