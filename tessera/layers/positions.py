"""Positions of patches on a grid: a fixed table that is added, or angles by which queries and keys are rotated.

Shapes: B batch, N = h w tokens, D width, E channels of a head.
"""

from functools import lru_cache

import torch
from torch import Tensor


def sincos(positions: Tensor, width: int) -> Tensor:
    """One axis: positions [N] (float64) -> [N, width], sines, then cosines, base 10000 (Vaswani et al. 2017)."""
    channels = torch.arange(width // 2, dtype=torch.float64, device=positions.device)
    frequencies = 10000.0 ** (-channels / (width / 2))
    angles = positions[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)


@lru_cache(maxsize=32)
def sincos_grid(grid: tuple[int, int], width: int) -> Tensor:
    """Both axes of a grid (h, w): float32 [N, D], the column in the first half of the channels, the row in the second.

    The grid may have any size. A patch has the same position on every grid. width must be divisible by 4.
    """
    # Always on the CPU: the cache must not hold a table without values from a network built on the meta device.
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64, device="cpu"),
        torch.arange(grid[1], dtype=torch.float64, device="cpu"),
        indexing="ij",
    )
    halves = (sincos(columns.flatten(), width // 2), sincos(rows.flatten(), width // 2))
    return torch.cat(halves, dim=1).to(torch.float32)


def rope_grid(grid: tuple[int, int], channels: int, device: torch.device | None = None) -> Tensor:
    """Angles for both axes of a grid (h, w), as (cosine, sine): float32 [N, E / 2, 2].

    The first half of a head's pairs of channels encodes the row, the second half the column, at the frequencies
    base^(-i / (E / 4)), i = 0 .. E / 4 - 1 (Su et al. 2021, "RoFormer", equation 15, for each axis). The base is 100,
    not the 10000 of text, because a grid has tens of rows, not thousands of words (Heo et al. 2024, "Rotary position
    embedding for vision transformer"). The grid may have any size; channels (E) must be divisible by 4.
    """
    # Not cached: it is a few small operations, and a table made in inference mode cannot be used in training.
    frequencies = 100.0 ** (-torch.arange(channels // 4, dtype=torch.float32, device=device) / (channels // 4))
    rows = torch.arange(grid[0], dtype=torch.float32, device=device)[:, None, None] * frequencies
    columns = torch.arange(grid[1], dtype=torch.float32, device=device)[:, None] * frequencies
    angles = torch.cat((rows.expand(*grid, -1), columns.expand(*grid, -1)), dim=-1).flatten(0, 1)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate each pair of neighboring channels of x [B, N, ..., E] by its angle in rope [N, E / 2, 2].

    The dot product of a rotated query and a rotated key depends only on their relative position (Su et al. 2021,
    equation 16). Norms do not change.
    """
    pairs = x.unflatten(-1, (-1, 2))
    rope = rope.view(rope.shape[0], *[1] * (x.ndim - 3), *rope.shape[1:])
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic and does not support complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    rotated = torch.view_as_complex(pairs) * torch.view_as_complex(rope)  # one pass over x
    return torch.view_as_real(rotated).flatten(-2)
