"""Parameters, compute, memory, time and money of a training run, before it begins.

Memory is that of tensors: what weights, averages and the optimizer hold from step to step, and at its highest what a
step makes beside them. It is followed exactly, tensor by tensor, on tensors without contents; a device needs some more
for its own (about a gigabyte on a GPU). Time is measured operator by operator on this machine, and estimated from a
table of rates elsewhere.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch

from tessera.errors import TesseraError
from tessera.models.dit import DiTConfig
from tessera.models.network import DATA_DEPENDENT, NetworkConfig, parameter_count
from tessera.models.presets import PRESETS
from tessera.planning.budget import Budget
from tessera.planning.hardware import Compiled, Hardware
from tessera.planning.op_profiler import OpProfiler, Progress
from tessera.planning.trace import Sizes, Step, Trace, outline
from tessera.settings import validate

Precision = Literal["float32", "bfloat16"]
Recompute = Literal["none", "selective", "blocks"]
FLOPS_PER_MAC = 6  # of training: a multiply-add is two, forward and backward three
AT_ONCE = 1.5e11  # operations of different operators that are measured: seconds, and enough rows for a usual rate
MEASURED_WHOLE = 12  # blocks of a transformer that is not told from shallow ones where it is measured
SHALLOW = (2, 4)  # blocks, from which a deep transformer of equal ones is told


class Recording(Protocol):
    """One step of training a network, on tensors without contents: so many rounds of so many rows."""

    def __call__(
        self, network: NetworkConfig, rows: int, rounds: int, dtype: torch.dtype | None, recompute: Recompute
    ) -> Step: ...


@dataclass(frozen=True)
class SamplingWork:
    """What a run draws and looks at beside learning."""

    grids: int  # pictures in grids of samples
    scored: int  # pictures drawn to be scored
    looked_at: int  # pictures that a judge looks at: those, and the data's once
    calls: int  # of the network, one picture each, for one picture: guidance counts twice
    batch: int  # pictures drawn at once
    judge: float  # multiply-adds of the judge for one picture
    evaluations: int


@dataclass(frozen=True)
class Workload:
    """A training run as far as its cost depends on it."""

    name: str
    network: NetworkConfig
    steps: int
    batch: int
    micro_batch: int | None
    precision: Literal["auto", "float32", "bfloat16"]
    recompute: Recompute
    shard: int | Literal["all"]
    compiled: Compiled
    step: Recording
    call: Callable[[NetworkConfig, int], Trace]  # one call of the network on so many rows, as in drawing
    encode: Callable[[int], Trace] | None  # of so many pictures by the codec, where training does so
    decode: Callable[[int], Trace] | None
    drawing: SamplingWork
    checkpoints: int  # on disk at the end, and the one being written
    images: int | None  # of the data, where it can be opened
    image_bytes: int  # of one of them, as pixels
    latent_bytes: int  # of one of them in a cache; 0: there is no codec
    notes: tuple[str, ...] = ()  # what had to be assumed


class Split(NamedTuple):
    """How a batch is divided."""

    devices: int  # that take part
    rows: int  # of a device, at once
    rounds: int
    shards: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    weights: int
    averages: int
    moments: int
    gradients: int
    activations: int  # kept for the backward pass, with the batch
    at_most: int  # at the highest moment of a step: not all of the above live at once, and passing tensors join them


@dataclass(frozen=True)
class Alternative:
    """What another precision, recomputation or sharding would need."""

    precision: Precision
    recompute: Recompute
    shards: int
    memory: Memory
    fits: bool
    step_seconds: float | None  # None: not measured


@dataclass(frozen=True)
class Plan:
    """What a run takes on some hardware."""

    work: Workload
    hardware: Hardware
    precision: Precision
    split: Split
    parameters: int
    gmacs: float  # multiply-adds of a forward pass of one sample, in billions
    memory: Memory
    fits: bool
    step_seconds: float
    encode_seconds: float  # of a step's, where pictures are encoded while training
    exchange_seconds: float  # in which gradients and weights travel, beside the step's own work
    call_seconds: float  # of the network for one picture, in drawing
    picture_seconds: float  # of a picture, drawn and decoded
    look_seconds: float  # of a picture, by the judge
    choices: tuple[Alternative, ...] = ()
    largest_batch: int | None = None  # samples of a device at once, with the recipe's choices
    largest_model: str | None = None
    budget: "BudgetOutcome | None" = None
    notes: tuple[str, ...] = field(default=())

    @property
    def flops_per_step(self) -> float:
        """Of training: 6 x multiply-adds x batch; what is computed again counts once."""
        return FLOPS_PER_MAC * self.gmacs * 1e9 * self.work.batch

    @property
    def flops(self) -> float:
        """Of all training."""
        return self.flops_per_step * self.work.steps

    @property
    def seconds(self) -> float:
        """Of all training by the clock, without scoring, drawing and saving."""
        return self.step_seconds * self.work.steps

    @property
    def scoring_seconds(self) -> float:
        """Of grids and scores."""
        drawing = self.work.drawing
        drawn = (drawing.grids + drawing.scored) * self.picture_seconds
        return drawn + drawing.looked_at * self.look_seconds

    @property
    def all_seconds(self) -> float:
        return self.seconds + self.scoring_seconds

    @property
    def images_per_second(self) -> float:
        return self.work.batch / self.step_seconds

    @property
    def utilisation(self) -> float:
        """Share of the devices' rate of matrix products."""
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        return self.flops_per_step / self.step_seconds / (self.hardware.rate(dtype) * self.hardware.devices)

    @property
    def device_hours(self) -> float:
        return self.all_seconds * self.hardware.devices / 3600

    @property
    def cost(self) -> float:
        """Dollars."""
        return self.device_hours * self.hardware.price

    @property
    def memory_bytes(self) -> int:
        """Of one device."""
        return self.memory.at_most

    @property
    def checkpoint_bytes(self) -> int:
        """Of one: averages, weights and what the optimizer remembers."""
        return (self.memory.weights + self.memory.averages + self.memory.moments) * self.split.shards

    @property
    def disk_bytes(self) -> int:
        """Of all checkpoints on disk at once."""
        return self.checkpoint_bytes * self.work.checkpoints

    @property
    def latents_bytes(self) -> int | None:
        """Of a cache of latents; None where the data could not be opened."""
        return None if self.work.images is None else self.work.images * self.work.latent_bytes

    def facts(self) -> dict[str, Any]:
        """For programs: everything in plain numbers. Bytes are of one device, seconds by the clock, cost in dollars."""
        hardware, work = self.hardware, self.work
        return {
            "name": work.name,
            "network": work.network.model_dump(mode="json"),
            "hardware": hardware.model_dump(mode="json"),
            "parameters": self.parameters,
            "gmacs": self.gmacs,
            "flops_per_sample": FLOPS_PER_MAC * self.gmacs * 1e9,
            "flops_per_step": self.flops_per_step,
            "flops": self.flops,
            "steps": work.steps,
            "batch": work.batch,
            "split": self.split._asdict(),
            "precision": self.precision,
            "recompute": work.recompute,
            "memory": asdict(self.memory),
            "fits": self.fits,
            "choices": [asdict(choice) for choice in self.choices],
            "largest_batch": self.largest_batch,
            "largest_model": self.largest_model,
            "step_seconds": self.step_seconds,
            "images_per_second": self.images_per_second,
            "utilisation": self.utilisation,
            "seconds": self.seconds,
            "scoring_seconds": self.scoring_seconds,
            "device_hours": self.device_hours,
            "cost": self.cost,
            "checkpoint_bytes": self.checkpoint_bytes,
            "disk_bytes": self.disk_bytes,
            "latents_bytes": self.latents_bytes,
            "images": work.images,
            "pixels_bytes": None if work.images is None else work.images * work.image_bytes,
            "budget": None if self.budget is None else asdict(self.budget),
            "notes": list(self.notes),
        }


# A budget


@dataclass(frozen=True)
class BudgetOutcome:
    """What a budget buys of a run."""

    text: str
    steps: int
    samples: int
    flops: float
    enough: bool  # for the whole run


def budget_outcomes(plan: Plan, budget: Budget) -> BudgetOutcome:
    """How many steps a budget pays for, on this hardware; drawing and scoring are paid for first."""
    seconds = budget.seconds(plan.hardware.devices, plan.hardware.price)
    if seconds is None:
        exact = budget.amount / plan.flops_per_step
    else:
        exact = max(0.0, seconds - plan.scoring_seconds) / plan.step_seconds
    steps = int(exact + 1e-9)
    samples = steps * plan.work.batch
    return BudgetOutcome(budget.text, steps, samples, steps * plan.flops_per_step, steps >= plan.work.steps)


# Planning


def plan(
    work: Workload,
    hardware: Hardware,
    *,
    budget: Budget | None = None,
    alternatives: bool = True,
    stopwatch: OpProfiler | None = None,
    progress: Progress | None = None,
) -> Plan:
    """What the work takes on some hardware.

    alternatives: also what other choices of precision, recomputation and sharding would need, and the largest batch
    and model that fit. stopwatch: measures, where the hardware is this machine. Raises TesseraError for work that
    cannot be divided as it asks.
    """
    clock = _Clock(hardware, work.compiled, stopwatch, progress)
    if clock.stopwatch is not None:
        source = f"measured here, operator by operator, since {clock.stopwatch.date} (tessera plan --measure: anew)"
        hardware = hardware.model_copy(update={"source": source})
    split = divided(work, hardware.devices)
    precision: Precision = (
        ("bfloat16" if hardware.device == "cuda" else "float32") if work.precision == "auto" else work.precision
    )
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    macs, parameters = counts(work.network)
    work = replace(work, step=_remembered(work.step))
    sizes = _sizes(work, work.network, split, dtype, work.recompute)
    memory = memory_of(sizes, split, len(outline(work.network).blocks))
    seconds = _step_seconds(work, split, dtype, work.recompute, clock)
    encoding = decoding = 0.0
    if work.encode is not None:
        rows = max(1, min(split.rows, 8))
        encoding = clock(work.encode(rows)) / rows * split.rows * split.rounds
    if work.decode is not None:
        decoding = clock(work.decode(4)) / 4
    exchange = _exchange_seconds(sizes, split, hardware)
    drawing = work.drawing
    rows = max(1, min(drawing.batch, drawing.grids + drawing.scored, int(AT_ONCE / (2 * macs))))
    call = max(_deep(work.network, lambda config: clock.work(work.call(config, rows)), clock)) / rows
    made = Plan(
        work=work,
        hardware=hardware,
        precision=precision,
        split=split,
        parameters=parameters,
        gmacs=macs / 1e9,
        memory=memory,
        fits=memory.at_most <= hardware.room,
        step_seconds=max(seconds + encoding, exchange),
        encode_seconds=encoding,
        exchange_seconds=exchange,
        call_seconds=call,
        picture_seconds=call * drawing.calls + decoding,
        look_seconds=2 * drawing.judge / (0.5 * hardware.rate(torch.float32)),
        notes=work.notes,
    )
    if clock.stopwatch is not None and clock.stopwatch.missing:
        names = ", ".join(sorted(clock.stopwatch.missing))
        made = replace(
            made, notes=(*made.notes, f"these operators could not be measured and count as nothing: {names}")
        )
    if alternatives:
        made = replace(
            made,
            choices=tuple(_choices(made, clock)),
            largest_batch=_largest_batch(made, dtype),
            largest_model=_largest_model(made, dtype),
        )
    return made if budget is None else replace(made, budget=budget_outcomes(made, budget))


def divided(work: Workload, devices: int) -> Split:
    """How the batch falls to devices and rounds, as in training. Raises TesseraError where it cannot."""
    share = -(-work.batch // devices)
    rounds = -(-share // min(work.micro_batch or share, share))
    if work.batch // devices < rounds:
        raise TesseraError(
            f"training.global_batch_size {work.batch} is too small for {devices} devices: some would have nothing to do; choose a "
            "larger batch or fewer devices"
        )
    shards = devices if work.shard == "all" else 1 if devices == 1 else work.shard
    if devices % shards:
        raise TesseraError(
            f"training.fsdp is {work.shard}, but {devices} devices cannot be divided into groups of {shards}: choose "
            "a divisor, or all"
        )
    return Split(devices, -(-share // rounds), rounds, shards)


def counts(config: NetworkConfig) -> tuple[int, int]:
    """Multiply-adds of one forward pass of one sample, and parameters."""
    network = outline(config)
    return network.macs(), parameter_count(network)


def memory_of(sizes: Sizes, split: Split, blocks: int) -> Memory:
    """Of a device that holds its part. Of divided weights a block's are put together before they are used, the next
    one's meanwhile (FSDP)."""
    shards = split.shards
    gathered = 0 if shards == 1 else 2 * sizes.weights // blocks
    gradients = sizes.gradients // shards
    weights, averages, moments = sizes.weights // shards, sizes.averages // shards, sizes.moments // shards
    passing = max(sizes.kept, sizes.peak - sizes.gradients + gradients)
    return Memory(
        weights=weights,
        averages=averages,
        moments=moments,
        gradients=gradients,
        activations=sizes.kept,
        at_most=weights + averages + moments + passing + gathered,
    )


class _Clock:
    """Seconds of a trace: measured where the hardware is this machine, else estimated."""

    def __init__(
        self, hardware: Hardware, compiled: Compiled, stopwatch: OpProfiler | None, progress: Progress | None
    ) -> None:
        self.hardware, self.progress = hardware, progress
        self.compiled: Compiled = compiled
        self.stopwatch = stopwatch
        if hardware.here and stopwatch is None:
            self.stopwatch = OpProfiler(torch.device(hardware.device))

    def __call__(self, *traces: Trace) -> float:
        """Of all of them, one after another."""
        return max(map(sum, zip(*(self.work(trace) for trace in traces))))

    def work(self, trace: Trace) -> tuple[float, float]:
        """Of the device, and of the host meanwhile, where that is told apart."""
        if self.stopwatch is not None and self.hardware.here:
            return self.stopwatch(trace, progress=self.progress)[0], 0.0
        return self.hardware.work(trace, self.compiled)


def _remembered(step: Recording) -> Recording:
    """Traces that are asked for again, by several parts of a plan, are not made again."""
    made: dict[tuple[Any, ...], Step] = {}

    def recorded(
        network: NetworkConfig, rows: int, rounds: int, dtype: torch.dtype | None, recompute: Recompute
    ) -> Step:
        key = (network.model_dump_json(), rows, rounds, dtype, recompute)
        if key not in made:
            made[key] = step(network, rows, rounds, dtype, recompute)
        return made[key]

    return recorded


def _deep(
    network: NetworkConfig, told: Callable[[NetworkConfig], tuple[float, ...]], clock: _Clock | None = None
) -> tuple[float, ...]:
    """Numbers that every block adds the same to: of a deep transformer they are told from two shallow ones."""
    fewer, more = SHALLOW
    whole = more if clock is None or clock.stopwatch is None else MEASURED_WHOLE
    if not isinstance(network, DiTConfig) or network.depth <= whole:
        return told(network)
    one, other = (told(network.model_copy(update={"depth": depth})) for depth in SHALLOW)
    return tuple(x + (y - x) / (more - fewer) * (network.depth - fewer) for x, y in zip(one, other))


def _sizes(
    work: Workload, network: NetworkConfig, split: Split, dtype: torch.dtype | None, recompute: Recompute
) -> Sizes:
    """Of a step on one device; a second round finds the gradients of the first."""

    def told(config: NetworkConfig) -> Sizes:
        return work.step(config, split.rows, min(split.rounds, 2), dtype, recompute).sizes

    return Sizes(*map(round, _deep(network, told)))


def _step_seconds(
    work: Workload, split: Split, dtype: torch.dtype | None, recompute: Recompute, clock: _Clock
) -> float:
    """Of one step: forward and backward of all rounds, and the update."""

    def told(config: NetworkConfig) -> tuple[float, ...]:
        step, rows = work.step(config, split.rows, 1, dtype, recompute), split.rows
        if clock.stopwatch is not None:
            # What comes again, as blocks do, is measured once; and of many rows some.
            different = sum(one.flops for part in (step.forward, step.backward) for one in part.operators)
            if different > AT_ONCE and rows > 1:
                rows = max(1, int(rows * AT_ONCE / different))
                step = work.step(config, rows, 1, dtype, recompute)
        rounds = split.rounds * split.rows / rows
        parts = (clock.work(part) for part in (step.forward, step.backward, step.update))
        return tuple((there + back) * rounds + last / split.shards for there, back, last in zip(*parts))

    return max(_deep(work.network, told, clock))


def _exchange_seconds(sizes: Sizes, split: Split, hardware: Hardware) -> float:
    """In which gradients are summed over all devices, and divided weights gathered twice in each round."""
    devices, shards = split.devices, split.shards
    reduced = 2 * (devices - 1) / devices * sizes.gradients / shards
    gathered = (shards - 1) / shards * sizes.weights * (2 * split.rounds + 1)
    return (reduced + gathered) / hardware.interconnect if devices > 1 else 0.0


# Other choices


def _choices(made: Plan, clock: _Clock) -> Iterator[Alternative]:
    work, hardware = made.work, made.hardware
    blocks = len(outline(work.network).blocks)
    for precision in get_args(Precision):
        for recompute in get_args(Recompute):
            dtype = torch.bfloat16 if precision == "bfloat16" else None
            sizes = _sizes(work, work.network, made.split, dtype, recompute)
            seconds = None
            if not hardware.here:  # measuring all of them would take too long
                seconds = _step_seconds(work, made.split, dtype, recompute, clock)
            for shards in sorted({1, made.split.shards, hardware.devices}):
                split = made.split._replace(shards=shards)
                memory = memory_of(sizes, split, blocks)
                exchange = _exchange_seconds(sizes, split, hardware)
                took = None if seconds is None else max(seconds + made.encode_seconds, exchange)
                if (precision, recompute, shards) == (made.precision, work.recompute, made.split.shards):
                    took = made.step_seconds
                fits = memory.at_most <= hardware.room
                yield Alternative(precision, recompute, shards, memory, fits, took)


def _largest_batch(made: Plan, dtype: torch.dtype | None) -> int:
    """Samples that a device can hold at once; 0 if not one. Memory grows in a straight line with them."""
    work, split = made.work, made.split
    blocks = len(outline(work.network).blocks)
    rows = max(2, split.rows)  # whose memory is known already
    one, other = (
        memory_of(_sizes(work, work.network, split._replace(rows=count), dtype, work.recompute), split, blocks).at_most
        for count in (rows, 2 * rows)
    )
    return max(0, int(rows + (made.hardware.room - one) * rows / (other - one)))


def _largest_model(made: Plan, dtype: torch.dtype | None) -> str | None:
    """The preset with the most multiply-adds that fits, seeing what this recipe's network sees."""
    work, network = made.work, made.work.network
    facts = {name: getattr(network, name) for name in (*DATA_DEPENDENT, "learn_null_class")}
    if isinstance(network, DiTConfig):
        facts["block"] = network.block.model_dump()
    possible = []
    for name, sizes in PRESETS.items():
        with contextlib.suppress(TesseraError):  # a patch that does not divide the size
            config = validate(DiTConfig, {**facts, **sizes}, name)
            possible.append((counts(config.model_copy(update={"depth": 1}))[0] * config.depth, name, config))
    own = made.memory
    state = (own.weights + own.averages + own.moments + own.gradients) / made.parameters
    for _, name, config in sorted(possible, key=lambda one: one[0], reverse=True):
        if state * counts(config)[1] > made.hardware.room:
            continue
        sizes = _sizes(work, config, made.split, dtype, work.recompute)
        if memory_of(sizes, made.split, config.depth).at_most <= made.hardware.room:
            return name
    return None
