"""The convolutional U-Net that diffusion transformers are measured against: the network of ADM (Dhariwal & Nichol 2021,
"Diffusion models beat GANs on image synthesis", section 3), as also used for latents (Rombach et al. 2022).

Shapes: B batch, C channels, O raw output channels, H W height and width, (h, w) of one level, K heads, E channels
of the condition vector.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, scaled_dot_product_attention, silu

from tessera.conditioning import Condition
from tessera.layers.embeddings import LabelEmbedder, TimestepEmbedder
from tessera.layers.fused_linear import FusedLinear
from tessera.layers.modulation import Modulation
from tessera.models.network import Network, NetworkConfig
from tessera.models.presets import UNETS
from tessera.settings import as_tuple, unknown_name

GROUPS = 32  # of a norm, at most
CHANNELS = 4  # of one group, at least


Numbers = Annotated[tuple[PositiveInt, ...], BeforeValidator(as_tuple)]


class UNetConfig(NetworkConfig):
    """A U-Net of any size; `preset: UNet-B/4-gmacs` is as large as that DiT. The defaults: ADM's for 64 x 64 imares.

    Each level halves height and width of the one before. All levels have `depth` residual blocks on the way down and
    one more on the way up, of `width` times the level's multiplier channels.
    """

    display_name: ClassVar[str] = "diffusion U-Net"
    kind: Literal["unet"] = "unet"  # pyright: ignore[reportIncompatibleVariableOverride] (nobody writes it)
    model_channels: PositiveInt = Field(default=192, description="channels of the first level")
    channel_mult: Annotated[Numbers, Field(min_length=1)] = Field(
        default=(1, 2, 3, 4), description="channels of each level, over those of the first"
    )
    num_res_blocks: PositiveInt = Field(default=3, description="residual blocks of a level, on the way down")
    attention_levels: Numbers = Field(
        default=(2, 4, 8), description="downsampling factors (1, 2, 4 ...) of the levels that attend"
    )
    num_head_channels: PositiveInt = Field(default=64, description="channels of an attention head, at most")

    @classmethod
    def expand_shorthand(cls, data: dict[str, Any]) -> dict[str, Any]:
        if "preset" not in data:
            return data
        name = str(data["preset"])
        if name not in UNETS:
            raise ValueError(unknown_name("preset of a U-Net", name, UNETS))
        return {**UNETS[name], **{key: value for key, value in data.items() if key != "preset"}}

    @model_validator(mode="after")
    def _fits(self) -> "UNetConfig":
        known = [2**level for level in range(len(self.channel_mult))]
        for factor in self.attention_levels:
            if factor not in known:
                raise ValueError(
                    f"attention at a downsampling factor of {factor}, but {len(known)} multipliers make levels of "
                    f"{', '.join(map(str, known))}: choose some of these"
                )
        if "input_size" in self.model_fields_set:
            self.check_size(self.input_size)
        return self

    @property
    def size_multiple(self) -> int:
        return 2 ** (len(self.channel_mult) - 1)

    def check_size(self, size: tuple[int, int]) -> None:
        if size[0] % self.size_multiple or size[1] % self.size_multiple:
            raise ValueError(
                f"a U-Net of {len(self.channel_mult)} levels needs multiples of {self.size_multiple}, and the size is "
                f"{size[0]} x {size[1]}: give multipliers fewer numbers"
            )

    def summary(self) -> str:
        attention = (
            f"attention at 1/{', 1/'.join(map(str, self.attention_levels))}"
            if self.attention_levels
            else "no attention"
        )
        multipliers = ", ".join(map(str, self.channel_mult))
        return f"U-Net, width {self.model_channels} x ({multipliers}), depth {self.num_res_blocks}, {attention}"

    def build(self) -> "UNet":
        return UNet(self)


@dataclass(frozen=True)
class Context:
    """What every block may look at beside the features it transforms."""

    c: Tensor  # [B, E] the condition vector: time + label


class Norm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018) of up to 32 groups, of at least four channels each where that divides."""

    def __init__(self, channels: int) -> None:
        counts = range(1, min(GROUPS, max(1, channels // CHANNELS)) + 1)
        super().__init__(max(count for count in counts if channels % count == 0), channels)


def convolution(entering: int, leaving: int) -> nn.Conv2d:
    """3 x 3, which leaves height and width as they are."""
    return nn.Conv2d(entering, leaving, 3, padding=1)


def up(x: Tensor) -> Tensor:
    """Each number four times: [B, C, h, w] -> [B, C, 2 h, 2 w]"""
    return interpolate(x, scale_factor=2.0, mode="nearest")


def down(x: Tensor) -> Tensor:
    """The means of squares: [B, C, h, w] -> [B, C, h / 2, w / 2]"""
    return avg_pool2d(x, 2)


Resampling = Literal["none", "down", "up"]
RESAMPLE = {"none": lambda x: x, "down": down, "up": up}


class ResidualBlock(nn.Module):
    """x + branch(x), the branch modulated by scale and shift of its second norm (ADM's "adaptive group normalization").

    A block that resamples does so behind its first activation, and to x itself (the BigGAN residual block). A fresh
    block adds nothing: its last convolution starts at zero.
    """

    def __init__(self, entering: int, leaving: int, cond_channels: int, resampling: Resampling = "none") -> None:
        super().__init__()
        self.resampling: Resampling = resampling
        self.norm1 = Norm(entering)
        self.conv1 = convolution(entering, leaving)
        self.modulation = Modulation(cond_channels, 2, leaving)
        self.norm2 = Norm(leaving)
        self.conv2 = convolution(leaving, leaving)
        self.skip = nn.Identity() if entering == leaving else nn.Conv2d(entering, leaving, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x [B, C, h, w], c [B, E] -> [B, C', h', w']"""
        resample = RESAMPLE[self.resampling]
        scale, shift = self.modulation(c)[:, :, None, None].chunk(2, dim=1)
        branch = self.conv1(resample(silu(self.norm1(x))))
        branch = self.conv2(silu(torch.addcmul(shift, self.norm2(branch), 1 + scale)))
        return self.skip(resample(x)).to(x.dtype) + branch

    def macs(self, positions: int) -> int:
        """Multiply-adds for one sample of h' w' = positions."""
        convolutions = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        return positions * sum(each.weight.numel() for each in convolutions) + self.modulation.macs()


class SpatialAttention(nn.Module):
    """x + attention among all positions, in heads of at most so many channels. Fresh, it adds nothing."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        fewest = math.ceil(channels / head_channels)
        self.heads = next(heads for heads in range(fewest, channels + 1) if channels % heads == 0)
        self.norm = Norm(channels)
        self.qkv = FusedLinear(channels, channels, num_projections=3)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C, h, w]"""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # B C h w -> B (h w) C
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, dim=-1))
        attended = scaled_dot_product_attention(q, k, v)  # B L (K H) -> B K L H each
        attended = self.proj(attended.transpose(1, 2).flatten(2))  # B K L H -> B L (K H)
        return x + attended.transpose(1, 2).unflatten(2, x.shape[2:])

    def macs(self, positions: int) -> int:
        """Multiply-adds for one sample of L = positions: 4 L C^2 in the projections, 2 L^2 C between the positions."""
        channels = self.proj.in_features
        return 4 * positions * channels**2 + 2 * positions**2 * channels


Route = Literal["saved", "through", "joined"]


class UNetBlock(nn.Module):
    """A residual block, and perhaps attention behind it.

    route: its output is kept for the way up, or handed on alone; or, on the way up, what was kept last joins its input.
    halvings: how often height and width were halved before what leaves it.
    """

    def __init__(
        self, residual: ResidualBlock, attention: SpatialAttention | None, route: Route, halvings: int
    ) -> None:
        super().__init__()
        self.residual, self.attention = residual, attention
        self.route: Route = route
        self.halvings = halvings

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, C, h, w] -> [B, C', h', w']"""
        x = self.residual(x, context.c)
        return x if self.attention is None else self.attention(x)

    def macs(self, size: tuple[int, int]) -> int:
        """Multiply-adds for one image of a size (H, W)."""
        positions = (size[0] >> self.halvings) * (size[1] >> self.halvings)
        return self.residual.macs(positions) + (0 if self.attention is None else self.attention.macs(positions))


class FinalLayer(nn.Module):
    """Norm, SiLU, and a convolution that starts at zero."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.conv = convolution(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, O, H, W]"""
        return self.conv(silu(self.norm(x)))


class UNet(Network):
    """Down through the levels, the middle, and up again, where what was kept on the way down joins what comes up."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        config.check_size(config.input_size)
        self.config: UNetConfig = config  # pyright: ignore[reportIncompatibleVariableOverride] (nobody writes it)
        cond_channels, first = 4 * config.model_channels, config.model_channels * config.channel_mult[0]
        self.stem = convolution(config.in_channels, first)
        self.t_embedder = TimestepEmbedder(cond_channels)
        self.y_embedder = (
            LabelEmbedder(config.num_classes, cond_channels, config.learn_null_class) if config.num_classes else None
        )
        self.blocks = nn.ModuleList(blocks(config))
        self.final_layer = FinalLayer(first, config.out_channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """ADM's initial weights, in one place: PyTorch's own, then the exceptions."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                assert module.bias is not None
                reach = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.weight, -reach, reach)
                nn.init.uniform_(module.bias, -reach, reach)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight)
        # A fresh block is the identity, and a fresh network predicts zero.
        last = [module.conv2 for module in self.modules() if isinstance(module, ResidualBlock)]
        last += [module.proj for module in self.modules() if isinstance(module, SpatialAttention)]
        for module in (*last, self.final_layer.conv):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        x, context = self.embed(x, t, condition)
        skips = [x]
        for block in self.blocks:
            if block.route == "joined":
                x = torch.cat((x, skips.pop()), dim=1)
            x = block(x, context)
            if block.route == "saved":
                skips.append(x)
        return self.final_layer(x)

    def embed(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Context]:
        """The first features [B, C, H, W] and the context of the blocks."""
        self.config.check_size((x.shape[-2], x.shape[-1]))
        c = self.t_embedder(t)
        if self.y_embedder is not None:
            if condition.label is None:
                raise ValueError(f"this network knows {self.config.num_classes} classes: give Condition(label=...)")
            c = c + self.y_embedder(condition.label)
        # In the input's precision: under autocast the residuals are summed here.
        return self.stem(x).to(x.dtype), Context(c)

    def macs(self, size: tuple[int, int] | None = None) -> int:
        size = size or self.config.input_size
        ends = self.stem.weight.numel() + self.final_layer.conv.weight.numel()
        inside = sum(block.macs(size) for block in self.blocks if isinstance(block, UNetBlock))
        return size[0] * size[1] * ends + self.t_embedder.macs() + inside


def blocks(config: UNetConfig) -> list[UNetBlock]:
    """All blocks in the order in which they are run."""
    cond_channels = 4 * config.model_channels
    unet_blocks: list[UNetBlock] = []
    levels = [(halvings, config.model_channels * multiplier) for halvings, multiplier in enumerate(config.channel_mult)]

    def add(entering: int, leaving: int, route: Route, halvings: int, attends: bool, how: Resampling = "none") -> None:
        attention = SpatialAttention(leaving, config.num_head_channels) if attends else None
        unet_blocks.append(UNetBlock(ResidualBlock(entering, leaving, cond_channels, how), attention, route, halvings))

    present, skip_channels = levels[0][1], [levels[0][1]]  # channels
    for halvings, channels in levels:
        if halvings:
            add(present, present, "saved", halvings, attends=False, how="down")
            skip_channels.append(present)
        for _ in range(config.num_res_blocks):
            add(present, channels, "saved", halvings, attends=2**halvings in config.attention_levels)
            skip_channels.append(channels)
            present = channels
    deepest = len(levels) - 1
    add(present, present, "through", deepest, attends=True)
    add(present, present, "through", deepest, attends=False)
    for halvings, channels in reversed(levels):
        for _ in range(config.num_res_blocks + 1):
            add(
                present + skip_channels.pop(),
                channels,
                "joined",
                halvings,
                attends=2**halvings in config.attention_levels,
            )
            present = channels
        if halvings:
            add(present, present, "through", halvings - 1, attends=False, how="up")
    return unet_blocks
