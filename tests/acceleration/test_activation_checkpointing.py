"""What is recomputed changes the memory of a step and nothing else."""

import copy

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tessera.acceleration.activation_checkpointing import checkpoint_activations
from tessera.acceleration.compilation import compiled
from tessera.conditioning import Condition
from tessera.models.dit import DiT, DiTConfig
from tessera.models.unet import UNetConfig

DESIGNS = ("in-context", "cross-attention", "adaln", "adaln-zero", "adaln-single", "rope-swiglu")
SIZES = {
    "input_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "num_classes": 3,
    "depth": 3,
    "hidden_size": 32,
    "num_heads": 4,
}


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
    """Every storage that operations make beside a network's weights, for as long as it lives."""

    def __init__(self, network: DiT) -> None:
        super().__init__()
        self.made: dict[StorageWeakRef, int] = {}
        self.weights = {StorageWeakRef(weight.untyped_storage()) for weight in network.parameters()}

    def __torch_dispatch__(self, operation, types, inputs=(), named=None):
        made = operation(*inputs, **(named or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.made[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return made

    def alive(self) -> int:
        """Bytes."""
        return sum(size for made, size in self.made.items() if not made.expired() and made not in self.weights)


@pytest.mark.parametrize("what", ["blocks", "selective"])
def test_a_unet_keeps_less_and_its_gradients_are_the_same_to_the_bit(what, randomise):
    facts = {name: SIZES[name] for name in ("size", "channels", "outputs", "classes")}
    network = randomise(
        UNetConfig(**facts, model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(2,)).build()
    ).train()
    expected = gradients(network)
    kept = {}
    for each in ("none", what):
        checkpoint_activations(network, each)
        with Storages(network) as storages:
            held = loss(network)
        kept[each] = storages.alive()
        held.backward()
    assert kept[what] < 0.8 * kept["none"]
    found = gradients(network)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("what", ["blocks", "selective"])
@pytest.mark.parametrize("design", DESIGNS)
def test_gradients_are_the_same_to_the_bit(design, what, make):
    network = make(design)
    expected, names = gradients(network), list(network.state_dict())
    checkpoint_activations(network, what)
    got = gradients(network)
    assert list(network.state_dict()) == names
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


def test_blocks_run_twice_and_without_gradients_once(make, monkeypatch):
    network = make()
    passes = []
    network.blocks[0].norm2.register_forward_hook(lambda *_: passes.append(1))
    for what, expected in (("none", 1), ("blocks", 2), ("selective", 2), ("none", 1)):
        checkpoint_activations(network, what)
        passes.clear()
        loss(network).backward()
        assert len(passes) == expected
    checkpoint_activations(network, "blocks")
    monkeypatch.setattr(
        "tessera.acceleration.activation_checkpointing.checkpoint", lambda *_, **__: pytest.fail("recomputes")
    )
    with torch.no_grad():
        loss(network)


def test_selective_multiplies_no_matrices_twice(make):
    """Counted by PyTorch's own counter of operations, whose attention is part of it."""
    from torch.utils.flop_counter import FlopCounterMode

    network, counts = make(), {}
    for what in ("none", "selective", "blocks"):
        checkpoint_activations(network, what)
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
            checkpoint_activations(network, what)
            with Storages(network) as storages:
                held = loss(network)
            alive.append(storages.alive())
            del held
        assert alive[1] - alive[0] == expected, what


def test_copies_made_before_and_after_are_of_their_own(make):
    network = make()
    before = copy.deepcopy(network)
    checkpoint_activations(network, "blocks")
    after = copy.deepcopy(network)
    assert "forward" not in before.blocks[0].__dict__
    with torch.no_grad():
        after.blocks[0].mlp.fc2.weight.zero_()
    assert not torch.equal(loss(after), loss(network))
    assert torch.equal(loss(before), loss(network))


def without_a_compiler(monkeypatch) -> None:
    """From now on compiling is all of it but the making of code, which takes a minute."""
    true = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **more: true(call, backend="aot_eager", **more))
    torch._dynamo.reset()


@pytest.mark.parametrize("what", ["blocks", "selective"])
def test_compiled_block_by_block_gradients_are_the_same(what, make, monkeypatch):
    network = make(depth=2)
    expected = gradients(network)
    without_a_compiler(monkeypatch)
    checkpoint_activations(network, what)
    forward, reason = compiled(network, "blocks")
    assert reason is None
    got = gradients(network, forward)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("how", ["off", "blocks"])
@pytest.mark.parametrize("what", ["none", "blocks", "selective"])
def test_sharded_afterwards_gradients_are_the_same(what, how, make, monkeypatch):
    """FSDP2 on one process: weights are gathered again before what is recomputed needs them."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network = make()
    expected = gradients(network)
    without_a_compiler(monkeypatch)
    checkpoint_activations(network, what)
    assert compiled(network, how) == (network, None)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in network.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(network, mesh=mesh)
        loss(network).backward()
        for name, held in network.named_parameters():
            if held.requires_grad:
                torch.testing.assert_close(held.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-6, msg=name)
    finally:
        distributed.destroy_process_group()
