"""The feed-forward half of a transformer block.

Shapes: B batch, L tokens, D width.
"""

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L, D]"""
        return self.fc2(self.act(self.fc1(x)))

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one sample."""
        return 2 * tokens * self.fc1.in_features * self.fc1.out_features
