"""The four block designs of the DiT paper (Peebles & Xie 2023, section 3.2) and two later ones, each one class.

A block is `block(x, context)`. Shapes: B batch, L tokens of the image, M tokens of the condition, G condition
vectors (one per image), D width, H channels of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from pydantic import Field
from torch import Tensor, nn

from tessera.layers.attention import Attention, CrossAttention, RotaryAttention
from tessera.layers.mlp import MLP, SwiGLU
from tessera.layers.modulation import Modulation, ScaleShiftTable, gated_residual, modulate
from tessera.layers.norms import RMSNorm
from tessera.layers.positions import rotary_grid
from tessera.settings import Settings


@dataclass(frozen=True)
class Context:
    """What every block may look at beside the tokens it transforms."""

    c: Tensor  # [B, G, D] the condition vectors: time + label
    cond_tokens: Tensor  # [B, M, D] the same as a sequence: time, then label
    grid: tuple[int, int]  # (h, w) of the image tokens
    # What `Shared` works out once for all blocks, in the designs that have it:
    shared_modulation: Tensor | None = (
        None  # [B, G, 6 D] modulation parameters, to which every block adds its own offsets
    )
    rope: Tensor | None = None  # [L, H / 2, 2] the angles of the grid
    v0: Tensor | None = None  # [B, L, D] the first values, of which every attention takes a share

    def modulation_params(self, modulation: Modulation | ScaleShiftTable) -> Tensor:
        """The modulation parameters [B, G, count D] that a module computes from the condition, or its offsets to
        shared ones.

        Blocks call this method instead of the module, so that a context with precomputed parameters (for all times and
        classes of a sampling run) can return those.
        """
        if isinstance(modulation, Modulation):
            return modulation(self.c)
        assert self.shared_modulation is not None, "Shared fills it before the first block"
        return modulation(self.shared_modulation)

    def rows(self, chosen: Tensor) -> Self:
        """The selected rows of the batch."""
        values = {name: getattr(self, name) for name in ("c", "cond_tokens", "shared_modulation", "v0")}
        return replace(self, **{name: value[chosen] for name, value in values.items() if value is not None})


def layer_norm(width: int, eps: float = 1e-6) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=eps, elementwise_affine=False)


@dataclass(frozen=True)
class BlockDims:
    """The sizes a block is built from."""

    width: int
    heads: int
    hidden: int
    mlp_norm_eps: float = 1e-6  # diffusers' DiT uses 1e-5 in this one norm


class SharedConditioning(nn.Module):
    """What all blocks of a network have in common, worked out once a forward pass and handed to them in the context.

    The first values are a linear map of the embedded patches, normalised. Zhou et al. (2024) take those of the first
    block; a map of its own keeps all blocks alike, and nothing has to be carried from one block to another.
    """

    def __init__(self, config: BlockDims, modulation: bool, rotary: bool = False, values: bool = False) -> None:
        super().__init__()
        self.adaLN_modulation = Modulation(config.width, 6) if modulation else None
        self.rotary_channels = config.width // config.heads if rotary else 0
        self.norm = RMSNorm(config.width)
        self.values = nn.Linear(config.width, config.width, bias=False) if values else None

    def forward(self, x: Tensor, context: Context) -> Context:
        """x [B, L, D] the embedded patches"""
        return replace(
            context,
            shared_modulation=None
            if self.adaLN_modulation is None
            else context.modulation_params(self.adaLN_modulation),
            rope=rotary_grid(context.grid, self.rotary_channels, x.device) if self.rotary_channels else None,
            v0=None if self.values is None else self.values(self.norm(x)),
        )

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one sample."""
        modulation = 0 if self.adaLN_modulation is None else self.adaLN_modulation.macs()
        return modulation + (0 if self.values is None else tokens * self.values.weight.numel())


class Block(nn.Module):
    """What all designs share: attention, then an MLP, each behind a norm without weights of its own."""

    appends_tokens: ClassVar[bool] = False  # the condition tokens are appended to the image tokens for all blocks
    modulated_head: ClassVar[bool] = False  # the final layer is modulated by c, too

    def __init__(
        self,
        config: BlockDims,
        norm: Callable[[int, float], nn.Module] = layer_norm,
        attn: Attention | None = None,
        mlp: MLP | SwiGLU | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = norm(config.width, 1e-6)
        self.attn = Attention(config.width, config.heads) if attn is None else attn
        self.norm2 = norm(config.width, config.mlp_norm_eps)
        self.mlp = MLP(config.width, config.hidden) if mlp is None else mlp

    def macs(self, tokens: int, cond_tokens: int) -> int:
        """Multiply-adds for one sample with L = tokens and M = cond_tokens."""
        return self.attn.macs(tokens) + self.mlp.macs(tokens)


class InContextBlock(Block):
    """A plain transformer block; time and label are two more tokens of the sequence."""

    appends_tokens = True

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, L + M, D] -> [B, L + M, D]"""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def macs(self, tokens: int, cond_tokens: int) -> int:
        return super().macs(tokens + cond_tokens, cond_tokens)


class CrossAttentionBlock(Block):
    """Self-attention, then attention to the two tokens of time and label, then the MLP."""

    def __init__(self, config: BlockDims) -> None:
        super().__init__(config)
        self.norm_cross = layer_norm(config.width)
        self.cross_attn = CrossAttention(config.width, config.heads)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, L, D], context.tokens [B, M, D] -> [B, L, D]"""
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm_cross(x), context.cond_tokens)
        return x + self.mlp(self.norm2(x))

    def macs(self, tokens: int, cond_tokens: int) -> int:
        return super().macs(tokens, cond_tokens) + self.cross_attn.macs(tokens, cond_tokens)


class AdaLNBlock(Block):
    """x + branch(norm(x) (1 + scale) + shift): the condition regresses shift and scale of both norms."""

    modulated_head = True

    def __init__(self, config: BlockDims) -> None:
        super().__init__(config)
        self.adaLN_modulation = Modulation(config.width, 4)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, L, D], context.c [B, 1, D] -> [B, L, D]"""
        shift1, scale1, shift2, scale2 = context.modulation_params(self.adaLN_modulation).chunk(4, dim=-1)
        x = x + self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2))

    def macs(self, tokens: int, cond_tokens: int) -> int:
        return super().macs(tokens, cond_tokens) + self.adaLN_modulation.macs()


class AdaLNZeroBlock(Block):
    """x + gate * branch(norm(x) (1 + scale) + shift), for attention and then for the MLP.

    A fresh block is the identity: the layer that makes the six vectors starts at zero.
    """

    modulated_head = True
    regressed_by: ClassVar[type[Modulation] | type[ScaleShiftTable]] = Modulation

    def __init__(self, config: BlockDims) -> None:
        super().__init__(config)
        self.adaLN_modulation = self.regressed_by(config.width, 6)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, L, D], context.c [B, 1, D] -> [B, L, D]"""
        shift1, scale1, gate1, shift2, scale2, gate2 = context.modulation_params(self.adaLN_modulation).chunk(6, dim=-1)
        x = gated_residual(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))
        return gated_residual(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))

    def macs(self, tokens: int, cond_tokens: int) -> int:
        return super().macs(tokens, cond_tokens) + self.adaLN_modulation.macs()


class AdaLNSingleBlock(AdaLNZeroBlock):
    """The adaLN-Zero block, its six vectors those that all blocks share plus a table of its own.

    PixArt-alpha initialises the tables at random. Here they start at zero, as the shared layer does, so that a fresh
    block
    is the identity as in adaLN-Zero: trained from nothing, that is what made the difference to adaLN in the DiT paper.
    """

    regressed_by = ScaleShiftTable


class RoPESwiGLUBlock(Block):
    """x + gate * branch(norm(x) (1 + scale) + shift), as adaLN-Zero, of the parts that `Modern` chooses.

    A fresh block is the identity.
    """

    modulated_head = True

    def __init__(self, config: BlockDims, design: "RoPESwiGLU") -> None:
        super().__init__(
            config,
            norm=RMSNorm if design.norm == "rms" else layer_norm,
            attn=RotaryAttention(config.width, config.heads, design.bias, design.qk_norm, design.value_residual),
            mlp=(SwiGLU if design.mlp == "swiglu" else MLP)(config.width, config.hidden, design.bias),
        )
        self.adaLN_modulation = (ScaleShiftTable if design.modulation == "shared" else Modulation)(config.width, 6)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, L, D], context.c [B, 1, D] -> [B, L, D]"""
        shift1, scale1, gate1, shift2, scale2, gate2 = context.modulation_params(self.adaLN_modulation).chunk(6, dim=-1)
        attended = self.attn(modulate(self.norm1(x), shift1, scale1), context.rope, context.v0)
        x = gated_residual(x, gate1, attended)
        return gated_residual(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))

    def macs(self, tokens: int, cond_tokens: int) -> int:
        return super().macs(tokens, cond_tokens) + self.adaLN_modulation.macs()


class BlockConfig(Settings):
    """The settings of a block design, which say what a network of such blocks needs beside them."""

    def summary(self) -> str:
        """The kind, and what is not as this design has it by default."""
        own = {name: value for name, value in self if name != "kind" and value != type(self).model_fields[name].default}
        return " ".join([type(self).model_fields["kind"].default, *(f"{name}={value}" for name, value in own.items())])

    @property
    def absolute_positions(self) -> bool:
        """Whether a table of positions is added to the embedded patches."""
        return True

    def check(self, width: int, heads: int) -> None:
        """Raise ValueError if a block of this width cannot be."""

    def shared(self, config: BlockDims) -> SharedConditioning | None:
        """What the blocks have in common."""
        return None


class InContext(BlockConfig):
    """Condition by two more tokens: the cheapest design."""

    kind: Literal["in-context"] = "in-context"

    def build(self, config: BlockDims) -> Block:
        return InContextBlock(config)


class CrossAttend(BlockConfig):
    """Condition by cross-attention: about 15 % more compute."""

    kind: Literal["cross-attention"] = "cross-attention"

    def build(self, config: BlockDims) -> Block:
        return CrossAttentionBlock(config)


class AdaLN(BlockConfig):
    """Condition by adaptive layer norm."""

    kind: Literal["adaln"] = "adaln"

    def build(self, config: BlockDims) -> Block:
        return AdaLNBlock(config)


class AdaLNZero(BlockConfig):
    """Condition by adaptive layer norm with zero-initialised gates: the paper's choice."""

    kind: Literal["adaln-zero"] = "adaln-zero"

    def build(self, config: BlockDims) -> Block:
        return AdaLNZeroBlock(config)


class AdaLNSingle(BlockConfig):
    """adaLN-Zero with one layer for the modulation parameters of all blocks: a quarter fewer parameters
    (PixArt-alpha)."""

    kind: Literal["adaln-single"] = "adaln-single"

    def build(self, config: BlockDims) -> Block:
        return AdaLNSingleBlock(config)

    def shared(self, config: BlockDims) -> SharedConditioning:
        return SharedConditioning(config, modulation=True)


class RoPESwiGLU(BlockConfig):
    """adaLN-Zero with the parts that later transformers found better, each of which can be switched back alone.

    With `mlp: gelu, norm: layer, positions: sincos, modulation: per-block, qk_norm: false, value_residual: false,
    bias: true`
    it is the paper's adaLN-Zero block.
    """

    kind: Literal["rope-swiglu"] = "rope-swiglu"
    mlp: Literal["swiglu", "gelu"] = Field(
        default="swiglu", description="SwiGLU (two thirds of the hidden width) or GELU"
    )
    norm: Literal["rms", "layer"] = Field(default="rms", description="before attention and MLP; no weights in either")
    positions: Literal["rotary", "sincos"] = Field(
        default="rotary", description="queries and keys turned by row and column, or a table added to the patches"
    )
    modulation: Literal["shared", "per-block"] = Field(
        default="shared",
        description="one layer for the modulation parameters of all blocks (adaLN-single), or one in each",
    )
    qk_norm: bool = Field(default=True, description="queries and keys of one length, times a learned one for each head")
    value_residual: bool = Field(default=True, description="each attention takes a learned share of the first values")
    bias: bool = Field(default=False, description="of the linear layers of attention and MLP; the modulation keeps its")

    @property
    def absolute_positions(self) -> bool:
        return self.positions == "sincos"

    def check(self, width: int, heads: int) -> None:
        if self.positions == "rotary" and width // heads % 4:
            raise ValueError(
                f"width {width} over {heads} heads makes {width // heads} channels a head, and rotary positions need a "
                f"multiple of 4: choose another width or number of heads, or block.positions=sincos"
            )

    def build(self, config: BlockDims) -> Block:
        return RoPESwiGLUBlock(config, self)

    def shared(self, config: BlockDims) -> SharedConditioning | None:
        shared, rotary = self.modulation == "shared", self.positions == "rotary"
        if not (shared or rotary or self.value_residual):
            return None
        return SharedConditioning(config, modulation=shared, rotary=rotary, values=self.value_residual)


AnyBlock = InContext | CrossAttend | AdaLN | AdaLNZero | AdaLNSingle | RoPESwiGLU
