"""Measured time of every operator of a computation on this machine.

Each operator runs a few times on tensors of its sizes; the times are cached for later plans. A training step has a few
hundred different operators, most of them called once per block, so measuring takes about as long as a few blocks,
whatever the depth and the number of steps.
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

from tessera import runtime
from tessera.conditioning import Condition
from tessera.files import atomic_write, cache_folder
from tessera.models.dit import DiTConfig
from tessera.planning.trace import Operator, Recorder, TensorSpec, Trace, resolve_operator

MIN_REPEATS, MAX_REPEATS = 3, 20  # of an operator, beside one warm-up
MEAN_SECONDS = 0.02  # per operator, for all repeats
BURST, SHORT_SECONDS = 6, 1e-4  # calls in a row of operators that take less time than that
GROUP_BYTES = 2**29  # of tensors in memory at once
FORMAT = 1
Progress = Callable[[int, int], None]


class OpProfiler:
    """Seconds of traces on one device of this machine. Operators are measured where their time is not cached.

    The cache is TESSERA_CACHE/machines/HOST-DEVICE-torchVERSION-THREADS.json.
    """

    def __init__(self, device: torch.device, folder: Path | None = None, remeasure: bool = False) -> None:
        """remeasure: discard cached times."""
        self.device = device
        name = f"{platform.node()}-{runtime.device_name(device)}-torch{torch.__version__}-{torch.get_num_threads()}"
        safe_name = "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in name)
        self.path = (folder or cache_folder() / "machines") / f"{safe_name}.json"
        self.unmeasured: set[str] = set()  # operators that could not be called alone; they count as 0 s
        self.date = time.strftime("%Y-%m-%d")
        self._seconds: dict[str, float] = {}
        if not remeasure:
            self._read()
        if "call" not in self._seconds:
            self._seconds["call"] = self._measure_overhead()
            self._write()

    def __call__(self, *traces: Trace, progress: Progress | None = None) -> list[float]:
        """Seconds of each trace."""
        operators = dict.fromkeys(operator for trace in traces for operator in trace.operators)
        missing = [operator for operator in operators if _key(operator) not in self._seconds]
        for number, group in enumerate(groups := _group_by_memory(missing)):
            self._seconds |= self._measure(group)
            if progress is not None:
                progress(number + 1, len(groups))
        if missing:
            self._write()
        self.unmeasured |= {operator.name for operator in operators if not self._seconds[_key(operator)]}
        return [self._operator_seconds(trace) + trace.calls * self.overhead for trace in traces]

    @property
    def overhead(self) -> float:
        """Seconds per call beside the operator itself: dispatch, modules, and recording for the backward pass."""
        return self._seconds["call"]

    def _operator_seconds(self, trace: Trace) -> float:
        return sum(self._seconds[_key(operator)] * count for operator, count in trace.operators.items())

    def _measure(self, group: Sequence[Operator]) -> dict[str, float]:
        """Median seconds of one call of each operator; 0 for one that cannot be called alone.

        The operators take turns, because in a step each one finds the data of others in the processor's caches.
        """
        calls = {_key(operator): call for operator in group if (call := self._callable(operator)) is not None}
        times: dict[str, list[float]] = {_key(operator): [] for operator in group}
        asynchronous = self.device.type != "cpu"
        group_start = time.perf_counter()
        with torch.no_grad():
            for turn in range(MAX_REPEATS):
                for key, call in calls.items():
                    # A step calls short operators in a row, too. On a GPU this keeps the synchronization out.
                    repeats = BURST if asynchronous or (turn and times[key][0] < SHORT_SECONDS) else 1
                    start = time.perf_counter()
                    for _ in range(repeats):
                        call()
                    if asynchronous:
                        runtime.synchronize(self.device)
                    times[key].append((time.perf_counter() - start) / repeats)
                if turn >= MIN_REPEATS and time.perf_counter() - group_start > MEAN_SECONDS * len(calls):
                    break
        return {key: statistics.median(seconds[1:]) if seconds else 0.0 for key, seconds in times.items()}

    def _callable(self, operator: Operator) -> Callable[[], Any] | None:
        """The operator bound to tensors of its sizes; None if it cannot be called alone."""
        function = resolve_operator(operator)
        try:
            args = [_make_argument(value, self.device) for value in operator.args]
            kwargs = {name: _make_argument(value, self.device) for name, value in operator.kwargs}
            with torch.no_grad():
                function(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            return None
        return partial(function, *args, **kwargs)

    def _measure_overhead(self) -> float:
        """Seconds per call beside the operator, from a network so small that it has little else."""
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
        times = []
        for _ in range(20):
            network.zero_grad(set_to_none=True)
            start = time.perf_counter()
            step()
            runtime.synchronize(self.device)
            times.append(time.perf_counter() - start)
        self._seconds |= self._measure(list(trace.operators))
        return max(0.0, statistics.median(times) - self._operator_seconds(trace)) / trace.calls

    def _read(self) -> None:
        try:
            cache = json.loads(self.path.read_text(encoding="utf-8"))
            if cache["format"] == FORMAT:
                self._seconds = {str(name): float(seconds) for name, seconds in cache["seconds"].items()}
                self.date = str(cache["date"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._seconds = {}  # missing or damaged: measured again

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # without the cache the next plan measures again
            self.path.parent.mkdir(parents=True, exist_ok=True)
            cache = {"format": FORMAT, "date": self.date, "seconds": self._seconds}
            atomic_write(self.path, json.dumps(cache, indent=0))


def _group_by_memory(operators: Sequence[Operator]) -> list[list[Operator]]:
    """Groups of operators whose tensors fit in GROUP_BYTES."""
    groups: list[list[Operator]] = []
    group_bytes = GROUP_BYTES
    for operator in operators:
        group_bytes += operator.bytes
        if group_bytes > GROUP_BYTES:
            groups.append([])
            group_bytes = operator.bytes
        groups[-1].append(operator)
    return groups


def _key(operator: Operator) -> str:
    kwargs = " ".join(f"{name}={_value_key(value)}" for name, value in operator.kwargs)
    return f"{operator.name}({', '.join(map(_value_key, operator.args))}) {kwargs}".strip()


def _value_key(value: Any) -> str:
    if isinstance(value, TensorSpec):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}{list(value.shape)}/{list(value.stride)}".replace(" ", "")
    if isinstance(value, tuple):
        return "[" + ",".join(map(_value_key, value)) + "]"
    return str(value)


def _make_argument(value: Any, device: torch.device) -> Any:
    """A tensor for each spec: floats in 0.5 .. 1, so that nothing becomes denormal, and zeros for indices."""
    if isinstance(value, tuple):
        return [_make_argument(item, device) for item in value]
    if isinstance(value, torch.device):
        return device
    if not isinstance(value, TensorSpec):
        return value
    extent = 1 + sum((length - 1) * step for length, step in zip(value.shape, value.stride)) if value.bytes else 0
    flat = torch.zeros(extent, dtype=value.dtype, device=device)
    if value.dtype.is_floating_point:
        flat.uniform_(0.5, 1.0)
    return flat.as_strided(value.shape, value.stride)
