"""The convolutional U-Net of ADM (Dhariwal & Nichol 2021, "Diffusion models beat GANs on image synthesis", section 3),
also used for latents (Rombach et al. 2022): the baseline of diffusion transformers.

Convolutions see one frame at a time; attention sees all positions of all frames, or those that `attention` allows. So
the weights are those of an image network, and an image is a clip of one frame. `temporal_attention` adds layers among
the frames, as the 3-D U-Net of Ho et al. (2022, "Video diffusion models") has them.

Shapes: B batch, C channels, O raw output channels, T frames (1 for an image), H W height and width, (h, w) of one
level, K heads, D width of the conditioning vector, G conditioning vectors (1, or one for each frame).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, silu

from tessera.conditioning import Condition
from tessera.layers.embeddings import LabelEmbedder, TimestepEmbedder
from tessera.layers.frames import Alternating, AnyAttention, AttentionMode, ClipAttention, Full, Temporal, attend
from tessera.layers.fused_linear import FusedLinear
from tessera.layers.modulation import Modulation
from tessera.layers.positions import sincos_frames
from tessera.models.blocks import FULL, FramePositions
from tessera.models.network import Network, NetworkConfig, check_rows, check_times, self_initialized
from tessera.models.presets import UNET_PRESETS
from tessera.rows import Rows
from tessera.settings import as_tuple, unknown_name

MAX_GROUPS = 32  # of a norm
MIN_GROUP_CHANNELS = 4

PositiveInts = Annotated[tuple[PositiveInt, ...], BeforeValidator(as_tuple)]


class UNetConfig(NetworkConfig):
    """A U-Net of any size. `preset: UNet-B/4-gmacs` has as many multiply-adds as DiT-B/4.

    The defaults are ADM's for 64 x 64 images. Each level halves height and width of the previous one. Each level has
    `num_res_blocks` residual blocks in the encoder and one more in the decoder, with `model_channels` times the level's
    entry of `channel_mult` channels.
    """

    display_name: ClassVar[str] = "diffusion U-Net"
    kind: Literal["unet"] = "unet"  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)
    model_channels: PositiveInt = Field(default=192, description="channels of the first level")
    channel_mult: Annotated[PositiveInts, Field(min_length=1)] = Field(
        default=(1, 2, 3, 4), description="channels of each level, as multiples of model_channels"
    )
    num_res_blocks: PositiveInt = Field(default=3, description="residual blocks of a level in the encoder")
    attention_levels: PositiveInts = Field(
        default=(2, 4, 8), description="downsampling factors (1, 2, 4 ...) of the levels with attention"
    )
    num_head_channels: PositiveInt = Field(default=64, description="largest number of channels of an attention head")
    attention: AnyAttention = Field(
        default=Full(), description="which positions of a clip attend to each other; the weights do not depend on it"
    )
    temporal_attention: bool = Field(
        default=False, description="a layer of temporal attention after each attention; it has no effect at first"
    )
    frame_positions: FramePositions = Field(
        default="all",
        description="which layers know the order of the frames; temporal: those of temporal_attention alone",
    )

    @classmethod
    def expand_shorthand(cls, data: dict[str, Any]) -> dict[str, Any]:
        if data.get("preset") is None:  # also a preset that an override unsets
            return {key: value for key, value in data.items() if key != "preset"}
        name = str(data["preset"])
        if name not in UNET_PRESETS:
            raise ValueError(unknown_name("preset of a U-Net", name, UNET_PRESETS))
        return {**UNET_PRESETS[name], **{key: value for key, value in data.items() if key != "preset"}}

    @model_validator(mode="after")
    def _check(self) -> "UNetConfig":
        factors = [2**level for level in range(len(self.channel_mult))]
        for factor in self.attention_levels:
            if factor not in factors:
                raise ValueError(
                    f"attention_levels contains the downsampling factor {factor}, but the {len(factors)} entries of "
                    f"channel_mult make levels of {', '.join(map(str, factors))}: choose some of these"
                )
        if self.is_temporal and self.model_channels * self.channel_mult[0] % 2:
            raise ValueError(f"model_channels {self.model_channels} is odd: positions of frames need an even number")
        if isinstance(self.attention, Alternating):
            raise ValueError(
                "attention alternating is for blocks that all attend: set attention=spatial and temporal_attention=true"
            )
        if self.frame_positions == "temporal" and not self.temporal_attention:
            raise ValueError("frame_positions temporal needs temporal_attention=true, or set frame_positions=none")
        if "input_size" in self.model_fields_set:  # otherwise it follows from the data
            is_default = isinstance(self.attention, Full) and not self.temporal_attention
            if not self.is_temporal and not (is_default and self.frame_positions == "all"):
                raise ValueError(
                    "attention, temporal_attention and frame_positions are for clips: set input_size to (frames, "
                    "height, width), or leave them out"
                )
            self.check_size(self.input_size)
        return self

    @property
    def size_multiple(self) -> int:
        return 2 ** (len(self.channel_mult) - 1)

    def check_size(self, size: Sequence[int]) -> None:
        super().check_size(size)
        height, width = size[-2:]
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(
                f"a U-Net of {len(self.channel_mult)} levels needs multiples of {self.size_multiple}, and the size is "
                f"{height} x {width}: shorten channel_mult"
            )

    def summary(self) -> str:
        levels = ", 1/".join(map(str, self.attention_levels))
        attention = f"attention at 1/{levels}" if levels else "no attention"
        attention += "" if isinstance(self.attention, Full) else f" ({self.attention.kind})"
        attention += ", temporal attention" * self.temporal_attention
        channel_mult = ", ".join(map(str, self.channel_mult))
        return f"U-Net, width {self.model_channels} x ({channel_mult}), depth {self.num_res_blocks}, {attention}"

    def build(self) -> "UNet":
        return UNet(self)


@dataclass(frozen=True)
class UNetContext(Rows):
    """The inputs of a block beside the features."""

    c: Tensor  # [B, G, D] conditioning vectors: time + label
    frames: int = 1  # T
    attention: AttentionMode = FULL


class Norm(nn.GroupNorm):
    """Group normalization (Wu & He 2018): up to 32 groups, with at least 4 channels each where that is possible."""

    def __init__(self, channels: int) -> None:
        counts = range(1, min(MAX_GROUPS, max(1, channels // MIN_GROUP_CHANNELS)) + 1)
        super().__init__(max(count for count in counts if channels % count == 0), channels)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def upsample(x: Tensor) -> Tensor:
    """Nearest-neighbor upsampling: [B, C, h, w] -> [B, C, 2 h, 2 w]"""
    return interpolate(x, scale_factor=2.0, mode="nearest")


def downsample(x: Tensor) -> Tensor:
    """2 x 2 average pooling: [B, C, h, w] -> [B, C, h / 2, w / 2]"""
    return avg_pool2d(x, 2)


Resampling = Literal["none", "down", "up"]
RESAMPLE = {"none": lambda x: x, "down": downsample, "up": upsample}


class ResidualBlock(nn.Module):
    """x + branch(x), with scale and shift from c after the second norm (ADM's "adaptive group normalization").

    A block that resamples does so after the first activation, and on the skip connection (the BigGAN residual block).
    The last convolution is zero-initialized, so a new block without resampling or change of channels is the identity.
    """

    def __init__(
        self, in_channels: int, out_channels: int, cond_channels: int, resampling: Resampling = "none"
    ) -> None:
        super().__init__()
        self.resampling: Resampling = resampling
        self.norm1 = Norm(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.modulation = Modulation(cond_channels, 2, out_channels)  # not zero-initialized: it multiplies no gate
        self.norm2 = Norm(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The branch of a new block is zero."""
        nn.init.zeros_(self.conv2.weight)
        if self.conv2.bias is not None:
            nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, context: UNetContext) -> Tensor:
        """x [B T, C, h, w], context.c [B, G, D] -> [B T, C', h', w']"""
        resample = RESAMPLE[self.resampling]
        params = self.modulation(context.c)  # B G (2 C)
        if params.shape[1] != context.frames:
            params = params.expand(-1, context.frames, -1)
        scale, shift = params.flatten(0, 1)[:, :, None, None].chunk(2, dim=1)
        branch = self.conv1(resample(silu(self.norm1(x))))
        branch = self.conv2(silu(torch.addcmul(shift, self.norm2(branch), 1 + scale)))
        return self.skip(resample(x)).to(x.dtype) + branch

    def macs(self, positions: int) -> int:
        """Multiply-adds for one sample of h' w' = positions."""
        convolutions = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        return positions * sum(convolution.weight.numel() for convolution in convolutions) + self.modulation.macs()


class UNetAttention(nn.Module):
    """x + self-attention among the positions of all frames, in heads of at most `num_head_channels`.

    A new layer is the identity. frame_positions: whether the positions of frames are added to its input.
    """

    def __init__(self, channels: int, num_head_channels: int, frame_positions: bool = False) -> None:
        super().__init__()
        self.frame_positions = frame_positions
        min_heads = math.ceil(channels / num_head_channels)
        self.num_heads = next(heads for heads in range(min_heads, channels + 1) if channels % heads == 0)
        self.norm = Norm(channels)
        self.qkv = FusedLinear(channels, channels, num_projections=3)
        self.proj = nn.Linear(channels, channels)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A new layer is the identity."""
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, frames: int = 1, mode: AttentionMode = FULL) -> Tensor:
        """x [B T, C, h, w] of T = frames -> the same shape"""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B T) C h w -> (B T) (h w) C
        if frames > 1:
            tokens = tokens.unflatten(0, (-1, frames))
            if self.frame_positions:
                positions = sincos_frames(frames, x.shape[1]).to(tokens, non_blocking=x.is_cuda)
                tokens = tokens + positions[:, None]
            tokens = tokens.flatten(1, 2)  # -> B (T h w) C
        qkv = self.qkv(tokens).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in qkv)  # B N (K E) -> B K N E
        branch = attend(q, k, v, ClipAttention(mode, (frames, *x.shape[2:])))
        branch = self.proj(branch.transpose(1, 2).flatten(2))  # B K N E -> B N (K E)
        if frames > 1:
            branch = branch.unflatten(1, (frames, -1)).flatten(0, 1)  # B (T h w) C -> (B T) (h w) C
        return x + branch.transpose(1, 2).unflatten(2, x.shape[2:])

    def macs(self, positions: int, keys: int) -> int:
        """Multiply-adds for one sample of N positions: 4 N C^2 in the projections, 2 N C for each key of a position."""
        channels = self.proj.in_features
        return 4 * positions * channels**2 + 2 * positions * keys * channels


Route = Literal["push", "plain", "concat"]


class UNetBlock(nn.Module):
    """A residual block, with or without attention after it.

    route: `push` stores the output for a skip connection, `concat` concatenates the last stored output to the input,
    `plain` does neither.
    level: the output has 1 / 2^level of the height and width of the input of the network.
    """

    def __init__(
        self,
        residual: ResidualBlock,
        attention: UNetAttention | None,
        route: Route,
        level: int,
        temporal: UNetAttention | None = None,
    ) -> None:
        super().__init__()
        self.residual, self.attention, self.temporal = residual, attention, temporal
        self.route: Route = route
        self.level = level

    def forward(self, x: Tensor, context: UNetContext) -> Tensor:
        """x [B T, C, h, w] -> [B T, C', h', w']"""
        x = self.residual(x, context)
        x = x if self.attention is None else self.attention(x, context.frames, context.attention)
        return x if self.temporal is None or context.frames == 1 else self.temporal(x, context.frames, Temporal())

    def macs(self, size: Sequence[int], mode: AttentionMode = FULL) -> int:
        """Multiply-adds for one image of size (H, W), or one clip of size (T, H, W)."""
        frames, height, width = (1, *size)[-3:]
        grid = frames, height >> self.level, width >> self.level
        macs = self.residual.macs(math.prod(grid))
        if self.attention is not None:
            macs += self.attention.macs(math.prod(grid), mode.keys(grid))
        if self.temporal is not None and frames > 1:
            macs += self.temporal.macs(math.prod(grid), frames)
        return macs


class UNetFinalLayer(nn.Module):
    """Norm, SiLU, and a zero-initialized convolution."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.conv = conv3x3(channels, out_channels)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A new network predicts zero."""
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """x [B T, C, H, W] -> [B T, O, H, W]"""
        return self.conv(silu(self.norm(x)))


class UNet(Network):
    """An encoder, two middle blocks and a decoder, with skip connections from the encoder to the decoder."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        config.check_size(config.input_size)
        self.config: UNetConfig = config  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)
        cond_channels, first = 4 * config.model_channels, config.model_channels * config.channel_mult[0]
        self.stem = conv3x3(config.in_channels, first)
        self.t_embedder = TimestepEmbedder(cond_channels)
        self.y_embedder = (
            LabelEmbedder(config.num_classes, cond_channels, config.learn_null_class, std=1.0)
            if config.num_classes
            else None
        )
        self.blocks = nn.ModuleList(build_blocks(config))
        self.final_layer = UNetFinalLayer(first, config.out_channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize all weights as ADM does: PyTorch's defaults, then the exceptions."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                assert module.bias is not None
                bound = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.uniform_(module.bias, -bound, bound)
        for module in self_initialized(self):
            if not isinstance(module, TimestepEmbedder | Modulation):  # ADM leaves these at PyTorch's defaults
                module.reset_parameters()

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        features, context = self.embed(x, t, condition)
        raw = self.final_layer(self.run_blocks(features, context))
        return raw if x.ndim == 4 else raw.unflatten(0, (-1, context.frames)).transpose(1, 2)

    def run_blocks(self, x: Tensor, context: UNetContext) -> Tensor:
        """Apply all blocks to the first features, with skip connections: [B T, C, H, W] -> [B T, C, H, W]"""
        skips = [x]
        for block in self.blocks:
            if block.route == "concat":
                x = torch.cat((x, skips.pop()), dim=1)
            x = block(x, context)
            if block.route == "push":
                skips.append(x)
        return x

    def embed(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, UNetContext]:
        """Return the first features [B T, C, H, W] and the context of the blocks."""
        self.config.check_size(x.shape[2:])
        check_rows(condition, x)
        frames = x.shape[2] if x.ndim == 5 else 1
        t = check_times(t, x)
        c = self.t_embedder(t if t.ndim == 2 else t[:, None])
        if self.y_embedder is not None:
            c = c + self.y_embedder(condition.label)[:, None]
        images = x if x.ndim == 4 else x.transpose(1, 2).flatten(0, 1)  # B C T H W -> (B T) C H W
        # Features in the dtype of the input: under autocast, residuals are then summed in float32.
        features = self.stem(images).to(x.dtype)
        if frames > 1 and self.config.frame_positions == "all":  # attention would not know the order of the frames
            positions = sincos_frames(frames, features.shape[1]).to(features, non_blocking=x.is_cuda)[:, :, None, None]
            features = (features.unflatten(0, (-1, frames)) + positions).flatten(0, 1)
        return features, UNetContext(c, frames, self.config.attention)

    def macs(self, size: Sequence[int] | None = None) -> int:
        size = size or self.config.input_size
        ends = self.stem.weight.numel() + self.final_layer.conv.weight.numel()
        inside = sum(block.macs(size, self.config.attention) for block in self.blocks if isinstance(block, UNetBlock))
        return math.prod(size) * ends + self.t_embedder.macs() + inside


def build_blocks(config: UNetConfig) -> list[UNetBlock]:
    """Build all blocks in the order in which they run."""
    cond_channels = 4 * config.model_channels
    blocks: list[UNetBlock] = []
    level_channels = [config.model_channels * multiplier for multiplier in config.channel_mult]
    last_level = len(level_channels) - 1

    def add(
        in_channels: int, out_channels: int, route: Route, level: int, attends: bool, resampling: Resampling = "none"
    ) -> None:
        residual = ResidualBlock(in_channels, out_channels, cond_channels, resampling)
        attention = UNetAttention(out_channels, config.num_head_channels) if attends else None
        temporal = None
        if attends and config.temporal_attention:
            temporal = UNetAttention(out_channels, config.num_head_channels, config.frame_positions != "none")
        blocks.append(UNetBlock(residual, attention, route, level, temporal))

    current, skip_channels = level_channels[0], [level_channels[0]]
    for level, channels in enumerate(level_channels):
        if level:
            add(current, current, "push", level, attends=False, resampling="down")
            skip_channels.append(current)
        for _ in range(config.num_res_blocks):
            add(current, channels, "push", level, attends=2**level in config.attention_levels)
            skip_channels.append(channels)
            current = channels
    add(current, current, "plain", last_level, attends=True)
    add(current, current, "plain", last_level, attends=False)
    for level, channels in reversed(list(enumerate(level_channels))):
        for _ in range(config.num_res_blocks + 1):
            attends = 2**level in config.attention_levels
            add(current + skip_channels.pop(), channels, "concat", level, attends)
            current = channels
        if level:
            add(current, current, "plain", level - 1, attends=False, resampling="up")
    return blocks
