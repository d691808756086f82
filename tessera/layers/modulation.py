"""adaLN modulation: shift, scale and gate computed from a conditioning vector (Perez et al. 2018; Peebles & Xie 2023,
section 3.2).

Shapes: B batch, N tokens, G conditioning vectors, D width. Shift, scale and gate are [B, G, D]. G divides N, and vector
g belongs to the tokens g N / G and following: G = 1 for all tokens, G = T for frames with their own times, G = N for
tokens with their own times.
"""

from typing import cast

import torch
from torch import Tensor, nn


class Modulation(nn.Sequential):
    """Shifts, scales and gates from a conditioning vector: SiLU, then one linear layer.

    width: of the conditioning vector. num_params: vectors computed. channels: of each of them (default: width).
    """

    def __init__(self, width: int, num_params: int, channels: int | None = None) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, num_params * (channels or width)))

    @property
    def linear(self) -> nn.Linear:
        return cast(nn.Linear, self[1])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero: a new block with gates is the identity."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def params(self, c: Tensor, shared: Tensor | None) -> Tensor:
        """Parameters [B, G, num_params D] from conditioning vectors c [B, G, D]; shared parameters are not used."""
        return self(c)

    def macs(self) -> int:
        """Multiply-adds for one conditioning vector."""
        return self.linear.in_features * self.linear.out_features


class ScaleShiftTable(nn.Module):
    """A learned offset of one block to modulation parameters that all blocks share.

    adaLN-single (Chen et al. 2023, "PixArt-alpha", section 2.3). It needs no multiply-adds.
    """

    def __init__(self, width: int, num_params: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_params, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero: a new block has the shared parameters."""
        nn.init.zeros_(self.table)

    def forward(self, shared: Tensor) -> Tensor:
        """shared [B, G, num_params D] -> [B, G, num_params D]"""
        return shared + self.table.flatten()

    def params(self, c: Tensor, shared: Tensor | None) -> Tensor:
        """Parameters [B, G, num_params D] from the shared ones of the same shape; c is not used."""
        assert shared is not None, "SharedConditioning computes these before the first block"
        return self(shared)

    def macs(self) -> int:
        """Multiply-adds for one conditioning vector."""
        return 0


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, in one pass over x [B, N, D]. shift, scale [B, G, D]"""
    if _broadcasts(shift, x):
        return torch.addcmul(shift, x, 1 + scale)
    x = x.unflatten(1, (shift.shape[1], -1))  # B (G n) D -> B G n D
    return torch.addcmul(shift[:, :, None], x, 1 + scale[:, :, None]).flatten(1, 2)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch, in one pass over x [B, N, D]. gate [B, G, D]"""
    if _broadcasts(gate, x):
        return torch.addcmul(x, gate, branch)
    x, branch = (tokens.unflatten(1, (gate.shape[1], -1)) for tokens in (x, branch))
    return torch.addcmul(x, gate[:, :, None], branch).flatten(1, 2)


def _broadcasts(params: Tensor, x: Tensor) -> bool:
    """Whether there is one conditioning vector, or one for each token."""
    return params.shape[1] in (1, x.shape[1])
