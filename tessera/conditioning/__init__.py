"""What a network is told beside the noisy picture: a small frozen container.

Shapes: B rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

NULL_LABEL = -1  # a label that tells nothing; the network's label table maps it to its own null row


@dataclass(frozen=True)
class Condition:
    """label: class ids, int64 [B], NOTHING where a row is told nothing; None for a network without classes."""

    label: Tensor | None = None

    def __post_init__(self) -> None:
        if self.label is not None and not isinstance(self.label, Tensor):
            object.__setattr__(self, "label", torch.as_tensor(self.label, dtype=torch.int64))

    def _map(self, change) -> "Condition":
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in told.items() if value is not None})

    def to(self, device: torch.device | str) -> "Condition":
        return self._map(lambda value: value.to(device))

    def __getitem__(self, rows: Tensor | slice) -> "Condition":
        """The chosen rows."""
        return self._map(lambda value: value[rows])

    def null(self) -> "Condition":
        """The same rows, told nothing: the unconditional half of guidance."""
        return Condition(label=None if self.label is None else torch.full_like(self.label, NULL_LABEL))

    def drop(self, mask: Tensor) -> "Condition":
        """Tell nothing where mask [B] is true: label dropout in training (Ho & Salimans 2022)."""
        if self.label is None:
            return self
        return replace(self, label=torch.where(mask.to(self.label.device), NULL_LABEL, self.label))

    @staticmethod
    def cat(conditions: Sequence["Condition"]) -> "Condition":
        """Rows of several conditions of the same make, one after another."""
        labels = [condition.label for condition in conditions if condition.label is not None]
        if labels and len(labels) != len(conditions):
            raise ValueError("cannot join conditions with and without labels")
        return Condition(label=torch.cat(labels) if labels else None)


NetworkFunction = Callable[[Tensor, Tensor, Condition], Tensor]  # network(x, t, condition) -> raw output
