"""What a machine can do, as far as a plan needs it: a small table, each row of which says where its numbers come from.

Rates are what programs reach, not what data sheets promise, wherever somebody measured; `source` says which is which.
"""

import os
import re
from typing import Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from tessera import runtime
from tessera.errors import TesseraError
from tessera.planning.trace import Operator, Trace
from tessera.settings import Settings, unknown

Compiled = Literal["off", "blocks", "whole"]
# What compiling leaves: of what single operators read and write, and of their calls. An estimate, not measured.
FUSED_BYTES, FUSED_CALLS = 0.45, 0.3


class Hardware(Settings):
    """Devices of one make, and what each of them can do."""

    name: str
    title: str = Field(description="for people")
    device: Literal["cpu", "cuda"]
    here: bool = Field(default=False, description="this very machine, which can be measured operator by operator")
    devices: PositiveInt = 1
    memory: PositiveInt = Field(description="bytes of a device")
    usable: float = Field(default=0.92, gt=0, le=1, description="share of it that a run's tensors can have")
    float32: PositiveFloat = Field(description="operations a second of matrix products (TF32 where there is it)")
    bfloat16: PositiveFloat
    attention: PositiveFloat = Field(description="share of that rate which attention reaches")
    convolution: PositiveFloat = Field(default=0.7, description="share of that rate which convolutions reach")
    bandwidth: PositiveFloat = Field(description="bytes a second that are read and written")
    call: PositiveFloat = Field(description="seconds in which the host hands one operator to the device")
    interconnect: PositiveFloat = Field(default=1e10, description="bytes a second to and from the other devices")
    price: NonNegativeFloat = Field(default=0.0, description="of a device for an hour, in dollars")
    source: str

    def named(self, devices: int | None = None, price: float | None = None) -> "Hardware":
        """The same with another number of devices or another price (of a device for an hour)."""
        changes = {"devices": devices, "price": price}
        return self.model_copy(update={name: value for name, value in changes.items() if value is not None})

    @property
    def room(self) -> int:
        """Bytes of a device that a run's tensors can have."""
        return int(self.memory * self.usable)

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second of matrix products."""
        return self.bfloat16 if dtype in (torch.bfloat16, torch.float16) else self.float32

    def seconds(self, *traces: Trace, compiled: Compiled = "off") -> float:
        """An estimate: each operator takes as long as its arithmetic or its memory does, whichever is longer, and the
        whole no less than the host needs to hand all of it over."""
        return max(sum(parts) for parts in zip(*(self.work(trace, compiled) for trace in traces)))

    def work(self, trace: Trace, compiled: Compiled = "off") -> tuple[float, float]:
        """Seconds of the device, and of the host that hands it the work meanwhile."""
        bytes_left, calls_left = (1.0, 1.0) if compiled == "off" else (FUSED_BYTES, FUSED_CALLS)
        work = sum(self._work(operator, bytes_left) * count for operator, count in trace.operators.items())
        return work, trace.calls * self.call * calls_left

    def _work(self, operator: Operator, bytes_left: float) -> float:
        if operator.kind == "elementwise":
            return operator.bytes * bytes_left / self.bandwidth
        share = {"attention": self.attention, "convolution": self.convolution}.get(operator.kind, 1.0)
        return max(operator.flops / (self.rate(operator.dtype) * share), operator.bytes / self.bandwidth)


def _card(name: str, title: str, gigabytes: int, price: float, source: str, **rates: float) -> Hardware:
    return Hardware.model_validate(
        {"name": name, "title": title, "device": "cuda", "memory": gigabytes * 2**30, "price": price, "source": source}
        | {"call": 8e-6, **rates}
    )


ESTIMATED = "no run of ours has confirmed it yet"
# Prices are round numbers of on-demand offers in 2026, to be replaced by --price.
CARDS = {
    card.name: card
    for card in (
        _card(
            "h100",
            "NVIDIA H100 SXM, 80 GB",
            79,
            3.0,
            "matrix rate measured (790 TFLOP/s in bfloat16, of 989 on the data sheet); attention published "
            "(FlashAttention-2: about 350 TFLOP/s); TF32 and bandwidth four fifths of the data sheet; " + ESTIMATED,
            bfloat16=790e12,
            float32=395e12,
            attention=0.44,
            bandwidth=2.7e12,
            interconnect=3.5e11,
        ),
        _card(
            "a100",
            "NVIDIA A100 SXM, 80 GB",
            79,
            1.8,
            "four fifths of the data sheet (312 TFLOP/s in bfloat16, 156 in TF32, 2.0 TB/s); attention published "
            "(FlashAttention-2: up to 230 TFLOP/s); " + ESTIMATED,
            bfloat16=250e12,
            float32=125e12,
            attention=0.75,
            bandwidth=1.6e12,
            interconnect=2.4e11,
        ),
        _card(
            "rtx4090",
            "NVIDIA GeForce RTX 4090, 24 GB",
            24,
            0.5,
            "four fifths of the data sheet (165 TFLOP/s in bfloat16, 83 in TF32, 1.0 TB/s; PCIe between cards); "
            + ESTIMATED,
            bfloat16=132e12,
            float32=66e12,
            attention=0.7,
            bandwidth=8e11,
            interconnect=1.2e10,
        ),
    )
}


def find(name: str | None = None, price: float | None = None) -> Hardware:
    """Hardware by its name: h100, h100x8 (any number), cpu or cuda for this machine; None: what this machine has.

    price: of one device for an hour, in dollars. Raises TesseraError for a name that is not known.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if price is not None and price < 0:
        raise TesseraError(f"--price is {price:g}; expected dollars for a device and an hour, 0 or more")
    known = {*CARDS, "cpu", "cuda"}
    base, count = name.lower(), None
    if base not in known and (parts := re.fullmatch(r"(.+)x(\d+)", base)):
        base, count = parts.groups()
    if base not in known:
        raise TesseraError(f"--hardware: {unknown('hardware', name, known)} (with x8 for eight of them)")
    devices = 1 if count is None else int(count)
    if devices < 1:
        raise TesseraError(f"--hardware {name}: expected one device or more")
    if base == "cpu" and devices > 1:
        raise TesseraError(f"--hardware {name}: a plan for processors is of one machine; leave out x{devices}")
    found = CARDS[base] if base in CARDS else _this_machine(base)
    whole = found.named(devices, price)
    return whole.model_copy(update={"name": name.lower(), "title": (f"{devices} x " if count else "") + found.title})


def _this_machine(kind: str) -> Hardware:
    """Rough rates; a plan for this machine measures every operator instead."""
    device = runtime.choose_device(kind)  # raises TesseraError where there is none
    if kind == "cuda":
        facts = {"title": torch.cuda.get_device_name(device), "memory": torch.cuda.mem_get_info(device)[1]}
        rates = {"bfloat16": runtime.peak_flops(device, torch.bfloat16), "float32": runtime.peak_flops(device)}
        rates |= {"attention": 0.4, "bandwidth": 1e12, "call": 8e-6}
    else:
        threads = torch.get_num_threads()
        facts = {"title": f"this machine, {threads} thread{'s' * (threads > 1)}", "memory": _memory(), "usable": 0.8}
        rate = runtime.peak_flops(device)
        rates = {"float32": rate, "bfloat16": rate / 8, "attention": 0.6, "bandwidth": 1e10, "call": 5e-6}
    return Hardware.model_validate(
        {
            "name": kind,
            "device": kind,
            "here": True,
            "source": "rates of matrix products measured here",
            **facts,
            **rates,
        }
    )


def _memory() -> int:
    """Bytes of this machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 16 * 2**30
