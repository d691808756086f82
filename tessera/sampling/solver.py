"""What every solver is: settings with one pure step."""

from typing import ClassVar

from tessera.diffusion import DiffusionProcess
from tessera.settings import Settings


class Solver(Settings):
    """`solver(denoise, x, t, s, memory, noise) -> (x, memory)`: from t to s < t, both per row.

    memory is None before the first step and whatever the solver returned after it; noise draws a fresh normal tensor.
    """

    calls: ClassVar[int] = 1  # of the denoiser, in one step

    def check(self, process: DiffusionProcess) -> None:
        """Raise TesseraError if this solver cannot draw from a process."""
