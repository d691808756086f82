"""Blocks compiled in place draw what they drew; without a compiler nothing changes."""

import pytest
import torch

from tessera.adapters.compilation import compiled
from tessera.conditions import Condition


def test_without_a_compiler_the_reason_is_told_and_nothing_changed(tiny_model, monkeypatch):
    def broken(*_):
        raise RuntimeError("no C++ compiler\nand a long explanation")

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_: pytest.fail("compiled after all"))
    assert compiled(tiny_model.network) == "no C++ compiler"


def test_blocks_are_compiled_and_the_names_of_the_weights_stay(tiny_model, monkeypatch):
    backends = []
    true = torch.compile

    def eager(function, **more):  # all of it but the code made by a compiler, which takes a minute
        backends.append(function)
        return true(function, backend="eager")

    monkeypatch.setattr(torch, "compile", eager)
    network, names = tiny_model.network, list(tiny_model.network.state_dict())
    asked = torch.randn(2, 1, 8, 8), torch.tensor([500.0, 20.0]), Condition([0, 1])
    with torch.no_grad():
        before = network(*asked)
        assert compiled(network) is None
        torch.testing.assert_close(network(*asked), before, rtol=1e-5, atol=1e-5)
    assert len(backends) == 1 + len(network.blocks)
    assert list(network.state_dict()) == names
