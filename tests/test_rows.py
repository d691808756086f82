"""Containers of rows: every field follows, whatever it holds."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.rows import SHARED, Rows, pad, structure

TABLE = {"a table": 1}


@dataclass(frozen=True)
class Inner(Rows):
    value: Tensor


@dataclass(frozen=True)
class Everything(Rows):
    plain: Tensor
    tokens: Tensor = field(metadata=pad(-1))
    inner: Inner
    names: list[str]
    history: tuple[Any, ...]
    number: float = 0.5
    table: Any = field(default=None, metadata=SHARED)
    absent: Tensor | None = None


def rows(*numbers: int, length: int = 2, **changes: Any) -> Everything:
    """Rows whose every value tells their number."""
    values = torch.tensor(numbers)
    fields = {
        "plain": values.float(),
        "tokens": values[:, None].expand(-1, length).clone(),
        "inner": Inner(10 * values),
        "names": [f"row {number}" for number in numbers],
        "history": (Inner(100 * values), 1000 * values[:, None]),
        "table": TABLE,
    }
    return Everything(**{**fields, **changes})


def numbers(container: Everything) -> list[int]:
    """The numbers of the rows, after a check that every field has the same ones."""
    result = container.plain.int().tolist()
    assert container.inner.value.tolist() == [10 * n for n in result]
    assert container.names == [f"row {n}" for n in result]
    assert container.history[0].value.tolist() == [100 * n for n in result]
    assert container.history[1].tolist() == [[1000 * n] for n in result]
    assert container.tokens[:, 0].tolist() == result
    assert (container.number, container.table, container.absent) == (0.5, TABLE, None)
    assert container.num_rows == len(result)
    return result


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (slice(1, 3), [6, 7]),
        (torch.tensor([2, 0, 2]), [7, 5, 7]),
        (torch.tensor([True, False, False, True]), [5, 8]),
        (torch.tensor([], dtype=torch.int64), []),
    ],
)
def test_a_selection_selects_in_every_field(index, expected):
    assert numbers(rows(5, 6, 7, 8)[index]) == expected


def test_cat_keeps_the_order_and_fills_up_where_a_field_declares_a_value():
    joined = Everything.cat([rows(1, 2), rows(3, length=4), rows(4, length=1)])
    assert numbers(joined) == [1, 2, 3, 4]
    assert joined.tokens.tolist() == [[1, 1, -1, -1], [2, 2, -1, -1], [3, 3, 3, 3], [4, -1, -1, -1]]


def test_put_replaces_rows():
    assert numbers(rows(1, 2, 3).put(torch.tensor([2, 0]), rows(7, 8, length=3))) == [8, 2, 7]


def test_to_moves_every_tensor():
    moved = rows(1).to("meta")
    tensors = [moved.plain, moved.tokens, moved.inner.value, moved.history[0].value, moved.history[1]]
    assert all(tensor.is_meta for tensor in tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"absent": torch.zeros(1)}, r"with and without Everything\.absent"),
        ({"plain": torch.zeros(1, 3)}, r"Everything\.plain of shapes \[\], \[3\]"),
        ({"tokens": torch.zeros(1, 3, 2)}, r"Everything\.tokens of shapes \[2\], \[3, 2\]"),
        ({"history": (Inner(torch.zeros(1)),)}, r"Everything\.history of lengths 2, 1"),
        ({"number": 2.0}, r"different values of Everything\.number: 0\.5, 2\.0"),
        ({"table": dict(TABLE)}, "Everythings of different table"),
    ],
)
def test_rows_that_do_not_belong_together_are_an_error(change, words):
    with pytest.raises(ValueError, match=words):
        Everything.cat([rows(1), rows(2, **change)])


def test_structure_is_equal_exactly_where_rows_can_be_joined():
    assert structure(rows(1)) == structure(rows(2, 3, length=7))
    for change in (
        {"absent": torch.zeros(1)},
        {"history": (Inner(torch.zeros(1)),)},
        {"table": dict(TABLE)},
        {"number": 0.7},
    ):
        assert structure(rows(1, **change)) != structure(rows(1))
