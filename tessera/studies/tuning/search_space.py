"""The ways to draw that tuning tries, as plain lists."""

from typing import Any

import torch

from tessera.bundle import Model
from tessera.errors import TesseraError
from tessera.sampling import (
    SAMPLERS,
    TIMESTEP_SPACINGS,
    AnySampler,
    AnyTimestepSpacing,
    DPMSolver,
    SamplingConfig,
    UniPC,
)
from tessera.sampling.caching import FirstBlockCaching
from tessera.sampling.guidance import CosineGuidance, LinearGuidance
from tessera.sampling.timesteps import timestep_grid

FIRST_CALLS = 10  # at which solvers and grids are compared
RATIOS = ((0.2, 1.6), (0.2, 5.0), (0.0, 5.0))  # of noise to data: intervals of guidance (Kynkaanniemi et al. 2024)


def with_changes(config: SamplingConfig, **changes: Any) -> SamplingConfig:
    return config.model_copy(update=changes)


def with_calls(config: SamplingConfig, calls: int) -> SamplingConfig:
    """So many calls of the denoiser, or one step's worth."""
    return with_changes(config, num_steps=max(1, calls // config.sampler.calls_per_step))


def solvers() -> list[AnySampler]:
    """One of each kind, and the third orders. euler is left out: it is ddim without noise."""
    kinds: list[AnySampler] = [kind() for name, kind in SAMPLERS.items() if name != "euler"]
    return [*kinds, DPMSolver(order=3), UniPC(order=3)]


def distinct_spacings(model: Model, present: AnyTimestepSpacing, steps: int) -> list[AnyTimestepSpacing]:
    """The present grid, then one of each kind that visits other times."""
    found: dict[tuple[float, ...], AnyTimestepSpacing] = {}
    for grid in [present, *(kind() for kind in TIMESTEP_SPACINGS.values())]:
        try:
            found.setdefault(tuple(timestep_grid(grid, steps, model.diffusion).tolist()), grid)
        except TesseraError:  # no grid of this process
            continue
    return list(found.values())


def solver_candidates(model: Model, present: SamplingConfig) -> list[SamplingConfig]:
    """Every solver on every grid at as many calls: the present grid first, for all solvers."""
    found = [
        with_calls(with_changes(present, sampler=solver, timestep_spacing=grid), FIRST_CALLS)
        for solver in solvers()
        for grid in distinct_spacings(model, present.timestep_spacing, max(1, FIRST_CALLS // solver.calls_per_step))
    ]
    return sorted(found, key=lambda config: config.timestep_spacing != present.timestep_spacing)


def guidance_candidates(model: Model, config: SamplingConfig) -> list[SamplingConfig]:
    """Scales around the present one, and off; guidance in the middle of the noise alone; growing towards the data."""
    more = config.guidance_scale - 1 or 0.5
    scales = [0.5, 0.75, 1.0, 1.25, 1.5, 2.0] + [0.0] * (config.guidance_scale != 1)
    found = [with_changes(config, guidance_scale=round(1 + share * more, 3)) for share in scales]
    for low, high in RATIOS:
        ends = model.diffusion.time_from_nsr(torch.tensor([low, high], dtype=torch.float64)).tolist()
        interval = round(ends[0], 3), round(ends[1], 3)
        found += [
            with_changes(config, guidance_scale=1 + share * more, guidance_interval=interval) for share in (1.0, 2.0)
        ]
    found += [
        with_changes(config, guidance_scale=1 + more, guidance_schedule=kind())
        for kind in (LinearGuidance, CosineGuidance)
    ]
    return found


def caching_candidates(config: SamplingConfig) -> list[SamplingConfig]:
    """More and more reuse from step to step, at as many steps and at twice as many, which have more to reuse."""
    return [
        with_changes(config, caching=FirstBlockCaching(threshold=threshold, order=order), num_steps=steps)
        for threshold in (0.1, 0.2, 0.3, 0.5)
        for order in (0, 1)
        for steps in (config.num_steps, 2 * config.num_steps)
    ]
