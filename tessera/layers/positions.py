"""Positions of patches on a grid: a fixed table that is added, or angles by which queries and keys are rotated.

Shapes: B batch, N = h w tokens of an image or t h w of a clip, T frames, D width, E channels of a head.
"""

from collections.abc import Sequence
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
def sincos_grid(grid: tuple[int, ...], width: int) -> Tensor:
    """All axes of a grid (h, w) or (t, h, w): float32 [N, D].

    The first half of the channels encodes the column, the second half the row. A frame's position is added to all of
    them, less that of frame 0: so an image is the first frame of a clip, and an image network's weights hold for it.
    The grid may have any size. A patch has the same position on every grid. width must be divisible by 4.
    """
    # Always on the CPU: the cache must not hold a table without values from a network built on the meta device.
    rows, columns = torch.meshgrid(
        torch.arange(grid[-2], dtype=torch.float64, device="cpu"),
        torch.arange(grid[-1], dtype=torch.float64, device="cpu"),
        indexing="ij",
    )
    halves = (sincos(columns.flatten(), width // 2), sincos(rows.flatten(), width // 2))
    table = torch.cat(halves, dim=1)
    if len(grid) == 3:
        table = (sincos_frames(grid[0], width)[:, None] + table).flatten(0, 1)
    return table.to(torch.float32)


@lru_cache(maxsize=32)
def sincos_frames(frames: int, width: int) -> Tensor:
    """The positions of frames, less that of frame 0: float64 [T, D]"""
    table = sincos(torch.arange(frames, dtype=torch.float64, device="cpu"), width)
    return table - table[:1]


def rope_grid(grid: Sequence[int], channels: int, device: torch.device | None = None, temporal: bool = False) -> Tensor:
    """Angles for all axes of a grid (h, w) or (t, h, w), as (cosine, sine): float32 [N, E / 2, 2].

    The first half of a head's pairs of channels encodes the row, the second half the column, at the frequencies
    base^(-i / (E / 4)), i = 0 .. E / 4 - 1 (Su et al. 2021, "RoFormer", equation 15, for each axis). The base is 100,
    not the 10000 of text, because a grid has tens of rows, not thousands of words (Heo et al. 2024, "Rotary position
    embedding for vision transformer"). The grid may have any size; channels (E) must be divisible by 4.

    temporal: of a network for clips. The first quarter of the pairs encodes the frame (as in CogVideoX, Yang et al.
    2024), at the frequencies of text, and rows and columns share the others. An image is frame 0: it is not rotated.
    """
    # Not cached: it is a few small operations, and a table made in inference mode cannot be used in training.
    (frames, height, width), pairs = (1, *grid)[-3:], channels // 2
    spatial = 3 * pairs // 8 if temporal else pairs // 2
    counts, bases = (pairs - 2 * spatial, spatial, spatial), (10000.0, 100.0, 100.0)
    angles = []
    for axis, (length, count, base) in enumerate(zip((frames, height, width), counts, bases)):
        if count:
            frequencies = base ** (-torch.arange(count, dtype=torch.float32, device=device) / count)
            positions = torch.arange(length, dtype=torch.float32, device=device)
            shape = [length if index == axis else 1 for index in range(3)]
            angles.append((positions[:, None] * frequencies).view(*shape, -1).expand(frames, height, width, -1))
    flat = torch.cat(angles, dim=-1).flatten(0, 2)
    return torch.stack((flat.cos(), flat.sin()), dim=-1)


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
