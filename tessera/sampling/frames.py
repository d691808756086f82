"""When each frame of a clip is sampled: schedules of times [steps, T], and frames that are given.

A schedule makes a list of stages. In each, some frames of a window go from noise to data. The others do not move: they
are clean, at time 0, or noise, at time 1. So a network learns one rule (see `tessera.training.frame_times`): a clean
frame has the time 0. With it a clip continues, fills in or animates the frames that are given. Shapes: B batch, C
channels, T frames, n steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveInt
from torch import Tensor

from tessera.diffusion import DiffusionProcess
from tessera.errors import TesseraError
from tessera.sampling.denoiser import Noise
from tessera.sampling.solver import Solver, Step
from tessera.settings import Settings, expand_kind
from tessera.times import expand, shared_time


@dataclass(frozen=True)
class Stage:
    """Steps over the frames start .. stop - 1. times: float64 [m + 1, stop - start], constant for frames that do not
    move"""

    start: int
    stop: int
    times: Tensor

    @property
    def sampled(self) -> list[int]:
        """The frames of the clip that this stage samples."""
        return [self.start + int(frame) for frame in (self.times[0] > self.times[-1]).nonzero()[:, 0]]


class FrameSchedule(Settings):
    """The order in which the frames of a clip are sampled."""

    def stages(self, times: Tensor, is_given: Tensor, trained_frames: int) -> list[Stage]:
        """times [n + 1] of one frame; is_given: bool [T]; trained_frames: of the clips that the network was trained
        with. The last stage leaves every frame at time 0. Raises TesseraError for a window that is too short."""
        raise NotImplementedError


class Together(FrameSchedule):
    """All frames at once."""

    kind: Literal["together"] = "together"

    def stages(self, times: Tensor, is_given: Tensor, trained_frames: int) -> list[Stage]:
        return [Stage(0, len(is_given), _columns(times, is_given, torch.zeros_like(is_given)))]


class Pyramid(FrameSchedule):
    """Each frame some steps behind the one before it: later frames are noisier (Chen et al. 2024, "Diffusion Forcing",
    section 3.3)."""

    kind: Literal["pyramid"] = "pyramid"
    delay: PositiveInt = Field(default=1, description="steps of a frame behind the frame before it")

    def stages(self, times: Tensor, is_given: Tensor, trained_frames: int) -> list[Stage]:
        order = (~is_given).cumsum(0) - 1  # the number of a frame among those that are sampled
        num_steps = len(times) - 1
        total = num_steps + self.delay * int(order[-1])
        index = torch.arange(total + 1)[:, None] - self.delay * order
        matrix = times[index.clamp(0, num_steps)]
        matrix[:, is_given] = 0
        return [Stage(0, len(is_given), matrix)]


class Autoregressive(FrameSchedule):
    """A few frames at a time. The frames before them are clean, and those after them are noise."""

    kind: Literal["autoregressive"] = "autoregressive"
    chunk: PositiveInt = Field(default=1, description="frames that are sampled together")
    window: PositiveInt | None = Field(
        default=None, description="frames that the network sees at once, of a longer clip; null: all"
    )
    cache: bool = Field(
        default=True,
        description="keep keys and values of earlier frames, where the network is causal, the window is null, and "
        "neither caching nor guidance_scales.frames is set",
    )

    def stages(self, times: Tensor, is_given: Tensor, trained_frames: int) -> list[Stage]:
        total = len(is_given)
        window, done, result = min(self.window or total, total), is_given.clone(), []
        if self.chunk > window:
            raise TesseraError(f"frame_schedule.chunk is {self.chunk}, more than the {window} frames of the window")
        for chunk in self.chunks(is_given):
            start = min(max(chunk[-1] + 1 - window, 0), total - window)
            frames = slice(start, start + window)
            waits = ~done
            waits[chunk] = False
            result.append(Stage(start, start + window, _columns(times, done[frames], waits[frames])))
            done[chunk] = True
        return result

    def chunks(self, is_given: Tensor) -> list[list[int]]:
        """The frames that are sampled together: neighbors, at most `chunk`."""
        result: list[list[int]] = []
        for frame in (~is_given).nonzero()[:, 0].tolist():
            if result and len(result[-1]) < self.chunk and result[-1][-1] == frame - 1:
                result[-1].append(frame)
            else:
                result.append([frame])
        return result


class Sliding(FrameSchedule):
    """Windows one after the other, for clips longer than those of the training: the last frames of a window are given
    to the next."""

    kind: Literal["sliding"] = "sliding"
    window: PositiveInt | None = Field(default=None, description="frames of a window; null: those of the training")
    overlap: PositiveInt | None = Field(default=None, description="frames of the window before; null: half of a window")

    def stages(self, times: Tensor, is_given: Tensor, trained_frames: int) -> list[Stage]:
        total = len(is_given)
        window = min(self.window or trained_frames, total)
        overlap = window // 2 if self.overlap is None else self.overlap
        if not 0 < overlap < window and window < total:
            raise TesseraError(
                f"frame_schedule.overlap is {overlap} of a window of {window} frames: expected 1 or more, and fewer "
                "than the window"
            )
        done, result = is_given.clone(), []
        for start in [*range(0, total - window, window - overlap), total - window] if total > window else [0]:
            frames = slice(start, start + window)
            if not done[frames].all():
                matrix = _columns(times, done[frames], torch.zeros_like(done[frames]))
                result.append(Stage(start, start + window, matrix))
            done[frames] = True
        return result


AnyFrameSchedule = Annotated[
    Together | Pyramid | Autoregressive | Sliding, BeforeValidator(expand_kind), Field(discriminator="kind")
]


def _columns(times: Tensor, is_clean: Tensor, waits: Tensor) -> Tensor:
    """times [n + 1] for each frame [n + 1, T]; 0 where it is clean, and the first time where it waits"""
    matrix = times[:, None].repeat(1, len(is_clean))
    matrix[:, waits] = times[0]
    matrix[:, is_clean] = 0
    return matrix


@dataclass(frozen=True)
class FrameSolver:
    """A solver for frames with times of their own. Frames whose time does not change stay as they are.

    The solver itself takes a step of all frames, at the times of those that move. Only the network gets the others as
    they are, at their own times. So no solver meets a step of length 0, and frames that move together take exactly the
    steps of a clip.
    """

    solver: Solver

    @property
    def kind(self) -> str:
        return getattr(self.solver, "kind", "the sampler")

    def step(
        self, diffusion: DiffusionProcess, x: Tensor, t: Tensor, s: Tensor, memory: Any, noise: Noise
    ) -> Step[Any]:
        """x [B, C, T, H, W], t and s [B, T]"""
        moves = t > s
        if bool(moves.all()):
            return (yield from self.solver.step(diffusion, x, t, s, memory, noise))
        first = moves.to(torch.uint8).argmax(dim=1, keepdim=True)
        inner_t, inner_s = (torch.where(moves, time, time.gather(1, first)) for time in (t, s))
        if shared_time(inner_t).ndim == shared_time(inner_s).ndim == 1:
            inner_t, inner_s = inner_t[:, 0], inner_s[:, 0]
        is_still = expand(~moves, x).bool()
        step, prediction = self.solver.step(diffusion, x, inner_t, inner_s, memory, noise), None
        while True:
            try:
                point, time, *end = step.send(prediction)  # pyright: ignore[reportArgumentType]
            except StopIteration as stop:
                result, memory = stop.value
                return torch.where(is_still, x, result), memory
            time = time if time.ndim == 2 else time[:, None]
            end = [torch.where(moves, each if each.ndim == 2 else each[:, None], s) for each in end]
            prediction = yield torch.where(is_still, x, point), torch.where(moves, time, t), *end
            x0, eps = torch.where(is_still, x, prediction.x0), torch.where(is_still, 0, prediction.eps)
            prediction = replace(prediction, x0=x0, eps=eps)


def check_schedule(schedule: AnyFrameSchedule, sampler: Solver) -> None:
    """Raise TesseraError if a solver cannot follow a schedule."""
    if isinstance(schedule, Pyramid) and sampler.uses_history:
        kind = getattr(sampler, "kind", "the sampler")
        raise TesseraError(
            f"frame_schedule=pyramid needs a sampler that does not use earlier steps, because frames are at different "
            f"steps, and {kind} does: use ddim, euler or heun"
        )


def given_mask(frames: int, indices: Sequence[int]) -> Tensor:
    """bool [T]: true for these frames"""
    mask = torch.zeros(frames, dtype=torch.bool)
    mask[list(indices)] = True
    return mask
