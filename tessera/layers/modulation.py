"""Steering tokens by a condition vector: shift, scale and gate (Perez et al. 2018; Peebles & Xie 2023, section 3.2).

Shapes: B batch, L tokens, D width; the steering vectors are [B, 1, D] or [B, L, D].
"""

import torch
from torch import Tensor


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, in one pass over x [B, L, D]."""
    return torch.addcmul(shift, x, 1 + scale)


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch, in one pass over x [B, L, D]."""
    return torch.addcmul(x, gate, branch)
