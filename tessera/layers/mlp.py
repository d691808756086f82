"""The feed-forward half of a transformer block.

Shapes: B batch, N tokens, D width.
"""

from torch import Tensor, nn
from torch.nn.functional import silu

from tessera.layers.fused_linear import FusedLinear


class MLP(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int, hidden_width: int, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width, bias=bias)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]"""
        return self.fc2(self.act(self.fc1(x)))

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one sample."""
        return 2 * tokens * self.fc1.in_features * self.fc1.out_features


class SwiGLU(nn.Module):
    """W2 (silu(gate) * up), with gate and up from one linear layer (Shazeer 2020, "GLU variants improve transformer").

    hidden_width: of the MLP it replaces. Two thirds of it, rounded up to a multiple of 8, cost the same in three
    matrices.
    """

    def __init__(self, width: int, hidden_width: int, bias: bool = True) -> None:
        super().__init__()
        hidden_width = -(-hidden_width // 12) * 8
        self.fc1 = FusedLinear(width, hidden_width, num_projections=2, bias=bias)
        self.fc2 = nn.Linear(hidden_width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]"""
        gate, up = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(silu(gate) * up)

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one sample."""
        return 3 * tokens * self.fc2.in_features * self.fc2.out_features
