"""Positions of patches on a grid: a fixed table that is added, or an angle that queries and keys are turned by.

Shapes: B batch, L = h w tokens, D width, K heads, H channels of a head.
"""

from functools import lru_cache

import torch
from torch import Tensor


def sincos(positions: Tensor, width: int) -> Tensor:
    """One axis: positions [L] (float64) -> [L, width], all sines then all cosines, base 10000 (Vaswani et al. 2017)."""
    channels = torch.arange(width // 2, dtype=torch.float64, device=positions.device)
    frequencies = 10000.0 ** (-channels / (width / 2))
    angles = positions[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)


@lru_cache(maxsize=32)
def sincos_grid(grid: tuple[int, int], width: int) -> Tensor:
    """Both axes of a grid (h, w): float32 [L, D], the column in the first half of the channels, the row in the second.

    Any grid, square or not; the same patch has the same position on every grid. width must be divisible by 4.
    """
    # On the CPU whatever the default device: a table made while a network is built on "meta" would stay in the cache.
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64, device="cpu"),
        torch.arange(grid[1], dtype=torch.float64, device="cpu"),
        indexing="ij",
    )
    halves = (sincos(columns.flatten(), width // 2), sincos(rows.flatten(), width // 2))
    return torch.cat(halves, dim=1).to(torch.float32)


def rotary_grid(grid: tuple[int, int], channels: int, device: torch.device | None = None) -> Tensor:
    """Angles for both axes of a grid (h, w), as (cosine, sine): float32 [L, H / 2, 2].

    The first half of a head's pairs of channels turns with the row, the second with the column, at the frequencies
    base^(-i / (H / 4)), i = 0 .. H / 4 - 1 (Su et al. 2021, "RoFormer", equation 15, for each axis). The base is 100,
    not the 10000 of text: grids have tens of rows, not thousands of words (Heo et al. 2024, "Rotary position embedding
    for vision transformer"). Any grid; channels (H) must be divisible by 4.
    """
    # Not kept between calls: it is a few small operations, and a table made in inference mode cannot be trained with.
    frequencies = 100.0 ** (-torch.arange(channels // 4, dtype=torch.float32, device=device) / (channels // 4))
    rows = torch.arange(grid[0], dtype=torch.float32, device=device)[:, None, None] * frequencies
    columns = torch.arange(grid[1], dtype=torch.float32, device=device)[:, None] * frequencies
    angles = torch.cat((rows.expand(*grid, -1), columns.expand(*grid, -1)), dim=-1).flatten(0, 1)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of x [B, L, ..., H] by its angle in rotary [L, H / 2, 2].

    The product of a turned query and a turned key depends on where they stand to each other alone (Su et al. 2021,
    equation 16), and no length changes.
    """
    pairs = x.unflatten(-1, (-1, 2))
    rotary = rotary.view(rotary.shape[0], *[1] * (x.ndim - 3), *rotary.shape[1:])
    if torch.compiler.is_compiling():  # which fuses real arithmetic and knows no complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), rotary.unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(rotary)  # one pass over x
    return torch.view_as_real(turned).flatten(-2)
