"""The embedded digits: three disjoint splits."""

import numpy as np
import pytest

from tessera.data import DigitsConfig

datasets = pytest.importorskip("sklearn.datasets")


def rows(split: str) -> list[tuple[int, bytes]]:
    source = DigitsConfig(split=split).open()
    return [(source.label(i), source.pixels(i).tobytes()) for i in range(len(source))]


def test_the_splits_have_their_sizes():
    assert [len(rows(split)) for split in ("model", "judge", "ceiling", "all")] == [1000, 500, 297, 1797]


def test_the_splits_are_disjoint_and_make_up_the_whole():
    splits = [rows(split) for split in ("model", "judge", "ceiling")]
    assert sorted(row for split in splits for row in split) == sorted(rows("all"))
    whole = datasets.load_digits()
    originals = {image.astype(np.uint8).tobytes() for image in whole.images}
    assert len(originals) == 1797  # no scan occurs twice, so contents identify scans
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not {pixels for _, pixels in splits[one]} & {pixels for _, pixels in splits[other]}


def test_every_split_has_all_ten_digits():
    for split in ("model", "judge", "ceiling"):
        assert {label for label, _ in rows(split)} == set(range(10))


def test_pixels_span_the_bytes_and_belong_to_their_labels():
    source = DigitsConfig().open()
    assert source.class_names == tuple("0123456789")
    assert source.pixels(0).shape == (1, 8, 8)
    assert source.pixels(0).dtype == np.uint8
    assert source.images.min() == 0
    assert source.images.max() == 255
    whole = datasets.load_digits()
    label_of = {np.round(i * 255 / 16).astype(np.uint8).tobytes(): t for i, t in zip(whole.images, whole.target)}
    assert all(label_of[pixels] == label for label, pixels in rows("model"))


def test_the_splits_never_change():
    """Otherwise the classifier of one version could be trained on data of another version's models."""
    source = DigitsConfig().open()
    assert [source.label(i) for i in range(12)] == [2, 4, 0, 4, 8, 6, 4, 9, 6, 1, 2, 1]


def test_digits_are_never_flipped():
    config = DigitsConfig()
    assert (config.size, config.channels, config.hflip) == ((8, 8), 1, False)
