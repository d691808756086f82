"""The four block designs of the DiT paper (Peebles & Xie 2023, section 3.2), each one class.

A block is `block(x, context)`. Shapes: B batch, L tokens of the picture, M tokens of the condition, G condition
vectors (one for the picture), D width.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from tessera.layers.attention import Attention, CrossAttention
from tessera.layers.mlp import MLP
from tessera.layers.modulation import Modulation, gated, modulate
from tessera.settings import Settings


@dataclass(frozen=True)
class Context:
    """What every block may look at beside the tokens it transforms."""

    c: Tensor  # [B, G, D] the condition vectors: time + label
    tokens: Tensor  # [B, M, D] the same as a sequence: time, then label
    grid: tuple[int, int]  # (h, w) of the picture's tokens


@dataclass(frozen=True)
class BlockConfig:
    """The sizes a block is built from."""

    width: int
    heads: int
    hidden: int
    mlp_norm_eps: float = 1e-6  # diffusers' DiT uses 1e-5 in this one norm


class Block(nn.Module):
    """What all designs share: attention, then an MLP, each behind a LayerNorm without weights of its own."""

    appends_tokens: ClassVar[bool] = False  # the condition's tokens join the picture's for all blocks
    modulated_readout: ClassVar[bool] = False  # the final layer is steered by c, too

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=config.mlp_norm_eps, elementwise_affine=False)
        self.mlp = MLP(config.width, config.hidden)

    def macs(self, tokens: int, told: int) -> int:
        """Multiply-adds for one sample of L = tokens and M = told."""
        return self.attn.macs(tokens) + self.mlp.macs(tokens)


class InContextBlock(Block):
    """A plain transformer block; time and label are two more tokens of the sequence."""

    appends_tokens = True

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, L + M, D] -> [B, L + M, D]"""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def macs(self, tokens: int, told: int) -> int:
        return super().macs(tokens + told, told)


class CrossAttentionBlock(Block):
    """Self-attention, then attention to the two tokens of time and label, then the MLP."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config)
        self.norm_cross = nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)
        self.cross_attn = CrossAttention(config.width, config.heads)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, L, D], context.tokens [B, M, D] -> [B, L, D]"""
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm_cross(x), context.tokens)
        return x + self.mlp(self.norm2(x))

    def macs(self, tokens: int, told: int) -> int:
        return super().macs(tokens, told) + self.cross_attn.macs(tokens, told)


class AdaLNBlock(Block):
    """x + branch(norm(x) (1 + scale) + shift): the condition regresses shift and scale of both norms."""

    modulated_readout = True

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config)
        self.adaLN_modulation = Modulation(config.width, 4)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, L, D], context.c [B, 1, D] -> [B, L, D]"""
        shift1, scale1, shift2, scale2 = self.adaLN_modulation(context.c).chunk(4, dim=-1)
        x = x + self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + self.mlp(modulate(self.norm2(x), shift2, scale2))

    def macs(self, tokens: int, told: int) -> int:
        return super().macs(tokens, told) + self.adaLN_modulation.macs()


class AdaLNZeroBlock(Block):
    """x + gate * branch(norm(x) (1 + scale) + shift), for attention and then for the MLP.

    A fresh block is the identity: the layer that makes the six vectors starts at zero.
    """

    modulated_readout = True

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config)
        self.adaLN_modulation = Modulation(config.width, 6)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, L, D], context.c [B, 1, D] -> [B, L, D]"""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(context.c).chunk(6, dim=-1)
        x = gated(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))
        return gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))

    def macs(self, tokens: int, told: int) -> int:
        return super().macs(tokens, told) + self.adaLN_modulation.macs()


class InContext(Settings):
    """Condition by two more tokens: the cheapest design."""

    kind: Literal["in-context"] = "in-context"

    def build(self, config: BlockConfig) -> Block:
        return InContextBlock(config)


class CrossAttend(Settings):
    """Condition by cross-attention: about 15 % more compute."""

    kind: Literal["cross-attention"] = "cross-attention"

    def build(self, config: BlockConfig) -> Block:
        return CrossAttentionBlock(config)


class AdaLN(Settings):
    """Condition by adaptive layer norm."""

    kind: Literal["adaln"] = "adaln"

    def build(self, config: BlockConfig) -> Block:
        return AdaLNBlock(config)


class AdaLNZero(Settings):
    """Condition by adaptive layer norm with zero-initialised gates: the paper's choice."""

    kind: Literal["adaln-zero"] = "adaln-zero"

    def build(self, config: BlockConfig) -> Block:
        return AdaLNZeroBlock(config)


AnyBlock = InContext | CrossAttend | AdaLN | AdaLNZero
