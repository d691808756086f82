"""This machine's own time for every operator of a computation: each is run a few times, on tensors of its sizes, and
what it took is kept for the next plan.

A step of training is a few hundred different operators, most of them called once a block: so measuring them takes
about as long as a few blocks, whatever the depth and the number of steps.
"""

import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera import runtime
from tessera.conditioning import Condition
from tessera.files import atomic_write, cache_folder
from tessera.models.dit import DiTConfig
from tessera.planning.trace import Operator, Recorder, Spec, Trace, function

LEAST, MOST = 3, 20  # times an operator is run
ENOUGH = 0.02  # seconds an operator, in the mean
IN_A_ROW, SMALL = 6, 1e-4  # times, of operators that take fewer seconds
TOGETHER = 2**29  # bytes of tensors held at once
FORMAT = 1
Progress = Callable[[int, int], None]


class OpProfiler:
    """Seconds of traces on one device of this machine, measured where they are not known yet.

    TESSERA_CACHE/machines/HOST-DEVICE-torchVERSION-THREADS.json holds what was measured.
    """

    def __init__(self, device: torch.device, folder: Path | None = None, afresh: bool = False) -> None:
        """afresh: forget what was measured before."""
        self.device = device
        name = f"{platform.node()}-{runtime.device_name(device)}-torch{torch.__version__}-{torch.get_num_threads()}"
        safe = "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in name)
        self.path = (folder or cache_folder() / "machines") / f"{safe}.json"
        self._seconds: dict[str, float] = {}
        self.missing: set[str] = set()  # operators that could not be called alone, and count as nothing
        self.date = time.strftime("%Y-%m-%d")
        if not afresh:
            self._read()
        if "call" not in self._seconds:
            self._seconds["call"] = self._overhead()
            self._write()

    def __call__(self, *traces: Trace, progress: Progress | None = None) -> list[float]:
        """Seconds of each trace, one call after another."""
        wanted = dict.fromkeys(operator for trace in traces for operator in trace.operators)
        fresh = [operator for operator in wanted if _key(operator) not in self._seconds]
        for number, group in enumerate(groups := _groups(fresh)):
            self._seconds |= self._measured(group)
            if progress is not None:
                progress(number + 1, len(groups))
        if fresh:
            self._write()
        self.missing |= {operator.name for operator in wanted if not self._seconds[_key(operator)]}
        return [self._sum(trace) for trace in traces]

    @property
    def overhead(self) -> float:
        """Seconds of one call beside its own work: the layers above it, and remembering it for the backward pass."""
        return self._seconds["call"]

    def _sum(self, trace: Trace) -> float:
        own = sum(self._seconds[_key(operator)] * count for operator, count in trace.operators.items())
        return own + trace.calls * self.overhead

    def _measured(self, group: Sequence[Operator]) -> dict[str, float]:
        """Median seconds of one call of each; 0 for what cannot be called alone.

        They take turns, as in a step, where an operator finds others' data in the caches of the processor.
        """
        calls = {_key(operator): call for operator in group if (call := self._callable(operator)) is not None}
        taken: dict[str, list[float]] = {_key(operator): [] for operator in group}
        waits = self.device.type != "cpu"
        began = time.perf_counter()
        with torch.no_grad():
            for turn in range(MOST):
                for key, call in calls.items():
                    # Small ones come several in a row in a step, too; on a GPU so that waiting for it is not counted.
                    at_once = IN_A_ROW if waits or (turn and taken[key][0] < SMALL) else 1
                    start = time.perf_counter()
                    for _ in range(at_once):
                        call()
                    if waits:
                        runtime.synchronize(self.device)
                    taken[key].append((time.perf_counter() - start) / at_once)
                if turn >= LEAST and time.perf_counter() - began > ENOUGH * len(calls):
                    break
        return {key: statistics.median(seconds[1:]) if seconds else 0.0 for key, seconds in taken.items()}

    def _callable(self, operator: Operator) -> Callable[[], Any] | None:
        """The operator on tensors of its sizes; None if it cannot be called alone."""
        call = function(operator)
        try:
            arguments = [_made(value, self.device) for value in operator.arguments]
            named = {name: _made(value, self.device) for name, value in operator.named}
            with torch.no_grad():
                call(*arguments, **named)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            return None
        return partial(call, *arguments, **named)

    def _overhead(self) -> float:
        """Seconds a call, beside its own: from a network so small that it consists of little else."""
        config = DiTConfig(
            input_size=(8, 8),
            in_channels=1,
            out_channels=1,
            num_classes=4,
            patch_size=4,
            depth=6,
            hidden_size=16,
            num_heads=2,
        )
        network = config.build().to(self.device)
        x, t = torch.rand(1, 1, 8, 8, device=self.device), torch.rand(1, device=self.device)
        condition = Condition(torch.zeros(1, dtype=torch.int64, device=self.device))

        def step() -> None:
            network(x, t, condition).square().mean().backward()

        with Recorder() as recorder:
            step()
        trace = recorder.lap()
        taken = []
        for _ in range(20):
            network.zero_grad(set_to_none=True)
            began = time.perf_counter()
            step()
            runtime.synchronize(self.device)
            taken.append(time.perf_counter() - began)
        known = self._measured(list(trace.operators))
        own = sum(known[_key(one)] * count for one, count in trace.operators.items())
        return max(0.0, statistics.median(taken) - own) / trace.calls

    def _read(self) -> None:
        try:
            told = json.loads(self.path.read_text(encoding="utf-8"))
            if told["format"] == FORMAT:
                self._seconds = {str(name): float(seconds) for name, seconds in told["seconds"].items()}
                self.date = str(told["date"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._seconds = {}  # not there, or of another time: measured again

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # a cache: without it the next plan measures again
            self.path.parent.mkdir(parents=True, exist_ok=True)
            told = {"format": FORMAT, "date": self.date, "seconds": self._seconds}
            atomic_write(self.path, json.dumps(told, indent=0))


def _groups(operators: Sequence[Operator]) -> list[list[Operator]]:
    """Operators whose tensors may be held at once."""
    groups: list[list[Operator]] = []
    held = TOGETHER
    for operator in operators:
        if (held := held + operator.bytes) > TOGETHER:
            groups.append([])
            held = operator.bytes
        groups[-1].append(operator)
    return groups


def _key(operator: Operator) -> str:
    named = " ".join(f"{name}={_words(value)}" for name, value in operator.named)
    return f"{operator.name}({', '.join(map(_words, operator.arguments))}) {named}".strip()


def _words(value: Any) -> str:
    if isinstance(value, Spec):
        short = str(value.dtype).removeprefix("torch.")
        return f"{short}{list(value.shape)}/{list(value.stride)}".replace(" ", "")
    if isinstance(value, tuple):
        return "[" + ",".join(map(_words, value)) + "]"
    return str(value)


def _made(value: Any, device: torch.device) -> Any:
    """Arguments of their sizes; floats in 0.5 .. 1, so that nothing becomes denormal, and zeros for indices."""
    if isinstance(value, tuple):
        return [_made(one, device) for one in value]
    if isinstance(value, torch.device):
        return device
    if not isinstance(value, Spec):
        return value
    extent = 1 + sum((length - 1) * step for length, step in zip(value.shape, value.stride)) if value.bytes else 0
    flat = torch.zeros(extent, dtype=value.dtype, device=device)
    if value.dtype.is_floating_point:
        flat.uniform_(0.5, 1.0)
    tensor: Tensor = flat.as_strided(value.shape, value.stride)
    return tensor
