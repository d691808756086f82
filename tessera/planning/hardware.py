"""Rates, memory and price of devices, as a plan needs them: a small table with the source of each row.

Rates are measured ones where measurements exist, else a fraction of the data sheet; `source` states which.
"""

import os
import re
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from tessera import runtime
from tessera.errors import TesseraError
from tessera.planning.trace import Operator, Trace
from tessera.settings import Settings, unknown_name

CompileMode = Literal["off", "blocks", "whole"]
# The fractions of the traffic and of the calls of single operators that remain in compiled code. Estimates.
FUSED_BYTES, FUSED_CALLS = 0.45, 0.3
CALL_OVERHEAD = 8e-6  # seconds, of a GPU


class Hardware(Settings):
    """One or more equal devices."""

    name: str
    title: str = Field(description="display name")
    device: Literal["cpu", "cuda"]
    is_local: bool = Field(default=False, description="this machine, on which operators can be measured")
    devices: PositiveInt = 1
    memory: PositiveInt = Field(description="bytes per device")
    usable: float = Field(default=0.92, gt=0, le=1, description="fraction of the memory that tensors of a run can use")
    float32: PositiveFloat = Field(description="FLOP/s of matrix products (TF32 where available)")
    bfloat16: PositiveFloat = Field(description="FLOP/s of matrix products")
    attention_efficiency: PositiveFloat = Field(description="fraction of that rate reached in attention")
    convolution_efficiency: PositiveFloat = Field(default=0.7, description="fraction of that rate in convolutions")
    bandwidth: PositiveFloat = Field(description="bytes per second read and written")
    call_overhead: PositiveFloat = Field(description="seconds in which the host launches one operator")
    interconnect: PositiveFloat = Field(default=1e10, description="bytes per second to and from other devices")
    node_size: PositiveInt = Field(default=8, description="devices that the interconnect joins")
    network: PositiveFloat = Field(default=1e9, description="bytes per second of a device to and from other nodes")
    price: NonNegativeFloat = Field(default=0.0, description="dollars per device hour")
    source: str = Field(description="origin of the numbers")

    @property
    def usable_bytes(self) -> int:
        """Bytes per device that tensors of a run can use."""
        return int(self.memory * self.usable)

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of matrix products."""
        return self.bfloat16 if dtype in (torch.bfloat16, torch.float16) else self.float32

    def device_and_host_seconds(self, trace: Trace, compile_mode: CompileMode = "off") -> tuple[float, float]:
        """Roofline estimate: seconds of the device, the sum over operators of compute or memory time, whichever is
        longer; and seconds in which the host launches them at the same time."""
        bytes_left, calls_left = (1.0, 1.0) if compile_mode == "off" else (FUSED_BYTES, FUSED_CALLS)
        device = sum(self._operator_seconds(operator, bytes_left) * n for operator, n in trace.operators.items())
        return device, trace.calls * self.call_overhead * calls_left

    def _operator_seconds(self, operator: Operator, bytes_left: float) -> float:
        if operator.kind == "elementwise":
            return operator.bytes * bytes_left / self.bandwidth
        efficiency = {"attention": self.attention_efficiency, "convolution": self.convolution_efficiency}
        rate = self.matmul_rate(operator.dtype) * efficiency.get(operator.kind, 1.0)
        return max(operator.flops / rate, operator.bytes / self.bandwidth)


UNCONFIRMED = "not yet confirmed by a run"
# Prices are round numbers of on-demand offers in 2026; --price overrides them.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Hardware(
            name="h100",
            title="NVIDIA H100 SXM, 80 GB",
            device="cuda",
            memory=79 * 2**30,
            price=3.0,
            bfloat16=790e12,
            float32=395e12,
            attention_efficiency=0.44,
            bandwidth=2.7e12,
            call_overhead=CALL_OVERHEAD,
            interconnect=3.5e11,
            network=4.5e10,
            source="matrix rate measured (790 TFLOP/s in bfloat16, of 989 on the data sheet); attention published "
            "(FlashAttention-2: about 350 TFLOP/s); TF32 and bandwidth 80 % of the data sheet; links: 78 % of NVLink's "
            "450 GB/s, 90 % of InfiniBand NDR's 400 Gb/s; " + UNCONFIRMED,
        ),
        Hardware(
            name="h200",
            title="NVIDIA H200 SXM, 141 GB",
            device="cuda",
            memory=140 * 10**9,
            price=3.5,
            bfloat16=790e12,
            float32=395e12,
            attention_efficiency=0.44,
            bandwidth=3.8e12,
            call_overhead=CALL_OVERHEAD,
            interconnect=3.5e11,
            network=4.5e10,
            source="as the H100, which has the same processor; bandwidth 80 % of 4.8 TB/s; " + UNCONFIRMED,
        ),
        Hardware(
            name="a100",
            title="NVIDIA A100 SXM, 80 GB",
            device="cuda",
            memory=79 * 2**30,
            price=1.8,
            bfloat16=250e12,
            float32=125e12,
            attention_efficiency=0.75,
            bandwidth=1.6e12,
            call_overhead=CALL_OVERHEAD,
            interconnect=2.4e11,
            network=2.25e10,
            source="80 % of the data sheet (312 TFLOP/s in bfloat16, 156 in TF32, 2.0 TB/s); attention published "
            "(FlashAttention-2: up to 230 TFLOP/s); links: 80 % of NVLink's 300 GB/s, 90 % of InfiniBand HDR's "
            "200 Gb/s; " + UNCONFIRMED,
        ),
        Hardware(
            name="rtx4090",
            title="NVIDIA GeForce RTX 4090, 24 GB",
            device="cuda",
            memory=24 * 2**30,
            price=0.5,
            bfloat16=132e12,
            float32=66e12,
            attention_efficiency=0.7,
            bandwidth=8e11,
            call_overhead=CALL_OVERHEAD,
            interconnect=1.2e10,
            source="80 % of the data sheet (165 TFLOP/s in bfloat16, 83 in TF32, 1.0 TB/s; PCIe between GPUs); "
            + UNCONFIRMED,
        ),
    )
}


def find(name: str | None = None, price: float | None = None) -> Hardware:
    """Hardware by name: h100, h100x8 (any number), cpu or cuda for this machine; None: what this machine has.

    price: dollars per device hour. Raises TesseraError for an unknown name.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if price is not None and price < 0:
        raise TesseraError(f"--price is {price:g}; expected dollars per device hour, 0 or more")
    known = {*GPUS, "cpu", "cuda"}
    base, count = name.lower(), None
    if base not in known and (match := re.fullmatch(r"(.+)x(\d+)", base)):
        base, count = match.groups()
    if base not in known:
        raise TesseraError(f"--hardware: {unknown_name('hardware', name, known)} (h100x8: eight of them)")
    devices = 1 if count is None else int(count)
    if devices < 1:
        raise TesseraError(f"--hardware {name}: expected at least one device")
    if base == "cpu" and devices > 1:
        raise TesseraError(f"--hardware {name}: a CPU plan is for one machine; leave out x{devices}")
    hardware = GPUS[base] if base in GPUS else _this_machine(base)
    title = (f"{devices} x " if count else "") + hardware.title
    changes = {"name": name.lower(), "title": title, "devices": devices}
    return hardware.model_copy(update=changes if price is None else {**changes, "price": price})


def _this_machine(kind: str) -> Hardware:
    """Rough rates; a plan for this machine measures every operator instead."""
    device = runtime.choose_device(kind)  # raises TesseraError if there is none
    settings = {"name": kind, "device": kind, "is_local": True, "source": "rates of matrix products measured here"}
    rate = runtime.peak_flops(device)
    if kind == "cuda":
        settings |= {"title": torch.cuda.get_device_name(device), "memory": torch.cuda.mem_get_info(device)[1]}
        settings |= {"bfloat16": runtime.peak_flops(device, torch.bfloat16), "float32": rate, "bandwidth": 1e12}
        settings |= {"attention_efficiency": 0.4, "call_overhead": CALL_OVERHEAD}
    else:
        threads = torch.get_num_threads()
        settings |= {"title": f"this machine, {threads} thread{'s' * (threads > 1)}", "memory": _system_memory()}
        settings |= {"bfloat16": rate / 8, "float32": rate, "bandwidth": 1e10, "usable": 0.8}
        settings |= {"attention_efficiency": 0.6, "call_overhead": 5e-6}
    return Hardware.model_validate(settings)


def _system_memory() -> int:
    """Bytes of this machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 16 * 2**30
