"""UniPC: the call made at the end of one step corrects that step before it begins the next (Zhao et al. 2023)."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor

from tessera.sampling.denoiser import Denoise, Noise
from tessera.sampling.exponential import History, NoiseLevel, exp_integrator_step, push_history
from tessera.sampling.solver import Solver


@dataclass(frozen=True)
class Predicted:
    """What a step leaves to be corrected: where it began, and what had been said until then."""

    x: Tensor  # [B, ...]
    history: History


class UniPC(Solver):
    """Predictor and corrector; one call of the denoiser a step. The first steps are of the orders below.

    The predictor is that of dpm++. variant: B(h) of the paper, which weighs a single change of x0: bh2, exp(h) - 1, or
    bh1, h (only where one value is known; elsewhere the integral is exact and B(h) cancels).
    """

    kind: Literal["unipc"] = "unipc"
    order: Literal[2, 3] = Field(default=2, description="of the predictor; the corrector is one higher")
    variant: Literal["bh1", "bh2"] = "bh2"

    def __call__(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: Predicted | None, noise: Noise
    ) -> tuple[Tensor, Predicted]:
        """One step from t to s. x [B, ...], t and s [B]; a row at s = 0 takes x0."""
        here, x0, by_length = NoiseLevel.at(denoise.process, t), denoise(x, t).x0, self.variant == "bh1"
        history = None
        if memory is not None:
            history = memory.history
            x = exp_integrator_step(memory.x, here, history, ahead=x0, by_length=by_length)
        history = push_history(history, here, x0, self.order)
        return exp_integrator_step(x, NoiseLevel.at(denoise.process, s), history, by_length=by_length), Predicted(
            x, history
        )
