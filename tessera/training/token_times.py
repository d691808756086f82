"""Times of the tokens of an image in training: one for all, or a second one for some of them.

Two times for an image are the noise augmentation of Self-Flow (arXiv 2603.06507): a network learns from the
same image at many more states of noise. Sampling is unchanged: all tokens have one time. Shapes: B images, N
tokens, H W height and width.
"""

from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from tessera import randomness
from tessera.diffusion import DiffusionProcess
from tessera.settings import Settings, expand_kind

TOKEN_TIMES_STREAM = 9  # random stream, see `tessera.training.objective`


class SharedTokenTimes(Settings):
    """One time for all tokens of an image."""

    kind: Literal["shared"] = "shared"


class DualTokenTimes(Settings):
    """A second time, independent of the first, for random tokens of every image."""

    kind: Literal["dual"] = "dual"
    fraction: float = Field(default=0.25, gt=0, le=0.5, description="fraction of the tokens with the second time")

    def sample(self, first: Tensor, tokens: int, position: Tensor, seed: int, diffusion: DiffusionProcess) -> Tensor:
        """The times [B, N] of the tokens of the images at these positions [B]. first [B]: the time of the others.

        round(fraction N) tokens of each image have the second time, at least one.
        """
        numbers = randomness.uniform(seed, position, TOKEN_TIMES_STREAM, 1 + tokens)
        second, order = diffusion.sample_timesteps(numbers[:, 0]), numbers[:, 1:]
        has_second = order.argsort(dim=1).argsort(dim=1) < max(1, round(self.fraction * tokens))
        return torch.where(has_second, second[:, None], first[:, None])


def times_of_pixels(t: Tensor, grid: tuple[int, ...], patch_size: int) -> Tensor:
    """The times of tokens [B, N] for each pixel of their patches: [B, 1, H, W]. grid: (H / patch, W / patch)"""
    rows = t.view(-1, 1, *grid)
    return rows.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)


AnyTokenTimes = Annotated[SharedTokenTimes | DualTokenTimes, BeforeValidator(expand_kind), Field(discriminator="kind")]
