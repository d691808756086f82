"""Activation checkpointing changes the memory of a step and nothing else."""

import copy

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tessera.acceleration.activation_checkpointing import checkpoint_activations
from tessera.acceleration.compilation import compile_network
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
    return {name: weight.grad.clone() for name, weight in network.named_parameters() if weight.requires_grad}


class Storages(TorchDispatchMode):
    """Records every storage that operations allocate, except a network's weights."""

    def __init__(self, network: DiT) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.weights = {StorageWeakRef(weight.untyped_storage()) for weight in network.parameters()}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self.sizes[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return output

    def alive(self) -> int:
        """Bytes of the storages that still exist."""
        return sum(size for ref, size in self.sizes.items() if not ref.expired() and ref not in self.weights)


@pytest.mark.parametrize("mode", ["blocks", "selective"])
def test_a_unet_stores_less_and_its_gradients_are_bitwise_equal(mode, randomise):
    sizes = {name: SIZES[name] for name in ("input_size", "in_channels", "out_channels", "num_classes")}
    network = randomise(
        UNetConfig(**sizes, model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(2,)).build()
    ).train()
    expected = gradients(network)
    stored_bytes = {}
    for each in ("none", mode):
        checkpoint_activations(network, each)
        with Storages(network) as storages:
            value = loss(network)
        stored_bytes[each] = storages.alive()
        value.backward()
    assert stored_bytes[mode] < 0.8 * stored_bytes["none"]
    got = gradients(network)
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize("mode", ["blocks", "selective"])
@pytest.mark.parametrize("design", DESIGNS)
def test_gradients_are_bitwise_equal(design, mode, make):
    network = make(design)
    expected, names = gradients(network), list(network.state_dict())
    checkpoint_activations(network, mode)
    got = gradients(network)
    assert list(network.state_dict()) == names
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


def test_blocks_run_twice_with_gradients_and_once_without(make, monkeypatch):
    network = make()
    passes = []
    network.blocks[0].norm2.register_forward_hook(lambda *_: passes.append(1))
    for mode, expected in (("none", 1), ("blocks", 2), ("selective", 2), ("none", 1)):
        checkpoint_activations(network, mode)
        passes.clear()
        loss(network).backward()
        assert len(passes) == expected
    checkpoint_activations(network, "blocks")
    monkeypatch.setattr(
        "tessera.acceleration.activation_checkpointing.checkpoint", lambda *_, **__: pytest.fail("recomputes")
    )
    with torch.no_grad():
        loss(network)


def test_selective_mode_recomputes_no_matrix_product(make):
    """By PyTorch's FLOP counter, which includes attention."""
    from torch.utils.flop_counter import FlopCounterMode

    network, counts = make(), {}
    for mode in ("none", "selective", "blocks"):
        checkpoint_activations(network, mode)
        with FlopCounterMode(display=False) as counter:
            loss(network).backward()
        counts[mode] = counter.get_total_flops()
    assert counts["selective"] == counts["none"]
    assert 1.3 < counts["blocks"] / counts["none"] < 1.34  # nearly all of the work is in the blocks


def test_bytes_that_a_block_stores(make):
    """For adaLN-Zero: the input, and in selective mode the outputs of attention and of the matrix products (q, k, v;
    the projection; the two of the MLP; modulation)."""
    batch, tokens, width, heads = 4, 16, 32, 4
    bytes_of = {"blocks": 4 * batch * tokens * width}
    bytes_of["selective"] = bytes_of["blocks"] * (1 + 3 + 1 + 1 + 4 + 1) + 4 * batch * (6 * width + heads * tokens)
    for mode, expected in bytes_of.items():
        alive = []
        for depth in (3, 4):
            network = make(depth=depth)
            checkpoint_activations(network, mode)
            with Storages(network) as storages:
                value = loss(network)
            alive.append(storages.alive())
            del value
        assert alive[1] - alive[0] == expected, mode


def test_copies_made_before_and_after_are_independent(make):
    network = make()
    before = copy.deepcopy(network)
    checkpoint_activations(network, "blocks")
    after = copy.deepcopy(network)
    assert "forward" not in before.blocks[0].__dict__
    with torch.no_grad():
        after.blocks[0].mlp.fc2.weight.zero_()
    assert not torch.equal(loss(after), loss(network))
    assert torch.equal(loss(before), loss(network))


def use_eager_backend(monkeypatch) -> None:
    """Compile without code generation, which takes a minute."""
    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: original(function, backend="aot_eager", **options)
    )
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["blocks", "selective"])
def test_compiled_block_by_block_gradients_are_the_same(mode, make, monkeypatch):
    network = make(depth=2)
    expected = gradients(network)
    use_eager_backend(monkeypatch)
    checkpoint_activations(network, mode)
    forward, reason = compile_network(network, "blocks")
    assert reason is None
    got = gradients(network, forward)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("compile_mode", ["off", "blocks"])
@pytest.mark.parametrize("mode", ["none", "blocks", "selective"])
def test_sharded_afterwards_gradients_are_the_same(mode, compile_mode, make, monkeypatch):
    """FSDP2 on one process: weights are gathered again before the recomputation."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network = make()
    expected = gradients(network)
    use_eager_backend(monkeypatch)
    checkpoint_activations(network, mode)
    assert compile_network(network, compile_mode) == (network, None)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in network.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(network, mesh=mesh)
        loss(network).backward()
        for name, weight in network.named_parameters():
            if weight.requires_grad:
                torch.testing.assert_close(weight.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-6, msg=name)
    finally:
        distributed.destroy_process_group()
