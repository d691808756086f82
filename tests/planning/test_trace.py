"""Memory and operators of a trace, against the same computation on real tensors."""

import copy

import pytest
import torch

from tessera.acceleration.activation_checkpointing import checkpoint_activations
from tessera.conditioning import Condition
from tessera.models.dit import DiTConfig
from tessera.planning.op_profiler import OpProfiler
from tessera.planning.trace import Recorder, fake_tensors, meta_network

ROWS = 3


def make_config(block: str, **changes) -> DiTConfig:
    sizes = {
        "input_size": 8,
        "in_channels": 2,
        "out_channels": 4,
        "num_classes": 5,
        "patch_size": 2,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
    }
    return DiTConfig.model_validate(sizes | {"block": block} | changes)


def loss(network, dtype):
    """The loss of a forward pass, and the bytes saved for the backward pass: unique storages except parameters."""
    parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    storages = {}

    def pack(tensor):
        storages.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    inputs = torch.rand(ROWS, 2, 8, 8), torch.rand(ROWS), Condition(torch.zeros(ROWS, dtype=torch.int64))
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        raw = network(*inputs)
    saved = sum(tensor.untyped_storage().nbytes() for key, tensor in storages.items() if key not in parameters)
    return raw.float().square().mean(), saved


def trace(config: DiTConfig, what="none", dtype=None):
    network = copy.deepcopy(meta_network(config))
    with fake_tensors(), Recorder() as recorder:
        network.to_empty(device="cpu")
        checkpoint_activations(network, what)
        before = recorder.lap().live_bytes
        value, saved = loss(network, dtype)
        forward = recorder.lap()
        value.backward()
        backward = recorder.lap()
    return saved, forward.live_bytes - before, forward, backward


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("block", ["adaln-zero", "in-context", "cross-attention", "rope-swiglu"])
def test_saved_bytes_are_those_of_a_real_step(block, dtype):
    _, real = loss(make_config(block).build(), dtype)
    saved, live_bytes, _, _ = trace(make_config(block), dtype=dtype)
    assert saved == real
    # Alive at the end of the forward pass: that, and the few tensors of the output and its loss.
    assert 0 <= live_bytes - real <= 10 * ROWS * 4 * 8 * 8 * 4


@pytest.mark.parametrize("what", ["none", "selective", "blocks"])
def test_live_and_peak_bytes_are_those_of_a_real_step(what):
    network = make_config("adaln-zero").build()
    checkpoint_activations(network, what)
    with Recorder() as recorder:
        value, _ = loss(network, None)
        forward = recorder.lap()
        value.backward()
        backward = recorder.lap()
    _, live_bytes, _, fake_backward = trace(make_config("adaln-zero"), what)
    weights = sum(parameter.nbytes for parameter in network.parameters())
    assert live_bytes == forward.live_bytes
    assert fake_backward.peak_bytes - weights == backward.peak_bytes
    assert fake_backward.operators == backward.operators


def test_activation_checkpointing_saves_memory_and_costs_flops():
    live_bytes, flops = {}, {}
    for what in ("none", "selective", "blocks"):
        _, live_bytes[what], forward, backward = trace(make_config("adaln-zero", depth=4), what)
        flops[what] = forward.flops + backward.flops
    assert live_bytes["none"] > live_bytes["selective"] > live_bytes["blocks"]
    assert flops["none"] == flops["selective"] < flops["blocks"]


def test_every_block_adds_the_same_memory():
    def sizes(depth):
        _, live_bytes, _, backward = trace(make_config("rope-swiglu", depth=depth))
        return live_bytes, backward.peak_bytes

    two, four, nine = sizes(2), sizes(4), sizes(9)
    for a, b, whole in zip(two, four, nine):
        assert a + (b - a) / 2 * 7 == pytest.approx(whole, rel=0.01)


def test_a_profile_is_the_sum_of_operators_and_cached(tmp_path):
    _, _, forward, _ = trace(make_config("adaln-zero"))
    profiler = OpProfiler(torch.device("cpu"), tmp_path)
    (once,) = profiler(forward)
    assert 0 < once < 10
    again = OpProfiler(torch.device("cpu"), tmp_path)
    assert again(forward, forward) == [once, once]  # from the cache
    forward.views += 1000
    assert again(forward)[0] - once == pytest.approx(1000 * again.overhead)
    profiler.path.write_text("damaged")
    assert OpProfiler(torch.device("cpu"), tmp_path)(forward)[0] > 0
