"""Fixed positions of patches on a grid.

Shapes: L = h w tokens, D width.
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
