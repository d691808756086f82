"""The machine: devices, precision, memory, and the processes of a distributed session."""

import ctypes
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from tessera.errors import TesseraError

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float32", "bfloat16"]
_MALLOPT_TRIM_THRESHOLD, _MALLOPT_MMAP_THRESHOLD, _MALLOPT_MMAP_MAX = -1, -3, -4  # parameters of mallopt in <malloc.h>


def choose_device(name: str = "auto") -> torch.device:
    """The torch device of a name. auto: CUDA, else MPS, else the CPU. Raises TesseraError if it is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    kind, _, number = name.partition(":")
    if not available.get(kind, False):
        present = ", ".join(kind for kind in available if available[kind])
        raise TesseraError(f"device '{name}' is not available here; this machine has: {present}")
    if kind == "cuda" and not number and "LOCAL_RANK" in os.environ:  # torchrun: one GPU for each process
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of matrix products, or None for plain float32.

    auto: bfloat16 on GPUs with hardware support, float32 elsewhere. Most CPUs emulate bfloat16, which is much slower.
    """
    if precision == "float32":
        return None
    if precision == "bfloat16":
        return torch.bfloat16
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else None


def autocast(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    """The autocast context of a network's forward pass."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def device_name(device: torch.device) -> str:
    """The name of the GPU model, or the type of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated on a GPU, resident set of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB, macOS bytes


def available_cpus() -> int:
    """The number of CPU cores that this process may use: TESSERA_CPUS, or those that the system allows.

    Raises TesseraError if TESSERA_CPUS is not a number.
    """
    if text := os.environ.get("TESSERA_CPUS"):
        if not text.isdecimal() or int(text) < 1:
            raise TesseraError(f"TESSERA_CPUS={text} is not valid: expected a number of CPU cores, for example 4")
        return int(text)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory in this process. Returns whether the C library supports it (glibc does).

    Each training step on a CPU allocates the same large tensors. By default glibc returns large blocks to the system
    when they are freed, and the next step pays for new pages filled with zeros. With this setting the process never
    shrinks, so a command may call this, and a library function should not.
    """
    return _mallopt({_MALLOPT_MMAP_MAX: 0, _MALLOPT_TRIM_THRESHOLD: -1})


def return_freed_memory(smallest: int = 2**22) -> bool:
    """Make malloc return each freed block of this many bytes to the system. Returns whether the C library can.

    By default glibc soon does so for the largest blocks only. Others lie between tensors that stay, such as gradients,
    and new tensors do not fit into them: with an adapter on a large network, a process then grows to several times the
    size of its tensors. Small networks have few tensors of 4 MiB, so that this costs them a tenth of their time. With
    256 KiB the process is hardly larger than its tensors, and new pages cost a quarter of the time or more.
    """
    return _mallopt({_MALLOPT_MMAP_THRESHOLD: smallest, _MALLOPT_TRIM_THRESHOLD: smallest})


def _mallopt(settings: dict[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    results = [mallopt(parameter, value) for parameter, value in settings.items()]
    return all(results)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work, for correct timings."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@lru_cache(maxsize=4)
def peak_flops(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a large matrix product, measured once in a fraction of a second."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    if device.type == "cuda":  # leave no trace in the memory statistics
        del a, b
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return best


@dataclass(frozen=True)
class Distributed:
    """This process among the processes of a task, which torchrun started; by default a single process."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints for all."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in rank order, exchanged as pickles."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        distributed.all_gather_object(gathered, value)
        return gathered

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, on every process."""
        return self.gather(value)[0]


SINGLE = Distributed()  # a single process


@contextmanager
def distributed_session(device: torch.device | None = None) -> Iterator[Distributed]:
    """Join the process group of torchrun; a single process needs none.

    CPU objects are exchanged over gloo with a long timeout, because a rank that has finished waits for the others.
    If `device` is a GPU, its tensors are exchanged over NCCL.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield SINGLE
        return
    backend = "gloo"
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    rank, timeout = int(os.environ["RANK"]), timedelta(days=30 if backend == "gloo" else 1)
    store, *_ = next(rendezvous("env://", timeout=timeout))
    distributed.init_process_group(
        backend, timeout=timeout, world_size=world_size, rank=rank, store=_new_store(store, rank, world_size)
    )
    try:
        yield Distributed(rank, world_size)
    finally:
        distributed.destroy_process_group()


def _new_store(store: Store, rank: int, world_size: int) -> Store:
    """A part of torchrun's store that no earlier attempt has used.

    torchrun keeps one store over all restarts, so new processes would wait for the keys of processes that died (torch
    2.13). Rank 0 therefore picks a random name and answers the requests of the other ranks until each has confirmed it.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"request/{rank}", name)
        name = store.get(f"reply/{name}").decode()
        store.set(f"{name}/confirmed/{rank}", "")
    missing = set(range(1, world_size)) if rank == 0 else set()
    while missing:
        for other in sorted(missing):
            if store.check([f"request/{other}"]):
                request = store.get(f"request/{other}").decode()
                store.set(f"reply/{request}", name)
            if store.check([f"{name}/confirmed/{other}"]):
                missing.remove(other)
        time.sleep(0.01)
    return PrefixStore(name, store)
