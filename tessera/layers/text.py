"""Text tokens for the blocks of a network: from the tokens of a text encoder, or from ids, to the width.

Shapes: B rows, M text tokens, E channels of the text encoder, D width.
"""

import torch
from torch import Tensor, nn

from tessera.layers.attention import RotaryAttention
from tessera.layers.mlp import SwiGLU
from tessera.layers.norms import RMSNorm
from tessera.layers.positions import sincos_frames


class TextLayer(nn.Module):
    """A pre-norm transformer layer over text tokens."""

    def __init__(self, width: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = RotaryAttention(width, num_heads, bias=False, qk_norm=True, value_residual=False)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width, mlp_width, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, M, D], mask bool [B, M] with a valid token in each row -> [B, M, D]"""
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one sample."""
        return self.attn.macs(tokens) + self.mlp.macs(tokens)


class TextEmbedder(nn.Module):
    """Tokens of a text encoder, or ids, to the width of a network, and some transformer layers over them.

    Layers over the text alone are cheap, because texts are short and they need not be repeated in each sampling step
    (MicroDiT, Sehwag et al. 2024; Lumina-Image 2.0, Qin et al. 2025). Ids need them: only these mix the words.
    Unconditional rows have no valid token, or with `null_token` one learned token, for blocks that cannot attend to
    nothing.
    """

    def __init__(
        self,
        channels: int,
        vocabulary_size: int,
        width: int,
        num_heads: int,
        mlp_width: int,
        num_layers: int,
        null_token: bool,
    ) -> None:
        """channels: E of the text encoder, or 0 for ids of a vocabulary"""
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, width) if vocabulary_size else None
        self.norm = None if vocabulary_size else RMSNorm(channels)
        self.proj = None if vocabulary_size else nn.Linear(channels, width)
        self.layers = nn.ModuleList(TextLayer(width, num_heads, mlp_width) for _ in range(num_layers))
        self.norm_final = RMSNorm(width)
        self.null_token = nn.Parameter(torch.empty(width)) if null_token else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Embeddings are as large as positions: the first norm sees both."""
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight)
        if self.null_token is not None:
            nn.init.normal_(self.null_token)

    def forward(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """text float [B, M, E] or ids int64 [B, M], NaN or -1 in unconditional rows; mask bool [B, M], None: all valid

        Returns the tokens [B, M, D], and which are valid, bool [B, M]. What masked tokens contain has no effect on
        valid ones.
        """
        null = text[:, 0] < 0 if self.embedding is not None else text[:, 0, 0].isnan()
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask
        if self.embedding is not None:
            x = self.embedding(text.clamp(min=0))
            x = x + sincos_frames(x.shape[1], x.shape[2]).to(x, non_blocking=x.is_cuda)
        else:
            assert self.norm is not None
            assert self.proj is not None
            # Masked tokens may hold anything, also values that are not finite.
            x = self.proj(self.norm(torch.where((mask & ~null[:, None])[..., None], text, 0)))
        attended = mask | ~mask.any(dim=1, keepdim=True)  # a softmax over nothing is not a number
        for layer in self.layers:
            x = layer(x, attended)
        x = self.norm_final(x)
        if self.null_token is None:
            return x, mask & ~null[:, None]
        is_first = torch.arange(x.shape[1], device=x.device) == 0
        null = null | ~mask.any(dim=1)
        x = torch.where(null[:, None, None], self.null_token.to(x.dtype), x)
        return x, torch.where(null[:, None], is_first, mask)

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one sample."""
        proj = 0 if self.proj is None else tokens * self.proj.weight.numel()
        return proj + sum(layer.macs(tokens) for layer in self.layers if isinstance(layer, TextLayer))
