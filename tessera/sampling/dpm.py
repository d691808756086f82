"""DPM-Solver++, multistep: what the denoiser said before stands in for more calls (Lu et al. 2022)."""

from typing import Literal

import torch
from torch import Tensor

from tessera.diffusion.prediction import expand
from tessera.sampling.denoiser import Denoise, Noise
from tessera.sampling.exponential import History, NoiseLevel, exp_integrator_step, linear_combination, push_history
from tessera.sampling.solver import Solver


class DPMSolver(Solver):
    """DPM-Solver++(2M) and (3M); one call of the denoiser a step. The first steps are of the orders below.

    Order 3 weighs the second difference by its exact integral, as UniPC's predictor does. The code published with the
    paper, and diffusers', take half of it, which leaves a local error of third order instead of fourth.
    """

    kind: Literal["dpm++"] = "dpm++"
    order: Literal[2, 3] = 2

    def __call__(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: History | None, noise: Noise
    ) -> tuple[Tensor, History]:
        """One step from t to s. x [B, ...], t and s [B]; a row at s = 0 takes x0."""
        history = push_history(memory, NoiseLevel.at(denoise.process, t), denoise(x, t).x0, self.order)
        return exp_integrator_step(x, NoiseLevel.at(denoise.process, s), history), history


class StochasticDPMSolver(Solver):
    """SDE-DPM-Solver++(2M): as much noise as ancestral sampling, in far fewer steps; one call a step."""

    kind: Literal["dpm++-sde"] = "dpm++-sde"

    def __call__(
        self, denoise: Denoise, x: Tensor, t: Tensor, s: Tensor, memory: History | None, noise: Noise
    ) -> tuple[Tensor, History]:
        """One step from t to s. x [B, ...], t and s [B]; a row at s = 0 takes x0."""
        here, there = NoiseLevel.at(denoise.process, t), NoiseLevel.at(denoise.process, s)
        history = push_history(memory, here, denoise(x, t).x0, 2)
        kept = here.alpha * there.sigma / (there.alpha * here.sigma)  # exp(-h): 0 at both ends, where h is infinite
        drawn = 1 - kept**2
        weights: list[Tensor] = []
        if len(history.levels) > 1:
            h = there.half_log_snr - here.half_log_snr
            change = 0.5 * drawn * h / (history.levels[1].half_log_snr - here.half_log_snr)
            weights = [torch.where(h.isfinite(), change, 0)]
        x = linear_combination(there.sigma / here.sigma * kept, x, there.alpha, drawn, weights, list(history.x0))
        return x + expand(there.sigma * drawn.clamp(min=0).sqrt(), x) * noise(), history
