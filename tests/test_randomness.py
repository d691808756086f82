"""Philox against its published answers, and numbers that depend on where they are used and on nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tessera.randomness import normal, permutation, philox, uniform, words

# fmt: off
KNOWN_ANSWERS = [  # kat_vectors of Random123 (Salmon et al. 2011), philox4x32 with 10 rounds: counter, key, result
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
# fmt: on


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    got = philox(tuple(torch.tensor([word]) for word in counter), tuple(torch.tensor([word]) for word in key))
    assert tuple(int(word) for word in got) == expected


def philox_in_python(counter, key):
    """Ten rounds in Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right % 2**32, (left >> 32) ^ c3 ^ k1, left % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


word = st.integers(0, 2**32 - 1)


@given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_64_bit_products_survive_signed_integers(counter, key):
    got = philox(tuple(torch.tensor([w]) for w in counter), tuple(torch.tensor([w]) for w in key))
    assert tuple(int(w) for w in got) == philox_in_python(counter, key)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**63 - 1), word, st.integers(1, 11))
def test_words_are_philox_of_seed_position_and_stream(seed, position, stream, count):
    """The layout is part of the format of a run: block, stream, low and high position; key low and high seed."""
    got = words(seed, torch.tensor([position]), stream, count)[0].tolist()
    expected = []
    for block in range(3):
        counter = (block, stream, position % 2**32, position >> 32)
        expected += philox_in_python(counter, (seed % 2**32, (seed >> 32) % 2**32))
    assert got == expected[:count]


def test_seeds_may_differ_by_row():
    position = torch.tensor([5, 5, 9])
    got = words(torch.tensor([1, 2, 1]), position, 7, 6)
    for row, (seed, place) in enumerate([(1, 5), (2, 5), (1, 9)]):
        assert torch.equal(got[row], words(seed, torch.tensor([place]), 7, 6)[0])


@given(st.permutations(range(6)), st.integers(1, 5))
def test_a_row_does_not_know_its_batch(order, first):
    """The same numbers alone, in any order, in any split, whatever else is asked for."""
    position = torch.arange(6) * 10**10
    whole = normal(3, position, 1, (2, 3, 5))
    assert torch.equal(normal(3, position[list(order)], 1, (2, 3, 5)), whole[list(order)])
    parts = (normal(3, position[:first], 1, (2, 3, 5)), normal(3, position[first:], 1, (2, 3, 5)))
    assert torch.equal(torch.cat(parts), whole)
    for draw in (lambda p: uniform(3, p, 1, 7), lambda p: words(3, p, 1, 7)):
        assert torch.equal(draw(position[list(order)]), draw(position)[list(order)])


def test_a_smaller_picture_begins_like_a_larger_one():
    position = torch.arange(3)
    assert torch.equal(words(0, position, 0, 5), words(0, position, 0, 50)[:, :5])


def test_seeds_positions_and_streams_are_independent():
    """No two of them share a number or correlate."""
    asked = [(seed, position, stream) for seed in (0, 1, 2**32) for position in (0, 1, 2**32) for stream in (0, 1)]
    drawn = torch.stack([normal(s, torch.tensor([p]), use, (4096,))[0] for s, p, use in asked])
    correlation = torch.corrcoef(drawn) - torch.eye(len(asked))
    assert correlation.abs().max() < 5 / 4096**0.5
    every = torch.cat([words(s, torch.tensor([p]), use, 64)[0] for s, p, use in asked])
    assert len(every.unique()) == len(every)


def test_normal_numbers_are_normal():
    drawn = normal(11, torch.arange(400), 2, (3, 15, 17)).flatten().double().numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert abs(stats.kurtosis(drawn)) < 5 * (24 / drawn.size) ** 0.5
    assert abs(np.corrcoef(drawn[::2][: drawn.size // 2], drawn[1::2])[0, 1]) < 5 / (drawn.size / 2) ** 0.5
    assert 4 < np.abs(drawn).max() < 6.8  # tails as far as 32 bits reach


def test_normal_numbers_are_normal_over_positions():
    """The first number of each of many samples: what training sees over its steps."""
    drawn = normal(0, torch.arange(100_000), 0, (1,)).flatten().double().numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-3


def test_the_extreme_words_give_finite_numbers(monkeypatch):
    for value in (0, 2**32 - 1):
        monkeypatch.setattr("tessera.randomness.words", lambda *_, value=value: torch.full((1, 2), value))
        assert torch.isfinite(normal(0, torch.tensor([0]), 0, (2,))).all()
        drawn = uniform(0, torch.tensor([0]), 0, 2)
        assert 0 <= float(drawn.min()) <= float(drawn.max()) < 1


def test_uniform_numbers_are_uniform():
    drawn = uniform(5, torch.arange(50_000), 3, 2)
    assert drawn.dtype == torch.float32
    assert 0 <= float(drawn.min()) < float(drawn.max()) < 1
    assert stats.kstest(drawn.flatten().double().numpy(), "uniform").pvalue > 1e-3


@given(st.integers(1, 300), st.integers(0, 5))
def test_a_permutation_holds_every_place_once(length, number):
    assert permutation(1, 2, number, length).sort().values.tolist() == list(range(length))


def test_permutations_are_all_equally_likely():
    seen = [tuple(permutation(0, 9, number, 4).tolist()) for number in range(2400)]
    counts = [seen.count(order) for order in set(seen)]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3
