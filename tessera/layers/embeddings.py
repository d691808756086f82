"""Times and labels to vectors, with the parameter names of the official checkpoints.

Shapes: B batch, D width, F sinusoid channels.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn


def sinusoid(t: Tensor, channels: int, divisor: float, period: float = 10000.0) -> Tensor:
    """t [...] -> [..., F]: cosines then sines of frequencies period^(-i / divisor), i = 0 .. F/2 - 1, in float32.

    The GLIDE form (Nichol et al. 2021) divides by F/2; diffusers' DiT divides by F/2 - 1.
    """
    # Multiplied before divided, as both do: at t = 999 the last bit of a frequency changes the network's output.
    exponents = -math.log(period) * torch.arange(channels // 2, dtype=torch.float32, device=t.device) / divisor
    angles = t.to(torch.float32)[..., None] * torch.exp(exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEmbedder(nn.Module):
    """A sinusoid of the time, then a two-layer MLP."""

    CHANNELS = 256

    def __init__(self, width: int, divisor: int = CHANNELS // 2) -> None:
        super().__init__()
        self.divisor = divisor
        self.mlp = nn.Sequential(nn.Linear(self.CHANNELS, width), nn.SiLU(), nn.Linear(width, width))

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        return cast(nn.Linear, self.mlp[0]), cast(nn.Linear, self.mlp[2])

    def forward(self, t: Tensor) -> Tensor:
        """t [...] in the units the network was trained in -> [..., D]"""
        return self.mlp(sinusoid(t, self.CHANNELS, self.divisor).to(self.linears[0].weight.dtype))

    def macs(self) -> int:
        """Multiply-adds for one time."""
        return sum(linear.weight.numel() for linear in self.linears)


class LabelEmbedder(nn.Module):
    """A learned vector for each class, and one more for the null label, which label dropout and guidance use."""

    def __init__(self, classes: int, width: int, learn_null_class: bool = True) -> None:
        super().__init__()
        self.classes = classes
        self.learn_null_class = learn_null_class
        self.embedding_table = nn.Embedding(classes + learn_null_class, width)

    def forward(self, label: Tensor, drop: Tensor | None = None) -> Tensor:
        """label [B] (negative: the null label), drop [B] forces the null label where true -> [B, D]

        Raises ValueError if a label is null and the table has no null row.
        """
        is_null = label < 0 if drop is None else (label < 0) | drop
        if self.learn_null_class:
            label = torch.where(is_null, self.classes, label)
        elif bool(is_null.any()):
            raise ValueError(
                "this network has no null label (learn_null_class=false): no unconditional prediction and no guidance"
            )
        return self.embedding_table(label)
