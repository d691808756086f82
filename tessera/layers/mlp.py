"""The feed-forward half of a transformer block.

Shapes: B batch, L tokens, D width.
"""

from torch import Tensor, nn
from torch.nn.functional import silu

from tessera.layers.fused_linear import FusedLinear


class MLP(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]"""
        return self.fc2(self.act(self.fc1(x)))

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one sample."""
        return 2 * tokens * self.fc1.in_features * self.fc1.out_features


class SwiGLU(nn.Module):
    """W2 (silu(gate) * up), gate and up from one linear layer (Shazeer 2020, "GLU variants improve transformer").

    hidden: of the MLP it replaces; two thirds of it, rounded up to a multiple of 8, cost as much in three matrices.
    """

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        hidden = -(-hidden // 12) * 8
        self.fc1 = FusedLinear(width, hidden, num_projections=2, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]"""
        gate, up = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(silu(gate) * up)

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one sample."""
        return 3 * tokens * self.fc2.in_features * self.fc2.out_features
