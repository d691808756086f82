"""Assembly of the denoiser of a batch: guidance, caches, and heuristics for the CPU."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tessera import runtime
from tessera.acceleration.first_block_cache import CacheStats, FirstBlockCache
from tessera.acceleration.frame_cache import EarlierFrames, FrameCache
from tessera.acceleration.modulation_cache import PrecomputedModulation
from tessera.conditioning import Condition
from tessera.generation.request import ALL, FRAMES
from tessera.model import Model
from tessera.models.dit import DiT
from tessera.rows import Rows
from tessera.sampling import (
    Autoregressive,
    CachedNetwork,
    FirstBlockCaching,
    Guidance,
    NoCaching,
    RowDenoiser,
    SamplingConfig,
    SamplingNetwork,
)

# With this many tokens a CPU is faster if guidance calls the network twice (benchmarks/guidance_halves.md).
SEPARATE_CALLS_TOKENS = 512
MODULATION_TABLE_BYTES = 64 * 2**20  # limit for modulation vectors computed ahead


@dataclass(frozen=True)
class Terms:
    """The terms of guidance that rows may have: `all` lacks every condition, or is the output of a weaker model; others
    lack the condition of that name."""

    names: tuple[str, ...]
    guidance_model: Model | None = None

    @staticmethod
    def of(config: SamplingConfig, scale: Tensor, guidance_model: Model | None = None) -> "Terms":
        """The terms that some of these rows use. scale [B]"""
        used = [ALL] if bool((scale != 1).any()) else []
        return Terms((*used, *(name for name, value in config.guidance_scales.items() if value != 1)), guidance_model)

    @staticmethod
    def possible(model: Model, guidance_model: Model | None = None) -> "Terms":
        """All terms that a model can have."""
        network = model.config.network
        has_weak = bool(model.null_fields or network.uses_text or guidance_model)
        return Terms((*([ALL] if has_weak else []), *model.null_fields), guidance_model)

    def frame_noise(self, noise: Tensor) -> list[Tensor | None] | None:
        """What replaces clean frames in each condition; None if no term is for them. noise: like x"""
        names = (None, *self.names)
        return [noise if name == FRAMES else None for name in names] if FRAMES in self.names else None

    def conditions(self, model: Model, condition: Condition, weak: Condition) -> list[Condition]:
        """The condition, and that of the weak output of each term, prepared by the network that it is for.

        weak: with null values, or negative inputs, in all fields
        """
        conditions = [model.network.prepare(condition)]
        for name in self.names:
            if name == FRAMES:
                conditions.append(conditions[0])
            elif name != ALL:
                fields = (name, *condition.rules()[name].companions)
                changes: dict[str, Any] = {field: getattr(weak, field) for field in fields}
                conditions.append(model.network.prepare(replace(condition, **changes)))
            elif self.guidance_model is not None:
                conditions.append(self.guidance_model.network.prepare(condition))
            else:
                conditions.append(model.network.prepare(weak))
        return conditions

    def guidance(self, config: SamplingConfig, scale: Tensor) -> Guidance:
        """scale [B]: of the term `all`"""
        scales = [
            scale if name == ALL else torch.full_like(scale, config.guidance_scales.get(name, 1.0))
            for name in self.names
        ]
        return Guidance.build(
            len(scale),
            torch.stack(scales, dim=1) if scales else scale.new_zeros(len(scale), 0),
            config.guidance_interval,
            config.guidance_rescale,
            config.guidance_channels,
            config.guidance_schedule,
        )


@dataclass(frozen=True)
class BatchSettings:
    """Everything but the inputs that one batch is generated with."""

    config: SamplingConfig
    times: Tensor | None  # [N] of the grid, in the units of the network, if they are known in advance
    grid: tuple[int, ...]  # of tokens
    num_rows: int
    dtype: torch.dtype | None  # of matrix products
    cache_stats: CacheStats | None = None
    frame_cache: bool = False  # keys and values of earlier frames are kept


def build_denoiser(
    model: Model,
    conditions: list[Condition],
    terms: Terms,
    batch: BatchSettings,
    rows_per_call: int | None = None,
) -> RowDenoiser:
    """The denoiser of a model with its terms of guidance. conditions: see `Terms.conditions`"""
    own = [
        condition
        for name, condition in zip((None, *terms.names), conditions)
        if name != ALL or terms.guidance_model is None
    ]
    network = _build_network(model, type(own[0]).cat(own), batch)
    networks = [network] * len(conditions)
    if terms.guidance_model is not None and ALL in terms.names:
        index = 1 + terms.names.index(ALL)
        networks[index] = _build_network(terms.guidance_model, conditions[index], batch)
    many_tokens = batch.num_rows * math.prod(batch.grid) >= SEPARATE_CALLS_TOKENS
    return RowDenoiser(networks, model.diffusion, model.device.type == "cpu" and many_tokens, rows_per_call)


def _build_network(model: Model, conditions: Condition, batch: BatchSettings) -> SamplingNetwork:
    """The network for one batch. conditions: all that it will get, if the times are known"""
    network, caching, device = model.network, batch.config.caching, model.device
    function: Callable[[Tensor, Tensor, Condition], Tensor] = network
    embed_condition = None
    # Only on the CPU, where it was measured (benchmarks/precomputed_modulation.md); elsewhere a look-up would wait for
    # the device.
    if (
        isinstance(network, DiT)
        and device.type == "cpu"
        and batch.times is not None
        and PrecomputedModulation.table_bytes(network, len(batch.times), conditions) <= MODULATION_TABLE_BYTES
    ):
        with runtime.autocast(batch.dtype, device):
            function = PrecomputedModulation(network, batch.times, conditions, batch.grid)
        embed_condition = function.embed_condition
    if isinstance(caching, FirstBlockCaching) and isinstance(network, DiT):  # others are rejected by check_caching
        cache = FirstBlockCache(network, caching, embed_condition=embed_condition, stats=batch.cache_stats)
        return _AutocastCache(cache, batch.dtype, device)
    if batch.frame_cache and isinstance(network, DiT):
        return AutocastFrameCache(FrameCache(network, embed_condition=embed_condition), batch.dtype, device)

    def run(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with runtime.autocast(batch.dtype, device):  # only around the network: not in the caller's loop
            return function(x, t, condition)

    return run


class _AutocastCache(CachedNetwork):
    """A cache whose network runs under autocast."""

    def __init__(self, cache: CachedNetwork, dtype: torch.dtype | None, device: torch.device) -> None:
        self.cache, self.dtype, self.device = cache, dtype, device

    def empty_state(self, x: Tensor) -> Rows:
        return self.cache.empty_state(x)

    def evaluate(self, x: Tensor, t: Tensor, condition: Condition, state: Any) -> tuple[Tensor, Any]:
        with runtime.autocast(self.dtype, self.device):
            return self.cache.evaluate(x, t, condition, state)


class AutocastFrameCache(_AutocastCache):
    """A cache of earlier frames whose network runs under autocast."""

    def __init__(self, cache: FrameCache, dtype: torch.dtype | None, device: torch.device) -> None:
        super().__init__(cache, dtype, device)
        self.frames = cache

    def finish(self, x: Tensor, t: Tensor, condition: Condition, state: EarlierFrames) -> EarlierFrames:
        """See `FrameCache.finish`."""
        with runtime.autocast(self.dtype, self.device):
            return self.frames.finish(x, t, condition, state)


def takes_frame_cache(model: Model, config: SamplingConfig, terms: Terms) -> bool:
    """Whether keys and values of earlier frames are kept in sampling."""
    schedule = config.frame_schedule
    if not (isinstance(schedule, Autoregressive) and schedule.cache and schedule.window is None):
        return False
    models = [model, *([] if terms.guidance_model is None else [terms.guidance_model])]
    is_causal = all(each.config.network.is_causal and isinstance(each.network, DiT) for each in models)
    return is_causal and isinstance(config.caching, NoCaching) and FRAMES not in terms.names
