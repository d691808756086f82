"""Residuals of blocks, reused from one step of a drawing to the next.

The time in a drawing moves slowly, and so does what the blocks add to the tokens. Whether it has moved is read off the
first block alone, as in "first block cache" and much like TeaCache (Liu et al. 2024, "Timestep Embedding Tells"), which
looks at the input of the first block. Shapes: B batch, L tokens (with those of the condition, where they are appended),
D width.
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
from tessera.sampling.caching import AnyCaching, FirstBlock

EmbedCondition = Callable[[Tensor, Condition, tuple[int, int]], Context]


def check_caching(network: NetworkConfig, caching: AnyCaching) -> None:
    """Raise TesseraError if a network has no residuals to reuse."""
    if isinstance(caching, FirstBlock) and not isinstance(network, DiTConfig):
        raise TesseraError(
            f"{caching.kind} caching reuses the residuals of a transformer's blocks, and this network is a "
            f"{network.display_name}: set caching=none"
        )


@dataclass
class CacheStats:
    """Evaluations of one block for one row: how many were asked for, and how many of them computed."""

    asked: int = 0
    computed: int = 0


class FirstBlockCache:
    """network(x, t, condition) for one half of one drawing: its rows must stay the same from call to call.

    The error is controlled by one number: a row whose first residual has changed by `threshold` or more since all its
    blocks were computed (the mean absolute difference over the mean absolute value then) has them computed again.
    Otherwise the remembered residual of the blocks after the first is added in their place; with order 1 it goes on
    along a line in t through the last two computed ones (Liu et al. 2025, "TaylorSeer", first order). Every row is
    decided on by itself, and only the rows in need are computed, so that the batch changes nothing. A threshold of 0
    computes all.

    tell: what to tell the blocks, if not what `network.tell` says. tally: where to count; of its own by default.
    """

    def __init__(
        self, network: DiT, settings: FirstBlock, *, tell: EmbedCondition | None = None, tally: CacheStats | None = None
    ) -> None:
        self.network = network
        self.settings = settings
        self.tell = tell or network.embed_condition
        self.tally = CacheStats() if tally is None else tally
        self._memory: _Memory | None = None

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x [B, C, H, W], t [B] -> [B, O, H, W]"""
        network = self.network
        tokens, context = network.embed_patches(x, self.tell(t, condition, network.grid(x)))
        first = network.blocks[0](tokens, context)
        change = first - tokens
        due = self._due(change)
        self.tally.asked += len(x) * len(network.blocks)
        self.tally.computed += len(x) + len(due) * (len(network.blocks) - 1)
        if self._memory is None or len(due) == len(x):
            tokens = self._others(first, context)
            self._memory = _Memory.of(change, tokens - first, t, self._memory)
        else:
            tokens = first + self._memory.guessed(t, self.settings.order)
            if len(due):
                computed = self._others(first[due], context.rows(due))
                tokens = tokens.index_copy(0, due, computed)
                self._memory.replace(due, change[due], computed - first[due], t[due])
        return network.head(tokens, context)

    def _due(self, change: Tensor) -> Tensor:
        """The rows whose blocks are to be computed: places, int64."""
        if self._memory is None:
            return torch.arange(len(change), device=change.device)
        if change.shape != self._memory.first.shape:
            raise ValueError(f"a cache serves one drawing: got {list(change.shape)}, {list(self._memory.first.shape)}")
        known = self._memory.first
        distance = (change - known).abs().flatten(1).mean(dim=1) / known.abs().flatten(1).mean(dim=1)
        return (~(distance < self.settings.threshold)).nonzero()[:, 0]  # what is not a number is computed

    def _others(self, tokens: Tensor, context: Context) -> Tensor:
        for block in self.network.blocks[1:]:
            tokens = block(tokens, context)
        return tokens


@dataclass
class _Memory:
    """Of each row's last full computation: the residuals and the time, and those of the one before."""

    first: Tensor  # [B, L, D]
    others: Tensor  # [B, L, D]
    t: Tensor  # [B]
    others_before: Tensor  # [B, L, D]
    t_before: Tensor  # [B] the same as t where nothing was computed before

    @staticmethod
    def of(first: Tensor, others: Tensor, t: Tensor, before: "_Memory | None") -> "_Memory":
        """All rows computed anew."""
        return _Memory(first, others, t, others if before is None else before.others, t if before is None else before.t)

    def replace(self, rows: Tensor, first: Tensor, others: Tensor, t: Tensor) -> None:
        """Some rows computed anew."""
        self.others_before = self.others_before.index_copy(0, rows, self.others[rows])
        self.t_before = self.t_before.index_copy(0, rows, self.t[rows])
        self.first = self.first.index_copy(0, rows, first)
        self.others = self.others.index_copy(0, rows, others)
        self.t = self.t.index_copy(0, rows, t)

    def guessed(self, t: Tensor, order: int) -> Tensor:
        """The residual of the blocks after the first at t [B], computed nowhere: [B, L, D]"""
        if order == 0:
            return self.others
        stride = self.t - self.t_before
        reach = torch.where(stride == 0, 0, (t - self.t) / stride)[:, None, None]
        return self.others + reach.to(self.others.dtype) * (self.others - self.others_before)
