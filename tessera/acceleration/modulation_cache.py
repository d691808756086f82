"""Modulation parameters, precomputed for all times and conditions of a sampling run.

An adaLN block computes its shifts, scales and gates from the time and the condition alone. All times of a sampling run
are known in advance, so each of these projections is one matrix product instead of a thin one in every step, each of
which reads the same weights. Shapes: B batch, N times, K conditions, P = N K pairs of both, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tessera.conditioning import Condition
from tessera.layers.modulation import Modulation, ScaleShiftTable
from tessera.models.blocks import Context
from tessera.models.dit import DiT
from tessera.rows import SHARED


@dataclass(frozen=True)
class CachedContext(Context):
    """A context that looks modulation parameters up in a table."""

    table: Mapping[nn.Module, Tensor] | None = field(default=None, metadata=SHARED)  # [P, 1, num_params D] each
    table_rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # [B] row of each sample

    # Not compiled: otherwise each block would be compiled separately, because its key differs.
    @torch.compiler.disable
    def modulation_params(self, modulation: Modulation | ScaleShiftTable) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        params = None if self.table is None else self.table.get(modulation)
        return super().modulation_params(modulation) if params is None else params[self.table_rows]


class PrecomputedModulation:
    """Conditioning of a DiT with precomputed modulation for known times and conditions; others are computed.

    times [N] in the units of the network. condition: the rows of a sampling run; its fields must be discrete (see
    `Condition.keys`), or all absent. The outputs equal those of the network up to float32 rounding: matrix products of
    another shape are summed in another order.
    """

    def __init__(self, network: DiT, times: Tensor, condition: Condition, grid: tuple[int, ...]) -> None:
        self.network = network
        self.times = times.unique()
        keys, self.keys = condition.keys(), None
        distinct = condition
        if keys is not None:
            self.keys, inverse = keys.unique(dim=0, return_inverse=True)
            first_rows = torch.zeros(len(self.keys), dtype=torch.int64, device=keys.device)
            first_rows = first_rows.scatter(0, inverse, torch.arange(len(keys), device=keys.device))
            distinct = condition[first_rows]
        num_conditions = 1 if self.keys is None else len(self.keys)
        rows = torch.arange(num_conditions, device=times.device).repeat(len(self.times))
        context = network.embed_condition(self.times.repeat_interleave(num_conditions), distinct[rows], grid)
        self.table: dict[nn.Module, Tensor] = {
            module: context.modulation_params(module) for module in network.modules() if isinstance(module, Modulation)
        }
        self.context = context

    @staticmethod
    def table_bytes(network: DiT, num_times: int, condition: Condition) -> float:
        """The size of the table in bytes; infinite for a condition without keys, which can have no table."""
        keys = condition.keys()
        if keys is None and condition.present:
            return float("inf")
        out_features = [module.linear.out_features for module in network.modules() if isinstance(module, Modulation)]
        return 4 * num_times * (1 if keys is None else len(keys.unique(dim=0))) * sum(out_features)

    def embed_condition(self, t: Tensor, condition: Condition, grid: tuple[int, ...]) -> Context:
        """The same as `network.embed_condition`, with modulation from the table if it has all times and conditions."""
        # Condition tokens depend on the number of frames.
        known = t.ndim == 1 and condition.step_size is None and grid[:-2] == self.context.grid[:-2]
        table_rows = self._table_rows(t, condition) if known else None
        if table_rows is None:
            return self.network.embed_condition(t, condition, grid)
        selected: dict[str, Any] = {**vars(self.context[table_rows]), "grid": grid}
        return CachedContext(**selected, table=self.table, table_rows=table_rows)

    def _table_rows(self, t: Tensor, condition: Condition) -> Tensor | None:
        """The row of the table for each time [B] and condition; None if one of them is not in the table."""
        rows = torch.searchsorted(self.times, t.contiguous()).clamp(max=len(self.times) - 1)
        known = self.times[rows] == t
        keys = condition.keys()
        if self.keys is None:
            return rows if bool(known.all()) and not condition.present else None
        if keys is None or keys.shape[1] != self.keys.shape[1]:
            return None
        equal = (keys[:, None] == self.keys).all(dim=-1)  # [B, K]
        if not bool((known & equal.any(dim=1)).all()):
            return None
        return rows * len(self.keys) + equal.to(torch.uint8).argmax(dim=1)

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x [B, C, H, W], t [B] -> [B, O, H, W]"""
        return self.network.output(x, self.embed_condition(t, condition, self.network.grid(x)))
