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
from tessera.rows import Rows
from tessera.sampling.denoiser import Noise
from tessera.sampling.solver import Solver, Step


@dataclass(frozen=True)
class EditSource(Rows):
    """The latents to begin from. strength: of the noise, 0 to 1; mask: true where to generate, false where x0 stays."""

    x0: Tensor  # [B, C, H, W], or [B, C, T, H, W]
    strength: float
    mask: Tensor | None = None  # bool [B, 1, H, W]

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
            return diffusion.add_noise(self.x0, noise, t.expand(len(noise)))
        return self.put_back(diffusion, noise, noise, t.expand(len(noise)))

    def put_back(self, diffusion: DiffusionProcess, x: Tensor, noise: Tensor, s: Tensor) -> Tensor:
        """x, replaced by x0 with noise of time s where the mask is false."""
        return x if self.mask is None else torch.where(self.mask, x, diffusion.add_noise(self.x0, noise, s))


@dataclass(frozen=True)
class MaskedMemory(Rows):
    """The memory of a `MaskedSolver`: that of its solver, and what to put back with which noise."""

    source: EditSource
    noise: Tensor  # [B, C, H, W] each row's own
    memory: Any = None


@dataclass(frozen=True)
class MaskedSolver:
    """A solver whose every step puts back the image where the mask is false. It needs a memory from the start."""

    solver: Solver

    @property
    def kind(self) -> str:
        return getattr(self.solver, "kind", "the sampler")

    def step(
        self, diffusion: DiffusionProcess, x: Tensor, t: Tensor, s: Tensor, memory: MaskedMemory, noise: Noise
    ) -> Step[MaskedMemory]:
        x, inner = yield from self.solver.step(diffusion, x, t, s, memory.memory, noise)
        x = memory.source.put_back(diffusion, x, memory.noise, s)
        return x, MaskedMemory(memory.source, memory.noise, inner)
