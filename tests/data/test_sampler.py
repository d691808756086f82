"""Sample orders: each sample occurs as often as it should, and the order has no state but the position."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tessera import randomness
from tessera.data.sampler import SAMPLE_STREAM, BucketedOrder, ShuffledOrder, WeightedOrder, whole_weights

counts = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def buckets_of(sizes: list[int]) -> np.ndarray:
    """Bucket k has sizes[k] samples, mixed."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))


@given(length=st.integers(1, 50), batch=st.integers(1, 70), start=st.integers(0, 500))
def test_position_p_holds_sample_p_mod_n_of_epoch_p_over_n(length, batch, start):
    samples = ShuffledOrder(length, batch, seed=3).batch(start)
    expected = [
        randomness.permutation(3, SAMPLE_STREAM, p // length, length)[p % length] for p in range(start, start + batch)
    ]
    assert samples.tolist() == torch.stack(expected).tolist()


@given(sizes=counts, batch=st.integers(1, 16), seed=st.integers(0, 2**40))
@settings(deadline=None)
def test_a_batch_has_one_bucket_and_a_sample_occurs_once_in_each_permutation(sizes, batch, seed):
    buckets = buckets_of(sizes)
    order = BucketedOrder(buckets, batch, seed)
    rows: dict[int, list[int]] = {bucket: [] for bucket in range(len(sizes))}
    slots = []
    for number in range(-(-3 * len(buckets) // batch)):
        samples, bucket = order.batch(number * batch), order.bucket(number * batch)
        assert (buckets[samples] == bucket).all()
        slots.append(order._slot(number * batch))
    # The batches of a bucket, in order, are an endless sequence of permutations.
    assert len(set(slots)) == len(slots)
    for bucket, size in enumerate(sizes):
        due = max((number for own, number in slots if own == bucket), default=-1) + 1
        for number in range(due):
            rounds, offsets = divmod(np.arange(number * batch, (number + 1) * batch), size)
            rows[bucket] += [int(order._permutation(bucket, int(r))[o]) for r, o in zip(rounds, offsets)]
        for whole in range(len(rows[bucket]) // size):
            assert sorted(rows[bucket][whole * size : (whole + 1) * size]) == np.flatnonzero(buckets == bucket).tolist()


@given(sizes=counts, batch=st.integers(1, 16), epochs=st.integers(1, 6))
@settings(deadline=None)
def test_after_whole_epochs_each_bucket_is_within_half_a_batch_of_its_proportion(sizes, batch, epochs):
    order = BucketedOrder(buckets_of(sizes), batch, seed=0)
    due = order._due(epochs)
    assert (abs(due * batch - epochs * np.array(sizes)) <= batch / 2).all()
    counts_by_bucket = Counter(order.bucket(number * batch) for number in range(due.sum()))
    assert [counts_by_bucket[bucket] for bucket in range(len(sizes))] == due.tolist()


def test_over_as_many_epochs_as_a_batch_has_samples_each_sample_occurs_equally_often():
    """Each bucket then had exactly as many batches as it has samples."""
    sizes, batch = [7, 3, 12], 5
    order = BucketedOrder(buckets_of(sizes), batch, seed=1)
    occurrences = Counter()
    for number in range(sum(sizes)):
        occurrences.update(order.batch(number * batch).tolist())
    assert len(occurrences) == sum(sizes)

    assert set(occurrences.values()) == {batch}


def test_a_batch_does_not_depend_on_the_batches_read_before():
    sizes, batch = [50, 8, 30, 1], 4
    far = 40 * sum(sizes) // batch * batch
    sequential = BucketedOrder(buckets_of(sizes), batch, seed=9)
    for start in range(0, far, batch):
        last = sequential.batch(start)
    assert last.tolist() == BucketedOrder(buckets_of(sizes), batch, seed=9).batch(far - batch).tolist()


def test_replacements_are_the_rest_of_the_same_bucket():
    buckets = buckets_of([6, 9])
    order = BucketedOrder(buckets, 4, seed=0)
    for start in range(0, 60, 4):
        batch = order.batch(start)
        for offset in range(4):
            samples = list(order.candidates(start, offset))
            assert samples[0] == batch[offset]
            assert sorted(samples) == np.flatnonzero(buckets == order.bucket(start)).tolist()


WEIGHTS = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@example(weights=[1, 1, 1, 5], batch=1, start=5, seed=0)  # 9/8 too few of the last part: the bound is tight
@given(weights=WEIGHTS, batch=st.integers(1, 16), start=st.integers(0, 300), seed=st.integers(0, 2**40))
@settings(deadline=None)
def test_each_part_has_its_share_of_the_positions_and_its_samples_occur_equally_often(weights, batch, start, seed):
    sizes = [3 + 2 * part for part in range(len(weights))]
    parts = buckets_of(sizes)
    order = WeightedOrder(parts, weights, 1, seed)
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    samples = [int(order.batch(position)[0]) for position in range(start + batch)]
    for count in range(len(samples)):
        counts = np.bincount(parts[samples[:count]].astype(int), minlength=len(weights))
        assert all(
            abs(int(actual) - count * share) <= (1 + share * max(len(weights) - 2, 0)) / 2
            for actual, share in zip(counts, shares)
        )
    for part, size in enumerate(sizes):
        own = [sample for sample in samples if parts[sample] == part]
        for round_ in range(len(own) // size):
            assert sorted(own[round_ * size : (round_ + 1) * size]) == np.flatnonzero(parts == part).tolist()
    # A function of the position alone, whatever the batches are.
    assert WeightedOrder(parts, weights, batch, seed).batch(start).tolist() == samples[start:]
    candidates = list(order.candidates(start, 0))
    assert (candidates[0], sorted(candidates)) == (
        samples[start], np.flatnonzero(parts == parts[samples[start]]).tolist()
    )  # fmt: skip


def test_a_batch_of_whole_cycles_has_exactly_the_shares():
    parts = buckets_of([2, 100])
    order = WeightedOrder(parts, (0.25, 0.75), 8, seed=0)
    for number in range(30):
        assert np.bincount(parts[order.batch(8 * number)]).tolist() == [2, 6]


def test_weights_are_ratios():
    assert whole_weights([0.5, 1.5]) == whole_weights([1, 3]) == [1, 3]
    assert whole_weights([4]) == [1]
    assert whole_weights([0.1, 0.2, 0.7]) == [1, 2, 7]
    with pytest.raises(ValueError, match=r"weights 0\.123456, 1 have no simple ratio: round them"):
        whole_weights([0.123456, 1])
