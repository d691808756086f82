"""Multi-head attention: queries, keys and values from one sequence, or keys and values from another.

Shapes: B batch, L tokens, M tokens attended to, D width, K heads, H channels of a head (D = K H).
"""

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # B L (3 K H) -> 3 B K L H
        x = scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))  # B K L H -> B L (K H)

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one sample: 4 L D^2 in the projections, 2 L^2 D between the tokens."""
        width = self.proj.in_features
        return 4 * tokens * width**2 + 2 * tokens**2 * width


class CrossAttention(nn.Module):
    """Attention from the picture's tokens to the condition's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x [B, L, D], tokens [B, M, D] -> [B, L, D]"""
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B L (K H) -> B K L H
        k, v = self.kv_linear(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))

    def macs(self, tokens: int, told: int) -> int:
        """Multiply-adds for one sample: 2 L D^2 + 2 M D^2 in the projections, 2 L M D between the sequences."""
        width = self.proj.in_features
        return 2 * (tokens + told) * width**2 + 2 * tokens * told * width
