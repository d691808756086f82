"""Multi-head attention: queries, keys and values from one sequence, or keys and values from another.

Shapes: B batch, L tokens, M tokens attended to, D width, K heads, H channels of a head (D = K H).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tessera.layers.fused_linear import FusedLinear
from tessera.layers.norms import inverse_rms
from tessera.layers.positions import rotate


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = FusedLinear(width, width, num_projections=3, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]"""
        # In three parts before anything else: then their gradients are put together in one pass.
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        x = scaled_dot_product_attention(q, k, v)  # B L (K H) -> B K L H each
        return self.proj(x.transpose(1, 2).flatten(2))  # B K L H -> B L (K H)

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one sample: 4 L D^2 in the projections, 2 L^2 D between the tokens."""
        width = self.proj.in_features
        return 4 * tokens * width**2 + 2 * tokens**2 * width


class RotaryAttention(Attention):
    """Self-attention with what was found since; each of the three may be left out.

    qk_norm: queries and keys of one length, times a learned sharpness for each head, so that logits cannot grow without
    bound (Henry et al. 2020, "Query-key normalization"; Dehghani et al. 2023 for its use in vision transformers).
    rotary: positions as angles by which queries and keys are turned (Su et al. 2021).
    value_residual: values are mixed with values made of the first layer's input, in a learned share (Zhou et al. 2024,
    "Value residual learning").
    """

    def __init__(self, width: int, heads: int, bias: bool, qk_norm: bool, value_residual: bool) -> None:
        super().__init__(width, heads, bias)
        self.qk_scale = nn.Parameter(torch.ones(heads)) if qk_norm else None
        self.v_residual_lambda = nn.Parameter(torch.full((1,), 0.5)) if value_residual else None

    def forward(self, x: Tensor, rotary: Tensor | None = None, values: Tensor | None = None) -> Tensor:
        """x [B, L, D], rotary [L, H / 2, 2] (see `rotary_grid`), values [B, L, D] -> [B, L, D]"""
        qk, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).split((2, 1), dim=2)  # B L 2 K H, B L 1 K H
        v = v.squeeze(2)
        if qk.dtype in (torch.bfloat16, torch.float16):
            qk = qk.float()  # lengths and angles are not for half precision
        length = None if self.qk_scale is None else self._length(qk, self.qk_scale)
        if rotary is not None:
            qk = rotate(qk, rotary)  # which leaves lengths alone: so they may be set afterwards
        if length is not None:
            qk = qk * length
        if self.v_residual_lambda is not None and values is not None:
            v = torch.lerp(v, values.unflatten(-1, (self.heads, -1)), self.v_residual_lambda.to(v.dtype))
        q, k = qk.to(v.dtype).unbind(2)
        x = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(x.transpose(1, 2).flatten(2))  # B K L H -> B L (K H)

    def _length(self, qk: Tensor, qk_scale: Tensor) -> Tensor:
        """What makes rms(k) = 1 and rms(q) = sharpness: qk [B, L, 2, K, H] -> [B, L, 2, K, 1]"""
        return inverse_rms(qk, 1e-6) * torch.stack((qk_scale, torch.ones_like(qk_scale)))[..., None]


class CrossAttention(nn.Module):
    """Attention from the image tokens to the condition tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = FusedLinear(width, width, num_projections=2)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x [B, L, D], tokens [B, M, D] -> [B, L, D]"""
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B L (K H) -> B K L H
        k, v = self.kv_linear(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))

    def macs(self, tokens: int, cond_tokens: int) -> int:
        """Multiply-adds for one sample: 2 L D^2 + 2 M D^2 in the projections, 2 L M D between the sequences."""
        width = self.proj.in_features
        return 2 * (tokens + cond_tokens) * width**2 + 2 * tokens * cond_tokens * width
