"""First-block cache: residuals of transformer blocks, reused from one sampling step to the next.

Times change slowly during sampling, and so do the residuals of the blocks. If the residual of the first block has
changed little, those of the others are assumed to have changed little, too, as in "first block cache". TeaCache (Liu et
al. 2024) compares the input of the first block instead. Shapes: B batch, N tokens (with the condition tokens where they
are appended), D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.models.blocks import Context
from tessera.models.dit import DiT, DiTConfig
from tessera.models.network import NetworkConfig
from tessera.rows import Rows, pad
from tessera.sampling.caching import AnyCaching, FirstBlockCaching
from tessera.sampling.denoiser import CachedNetwork
from tessera.times import mean_of_frames

EmbedCondition = Callable[[Tensor, Condition, tuple[int, ...]], Context]


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


@dataclass(frozen=True)
class CachedResiduals(Rows):
    """Residuals and time of each row's last full evaluation, and of the one before."""

    first: Tensor = field(metadata=pad(0))  # [B, N, D]
    remaining: Tensor = field(metadata=pad(0))  # [B, N, D]
    t: Tensor  # [B] the mean of the frames, where they have their own times
    previous_remaining: Tensor = field(metadata=pad(0))  # [B, N, D]
    previous_t: Tensor  # [B] equal to t if there was only one evaluation
    computed: Tensor  # bool [B] false for rows without an evaluation

    @staticmethod
    def empty(x: Tensor) -> "CachedResiduals":
        """The state of rows without an evaluation."""
        nothing, times = x.new_zeros(len(x), 0, 0), x.new_zeros(len(x))
        return CachedResiduals(
            nothing, nothing, times, nothing, times, torch.zeros(len(x), dtype=torch.bool, device=x.device)
        )

    def updated(self, first: Tensor, remaining: Tensor, t: Tensor) -> "CachedResiduals":
        """The state after an evaluation of all rows."""
        previous = self.remaining if self.remaining.shape == remaining.shape else torch.zeros_like(remaining)
        known = self.computed[:, None, None]
        return CachedResiduals(
            first,
            remaining,
            t,
            torch.where(known, previous, remaining),
            torch.where(self.computed, self.t, t),
            torch.ones_like(self.computed),
        )

    def extrapolate(self, t: Tensor, order: int) -> Tensor:
        """The extrapolated residual of the blocks after the first at t [B]: [B, N, D]"""
        if order == 0:
            return self.remaining
        interval = self.t - self.previous_t
        ratio = torch.where(interval == 0, 0, (t - self.t) / interval)[:, None, None]
        return self.remaining + ratio.to(self.remaining.dtype) * (self.remaining - self.previous_remaining)


class FirstBlockCache(CachedNetwork):
    """A network that remembers residuals for each row, in a state that its caller keeps.

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

    def empty_state(self, x: Tensor) -> CachedResiduals:
        return CachedResiduals.empty(x)

    def evaluate(
        self, x: Tensor, t: Tensor, condition: Condition, state: CachedResiduals
    ) -> tuple[Tensor, CachedResiduals]:
        new_state = state

        def run_blocks(tokens: Tensor, context: Context) -> Tensor:
            nonlocal new_state
            tokens, new_state = self._run_blocks(tokens, context, mean_of_frames(t), state)
            return tokens

        context = self.embed_condition(t, condition, self.network.grid(x))
        return self.network.output(x, context, run_blocks), new_state

    def _run_blocks(
        self, tokens: Tensor, context: Context, t: Tensor, state: CachedResiduals
    ) -> tuple[Tensor, CachedResiduals]:
        network = self.network
        first = network.run_blocks(tokens, context, end=1)
        change = first - tokens
        rows = self._rows_to_compute(change, state)
        self.stats.requested += len(tokens) * len(network.blocks)
        self.stats.computed += len(tokens) + len(rows) * (len(network.blocks) - 1)
        if len(rows) == len(tokens):
            tokens = network.run_blocks(first, context, start=1)
            return tokens, state.updated(change, tokens - first, t)
        tokens = first + state.extrapolate(t, self.settings.order)
        if len(rows):
            computed = network.run_blocks(first[rows], context[rows], start=1)
            tokens = tokens.index_copy(0, rows, computed)
            updated = state[rows].updated(change[rows], computed - first[rows], t[rows])
            state = state.put(rows, updated)
        return tokens, state

    def _rows_to_compute(self, change: Tensor, state: CachedResiduals) -> Tensor:
        """Indices (int64) of the rows whose blocks must be computed."""
        cached = state.first
        if not cached.shape[1]:
            return torch.arange(len(change), device=change.device)
        if change.shape != cached.shape:
            raise ValueError(
                f"a cache serves images of one size: got tokens {list(change.shape)}, {list(cached.shape)} before"
            )
        distance = (change - cached).abs().flatten(1).mean(dim=1) / cached.abs().flatten(1).mean(dim=1)
        return (~(state.computed & (distance < self.settings.threshold))).nonzero()[:, 0]  # NaN counts as changed
