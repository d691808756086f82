"""Devices, precision, memory."""

import platform
import subprocess
import sys

import pytest
import torch

from tessera import runtime
from tessera.errors import TesseraError


def test_the_cpu_is_always_available():
    assert runtime.choose_device("cpu") == torch.device("cpu")
    assert runtime.choose_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["tpu", "cuda:1", "mps"])
def test_an_unavailable_device_is_reported_with_the_available_ones(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(TesseraError, match=f"'{name}' is not available here; this machine has: cpu"):
        runtime.choose_device(name)


def test_auto_prefers_cuda_then_mps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert runtime.choose_device().type == "cuda"
    assert runtime.choose_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.choose_device().type == "mps"


def test_precision():
    cpu = torch.device("cpu")
    assert runtime.autocast_dtype("float32", cpu) is None
    assert runtime.autocast_dtype("auto", cpu) is None
    assert runtime.autocast_dtype("bfloat16", cpu) == torch.bfloat16
    matrix = torch.ones(2, 2)
    with runtime.autocast(None, cpu):
        assert (matrix @ matrix).dtype == torch.float32
    with runtime.autocast(torch.bfloat16, cpu):
        assert (matrix @ matrix).dtype == torch.bfloat16


def test_peak_memory_counts_bytes():
    """PyTorch alone takes tens of MB. A wrong unit would give a factor of 1000."""
    before = runtime.peak_memory(torch.device("cpu"))
    tensor = torch.ones(200_000_000 // 4)
    assert 50e6 < before < 100e9
    assert runtime.peak_memory(torch.device("cpu")) >= tensor.numel() * 4


# keep_freed_memory has an effect with glibc.
PROGRAM = """
from pathlib import Path
from tessera.runtime import keep_freed_memory

def resident():  # MiB
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024

if {enabled}:
    assert keep_freed_memory()
before = resident()
for _ in range(2):
    blocks = [bytearray(64 << 20) for _ in range(3)]  # a bytearray writes to its memory
    del blocks
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize(("enabled", "least", "most"), [(False, -10, 20), (True, 180, 215)])
def test_freed_memory_is_kept_if_enabled(enabled, least, most):
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(enabled=enabled)], capture_output=True, text=True, check=True
    )
    assert least < float(process.stdout) < most


# Large blocks with small ones between them, which stay.
FRAGMENTS = (
    PROGRAM.partition("if {enabled}")[0].replace("keep_freed_memory", "return_freed_memory")
    + """
if {enabled}:
    assert return_freed_memory()
before, small = resident(), []
for _ in range(2):
    blocks = []
    for _ in range(8):
        blocks.append(bytearray(16 << 20))
        small.append(bytearray(50_000))
    del blocks
print(resident() - before)
"""
)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize(("enabled", "least", "most"), [(False, 60, 140), (True, -10, 20)])
def test_freed_memory_is_returned_if_enabled(enabled, least, most):
    program = FRAGMENTS.format(enabled=enabled)
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert least < float(process.stdout) < most
