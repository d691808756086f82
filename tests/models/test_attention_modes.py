"""Attention modes of clips: what attends to what, on one set of weights, at which cost."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from tessera.conditioning import Condition
from tessera.layers.frames import ClipAttention, Temporal, attend
from tessera.models import DiTConfig, UNetConfig
from tessera.models.network import parameter_count

FRAMES, TOKENS = 5, 6
# Whether frame `key` is attended to from frame `query`.
MODES = {
    "full": lambda query, key: True,
    "spatial": lambda query, key: query == key,
    "temporal": lambda query, key: True,
    "alternating": None,
    "window": lambda query, key: abs(query - key) <= 2,
    "window radius 1": lambda query, key: abs(query - key) <= 1,
    "causal": lambda query, key: key <= query,
    "causal past 2": lambda query, key: query - 2 <= key <= query,
    "previous": lambda query, key: key == max(0, query - 1),
    "previous own": lambda query, key: key in (query, max(0, query - 1)),
    "previous first": lambda query, key: key in (0, max(0, query - 1)),
    "previous first own": lambda query, key: key in (0, query, max(0, query - 1)),
}
LABEL, TIMES = torch.tensor([0, 2]), torch.tensor([3.0, 700.5])


def settings(name: str) -> dict:
    """The settings of a mode, from its kind and its options."""
    kind, *options = name.split()
    values = {"radius": 1, "past": 2, "own": True, "first": True}
    return {"kind": kind, **{option: values[option] for option in options if option in values}}


def config(mode: str | None = None, block: str = "adaln-zero", size: tuple[int, ...] = (FRAMES, 4, 6), **changes):
    attention = {} if mode is None else {"attention": settings(mode)}
    if block == "unet":
        inputs = {"input_size": size, "in_channels": 2, "out_channels": 4, "num_classes": 3}
        shape = {"model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_levels": (2,)}
        return UNetConfig.model_validate({**inputs, **shape, **attention, **changes})
    sizes = {"patch_size": 2, "depth": 2, "hidden_size": 32, "num_heads": 2, "num_classes": 3}
    inputs = {"input_size": size, "in_channels": 2, "out_channels": 4, "block": block}
    return DiTConfig.model_validate({**sizes, **inputs, **attention, **changes})


@pytest.fixture
def make(randomise):
    return lambda *args, **changes: randomise(config(*args, **changes).build()).eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def token_mask(mode: str, count: int = FRAMES, total: int = FRAMES) -> Tensor:
    """bool [count S, total S], from the definition: the last `count` of `total` frames attend"""
    mask = torch.zeros(count * TOKENS, total * TOKENS, dtype=torch.bool)
    for query in range(count * TOKENS):
        for key in range(total * TOKENS):
            frames = query // TOKENS + total - count, key // TOKENS
            same_place = mode != "temporal" or query % TOKENS == key % TOKENS
            mask[query, key] = same_place and MODES[mode](*frames)
    return mask


SINGLE = [mode for mode in MODES if mode != "alternating"]
ALL_MODES = pytest.mark.parametrize("mode", MODES)


@pytest.mark.parametrize("mode", SINGLE)
@pytest.mark.parametrize("text", ["none", "keys", "masked keys", "offset keys"])
def test_attention_is_full_attention_with_a_mask(mode, text):
    q, k, v = (normal(2, 3, FRAMES * TOKENS, 8, seed=seed) for seed in range(3))
    clip = ClipAttention(config(mode).attention, (FRAMES, 2, 3))
    mask = token_mask(mode).float().log().expand(2, 3, -1, -1)
    further, own_mask = None, None
    if text != "none":
        further = normal(2, 3, 4, 8, seed=5), normal(2, 3, 4, 8, seed=6)
        valid = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0]]).bool()[:, None, None]
        logits = torch.zeros(2, 3, 1, 4)
        if text != "keys":
            own_mask, logits = valid, valid.float().log().expand(2, 3, 1, 4)
        if text == "offset keys":
            own_mask = logits = torch.where(valid, normal(3, seed=7)[:, None, None], -math.inf)
        mask = torch.cat((logits.expand(-1, -1, FRAMES * TOKENS, -1), mask), dim=3)
        k, v = (torch.cat(pair, dim=2) for pair in zip(further, (k, v)))
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    skip = 0 if further is None else 4
    result = attend(q, k[:, :, skip:], v[:, :, skip:], clip, further, own_mask)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [mode for mode in SINGLE if config(mode).attention.is_causal])
@pytest.mark.parametrize("count", [1, 2])
def test_attention_with_keys_of_earlier_frames(mode, count):
    q, k, v = (normal(2, 3, FRAMES * TOKENS, 8, seed=seed) for seed in range(3))
    grid, first = (FRAMES, 2, 3), (FRAMES - count) * TOKENS
    whole = attend(q, k, v, ClipAttention(config(mode).attention, grid))
    past = k[:, :, :first], v[:, :, :first]
    clip = ClipAttention(config(mode).attention, (count, 2, 3), past)
    result = attend(q[:, :, first:], k[:, :, first:], v[:, :, first:], clip)
    torch.testing.assert_close(result, whole[:, :, first:], rtol=1e-4, atol=1e-5)


BLOCKS = ["cross-attention", "adaln", "adaln-zero", "adaln-single", "rope-swiglu"]


NETWORKS = [(mode, block) for mode in MODES for block in [*BLOCKS, "unet"] if (mode, block) != ("alternating", "unet")]


@torch.no_grad()
@pytest.mark.parametrize(("mode", "block"), NETWORKS)
@pytest.mark.parametrize("temporal", [False, True])
def test_one_frame_is_the_image_network_bit_for_bit(make, mode, block, temporal):
    image = make(None, block, (4, 6))
    clip = make(mode, block, temporal_attention=temporal)
    extra = clip.load_state_dict(image.state_dict(), strict=False)
    assert not extra.unexpected_keys
    assert bool(extra.missing_keys) == temporal
    x = normal(2, 2, 4, 6)
    expected = image(x, TIMES, Condition(LABEL))
    assert torch.equal(clip(x[:, :, None], TIMES, Condition(LABEL)), expected[:, :, None])
    assert torch.equal(clip(x[:, :, None], TIMES[:, None], Condition(LABEL)), expected[:, :, None])


@torch.no_grad()
@pytest.mark.parametrize(("mode", "block"), NETWORKS)
def test_equal_times_of_all_frames_are_one_time_bit_for_bit(make, mode, block):
    network, x = make(mode, block), normal(2, 2, FRAMES, 4, 6)
    one = network(x, TIMES, Condition(LABEL))
    assert torch.equal(network(x, TIMES[:, None].expand(-1, FRAMES), Condition(LABEL)), one)


@torch.no_grad()
@pytest.mark.parametrize(("mode", "block"), NETWORKS)
def test_frames_may_be_shuffled_without_frame_positions(make, mode, block):
    """Where the mode itself does not know their order: the output of a shuffled clip is shuffled."""
    times = torch.tensor([[1.0, 500, 20, 7, 900], [3, 4, 5, 6, 7]])
    order, x = torch.tensor([3, 0, 4, 1, 2]), normal(2, 2, FRAMES, 4, 6)
    for positions in ("none", "all", "temporal"):
        network = make(mode, block, frame_positions=positions, temporal_attention=True)
        t = TIMES[:, None].expand(-1, FRAMES) if block == "cross-attention" else times
        whole, shuffled = network(x, t, Condition(LABEL)), network(x[:, :, order], t[:, order], Condition(LABEL))
        same = torch.allclose(shuffled, whole[:, :, order], atol=1e-5)
        assert same == (positions == "none" and mode in ("full", "spatial", "temporal", "alternating"))


@torch.no_grad()
@ALL_MODES
@pytest.mark.parametrize("block", ["adaln-zero", "rope-swiglu"])
def test_a_frame_depends_on_the_frames_that_the_mode_allows(make, mode, block):
    """Through two blocks: on the frames that are reached in two steps."""
    network, x = make(mode, block), normal(2, 2, FRAMES, 4, 6)
    reach = torch.ones(FRAMES, FRAMES, dtype=torch.bool)
    if MODES[mode] is not None:
        step = torch.tensor([[MODES[mode](q, k) or q == k for k in range(FRAMES)] for q in range(FRAMES)]).float()
        reach = step @ step > 0
    whole = network(x, TIMES, Condition(LABEL))
    for frame in range(FRAMES):
        other = x.clone()
        other[:, :, frame] += 1
        change = (network(other, TIMES, Condition(LABEL)) - whole).abs().amax(dim=(0, 1, 3, 4))
        assert torch.equal(change > 1e-6, reach[:, frame])


@torch.no_grad()
def test_alternating_is_spatial_then_temporal(make):
    network = make("alternating", "rope-swiglu")
    spatial, temporal = make("spatial", "rope-swiglu"), make("temporal", "rope-swiglu")
    tokens, context = network.embed(normal(2, 2, FRAMES, 4, 6), TIMES, Condition(LABEL))
    first = spatial.run_blocks(tokens, spatial.embed(normal(2, 2, FRAMES, 4, 6), TIMES, Condition(LABEL))[1], end=1)
    other = temporal.embed(normal(2, 2, FRAMES, 4, 6), TIMES, Condition(LABEL))[1]
    assert torch.equal(network.run_blocks(tokens, context), temporal.run_blocks(first, other, start=1))


@torch.no_grad()
@pytest.mark.parametrize("block", [*BLOCKS, "unet"])
def test_frame_positions_of_temporal_attention_alone(make, block):
    """Without these layers, the frames are images."""
    network = make("spatial", block, frame_positions="temporal", temporal_attention=True)
    for name, parameter in network.named_parameters():
        if ".temporal." in name and ".proj." in name:
            torch.nn.init.zeros_(parameter)
    x = normal(2, 2, FRAMES, 4, 6)
    whole = network(x, TIMES, Condition(LABEL))
    for frame in range(FRAMES if block != "cross-attention" else 0):  # it attends to a token of time for each frame
        alone = network(x[:, :, frame], TIMES, Condition(LABEL))
        torch.testing.assert_close(whole[:, :, frame], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("block", [*BLOCKS, "unet"])
def test_new_temporal_attention_has_no_effect(make, block):
    plain = make("spatial", block)
    network = config("spatial", block, temporal_attention=True).build()
    missing = network.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all(".temporal." in name for name in missing)
    x = normal(2, 2, FRAMES, 4, 6)
    assert torch.equal(network(x, TIMES, Condition(LABEL)), plain(x, TIMES, Condition(LABEL)))
    assert isinstance(Temporal(), type(config("temporal").attention))


@pytest.mark.parametrize(("mode", "block"), [*NETWORKS, *((mode, "text keys") for mode in MODES)])
@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize(
    "size",
    [
        (3, 8, 4),
        pytest.param((FRAMES, 4, 6), marks=pytest.mark.slow),
        pytest.param((1, 4, 6), marks=pytest.mark.slow),
        (4, 6),
    ],
)
def test_macs_equal_pytorchs_counter(mode, block, temporal, size):
    changes = {"temporal_attention": temporal}
    condition = Condition(torch.zeros(1, dtype=torch.int64))
    if block == "text keys":
        block = {"kind": "rope-swiglu", "text": "keys"}
        changes |= {"num_classes": 0, "text_channels": 8, "text_tokens": 7}
        condition = Condition(text=torch.zeros(1, 7, 8), text_mask=torch.ones(1, 7, dtype=torch.bool))
    network = config(mode, block, **changes).build()
    # Not on meta tensors, which take longer. The counter knows the products of attention, not the CPU's fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 2, *size), torch.zeros(1), condition)
    assert network.macs(size) == counter.get_total_flops() // 2


def test_modes_have_the_same_weights():
    counts = {parameter_count(config(mode).build()) for mode in MODES}
    assert len(counts) == 1
