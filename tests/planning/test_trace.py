"""What a trace says of memory and operators, against the same computation on real tensors."""

import copy

import pytest
import torch

from tessera.acceleration.activation_checkpointing import checkpoint_activations
from tessera.conditioning import Condition
from tessera.models.dit import DiTConfig
from tessera.planning.op_profiler import OpProfiler
from tessera.planning.trace import Recorder, fake, outline

ROWS = 3


def config(block: str, **changes) -> DiTConfig:
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
    """Of a forward pass, and what `saved_tensors_hooks` saw of it: bytes of unique storages, parameters apart."""
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    seen = {}

    def pack(tensor):
        seen.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    inputs = torch.rand(ROWS, 2, 8, 8), torch.rand(ROWS), Condition(torch.zeros(ROWS, dtype=torch.int64))
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        raw = network(*inputs)
    saved = sum(tensor.untyped_storage().nbytes() for key, tensor in seen.items() if key not in own)
    return raw.float().square().mean(), saved


def traced(told: DiTConfig, what="none", dtype=None):
    network = copy.deepcopy(outline(told))
    with fake(), Recorder() as recorder:
        network.to_empty(device="cpu")
        checkpoint_activations(network, what)
        before = recorder.lap().kept
        value, saved = loss(network, dtype)
        forward = recorder.lap()
        value.backward()
        backward = recorder.lap()
    return saved, forward.kept - before, forward, backward


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("block", ["adaln-zero", "in-context", "cross-attention", "rope-swiglu"])
def test_saved_bytes_are_those_of_a_real_step(block, dtype):
    _, real = loss(config(block).build(), dtype)
    saved, kept, _, _ = traced(config(block), dtype=dtype)
    assert saved == real
    # What lives at the end of the forward pass is that, and the few tensors of the output and its loss.
    assert 0 <= kept - real <= 10 * ROWS * 4 * 8 * 8 * 4


@pytest.mark.parametrize("what", ["none", "selective", "blocks"])
def test_all_that_lives_is_as_much_as_in_a_real_step(what):
    network = config("adaln-zero").build()
    checkpoint_activations(network, what)
    with Recorder() as recorder:
        value, _ = loss(network, None)
        forward = recorder.lap()
        value.backward()
        backward = recorder.lap()
    _, kept, _, guessed = traced(config("adaln-zero"), what)
    held = sum(parameter.nbytes for parameter in network.parameters())
    assert kept == forward.kept
    assert guessed.peak - held == backward.peak
    assert guessed.operators == backward.operators


def test_recomputing_keeps_less_and_computes_more():
    kept, flops = {}, {}
    for what in ("none", "selective", "blocks"):
        _, kept[what], forward, backward = traced(config("adaln-zero", depth=4), what)
        flops[what] = forward.flops + backward.flops
    assert kept["none"] > kept["selective"] > kept["blocks"]
    assert flops["none"] == flops["selective"] < flops["blocks"]


def test_every_block_adds_the_same():
    def sizes(depth):
        _, kept, _, backward = traced(config("rope-swiglu", depth=depth))
        return kept, backward.peak

    two, four, nine = sizes(2), sizes(4), sizes(9)
    for a, b, whole in zip(two, four, nine):
        assert a + (b - a) / 2 * 7 == pytest.approx(whole, rel=0.01)


def test_a_stopwatch_adds_up_and_remembers(tmp_path):
    _, _, forward, _ = traced(config("adaln-zero"))
    watch = OpProfiler(torch.device("cpu"), tmp_path)
    (once,) = watch(forward)
    assert 0 < once < 10
    again = OpProfiler(torch.device("cpu"), tmp_path)
    assert again(forward, forward) == [once, once]  # read, not measured again
    forward.views += 1000
    assert again(forward)[0] - once == pytest.approx(1000 * again.overhead)
    watch.path.write_text("damaged")
    assert OpProfiler(torch.device("cpu"), tmp_path)(forward)[0] > 0
