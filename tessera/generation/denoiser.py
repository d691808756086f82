"""Assembly of the denoiser of one batch: guidance, caches, and heuristics for the CPU."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera import runtime
from tessera.acceleration.first_block_cache import CacheStats, FirstBlockCache
from tessera.acceleration.modulation_cache import PrecomputedModulation
from tessera.conditioning import Condition, NetworkFunction
from tessera.model import Model
from tessera.models.dit import DiT
from tessera.sampling import Denoiser, FirstBlockCaching, GuidanceModel, SamplingConfig

# With this many tokens a CPU is faster if guidance calls the network twice (benchmarks/guidance_halves.md).
SEPARATE_HALVES_TOKENS = 512
MODULATION_TABLE_BYTES = 64 * 2**20  # limit for modulation vectors computed ahead


@dataclass(frozen=True)
class BatchSettings:
    """Everything but the inputs that one batch is generated with."""

    config: SamplingConfig
    times: Tensor  # [N] of the grid, in the units of the network
    grid: tuple[int, int]  # of tokens
    dtype: torch.dtype | None  # of matrix products
    cache_stats: CacheStats | None


def build_denoiser(
    model: Model, condition: Condition, scales: Tensor, guidance_model: Model | None, batch: BatchSettings
) -> Denoiser:
    """The denoiser of a model with its guidance. scales [B]: guidance scales."""
    config = batch.config
    guided = bool((scales != 1).any())
    classifier_free = guided and guidance_model is None
    all_conditions = Condition.cat((condition, condition.null())) if classifier_free else condition
    make_network = _network_factory(model, all_conditions, batch)
    many_tokens = len(scales) * batch.grid[0] * batch.grid[1] >= SEPARATE_HALVES_TOKENS
    weak = None
    network = make_network()
    if guided and guidance_model is not None:
        weak = GuidanceModel(_network_factory(guidance_model, condition, batch)(), condition)
    elif guided and (config.caching.kind != "none" or (model.device.type == "cpu" and many_tokens)):
        weak = GuidanceModel(make_network(), condition.null())  # a cache remembers one half only
    return Denoiser(
        network,
        model.diffusion,
        condition,
        scales,
        config.guidance_channels,
        guidance_model=weak,
        guidance_interval=config.guidance_interval,
        guidance_schedule=config.guidance_schedule,
        guidance_rescale=config.guidance_rescale,
    )


def _network_factory(model: Model, conditions: Condition, batch: BatchSettings) -> Callable[[], NetworkFunction]:
    """A function that makes networks for one batch, each with its own cache. conditions: all that they will get."""
    network, caching, device = model.network, batch.config.caching, model.device
    plain: NetworkFunction = network
    embed_condition = None
    num_labels = 1 if conditions.label is None else len(conditions.label.unique())
    # Only on the CPU, where it was measured (benchmarks/precomputed_modulation.md); elsewhere a look-up would wait for
    # the device.
    if (
        isinstance(network, DiT)
        and device.type == "cpu"
        and PrecomputedModulation.table_bytes(network, len(batch.times), num_labels) <= MODULATION_TABLE_BYTES
    ):
        with runtime.autocast(batch.dtype, device):
            plain = PrecomputedModulation(network, batch.times, conditions.label, batch.grid)
        embed_condition = plain.embed_condition

    def make() -> NetworkFunction:
        inner = plain
        if isinstance(caching, FirstBlockCaching) and isinstance(network, DiT):  # others are rejected by check_caching
            inner = FirstBlockCache(network, caching, embed_condition=embed_condition, stats=batch.cache_stats)

        def run(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            with runtime.autocast(batch.dtype, device):  # only around the network: not in the caller's loop
                return inner(x, t, condition)

        return run

    return make
