"""One network over many processes, from outside: FSDP2 on a mesh of replicas by shards. Sharding lives only here.

A mesh of n x m processes holds n copies of the weights, each in m parts: n x 1 is plain replication, 1 x m full
sharding, all else hybrid. What is sharded are the weights being trained, the averages, and with them the optimizer's
memory. The optimizer and the averages work on each process's own parts as plain tensors: element by element nothing
else is needed, and what needs whole matrices (Muon) asks for them.
"""

import warnings
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tessera.errors import TesseraError
from tessera.models.network import Network
from tessera.runtime import Distributed


class ParallelContext:
    """The processes of a run and how they share it: `replicas` copies of the weights, each in `shards` parts."""

    def __init__(self, world: Distributed = Distributed(), shard: int | str = 1, device: str = "cpu") -> None:  # noqa: B008 (frozen)
        """shard: processes that hold one copy between them, or "all". Raises TesseraError if they cannot be divided."""
        self.ranks = world
        self.shards = world.world_size if shard == "all" else int(shard)
        if world.world_size == 1:
            self.shards = 1  # the same recipe on one machine
        if world.world_size % self.shards:
            raise TesseraError(
                f"training.fsdp is {shard}, but {world.world_size} processes cannot be divided into groups of {shard}: "
                "choose a divisor, or all"
            )
        self.replicas = world.world_size // self.shards
        self.mesh: DeviceMesh | None = None
        self._votes: tuple[Tensor, distributed.Work] | None = None
        if world.world_size > 1:
            self.mesh = init_device_mesh(device, (self.replicas, self.shards), mesh_dim_names=("replica", "shard"))
            self._control = distributed.new_group(backend="gloo")

    def distribute(self, network: Network) -> None:
        """Put a network's weights onto the mesh, in place: block by block, then the rest."""
        if self.mesh is None:
            return
        # What the readout returns is a view; nobody here writes into it.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        again = self.shards > 1  # gathered again for the backward pass, so that whole weights are never held together
        for block in network.blocks:
            fully_shard(block, mesh=self.mesh, reshard_after_forward=again)
        fully_shard(network, mesh=self.mesh, reshard_after_forward=False)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place; the same bits on all."""
        if self.ranks.world_size > 1:
            distributed.all_reduce(values)
        return values

    def begin_flag_reduction(self, *flags: bool) -> None:
        """Begin to tell the others what this process wishes; `outcome` says it later, so that nobody waits."""
        if self.ranks.world_size > 1:
            votes = torch.tensor(flags, dtype=torch.uint8)
            work = distributed.all_reduce(votes, distributed.ReduceOp.MAX, group=self._control, async_op=True)
            self._votes = votes, cast(distributed.Work, work)

    def reduced_flags(self, *now: bool) -> list[bool]:
        """For each flag of the last `vote`, whether any process had raised it; a process alone knows what is `now`."""
        if self._votes is None:
            return list(now)
        votes, work = self._votes
        work.wait()
        return [bool(vote) for vote in votes.tolist()]


def local_batch(batch: int, rounds: int, ranks: Distributed) -> slice:
    """This process's part of a batch. Raises TesseraError if some process would have nothing to do in a round."""
    count, rank = ranks.world_size, ranks.rank
    if batch // count < rounds:
        raise TesseraError(
            f"training.global_batch_size {batch} is too small for {count} processes: some would have nothing to do; choose a "
            "larger batch or fewer processes"
        )
    return slice(batch * rank // count, batch * (rank + 1) // count)


@contextmanager
def one_reduction(network: Network, last: bool):
    """Gradients of a backward pass stay with each process unless it is the last of a step."""
    if not isinstance(network, FSDPModule):
        yield
        return
    network.set_requires_gradient_sync(last)
    network.set_is_last_backward(last)
    yield


def reshard(network: Network) -> None:
    """Let go of the weights that a pass without gradients gathered; until then parameters are not what they seem."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing its memory; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def trained(network: Network) -> dict[str, nn.Parameter]:
    """What an optimizer is given: each trained parameter, or this process's part of it, which shares its memory."""
    told = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    if not isinstance(network, FSDPModule):
        return told
    return {name: nn.Parameter(local(parameter.detach())) for name, parameter in told.items()}


def collect_gradients(network: Network, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The gradients of all that an optimizer trains, in its order; those of parts are handed to the parts."""
    found = []
    for group in optimizer.param_groups:
        for name, held in zip(group["param_names"], group["params"]):
            parameter = network.get_parameter(name)
            if parameter is not held and parameter.grad is not None:
                held.grad, parameter.grad = local(parameter.grad), None
            if held.grad is None:  # nothing depended on it
                held.grad = torch.zeros_like(held)
            found.append(held.grad)
    return found


def full_tensor(part: Tensor, like: Tensor) -> Tensor:
    """All parts of a tensor that is divided as `like` is, put together; every process must ask."""
    return cast(DTensor, divided(part, like)).full_tensor() if isinstance(like, DTensor) else part


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that every process has whole, to be divided as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def divided(part: Tensor, like: Tensor) -> Tensor:
    """A tensor of which every process holds a part as it does of `like`, for checkpoints."""
    if not isinstance(like, DTensor) or part.dim() == 0:
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def full_network(network: Network) -> Network:
    """The network in one piece, to draw with: itself unless it is divided. Every process must ask."""
    if not isinstance(network, FSDPModule):
        return network
    with torch.device("meta"):
        plain = network.config.build()
    tensors = {name: cast(DTensor, tensor).full_tensor() for name, tensor in network.state_dict().items()}
    plain.load_state_dict(tensors, assign=True)
    return plain.eval().requires_grad_(False)
