"""One step of training: the gradients of a batch, what they tell, the update.

Shapes: P parts of the network (see `health.groups`).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tessera.conditioning import NetworkFunction
from tessera.data import Batch
from tessera.models.network import Network
from tessera.monitoring import health
from tessera.training import parallel
from tessera.training.objective import TrainingObjective, compute_loss, prepare_batch
from tessera.training.optimizers import OptimizerConfig
from tessera.training.parallel import ParallelContext


@dataclass(frozen=True)
class TrainState:
    """What a step changes, and who takes part in it."""

    network: Network  # the weights, perhaps divided among processes
    forward: NetworkFunction  # what is called: the network, or what compiling made of it
    optimizer: torch.optim.Optimizer
    config: OptimizerConfig
    parallel: ParallelContext

    @cached_property
    def parameter_groups(self) -> tuple[list[str], Tensor]:
        """The parts of the network whose gradients are told apart, and for each tensor the number of its part."""
        names = [name for group in self.optimizer.param_groups for name in group["param_names"]]
        told, index = health.groups(names)
        return told, index.to(self.optimizer.param_groups[0]["params"][0].device)


@dataclass(frozen=True)
class StepMetrics:
    """What a step tells, of the whole batch, on the device: reading it is the caller's time to spend."""

    values: dict[str, Tensor]  # loss, mse, perhaps vb, gradient_norm before clipping
    applied: Tensor  # 1, or 0 where the weights were left as they were
    clipped: Tensor  # 1 where the gradient was longer than clip
    by_time: Tensor  # [2, BINS] sums and counts of mse, see `health.bin_by_time`
    squares: Tensor  # [P] squared lengths of the gradient's parts, see `Learner.groups`


def train_step(
    learner: TrainState,
    batch: Batch,
    task: TrainingObjective,
    count: int,
    rounds: int = 1,
    limits: Tensor | None = None,
) -> StepMetrics:
    """Gradients of the mean loss over `count` samples, of which this process has `batch`, in so many rounds; an update.

    limits [2]: the loss and the length of the gradient beyond which the weights are left as they are, as they also are
    if either is not finite.
    """
    network, optimizer, config, team = learner.network, learner.optimizer, learner.config, learner.parallel
    device, mine = optimizer.param_groups[0]["params"][0].device, len(batch.position)
    sums: list[Tensor] = []
    names: list[str] = []
    for number in range(rounds):
        part = slice(mine * number // rounds, mine * (number + 1) // rounds)
        x0, condition, position = prepare_batch(
            Batch(batch.pixels[part], batch.label[part], batch.position[part]), task, device
        )
        with parallel.one_reduction(network, last=number == rounds - 1):
            found, t = compute_loss(learner.forward, x0, condition, position, task)
            (found.total.sum() / (count / team.ranks.world_size)).backward()  # the mean over processes is FSDP's
        told = {"loss": found.total, "mse": found.mse, "vb": found.vb}
        names = [name for name, value in told.items() if value is not None]
        shares = torch.stack([value.detach().sum() / count for value in told.values() if value is not None])
        sums.append(torch.cat((shares, health.bin_by_timestep(found.mse.detach(), t).flatten())))
    gradients = parallel.collect_gradients(network, optimizer)
    parts, index = learner.parameter_groups
    lengths = torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]
    squares = torch.zeros(len(parts), device=device).index_add_(0, index, lengths.square() / team.replicas)
    vector = team.all_reduce_sum(torch.cat((sum(sums[1:], sums[0]), squares)))
    heads, by_time, squares = vector.split((len(names), 2 * health.BINS, len(parts)))
    norm = squares.sum().sqrt()
    seen = torch.stack((heads[0], norm))
    kept = seen.isfinite().all()
    if limits is not None:
        kept &= (seen <= limits.to(device, non_blocking=True)).all()
    clipped = torch.zeros_like(norm)
    if config.grad_clip_norm is not None:
        clipped = (norm > config.grad_clip_norm).float()
        torch._foreach_mul_(gradients, (config.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))  # pyright: ignore[reportPrivateImportUsage]
    update(optimizer, kept, ahead=device.type == "cuda")
    numbers = {**dict(zip(names, heads.unbind())), "gradient_norm": norm}
    return StepMetrics(numbers, kept.float(), clipped, by_time.view(2, health.BINS), squares)


def update(optimizer: Any, kept: Tensor, ahead: bool) -> None:
    """One update by a torch.optim.Optimizer of the weights from their gradients, then let go; none if `kept` [] is 0.

    ahead: the host does not wait for the device to know; the optimizer must be fused.
    """
    if ahead and optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, 1 - kept.float()  # as gradient scalers tell it
        optimizer.step()
    elif kept:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class MetricAccumulator:
    """Sums of what steps tell, on the device, until someone asks for the means: of the steps that were kept."""

    def __init__(self) -> None:
        self.steps = 0
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._by_time: Tensor | None = None

    def add(self, told: StepMetrics) -> None:
        self.steps += 1
        self._names = list(told.values)
        values = torch.stack((told.applied, *told.values.values(), told.clipped))
        values = torch.where(told.applied > 0, values, 0.0)
        self._sums = values if self._sums is None else self._sums + values
        by_time = torch.where(told.applied > 0, told.by_time, 0.0)
        self._by_time = by_time if self._by_time is None else self._by_time + by_time

    def means(self) -> dict[str, float]:
        """Of the steps since the last time; nothing if none was kept. Waits for the device."""
        if self._sums is None:
            return {}
        kept, *values = self._sums.tolist()
        self._sums, self.steps = None, 0
        return {name: value / kept for name, value in zip((*self._names, "clipped"), values)} if kept else {}

    def loss_by_time(self) -> list[float | None]:
        """Mean mse in each part of time since the last time; None where no sample fell. Waits for the device."""
        if self._by_time is None:
            return [None] * health.BINS
        sums, counts = self._by_time.tolist()
        self._by_time = None
        return [total / count if count else None for total, count in zip(sums, counts)]
