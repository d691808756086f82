"""What is recomputed changes the memory of a step and nothing else."""

import copy

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tessera.adapters.compilation import compiled
from tessera.adapters.recomputation import recompute
from tessera.conditions import Condition
from tessera.models.dit import DiT, DiTConfig

DESIGNS = ("in-context", "cross-attention", "adaln", "adaln-zero", "adaln-single", "modern")
SIZES = {"size": 8, "channels": 3, "outputs": 6, "classes": 3, "depth": 3, "width": 32, "heads": 4}


@pytest.fixture
def make(randomise):
    def build(block: str = "adaln-zero", **changes) -> DiT:
        return randomise(DiTConfig.model_validate({**SIZES, "block": block, **changes}).build()).train()

    return build


def loss(network) -> Tensor:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return network(x, torch.tensor([0.0, 10.0, 500.0, 999.0]), Condition([0, 1, 2, -1])).square().mean()


def gradients(network: DiT, forward=None) -> dict[str, Tensor]:
    network.zero_grad(set_to_none=True)
    loss(forward or network).backward()
    return {name: held.grad.clone() for name, held in network.named_parameters() if held.requires_grad}


class Storages(TorchDispatchMode):
    """Every storage that operations make, for as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, operation, types, inputs=(), named=None):
        made = operation(*inputs, **(named or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.made[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return made

    def alive(self) -> int:
        """Bytes."""
        return sum(size for storage, size in self.made.items() if not storage.expired())


@pytest.mark.parametrize("what", ["blocks", "selective"])
@pytest.mark.parametrize("design", DESIGNS)
def test_gradients_are_the_same_to_the_bit(design, what, make):
    network = make(design)
    expected, names = gradients(network), list(network.state_dict())
    recompute(network, what)
    got = gradients(network)
    assert list(network.state_dict()) == names
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


def calls(network: DiT, monkeypatch) -> list[int]:
    """How often the parts of the first block run in a forward and backward pass: norm, projection, MLP's GELU."""
    block, counts = network.blocks[0], [0, 0, 0]
    parts = [(block.norm1, "forward"), (block.attn.proj, "forward"), (block.mlp.act, "forward")]
    with monkeypatch.context() as patch:
        for place, (module, name) in enumerate(parts):

            def counted(*inputs, place=place, call=getattr(module, name)):
                counts[place] += 1
                return call(*inputs)

            patch.setattr(module, name, counted)
        loss(network).backward()
    return counts


def test_blocks_run_twice_and_without_gradients_once(make, monkeypatch):
    network = make()
    assert calls(network, monkeypatch) == [1, 1, 1]
    recompute(network, "blocks")
    assert calls(network, monkeypatch) == [2, 2, 2]
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr("tessera.adapters.recomputation.checkpoint", lambda *_, **__: pytest.fail("recomputes"))
        loss(network)
    recompute(network, "none")
    assert calls(network, monkeypatch) == [1, 1, 1]


def test_selective_multiplies_no_matrices_twice(make):
    """Counted by PyTorch's own counter of operations, whose attention is part of it."""
    from torch.utils.flop_counter import FlopCounterMode

    network, counts = make(), {}
    for what in ("none", "selective", "blocks"):
        recompute(network, what)
        with FlopCounterMode(display=False) as counter:
            loss(network).backward()
        counts[what] = counter.get_total_flops()
    assert counts["selective"] == counts["none"]
    assert 1.3 < counts["blocks"] / counts["none"] < 1.34  # nearly all of the work is in the blocks


def test_what_a_block_keeps(make):
    """Of adaLN-Zero: its input alone, or with it what the matrix products (q, k, v; projection; the MLP's two; the
    steering vectors) and attention gave."""
    batch, tokens, width, heads = 4, 16, 32, 4
    bytes_of = {"blocks": 4 * batch * tokens * width}
    bytes_of["selective"] = bytes_of["blocks"] * (1 + 3 + 1 + 1 + 4 + 1) + 4 * batch * (6 * width + heads * tokens)
    for what, expected in bytes_of.items():
        alive = []
        for depth in (3, 4):
            network = make(depth=depth)
            recompute(network, what)
            with Storages() as storages:
                held = loss(network)
            alive.append(storages.alive())
            del held
        assert alive[1] - alive[0] == expected, what


def test_copies_made_before_and_after_are_of_their_own(make):
    network = make()
    before = copy.deepcopy(network)
    recompute(network, "blocks")
    after = copy.deepcopy(network)
    assert "forward" not in before.blocks[0].__dict__
    with torch.no_grad():
        after.blocks[0].mlp.fc2.weight.zero_()
    assert not torch.equal(loss(after), loss(network))
    assert torch.equal(loss(before), loss(network))


@pytest.mark.parametrize("what", ["blocks", "selective"])
def test_compiled_block_by_block_gradients_are_the_same(what, make, monkeypatch):
    network = make(depth=2)
    expected = gradients(network)
    true = torch.compile
    # All of it but the code made by a compiler, which takes a minute.
    monkeypatch.setattr(torch, "compile", lambda call, **more: true(call, backend="aot_eager", **more))
    recompute(network, what)
    forward, reason = compiled(network, "blocks")
    assert reason is None
    got = gradients(network, forward)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("what", ["blocks", "selective"])
def test_sharded_afterwards_gradients_are_the_same(what, make):
    """FSDP2 on one process: weights are gathered again before what is recomputed needs them."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network = make()
    expected = gradients(network)
    recompute(network, what)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in network.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(network, mesh=mesh)
        loss(network).backward()
        for name, held in network.named_parameters():
            if held.requires_grad:
                torch.testing.assert_close(held.grad.full_tensor(), expected[name], msg=name)
    finally:
        distributed.destroy_process_group()
