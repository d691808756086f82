"""Steering vectors computed once for all the times and classes of a drawing.

Every adaLN block regresses its shifts, scales and gates from the time and the class alone. All times of a drawing are
known before it begins, so each regression is one product of matrices instead of a thin one in every step, which reads
the same weights anew. Shapes: B batch, N times, K labels, P = N K pairs of the two, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from tessera.conditioning import Condition
from tessera.layers.modulation import Modulation, ScaleShiftTable
from tessera.models.blocks import Context
from tessera.models.dit import DiT


@dataclass(frozen=True)
class CachedContext(Context):
    """A context that looks steering vectors up."""

    table: Mapping[Modulation, Tensor] = field(default_factory=dict)  # [P, 1, count D] each
    places: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # [B] of the rows in the table

    # Not compiled, or every block would be compiled anew for a key of its own.
    @torch.compiler.disable
    def modulation_params(self, modulation: Modulation | ScaleShiftTable) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if isinstance(modulation, Modulation) and modulation in self.table:
            return self.table[modulation][self.places]
        return super().modulation_params(modulation)

    def rows(self, chosen: Tensor) -> Self:
        return replace(super().rows(chosen), places=self.places[chosen])


class PrecomputedModulation:
    """network(x, t, condition) that draws at known times and labels; at others it is the network itself.

    times [N] in the units of the network; labels [K], or None for a network without classes. The outputs are the
    network's up to the rounding of float32: products of other shapes are summed in another order.
    """

    def __init__(self, network: DiT, times: Tensor, labels: Tensor | None, grid: tuple[int, int]) -> None:
        self.network = network
        self.times = times.unique()
        self.labels = None if labels is None else labels.unique()
        count = 1 if self.labels is None else len(self.labels)
        label = None if self.labels is None else self.labels.repeat(len(self.times))
        told = network.embed_condition(self.times.repeat_interleave(count), Condition(label=label), grid)
        self.table = {
            module: told.modulation_params(module) for module in network.modules() if isinstance(module, Modulation)
        }
        self.told = told

    @staticmethod
    def size(network: DiT, times: int, labels: int) -> int:
        """Bytes of the table for so many times and labels."""
        found = [module.linear.out_features for module in network.modules() if isinstance(module, Modulation)]
        return 4 * times * labels * sum(found)

    def embed_condition(self, t: Tensor, condition: Condition, grid: tuple[int, int]) -> Context:
        """As `network.tell`."""
        place = torch.searchsorted(self.times, t.contiguous()).clamp(max=len(self.times) - 1)
        known = self.times[place] == t
        if self.labels is not None and condition.label is not None:
            of = torch.searchsorted(self.labels, condition.label.contiguous()).clamp(max=len(self.labels) - 1)
            known &= self.labels[of] == condition.label
            place = place * len(self.labels) + of
        if not bool(known.all()):
            return self.network.embed_condition(t, condition, grid)
        chosen = self.told.rows(place)
        return CachedContext(c=chosen.c, cond_tokens=chosen.cond_tokens, grid=grid, table=self.table, places=place)

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x [B, C, H, W], t [B] -> [B, O, H, W]"""
        tokens, context = self.network.embed_patches(x, self.embed_condition(t, condition, self.network.grid(x)))
        for block in self.network.blocks:
            tokens = block(tokens, context)
        return self.network.head(tokens, context)
