"""Which times a drawing visits: a grid is `grid(count, process)`, falling times [count + 1] that end at 0, float64.

A process trained in discrete steps has that many times; one trained in continuous time has any. Grids that are curves
may fall between the trained steps, where a network of discrete steps still knows its way, but never beyond the first
and the last of them.
"""

from typing import Annotated, Literal, Self

import torch
from pydantic import BeforeValidator, Field, PositiveFloat, model_validator
from torch import Tensor

from tessera.diffusion import DiffusionProcess
from tessera.diffusion.flow import shifted
from tessera.errors import TesseraError
from tessera.settings import Settings, by_kind


class Uniform(Settings):
    """Equal strides from the first trained time to the last, as the official code respaces (Nichol & Dhariwal 2021)."""

    kind: Literal["uniform"] = "uniform"

    def __call__(self, count: int, process: DiffusionProcess) -> Tensor:
        if process.steps is None:
            return torch.linspace(1, 0, count + 1, dtype=torch.float64)
        if count == 1:
            return of_steps([process.steps - 1], process)  # the official code would keep step 0 alone: pure noise
        stride = (process.steps - 1) / (count - 1)
        kept, place = [], 0.0
        for _ in range(count):  # summed as the official code does: a product rounds some steps differently
            kept.append(round(place))
            place += stride
        return of_steps(kept, process)


class Leading(Settings):
    """Multiples of a whole stride from step 0: the default of diffusers' schedulers. Only for discrete steps."""

    kind: Literal["leading"] = "leading"

    def __call__(self, count: int, process: DiffusionProcess) -> Tensor:
        if process.steps is None:
            raise TesseraError(
                "leading times belong to a process of discrete steps; this one is continuous: use uniform or shifted"
            )
        stride = process.steps // count
        return of_steps([i * stride for i in range(count)], process)


class Trailing(Settings):
    """A stride back from the last step, so that drawing starts in full noise (Lin et al. 2024, table 2)."""

    kind: Literal["trailing"] = "trailing"

    def __call__(self, count: int, process: DiffusionProcess) -> Tensor:
        if process.steps is None:
            return Uniform()(count, process)
        trained = process.steps
        return of_steps([max(round(trained - i * trained / count) - 1, 0) for i in range(count)], process)


class Quadratic(Settings):
    """Squares of an even grid: denser near the data (Song et al. 2021, appendix D.2)."""

    kind: Literal["quadratic"] = "quadratic"

    def __call__(self, count: int, process: DiffusionProcess) -> Tensor:
        return within(torch.linspace(1, 0, count + 1, dtype=torch.float64) ** 2, process)


class Shifted(Settings):
    """An even grid moved towards the noise by shift > 1 (Esser et al. 2024, equation 23)."""

    kind: Literal["shifted"] = "shifted"
    shift: PositiveFloat = 3.0

    def __call__(self, count: int, process: DiffusionProcess) -> Tensor:
        return within(shifted(torch.linspace(1, 0, count + 1, dtype=torch.float64), self.shift), process)


class _ByRatio(Settings):
    """A grid of noise-to-data ratios sigma / alpha.

    smallest and largest: the last before the data and the first. A process of discrete steps stays within those it was
    trained at. Whatever the largest, the first time is 1: drawing begins in noise.
    """

    smallest: PositiveFloat = 0.002
    largest: PositiveFloat = 80.0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.smallest >= self.largest:
            raise ValueError(f"smallest is {self.smallest:g} and largest {self.largest:g}: it must be below it")
        return self

    def between(self, first: Tensor, last: Tensor, share: Tensor) -> Tensor:
        """The ratios at shares of the way from the first to the last."""
        raise NotImplementedError

    def __call__(self, count: int, process: DiffusionProcess) -> Tensor:
        first, last = torch.tensor([self.largest, self.smallest], dtype=torch.float64)
        if process.steps is not None:
            ends = torch.tensor([1, 1 / process.steps], dtype=torch.float64)
            ratio = process.sigma(ends) / process.alpha(ends)
            if self.largest <= ratio[1] or self.smallest >= ratio[0]:
                raise TesseraError(
                    f"spacing.smallest {self.smallest:g} to spacing.largest {self.largest:g} lies outside of what this "
                    f"process was trained at: ratios of noise to data from {ratio[1]:.3g} to {ratio[0]:.3g}"
                )
            first, last = first.clamp(max=ratio[0]), last.clamp(min=ratio[1])
        ratios = self.between(first, last, torch.linspace(0, 1, count, dtype=torch.float64))
        times = torch.cat((process.time_from_nsr(ratios), torch.zeros(1, dtype=torch.float64)))
        times[0] = 1
        return times


class Karras(_ByRatio):
    """Noise-to-data ratios whose rho-th roots are even (Karras et al. 2022, equation 5)."""

    kind: Literal["karras"] = "karras"
    rho: PositiveFloat = 7.0

    def between(self, first: Tensor, last: Tensor, share: Tensor) -> Tensor:
        return torch.lerp(first ** (1 / self.rho), last ** (1 / self.rho), share) ** self.rho


class LogSNR(_ByRatio):
    """Even in the logarithm of the signal-to-noise ratio (Lu et al. 2022, "DPM-Solver", section 3.4)."""

    kind: Literal["logsnr"] = "logsnr"

    def between(self, first: Tensor, last: Tensor, share: Tensor) -> Tensor:
        return torch.lerp(first.log(), last.log(), share).exp()


AnyTimestepSpacing = Annotated[
    Uniform | Leading | Trailing | Quadratic | Shifted | Karras | LogSNR,
    BeforeValidator(by_kind),
    Field(discriminator="kind"),
]
SPACINGS = {
    "uniform": Uniform, "leading": Leading, "trailing": Trailing,
    "quadratic": Quadratic, "shifted": Shifted, "karras": Karras, "logsnr": LogSNR,
}  # fmt: skip


def of_steps(steps: list[int], process: DiffusionProcess) -> Tensor:
    """Trained steps in any order -> falling times with 0 at the end."""
    assert process.steps is not None
    falling = [(step + 1) / process.steps for step in sorted(steps, reverse=True)]
    return torch.tensor([*falling, 0.0], dtype=torch.float64)


def within(curve: Tensor, process: DiffusionProcess) -> Tensor:
    """A curve that falls from 1 to 0; for a process of discrete steps, its inner part ends at the first of them."""
    if process.steps is None:
        return curve
    first = 1 / process.steps
    return torch.where(curve > 0, first + (1 - first) * curve, 0)


def timestep_grid(spacing: AnyTimestepSpacing, count: int, process: DiffusionProcess) -> Tensor:
    """Falling times [count + 1] of a grid, float64: no two alike in their noise.

    Raises TesseraError if the process has not so many, or the grid cannot tell them apart.
    """
    if process.steps is not None and not 1 <= count <= process.steps:
        raise TesseraError(
            f"steps is {count}; this model was trained with {process.steps}, so give 1 to {process.steps}"
        )
    if count < 1:
        raise TesseraError(f"steps is {count}; give 1 or more")
    found = spacing(count, process)
    noise = process.sigma(found) - process.alpha(found)  # rises with the time on every path
    if not ((found.diff() < 0) & (noise.diff() < 0)).all():
        raise TesseraError(f"{spacing.kind} times run together at {count} steps; use fewer steps, or uniform times")
    return found
