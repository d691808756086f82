"""Which of the trained steps a drawing visits: falling times from the first step to 0.

Every function takes the number of steps to take and the number trained, and gives float32 [count + 1].
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tessera.errors import TesseraError

Spacing = Literal["even", "leading", "trailing"]


def even(count: int, trained: int) -> list[int]:
    """From the first to the last trained step, as the official code respaces (Nichol & Dhariwal 2021)."""
    if count == 1:
        return [trained - 1]  # the official code would keep step 0 alone, which leaves pure noise untouched
    stride = (trained - 1) / (count - 1)
    kept, place = [], 0.0
    for _ in range(count):  # summed as the official code does: a product rounds some steps differently
        kept.append(round(place))
        place += stride
    return kept


def leading(count: int, trained: int) -> list[int]:
    """Multiples of a whole stride from step 0: the default of diffusers' schedulers."""
    stride = trained // count
    return [i * stride for i in range(count)]


def trailing(count: int, trained: int) -> list[int]:
    """A stride back from the last step, so that drawing starts in full noise (Lin et al. 2024, table 2)."""
    return sorted(max(round(trained - i * trained / count) - 1, 0) for i in range(count))


SPACINGS: dict[Spacing, Callable[[int, int], list[int]]] = {"even": even, "leading": leading, "trailing": trailing}


def times(spacing: Spacing, count: int, trained: int) -> Tensor:
    """Falling times [count + 1] from the highest kept step to 0. TesseraError if count is not in 1 .. trained."""
    if not 1 <= count <= trained:
        raise TesseraError(f"steps is {count}; this model was trained with {trained}, so give 1 to {trained}")
    kept = sorted(SPACINGS[spacing](count, trained), reverse=True)
    return torch.tensor([(step + 1) / trained for step in kept] + [0.0])
