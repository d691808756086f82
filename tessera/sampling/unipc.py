"""UniPC: the denoiser call at the end of a step first corrects that step, then starts the next (Zhao et al. 2023)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from tessera.diffusion import DiffusionProcess
from tessera.rows import Rows
from tessera.sampling.denoiser import Noise
from tessera.sampling.exponential import History, NoiseLevel, exp_integrator_step, push_history
from tessera.sampling.solver import Solver, Step


@dataclass(frozen=True)
class PredictorState(Rows):
    """What the corrector of the next step needs: the start of the last step and the history until then."""

    x: Tensor  # [B, ...]
    history: History


class UniPC(Solver):
    """Predictor and corrector; one call of the denoiser per step. The first steps are of lower order.

    The predictor is that of dpm++. variant: B(h) of the paper, which weights a single difference of x0: exp(h) - 1 for
    bh2, h for bh1. It matters only where one difference is known; elsewhere the integral is exact and B(h) cancels.
    """

    kind: Literal["unipc"] = "unipc"
    uses_history: ClassVar[bool] = True
    order: Literal[2, 3] = Field(default=2, description="of the predictor; the corrector is one higher")
    variant: Literal["bh1", "bh2"] = "bh2"

    @property
    def convergence_order(self) -> float:
        return self.order + 1

    def step(
        self, diffusion: DiffusionProcess, x: Tensor, t: Tensor, s: Tensor, memory: PredictorState | None, noise: Noise
    ) -> Step[PredictorState]:
        """One step from t to s. x [B, ...], t and s [B] or [B, T]; rows at s = 0 take x0."""
        x0 = (yield x, t).x0
        level_t, bh1 = NoiseLevel.at(diffusion, t), self.variant == "bh1"
        history = None
        if memory is not None:
            history = memory.history
            x = exp_integrator_step(memory.x, level_t, history, x0_next=x0, bh1=bh1)
        history = push_history(history, level_t, x0, self.order)
        x_next = exp_integrator_step(x, NoiseLevel.at(diffusion, s), history, bh1=bh1)
        return x_next, PredictorState(x, history)
