"""Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

The numbers are a function of seed, position and use; there is no generator state. So the numbers of global sample 4711
do not depend on the rank, the batch, the device or the number of restarts. Shapes: B rows, each with its own position.
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor | int, Tensor | int]
) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32: four counter words and two key words (32 bits in int64) -> four random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Both factors are below 2^32, so the product fits 64 bits. int64 wraps, and the mask removes the sign.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _MASK, product0 & _MASK
        high1, low1 = (product1 >> 32) & _MASK, product1 & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def words(seed: Tensor | int, position: Tensor, stream: int, count: int) -> Tensor:
    """`count` random 32-bit words for each row, as int64 [B, count].

    seed: one integer, or one per row [B]. position [B]: the index of the row in its sequence. stream: identifies the
    use (noise, times, flips, ...), so that two uses at one position are independent.
    """
    if isinstance(seed, Tensor):
        seed = seed.to(position.device, torch.int64)[:, None]
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=position.device)
    rows = position.to(torch.int64)[:, None]
    counter = (
        blocks.expand(len(position), -1),
        torch.full_like(rows, stream),
        rows & _MASK,
        (rows >> 32) & _MASK,
    )
    key = (seed & _MASK, (seed >> 32) & _MASK)  # a Python integer stays one: no synchronization with the GPU
    return torch.stack(philox(counter, key), dim=-1).flatten(1)[:, :count]


def uniform(seed: Tensor | int, position: Tensor, stream: int, count: int = 1) -> Tensor:
    """Uniform numbers in [0, 1) with 24 bits, float32 [B, count]."""
    return (words(seed, position, stream, count) >> 8).to(torch.float32) * 2.0**-24


def normal(seed: Tensor | int, position: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers by Box-Muller, float32 [B, *shape]."""
    count = math.prod(shape)
    pairs = words(seed, position, stream, 2 * ((count + 1) // 2)).unflatten(1, (-1, 2))
    radius = torch.sqrt(-2.0 * torch.log((pairs[..., 0].to(torch.float32) + 0.5) * 2.0**-32))
    angle = pairs[..., 1].to(torch.float32) * (2.0 * math.pi * 2.0**-32)
    numbers = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return numbers.flatten(1)[:, :count].reshape(-1, *shape)


def permutation(seed: int, stream: int, index: int, length: int) -> Tensor:
    """The shuffle number `index` of 0 .. length - 1, int64 [length]: the order of one random key for each element."""
    position = torch.tensor([index], dtype=torch.int64)
    return torch.argsort(words(seed, position, stream, length)[0], stable=True)
