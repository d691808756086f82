"""The table of hardware: names, and the roofline by hand."""

from collections import Counter

import pytest
import torch

from tessera.errors import TesseraError
from tessera.planning.hardware import GPUS, find
from tessera.planning.trace import Operator, TensorSpec, Trace


def test_hardware_is_found_by_name():
    assert find("h100x8").devices == 8
    assert find("RTX4090").devices == 1
    assert find("rtx4090x2").title == "2 x " + GPUS["rtx4090"].title
    assert find("a100", price=2.5).price == 2.5
    assert find("cpu").is_local
    for name, message in (("h200x", "unknown hardware"), ("h10", "did you mean 'h100'"), ("cpux2", "one machine")):
        with pytest.raises(TesseraError, match=message):
            find(name)
    with pytest.raises(TesseraError, match="--price"):
        find("h100", price=-1)
    with pytest.raises(TesseraError, match="at least one device"):
        find("h100x0")


def test_an_operator_takes_the_longer_of_compute_and_memory_time():
    gpu = GPUS["h100"].model_copy(
        update={
            "bfloat16": 1e12,
            "float32": 1e11,
            "bandwidth": 1e9,
            "attention_efficiency": 0.5,
            "call_overhead": 1e-4,
        }
    )
    spec = TensorSpec((10, 10), (10, 1), torch.bfloat16)
    product = Operator("aten.mm.default", (spec, spec), (), flops=10**9, bytes=600)
    addition = Operator("aten.add.Tensor", (spec, spec), (), flops=0, bytes=10**6)
    attention = Operator("aten._scaled_dot_product_flash_attention.default", (spec,) * 3, (), flops=10**9, bytes=1)
    trace = Trace(Counter({product: 2, addition: 3, attention: 1}))
    assert gpu.device_and_host_seconds(trace)[0] == pytest.approx(2 * 1e-3 + 3 * 1e-3 + 2e-3)
    launches = Trace(Counter({addition: 1}), views=99)
    assert gpu.device_and_host_seconds(launches) == pytest.approx((1e-3, 100 * 1e-4))  # the host takes longer
    compiled = gpu.device_and_host_seconds(Trace(Counter({addition: 10})), "blocks")
    assert compiled == pytest.approx((4.5e-3, 3e-4))
