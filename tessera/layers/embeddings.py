"""Embeddings of timesteps and labels, with the parameter names of the official checkpoints.

Shapes: B batch, D width, F sinusoid channels.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn


def sinusoidal_embedding(t: Tensor, channels: int, freq_divisor: float, max_period: float = 10000.0) -> Tensor:
    """t [...] -> [..., F]: cosines, then sines, of t max_period^(-i / freq_divisor), i = 0 .. F/2 - 1, in float32.

    The GLIDE form (Nichol et al. 2021) divides by F/2; diffusers' DiT divides by F/2 - 1.
    """
    # Multiply before dividing, as both do: at t = 999 the last bit of a frequency changes the network's output.
    exponents = -math.log(max_period) * torch.arange(channels // 2, dtype=torch.float32, device=t.device) / freq_divisor
    angles = t.to(torch.float32)[..., None] * torch.exp(exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEmbedder(nn.Module):
    """A sinusoidal embedding of the time, then a two-layer MLP."""

    CHANNELS = 256

    def __init__(self, width: int, freq_divisor: int = CHANNELS // 2) -> None:
        super().__init__()
        self.freq_divisor = freq_divisor
        self.mlp = nn.Sequential(nn.Linear(self.CHANNELS, width), nn.SiLU(), nn.Linear(width, width))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for linear in self.linears:
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        return cast(nn.Linear, self.mlp[0]), cast(nn.Linear, self.mlp[2])

    def forward(self, t: Tensor) -> Tensor:
        """t [...] in the units the network was trained in -> [..., D]"""
        return self.mlp(sinusoidal_embedding(t, self.CHANNELS, self.freq_divisor).to(self.linears[0].weight.dtype))

    def macs(self) -> int:
        """Multiply-adds for one time."""
        return sum(linear.weight.numel() for linear in self.linears)


class StepSizeEmbedder(nn.Module):
    """An embedding of the length of a step, exactly 0 for a step of length 0: there the network is as without it.

    All features of a length of 0 are 0, and the MLP has no biases. A new one is 0 everywhere.
    """

    CHANNELS = TimestepEmbedder.CHANNELS
    SCALE = 1000.0  # so that the lengths 0 to 1 span the same angles as times

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.CHANNELS, width, bias=False), nn.SiLU(), nn.Linear(width, width, bias=False)
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        first, last = cast(nn.Linear, self.mlp[0]), cast(nn.Linear, self.mlp[2])
        nn.init.normal_(first.weight, std=0.02)
        nn.init.zeros_(last.weight)

    def forward(self, step_size: Tensor) -> Tensor:
        """step_size [...] in the time of the diffusion process -> [..., D]"""
        cosines, sines = sinusoidal_embedding(self.SCALE * step_size, self.CHANNELS, self.CHANNELS // 2).chunk(2, -1)
        return self.mlp(torch.cat((1 - cosines, sines), dim=-1).to(cast(nn.Linear, self.mlp[0]).weight.dtype))

    def macs(self) -> int:
        """Multiply-adds for one length."""
        return sum(parameter.numel() for parameter in self.parameters())


class LabelEmbedder(nn.Module):
    """A learned vector per class, and one more for the null label, which label dropout and guidance use.

    std: of the initial weights.
    """

    def __init__(self, num_classes: int, width: int, learn_null_class: bool = True, std: float = 0.02) -> None:
        super().__init__()
        self.std = std
        self.num_classes = num_classes
        self.learn_null_class = learn_null_class
        self.embedding_table = nn.Embedding(num_classes + learn_null_class, width)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding_table.weight, std=self.std)

    def forward(self, label: Tensor | None) -> Tensor:
        """label [B], negative for the null label -> [B, D]

        Raises ValueError without labels, or if a label is null and the table has no null row.
        """
        if label is None:
            raise ValueError(f"this network is conditioned on {self.num_classes} classes: pass Condition(label=...)")
        is_null = label < 0
        if self.learn_null_class:
            label = torch.where(is_null, self.num_classes, label)
        elif bool(is_null.any()):
            raise ValueError(
                "this network has no null label (learn_null_class=false): no unconditional prediction and no guidance"
            )
        return self.embedding_table(label)
