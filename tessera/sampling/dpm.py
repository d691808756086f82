"""DPM-Solver++, multistep: earlier outputs of the denoiser replace further calls (Lu et al. 2022)."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from tessera.diffusion import DiffusionProcess
from tessera.sampling.denoiser import Noise
from tessera.sampling.exponential import History, NoiseLevel, exp_integrator_step, linear_combination, push_history
from tessera.sampling.solver import Solver, Step
from tessera.times import expand


class DPMSolver(Solver):
    """DPM-Solver++(2M) and (3M); one call of the denoiser per step. The first steps are of lower order.

    Order 3 weights the second difference by its exact integral, as UniPC's predictor does. The code published with the
    paper and diffusers use half of it, which leaves a local error of third order instead of fourth.
    """

    kind: Literal["dpm++"] = "dpm++"
    uses_history: ClassVar[bool] = True
    order: Literal[2, 3] = 2

    @property
    def convergence_order(self) -> float:
        return self.order

    def step(
        self, diffusion: DiffusionProcess, x: Tensor, t: Tensor, s: Tensor, memory: History | None, noise: Noise
    ) -> Step[History]:
        """One step from t to s. x [B, ...], t and s [B] or [B, T]; rows at s = 0 take x0."""
        prediction = yield x, t
        history = push_history(memory, NoiseLevel.at(diffusion, t), prediction.x0, self.order)
        return exp_integrator_step(x, NoiseLevel.at(diffusion, s), history), history


class DPMSolverSDE(Solver):
    """SDE-DPM-Solver++(2M): as much noise as ancestral sampling, in far fewer steps; one call per step."""

    kind: Literal["dpm++-sde"] = "dpm++-sde"
    uses_history: ClassVar[bool] = True

    @property
    def convergence_order(self) -> float:
        return 1.5  # as measured

    def step(
        self, diffusion: DiffusionProcess, x: Tensor, t: Tensor, s: Tensor, memory: History | None, noise: Noise
    ) -> Step[History]:
        """One step from t to s. x [B, ...], t and s [B] or [B, T]; rows at s = 0 take x0."""
        prediction = yield x, t
        level_t, level_s = NoiseLevel.at(diffusion, t), NoiseLevel.at(diffusion, s)
        history = push_history(memory, level_t, prediction.x0, 2)
        exp_minus_h = level_t.alpha * level_s.sigma / (level_s.alpha * level_t.sigma)  # 0 at both ends: h is infinite
        noise_variance = 1 - exp_minus_h**2
        weights: list[Tensor] = []
        if len(history.levels) > 1:
            h = level_s.half_log_snr - level_t.half_log_snr
            weight = 0.5 * noise_variance * h / (history.levels[1].half_log_snr - level_t.half_log_snr)
            weights = [torch.where(h.isfinite(), weight, 0)]
        x_scale = level_s.sigma / level_t.sigma * exp_minus_h
        x = linear_combination(x_scale, x, level_s.alpha, noise_variance, weights, list(history.x0))
        return x + expand(level_s.sigma * noise_variance.clamp(min=0).sqrt(), x) * noise(), history
