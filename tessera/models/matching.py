"""Find a U-Net with as many multiply-adds or parameters as a DiT, to compare the two at equal size."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tessera.errors import TesseraError
from tessera.models.dit import DiTConfig
from tessera.models.network import DATA_DEPENDENT, Network, NetworkConfig, parameter_count
from tessera.models.unet import UNetConfig

By = Literal["gmacs", "parameters"]

TOLERANCE = 0.03  # relative difference of the sizes
# channel_mult by number of levels. First the published ones: ADM (Dhariwal & Nichol 2021, table 4 and its code) and,
# for three levels, 32 x 32 latents (Rombach et al. 2022, LDM-8). Then others, for sizes in between.
CHANNEL_MULTS = {
    1: [(1,)],
    2: [(1, 2), (1, 3), (1, 1)],
    3: [(1, 2, 4), (1, 2, 3), (1, 2, 2)],
    4: [(1, 2, 3, 4), (1, 2, 3, 3), (1, 2, 2, 2)],
    5: [(1, 1, 2, 3, 4)],
    6: [(1, 1, 2, 2, 4, 4)],
}
MIN_LEVEL_SIZE = 8  # shorter side of the deepest level, as in ADM and LDM
MAX_ATTENTION_SIZE = 16  # longer side of a level with attention: at 32 x 32 it dominates the cost of a small network
NUM_RES_BLOCKS = (2, 3, 1, 4)  # the first is that of LDM and most ADM networks
WIDTH_STEPS = ((4, 2), (1,))  # granularity of model_channels: coarse steps at every depth before fine ones

MEASURES: dict[By, Callable[[Network], int]] = {"gmacs": lambda network: network.macs(), "parameters": parameter_count}


def match_unet(dit: DiTConfig, by: By) -> UNetConfig:
    """Return a U-Net with the inputs, the outputs and, to 3 %, the size of a DiT.

    The search varies model_channels first, then num_res_blocks, then channel_mult. Raises TesseraError if no U-Net is
    close enough, as happens for a very small DiT.
    """
    target = network_size(dit, by)
    levels = next(
        levels for levels in reversed(CHANNEL_MULTS) if levels == 1 or _supports_levels(dit.input_size[-2:], levels)
    )
    candidates: list[tuple[float, UNetConfig]] = []
    for channel_mult in CHANNEL_MULTS[levels]:
        shapes = [_unet_like(dit, channel_mult, num_res_blocks) for num_res_blocks in NUM_RES_BLOCKS]
        size_laws = [_SizeLaw.fit(shape, by) for shape in shapes]
        for steps in WIDTH_STEPS:
            for shape, law in zip(shapes, size_laws):
                for step in steps:
                    width = max(1, round(law.width(target) / step)) * step
                    error = abs(law.size(width) / target - 1)
                    unet = shape.model_copy(update={"model_channels": width})
                    if error <= TOLERANCE:
                        return unet
                    candidates.append((error, unet))
    error, best = min(candidates, key=lambda pair: pair[0])
    raise TesseraError(
        f"no U-Net has as many {by} as this DiT ({target:,}): the nearest, {best.summary()}, is {error:.1%} off; "
        "match a larger DiT, or set the U-Net's own settings"
    )


def network_size(network: NetworkConfig, by: By) -> int:
    """Multiply-adds of a forward pass for one image, or number of parameters."""
    with torch.device("meta"):
        return MEASURES[by](network.build())


@dataclass(frozen=True)
class _SizeLaw:
    """The size of a U-Net as a function of its width w: a w^2 + b w + c, exact for multiply-adds and parameters."""

    a: float
    b: float
    c: float

    @classmethod
    def fit(cls, shape: UNetConfig, by: By) -> "_SizeLaw":
        one, two, three = (
            network_size(shape.model_copy(update={"model_channels": width}), by) for width in (8, 16, 24)
        )
        a = (three - 2 * two + one) / (2 * 8**2)
        b = (two - one) / 8 - a * (8 + 16)
        return cls(a, b, one - a * 8**2 - b * 8)

    def size(self, width: int) -> float:
        return (self.a * width + self.b) * width + self.c

    def width(self, size: int) -> float:
        """The width, not rounded, of a U-Net of this size."""
        return (math.sqrt(max(0.0, self.b**2 - 4 * self.a * (self.c - size))) - self.b) / (2 * self.a)


def _unet_like(dit: DiTConfig, channel_mult: tuple[int, ...], num_res_blocks: int) -> UNetConfig:
    factors = [2**level for level in range(len(channel_mult))]
    return UNetConfig(
        **{name: getattr(dit, name) for name in (*DATA_DEPENDENT, "learn_null_class")},
        channel_mult=channel_mult,
        num_res_blocks=num_res_blocks,
        attention_levels=tuple(factor for factor in factors if max(dit.input_size[-2:]) <= MAX_ATTENTION_SIZE * factor),
    )


def _supports_levels(size: Sequence[int], levels: int) -> bool:
    """Whether a size can be halved to this number of levels, and needs the last one; small images have two levels."""
    factor = 2 ** (levels - 1)
    if any(side % factor for side in size):
        return False
    return min(size) // (factor // 2) > MIN_LEVEL_SIZE or (levels == 2 and min(size) >= 4)
