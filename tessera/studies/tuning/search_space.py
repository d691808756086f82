"""The candidates of a tuning: lists of sampling settings."""

from typing import Any

import torch

from tessera.errors import TesseraError
from tessera.model import Model
from tessera.sampling import (
    SAMPLERS,
    TIMESTEP_SPACINGS,
    AnySampler,
    AnyTimestepSpacing,
    DPMSolver,
    FirstBlockCaching,
    SamplingConfig,
    UniPC,
)
from tessera.sampling.guidance import CosineGuidance, LinearGuidance
from tessera.sampling.timesteps import timestep_grid

SOLVER_CALLS = 10  # network evaluations with which solvers and spacings are compared
GUIDANCE_RATIOS = (
    (0.2, 1.6),
    (0.2, 5.0),
    (0.0, 5.0),
)  # noise to data, of guidance intervals (Kynkaanniemi et al. 2024)


def with_changes(config: SamplingConfig, **changes: Any) -> SamplingConfig:
    return config.model_copy(update=changes)


def with_calls(config: SamplingConfig, calls: int) -> SamplingConfig:
    """With this number of denoiser calls, or those of one step if that is more."""
    return with_changes(config, num_steps=max(1, calls // config.sampler.calls_per_step))


def solvers(takes_step_size: bool = False) -> list[AnySampler]:
    """One of each kind, and the third orders. euler is left out: it equals ddim without noise.

    takes_step_size: whether the network predicts the average velocity over a step.
    """
    kinds: list[AnySampler] = [
        kind() for name, kind in SAMPLERS.items() if name != "euler" and (takes_step_size or not kind.needs_step_size)
    ]
    return [*kinds, DPMSolver(order=3), UniPC(order=3)]


def distinct_spacings(model: Model, baseline: AnyTimestepSpacing, steps: int) -> list[AnyTimestepSpacing]:
    """The baseline's timestep spacing, then each kind that has another grid."""
    by_grid: dict[tuple[float, ...], AnyTimestepSpacing] = {}
    for spacing in [baseline, *(kind() for kind in TIMESTEP_SPACINGS.values())]:
        try:
            by_grid.setdefault(tuple(timestep_grid(spacing, steps, model.diffusion).tolist()), spacing)
        except TesseraError:  # impossible for this process
            continue
    return list(by_grid.values())


def solver_candidates(model: Model, baseline: SamplingConfig) -> list[SamplingConfig]:
    """Every solver with every spacing at equal calls, the baseline's spacing first."""
    candidates = [
        with_calls(with_changes(baseline, sampler=solver, timestep_spacing=spacing), SOLVER_CALLS)
        for solver in solvers(model.config.network.takes_step_size)
        for spacing in distinct_spacings(
            model, baseline.timestep_spacing, max(1, SOLVER_CALLS // solver.calls_per_step)
        )
    ]
    return sorted(candidates, key=lambda config: config.timestep_spacing != baseline.timestep_spacing)


def guidance_candidates(model: Model, config: SamplingConfig) -> list[SamplingConfig]:
    """Scales around the current one, and none; guidance at medium noise only; guidance that grows towards the data."""
    extra = config.guidance_scale - 1 or 0.5
    factors = [0.5, 0.75, 1.0, 1.25, 1.5, 2.0] + [0.0] * (config.guidance_scale != 1)
    candidates = [with_changes(config, guidance_scale=round(1 + factor * extra, 3)) for factor in factors]
    for ratios in GUIDANCE_RATIOS:
        times = model.diffusion.time_from_nsr(torch.tensor(ratios, dtype=torch.float64)).tolist()
        interval = round(times[0], 3), round(times[1], 3)
        for factor in (1.0, 2.0):
            scale = 1 + factor * extra
            candidates.append(with_changes(config, guidance_scale=scale, guidance_interval=interval))
    for schedule in (LinearGuidance(), CosineGuidance()):
        candidates.append(with_changes(config, guidance_scale=1 + extra, guidance_schedule=schedule))
    return candidates


def caching_candidates(config: SamplingConfig) -> list[SamplingConfig]:
    """Increasing reuse between steps, at the current number of steps and at twice as many, which have more to reuse."""
    return [
        with_changes(config, caching=FirstBlockCaching(threshold=threshold, order=order), num_steps=steps)
        for threshold in (0.1, 0.2, 0.3, 0.5)
        for order in (0, 1)
        for steps in (config.num_steps, 2 * config.num_steps)
    ]
