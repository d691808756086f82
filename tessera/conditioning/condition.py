"""What a network is conditioned on beside the noisy image: a small frozen container.

Shapes: B rows.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from tessera.conditioning.control import ControlField, ControlStrengthField
from tessera.conditioning.fields import ConditionField, LabelField, condition_field
from tessera.conditioning.text import NULL_TOKEN, SizeField, TextField, TextMaskField
from tessera.errors import TesseraError
from tessera.rows import Rows


@dataclass(frozen=True)
class Condition(Rows):
    """The condition of each row. A field is None if the network does not have it.

    label: class ids, int64 [B], NULL_LABEL for unconditional rows. text: tokens of a text encoder, float32 [B, M, E],
    or int64 [B, M] where the network embeds their ids; NaN or -1 for unconditional rows. text_mask: which tokens are
    valid, bool [B, M]. size: height, width and their ratio, float32 [B, 3]. uniform: random numbers in 0..1 of each
    row in training, float32 [B, n], for networks with stochastic depth; absent in sampling. control: latents of the
    images of K controls that are attached to the network, float32 [B, K, C, h, w]; NaN where a row has none.
    control_strength: of each, float32 [B, K]; absent: 1. step_size: t - s of the step over which the network predicts
    the average velocity, float32 [B], or [B, T] of frames; absent: 0, the velocity at t itself.
    """

    label: Tensor | None = condition_field(LabelField())
    text: Tensor | None = condition_field(TextField())
    text_mask: Tensor | None = condition_field(TextMaskField())
    size: Tensor | None = condition_field(SizeField())
    uniform: Tensor | None = None
    control: Tensor | None = condition_field(ControlField())
    control_strength: Tensor | None = condition_field(ControlStrengthField())
    step_size: Tensor | None = None
    prepared: Rows | None = None  # what a network computed ahead from these fields: see `Network.prepare`
    prepared_control: Any = None  # the same from control images

    def __post_init__(self) -> None:
        for name, rules in self.rules().items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, Tensor):
                object.__setattr__(self, name, torch.as_tensor(value, dtype=rules.dtype))

    @classmethod
    def rules(cls) -> dict[str, ConditionField]:
        """The rules of each field, by name."""
        return {each.name: each.metadata["rules"] for each in fields(cls) if "rules" in each.metadata}

    @property
    def present(self) -> dict[str, Tensor]:
        """The fields that are not absent, by name."""
        return {name: value for name in self.rules() if (value := getattr(self, name)) is not None}

    def null(self, names: Iterable[str] | None = None) -> Self:
        """The same rows with the null value in these fields (default: in all): an unconditional part of guidance."""
        rules, present = self.rules(), self.present
        chosen = [name for name in (present if names is None else names) if name in present]
        values: dict[str, Any] = {name: rules[name].null_like(present[name]) for name in chosen}
        return replace(self, **values)

    def drop(self, mask: Tensor, names: Iterable[str] | None = None) -> Self:
        """Null values where mask [B] is true: condition dropout in training (Ho & Salimans 2022)."""
        changed: dict[str, Any] = {}
        for name, null in self.null(names).present.items():
            value = self.present[name]
            if null is not value:
                rows = mask.to(value.device).view(-1, *(1,) * (value.ndim - 1))
                changed[name] = torch.where(rows, null, value)
        return replace(self, **changed)

    def with_empty_text(self, empty: Self) -> Self:
        """The text and mask of `empty`, which has one row, in place of null text."""
        assert self.text is not None
        first = self.text[:, 0]
        is_null = first.isnan().any(dim=1) if first.is_floating_point() else first == NULL_TOKEN
        rows = torch.where(is_null, len(is_null), torch.arange(len(is_null), device=is_null.device))
        own = type(self)(text=self.text, text_mask=self.text_mask)
        texts = self.cat((own, empty.to(rows.device)))[rows]
        return replace(self, text=texts.text, text_mask=texts.text_mask)

    def keys(self) -> Tensor | None:
        """Whole numbers that are equal where conditions are equal: int64 [B, fields]; None if a field is not discrete
        or all are absent."""
        rules, present = self.rules(), self.present
        if not present or not all(rules[name].discrete for name in present):
            return None
        return torch.stack([value.to(torch.int64) for value in present.values()], dim=1)

    @classmethod
    def load(cls, names: Sequence[str], dataset: Any, samples: Sequence[int], positions: Tensor) -> Self:
        """The conditions of some samples of a data set, with these fields. positions: int64 [B] of training"""
        rules = cls.rules()
        values: dict[str, Any] = {name: rules[name].load(dataset, samples, positions) for name in names}
        return cls(**values)

    @classmethod
    def example(cls, names: Sequence[str], num_rows: int, network: Any) -> Self:
        """Any valid conditions with these fields, to measure a network with. network: its settings"""
        rules = cls.rules()
        values: dict[str, Any] = {name: rules[name].example(num_rows, network) for name in names}
        return cls(**values)

    @classmethod
    def encode(cls, inputs: Mapping[str, Sequence[Any]], model: Any) -> Self:
        """What a user asks for, by field, as rows. model: a `Model`. Raises TesseraError."""
        rows: dict[str, Any] = {}
        for name, rules in cls.rules().items():  # in this order: a mask that is given replaces that of the text
            if name in inputs:
                encoded = rules.encode(inputs[name], model)
                rows |= encoded if isinstance(encoded, dict) else {name: encoded}
        tokens, valid = (rows[name].shape[1] if name in rows else None for name in ("text", "text_mask"))
        if None not in (tokens, valid) and tokens != valid:
            raise TesseraError(f"a text_mask has an entry for each token of its text: {valid} entries, {tokens} tokens")
        return cls(**rows)


def check_inputs(names: Iterable[str], condition_type: type[Condition], model: Any) -> None:
    """Raise TesseraError unless a request has inputs for exactly the fields that a model has.

    names: of the fields with inputs. model: its configuration.
    """
    rules, needed, present = condition_type.rules(), set(model.network.condition_fields), set(names)

    def listed(fields: Iterable[str]) -> str:
        return ", ".join((rules[name].input_name if name in rules else "") or name for name in sorted(fields))

    if unknown := present - needed:
        known = f"is conditioned on {listed(needed)}" if needed else "is unconditional"
        raise TesseraError(f"this model {known}: leave out {listed(unknown)}")
    implied = {companion for name in present for companion in rules[name].companions}
    missing = [name for name in rules if name in needed - present - implied]
    if missing:
        hints = [
            f"{listed([name])}: {hint}" if (hint := rules[name].hint(model)) else listed([name]) for name in missing
        ]
        raise TesseraError(f"this model needs {'; '.join(hints)}")


def dropout_stream(name: str) -> int:
    """The random stream that decides where one field alone is dropped in training: 32 bits of its name."""
    return zlib.crc32(name.encode())


NetworkFunction = Callable[[Tensor, Tensor, Condition], Tensor]  # network(x, t, condition) -> raw output
