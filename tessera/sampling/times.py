"""Which times a drawing visits: a grid is `grid(count, process)`, falling times [count + 1] that end at 0, float64.

A process trained in discrete steps has that many times; one trained in continuous time has any.
"""

from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveFloat
from torch import Tensor

from tessera.errors import TesseraError
from tessera.process import Process
from tessera.process.flow import shifted
from tessera.settings import Settings, by_kind


class Even(Settings):
    """Equal strides from the first trained time to the last, as the official code respaces (Nichol & Dhariwal 2021)."""

    kind: Literal["even"] = "even"

    def __call__(self, count: int, process: Process) -> Tensor:
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

    def __call__(self, count: int, process: Process) -> Tensor:
        if process.steps is None:
            raise TesseraError(
                "leading times belong to a process of discrete steps; this one is continuous: use even or shifted"
            )
        stride = process.steps // count
        return of_steps([i * stride for i in range(count)], process)


class Trailing(Settings):
    """A stride back from the last step, so that drawing starts in full noise (Lin et al. 2024, table 2)."""

    kind: Literal["trailing"] = "trailing"

    def __call__(self, count: int, process: Process) -> Tensor:
        if process.steps is None:
            return Even()(count, process)
        trained = process.steps
        return of_steps([max(round(trained - i * trained / count) - 1, 0) for i in range(count)], process)


class Quadratic(Settings):
    """Squares of an even grid: denser near the data (Song et al. 2021, appendix D.2)."""

    kind: Literal["quadratic"] = "quadratic"

    def __call__(self, count: int, process: Process) -> Tensor:
        return torch.linspace(1, 0, count + 1, dtype=torch.float64) ** 2


class Shifted(Settings):
    """An even grid moved towards the noise by shift > 1 (Esser et al. 2024, equation 23)."""

    kind: Literal["shifted"] = "shifted"
    shift: PositiveFloat = 3.0

    def __call__(self, count: int, process: Process) -> Tensor:
        return shifted(torch.linspace(1, 0, count + 1, dtype=torch.float64), self.shift)


class Karras(Settings):
    """Noise-to-data ratios whose rho-th roots are even (Karras et al. 2022, equation 5).

    smallest and largest: the ratios sigma / alpha of the last time before 0 and of the first. A process of discrete
    steps stays within those it was trained at; the first time is always that at which drawing begins in noise.
    """

    kind: Literal["karras"] = "karras"
    rho: PositiveFloat = 7.0
    smallest: PositiveFloat = 0.002
    largest: PositiveFloat = 80.0

    def __call__(self, count: int, process: Process) -> Tensor:
        first, last = self.largest ** (1 / self.rho), self.smallest ** (1 / self.rho)
        if process.steps is not None:
            ends = torch.tensor([1.0, 1 / process.steps], dtype=torch.float64)
            ratio = process.sigma(ends) / process.alpha(ends)
            first = min(first, float(ratio[0]) ** (1 / self.rho))
            last = max(last, float(ratio[1]) ** (1 / self.rho))
        roots = torch.linspace(first, last, count, dtype=torch.float64)
        times = torch.cat((process.time_at(roots**self.rho), torch.zeros(1, dtype=torch.float64)))
        times[0] = 1
        return times


AnySpacing = Annotated[
    Even | Leading | Trailing | Quadratic | Shifted | Karras, BeforeValidator(by_kind), Field(discriminator="kind")
]
SPACINGS = {
    "even": Even, "leading": Leading, "trailing": Trailing,
    "quadratic": Quadratic, "shifted": Shifted, "karras": Karras,
}  # fmt: skip


def of_steps(steps: list[int], process: Process) -> Tensor:
    """Trained steps in any order -> falling times with 0 at the end."""
    assert process.steps is not None
    return torch.tensor([(step + 1) / process.steps for step in sorted(steps, reverse=True)] + [0.0]).double()


def times(spacing: AnySpacing, count: int, process: Process) -> Tensor:
    """Falling times [count + 1] of a grid, float64. Raises TesseraError if the process has not so many."""
    if process.steps is not None and not 1 <= count <= process.steps:
        raise TesseraError(
            f"steps is {count}; this model was trained with {process.steps}, so give 1 to {process.steps}"
        )
    if count < 1:
        raise TesseraError(f"steps is {count}; give 1 or more")
    return spacing(count, process)
