"""The table of hardware: names, and the roofline by hand."""

from collections import Counter

import pytest
import torch

from tessera.errors import TesseraError
from tessera.planning.hardware import CARDS, find
from tessera.planning.trace import Operator, Spec, Trace


def test_names():
    assert find("h100x8").devices == 8
    assert find("RTX4090").devices == 1
    assert find("rtx4090x2").title == "2 x " + CARDS["rtx4090"].title
    assert find("a100", price=2.5).price == 2.5
    assert find("cpu").here
    for name, said in (("h200x", "unknown hardware"), ("h10", "did you mean 'h100'"), ("cpux2", "one machine")):
        with pytest.raises(TesseraError, match=said):
            find(name)
    with pytest.raises(TesseraError, match="--price"):
        find("h100", price=-1)
    with pytest.raises(TesseraError, match="one device or more"):
        find("h100x0")


def test_every_card_says_where_its_numbers_come_from():
    for card in CARDS.values():
        assert "data sheet" in card.source
        assert "no run of ours" in card.source


def test_an_operator_takes_as_long_as_its_arithmetic_or_its_memory():
    card = CARDS["h100"].model_copy(
        update={"bfloat16": 1e12, "float32": 1e11, "bandwidth": 1e9, "attention": 0.5, "call": 1e-4}
    )
    half = Spec((10, 10), (10, 1), torch.bfloat16)
    product = Operator("aten.mm.default", (half, half), (), flops=10**9, bytes=600)
    addition = Operator("aten.add.Tensor", (half, half), (), flops=0, bytes=10**6)
    attention = Operator("aten._scaled_dot_product_flash_attention.default", (half,) * 3, (), flops=10**9, bytes=1)
    trace = Trace(Counter({product: 2, addition: 3, attention: 1}))
    assert card.seconds(trace) == pytest.approx(2 * 1e-3 + 3 * 1e-3 + 2e-3)
    many = Trace(Counter({addition: 1}), views=99)
    assert card.seconds(many) == pytest.approx(100 * 1e-4)  # the host is what takes longer
    assert card.seconds(trace, many) == pytest.approx(106 * 1e-4)
    assert card.seconds(Trace(Counter({addition: 10})), compiled="blocks") == pytest.approx(4.5e-3)
