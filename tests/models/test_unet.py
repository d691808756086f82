"""The U-Net: diffusers' network with the same weights, ADM's published sizes, PyTorch's own counter."""

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.models.network import parameter_count
from tessera.models.presets import UNET_PRESETS
from tessera.models.unet import (
    Norm,
    ResidualBlock,
    UNet,
    UNetAttention,
    UNetConfig,
    UNetContext,
    UNetFinalLayer,
)
from tessera.settings import validate

SMALL = {
    "input_size": 8,
    "in_channels": 3,
    "out_channels": 6,
    "num_classes": 3,
    "model_channels": 16,
    "channel_mult": (1, 2, 3),
    "attention_levels": 2,
}


def make(**settings) -> UNetConfig:
    return validate(UNetConfig, {**SMALL, "num_res_blocks": 2, "num_head_channels": 8, **settings}, "the test's U-Net")


def on_meta(**settings) -> UNet:
    with torch.device("meta"):
        return UNetConfig.model_validate(settings).build()


# Comparison with diffusers


def diffusers_unet(config: UNetConfig) -> UNet2DModel:
    """ADM's U-Net in diffusers, with our number of timestep frequencies and of norm groups."""
    levels = range(len(config.channel_mult))
    down = ["AttnDownBlock2D" if 2**level in config.attention_levels else "ResnetDownsampleBlock2D" for level in levels]
    network = UNet2DModel(
        sample_size=config.input_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        freq_shift=0,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        block_out_channels=tuple(config.model_channels * multiplier for multiplier in config.channel_mult),
        layers_per_block=config.num_res_blocks,
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=config.num_head_channels,
        norm_num_groups=1,
        attn_norm_num_groups=1,  # otherwise the middle attention has no norm
        norm_eps=1e-5,
        num_class_embeds=config.num_classes + 1,
    )
    network.time_proj.num_channels = 256
    network.time_embedding.linear_1 = nn.Linear(256, 4 * config.model_channels)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = Norm(module.num_channels).num_groups
    return network


def parameter_pairs(ours: UNet, theirs: UNet2DModel) -> list[tuple[nn.Parameter, list[nn.Parameter]]]:
    """Pairs of one of our parameters and the diffusers parameters that it concatenates."""
    pairs: list[tuple[nn.Parameter, list[nn.Parameter]]] = []

    def pair(one: nn.Module, *others: nn.Module) -> None:
        for name, parameter in one.named_parameters():
            pairs.append((parameter, [other.get_parameter(name) for other in others]))

    time = theirs.time_embedding
    pair(ours.stem, theirs.conv_in)
    pair(ours.t_embedder, nn.ModuleDict({"mlp": nn.ModuleList((time.linear_1, nn.Identity(), time.linear_2))}))
    pair(ours.y_embedder.embedding_table, theirs.class_embedding)
    pair(ours.final_layer.norm, theirs.conv_norm_out)
    pair(ours.final_layer.conv, theirs.conv_out)
    residuals, attentions = [], []
    for level in (*theirs.down_blocks, theirs.mid_block, *theirs.up_blocks):
        middle = level is theirs.mid_block
        attend = [level.attentions[0], None] if middle else list(getattr(level, "attentions", [])) or None
        residuals += level.resnets
        attentions += attend or [None] * len(level.resnets)
        for resampler in getattr(level, "downsamplers", None) or getattr(level, "upsamplers", None) or ():
            residuals.append(resampler)
            attentions.append(None)
    for block, residual, attention in zip(ours.blocks, residuals, attentions, strict=True):
        for one, other in (("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2")):
            pair(getattr(block.residual, one), getattr(residual, other))
        pair(block.residual.modulation.linear, residual.time_emb_proj)
        if residual.conv_shortcut is not None:
            pair(block.residual.skip, residual.conv_shortcut)
        assert (block.attention is None) == (attention is None)
        if attention is not None:
            pair(block.attention.norm, attention.group_norm)
            pair(block.attention.qkv, attention.to_q, attention.to_k, attention.to_v)
            pair(block.attention.proj, attention.to_out[0])
    return pairs


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (8, 8)),
        ({"attention_levels": (1, 4), "num_res_blocks": 1, "model_channels": 40, "channel_mult": (1, 1, 3)}, (4, 12)),
    ],
)
def test_outputs_and_gradients_match_diffusers(changes, size, randomise):
    """In double precision, so that 1e-5 is far above rounding errors."""
    config = make(**changes)
    ours, theirs = randomise(config.build()).double(), diffusers_unet(config).eval().double()
    matched = parameter_pairs(ours, theirs)
    assert {id(one) for one, _ in matched} == {id(one) for one in ours.parameters()}
    assert {id(one) for _, others in matched for one in others} == {id(one) for one in theirs.parameters()}
    with torch.no_grad():
        for one, others in matched:
            for part, other in zip(one.chunk(len(others)), others, strict=True):
                other.copy_(part)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, *size, generator=generator, dtype=torch.float64)
    t, label = torch.tensor([0.0, 17.0, 500.0, 999.0]), torch.tensor([0, 2, 1, -1])
    output = ours(x, t, Condition(label))
    expected = theirs(x, t, class_labels=torch.where(label < 0, 3, label)).sample
    assert output.shape == (4, 6, *size)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    output.square().mean().backward()
    expected.square().mean().backward()
    for one, others in matched:
        torch.testing.assert_close(one.grad, torch.cat([other.grad for other in others]), rtol=1e-5, atol=1e-7)


# Sizes

# fmt: off
PUBLISHED = {  # Dhariwal & Nichol 2021: millions of parameters; Peebles & Xie 2023, section 5.1: GMACs
    "ADM  64": ((192, (1, 2, 3, 4),       3, (2, 4, 8)),   296, None),
    "ADM 128": ((256, (1, 1, 2, 3, 4),    2, (4, 8, 16)),  422, None),
    "ADM 256": ((256, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32)), 554, 1120),
}
# fmt: on


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_match_published_values(name):
    """ADM's networks for 1000 classes and no null class. (At 64 pixels, ADM has 192 timestep frequencies, not 256.)"""
    (model_channels, channel_mult, num_res_blocks, attention_levels), millions, gmacs = PUBLISHED[name]
    shape = {
        "model_channels": model_channels,
        "channel_mult": channel_mult,
        "num_res_blocks": num_res_blocks,
        "attention_levels": attention_levels,
    }
    network = on_meta(
        input_size=int(name[3:]), in_channels=3, out_channels=6, num_classes=1000, learn_null_class=False, **shape
    )
    assert parameter_count(network) / 1e6 == pytest.approx(millions, abs=0.5)
    if gmacs is not None:
        assert network.macs() / 1e9 == pytest.approx(gmacs, abs=0.5)


def count_flops(network: UNet, size: tuple[int, int]) -> tuple[int, int]:
    """Floating-point operations of a forward pass, and of both passes, by PyTorch."""
    with torch.device("meta"):
        x, t = torch.empty(1, network.config.in_channels, *size), torch.empty(1)
        label = torch.empty(1, dtype=torch.int64) if network.config.num_classes else None
    with FlopCounterMode(display=False) as counter:
        raw = network(x, t, Condition(label))
        forward = counter.get_total_flops()
        raw.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_classes": 7, "model_channels": 24, "channel_mult": (1,), "num_res_blocks": 1, "attention_levels": ()},
        {"num_classes": 0, "model_channels": 32, "channel_mult": (1, 3), "num_res_blocks": 2, "attention_levels": 1},
        {
            "num_classes": 7,
            "model_channels": 40,
            "channel_mult": (2, 2, 4),
            "num_res_blocks": 1,
            "attention_levels": (2, 4),
        },
    ],
)
def test_macs_match_pytorch_flop_counter(settings):
    network = on_meta(input_size=(32, 16), in_channels=4, out_channels=8, **settings)
    for size in ((32, 16), (16, 64)):
        forward, both = count_flops(network, size)
        assert forward == 2 * network.macs(size)
        # Both passes cost three forward passes, except for the first layers, whose inputs need no gradient.
        assert both == pytest.approx(6 * network.macs(size), rel=0.01)


# Behaviour


def test_new_network_predicts_zero_and_its_blocks_are_the_identity():
    network = make().build()
    x, t, condition = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 900.0]), Condition([0, -1])
    assert not network(x, t, condition).any()
    features, context = network.embed(x, t, condition)
    assert torch.equal(network.blocks[0](features, context), features)
    attention = next(module for module in network.modules() if isinstance(module, UNetAttention))
    inside = torch.randn(2, attention.proj.in_features, 4, 4)
    assert torch.equal(attention(inside), inside)


def test_output_depends_on_time_label_and_null_label(randomise):
    network = randomise(make().build())
    x = torch.randn(1, 3, 8, 8).expand(5, -1, -1, -1)
    t = torch.tensor([10.0, 10.0, 10.0, 10.0, 700.0])
    first, other_label, same, null_label, other_time = network(x, t, Condition([0, 1, 0, -1, 0]))
    torch.testing.assert_close(first, same)
    for different in (other_label, null_label, other_time):
        assert not torch.allclose(first, different, atol=1e-3)


def test_rows_are_independent(randomise):
    network = randomise(make().build())
    x, t, condition = torch.randn(3, 3, 8, 8), torch.tensor([1.0, 50.0, 900.0]), Condition([0, 1, 2])
    together = network(x, t, condition)
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1], Condition([i])) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_receptive_field_is_the_whole_image(randomise):
    """The last corner of the output depends on the first corner of the input, even without attention levels."""
    network, x = randomise(make(attention_levels=()).build()), torch.randn(1, 3, 8, 8, requires_grad=True)
    network(x, torch.tensor([50.0]), Condition([0]))[0, :, -1, -1].sum().backward()
    gradient: Tensor | None = x.grad
    assert gradient is not None
    assert gradient[0, :, 0, 0].abs().max() > 1e-6


@given(channels=st.integers(1, 2000), num_head_channels=st.integers(1, 128))
def test_norm_groups_and_heads_for_any_width(channels, num_head_channels):
    norm = Norm(channels)
    assert channels % norm.num_groups == 0
    assert norm.num_groups <= 32
    assert norm.num_groups == 1 or channels // norm.num_groups >= 4
    if channels % 32 == 0 and channels >= 128:
        assert norm.num_groups == 32  # as published
    with torch.device("meta"):
        heads = UNetAttention(channels, num_head_channels).num_heads
    assert channels % heads == 0
    assert channels // heads <= num_head_channels
    if channels % num_head_channels == 0:
        assert channels // heads == num_head_channels


@pytest.mark.parametrize("resampling", ["none", "down", "up"])
def test_residual_block_resamples(resampling, randomise):
    """Resampling keeps a constant image constant."""
    block = randomise(ResidualBlock(8, 8, 16, resampling))
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    side = {"none": 4, "down": 2, "up": 8}[resampling]
    context = UNetContext(torch.zeros(1, 1, 16))
    assert torch.equal(block(torch.full((1, 8, 4, 4), 0.7), context), torch.full((1, 8, side, side), 0.7))


def test_residuals_are_float32_under_autocast(randomise):
    network = randomise(make().build())
    dtypes = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, features: dtypes.append(features.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0]), Condition([0, 1]))
    assert dtypes == [torch.float32] * len(network.blocks)


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_size": (8, 6)}, r"3 levels needs multiples of 4, and the size is 8 x 6"),
        ({"attention_levels": (2, 8)}, r"factor 8, but the 3 entries of channel_mult make levels of 1, 2, 4"),
        ({"attention_levels": 3}, r"factor 3"),
        ({"channel_mult": ()}, r"channel_mult: .*at least 1 item"),
        ({"channel_mult": (1, 0)}, r"channel_mult\.1: .*greater than 0"),
        ({"patch_size": 2}, r"unknown key 'patch_size'.*kind: unet"),
        ({"preset": "UNet-S/8-gmac"}, r"unknown preset of a U-Net 'UNet-S/8-gmac'; did you mean 'UNet-S/8-gmacs'"),
        ({"preset": "DiT-S/8"}, r"unknown preset of a U-Net 'DiT-S/8'"),
    ],
)
def test_invalid_configurations_are_errors(settings, message):
    with pytest.raises(TesseraError, match=message):
        make(**settings)


def test_invalid_inputs_are_errors():
    network = make().build()
    with pytest.raises(ValueError, match="multiples of 4, and the size is 8 x 10"):
        network(torch.zeros(1, 3, 8, 10), torch.zeros(1), Condition([0]))
    with pytest.raises(ValueError, match="conditioned on 3 classes"):
        network(torch.zeros(1, 3, 8, 8), torch.zeros(1), Condition())


def test_settings_override_the_preset():
    config = UNetConfig.model_validate({"preset": "UNet-B/4-gmacs", "num_res_blocks": 1})
    assert config.num_res_blocks == 1
    assert config.model_channels == UNET_PRESETS["UNet-B/4-gmacs"]["model_channels"]
    assert isinstance(config.build().final_layer, UNetFinalLayer)
