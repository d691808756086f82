"""Moments against numpy, for any division of the rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.errors import TesseraError
from tessera.evaluation.moments import BLOCK, Moments


def _rows(count=300, width=7, offset=0.0, seed=0):
    numbers = np.random.default_rng(seed)
    return offset + numbers.normal(size=(count, width)) @ numbers.normal(size=(width, width))


def _close(moments, mean, cov, tolerance=1e-10):
    np.testing.assert_allclose(moments.mean, mean, rtol=tolerance)
    np.testing.assert_allclose(moments.cov, cov, rtol=tolerance, atol=tolerance * np.abs(cov).max())


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_are_those_of_numpy(kind, offset):
    rows = _rows(offset=offset).astype(kind)
    moments = Moments.from_rows(rows)
    exact = rows.astype(np.float64)
    assert moments.count == 300
    _close(moments, exact.mean(axis=0), np.cov(exact.T))


def test_a_large_mean_does_not_cost_precision():
    near = _rows()
    near = near.round(6)  # so that adding 2^24 is nearly exact in float64
    far = Moments.from_rows(near + 2.0**24)
    np.testing.assert_allclose(far.cov, np.cov(near.T), rtol=1e-6)  # 2^24 keeps 29 bits: 2e-9 of each row


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_merged_moments_are_those_of_all_rows(parts, offset):
    rows = _rows(count=1001, offset=offset)
    whole = Moments.from_rows(rows)
    merged = Moments()
    for part in range(parts):
        merged.merge(Moments.from_rows(rows[part::parts]))
    assert merged.count == 1001
    _close(merged, whole.mean, whole.cov)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=12))
def test_the_batch_sizes_do_not_matter(sizes):
    rows = _rows(count=sum(sizes) + 3)
    moments = Moments()
    for stop in [*np.cumsum(sizes), len(rows)]:
        moments.add(rows[moments.count : stop])
    assert moments.count == len(rows)
    _close(moments, rows.mean(axis=0), np.cov(rows.T))


def test_more_rows_than_a_block():
    rows = _rows(count=2 * BLOCK + 5, width=2, offset=3.0)
    _close(Moments.from_rows(rows), rows.mean(axis=0), np.cov(rows.T))


def test_without_is_the_inverse_of_merge():
    rows = _rows(offset=100.0)
    rest = Moments.from_rows(rows).without(Moments.from_rows(rows[:90]))
    assert rest.count == 210
    _close(rest, rows[90:].mean(axis=0), np.cov(rows[90:].T))


def test_a_single_row_has_zero_covariance():
    moments = Moments.from_rows(np.array([[1.0, 2.0]]))
    assert moments.mean.tolist() == [1.0, 2.0]
    assert moments.cov.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_no_rows_change_nothing():
    rows = _rows()
    moments = Moments.from_rows(rows)
    moments.merge(Moments())
    moments.add(rows[:0])
    _close(moments, rows.mean(axis=0), np.cov(rows.T))
    assert moments.count == 300


def test_memory_maps_are_accepted(tmp_path):
    rows = _rows().astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    mapped = Moments.from_rows(np.load(tmp_path / "rows.npy", mmap_mode="r"))
    _close(mapped, rows.astype(np.float64).mean(axis=0), np.cov(rows.astype(np.float64).T))


def test_rows_that_are_not_finite_are_counted():
    rows = _rows()
    rows[3, 1], rows[3, 2], rows[200, 0] = np.nan, np.inf, -np.inf
    with pytest.raises(TesseraError, match="2 of 300 rows of features hold NaN"):
        Moments.from_rows(rows)


def test_other_shapes_are_errors():
    with pytest.raises(TesseraError, match=r"\[N, D\], not \[4\]"):
        Moments.from_rows(np.zeros(4))
    moments = Moments.from_rows(np.zeros((3, 4)))
    with pytest.raises(TesseraError, match="different widths: 4 and 5"):
        moments.add(np.zeros((3, 5)))
