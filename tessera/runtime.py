"""What the layers above may ask of the machine: a device, its precision, its memory, its fellow processes."""

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
_MALLOPT_TRIM_THRESHOLD, _MALLOPT_MMAP_MAX = -1, -4  # parameters of mallopt in <malloc.h>


def choose_device(name: str = "auto") -> torch.device:
    """auto takes CUDA, then Apple's MPS, then the CPU. Raises TesseraError if a named device is absent."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    kind, _, number = name.partition(":")
    if not available.get(kind, False):
        present = ", ".join(kind for kind in available if available[kind])
        raise TesseraError(f"device '{name}' is not available here; this machine has: {present}")
    if kind == "cuda" and not number and "LOCAL_RANK" in os.environ:  # torchrun: each process takes a card of its own
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The type of matrix products under autocast, or None for plain float32.

    auto means bfloat16 on GPUs that compute in it, float32 elsewhere: most CPUs emulate bfloat16 many times slower.
    """
    if precision == "float32":
        return None
    if precision == "bfloat16":
        return torch.bfloat16
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else None


def autocast(dtype: torch.dtype | None, device: torch.device) -> torch.autocast:
    """The context in which a network runs."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def device_name(device: torch.device) -> str:
    """What people call it: the card's name, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest: allocated on a GPU, resident for the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB, macOS bytes


def keep_freed_memory() -> bool:
    """From now on this process keeps memory that it frees, for itself; whether the C library could be told so (glibc).

    A step of training on a processor asks for the same large tensors as the one before. The C library gives such memory
    back to the system as soon as it is free, and the next step gets it anew, page by page and filled with zeros. The
    process stays as large as it once was, until it ends: a choice for the command that trains, not for a library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return bool(mallopt(_MALLOPT_MMAP_MAX, 0)) and bool(mallopt(_MALLOPT_TRIM_THRESHOLD, -1))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it, so that a clock reads true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@lru_cache(maxsize=4)
def peak_flops(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of a large matrix product, as measured here and now (a fraction of a second, once)."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        synchronize(device)
        began = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    if device.type == "cuda":  # as if it had never been
        del a, b
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return best


@dataclass(frozen=True)
class Distributed:
    """The processes that share a task, one of them this one; started by torchrun, or alone."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def barrier(self) -> None:
        """Until every process has come this far."""
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """What every process brings, in the order of ranks; values travel as pickles between processes of one task."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        distributed.all_gather_object(gathered, value)
        return gathered

    def broadcast(self, value: Any) -> Any:
        """What the first process says, for all."""
        return self.gather(value)[0]


SINGLE = Distributed()  # a process on its own


@contextmanager
def distributed_session(device: torch.device | None = None) -> Iterator[Distributed]:
    """Join the processes that torchrun started beside this one, if it did; one process alone needs no group.

    Small objects of the CPU are exchanged over gloo, whose patience is long: whoever is done first waits as long as the
    others draw. Tensors on a GPU, where `device` is one, go over NCCL.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        yield SINGLE
        return
    backend = "gloo"
    if device is not None and device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    rank, patience = int(os.environ["RANK"]), timedelta(days=30 if backend == "gloo" else 1)
    store, *_ = next(rendezvous("env://", timeout=patience))
    distributed.init_process_group(
        backend, timeout=patience, world_size=count, rank=rank, store=_fresh(store, rank, count)
    )
    try:
        yield Distributed(rank, count)
    finally:
        distributed.destroy_process_group()


def _fresh(store: Store, rank: int, count: int) -> Store:
    """A part of a store that nobody used before.

    torchrun keeps one store over all restarts, so that processes would look for those that died (torch 2.13). Here the
    first process thinks of a name, and tells whoever asks until all have heard it: the dead cannot answer.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"question/{rank}", name)
        name = store.get(f"answer/{name}").decode()
        store.set(f"{name}/heard/{rank}", "")
    away = set(range(1, count)) if rank == 0 else set()
    while away:
        for other in sorted(away):
            if store.check([f"question/{other}"]):
                question = store.get(f"question/{other}").decode()
                store.set(f"answer/{question}", name)
            if store.check([f"{name}/heard/{other}"]):
                away.remove(other)
        time.sleep(0.01)
    return PrefixStore(name, store)
