"""The loader: the order is a pure function of (seed, position), with any invalid samples and any number of threads."""

import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data import Loader
from tessera.data import loader as loader_module
from tessera.data.files import FilesConfig
from tessera.data.images import InvalidSample
from tessera.errors import TesseraError
from tests.data import damages


class Numbers:
    """Sample i is a 1 x 1 image with value i, of class i mod 3."""

    class_names = ("a", "b", "c")

    def __init__(self, length: int, invalid: tuple[int, ...] = ()) -> None:
        self.length, self.invalid = length, invalid

    def __len__(self) -> int:
        return self.length

    def label(self, index: int) -> int:
        return index % 3

    def name(self, index: int) -> str:
        return f"sample {index}"

    def pixels(self, index: int) -> np.ndarray:
        if index in self.invalid:
            raise InvalidSample(f"unreadable {index}")
        return np.full((1, 1, 1), index, np.uint8)


def read_samples(loader: Loader, count: int, position: int = 0) -> list[int]:
    """The samples at `count` positions from `position` on."""
    batches = loader.batches(position)
    samples = torch.cat([batch.pixels.flatten() for batch in islice(batches, -(-count // loader.batch_size))])
    batches.close()
    return samples[:count].tolist()


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 60), batch=st.integers(1, 25), seed=st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(length, batch, seed):
    order = read_samples(Loader(Numbers(length), batch, seed), 3 * length)
    for epoch in range(3):
        assert sorted(order[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_epochs_and_seeds_have_different_orders():
    order = read_samples(Loader(Numbers(50), 10, seed=0), 100)
    assert order[:50] != order[50:]
    assert order[:50] != list(range(50))
    assert order[:50] != read_samples(Loader(Numbers(50), 10, seed=1), 50)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 40), batch=st.integers(1, 15), position=st.integers(0, 200))
def test_batches_from_a_position_equal_those_reached_from_the_start(length, batch, position):
    loader = Loader(Numbers(length, invalid=(3, 7)), batch, seed=5)
    assert (
        read_samples(Loader(Numbers(length, invalid=(3, 7)), batch, 5), 60, position)
        == read_samples(loader, position + 60)[position:]
    )


def test_the_order_does_not_depend_on_batch_size_or_workers():
    expected = read_samples(Loader(Numbers(40), 8, seed=2, num_workers=1), 120)
    assert expected == Loader(Numbers(40), 120, seed=2).order.batch(0).tolist()
    for batch, workers in ((8, 2), (8, 7), (3, 2), (120, 4)):
        assert read_samples(Loader(Numbers(40), batch, seed=2, num_workers=workers), 120) == expected


def test_a_batch_may_span_epochs():
    loader = Loader(Numbers(10), 8, seed=0)
    batches = loader.batches(8)
    batch = next(batches)
    batches.close()
    assert batch.position.tolist() == list(range(8, 16))
    assert batch.position.dtype == batch.condition.label.dtype == torch.int64
    assert batch.pixels.dtype == torch.uint8
    assert batch.pixels.shape == (8, 1, 1, 1)
    assert batch.pixels.flatten().tolist() == loader.order.batch(8).tolist()
    assert batch.condition.label.tolist() == [index % 3 for index in batch.pixels.flatten().tolist()]


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(read_samples(Loader(Numbers(3), 10, seed=0), 9)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_an_invalid_sample_is_replaced_by_the_next_valid_one_and_reported():
    invalid = (2, 5, 6)
    loader = Loader(Numbers(10, invalid), 5, seed=0)
    order = Loader(Numbers(10), 10, seed=0).order.batch(0).tolist()
    expected = []
    for index in range(10):
        while order[index % 10] in invalid:
            index += 1
        expected.append(order[index % 10])
    assert read_samples(loader, 10) == expected
    assert loader.invalid_samples == {f"sample {index}": f"unreadable {index}" for index in invalid}


def test_labels_follow_the_replacement():
    loader = Loader(Numbers(10, invalid=(2, 5, 6)), 10, seed=0)
    batch = loader.load_batch(0)
    assert batch.condition.label.tolist() == [index % 3 for index in batch.pixels.flatten().tolist()]


def test_replacements_do_not_depend_on_the_workers():
    invalid = tuple(range(0, 40, 3))
    expected = read_samples(Loader(Numbers(40, invalid), 8, seed=2, num_workers=1), 80)
    assert read_samples(Loader(Numbers(40, invalid), 8, seed=2, num_workers=5), 80) == expected


def test_a_data_set_without_a_valid_image_is_an_error():
    batches = Loader(Numbers(10, invalid=tuple(range(10))), 4, seed=0).batches()
    with pytest.raises(TesseraError, match=r"no valid image among 10 of 10; the last, sample \d: unreadable \d"):
        next(batches)


def test_the_search_for_a_valid_sample_is_limited():
    batches = Loader(Numbers(250, invalid=tuple(range(250))), 1, seed=0).batches()
    with pytest.raises(TesseraError, match="no valid image among 200 of 250"):
        next(batches)


def test_an_error_in_a_thread_is_raised_to_the_caller():
    class Broken(Numbers):
        def pixels(self, index: int) -> np.ndarray:
            raise ZeroDivisionError("a bug, not an invalid image")

    batches = Loader(Broken(10), 4, seed=0).batches()
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_closing_ends_the_threads():
    before = threading.active_count()
    batches = Loader(Numbers(10), 4, seed=0, num_workers=4).batches()
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before


class Counted(Numbers):
    """Counts the calls of `pixels`."""

    def __init__(self, length: int, invalid: tuple[int, ...] = ()) -> None:
        super().__init__(length, invalid)
        self.calls = 0

    def pixels(self, index: int) -> np.ndarray:
        self.calls += 1
        return super().pixels(index)


@pytest.mark.parametrize("invalid", [(), (3, 7)])
def test_a_small_data_set_is_read_once(monkeypatch, invalid):
    source = Counted(20, invalid)
    expected = read_samples(Loader(source, 4, seed=0, num_workers=1), 100)
    assert 20 <= source.calls <= 20 + (len(invalid) and 4 * 5)  # invalid samples are tried again
    monkeypatch.setattr(loader_module, "MEMORY_LIMIT", 19)
    uncached = Counted(20, invalid)
    assert expected == read_samples(Loader(uncached, 4, seed=0, num_workers=1), 100)
    assert uncached.calls >= 100


@pytest.fixture(scope="module")
def messy_folder(tmp_path_factory) -> Path:
    """Images of many formats, some of them damaged."""
    folder = tmp_path_factory.mktemp("messy")
    damages.damage_all(folder)
    for number in range(30):
        damages.put(folder, f"good/{number}.jpg", damages.encoded(damages.image(number, (40, 37)), "jpeg"))
    return folder


@pytest.mark.run
@pytest.mark.parametrize("memory", [0, 2**30])
def test_processes_decode_what_threads_decode(messy_folder, monkeypatch, memory):
    monkeypatch.setattr(loader_module, "MEMORY_LIMIT", memory)
    dataset = FilesConfig(path=str(messy_folder), size=(32, 32), classes="none").open()

    def read(decode_processes: int) -> tuple[Loader, list[loader_module.Batch]]:
        loader = Loader(dataset, 16, seed=1, decode_processes=decode_processes)
        batches = loader.batches(16)
        result = list(islice(batches, 2 * len(dataset) // 16))
        batches.close()
        return loader, result

    (threads, expected), (processes, batches) = read(0), read(2)
    assert threads.invalid_samples  # some cannot be read
    assert processes.invalid_samples == threads.invalid_samples
    for one, other in zip(expected, batches, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.position, other.position)


@pytest.mark.run
def test_the_end_of_a_decoding_process_is_an_error(messy_folder):
    dataset = FilesConfig(path=str(messy_folder / "good"), size=(32, 32)).open()
    loader = Loader(dataset, 8, seed=0, decode_processes=1)
    batches = loader.batches()
    next(batches)
    decoder = loader._decoder
    assert decoder is not None
    decoder._processes[0].kill()
    with pytest.raises(TesseraError, match=r"training\.decode_processes to fewer than 1, or to 0"):
        list(islice(batches, 10))  # some were ready before


def test_processes_need_images_in_files():
    with pytest.raises(TesseraError, match=r"training\.decode_processes is 2, but the data are not images in files"):
        Loader(Numbers(4), 2, seed=0, decode_processes=2)  # pyright: ignore[reportArgumentType]
