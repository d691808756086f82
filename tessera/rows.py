"""Frozen containers whose tensors have one row per sample. They are selected, concatenated and moved as a whole.

A new field needs no code: its values follow these rules.

Tensor   one row per sample along the first axis
list     one entry per sample, of any type
Rows     a container of the same samples
tuple    several such values, such as a solver's last outputs
None     absent, for all samples
others   the same for all samples, as are tensors in a field whose metadata is SHARED

Shapes: B rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

SHARED = {"shared": True}  # metadata of a field with one value for all rows, the same object in all joined containers


def pad(value: float) -> dict[str, float]:
    """Metadata of a field of tensors [B, L, ...]: where other axes than the first differ, `cat` fills up with value."""
    return {"pad": value}


@dataclass(frozen=True)
class Rows:
    """The base class. Subclasses are frozen dataclasses."""

    def __getitem__(self, rows: Tensor | slice) -> Self:
        """The selected rows. rows: int64 [R], bool [B] or a slice"""
        return self._map(lambda value: _select(value, rows))

    def to(self, device: torch.device | str) -> Self:
        return self._map(lambda value: _move(value, torch.device(device)), with_shared=True)

    def put(self, rows: Tensor, values: Self) -> Self:
        """The same container with other values in some rows. rows: int64 [R]; values: of R rows"""
        count = self.num_rows or 0
        index = torch.arange(count)
        index[rows.cpu()] = torch.arange(count, count + len(rows))
        return type(self).cat((self, values))[index]

    @classmethod
    def cat(cls, parts: "Sequence[Rows]") -> Self:
        """All rows of several containers.

        Raises ValueError if a field is absent in some of them, or if shapes differ in a field without padding.
        """
        first = parts[0]
        if len(parts) == 1:
            return first  # pyright: ignore[reportReturnType] (a container of this class)
        values = {}
        for each in fields(first):
            pieces = [getattr(part, each.name) for part in parts]
            if each.metadata.get("shared"):
                if any(piece is not pieces[0] for piece in pieces):
                    raise ValueError(f"cannot join {type(first).__name__}s of different {each.name}")
                continue
            values[each.name] = _cat(pieces, f"{type(first).__name__}.{each.name}", each.metadata.get("pad"))
        return replace(first, **values)  # pyright: ignore[reportReturnType]

    @property
    def num_rows(self) -> int | None:
        """B; None if every field is absent or shared."""
        lengths = (_length(getattr(self, each.name)) for each in fields(self) if not each.metadata.get("shared"))
        return next((length for length in lengths if length is not None), None)

    def _map(self, function: Callable[[Any], Any], with_shared: bool = False) -> Self:
        chosen = [each.name for each in fields(self) if with_shared or not each.metadata.get("shared")]
        return replace(self, **{name: function(getattr(self, name)) for name in chosen})


def structure(value: Any) -> Any:
    """What two values must have in common to be concatenated: types, lengths of tuples, and values of all samples."""
    if isinstance(value, Rows):
        return type(value), *(
            id(part) if each.metadata.get("shared") else structure(part)
            for each in fields(value)
            for part in [getattr(value, each.name)]
        )
    if isinstance(value, tuple):
        return tuple(structure(part) for part in value)
    return type(value) if isinstance(value, Tensor | list) else (type(value), value)


def _select(value: Any, rows: Tensor | slice) -> Any:
    if isinstance(value, Tensor | Rows):
        return value[rows]
    if isinstance(value, list):
        if isinstance(rows, slice):
            return value[rows]
        return [value[row] for row in (rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows).tolist()]
    return tuple(_select(part, rows) for part in value) if isinstance(value, tuple) else value


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=device.type == "cuda")
    if isinstance(value, tuple):
        return tuple(_move(part, device) for part in value)
    return value.to(device) if isinstance(value, Rows) else value


def _cat(pieces: list[Any], name: str, pad: float | None) -> Any:
    first = pieces[0]
    if any(type(piece) is not type(first) for piece in pieces):
        raise ValueError(f"cannot join rows with and without {name}: {', '.join(type(p).__name__ for p in pieces)}")
    if isinstance(first, Tensor):
        if len({piece.shape[1:] for piece in pieces}) > 1:
            pieces = _pad_to_longest(pieces, name, pad)
        return torch.cat(pieces)
    if isinstance(first, Rows):
        return type(first).cat(pieces)
    if isinstance(first, list):
        return [entry for piece in pieces for entry in piece]
    if isinstance(first, tuple):
        if len({len(piece) for piece in pieces}) > 1:
            raise ValueError(f"cannot join {name} of lengths {', '.join(str(len(piece)) for piece in pieces)}")
        return tuple(_cat(list(parts), name, pad) for parts in zip(*pieces))
    if any(piece != first for piece in pieces):
        raise ValueError(f"cannot join different values of {name}: {', '.join(map(str, pieces))}")
    return first


def _pad_to_longest(pieces: list[Tensor], name: str, pad: float | None) -> list[Tensor]:
    shapes = [tuple(piece.shape[1:]) for piece in pieces]
    if pad is None or len({len(shape) for shape in shapes}) > 1:
        raise ValueError(f"cannot join {name} of shapes {', '.join(str(list(shape)) for shape in shapes)}")
    longest = [max(lengths) for lengths in zip(*shapes)]
    result = []
    for piece, shape in zip(pieces, shapes):
        missing = [amount for length, most in zip(shape, longest) for amount in (most - length, 0)][::-1]
        result.append(torch.nn.functional.pad(piece, missing, value=pad))
    return result


def _length(value: Any) -> int | None:
    if isinstance(value, Rows):
        return value.num_rows
    if isinstance(value, Tensor | list):
        return len(value)
    if isinstance(value, tuple):
        return next((length for length in map(_length, value) if length is not None), None)
    return None
