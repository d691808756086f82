"""What a network is conditioned on beside the noisy image: a small frozen container.

Shapes: B rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

NULL_LABEL = -1  # no class; the network's embedding table maps it to its own null row


@dataclass(frozen=True)
class Condition:
    """label: class ids, int64 [B], NULL_LABEL for unconditional rows; None for a network without classes."""

    label: Tensor | None = None

    def __post_init__(self) -> None:
        if self.label is not None and not isinstance(self.label, Tensor):
            object.__setattr__(self, "label", torch.as_tensor(self.label, dtype=torch.int64))

    def _map(self, function) -> "Condition":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if value is not None})

    def to(self, device: torch.device | str) -> "Condition":
        return self._map(lambda value: value.to(device))

    def __getitem__(self, rows: Tensor | slice) -> "Condition":
        """The selected rows."""
        return self._map(lambda value: value[rows])

    def null(self) -> "Condition":
        """The same rows with the null label: the unconditional half of guidance."""
        return Condition(label=None if self.label is None else torch.full_like(self.label, NULL_LABEL))

    def drop(self, mask: Tensor) -> "Condition":
        """Replace labels by the null label where mask [B] is true: label dropout in training (Ho & Salimans 2022)."""
        if self.label is None:
            return self
        return replace(self, label=torch.where(mask.to(self.label.device), NULL_LABEL, self.label))

    @staticmethod
    def cat(conditions: Sequence["Condition"]) -> "Condition":
        """Concatenate the rows of several conditions. Raises ValueError if only some have labels."""
        labels = [condition.label for condition in conditions if condition.label is not None]
        if labels and len(labels) != len(conditions):
            raise ValueError("cannot join conditions with and without labels")
        return Condition(label=torch.cat(labels) if labels else None)


NetworkFunction = Callable[[Tensor, Tensor, Condition], Tensor]  # network(x, t, condition) -> raw output
