"""Aspect-ratio buckets: which sizes there are, and which image gets which size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.data.buckets import Buckets, BucketsConfig, area_then_height, assign_buckets


@given(side=st.integers(4, 40), multiple=st.sampled_from([4, 8, 16]), aspect=st.floats(1, 4))
def test_sizes_keep_area_aspect_and_multiple(side, multiple, aspect):
    side *= multiple
    config = BucketsConfig(aspect=aspect, multiple=multiple)
    sizes = config.sizes((side, side))
    assert (side, side) in sizes
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert height * width <= side * side < height * (width + multiple) or (height, width) == (side, side)
        assert max(height, width) <= aspect * min(height, width)
    # no size is missing: brute force
    expected = {
        (height, side * side // height // multiple * multiple) for height in range(multiple, side * side, multiple)
    }
    assert set(sizes) == {(side, side)} | {(h, w) for h, w in expected if w and max(h, w) <= aspect * min(h, w)}


def test_several_resolutions_have_all_their_sizes():
    sizes = BucketsConfig(sides=(32, 64), multiple=16, aspect=2).sizes((64, 64))
    assert {(32, 32), (64, 64), (48, 80)} <= set(sizes)
    assert sizes == sorted(sizes, key=area_then_height)


def test_images_get_the_size_that_crops_least():
    sizes = [(32, 32), (32, 16), (16, 32), (64, 64)]
    shapes = np.array([(40, 40), (80, 40), (20, 40), (200, 190), (63, 64), (0, 0), (10, 10), (64, 64)])
    assert [sizes[index] for index in assign_buckets(shapes, sizes)] == [
        (32, 32), (32, 16), (16, 32), (64, 64), (32, 32), (32, 32), (32, 32), (64, 64),
    ]  # fmt: skip


def crop_loss(shape, size) -> float:
    """The fraction of an image that a center crop to a size removes."""
    scale = max(size[0] / shape[0], size[1] / shape[1])
    return 1 - size[0] * size[1] / (scale * shape[0] * scale * shape[1])


@given(height=st.integers(64, 400), width=st.integers(64, 400))
def test_a_large_image_loses_as_little_as_any_size_allows(height, width):
    sizes = BucketsConfig(multiple=8).sizes((32, 32))
    size = sizes[assign_buckets(np.array([(height, width)]), sizes)[0]]
    assert crop_loss((height, width), size) == pytest.approx(min(crop_loss((height, width), one) for one in sizes))


def test_rare_sizes_are_removed_one_by_one_and_no_image_is_lost():
    sizes = [(16, 32), (32, 32), (32, 16)]
    shapes = np.array([(100, 100)] * 9 + [(100, 200)] * 2 + [(200, 100)] * 5)
    buckets = Buckets.assign(shapes, sizes, min_samples=4)
    assert buckets.sizes == [(32, 32), (32, 16)]
    assert np.bincount(buckets.bucket_ids).tolist() == [11, 5]
    alone = Buckets.assign(shapes, sizes, min_samples=1000)
    assert (len(alone.sizes), len(alone.bucket_ids)) == (1, 16)
