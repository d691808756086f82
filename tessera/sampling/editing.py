"""Drawing that begins from a picture: noise is mixed in and taken out again, everywhere or where a mask says.

Both are consequences of a process that mixes noise to any time and of steps without hidden state: image to image is a
walk over the last times of a grid (SDEdit, Meng et al. 2022), inpainting a step that puts back what is kept (Lugmayr et
al. 2022, "RePaint", without its resampling). Shapes: B batch, C channels, H W height and width.
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
    """What a drawing begins from. strength: of the noise, 0 to 1; mask: true where to draw, false where x0 stays."""

    x0: Tensor  # [B or 1, C, H, W]
    strength: float
    mask: Tensor | None = None  # bool [B or 1, 1, H, W]

    @property
    def rows(self) -> int:
        """How many pictures this begins; 1 may stand for all."""
        return max(len(self.x0), 1 if self.mask is None else len(self.mask))

    def reached(self, times: Tensor) -> Tensor:
        """The times of a falling grid [n + 1] from the nearest below strength. Raises TesseraError if none is left."""
        # 1 is from noise, wherever a grid begins; otherwise to within the rounding of a strength written in decimals
        reached = times if self.strength == 1 else times[times <= self.strength + 1e-9]
        if len(reached) < 2:
            raise TesseraError(
                f"strength {self.strength:g} leaves no step: of {len(times) - 1} the last begins at "
                f"{float(times[-2]):.3g}; ask for more strength or more steps"
            )
        return reached

    def start(self, process: DiffusionProcess, noise: Tensor, t: Tensor) -> Tensor:
        """x at t [] from each row's own noise [B, C, H, W]."""
        if self.strength < 1:
            return process.add_noise(self.x0.expand_as(noise), noise, t.expand(len(noise)))
        return self._put_back(process, noise, noise, t.expand(len(noise)))

    def keeping(self, step: Step, noise: Tensor) -> Step:
        """The step, after which what is kept is x0 mixed with each row's own noise [B, C, H, W] to the time reached."""
        if self.mask is None:
            return step
        return _MaskedStep(step, self, noise)

    def _put_back(self, process: DiffusionProcess, x: Tensor, noise: Tensor, s: Tensor) -> Tensor:
        if self.mask is None:
            return x
        return torch.where(self.mask, x, process.add_noise(self.x0.expand_as(noise), noise, s))


@dataclass(frozen=True)
class _MaskedStep:
    """A solver's step, and then what is kept put back. What the solver remembers is left as it is."""

    step: Step
    original: EditSource
    noise: Tensor

    @property
    def kind(self) -> str:
        return getattr(self.step, "kind", "the sampler")

    def __call__(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Any, noise: Noise
    ) -> tuple[Tensor, Any]:
        x, memory = self.step(denoise, x, t, s, memory, noise)
        return self.original._put_back(denoise.process, x, self.noise, s), memory
