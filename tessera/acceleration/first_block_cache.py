"""First-block cache: residuals of transformer blocks, reused from one sampling step to the next.

Times change slowly during sampling, and so do the residuals of the blocks. If the residual of the first block has
changed little, those of the others are assumed to have changed little, too, as in "first block cache". TeaCache (Liu et
al. 2024) compares the input of the first block instead. Shapes: B batch, N tokens (with the condition tokens where they
are appended), D width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.models.blocks import Context
from tessera.models.dit import DiT, DiTConfig
from tessera.models.network import NetworkConfig
from tessera.sampling.caching import AnyCaching, FirstBlockCaching

EmbedCondition = Callable[[Tensor, Condition, tuple[int, int]], Context]


def check_caching(network: NetworkConfig, caching: AnyCaching) -> None:
    """Raise TesseraError if a network has no residuals to reuse."""
    if isinstance(caching, FirstBlockCaching) and not isinstance(network, DiTConfig):
        raise TesseraError(
            f"{caching.kind} caching reuses the residuals of a transformer's blocks, and this network is a "
            f"{network.display_name}: set caching=none"
        )


@dataclass
class CacheStats:
    """Evaluations of one block for one row: the number requested, and the number computed."""

    requested: int = 0
    computed: int = 0


class FirstBlockCache:
    """network(x, t, condition) for one half of one sampling run. Its rows must be the same in every call.

    A row is computed in full if its first residual has changed by `threshold` or more since its last full evaluation
    (mean absolute difference, relative to the mean absolute value at that time). Otherwise the cached residual of the
    blocks after the first is added. With order 1 it is extrapolated linearly in t from the last two full evaluations
    (Liu et al. 2025, "TaylorSeer", first order). Rows are independent, and only the rows that need it are computed, so
    the result of a row does not depend on its batch. A threshold of 0 computes everything.

    embed_condition: a replacement for `network.embed_condition`. stats: where to count (by default its own).
    """

    def __init__(
        self,
        network: DiT,
        settings: FirstBlockCaching,
        *,
        embed_condition: EmbedCondition | None = None,
        stats: CacheStats | None = None,
    ) -> None:
        self.network = network
        self.settings = settings
        self.embed_condition = embed_condition or network.embed_condition
        self.stats = CacheStats() if stats is None else stats
        self._cached: _CachedResiduals | None = None

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x [B, C, H, W], t [B] -> [B, O, H, W]"""
        network = self.network
        tokens, context = network.embed_patches(x, self.embed_condition(t, condition, network.grid(x)))
        first = network.blocks[0](tokens, context)
        change = first - tokens
        rows = self._rows_to_compute(change)
        self.stats.requested += len(x) * len(network.blocks)
        self.stats.computed += len(x) + len(rows) * (len(network.blocks) - 1)
        if self._cached is None or len(rows) == len(x):
            tokens = self._remaining_blocks(first, context)
            self._cached = _CachedResiduals.after_full_evaluation(change, tokens - first, t, self._cached)
        else:
            tokens = first + self._cached.extrapolate(t, self.settings.order)
            if len(rows):
                computed = self._remaining_blocks(first[rows], context.rows(rows))
                tokens = tokens.index_copy(0, rows, computed)
                self._cached.update(rows, change[rows], computed - first[rows], t[rows])
        return network.head(tokens, context)

    def _rows_to_compute(self, change: Tensor) -> Tensor:
        """Indices (int64) of the rows whose blocks must be computed."""
        if self._cached is None:
            return torch.arange(len(change), device=change.device)
        if change.shape != self._cached.first.shape:
            raise ValueError(
                f"a cache serves one sampling run: got tokens {list(change.shape)}, {list(self._cached.first.shape)}"
            )
        cached = self._cached.first
        distance = (change - cached).abs().flatten(1).mean(dim=1) / cached.abs().flatten(1).mean(dim=1)
        return (~(distance < self.settings.threshold)).nonzero()[:, 0]  # NaN counts as changed

    def _remaining_blocks(self, tokens: Tensor, context: Context) -> Tensor:
        for block in self.network.blocks[1:]:
            tokens = block(tokens, context)
        return tokens


@dataclass
class _CachedResiduals:
    """Residuals and time of each row's last full evaluation, and of the one before."""

    first: Tensor  # [B, N, D]
    remaining: Tensor  # [B, N, D]
    t: Tensor  # [B]
    previous_remaining: Tensor  # [B, N, D]
    previous_t: Tensor  # [B] equal to t if there was only one evaluation

    @staticmethod
    def after_full_evaluation(
        first: Tensor, remaining: Tensor, t: Tensor, previous: "_CachedResiduals | None"
    ) -> "_CachedResiduals":
        """The residuals after all rows were computed."""
        return _CachedResiduals(
            first,
            remaining,
            t,
            remaining if previous is None else previous.remaining,
            t if previous is None else previous.t,
        )

    def update(self, rows: Tensor, first: Tensor, remaining: Tensor, t: Tensor) -> None:
        """Store the residuals of the rows [R] that were computed."""
        self.previous_remaining = self.previous_remaining.index_copy(0, rows, self.remaining[rows])
        self.previous_t = self.previous_t.index_copy(0, rows, self.t[rows])
        self.first = self.first.index_copy(0, rows, first)
        self.remaining = self.remaining.index_copy(0, rows, remaining)
        self.t = self.t.index_copy(0, rows, t)

    def extrapolate(self, t: Tensor, order: int) -> Tensor:
        """The extrapolated residual of the blocks after the first at t [B]: [B, N, D]"""
        if order == 0:
            return self.remaining
        interval = self.t - self.previous_t
        ratio = torch.where(interval == 0, 0, (t - self.t) / interval)[:, None, None]
        return self.remaining + ratio.to(self.remaining.dtype) * (self.remaining - self.previous_remaining)
