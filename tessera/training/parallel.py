"""One network on several ranks, applied from outside: FSDP2 on a mesh of replicas by shards. All sharding is here.

A mesh of n x m ranks holds n copies of the weights, each in m shards: n x 1 is plain replication, 1 x m is full
sharding, all others are hybrid. The weights, their averages and the optimizer state are sharded. The optimizer and the
averages work on each rank's local shards as plain tensors. Element-wise updates need nothing else, and an update that
needs whole matrices (Muon) gathers them.
"""

import warnings
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from tessera.adapters import build_like
from tessera.errors import TesseraError
from tessera.models.network import Network
from tessera.runtime import SINGLE, Distributed


class ParallelContext:
    """The ranks of a run: `replicas` copies of the weights, each in `shards` shards."""

    def __init__(self, world: Distributed = SINGLE, fsdp: int | str = 1, device: str = "cpu") -> None:
        """fsdp: the number of ranks that hold one copy together, or "full". Raises TesseraError if it is no divisor."""
        self.world = world
        self.shards = world.world_size if fsdp == "full" else int(fsdp)
        if world.world_size == 1:
            self.shards = 1  # the same recipe on one machine
        if world.world_size % self.shards:
            raise TesseraError(
                f"training.fsdp is {fsdp}, but {world.world_size} processes cannot be divided into groups of {fsdp}: "
                "choose a divisor, or full"
            )
        self.replicas = world.world_size // self.shards
        self.mesh: DeviceMesh | None = None
        self._pending: tuple[Tensor, distributed.Work] | None = None
        if world.world_size > 1:
            self.mesh = init_device_mesh(device, (self.replicas, self.shards), mesh_dim_names=("replica", "shard"))
            self._control_group = distributed.new_group(backend="gloo")

    def distribute(self, network: Network) -> None:
        """Shard a network's weights over the mesh, in place: block by block, then the rest."""
        if self.mesh is None:
            return
        # The head returns a view, which nothing here writes into.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        # Gather each block again in the backward pass, so that the whole weights are never in memory together.
        reshard_blocks = self.shards > 1
        for block in network.blocks:
            fully_shard(block, mesh=self.mesh, reshard_after_forward=reshard_blocks)
        fully_shard(network, mesh=self.mesh, reshard_after_forward=False)
        for name in ("training_forward", "block_output"):  # of a DiT: they gather the weights as forward does
            if hasattr(network, name):
                register_fsdp_forward_method(network, name)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place. The result has the same bits on all ranks."""
        if self.world.world_size > 1:
            distributed.all_reduce(values)
        return values

    def begin_flag_reduction(self, *flags: bool) -> None:
        """Begin to exchange this rank's flags. `reduced_flags` returns the result later, so that no rank waits."""
        if self.world.world_size > 1:
            tensor = torch.tensor(flags, dtype=torch.uint8)
            work = distributed.all_reduce(tensor, distributed.ReduceOp.MAX, group=self._control_group, async_op=True)
            self._pending = tensor, cast(distributed.Work, work)

    def reduced_flags(self, *current: bool) -> list[bool]:
        """For each flag of `begin_flag_reduction`, whether any rank set it. A single process returns `current`."""
        if self._pending is None:
            return list(current)
        tensor, work = self._pending
        work.wait()
        return [bool(flag) for flag in tensor.tolist()]


def local_batch(batch_size: int, accumulation_steps: int, world: Distributed) -> slice:
    """This rank's part of a batch. Raises TesseraError if a rank would have no sample in an accumulation step."""
    count, rank = world.world_size, world.rank
    if batch_size // count < accumulation_steps:
        raise TesseraError(
            f"training.global_batch_size {batch_size} is too small for {count} processes: some would have no samples; "
            "choose a larger batch or fewer processes"
        )
    return slice(batch_size * rank // count, batch_size * (rank + 1) // count)


@contextmanager
def gradient_sync(network: Network, last: bool):
    """Reduce gradients over the ranks only in the last backward pass of a step."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
        network.set_is_last_backward(last)
    yield


def reshard(network: Network) -> None:
    """Free the weights that a pass without gradients gathered. Until then the parameters are not the shards."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard, which shares the memory. A plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained_parameters(network: Network) -> dict[str, nn.Parameter]:
    """The parameters for the optimizer, by name: of a sharded network this rank's shards, which share the memory."""
    parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if not isinstance(network, FSDPModule):
        return parameters
    return {name: nn.Parameter(local_tensor(parameter.detach())) for name, parameter in parameters.items()}


def collect_gradients(network: Network, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The gradients of all optimized parameters, in the optimizer's order, set as `grad` of the local shards."""
    gradients = []
    for group in optimizer.param_groups:
        for name, optimized in zip(group["param_names"], group["params"]):
            parameter = network.get_parameter(name)
            if parameter is not optimized and parameter.grad is not None:
                optimized.grad, parameter.grad = local_tensor(parameter.grad), None
            if optimized.grad is None:  # the loss does not depend on it
                optimized.grad = torch.zeros_like(optimized)
            gradients.append(optimized.grad)
    return gradients


def as_dtensor(local: Tensor, like: Tensor) -> Tensor:
    """The DTensor whose local shard is given, sharded as `like` is. Plain tensors and scalars stay as they are."""
    if not isinstance(like, DTensor) or local.dim() == 0:
        return local
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def full_tensor(local: Tensor, like: Tensor) -> Tensor:
    """The whole tensor, gathered from shards that are laid out as those of `like`. Every rank must call it."""
    return cast(DTensor, as_dtensor(local, like)).full_tensor() if isinstance(like, DTensor) else local


def local_part(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a tensor that every rank holds whole, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def _whole(tensor: Tensor) -> Tensor:
    """The whole tensor; buffers are not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def full_network(network: Network) -> Network:
    """The network with whole weights, for sampling. It is returned as it is unless sharded. Every rank must call it."""
    if not isinstance(network, FSDPModule):
        return network
    whole = build_like(network)
    tensors = {name: _whole(tensor) for name, tensor in network.state_dict().items()}
    whole.load_state_dict(tensors, assign=True)
    return whole.eval().requires_grad_(False)
