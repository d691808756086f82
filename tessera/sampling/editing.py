"""Sampling that begins from an image: image-to-image and inpainting.

Image-to-image adds noise to the image and samples over the last times of a grid (SDEdit, Meng et al. 2022). Inpainting
puts back the image where the mask is 0 after every step (Lugmayr et al. 2022, "RePaint", without its resampling).
Shapes: B batch, C channels, H W height and width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.diffusion import DiffusionProcess
from tessera.errors import TesseraError
from tessera.sampling.denoiser import Denoise, Noise
from tessera.sampling.loop import Step


@dataclass(frozen=True)
class EditSource:
    """The latents to begin from. strength: of the noise, 0 to 1; mask: true where to generate, false where x0 stays."""

    x0: Tensor  # [B or 1, C, H, W]
    strength: float
    mask: Tensor | None = None  # bool [B or 1, 1, H, W]

    @property
    def rows(self) -> int:
        """How many images this is for; 1 may stand for all rows."""
        return max(len(self.x0), 1 if self.mask is None else len(self.mask))

    def times_from_strength(self, times: Tensor) -> Tensor:
        """The times of a decreasing grid [n + 1] that are at most strength. Raises TesseraError if no step is left."""
        # A strength of 1 begins in noise, wherever the grid begins; 1e-9 allows for decimal rounding of a strength.
        remaining = times if self.strength == 1 else times[times <= self.strength + 1e-9]
        if len(remaining) < 2:
            raise TesseraError(
                f"strength {self.strength:g} leaves no step: the last of {len(times) - 1} steps begins at time "
                f"{float(times[-2]):.3g}; use a larger strength or more steps"
            )
        return remaining

    def initial_state(self, diffusion: DiffusionProcess, noise: Tensor, t: Tensor) -> Tensor:
        """x at time t [], from each row's own noise [B, C, H, W]."""
        if self.strength < 1:
            return diffusion.add_noise(self.x0.expand_as(noise), noise, t.expand(len(noise)))
        return self.put_back(diffusion, noise, noise, t.expand(len(noise)))

    def masked_step(self, step: Step, noise: Tensor) -> Step:
        """The step, followed by `put_back` with each row's own noise [B, C, H, W]."""
        return step if self.mask is None else _MaskedStep(step, self, noise)

    def put_back(self, diffusion: DiffusionProcess, x: Tensor, noise: Tensor, s: Tensor) -> Tensor:
        """x, replaced by x0 with noise of time s where the mask is false."""
        if self.mask is None:
            return x
        return torch.where(self.mask, x, diffusion.add_noise(self.x0.expand_as(noise), noise, s))


@dataclass(frozen=True)
class _MaskedStep:
    """A solver's step, after which the image is put back. The solver's memory is not changed."""

    step: Step
    source: EditSource
    noise: Tensor

    @property
    def kind(self) -> str:
        return getattr(self.step, "kind", "the sampler")

    def __call__(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Any, noise: Noise
    ) -> tuple[Tensor, Any]:
        x, memory = self.step(denoise, x, t, s, memory, noise)
        return self.source.put_back(denoise.diffusion, x, self.noise, s), memory
