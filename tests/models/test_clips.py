"""Networks on clips: an image is a clip of one frame, frames may have their own times, and costs are counted."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tessera.conditioning import Condition
from tessera.layers.modulation import gated_residual, modulate
from tessera.layers.patches import PatchEmbed, patchify, unpatchify
from tessera.layers.positions import apply_rope, rope_grid, sincos_frames, sincos_grid
from tessera.models import DiTConfig, UNetConfig
from tessera.models.network import Network, parameter_count

BLOCKS = ["in-context", "cross-attention", "adaln", "adaln-zero", "adaln-single", "rope-swiglu"]
IMAGE, CLIP = (4, 6), (3, 4, 6)
LABEL, TIMES = torch.tensor([0, 2]), torch.tensor([3.0, 700.5])


def config(kind: str, size: tuple[int, ...], **changes) -> DiTConfig | UNetConfig:
    """A small DiT of a block design, or a small U-Net."""
    inputs = {"input_size": size, "in_channels": 2, "out_channels": 4, "num_classes": 3}
    if kind == "unet":
        return UNetConfig(**inputs, model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(2,))
    sizes = {"patch_size": 2, "depth": 2, "hidden_size": 32, "num_heads": 2}
    return DiTConfig.model_validate({**inputs, **sizes, "block": kind, **changes})


@pytest.fixture
def make(randomise):
    return lambda *args, **changes: randomise(config(*args, **changes).build()).eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


NETWORKS = pytest.mark.parametrize("kind", [*BLOCKS, "unet"])


# One path


@torch.no_grad()
@NETWORKS
@pytest.mark.parametrize("size", [IMAGE, CLIP])
@pytest.mark.parametrize("sides", [(4, 6), (8, 4)], ids=["configured", "another size"])
def test_an_image_is_a_clip_of_one_frame_bit_for_bit(make, kind, size, sides):
    network, x = make(kind, size), normal(2, 2, *sides)
    image, clip = network(x, TIMES, Condition(LABEL)), network(x[:, :, None], TIMES, Condition(LABEL))
    assert image.shape == (2, 4, *sides)
    assert torch.equal(clip, image[:, :, None])
    of_frames = network(x[:, :, None], TIMES[:, None], Condition(LABEL))
    assert torch.equal(of_frames, clip)


@torch.no_grad()
@NETWORKS
def test_a_clip_network_has_the_weights_of_an_image_network(make, kind):
    """And its output for images, bit for bit: frame 0 has the positions of an image."""
    image, clip = make(kind, IMAGE), make(kind, CLIP)
    assert parameter_count(image) == parameter_count(clip)
    clip.load_state_dict(image.state_dict())
    x = normal(2, 2, *IMAGE)
    assert torch.equal(image(x, TIMES, Condition(LABEL)), clip(x, TIMES, Condition(LABEL)))


@torch.no_grad()
@NETWORKS
def test_equal_times_of_all_frames_are_one_time_bit_for_bit(make, kind):
    network, x = make(kind, CLIP), normal(2, 2, 5, 4, 6)
    one = network(x, TIMES, Condition(LABEL))
    assert one.shape == (2, 4, 5, 4, 6)
    assert torch.equal(network(x, TIMES[:, None].expand(-1, 5), Condition(LABEL)), one)


@torch.no_grad()
@NETWORKS
def test_every_frame_has_its_own_time(make, kind):
    """A later time of the last frame changes the output; without attention, of that frame alone."""
    network, x = make(kind, CLIP), normal(2, 2, 3, 4, 6)
    times = torch.tensor([[1.0, 500.0, 900.0], [40.0, 41.0, 42.0]])
    later = times + torch.tensor([0.0, 0.0, 50.0])

    def change() -> Tensor:
        """The largest change of each frame, [2, 3]"""
        one, other = (network(x, t, Condition(LABEL)) for t in (times, later))
        return (one - other).abs().amax(dim=(1, 3, 4))

    assert (change() > 1e-6).all()
    without_attention(network)
    if kind != "in-context":  # its tokens of the times enter by attention alone
        assert (change()[:, 2] > 1e-4).all()
    if kind != "cross-attention":  # all frames attend to the tokens of all times
        assert (change()[:, :2] == 0).all()


def without_attention(network: Network) -> None:
    """Set the output projections of all attention layers to zero."""
    for name, module in network.named_modules():
        if name.endswith((".attn.proj", ".attention.proj")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias) if module.bias is not None else None


@torch.no_grad()
@NETWORKS
def test_a_clip_with_one_time_does_not_depend_on_the_others_of_its_batch(make, kind):
    """Where another clip of the batch has a time for each frame, it has them, too."""
    network, x = make(kind, CLIP), normal(2, 2, 3, 4, 6)
    both = network(x, torch.tensor([[3.0, 3.0, 3.0], [40.0, 500.0, 900.0]]), Condition(LABEL))
    alone = network(x[:1], TIMES[:1], Condition(LABEL[:1]))
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["adaln", "adaln-zero", "adaln-single", "rope-swiglu"])
def test_a_time_for_each_token_of_a_frame_is_the_time_of_the_frame(make, kind):
    """G = N conditioning vectors, repeated for the tokens of each frame, against G = T."""
    network, x = make(kind, CLIP), normal(2, 2, 3, 4, 6)
    times = torch.tensor([[1.0, 500.0, 900.0], [40.0, 41.0, 42.0]])
    tokens = times.repeat_interleave(6, dim=1)  # 2 x 3 tokens of a frame
    context = network.embed_condition(tokens, Condition(LABEL), network.grid(x))
    assert context.c.shape == (2, 18, 32)
    torch.testing.assert_close(network.output(x, context), network(x, times, Condition(LABEL)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@NETWORKS
def test_the_order_of_frames_matters(make, kind):
    """Positions in time: a shuffled clip is not the shuffled output."""
    network, x, order = make(kind, CLIP), normal(2, 2, 3, 4, 6), torch.tensor([2, 0, 1])
    shuffled = network(x[:, :, order], TIMES, Condition(LABEL))
    assert (shuffled - network(x, TIMES, Condition(LABEL))[:, :, order]).abs().amax() > 1e-4


# Parts


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_modulation_of_groups_of_tokens(groups):
    x, branch = normal(2, 12, 5), normal(2, 12, 5, seed=1)
    shift, scale, gate = (normal(2, groups, 5, seed=seed) for seed in (2, 3, 4))
    token = torch.arange(12) * groups // 12
    expected = x * (1 + scale[:, token]) + shift[:, token]
    torch.testing.assert_close(modulate(x, shift, scale), expected)
    torch.testing.assert_close(gated_residual(x, gate, branch), x + gate[:, token] * branch)


@pytest.mark.parametrize("temporal", [1, 2])
def test_patches_of_clips_are_a_3d_convolution(temporal):
    embed, x = PatchEmbed(3, 2, 8, temporal), normal(2, 3, 4, 6, 8)
    weight = embed.proj.weight if temporal > 1 else embed.proj.weight[:, :, None]
    expected = torch.nn.functional.conv3d(x, weight, embed.proj.bias, stride=(temporal, 2, 2))
    torch.testing.assert_close(embed(x), expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
    patch = (temporal, 2, 2)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, 4 // temporal * 12, temporal * 4 * 3)
    assert torch.equal(unpatchify(tokens, patch, (4 // temporal, 3, 4)), x)
    if temporal == 1:
        frames = [patchify(x[:, :, frame], 2) for frame in range(4)]
        assert torch.equal(tokens, torch.cat(frames, dim=1))


def test_frame_0_has_no_position():
    assert torch.equal(sincos_grid((1, 3, 4), 16), sincos_grid((3, 4), 16))
    assert (sincos_frames(5, 16)[0] == 0).all()
    table = sincos_grid((5, 3, 4), 16).view(5, 12, 16)
    frames = sincos_frames(5, 16).float()[:, None].expand(-1, 12, -1)
    torch.testing.assert_close(table - sincos_grid((3, 4), 16), frames)
    assert torch.equal(rope_grid((1, 3, 4), 16), rope_grid((3, 4), 16))
    assert torch.equal(rope_grid((5, 3, 4), 16)[:12], rope_grid((3, 4), 16))
    assert torch.equal(rope_grid((2, 3, 4), 16, first_frame=3), rope_grid((5, 3, 4), 16)[36:])
    assert torch.equal(rope_grid((2, 3, 4), 16, frame_positions=False), rope_grid((3, 4), 16).repeat(2, 1, 1))


@pytest.mark.parametrize("channels", [4, 8, 16, 24, 64, 72])
def test_rotary_positions_of_clips_are_relative_on_every_axis(channels):
    """The dot product of a query and a key depends on their offset in time, row and column alone."""
    rope = rope_grid((4, 4, 4), channels)
    assert rope.shape == (64, channels // 2, 2)
    q, k = normal(1, 1, channels), normal(1, 1, channels, seed=1)
    queries, keys = (apply_rope(each.expand(1, 64, -1), rope)[0] for each in (q, k))
    dots = (queries @ keys.T).view(4, 4, 4, 4, 4, 4)  # query t h w, key t h w
    torch.testing.assert_close(dots[:3, :3, :3, :3, :3, :3], dots[1:, 1:, 1:, 1:, 1:, 1:], rtol=1e-4, atol=1e-4)
    for axis in range(3):  # each axis is encoded
        near, far = [0, 0, 0], [0, 0, 0]
        far[axis] = 1
        assert (dots[0, 0, 0][tuple(near)] - dots[0, 0, 0][tuple(far)]).abs() > 1e-5


# Costs


@NETWORKS
@pytest.mark.parametrize("size", [(3, 4, 6), (5, 8, 4), (1, 4, 6), (4, 6)])
def test_macs_of_clips_equal_pytorchs_counter(kind, size):
    with torch.device("meta"):
        network = config(kind, CLIP).build()
        x, t, label = torch.empty(1, 2, *size), torch.empty(1), torch.empty(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        network(x, t, Condition(label))
    assert network.macs(size) == counter.get_total_flops() // 2
    assert network.macs() == network.macs(CLIP)


@pytest.mark.parametrize("kind", ["adaln-zero", "rope-swiglu"])
def test_macs_with_temporal_patches(kind):
    with torch.device("meta"):
        network = config(kind, (4, 4, 6), temporal_patch_size=2).build()
        x, t, label = torch.empty(1, 2, 4, 4, 6), torch.empty(1), torch.empty(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        output = network(x, t, Condition(label))
    assert output.shape == (1, 4, 4, 4, 6)
    assert network.macs() == counter.get_total_flops() // 2
    assert network.config.grid == (2, 2, 3)


# Blocks


@torch.no_grad()
@pytest.mark.parametrize("kind", BLOCKS)
def test_run_blocks_starts_adds_and_captures(make, kind):
    network, x = make(kind, IMAGE), normal(2, 2, *IMAGE)
    tokens, context = network.embed(x, TIMES, Condition(LABEL))
    captured: dict[int, Tensor | None] = {0: None, 1: None}
    whole = network.run_blocks(tokens, context, capture=captured)
    first = network.run_blocks(tokens, context, end=1)
    assert torch.equal(captured[0], first)
    assert torch.equal(captured[1], whole)
    assert torch.equal(network.run_blocks(first, context, start=1), whole)
    control = normal(*tokens.shape, seed=5)
    expected = network.blocks[1](network.blocks[0](tokens, context) + control, context)
    assert torch.equal(network.run_blocks(tokens, context, residuals={0: control}), expected)
    assert torch.equal(network.head(whole, context), network(x, TIMES, Condition(LABEL)))


# Errors


@NETWORKS
@pytest.mark.parametrize(
    ("size", "shape", "times", "words"),
    [
        (IMAGE, (2, 2, 3, 4, 6), (2,), "is for images, and the input is a clip of 3 frames"),
        (CLIP, (2, 2, 3, 4, 6), (1,), r"times have the shape \[1\]; expected \[2\], or \[2, 3\]"),
        (CLIP, (2, 2, 3, 4, 6), (2, 1), r"times have the shape \[2, 1\]; expected \[2\], or \[2, 3\]"),
        (CLIP, (2, 2, 3, 4, 6), (1, 3), r"times have the shape \[1, 3\]"),
        (CLIP, (2, 2, 3, 4, 6), (3, 2), r"times have the shape \[3, 2\]"),
        (IMAGE, (2, 2, 4, 6), (2, 1), r"times have the shape \[2, 1\]; expected \[2\], for inputs \[2, 2, 4, 6\]"),
        (IMAGE, (2, 2, 4, 6), (), r"times have the shape \[\]"),
        (CLIP, (2, 2, 3, 5, 6), (2,), "5 x 6"),
    ],
)
def test_wrong_shapes(kind, size, shape, times, words):
    network = config(kind, size).build()
    with pytest.raises(ValueError, match=words):
        network(torch.zeros(shape), torch.zeros(times), Condition(LABEL))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_size": (4, 6), "temporal_patch_size": 2}, "temporal_patch_size 2 needs a network for clips"),
        ({"input_size": (3, 4, 6), "temporal_patch_size": 2}, "temporal_patch_size 2 does not divide 3 frames"),
        ({"input_size": (3, 4, 6), "num_heads": 16, "block": "rope-swiglu"}, "need a multiple of 4"),
        ({"input_size": (4, 6), "attention": "causal"}, "attention causal needs a network for clips"),
        ({"input_size": (4, 6), "temporal_attention": True}, "temporal_attention True needs a network for clips"),
        ({"input_size": (4, 6), "frame_positions": "none"}, "frame_positions none needs a network for clips"),
        ({"input_size": CLIP, "frame_positions": "temporal"}, "frame_positions temporal needs temporal_attention"),
        ({"input_size": CLIP, "block": "in-context", "attention": "spatial"}, "attention spatial needs blocks that"),
        (
            {
                "input_size": CLIP,
                "block": {"kind": "rope-swiglu", "text": "sequence"},
                "temporal_attention": True,
                "num_classes": 0,
                "text_channels": 8,
            },
            "temporal_attention True needs blocks that",
        ),
        ({"input_size": (2, 3, 4, 6)}, "at most 3"),
        ({"input_size": (4,)}, "at least 2"),
    ],
)
def test_impossible_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        config("adaln-zero", **{"size": changes.pop("input_size"), **changes})


def test_times_of_frames_need_a_temporal_patch_size_of_1():
    network = config("adaln-zero", (4, 4, 6), temporal_patch_size=2).build()
    with pytest.raises(ValueError, match="temporal_patch_size 1"):
        network(torch.zeros(1, 2, 4, 4, 6), torch.tensor([[1.0, 2.0, 3.0, 4.0]]), Condition([0]))
    assert math.prod(network.config.grid) == 12
    network = config("adaln-zero", (4, 2, 4), temporal_patch_size=2).build()  # as many tokens as frames
    with pytest.raises(ValueError, match="temporal_patch_size 1"):
        network(torch.zeros(1, 2, 4, 2, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0]]), Condition([0]))


@NETWORKS
@pytest.mark.parametrize(("rows", "labels"), [(4, 1), (1, 4)])
def test_a_condition_of_another_number_of_rows_is_not_broadcast(make, kind, rows, labels):
    network = make(kind, IMAGE)
    with pytest.raises((ValueError, RuntimeError), match=r"label has|must match"):
        network(normal(rows, 2, *IMAGE), torch.ones(rows), Condition([0] * labels))


def test_frames_need_an_even_number_of_channels():
    with pytest.raises(ValueError, match="model_channels 7 is odd"):
        UNetConfig(input_size=CLIP, model_channels=7, channel_mult=(1, 2), attention_levels=(2,))
