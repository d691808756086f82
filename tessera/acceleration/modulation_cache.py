"""Modulation parameters, precomputed for all times and classes of a sampling run.

An adaLN block computes its shifts, scales and gates from the time and the class alone. All times of a sampling run are
known in advance, so each of these projections is one matrix product instead of a thin one in every step, each of which
reads the same weights. Shapes: B batch, N times, K labels, P = N K pairs of time and label, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from tessera.conditioning import Condition
from tessera.layers.modulation import Modulation, ScaleShiftTable
from tessera.models.blocks import Context
from tessera.models.dit import DiT


@dataclass(frozen=True)
class CachedContext(Context):
    """A context that looks modulation parameters up in a table."""

    table: Mapping[nn.Module, Tensor] = field(default_factory=dict)  # [P, 1, num_params D] each
    table_rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # [B] row of each sample

    # Not compiled: otherwise each block would be compiled separately, because its key differs.
    @torch.compiler.disable
    def modulation_params(self, modulation: Modulation | ScaleShiftTable) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        params = self.table.get(modulation)
        return super().modulation_params(modulation) if params is None else params[self.table_rows]

    def rows(self, indices: Tensor) -> Self:
        return replace(super().rows(indices), table_rows=self.table_rows[indices])


class PrecomputedModulation:
    """network(x, t, condition) with precomputed modulation for known times and labels. Others use the network itself.

    times [N] in the units of the network; labels [K], or None for a network without classes. The outputs equal those of
    the network up to float32 rounding: matrix products of another shape are summed in another order.
    """

    def __init__(self, network: DiT, times: Tensor, labels: Tensor | None, grid: tuple[int, int]) -> None:
        self.network = network
        self.times = times.unique()
        self.labels = None if labels is None else labels.unique()
        num_labels = 1 if self.labels is None else len(self.labels)
        label = None if self.labels is None else self.labels.repeat(len(self.times))
        context = network.embed_condition(self.times.repeat_interleave(num_labels), Condition(label=label), grid)
        self.table: dict[nn.Module, Tensor] = {
            module: context.modulation_params(module) for module in network.modules() if isinstance(module, Modulation)
        }
        self.context = context

    @staticmethod
    def table_bytes(network: DiT, num_times: int, num_labels: int) -> int:
        """The size of the table in bytes."""
        out_features = [module.linear.out_features for module in network.modules() if isinstance(module, Modulation)]
        return 4 * num_times * num_labels * sum(out_features)

    def embed_condition(self, t: Tensor, condition: Condition, grid: tuple[int, int]) -> Context:
        """The same as `network.embed_condition`, with modulation from the table if it has all times and labels."""
        table_rows = torch.searchsorted(self.times, t.contiguous()).clamp(max=len(self.times) - 1)
        known = self.times[table_rows] == t
        if self.labels is not None and condition.label is not None:
            label_index = torch.searchsorted(self.labels, condition.label.contiguous()).clamp(max=len(self.labels) - 1)
            known &= self.labels[label_index] == condition.label
            table_rows = table_rows * len(self.labels) + label_index
        if not bool(known.all()):
            return self.network.embed_condition(t, condition, grid)
        selected = self.context.rows(table_rows)
        return CachedContext(
            c=selected.c, cond_tokens=selected.cond_tokens, grid=grid, table=self.table, table_rows=table_rows
        )

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x [B, C, H, W], t [B] -> [B, O, H, W]"""
        tokens, context = self.network.embed_patches(x, self.embed_condition(t, condition, self.network.grid(x)))
        for block in self.network.blocks:
            tokens = block(tokens, context)
        return self.network.head(tokens, context)
