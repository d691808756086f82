"""Multi-head attention: self-attention, and cross-attention to condition tokens.

Shapes: B batch, N tokens, M condition tokens, D width, K heads, E channels of a head (D = K E).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tessera.layers.frames import ClipAttention, attend
from tessera.layers.fused_linear import FusedLinear
from tessera.layers.norms import inverse_rms
from tessera.layers.positions import apply_rope


@dataclass(frozen=True)
class MoreKeys:
    """Keys and values of other tokens, which queries attend to with a softmax of their own, as in IP-Adapter (Ye et al.
    2023, equation 5): out = attention(q, k, v) + sum of attention(q, k', v'). Where v' is zero, nothing changes.

    keys_values: k', v' [B, K, M, E] each. record: a list to which attention appends its own k, v [B, K, N, E].
    """

    keys_values: Sequence[tuple[Tensor, Tensor]] = ()
    record: list[tuple[Tensor, Tensor]] | None = None


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values (Vaswani et al. 2017)."""

    def __init__(self, width: int, num_heads: int, bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = FusedLinear(width, width, num_projections=3, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, more: MoreKeys | None = None, clip: ClipAttention | None = None) -> Tensor:
        """x [B, N, D] -> [B, N, D]

        clip: which tokens of a clip attend to each other; None: all
        """
        # Split first: then the backward pass concatenates the three gradients in one pass.
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        # B N (K E) -> B K N E each
        x = scaled_dot_product_attention(q, k, v) if clip is None else attend(q, k, v, clip)
        return self._output(x, q, k, v, more)

    def _output(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, more: MoreKeys | None) -> Tensor:
        """What was attended to, and more of it: [B, K, N, E] each -> [B, N, D]"""
        if more is not None:
            if more.record is not None:
                more.record.append((k, v))
            for keys, values in more.keys_values:
                x = x + scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype))
        return self.proj(x.transpose(1, 2).flatten(2))  # B K N E -> B N (K E)

    def macs(self, tokens: int, keys: int | None = None) -> int:
        """Multiply-adds for one sample: 4 N D^2 in the projections, 2 N^2 D between the tokens.

        keys: that a token attends to, if they are not all N.
        """
        width = self.proj.in_features
        return 4 * tokens * width**2 + 2 * tokens * (tokens if keys is None else keys) * width


class RotaryAttention(Attention):
    """Self-attention with three later additions, each of which is optional.

    qk_norm: queries and keys are divided by their rms, and queries multiplied by a learned scale per head, so that
    logits cannot grow without bound (Henry et al. 2020, "Query-key normalization"; Dehghani et al. 2023 for vision
    transformers). rope: queries and keys are rotated by position (Su et al. 2021). value_residual: values are
    interpolated with values computed from the first layer's input (Zhou et al. 2024, "Value residual learning").

    more_keys: whether queries also attend to the keys and values of other tokens, as in PRX. learned_offset: these keys
    get a learned logit offset for each head, which begins at NO_ATTENTION: weights of a model without these keys keep
    their function. (Zero keys would take their share of the softmax.)
    """

    NO_ATTENTION = -20.0

    def __init__(
        self,
        width: int,
        num_heads: int,
        bias: bool,
        qk_norm: bool,
        value_residual: bool,
        more_keys: bool = False,
        learned_offset: bool = False,
    ) -> None:
        super().__init__(width, num_heads, bias)
        self.text_kv = FusedLinear(width, width, num_projections=2, bias=bias) if more_keys else None
        self.text_offset = nn.Parameter(torch.empty(num_heads)) if learned_offset else None
        self.qk_scale = nn.Parameter(torch.empty(num_heads)) if qk_norm else None
        self.v_residual_lambda = nn.Parameter(torch.empty(1)) if value_residual else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A scale of 1, and the mean of both values. The linear layers are left as they are."""
        if self.text_offset is not None:
            self.text_offset.fill_(self.NO_ATTENTION)
        if self.qk_scale is not None:
            self.qk_scale.fill_(1)
        if self.v_residual_lambda is not None:
            self.v_residual_lambda.fill_(0.5)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        rope: Tensor | None = None,
        v0: Tensor | None = None,
        keys: Tensor | None = None,
        mask: Tensor | None = None,
        more: MoreKeys | None = None,
        clip: ClipAttention | None = None,
    ) -> Tensor:
        """x [B, N, D], rope [N, E / 2, 2] (see `rope_grid`), v0 [B, N, D] -> [B, N, D]

        keys [B, M, 2 D]: more keys and values (see `keys_values`). mask: bool [B, M + N], which keys are attended to,
        those first. clip: which tokens of a clip attend to each other; None: all
        """
        qk, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).split((2, 1), dim=2)  # B N 2 K E, B N 1 K E
        v = v.squeeze(2)
        if qk.dtype in (torch.bfloat16, torch.float16):
            qk = qk.float()  # half precision is too coarse for norms and angles
        scale = None if self.qk_scale is None else self._qk_scale(qk, self.qk_scale)
        if rope is not None:
            qk = apply_rope(qk, rope)  # norms do not change, so the scale may be applied afterwards
        if scale is not None:
            qk = qk * scale
        if self.v_residual_lambda is not None and v0 is not None:
            v = torch.lerp(v, v0.unflatten(-1, (self.num_heads, -1)), self.v_residual_lambda.to(v.dtype))
        q, k = qk.to(v.dtype).unbind(2)
        own = k.transpose(1, 2), v.transpose(1, 2)
        text = None
        if keys is not None:
            text = keys.to(v.dtype).unflatten(-1, (2, self.num_heads, -1))  # B M 2 K E
            k, v = torch.cat((text[:, :, 0], k), dim=1), torch.cat((text[:, :, 1], v), dim=1)
        attn_mask = None if mask is None else mask[:, None, None]
        if self.text_offset is not None and attn_mask is not None and keys is not None:
            offset = self.text_offset[:, None, None] * (torch.arange(k.shape[1], device=k.device) < keys.shape[1])
            attn_mask = torch.where(attn_mask, offset.to(v.dtype), -torch.inf)  # B K 1 (M + N)
        q = q.transpose(1, 2)
        if clip is None:
            x = scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=attn_mask)
        elif text is None:
            x = attend(q, *own, clip)
        else:
            further = text[:, :, 0].transpose(1, 2), text[:, :, 1].transpose(1, 2)
            x = attend(q, *own, clip, further, None if attn_mask is None else attn_mask[..., : text.shape[1]])
        return self._output(x, q, *own, more)

    def keys_values(self, tokens: Tensor) -> Tensor:
        """Keys, normalized as those of `forward`, and values of other tokens: [B, M, D] -> [B, M, 2 D]"""
        assert self.text_kv is not None
        keys_values: Tensor = self.text_kv(tokens)
        if self.qk_scale is None:
            return keys_values
        k, v = keys_values.chunk(2, dim=-1)
        per_head = k.unflatten(-1, (self.num_heads, -1)).float()
        return torch.cat(((per_head * inverse_rms(per_head, 1e-6)).flatten(-2).to(v.dtype), v), dim=-1)

    def _qk_scale(self, qk: Tensor, qk_scale: Tensor) -> Tensor:
        """The factors for which rms(k) = 1 and rms(q) = qk_scale: qk [B, N, 2, K, E] -> [B, N, 2, K, 1]"""
        return inverse_rms(qk, 1e-6) * torch.stack((qk_scale, torch.ones_like(qk_scale)))[..., None]


class CrossAttention(nn.Module):
    """Attention from the image tokens to the condition tokens."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = FusedLinear(width, width, num_projections=2)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cond_tokens: Tensor, mask: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        """x [B, N, D], cond_tokens [B, M, D] -> [B, N, D]

        mask: bool [B, M], which condition tokens are attended to; at least one in each row. keys [B, M, 2 D]: their
        keys and values, where they were computed before
        """
        q = self.q_linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # B N (K E) -> B K N E
        keys_values: Tensor = self.kv_linear(cond_tokens) if keys is None else keys.to(q.dtype)
        k, v = keys_values.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
        return self.proj(x.transpose(1, 2).flatten(2))

    def macs(self, tokens: int, cond_tokens: int) -> int:
        """Multiply-adds for one sample: 2 N D^2 + 2 M D^2 in the projections, 2 N M D between the sequences."""
        width = self.proj.in_features
        return 2 * (tokens + cond_tokens) * width**2 + 2 * tokens * cond_tokens * width
