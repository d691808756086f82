"""Times of the frames of clips in training: one for all, independent ones, or some frames given clean.

Independent times are those of Diffusion Forcing (Chen et al. 2024). A given frame is clean, has the time 0 and no loss.
So a network learns to continue, to fill in and to animate, by one rule. Shapes: B clips, T frames.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from tessera import randomness
from tessera.diffusion import DiffusionProcess
from tessera.settings import Settings, expand_kind

FRAME_TIMES_STREAM = 7  # random stream, see `tessera.training.objective`
NUM_CHOICES = 3  # random numbers before those of the frames


@dataclass(frozen=True)
class FrameTimes:
    """t [B, T] of each frame, 0 where it is given. is_given: bool [B, T]"""

    t: Tensor
    is_given: Tensor

    @property
    def loss_frames(self) -> Tensor | None:
        """The frames with a loss, bool [B, T]; None: all"""
        return ~self.is_given if bool(self.is_given.any()) else None

    @property
    def loss_t(self) -> Tensor:
        """t, with the largest of the clip where a frame is given: losses at time 0 are not defined"""
        return torch.where(self.is_given, self.t.amax(dim=1, keepdim=True), self.t)

    @property
    def mean(self) -> Tensor:
        """The mean over the frames with a loss: [B]"""
        return torch.where(self.is_given, 0, self.t).sum(dim=1) / (~self.is_given).sum(dim=1)


class SharedTimes(Settings):
    """One time for all frames of a clip."""

    kind: Literal["shared"] = "shared"


class MixedTimes(Settings):
    """One time for all frames of some clips, independent times in others, and given frames in the rest.

    Given are, equally often: the first frame, the first few, the last, the first and the last, or any frames.
    """

    kind: Literal["mixed"] = "mixed"
    independent: float = Field(default=0.25, ge=0, le=1, description="fraction of clips with independent times")
    given_frames: float = Field(default=0.25, ge=0, le=1, description="fraction of clips with given frames")

    @model_validator(mode="after")
    def _check(self) -> "MixedTimes":
        if self.independent + self.given_frames > 1:
            raise ValueError(
                f"independent {self.independent:g} and given_frames {self.given_frames:g} are fractions of all clips: "
                "together at most 1"
            )
        return self

    def sample(
        self, shared: Tensor, frames: int, position: Tensor, seed: int, diffusion: DiffusionProcess
    ) -> FrameTimes:
        """The times of clips at these positions [B]. shared [B]: the time of a clip whose frames have one."""
        numbers = randomness.uniform(seed, position, FRAME_TIMES_STREAM, NUM_CHOICES + 2 * frames)
        kind, mask_kind, count = numbers[:, :NUM_CHOICES].unbind(1)
        uniform, order = numbers[:, NUM_CHOICES:].split(frames, dim=1)
        is_independent = kind < self.independent
        has_given = ~is_independent & (kind < self.independent + self.given_frames) & (frames > 1)
        t = torch.where(is_independent[:, None], diffusion.sample_timesteps(uniform), shared[:, None])
        is_given = has_given[:, None] & sample_given_frames(mask_kind, count, order)
        return FrameTimes(torch.where(is_given, 0, t), is_given)


def sample_given_frames(mask_kind: Tensor, count: Tensor, order: Tensor) -> Tensor:
    """Which frames of clips are given, at least one and not all: bool [B, T]. From uniform numbers [B], [B], [B, T]"""
    frames = order.shape[1]
    number, frame = (1 + (count * (frames - 1)).floor())[:, None], torch.arange(frames)
    first, last = frame == 0, frame == frames - 1
    rank = order.argsort(dim=1).argsort(dim=1)
    ends = first | last if frames > 2 else first
    masks = torch.stack([each.expand_as(order) for each in (first, frame < number, last, ends, rank < number)])
    chosen = (mask_kind * len(masks)).floor().to(torch.int64)
    return masks[chosen, torch.arange(len(order))]


AnyFrameTimes = Annotated[SharedTimes | MixedTimes, BeforeValidator(expand_kind), Field(discriminator="kind")]
