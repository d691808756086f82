"""The loader: the order is a pure function of (seed, position), whatever is damaged and however many read."""

import threading
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data import Loader
from tessera.data import loader as loading
from tessera.data.images import InvalidSample
from tessera.errors import TesseraError


class Numbers:
    """Sample i is a 1 x 1 picture of the number i, of class i mod 3."""

    class_names = ("a", "b", "c")

    def __init__(self, length: int, bad: tuple[int, ...] = ()) -> None:
        self.length, self.bad = length, bad

    def __len__(self) -> int:
        return self.length

    def label(self, index: int) -> int:
        return index % 3

    def name(self, index: int) -> str:
        return f"sample {index}"

    def pixels(self, index: int) -> np.ndarray:
        if index in self.bad:
            raise InvalidSample(f"bad luck {index}")
        return np.full((1, 1, 1), index, np.uint8)


def seen(loader: Loader, count: int, position: int = 0) -> list[int]:
    """The samples at `count` positions from one on."""
    batches = loader.batches(position)
    found = torch.cat([batch.pixels.flatten() for batch in islice(batches, -(-count // loader.batch))])
    batches.close()
    return found[:count].tolist()


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 60), batch=st.integers(1, 25), seed=st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(length, batch, seed):
    order = seen(Loader(Numbers(length), batch, seed), 3 * length)
    for epoch in range(3):
        assert sorted(order[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_epochs_and_seeds_have_orders_of_their_own():
    order = seen(Loader(Numbers(50), 10, seed=0), 100)
    assert order[:50] != order[50:]
    assert order[:50] != list(range(50))
    assert order[:50] != seen(Loader(Numbers(50), 10, seed=1), 50)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 40), batch=st.integers(1, 15), position=st.integers(0, 200))
def test_batches_from_a_position_are_those_reached_by_reading_from_the_start(length, batch, position):
    loader = Loader(Numbers(length, bad=(3, 7)), batch, seed=5)
    assert seen(Loader(Numbers(length, bad=(3, 7)), batch, 5), 60, position) == seen(loader, position + 60)[position:]


def test_the_order_does_not_depend_on_the_batch_or_the_workers():
    expected = seen(Loader(Numbers(40), 8, seed=2, workers=1), 120)
    assert expected == Loader(Numbers(40), 120, seed=2).order.batch(0).tolist()
    for batch, workers in ((8, 2), (8, 7), (3, 2), (120, 4)):
        assert seen(Loader(Numbers(40), batch, seed=2, workers=workers), 120) == expected


def test_a_batch_may_straddle_epochs_and_says_its_positions():
    loader = Loader(Numbers(10), 8, seed=0)
    batches = loader.batches(8)
    batch = next(batches)
    batches.close()
    assert batch.position.tolist() == list(range(8, 16))
    assert batch.position.dtype == batch.label.dtype == torch.int64
    assert batch.pixels.dtype == torch.uint8
    assert batch.pixels.shape == (8, 1, 1, 1)
    assert batch.pixels.flatten().tolist() == loader.order.batch(8).tolist()
    assert batch.label.tolist() == [index % 3 for index in batch.pixels.flatten().tolist()]


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(seen(Loader(Numbers(3), 10, seed=0), 9)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_an_unusable_sample_is_replaced_by_the_next_usable_one_and_named():
    bad = (2, 5, 6)
    loader = Loader(Numbers(10, bad), 5, seed=0)
    order = Loader(Numbers(10), 10, seed=0).order.batch(0).tolist()
    expected = []
    for place in range(10):
        while order[place % 10] in bad:
            place += 1
        expected.append(order[place % 10])
    assert seen(loader, 10) == expected
    assert loader.skipped == {f"sample {index}": f"bad luck {index}" for index in bad}


def test_labels_follow_the_replacement():
    loader = Loader(Numbers(10, bad=(2, 5, 6)), 10, seed=0)
    batch = loader.read(0)
    assert batch.label.tolist() == [index % 3 for index in batch.pixels.flatten().tolist()]


def test_replacements_do_not_depend_on_the_workers():
    bad = tuple(range(0, 40, 3))
    expected = seen(Loader(Numbers(40, bad), 8, seed=2, workers=1), 80)
    assert seen(Loader(Numbers(40, bad), 8, seed=2, workers=5), 80) == expected


def test_all_unusable_is_one_error_with_a_reason():
    batches = Loader(Numbers(10, bad=tuple(range(10))), 4, seed=0).batches()
    with pytest.raises(TesseraError, match=r"no usable image among 10 of 10; the last, sample \d, is bad luck \d"):
        next(batches)


def test_a_long_row_of_unusable_samples_ends_the_search():
    batches = Loader(Numbers(250, bad=tuple(range(250))), 1, seed=0).batches()
    with pytest.raises(TesseraError, match="no usable image among 200 of 250"):
        next(batches)


def test_an_error_in_a_thread_reaches_the_reader():
    class Broken(Numbers):
        def pixels(self, index: int) -> np.ndarray:
            raise ZeroDivisionError("a bug, not a bad image")

    batches = Loader(Broken(10), 4, seed=0).batches()
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_closing_ends_the_threads():
    before = threading.active_count()
    batches = Loader(Numbers(10), 4, seed=0, workers=4).batches()
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


class Counted(Numbers):
    """Counts how often pixels are asked for."""

    def __init__(self, length: int, bad: tuple[int, ...] = ()) -> None:
        super().__init__(length, bad)
        self.asked = 0

    def pixels(self, index: int) -> np.ndarray:
        self.asked += 1
        return super().pixels(index)


@pytest.mark.parametrize("bad", [(), (3, 7)])
def test_a_small_data_set_is_read_once(monkeypatch, bad):
    source = Counted(20, bad)
    kept = seen(Loader(source, 4, seed=0, workers=1), 100)
    assert 20 <= source.asked <= 20 + (len(bad) and 4 * 5)  # what cannot be used is tried again
    monkeypatch.setattr(loading, "KEPT", 19)
    anew = Counted(20, bad)
    assert kept == seen(Loader(anew, 4, seed=0, workers=1), 100)
    assert anew.asked >= 100
