"""A U-Net as large as a DiT, in multiply-adds or in parameters: what the two are compared at."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from tessera.errors import TesseraError
from tessera.models.dit import DiTConfig
from tessera.models.network import DATA_DEPENDENT, Network, NetworkConfig, parameter_count
from tessera.models.unet import UNetConfig

By = Literal["gmacs", "parameters"]

WITHIN = 0.03  # of what is matched
# The multipliers of so many levels: first as published, by ADM (Dhariwal & Nichol 2021, table 4 and its code) and of
# three levels for 32 x 32 latents (Rombach et al. 2022, LDM-8); then others, for sizes that lie between.
MULTIPLIERS = {
    1: [(1,)],
    2: [(1, 2), (1, 3), (1, 1)],
    3: [(1, 2, 4), (1, 2, 3), (1, 2, 2)],
    4: [(1, 2, 3, 4), (1, 2, 3, 3), (1, 2, 2, 2)],
    5: [(1, 1, 2, 3, 4)],
    6: [(1, 1, 2, 2, 4, 4)],
}
DEEPEST = 8  # positions along the shorter side of the deepest level: ADM's and LDM's
ATTENDS = 16  # the longest side of a level that attends: at 32 x 32 a small network would do little else
DEPTHS = (2, 3, 1, 4)  # the first is LDM's and most of ADM's
STEPS = ((4, 2), (1,))  # of the width: coarse ones at every depth, before fine ones

MEASURES: dict[By, Callable[[Network], int]] = {"gmacs": lambda network: network.macs(), "parameters": parameter_count}


def matched(dit: DiTConfig, by: By) -> UNetConfig:
    """The U-Net that sees and answers what a DiT does and is as large, to 3 %.

    Its width is searched, then its depth, then its multipliers. Raises TesseraError if none is near enough, as of a
    very small DiT.
    """
    target = size_of(dit, by)
    levels = next(levels for levels in reversed(MULTIPLIERS) if levels == 1 or _has(dit.input_size, levels))
    candidates: list[tuple[float, UNetConfig]] = []
    for multipliers in MULTIPLIERS[levels]:
        shapes = [_unet(dit, multipliers, depth) for depth in DEPTHS]
        laws = [_Law.of(shape, by) for shape in shapes]
        for steps in STEPS:
            for shape, law in zip(shapes, laws):
                for step in steps:
                    width = max(1, round(law.width(target) / step)) * step
                    candidates.append(
                        (abs(law.size(width) / target - 1), shape.model_copy(update={"model_channels": width}))
                    )
                    if candidates[-1][0] <= WITHIN:
                        return candidates[-1][1]
    error, best = min(candidates, key=lambda pair: pair[0])
    raise TesseraError(
        f"no U-Net has as many {by} as this DiT ({target:,}): the nearest, {best.summary()}, is {error:.1%} off; "
        "match a "
        "larger DiT, or say the U-Net's own settings"
    )


def size_of(network: NetworkConfig, by: By) -> int:
    """Multiply-adds of a forward pass of one image, or parameters."""
    with torch.device("meta"):
        return MEASURES[by](network.build())


@dataclass(frozen=True)
class _Law:
    """How large a U-Net is of a width w: a w^2 + b w + c, exactly, for multiply-adds and parameters alike."""

    a: float
    b: float
    c: float

    @classmethod
    def of(cls, shape: UNetConfig, by: By) -> "_Law":
        one, two, three = (size_of(shape.model_copy(update={"model_channels": width}), by) for width in (8, 16, 24))
        a = (three - 2 * two + one) / (2 * 8**2)
        b = (two - one) / 8 - a * (8 + 16)
        return cls(a, b, one - a * 8**2 - b * 8)

    def size(self, width: int) -> float:
        return (self.a * width + self.b) * width + self.c

    def width(self, size: int) -> float:
        """Were it any number."""
        return (math.sqrt(max(0.0, self.b**2 - 4 * self.a * (self.c - size))) - self.b) / (2 * self.a)


def _unet(dit: DiTConfig, multipliers: tuple[int, ...], depth: int) -> UNetConfig:
    factors = [2**level for level in range(len(multipliers))]
    return UNetConfig(
        **{name: getattr(dit, name) for name in (*DATA_DEPENDENT, "learn_null_class")},
        channel_mult=multipliers,
        num_res_blocks=depth,
        attention_levels=tuple(factor for factor in factors if max(dit.input_size) <= ATTENDS * factor),
    )


def _has(size: tuple[int, int], levels: int) -> bool:
    """Whether this number of levels is possible, with none after one that is deep enough; small images have two."""
    halved = 2 ** (levels - 1)
    if any(side % halved for side in size):
        return False
    return min(size) // (halved // 2) > DEEPEST or (levels == 2 and min(size) >= 4)
