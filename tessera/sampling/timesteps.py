"""Timestep grids: `spacing(num_steps, diffusion)` returns decreasing times [num_steps + 1], float64, that end at 0.

A process trained on discrete steps has only so many times; one trained in continuous time has any. Curved grids
may fall between the trained steps, where a network of discrete steps still works, but never beyond the first and the
last of them.
"""

import math
from typing import Annotated, Literal, Self, get_args

import torch
from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from tessera.diffusion import DiffusionProcess
from tessera.diffusion.flow import shift_timesteps
from tessera.errors import TesseraError
from tessera.settings import Settings, expand_kind


class _StepSpacing(Settings):
    """A grid of trained steps."""

    end: Literal["data", "first-step"] = Field(
        default="data", description="the last time: 0, or that of the first trained step, whose noise remains"
    )

    def times_of_steps(self, steps: list[int], diffusion: DiffusionProcess) -> Tensor:
        """Trained steps in any order -> decreasing times that end at 0, or at the first trained step."""
        assert diffusion.num_timesteps is not None
        times = [(step + 1) / diffusion.num_timesteps for step in sorted(steps, reverse=True)]
        last = 0.0 if self.end == "data" else 1 / diffusion.num_timesteps
        # From the first step to itself there is nothing to do.
        return torch.tensor([*(time for time in times if time > last), last], dtype=torch.float64)

    def trained_steps(self, diffusion: DiffusionProcess) -> int:
        """The number of trained steps. Raises TesseraError for a process in continuous time."""
        if diffusion.num_timesteps is None:
            name = getattr(self, "kind", "the grid") if self.end == "data" else f"timestep_spacing.end={self.end}"
            raise TesseraError(
                f"{name} needs a process of discrete steps; this one is continuous: use uniform or shifted"
            )
        return diffusion.num_timesteps


class Uniform(_StepSpacing):
    """Equal strides from the first trained step to the last, as the official code respaces (Nichol & Dhariwal 2021)."""

    kind: Literal["uniform"] = "uniform"
    without_first: bool = Field(
        default=False, description="a grid of one step more without its lowest one, as diffusers' DPM-Solver and UniPC"
    )

    def __call__(self, num_steps: int, diffusion: DiffusionProcess) -> Tensor:
        if diffusion.num_timesteps is None and self.end == "data":
            return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        trained = self.trained_steps(diffusion)
        if self.without_first:
            stride = (trained - 1) / num_steps
            return self.times_of_steps([round(i * stride) for i in range(1, num_steps + 1)], diffusion)
        if num_steps == 1:  # the official code would use step 0 alone, which is hardly any noise
            return self.times_of_steps([trained - 1], diffusion)
        stride = (trained - 1) / (num_steps - 1)
        steps, position = [], 0.0
        for _ in range(num_steps):  # summed as in the official code: a product rounds some steps differently
            steps.append(round(position))
            position += stride
        return self.times_of_steps(steps, diffusion)


class Leading(_StepSpacing):
    """Multiples of a whole stride from step 0: the default of diffusers' schedulers. Only for discrete steps."""

    kind: Literal["leading"] = "leading"
    offset: NonNegativeInt = Field(default=0, description="added to every step (diffusers' steps_offset)")
    without_first: bool = Field(
        default=False, description="a grid of one step more without its lowest one, as diffusers' DPM-Solver and UniPC"
    )

    def __call__(self, num_steps: int, diffusion: DiffusionProcess) -> Tensor:
        trained = self.trained_steps(diffusion)
        stride, first = trained // (num_steps + self.without_first), int(self.without_first)
        steps = [i * stride + self.offset for i in range(first, first + num_steps)]
        if steps[-1] >= trained:
            raise TesseraError(
                f"timestep_spacing.offset {self.offset} leads to step {steps[-1]} at {num_steps} steps, and this model "
                f"was trained with {trained}: use fewer steps"
            )
        return self.times_of_steps(steps, diffusion)


class Trailing(_StepSpacing):
    """A stride back from the last step, so that sampling starts at the full noise (Lin et al. 2024, table 2)."""

    kind: Literal["trailing"] = "trailing"

    def __call__(self, num_steps: int, diffusion: DiffusionProcess) -> Tensor:
        if diffusion.num_timesteps is None and self.end == "data":
            return Uniform()(num_steps, diffusion)
        trained = self.trained_steps(diffusion)
        steps = [max(round(trained - i * trained / num_steps) - 1, 0) for i in range(num_steps)]
        return self.times_of_steps(steps, diffusion)


class Quadratic(Settings):
    """Squares of a uniform grid: denser near the data (Song et al. 2021, appendix D.2)."""

    kind: Literal["quadratic"] = "quadratic"

    def __call__(self, num_steps: int, diffusion: DiffusionProcess) -> Tensor:
        return within_trained(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64) ** 2, diffusion)


class Shifted(Settings):
    """A uniform grid, moved towards the noise by shift > 1 (Esser et al. 2024, equation 23)."""

    kind: Literal["shifted"] = "shifted"
    shift: PositiveFloat = 3.0
    first: float = Field(default=1.0, gt=0, le=1, description="of the uniform grid, its first time")
    last: float | None = Field(
        default=None, gt=0, lt=1, description="of the uniform grid, its last time above 0; null: one step above `end`"
    )
    end: float = Field(default=0.0, ge=0, lt=1, description="of the uniform grid, the time in place of which 0 follows")
    terminal: float | None = Field(
        default=None, gt=0, lt=1, description="stretch the shifted grid so that its last time above 0 is this"
    )

    def __call__(self, num_steps: int, diffusion: DiffusionProcess) -> Tensor:
        return within_trained(self.curve(num_steps, self.shift), diffusion)

    def curve(self, num_steps: int, shift: float) -> Tensor:
        """Decreasing times [num_steps + 1] from 1 to 0."""
        times = torch.linspace(self.first, self.end, num_steps + 1, dtype=torch.float64)
        if self.last is not None and num_steps > 1:
            times[:-1] = torch.linspace(self.first, self.last, num_steps, dtype=torch.float64)
        times[-1] = 0
        times = shift_timesteps(times, shift)
        if self.terminal is not None and num_steps > 1:
            times[:-1] = 1 - (1 - times[:-1]) * (1 - self.terminal) / (1 - times[-2])
        return times


class ResolutionShifted(Shifted):
    """The same with a shift that grows with the number of tokens of an image, as diffusers' `use_dynamic_shifting`.

    Its logarithm is base_shift at base_tokens and max_shift at max_tokens, and linear in between and beyond.
    """

    kind: Literal["resolution"] = "resolution"  # pyright: ignore[reportIncompatibleVariableOverride]
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: PositiveInt = 256
    max_tokens: PositiveInt = 4096
    tokens: PositiveInt | None = Field(default=None, description="null: those of the generated image")

    def resolve(self, tokens: int) -> Shifted:
        """The grid of an image with this number of tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        logarithm = self.base_shift + slope * ((self.tokens or tokens) - self.base_tokens)
        grid = {name: getattr(self, name) for name in ("first", "last", "end", "terminal")}
        return Shifted(shift=math.exp(logarithm), **grid)

    def __call__(self, num_steps: int, diffusion: DiffusionProcess) -> Tensor:
        return self.resolve(self.max_tokens)(num_steps, diffusion)


class _NoiseRatioSpacing(Settings):
    """A grid of noise-to-data ratios sigma / alpha, from sigma_max to sigma_min.

    A process of discrete steps stays within the ratios it was trained at. The first time is 1 for any sigma_max:
    sampling begins in noise.
    """

    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min:g} must be below sigma_max {self.sigma_max:g}")
        return self

    def interpolate(self, first: Tensor, last: Tensor, fraction: Tensor) -> Tensor:
        """The ratios at fractions of the way from the first to the last."""
        raise NotImplementedError

    def __call__(self, num_steps: int, diffusion: DiffusionProcess) -> Tensor:
        first, last = torch.tensor([self.sigma_max, self.sigma_min], dtype=torch.float64)
        if diffusion.num_timesteps is not None:
            ends = torch.tensor([1, 1 / diffusion.num_timesteps], dtype=torch.float64)
            trained = diffusion.sigma(ends) / diffusion.alpha(ends)
            if self.sigma_max <= trained[1] or self.sigma_min >= trained[0]:
                raise TesseraError(
                    f"timestep_spacing.sigma_min {self.sigma_min:g} to sigma_max {self.sigma_max:g} is outside of the "
                    f"noise-to-data ratios that this process was trained at, {trained[1]:.3g} to {trained[0]:.3g}"
                )
            first, last = first.clamp(max=trained[0]), last.clamp(min=trained[1])
        ratios = self.interpolate(first, last, torch.linspace(0, 1, num_steps, dtype=torch.float64))
        times = torch.cat((diffusion.time_from_nsr(ratios), torch.zeros(1, dtype=torch.float64)))
        times[0] = 1
        return times


class Karras(_NoiseRatioSpacing):
    """Noise-to-data ratios whose rho-th roots are uniform (Karras et al. 2022, equation 5)."""

    kind: Literal["karras"] = "karras"
    rho: PositiveFloat = 7.0

    def interpolate(self, first: Tensor, last: Tensor, fraction: Tensor) -> Tensor:
        return torch.lerp(first ** (1 / self.rho), last ** (1 / self.rho), fraction) ** self.rho


class LogSNR(_NoiseRatioSpacing):
    """Uniform in the logarithm of the signal-to-noise ratio (Lu et al. 2022, "DPM-Solver", section 3.4)."""

    kind: Literal["logsnr"] = "logsnr"

    def interpolate(self, first: Tensor, last: Tensor, fraction: Tensor) -> Tensor:
        return torch.lerp(first.log(), last.log(), fraction).exp()


_Spacing = Uniform | Leading | Trailing | Quadratic | Shifted | ResolutionShifted | Karras | LogSNR
AnyTimestepSpacing = Annotated[_Spacing, BeforeValidator(expand_kind), Field(discriminator="kind")]
TIMESTEP_SPACINGS = {spacing.model_fields["kind"].default: spacing for spacing in get_args(_Spacing)}


def within_trained(times: Tensor, diffusion: DiffusionProcess) -> Tensor:
    """A curve from 1 to 0; for a process of discrete steps, rescaled so that its last time above 0 is step 1."""
    if diffusion.num_timesteps is None:
        return times
    first = 1 / diffusion.num_timesteps
    return torch.where(times > 0, first + (1 - first) * times, 0)


def timestep_grid(
    spacing: AnyTimestepSpacing, num_steps: int, diffusion: DiffusionProcess, tokens: int | None = None
) -> Tensor:
    """Decreasing times [num_steps + 1], float64, with decreasing noise.

    tokens: of the image, which some grids depend on; without it they are those of a large image.
    Raises TesseraError if the process has fewer steps, or two times are too close to differ in float64.
    """
    if diffusion.num_timesteps is not None and not 1 <= num_steps <= diffusion.num_timesteps:
        raise TesseraError(
            f"num_steps is {num_steps}; this model was trained with {diffusion.num_timesteps} steps: "
            f"use 1 to {diffusion.num_timesteps}"
        )
    if num_steps < 1:
        raise TesseraError(f"num_steps is {num_steps}; use 1 or more")
    if isinstance(spacing, ResolutionShifted) and tokens is not None:
        spacing = spacing.resolve(tokens)
    times = spacing(num_steps, diffusion)
    noise = diffusion.sigma(times) - diffusion.alpha(times)  # increases with time on every path
    if len(times) < 2 or not ((times.diff() < 0) & (noise.diff() < 0)).all():
        raise TesseraError(f"{spacing.kind} times coincide at {num_steps} steps; use fewer steps, or uniform spacing")
    return times
