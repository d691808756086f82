"""Philox against published vectors, and random numbers that depend only on seed, position and stream."""

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
def test_philox_matches_the_published_vectors(counter, key, expected):
    result = philox(tuple(torch.tensor([word]) for word in counter), tuple(torch.tensor([word]) for word in key))
    assert tuple(int(word) for word in result) == expected


def philox_in_python(counter, key):
    """Ten rounds with Python's integers, which cannot overflow."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right % 2**32, (left >> 32) ^ c3 ^ k1, left % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


word = st.integers(0, 2**32 - 1)


@given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_philox_is_correct_with_signed_64_bit_integers(counter, key):
    result = philox(tuple(torch.tensor([w]) for w in counter), tuple(torch.tensor([w]) for w in key))
    assert tuple(int(w) for w in result) == philox_in_python(counter, key)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**63 - 1), word, st.integers(1, 11))
def test_words_are_philox_of_seed_position_and_stream(seed, position, stream, count):
    """A run's format includes this layout. Counter: block, stream, low and high position. Key: low and high seed."""
    result = words(seed, torch.tensor([position]), stream, count)[0].tolist()
    expected = []
    for block in range(3):
        counter = (block, stream, position % 2**32, position >> 32)
        expected += philox_in_python(counter, (seed % 2**32, (seed >> 32) % 2**32))
    assert result == expected[:count]


def test_seeds_may_differ_by_row():
    position = torch.tensor([5, 5, 9])
    result = words(torch.tensor([1, 2, 1]), position, 7, 6)
    for row, (seed, row_position) in enumerate([(1, 5), (2, 5), (1, 9)]):
        assert torch.equal(result[row], words(seed, torch.tensor([row_position]), 7, 6)[0])


@given(st.permutations(range(6)), st.integers(1, 5))
def test_a_row_does_not_depend_on_its_batch(order, first):
    """The numbers of a row are the same in any order and any split of the batch."""
    position = torch.arange(6) * 10**10
    whole = normal(3, position, 1, (2, 3, 5))
    assert torch.equal(normal(3, position[list(order)], 1, (2, 3, 5)), whole[list(order)])
    parts = (normal(3, position[:first], 1, (2, 3, 5)), normal(3, position[first:], 1, (2, 3, 5)))
    assert torch.equal(torch.cat(parts), whole)
    for generate in (lambda p: uniform(3, p, 1, 7), lambda p: words(3, p, 1, 7)):
        assert torch.equal(generate(position[list(order)]), generate(position)[list(order)])


def test_fewer_words_are_the_first_of_more_words():
    position = torch.arange(3)
    assert torch.equal(words(0, position, 0, 5), words(0, position, 0, 50)[:, :5])


def test_seeds_positions_and_streams_are_independent():
    """No two of them have a number in common or correlate."""
    keys = [(seed, position, stream) for seed in (0, 1, 2**32) for position in (0, 1, 2**32) for stream in (0, 1)]
    samples = torch.stack([normal(s, torch.tensor([p]), stream, (4096,))[0] for s, p, stream in keys])
    correlation = torch.corrcoef(samples) - torch.eye(len(keys))
    assert correlation.abs().max() < 5 / 4096**0.5
    all_words = torch.cat([words(s, torch.tensor([p]), stream, 64)[0] for s, p, stream in keys])
    assert len(all_words.unique()) == len(all_words)


def test_normal_numbers_are_normal():
    samples = normal(11, torch.arange(400), 2, (3, 15, 17)).flatten().double().numpy()
    assert stats.kstest(samples, "norm").pvalue > 1e-3
    assert abs(stats.kurtosis(samples)) < 5 * (24 / samples.size) ** 0.5
    assert abs(np.corrcoef(samples[::2][: samples.size // 2], samples[1::2])[0, 1]) < 5 / (samples.size / 2) ** 0.5
    assert 4 < np.abs(samples).max() < 6.8  # 32 bits limit the tails


def test_normal_numbers_are_normal_over_positions():
    """The first number of each position, as training uses them over its steps."""
    samples = normal(0, torch.arange(100_000), 0, (1,)).flatten().double().numpy()
    assert stats.kstest(samples, "norm").pvalue > 1e-3


def test_the_smallest_and_largest_words_give_finite_numbers(monkeypatch):
    for value in (0, 2**32 - 1):
        monkeypatch.setattr("tessera.randomness.words", lambda *_, value=value: torch.full((1, 2), value))
        assert torch.isfinite(normal(0, torch.tensor([0]), 0, (2,))).all()
        samples = uniform(0, torch.tensor([0]), 0, 2)
        assert 0 <= float(samples.min()) <= float(samples.max()) < 1


def test_uniform_numbers_are_uniform():
    samples = uniform(5, torch.arange(50_000), 3, 2)
    assert samples.dtype == torch.float32
    assert 0 <= float(samples.min()) < float(samples.max()) < 1
    assert stats.kstest(samples.flatten().double().numpy(), "uniform").pvalue > 1e-3


@given(st.integers(1, 300), st.integers(0, 5))
def test_a_permutation_has_every_index_once(length, number):
    assert permutation(1, 2, number, length).sort().values.tolist() == list(range(length))


def test_permutations_are_all_equally_likely():
    permutations = [tuple(permutation(0, 9, number, 4).tolist()) for number in range(2400)]
    counts = [permutations.count(order) for order in set(permutations)]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3
