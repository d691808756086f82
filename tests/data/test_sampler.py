"""Orders: every sample as often as it should come, whatever the buckets, and no state but the position."""

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera import randomness
from tessera.data.sampler import STREAM, Bucketed, Shuffled

counts = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def buckets_of(sizes: list[int]) -> np.ndarray:
    """Bucket k has sizes[k] samples, mixed."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))


@given(length=st.integers(1, 50), batch=st.integers(1, 70), start=st.integers(0, 500))
def test_shuffled_is_sample_p_mod_n_of_epoch_p_over_n(length, batch, start):
    found = Shuffled(length, batch, seed=3).batch(start)
    expected = [randomness.permutation(3, STREAM, p // length, length)[p % length] for p in range(start, start + batch)]
    assert found.tolist() == torch.stack(expected).tolist()


@given(sizes=counts, batch=st.integers(1, 16), seed=st.integers(0, 2**40))
@settings(deadline=None)
def test_every_batch_is_of_one_bucket_and_every_sample_comes_once_a_round(sizes, batch, seed):
    buckets = buckets_of(sizes)
    order = Bucketed(buckets, batch, seed)
    rows: dict[int, list[int]] = {bucket: [] for bucket in range(len(sizes))}
    slots = []
    for number in range(-(-3 * len(buckets) // batch)):
        found, bucket = order.batch(number * batch), order.bucket(number * batch)
        assert (buckets[found] == bucket).all()
        slots.append(order._slot(number * batch))
    # A bucket's batches, in their own order, are an endless row of shuffles.
    assert len(set(slots)) == len(slots)
    for bucket, size in enumerate(sizes):
        due = max((number for own, number in slots if own == bucket), default=-1) + 1
        for number in range(due):
            rounds, places = divmod(np.arange(number * batch, (number + 1) * batch), size)
            rows[bucket] += [int(order._round(bucket, int(r))[p]) for r, p in zip(rounds, places)]
        for whole in range(len(rows[bucket]) // size):
            assert sorted(rows[bucket][whole * size : (whole + 1) * size]) == np.flatnonzero(buckets == bucket).tolist()


@given(sizes=counts, batch=st.integers(1, 16), epochs=st.integers(1, 6))
@settings(deadline=None)
def test_after_whole_epochs_every_bucket_has_had_its_share_to_half_a_batch(sizes, batch, epochs):
    order = Bucketed(buckets_of(sizes), batch, seed=0)
    due = order._due(epochs)
    assert (abs(due * batch - epochs * np.array(sizes)) <= batch / 2).all()
    had = Counter(order.bucket(number * batch) for number in range(due.sum()))
    assert [had[bucket] for bucket in range(len(sizes))] == due.tolist()


def test_over_as_many_epochs_as_a_batch_has_samples_every_sample_comes_equally_often():
    """Then each bucket has had exactly as many batches as it has samples."""
    sizes, batch = [7, 3, 12], 5
    order = Bucketed(buckets_of(sizes), batch, seed=1)
    seen = Counter()
    for number in range(sum(sizes)):
        seen.update(order.batch(number * batch).tolist())
    assert len(seen) == sum(sizes)
    # every due date lies half a batch before the whole number, so none is left over
    assert set(seen.values()) == {batch}


def test_any_place_is_found_without_what_came_before():
    sizes, batch = [50, 8, 30, 1], 4
    far = 40 * sum(sizes) // batch * batch
    walked = Bucketed(buckets_of(sizes), batch, seed=9)
    for start in range(0, far, batch):
        before = walked.batch(start)
    assert before.tolist() == Bucketed(buckets_of(sizes), batch, seed=9).batch(far - batch).tolist()


def test_stand_ins_are_the_rest_of_the_same_bucket():
    buckets = buckets_of([6, 9])
    order = Bucketed(buckets, 4, seed=0)
    for start in range(0, 60, 4):
        batch = order.batch(start)
        for offset in range(4):
            found = list(order.candidates(start, offset))
            assert found[0] == batch[offset]
            assert sorted(found) == np.flatnonzero(buckets == order.bucket(start)).tolist()
