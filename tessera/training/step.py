"""One training step: the gradients of a batch, its metrics, the update.

Shapes: P parameter groups of the network (see `health.parameter_groups`).
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
    """Everything that a step changes, and the ranks that take part in it."""

    network: Network  # perhaps sharded
    forward: NetworkFunction  # the network, or its compiled form
    optimizer: torch.optim.Optimizer
    config: OptimizerConfig
    parallel: ParallelContext

    @property
    def device(self) -> torch.device:
        return self.optimizer.param_groups[0]["params"][0].device

    @cached_property
    def parameter_groups(self) -> tuple[list[str], Tensor]:
        """The names of the groups that gradient norms are reported for, and the group number of each parameter."""
        names = [name for group in self.optimizer.param_groups for name in group["param_names"]]
        group_names, index = health.parameter_groups(names)
        return group_names, index.to(self.device)


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of a step over the global batch, on the device. Only the caller waits for them."""

    values: dict[str, Tensor]  # loss, mse, perhaps vb and alignment, grad_norm before clipping
    applied: Tensor  # 1, or 0 if the update was skipped
    clipped: Tensor  # 1 if the gradient norm was above grad_clip_norm
    loss_by_timestep: Tensor  # [2, BINS] sums and counts of mse, see `health.bin_by_timestep`
    group_squared_norms: Tensor  # [P] squared gradient norms, see `TrainState.parameter_groups`


def train_step(
    state: TrainState,
    batch: Batch,
    objective: TrainingObjective,
    global_batch_size: int,
    accumulation_steps: int = 1,
    limits: Tensor | None = None,
) -> StepMetrics:
    """Update the weights with the gradient of the mean loss over the global batch; `batch` is this rank's part of it.

    limits [2]: the largest loss and gradient norm. The update is skipped if one is exceeded or is not finite.
    """
    network, optimizer, context, device = state.network, state.optimizer, state.parallel, state.device
    batch_size = len(batch.position)
    sums: list[Tensor] = []
    names: list[str] = []
    for number in range(accumulation_steps):
        rows = slice(batch_size * number // accumulation_steps, batch_size * (number + 1) // accumulation_steps)
        x0, condition, position = prepare_batch(batch[rows], objective, device)
        with parallel.gradient_sync(network, last=number == accumulation_steps - 1):
            losses, t = compute_loss(state.forward, x0, condition, position, objective, batch[rows].own_frames)
            # sum / (global batch size / ranks): FSDP takes the mean over the ranks, so this is the mean over the batch.
            (losses.total.sum() / (global_batch_size / context.world.world_size)).backward()
        by_name = {"loss": losses.total, "mse": losses.mse, "vb": losses.vb, "alignment": losses.alignment}
        names = [name for name, value in by_name.items() if value is not None]
        means = torch.stack(
            [value.detach().sum() / global_batch_size for value in by_name.values() if value is not None]
        )
        sums.append(torch.cat((means, health.bin_by_timestep(losses.mse.detach(), t).flatten())))
    gradients = parallel.collect_gradients(network, optimizer)
    group_names, index = state.parameter_groups
    norms = torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]
    squares = torch.zeros(len(group_names), device=device).index_add_(0, index, norms.square() / context.replicas)
    # One all-reduce for all metrics.
    vector = context.all_reduce_sum(torch.cat((sum(sums[1:], sums[0]), squares)))
    means, by_timestep, squares = vector.split((len(names), 2 * health.BINS, len(group_names)))
    norm = squares.sum().sqrt()
    watched = torch.stack((means[0], norm))
    applied = watched.isfinite().all()
    if limits is not None:
        applied &= (watched <= limits.to(device, non_blocking=True)).all()
    clipped = torch.zeros_like(norm)
    max_norm = state.config.grad_clip_norm
    if max_norm is not None:
        clipped = (norm > max_norm).float()
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))  # pyright: ignore[reportPrivateImportUsage]
    optimizer_step(optimizer, applied, asynchronous=device.type == "cuda")
    values = {**dict(zip(names, means.unbind())), "grad_norm": norm}
    return StepMetrics(values, applied.float(), clipped, by_timestep.view(2, health.BINS), squares)


def optimizer_step(optimizer: Any, applied: Tensor, asynchronous: bool) -> None:
    """Update the weights from their gradients, or do nothing if `applied` [] is 0. Frees the gradients.

    asynchronous: the host does not wait for the value of `applied`; this needs a fused torch.optim.Optimizer.
    """
    if asynchronous and optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, 1 - applied.float()  # the interface of gradient scalers
        optimizer.step()
    elif applied:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class MetricAccumulator:
    """Sums of the metrics of applied steps, on the device, until their means are read."""

    def __init__(self) -> None:
        self.steps = 0
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._by_timestep: Tensor | None = None

    def add(self, metrics: StepMetrics) -> None:
        self.steps += 1
        self._names = list(metrics.values)
        values = torch.stack((metrics.applied, *metrics.values.values(), metrics.clipped))
        values = torch.where(metrics.applied > 0, values, 0.0)
        self._sums = values if self._sums is None else self._sums + values
        by_timestep = torch.where(metrics.applied > 0, metrics.loss_by_timestep, 0.0)
        self._by_timestep = by_timestep if self._by_timestep is None else self._by_timestep + by_timestep

    def means(self) -> dict[str, float]:
        """Means over the applied steps since the last call; empty if there were none. Waits for the device."""
        if self._sums is None:
            return {}
        applied, *values = self._sums.tolist()
        self._sums, self.steps = None, 0
        return {name: value / applied for name, value in zip((*self._names, "clipped"), values)} if applied else {}

    def loss_by_timestep(self) -> list[float | None]:
        """The mean mse of each timestep bin since the last call; None for an empty bin. Waits for the device."""
        if self._by_timestep is None:
            return [None] * health.BINS
        sums, counts = self._by_timestep.tolist()
        self._by_timestep = None
        return [total / count if count else None for total, count in zip(sums, counts)]
