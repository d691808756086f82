"""Modulation of tokens by a conditioning vector: shift, scale and gate (Perez et al. 2018; Peebles & Xie 2023, section
3.2).

Shapes: B batch, L tokens, D width; the modulation parameters are [B, 1, D] or [B, L, D].
"""

from typing import cast

import torch
from torch import Tensor, nn


class Modulation(nn.Sequential):
    """Modulation parameters from a conditioning vector: SiLU, then one linear map.

    channels: of each vector, if not as many as the condition has.
    """

    def __init__(self, width: int, count: int, channels: int | None = None) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, count * (channels or width)))

    @property
    def linear(self) -> nn.Linear:
        return cast(nn.Linear, self[1])

    def macs(self) -> int:
        """Multiply-adds for one condition vector."""
        return self.linear.weight.numel()


class ScaleShiftTable(nn.Module):
    """A block's own offset to modulation parameters that all blocks share: one learned table, added to them.

    adaLN-single (Chen et al. 2023, "PixArt-alpha", section 2.3). It costs no multiply-adds.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(count, width))

    def forward(self, shared: Tensor) -> Tensor:
        """shared [B, G, count D] -> [B, G, count D]"""
        return shared + self.table.flatten()

    def macs(self) -> int:
        """Multiply-adds for one condition vector."""
        return 0


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, in one pass over x [B, L, D]."""
    return torch.addcmul(shift, x, 1 + scale)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch, in one pass over x [B, L, D]."""
    return torch.addcmul(x, gate, branch)
