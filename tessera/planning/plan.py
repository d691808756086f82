"""Parameters, compute, memory, time and money of a training run, before it starts.

Memory is that of tensors: weights, EMA and optimizer state, and the peak of a step beside them. It is traced tensor by
tensor on fake tensors; a device needs some more of its own (about a gigabyte on a GPU). Time is measured operator by
operator on this machine, and estimated from a table of rates for other hardware.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch

from tessera.errors import TesseraError
from tessera.models.dit import DiTConfig
from tessera.models.network import DATA_DEPENDENT, NetworkConfig, parameter_count
from tessera.models.presets import PRESETS
from tessera.planning import FLOPS_PER_MAC
from tessera.planning.budget import Budget
from tessera.planning.cluster import Failures, Reliability, StepCost, StepTime, plan_failures, simulate_step
from tessera.planning.hardware import CompileMode, Hardware
from tessera.planning.op_profiler import OpProfiler, Progress
from tessera.planning.trace import StepMemory, StepTrace, Trace, meta_network
from tessera.settings import validate

Precision = Literal["float32", "bfloat16"]
Checkpointing = Literal["none", "selective", "blocks"]
MEASURED_FLOPS = 1.5e11  # of different operators: takes seconds, with enough rows for a typical rate
SHALLOW_DEPTHS = (2, 4)  # of the transformers from which a deeper one is extrapolated
MAX_MEASURED_DEPTH = 12  # a transformer up to this depth is measured whole


class TraceStep(Protocol):
    """Traces one training step of a network: (network, micro-batch size, accumulation steps, dtype, checkpointing)."""

    def __call__(
        self, network: NetworkConfig, rows: int, rounds: int, dtype: torch.dtype | None, recompute: Checkpointing, /
    ) -> StepTrace: ...


@dataclass(frozen=True)
class SamplingWork:
    """The sampling and evaluation of a run."""

    grid_images: int  # in grids of samples
    scored_images: int  # sampled for evaluations
    extracted_images: int  # through the feature extractor: the scored images, and those of the data once
    calls_per_image: int  # network evaluations of one row; guidance counts twice
    batch_size: int
    extractor_macs: float  # multiply-adds of the feature extractor per image
    num_evaluations: int


@dataclass(frozen=True)
class AdapterWork:
    """An adapter that alone is trained, on frozen weights."""

    summary: str
    base_weights: str  # their format in memory
    trained_parameters: int
    saved_bytes: int  # of the adapter and its averages in a checkpoint
    base_bytes: int  # of the frozen weights in float32, in the run's folder
    can_recompute: bool  # with activation checkpointing
    is_uniform: bool  # whether each block has the same layers, so that a deep network can be extrapolated


@dataclass(frozen=True)
class Workload:
    """The properties of a training run that decide its cost."""

    name: str
    network: NetworkConfig
    steps: int
    global_batch_size: int
    micro_batch_size: int | None
    precision: Literal["auto", "float32", "bfloat16"]
    activation_checkpointing: Checkpointing
    fsdp: int | Literal["full"]
    compile_mode: CompileMode
    trace_step: TraceStep
    trace_call: Callable[[NetworkConfig, int], Trace]  # one network evaluation in sampling, for a number of rows
    trace_encode: Callable[[int], Trace] | None  # encoding of a number of images, if training does it
    trace_decode: Callable[[int], Trace] | None
    sampling: SamplingWork
    num_checkpoints: int  # on disk at the end, and the one being written
    num_images: int | None  # in the data set; None if it could not be opened
    image_bytes: int  # of an image as pixels
    latent_bytes: int  # of an image in a latent cache; 0 without a codec
    notes: tuple[str, ...] = ()  # assumptions
    text: str = ""  # the text encoder and the captions; "" without text
    adapter: AdapterWork | None = None  # None: all weights are trained
    num_snapshots: int = 0  # of averages, from which others are computed
    num_averages: int = 1  # in each


class BatchLayout(NamedTuple):
    """The division of a batch."""

    devices: int
    micro_batch_size: int  # per device
    accumulation_steps: int
    shards: int  # devices that hold one copy of the weights together


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    weights: int
    ema: int
    optimizer: int  # its state
    gradients: int
    activations: int  # saved for the backward pass, with the batch
    peak: int  # of a step: not all of the above exist at the same time, and temporary tensors are added
    saving: int = 0  # on a CPU: copies for a checkpoint, which is written beside the next steps; part of the peak
    loading: int = 0  # before the first step: a base in float32 and in fewer bits. The former is mapped from its file


@dataclass(frozen=True)
class Alternative:
    """The cost with another precision, activation checkpointing or sharding."""

    precision: Precision
    activation_checkpointing: Checkpointing
    shards: int
    memory: Memory
    fits: bool
    step_seconds: float | None  # None: not measured


@dataclass(frozen=True)
class BudgetOutcome:
    """The part of a run that a budget pays for."""

    text: str
    steps: int
    samples: int
    flops: float
    enough: bool  # for the whole run


@dataclass(frozen=True)
class Plan:
    """The cost of a run on some hardware."""

    workload: Workload
    hardware: Hardware
    precision: Precision
    layout: BatchLayout
    parameters: int
    gmacs: float  # multiply-adds of a forward pass of one sample, in billions
    memory: Memory
    fits: bool
    step_seconds: float
    encode_seconds: float  # the part of a step in which images are encoded
    exchange_seconds: float  # of communication between devices, which overlaps with the step
    call_seconds: float  # of one network evaluation of one row in sampling
    image_seconds: float  # of sampling and decoding one image
    extract_seconds: float  # of one image in the feature extractor
    alternatives: tuple[Alternative, ...] = ()
    largest_batch: int | None = None  # micro-batch that fits on a device with the recipe's settings
    largest_model: str | None = None
    budget: BudgetOutcome | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def flops_per_step(self) -> float:
        """Training FLOPs: 6 x multiply-adds x batch size. Recomputed activations count once."""
        return FLOPS_PER_MAC * self.gmacs * 1e9 * self.workload.global_batch_size

    @property
    def flops(self) -> float:
        """Training FLOPs of the run."""
        return self.flops_per_step * self.workload.steps

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training, without evaluation, sampling and saving."""
        return self.step_seconds * self.workload.steps

    @property
    def evaluation_seconds(self) -> float:
        """Seconds of sample grids and evaluations."""
        sampling = self.workload.sampling
        sample_seconds = (sampling.grid_images + sampling.scored_images) * self.image_seconds
        return sample_seconds + sampling.extracted_images * self.extract_seconds

    @property
    def total_seconds(self) -> float:
        return self.seconds + self.evaluation_seconds

    @property
    def images_per_second(self) -> float:
        return self.workload.global_batch_size / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: the fraction of the devices' matrix product rate."""
        rate = self.hardware.matmul_rate(_dtype(self.precision) or torch.float32)
        return self.flops_per_step / self.step_seconds / (rate * self.hardware.devices)

    @property
    def device_hours(self) -> float:
        return self.total_seconds * self.hardware.devices / 3600

    @property
    def cost(self) -> float:
        """Dollars."""
        return self.device_hours * self.hardware.price

    @property
    def memory_bytes(self) -> int:
        """Peak of one device."""
        return self.memory.peak

    @property
    def trained_parameters(self) -> int:
        adapter = self.workload.adapter
        return self.parameters if adapter is None else adapter.trained_parameters

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint: EMA, weights and optimizer state; only those of an adapter, if that is trained."""
        optimizer = self.memory.optimizer * self.layout.shards
        if self.workload.adapter is not None:
            return self.workload.adapter.saved_bytes + optimizer
        return (self.memory.weights + self.memory.ema) * self.layout.shards + optimizer

    @property
    def disk_bytes(self) -> int:
        """Bytes of all checkpoints that are on disk at the same time, of the base of an adapter, and of snapshots of
        the EMA."""
        work = self.workload
        checkpoints = self.checkpoint_bytes * work.num_checkpoints
        return checkpoints + (work.adapter.base_bytes if work.adapter else 0) + work.num_snapshots * self.snapshot_bytes

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of one snapshot of the EMA: each of its averages in float32."""
        return 4 * self.trained_parameters * self.workload.num_averages

    @property
    def latents_bytes(self) -> int | None:
        """Bytes of a latent cache; None if the data could not be opened."""
        return None if self.workload.num_images is None else self.workload.num_images * self.workload.latent_bytes

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON. Bytes are per device, seconds wall-clock, cost in dollars."""
        workload = self.workload
        return {
            "name": workload.name,
            "network": workload.network.model_dump(mode="json"),
            "hardware": self.hardware.model_dump(mode="json"),
            **{name: getattr(workload, name) for name in _WORKLOAD_KEYS},
            **{name: getattr(self, name) for name in _PLAN_KEYS},
            "flops_per_sample": FLOPS_PER_MAC * self.gmacs * 1e9,
            "pixels_bytes": None if workload.num_images is None else workload.num_images * workload.image_bytes,
            "layout": self.layout._asdict(),
            "memory": asdict(self.memory),
            "adapter": None if workload.adapter is None else asdict(workload.adapter),
            "alternatives": [asdict(alternative) for alternative in self.alternatives],
            "budget": None if self.budget is None else asdict(self.budget),
            "notes": list(self.notes),
        }


_WORKLOAD_KEYS = ("steps", "global_batch_size", "activation_checkpointing", "num_images", "text")
_PLAN_KEYS = (
    "parameters", "trained_parameters", "gmacs", "precision", "flops_per_step", "flops", "fits",
    "largest_batch", "largest_model",
    "step_seconds", "images_per_second", "mfu", "seconds", "evaluation_seconds", "device_hours", "cost",
    "checkpoint_bytes", "disk_bytes", "latents_bytes",
)  # fmt: skip


def budget_outcome(plan: Plan, budget: Budget) -> BudgetOutcome:
    """The number of steps that a budget pays for, after sampling and evaluation are paid."""
    seconds = budget.seconds(plan.hardware.devices, plan.hardware.price)
    if seconds is None:
        exact_steps = budget.amount / plan.flops_per_step
    else:
        exact_steps = max(0.0, seconds - plan.evaluation_seconds) / plan.step_seconds
    steps = int(exact_steps + 1e-9)
    samples = steps * plan.workload.global_batch_size
    return BudgetOutcome(budget.text, steps, samples, steps * plan.flops_per_step, steps >= plan.workload.steps)


def plan(
    workload: Workload,
    hardware: Hardware,
    *,
    budget: Budget | None = None,
    alternatives: bool = True,
    profiler: OpProfiler | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Plan a workload on some hardware.

    alternatives: also plan other precisions, activation checkpointing and sharding, and find the largest batch and
    preset that fit. profiler: measures operators if the hardware is this machine. Raises TesseraError if the batch
    cannot be divided among the devices.
    """
    planner = _Planner(workload, hardware, profiler, progress)
    layout = divide_batch(workload, hardware.devices)
    precision: Precision = "bfloat16" if hardware.device == "cuda" else "float32"
    if workload.precision != "auto":
        precision = workload.precision
    checkpointing, sampling, notes = workload.activation_checkpointing, workload.sampling, workload.notes
    macs, parameters = count_macs_and_parameters(workload.network)
    memory = planner.memory(workload.network, layout, precision, checkpointing)
    step_seconds = planner.step_seconds(layout, precision, checkpointing)
    encode_seconds = decode_seconds = 0.0
    if workload.trace_encode is not None:
        rows = max(1, min(layout.micro_batch_size, 8))
        encode_seconds = max(planner.seconds(workload.trace_encode(rows))) / rows
        encode_seconds *= layout.micro_batch_size * layout.accumulation_steps
    if workload.trace_decode is not None:
        decode_seconds = max(planner.seconds(workload.trace_decode(4))) / 4
    exchange_seconds = planner.exchange_seconds(layout, precision, checkpointing)
    total_images = sampling.grid_images + sampling.scored_images
    rows = max(1, min(sampling.batch_size, total_images, int(MEASURED_FLOPS / (2 * macs))))
    call_seconds = max(planner.extrapolate_seconds(lambda config: planner.seconds(workload.trace_call(config, rows))))
    call_seconds /= rows
    if planner.profiler is not None:
        source = f"measured here, operator by operator, since {planner.profiler.date} (--measure measures again)"
        hardware = hardware.model_copy(update={"source": source})
        if planner.profiler.unmeasured:
            names = ", ".join(sorted(planner.profiler.unmeasured))
            notes = (*notes, f"these operators could not be measured and count as 0 s: {names}")
    result = Plan(
        workload=workload,
        hardware=hardware,
        precision=precision,
        layout=layout,
        parameters=parameters,
        gmacs=macs / 1e9,
        memory=memory,
        fits=memory.peak <= hardware.usable_bytes,
        step_seconds=max(step_seconds + encode_seconds, exchange_seconds),
        encode_seconds=encode_seconds,
        exchange_seconds=exchange_seconds,
        call_seconds=call_seconds,
        image_seconds=call_seconds * sampling.calls_per_image + decode_seconds,
        extract_seconds=2 * sampling.extractor_macs / (0.5 * hardware.matmul_rate(torch.float32)),
        notes=notes,
    )
    if alternatives:
        result = replace(
            result,
            alternatives=tuple(planner.alternatives(result)),
            largest_batch=planner.largest_batch(result),
            largest_model=planner.largest_model(result),
        )
    return result if budget is None else replace(result, budget=budget_outcome(result, budget))


@dataclass(frozen=True)
class ScalingRow:
    """A simulated step on a number of devices."""

    scaling: Literal["strong", "weak"]  # strong: the recipe's global batch; weak: its samples per device
    devices: int
    shards: int
    global_batch_size: int
    step: StepTime
    memory: Memory
    fits: bool
    failures: Failures
    read_rate: float  # bytes per second of data, of all devices together

    @property
    def images_per_second(self) -> float:
        """With the time that failures and checkpoints cost."""
        return self.global_batch_size / self.step.total * (1 - self.failures.loss)


def simulate(planned: Plan, counts: Sequence[int], reliability: Reliability | None = None) -> list[ScalingRow]:
    """Simulate the run of a plan on other numbers of its devices, fully sharded, sharded inside nodes and replicated.

    Strong scaling keeps the global batch, while each device has a sample; weak scaling keeps the samples per device.
    Raises TesseraError for this machine, whose links are not known.
    """
    workload, hardware = planned.workload, planned.hardware
    if hardware.is_local:
        raise TesseraError("--gpus simulates a cluster of a known GPU: give --hardware h100, h200, a100 or rtx4090")
    reliability = reliability or Reliability()
    planner = _Planner(workload, hardware, None, None)
    sample_bytes = workload.latent_bytes or workload.image_bytes
    if workload.latent_bytes and planned.encode_seconds:
        sample_bytes = workload.image_bytes
    per_device, rows = -(-workload.global_batch_size // hardware.devices), []
    for scaling in ("strong", "weak"):
        for devices in sorted(set(counts)):
            batch = workload.global_batch_size if scaling == "strong" else per_device * devices
            if batch < devices:
                continue  # some would have no samples
            for shards in sorted({1, min(hardware.node_size, devices), devices}):
                if devices % shards:
                    continue
                layout = divide_batch(replace(workload, global_batch_size=batch, fsdp=shards), devices)
                cost = planner.step_cost(layout, planned.precision, planned.encode_seconds / per_device)
                step = simulate_step(cost, hardware, devices, shards)
                memory = planner.memory(workload.network, layout, planned.precision, workload.activation_checkpointing)
                failures = plan_failures(planned.checkpoint_bytes, devices, shards, reliability)
                fits = memory.peak <= hardware.usable_bytes
                read_rate = sample_bytes * batch / step.total
                rows.append(ScalingRow(scaling, devices, shards, batch, step, memory, fits, failures, read_rate))
    return rows


def divide_batch(workload: Workload, devices: int) -> BatchLayout:
    """Divide the batch among devices and accumulation steps as training does. Raises TesseraError if impossible."""
    per_device = -(-workload.global_batch_size // devices)
    accumulation_steps = -(-per_device // min(workload.micro_batch_size or per_device, per_device))
    if workload.global_batch_size // devices < accumulation_steps:
        raise TesseraError(
            f"training.global_batch_size {workload.global_batch_size} is too small for {devices} devices: some would "
            "have no samples; choose a larger batch or fewer devices"
        )
    shards = devices if workload.fsdp == "full" else 1 if devices == 1 else workload.fsdp
    if devices % shards:
        raise TesseraError(
            f"training.fsdp is {workload.fsdp}, but {devices} devices cannot be divided into groups of {shards}: "
            "choose a divisor, or all"
        )
    return BatchLayout(devices, -(-per_device // accumulation_steps), accumulation_steps, shards)


def count_macs_and_parameters(config: NetworkConfig) -> tuple[int, int]:
    """Multiply-adds of a forward pass of one sample, and parameters."""
    network = meta_network(config)
    return network.macs(), parameter_count(network)


def device_memory(step: StepMemory, shards: int, blocks: int, saving: int = 0, loading: int = 0) -> Memory:
    """The memory of one device if weights, EMA, optimizer state and gradients are divided into shards.

    FSDP gathers the weights of a block before they are used, and those of the next block at the same time.
    saving, loading: bytes of a checkpoint beside a step, and before the first step.
    """
    weights, ema, optimizer = step.weights // shards, step.ema // shards, step.optimizer // shards
    gradients = step.gradients // shards
    gathered = 0 if shards == 1 else 2 * step.weights // blocks
    temporary = max(step.activations, step.peak - step.gradients + gradients)
    peak = weights + ema + optimizer + temporary + gathered + saving
    return Memory(weights, ema, optimizer, gradients, step.activations, peak, saving, loading)


def _dtype(precision: Precision) -> torch.dtype | None:
    """Of autocast."""
    return torch.bfloat16 if precision == "bfloat16" else None


class _Planner:
    """Memory and seconds of a workload on some hardware. Traces are cached: several parts of a plan use them."""

    def __init__(
        self, workload: Workload, hardware: Hardware, profiler: OpProfiler | None, progress: Progress | None
    ) -> None:
        self.workload, self.hardware, self.progress = workload, hardware, progress
        self.profiler = (profiler or OpProfiler(torch.device(hardware.device))) if hardware.is_local else None
        self._traces: dict[tuple[Any, ...], StepTrace] = {}

    def trace(self, network: NetworkConfig, *step: Any) -> StepTrace:
        """The trace of a step; see `TraceStep`."""
        key = (network.model_dump_json(), *step)
        if key not in self._traces:
            self._traces[key] = self.workload.trace_step(network, *step)
        return self._traces[key]

    def seconds(self, trace: Trace) -> tuple[float, float]:
        """Seconds of the device, and of the host at the same time. A measurement includes both in the first."""
        if self.profiler is not None:
            return self.profiler(trace, progress=self.progress)[0], 0.0
        return self.hardware.device_and_host_seconds(trace, self.workload.compile_mode)

    def step_memory(
        self, network: NetworkConfig, layout: BatchLayout, precision: Precision, checkpointing: Checkpointing
    ) -> StepMemory:
        # The second micro-batch is the first one beside which gradients exist.
        step = layout.micro_batch_size, min(layout.accumulation_steps, 2), _dtype(precision), checkpointing
        values = self._extrapolate(network, lambda config: self.trace(config, *step).memory, SHALLOW_DEPTHS[1])
        return StepMemory(*map(round, values))

    def memory(
        self, network: NetworkConfig, layout: BatchLayout, precision: Precision, checkpointing: Checkpointing
    ) -> Memory:
        step, adapter = self.step_memory(network, layout, precision, checkpointing), self.workload.adapter
        loading = saving = 0
        if self.hardware.device == "cpu":  # of a GPU, the copies are in the memory of the host
            trained = step.weights if adapter is None else step.gradients
            saving = 2 * (trained + step.optimizer) + step.ema - step.shared  # the state is serialized in memory
        if adapter is not None and adapter.base_weights != "float32":
            loading = 4 * parameter_count(meta_network(network)) + step.weights
        if layout.devices == 1:
            step = step._replace(ema=step.ema - step.shared)
        return device_memory(step, layout.shards, len(meta_network(network).blocks), saving, loading)

    def extrapolate_seconds(self, measure: Callable[[NetworkConfig], tuple[float, ...]]) -> tuple[float, ...]:
        max_depth = SHALLOW_DEPTHS[1] if self.profiler is None else MAX_MEASURED_DEPTH
        return self._extrapolate(self.workload.network, measure, max_depth)

    def _extrapolate(
        self, network: NetworkConfig, measure: Callable[[NetworkConfig], tuple[float, ...]], max_depth: int
    ) -> tuple[float, ...]:
        """Values that grow linearly with the number of blocks. For a transformer deeper than `max_depth` they are
        extrapolated from two shallow ones, unless an adapter changes some of the blocks only."""
        adapter = self.workload.adapter
        is_uniform = adapter is None or adapter.is_uniform
        if not isinstance(network, DiTConfig) or not is_uniform or network.depth <= max_depth:
            return measure(network)
        less, more = SHALLOW_DEPTHS
        low, high = (measure(network.model_copy(update={"depth": depth})) for depth in SHALLOW_DEPTHS)
        return tuple(a + (b - a) / (more - less) * (network.depth - less) for a, b in zip(low, high))

    def step_seconds(self, layout: BatchLayout, precision: Precision, checkpointing: Checkpointing) -> float:
        """Seconds of forward and backward passes of all micro-batches, and of the update."""

        def measure(config: NetworkConfig) -> tuple[float, ...]:
            rows = layout.micro_batch_size
            step = self.trace(config, rows, 1, _dtype(precision), checkpointing)
            if self.profiler is not None:
                # Each different operator is measured once, on a part of the rows if it is expensive.
                flops = sum(operator.flops for part in (step.forward, step.backward) for operator in part.operators)
                if flops > MEASURED_FLOPS and rows > 1:
                    rows = max(1, int(rows * MEASURED_FLOPS / flops))
                    step = self.trace(config, rows, 1, _dtype(precision), checkpointing)
            repeats = layout.accumulation_steps * layout.micro_batch_size / rows
            phases = (self.seconds(part) for part in (step.forward, step.backward, step.update))
            return tuple((forward + back) * repeats + update / layout.shards for forward, back, update in zip(*phases))

        return max(self.extrapolate_seconds(measure))

    def step_cost(self, layout: BatchLayout, precision: Precision, encode_seconds: float) -> StepCost:
        """The parts of a step for a simulation. encode_seconds: per sample. Blocks of a transformer and the rest
        are separated by two depths; in other networks everything is in blocks of equal cost."""
        network, checkpointing = self.workload.network, self.workload.activation_checkpointing
        num_blocks, blocks = len(meta_network(network).blocks), meta_network(network).blocks

        def phases(config: NetworkConfig) -> list[float]:
            step = self.trace(config, layout.micro_batch_size, 1, _dtype(precision), checkpointing)
            return [max(self.seconds(part)) for part in (step.forward, step.backward, step.update)]

        update = self._extrapolate(network, lambda config: tuple(phases(config)), SHALLOW_DEPTHS[1])[2]
        adapter = self.workload.adapter
        if isinstance(network, DiTConfig) and (adapter is None or adapter.is_uniform):
            less, more = SHALLOW_DEPTHS
            low, high = (phases(network.model_copy(update={"depth": depth})) for depth in SHALLOW_DEPTHS)
            forward, backward = ((b - a) / (more - less) for a, b in zip(low[:2], high[:2]))
            rest = [max(a - less * block, 0.0) for a, block in zip(low[:2], (forward, backward))]
        else:
            total = phases(network)
            (forward, backward), rest = (seconds / num_blocks for seconds in total[:2]), [0.0, 0.0]
        weights = self.step_memory(network, layout, precision, checkpointing).weights
        block_bytes = weights / parameter_count(meta_network(network)) * parameter_count(blocks) / num_blocks
        return StepCost(
            num_blocks=num_blocks,
            block_forward=forward,
            block_backward=backward,
            rest_forward=rest[0] + encode_seconds * layout.micro_batch_size,
            rest_backward=rest[1],
            update=update,
            block_bytes=block_bytes,
            rest_bytes=weights - num_blocks * block_bytes,
            accumulation_steps=layout.accumulation_steps,
        )

    def exchange_seconds(self, layout: BatchLayout, precision: Precision, checkpointing: Checkpointing) -> float:
        """Seconds of the all-reduce of gradients, and of gathering sharded weights twice per micro-batch."""
        if layout.devices == 1:
            return 0.0
        step = self.step_memory(self.workload.network, layout, precision, checkpointing)
        reduced = 2 * (layout.devices - 1) / layout.devices * step.gradients / layout.shards
        gathered = (layout.shards - 1) / layout.shards * step.weights * (2 * layout.accumulation_steps + 1)
        return (reduced + gathered) / self.hardware.interconnect

    def alternatives(self, plan: Plan) -> Iterator[Alternative]:
        current = (plan.precision, self.workload.activation_checkpointing, plan.layout.shards)
        adapter = self.workload.adapter
        modes: tuple[Checkpointing, ...] = get_args(Checkpointing)
        if adapter is not None and not adapter.can_recompute:
            modes = ("none",)
        for precision in get_args(Precision):
            for checkpointing in modes:
                seconds = None
                if self.profiler is None:  # measuring all of them would take too long
                    seconds = self.step_seconds(plan.layout, precision, checkpointing)
                for shards in sorted({1, plan.layout.shards, self.hardware.devices}):
                    layout = plan.layout._replace(shards=shards)
                    memory = self.memory(self.workload.network, layout, precision, checkpointing)
                    step_seconds = None
                    if (precision, checkpointing, shards) == current:
                        step_seconds = plan.step_seconds
                    elif seconds is not None:
                        exchange_seconds = self.exchange_seconds(layout, precision, checkpointing)
                        step_seconds = max(seconds + plan.encode_seconds, exchange_seconds)
                    fits = memory.peak <= self.hardware.usable_bytes
                    yield Alternative(precision, checkpointing, shards, memory, fits, step_seconds)

    def largest_batch(self, plan: Plan) -> int:
        """The largest micro-batch that fits on a device; 0 if none does. Memory is linear in the batch size."""
        rows = max(2, plan.layout.micro_batch_size)
        network, checkpointing = self.workload.network, self.workload.activation_checkpointing
        one, two = (
            self.memory(network, plan.layout._replace(micro_batch_size=size), plan.precision, checkpointing).peak
            for size in (rows, 2 * rows)
        )
        return max(0, int(rows + (self.hardware.usable_bytes - one) * rows / (two - one)))

    def largest_model(self, plan: Plan) -> str | None:
        """The preset with the most multiply-adds that fits, with the inputs and the block of the recipe's network."""
        network, checkpointing = self.workload.network, self.workload.activation_checkpointing
        settings = {name: getattr(network, name) for name in (*DATA_DEPENDENT, "learn_null_class")}
        if isinstance(network, DiTConfig):
            settings["block"] = network.block.model_dump()
        candidates = []
        for name, sizes in PRESETS.items():
            with contextlib.suppress(TesseraError):  # a patch size that does not divide the input
                config = validate(DiTConfig, {**settings, **sizes}, name)
                macs, _ = count_macs_and_parameters(config.model_copy(update={"depth": 1}))
                candidates.append((macs * config.depth, name, config))
        memory = plan.memory
        bytes_per_parameter = (memory.weights + memory.ema + memory.optimizer + memory.gradients) / plan.parameters
        for _, name, config in sorted(candidates, key=lambda candidate: candidate[0], reverse=True):
            if bytes_per_parameter * count_macs_and_parameters(config)[1] > self.hardware.usable_bytes:
                continue  # needs no trace
            if self.memory(config, plan.layout, plan.precision, checkpointing).peak <= self.hardware.usable_bytes:
                return name
        return None
