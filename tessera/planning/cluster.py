"""Simulation of FSDP2 and HSDP on many devices: step time, memory, failures and storage.

Operators cost what `planning.hardware` estimates. Collectives are rings over the links of the hardware, with the
latencies of NCCL's own cost model (its src/graph/tuning.cc, protocol Simple). One device is simulated, as all do the
same: a compute stream, and one stream for each kind of link. A block's weights are gathered while the previous block
computes, its gradients are reduced while the next one computes, and the rest of the network is gathered before and
reduced after all blocks, as `fully_shard` schedules it. Collectives are assumed not to slow the computation, and all
devices to be equally fast, so a simulated step is a lower bound.
"""

import math
from dataclasses import dataclass

from tessera.errors import TesseraError
from tessera.planning.hardware import Hardware

BASE_LATENCY, NVLINK_LATENCY, NETWORK_LATENCY = 8.4e-6, 3.4e-6, 14e-6  # seconds: of a collective, and of a ring's step
TREE_LATENCY = 4e-6  # of a step of NCCL's tree inside a node


@dataclass(frozen=True)
class StepCost:
    """A training step of one device without communication. Seconds are per micro-batch, except the update."""

    num_blocks: int
    block_forward: float
    block_backward: float  # with recomputation
    rest_forward: float  # of the network outside the blocks, and encoding
    rest_backward: float
    update: float  # optimizer and EMA of all weights
    block_bytes: float  # weights of a block; its gradients have as many
    rest_bytes: float
    accumulation_steps: int = 1

    @property
    def compute(self) -> float:
        """Seconds of forward and backward passes."""
        blocks = self.num_blocks * (self.block_forward + self.block_backward)
        return self.accumulation_steps * (blocks + self.rest_forward + self.rest_backward)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a simulated step."""

    total: float
    compute: float  # with the update
    communication: float  # sum of all collectives, most of them beside computation

    @property
    def exposed(self) -> float:
        """Seconds in which the device waits for communication."""
        return self.total - self.compute


def ring_volume(size: float, ranks: int) -> float:
    """Bytes that each rank sends in an all-gather or a reduce-scatter of `size` bytes in total."""
    return size * (ranks - 1) / ranks


def gather_seconds(hardware: Hardware, size: float, ranks: int, local: int) -> float:
    """An all-gather or reduce-scatter of `size` bytes in total; `local` of the ranks are in each node.

    A ring crosses the boundary of a node once, over the network links of its ranks in that node together.
    """
    if ranks == 1:
        return 0.0
    nodes = math.ceil(ranks / local)
    rate = hardware.interconnect if nodes == 1 else min(hardware.interconnect, local * hardware.network)
    latency = (ranks - nodes) * NVLINK_LATENCY + (nodes - 1) * NETWORK_LATENCY
    return BASE_LATENCY + latency + ring_volume(size, ranks) / rate


def all_reduce_seconds(hardware: Hardware, size: float, ranks: int, local: int) -> float:
    """An all-reduce: a ring, or a tree of twice the logarithm of the nodes where that takes less time."""
    if ranks == 1:
        return 0.0
    ring = 2 * gather_seconds(hardware, size, ranks, local) - BASE_LATENCY
    nodes = math.ceil(ranks / local)
    rate = hardware.interconnect if nodes == 1 else min(hardware.interconnect, local * hardware.network)
    steps = (local - 1) * TREE_LATENCY + math.log2(nodes) * NETWORK_LATENCY
    tree = BASE_LATENCY + 2 * steps + 2 * size / (0.85 * rate)  # NCCL reckons with 85 % for trees
    return min(ring, tree)


def simulate_step(cost: StepCost, hardware: Hardware, devices: int, shards: int) -> StepTime:
    """A step on `devices`, of which `shards` neighbors hold one copy of the weights together.

    shards == devices: FSDP; 1: replication, as DDP; else HSDP. Raises TesseraError if they are no divisor.
    """
    if devices % shards:
        raise TesseraError(f"{devices} devices cannot be divided into groups of {shards}: choose a divisor")
    node = min(hardware.node_size, devices)
    in_node = min(shards, node)
    replicas, replicas_in_node = devices // shards, max(1, node // shards)
    shard_link = "node" if shards <= node else "network"
    replica_link = "node" if replicas <= replicas_in_node else "network"
    now, free, communication = 0.0, {"node": 0.0, "network": 0.0}, 0.0

    def use(link: str, ready: float, seconds: float) -> float:
        """The time at which a collective ends that is issued now and can begin when it is ready."""
        nonlocal communication
        communication += seconds
        if seconds:
            free[link] = max(free[link], ready) + seconds
        return max(ready, free[link]) if seconds else ready

    def gather(size: float, ready: float) -> float:
        return use(shard_link, ready, gather_seconds(hardware, size, shards, in_node))

    def reduce(size: float, ready: float) -> None:
        ready = use(shard_link, ready, gather_seconds(hardware, size, shards, in_node))
        use(replica_link, ready, all_reduce_seconds(hardware, size / shards, replicas, replicas_in_node))

    for micro_batch in range(cost.accumulation_steps):
        is_last = micro_batch == cost.accumulation_steps - 1
        passes = ((cost.block_forward, False), (cost.block_backward, is_last))
        now = gather(cost.rest_bytes, now) + cost.rest_forward
        for block_seconds, reduces in passes:
            gathered = gather(cost.block_bytes, now)
            for number in range(cost.num_blocks):
                start = max(now, gathered)
                if number < cost.num_blocks - 1:
                    gathered = gather(cost.block_bytes, start)
                now = start + block_seconds
                if reduces:
                    reduce(cost.block_bytes, now)
        now += cost.rest_backward
        if is_last:
            reduce(cost.rest_bytes, now)
    update = cost.update / shards
    total = max(now, *free.values()) + update
    return StepTime(total, cost.compute + update, communication)


@dataclass(frozen=True)
class Reliability:
    """What interrupts a run, and what saving and starting again cost.

    The defaults: Llama 3 reports 419 unexpected interruptions of 16,384 H100 in 54 days (arXiv 2407.21783), one in
    50,700 device hours. Restart and storage are assumptions: set your own.
    """

    device_hours: float = 50_000.0  # mean time between failures of one device
    restart: float = 600.0  # seconds from a failure to the next step: detection, scheduling, loading, compilation
    storage: float = 10e9  # bytes per second that all devices together write
    copy: float = 10e9  # bytes per second that a device copies to the memory of its host

    def mean_time(self, devices: int) -> float:
        """Seconds between failures of any of the devices."""
        return 3600 * self.device_hours / devices


@dataclass(frozen=True)
class Failures:
    """The expected cost of failures."""

    mean_time: float  # seconds between failures
    save: float  # seconds in which training waits for a checkpoint
    write: float  # seconds in which it is written beside training
    interval: float  # seconds of training between checkpoints
    loss: float  # fraction of the time that is not training: saving, repeated work, restarts


def optimal_interval(save: float, mean_time: float) -> float:
    """Seconds of work between checkpoints that minimize the expected time (Daly 2006, equation 37; Young 1974 is its
    first term). save: seconds of a checkpoint."""
    if save >= 2 * mean_time:
        return mean_time
    ratio = save / (2 * mean_time)
    return math.sqrt(2 * save * mean_time) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def expected_slowdown(interval: float, save: float, restart: float, mean_time: float) -> float:
    """Expected time of a run by its time without failures and checkpoints (Daly 2006, equation 20): failures with
    exponentially distributed times between them, which may also occur while saving and restarting."""
    if (interval + save + restart) / mean_time > 500:
        return math.inf
    return mean_time / interval * math.exp(restart / mean_time) * math.expm1((interval + save) / mean_time)


def plan_failures(checkpoint_bytes: float, devices: int, shards: int, reliability: Reliability) -> Failures:
    """Interval and loss for a checkpoint of this size. Training waits while its devices copy their parts to the memory
    of their hosts, then it is written beside training; until it is written, a failure leads to the previous one."""
    mean_time = reliability.mean_time(devices)
    save = checkpoint_bytes / shards / reliability.copy
    write = checkpoint_bytes / reliability.storage
    interval = max(optimal_interval(save, mean_time), write)
    slowdown = expected_slowdown(interval, save, reliability.restart + write, mean_time)
    return Failures(mean_time, save, write, interval, 1 - 1 / slowdown)
