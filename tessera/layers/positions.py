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


def rope_grid(
    grid: Sequence[int],
    channels: int,
    device: torch.device | None = None,
    first_frame: int = 0,
    frame_positions: bool = True,
) -> Tensor:
    """Angles for all axes of a grid (h, w) or (t, h, w), as (cosine, sine): float32 [N, E / 2, 2].

    The first half of a head's pairs of channels encodes the row, the second half the column, at the frequencies
    base^(-i / (E / 4)), i = 0 .. E / 4 - 1 (Su et al. 2021, "RoFormer", equation 15, for each axis). The base is 100,
    not the 10000 of text, because a grid has tens of rows, not thousands of words (Heo et al. 2024, "Rotary position
    embedding for vision transformer"). The grid may have any size; channels (E) must be divisible by 4.

    The lower half of the frequencies of rows and of columns encodes the frame, too: they turn so little over a grid
    that most of their range is free. Frame t adds t base^(-j / n) to the angles of these n pairs. So frame 0 has the
    angles of an image, a token's angles are linear in its position, and what queries and keys see is relative on all
    three axes. first_frame: the number of the first frame of the grid. Without frame_positions all are frame 0.
    """
    # Not cached: it is a few small operations, and a table made in inference mode cannot be used in training.
    (frames, height, width), count = (1, *grid)[-3:], channels // 4
    exponents = torch.arange(count, dtype=torch.float32, device=device)
    frequencies = 100.0 ** (-exponents / count)
    axes = [torch.arange(length, dtype=torch.float32, device=device) for length in (height, width)]
    rows, columns = (positions[:, None] * frequencies for positions in axes)
    flat = torch.cat((rows.repeat_interleave(width, 0), columns.repeat(height, 1)), dim=-1)
    if frames > 1 or first_frame:
        low = (count + 1) // 2  # of each axis
        time = torch.arange(first_frame, first_frame + frames, dtype=torch.float32, device=device) * frame_positions
        turns = torch.arange(2 * low, dtype=torch.float32, device=device).view(low, 2).T  # alternating: row, column
        turns = torch.nn.functional.pad(100.0 ** (-turns / (2 * low)), (count - low, 0)).flatten()
        flat = (flat + (time[:, None] * turns)[:, None]).flatten(0, 1)
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
