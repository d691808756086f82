"""References: statistics of Tessera and of other programs, and errors for what does not match."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessera.data import DigitsConfig
from tessera.errors import TesseraError
from tessera.evaluation import reference
from tessera.evaluation.features import FeatureSet, compute_moments, extract
from tessera.evaluation.reference import check_compatible, check_widths, open_reference
from tessera.evaluation.sources import DatasetSource, NpzSource
from tessera.runtime import SINGLE


@pytest.fixture(scope="module")
def features(digits, tmp_path_factory) -> FeatureSet:
    """The features of 120 real digits."""
    return extract(DatasetSource(DigitsConfig(), 120), digits, tmp_path_factory.mktemp("features"))


@pytest.fixture
def opened(digits, make_npz, real, tmp_path):
    """Open a reference for 30 digits, or for an array of other images."""

    def run(name, images: np.ndarray = real[:30], extractor=digits):
        source = NpzSource(make_npz("samples.npz", images))
        name = name if isinstance(name, DigitsConfig) else str(name)
        return open_reference(name, source, extractor, tmp_path / "ref", SINGLE)

    return run


# Statistics of Tessera


@pytest.mark.parametrize("num_rows", [10_000, 50])
def test_saved_statistics_are_loaded(features, tmp_path, num_rows):
    reference.save_statistics(features, tmp_path / "stats.npz", num_rows)
    statistics = reference.load_statistics(tmp_path / "stats.npz")
    for part, moments in features.moments.items():
        np.testing.assert_array_equal(statistics.moments[part].mean, moments.mean)
        np.testing.assert_array_equal(statistics.moments[part].cov, moments.cov)
        assert statistics.moments[part].count == 120
    for name in ("hash", "count", "size", "channels", "features", "class_names", "num_invalid"):
        assert getattr(statistics, name) == getattr(features, name), name
    assert len(statistics.rows["pool"]) == min(num_rows, 120)
    assert sorted(set(statistics.indices)) == list(statistics.indices)
    np.testing.assert_array_equal(statistics.rows["pool"], features.rows["pool"][statistics.indices])
    np.testing.assert_array_equal(statistics.labels, features.labels[statistics.indices])
    assert statistics.description == "stats.npz (the digits of scikit-learn, split model)"


def test_statistics_without_rows(features, tmp_path):
    reference.save_statistics(features, tmp_path / "stats.npz", 0)
    statistics = reference.load_statistics(tmp_path / "stats.npz")
    assert (statistics.rows, statistics.indices, statistics.labels) == ({}, None, None)


def test_other_programs_find_their_arrays_in_our_file(features, tmp_path):
    reference.save_statistics(features, tmp_path / "stats.npz")
    with np.load(tmp_path / "stats.npz") as file:  # as pytorch-fid and ADM do
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(file.files)
        rows = features.rows["pool"].astype(np.float64)
        np.testing.assert_allclose(file["mu"], rows.mean(axis=0), rtol=1e-10)
        np.testing.assert_allclose(file["sigma"], np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-12)
        assert file["mu"].dtype == np.float64
        assert file["mu_s"].shape == (features.rows["spatial"].shape[1],)
        assert file["sigma_s"].shape == (len(file["mu_s"]),) * 2


def test_statistics_that_cannot_be_written_are_an_error(features, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TesseraError, match="cannot write"):
        reference.save_statistics(features, tmp_path / "file/stats.npz")


# Statistics of other programs


def gaussian(width: int = 96, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    root = np.random.default_rng(seed).normal(size=(width, 2 * width))
    return root[:, 0], root @ root.T / width


def test_the_reference_batch_of_adm(opened, real, tmp_path):
    (mu, sigma), (mu_s, sigma_s) = gaussian(), gaussian(112, 1)
    path = tmp_path / "VIRTUAL_imagenet.npz"
    np.savez(path, arr_0=real[:5], mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    statistics, images = opened(path)
    assert images is None
    assert (statistics.rows, statistics.count, statistics.features) == ({}, None, None)
    for part, mean, cov in (("pool", mu, sigma), ("spatial", mu_s, sigma_s)):
        np.testing.assert_array_equal(statistics.moments[part].mean, mean)
        np.testing.assert_array_equal(statistics.moments[part].cov, cov)


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_the_statistics_of_pytorch_fid_and_clean_fid(opened, tmp_path, kind):
    mu, sigma = (array.astype(kind) for array in gaussian())
    np.savez(tmp_path / "fid.npz", mu=mu, sigma=sigma)
    np.savez_compressed(tmp_path / "clean.npz", mu=mu, sigma=sigma, extra=np.array("unused"))
    statistics, clean = opened(tmp_path / "fid.npz")[0], opened(tmp_path / "clean.npz")[0]
    assert list(statistics.moments) == ["pool"]
    np.testing.assert_array_equal(statistics.moments["pool"].cov, sigma)
    assert statistics.hash == clean.hash
    np.savez(tmp_path / "other.npz", mu=mu + 1, sigma=sigma)
    assert opened(tmp_path / "other.npz")[0].hash != statistics.hash


# Damage


def test_a_truncated_file_is_one_error(features, opened, tmp_path):
    path = tmp_path / "stats.npz"
    reference.save_statistics(features, path)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 300, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TesseraError, match=r"stats\.npz is truncated or not an \.npz file"):
            opened(path)
        with pytest.raises(TesseraError, match=r"stats\.npz is truncated or damaged"):
            reference.load_statistics(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_with_a_damaged_byte_is_read_correctly_or_is_one_error(tmp_path, save, position, value):
    mu, sigma = gaussian(6)
    metadata = np.array(json.dumps({"format": 2, "description": "here", "count": 9, "size": [8, 8]}))
    save(tmp_path / "s.npz", mu=mu, sigma=sigma, tessera=metadata)
    content = bytearray((tmp_path / "s.npz").read_bytes())
    content[int(position * len(content))] ^= value
    (tmp_path / "s.npz").write_bytes(content)
    try:
        statistics = reference.load_statistics(tmp_path / "s.npz")
    except TesseraError:
        return
    for moments in statistics.moments.values():
        np.testing.assert_array_equal(moments.mean, mu)
        np.testing.assert_array_equal(moments.cov, sigma)


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY\x01\x00", b"PK\x05\x06" + bytes(18)])
def test_a_file_that_is_not_an_npz_is_an_error(opened, tmp_path, content):
    (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(TesseraError, match=r"s\.npz"):
        opened(tmp_path / "s.npz")
    with pytest.raises(TesseraError, match=r"s\.npz"):
        reference.load_statistics(tmp_path / "s.npz")


def test_an_npy_file_is_an_error(tmp_path):
    with (tmp_path / "s.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(TesseraError, match=r"s\.npz is truncated or damaged"):
        reference.load_statistics(tmp_path / "s.npz")


MU, SIGMA = gaussian()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": MU}, "holds mu, but no sigma"),
        ({"mu_s": MU, "sigma": SIGMA, "mu": MU, "sigma_s": SIGMA[:, 0]}, r"mu_s is \[96\] and its covariance \[96\]"),
        ({"mu": MU, "sigma": SIGMA, "mu_s": MU}, "holds mu_s, but no sigma_s"),
        ({"mu": MU, "sigma": SIGMA[:-1]}, r"mu is \[96\] and its covariance \[95, 96\]; expected \[D\] and \[D, D\]"),
        ({"mu": MU[None], "sigma": SIGMA}, r"mu is \[1, 96\]"),
        ({"mu": np.float64(1), "sigma": SIGMA}, r"mu is \[\]"),
        ({"mu": MU, "sigma": SIGMA.diagonal()}, r"its covariance \[96\]"),
        ({"mu": np.where(np.arange(96) == 3, np.nan, MU), "sigma": SIGMA}, "holds values that are not finite"),
        ({"mu": MU, "sigma": SIGMA * np.inf}, "holds values that are not finite"),
        ({"mu": np.array(["a"] * 96), "sigma": SIGMA}, "mu or its covariance is not an array of numbers"),
        ({"mu": MU, "sigma": SIGMA, "tessera": np.array("{")}, "metadata.* cannot be read"),
        ({"mu": MU, "sigma": SIGMA, "tessera": np.array("[1]")}, "metadata.* cannot be read"),
        ({"mu": MU, "sigma": SIGMA, "tessera": np.array('{"format": 1}')}, "has format 1, expected 2: another version"),
        ({"mu": MU, "sigma": SIGMA, "tessera": np.array("{}"), "features": MU}, r"features are \[96\]"),
        ({"mu": MU, "sigma": SIGMA, "tessera": np.array("{}"), "features": SIGMA[:, :9]}, r"features are \[96, 9\]"),
    ],
)
def test_invalid_statistics_are_an_error(opened, tmp_path, arrays, message):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(TesseraError, match=message) as caught:
        opened(tmp_path / "s.npz")
    assert "s.npz" in str(caught.value)


def test_a_missing_reference_is_an_error(opened, tmp_path):
    with pytest.raises(TesseraError, match=r"gone\.npz does not exist"):
        opened(tmp_path / "gone.npz")
    with pytest.raises(TesseraError, match="no data at"):
        opened(tmp_path / "gone")


# Mismatches


def test_statistics_of_other_features_are_an_error(features, opened, digits, tmp_path):
    reference.save_statistics(features, tmp_path / "stats.npz")
    assert opened(tmp_path / "stats.npz")[0].hash == features.hash
    assert opened(tmp_path / "stats.npz", extractor=replace(digits, name="by/another/path"))[0].hash == features.hash
    for other in (replace(digits, weights="0123"), replace(digits, resize="4")):
        with pytest.raises(TesseraError, match="has the features tessera/digits .*; requested are") as caught:
            opened(tmp_path / "stats.npz", extractor=other)
        theirs, ours = str(caught.value).split("has the features ")[1].split("; requested are ")
        assert theirs != ours


def test_statistics_of_another_width_are_an_error(features, tmp_path):
    mu, sigma = gaussian(2048)
    np.savez(tmp_path / "fid.npz", mu=mu, sigma=sigma)
    width = features.rows["pool"].shape[1]
    with pytest.raises(TesseraError, match=rf"has 2048 pool features per image, tessera/digits has {width}"):
        check_widths(reference.load_statistics(tmp_path / "fid.npz"), features)
    check_widths(features, features)


def test_statistics_of_another_size_or_channels_are_an_error(features, digits, make_npz, tmp_path):
    reference.save_statistics(features, tmp_path / "stats.npz")
    statistics = reference.load_statistics(tmp_path / "stats.npz")
    for shape, message in (
        ((2, 8, 9, 1), "size differ: .* has 8 x 8, .* has 8 x 9"),
        ((2, 8, 8, 3), "channels differ: .* has 1, .* has 3"),
    ):
        with pytest.raises(TesseraError, match=message):
            check_compatible(statistics, NpzSource(make_npz("samples.npz", np.zeros(shape, np.uint8))), digits)


def test_images_of_another_size_or_channels_are_an_error(opened, real, tmp_path):
    for images, message in (
        (np.zeros((3, 8, 9, 1), np.uint8), "size differ: the digits of scikit-learn.* has 8 x 8, .* has 8 x 9"),
        (np.zeros((3, 8, 8, 3), np.uint8), "channels differ: the digits of scikit-learn.* has 1, .* has 3"),
    ):
        with pytest.raises(TesseraError, match=message):
            opened("digits", images)
        np.savez(tmp_path / "real.npz", real[:4])
        with pytest.raises(TesseraError, match="differ: npz .*real"):
            opened(tmp_path / "real.npz", images)


def test_a_reference_is_data_a_name_or_an_npz_of_images(opened, features, real, tmp_path):
    np.savez(tmp_path / "real.npz", real)
    hashes = []
    for reference_name in (DigitsConfig(), "digits", "digits:model", tmp_path / "real.npz"):
        statistics, source = opened(reference_name)
        assert source.count == statistics.count == 1000
        hashes.append(statistics.hash)
    assert len(set(hashes)) == 1


def test_a_reference_folder_is_read_at_the_size_of_the_samples(opened, real, make_folder):
    large = real[:30].repeat(2, axis=1).repeat(2, axis=2)
    statistics, source = opened(make_folder("large", large))
    assert (statistics.size, statistics.channels) == ((8, 8), 1)
    np.testing.assert_array_equal(source.shard(0).images, real[:30])


def test_statistics_have_the_rows_that_metrics_use(tmp_path):
    """A score against statistics equals the score against the data."""
    from tessera.evaluation import suite

    rows = np.random.default_rng(0).normal(size=(suite.MAX_ROWS + 500, 2)).astype(np.float32)
    indices = np.arange(len(rows))
    whole = FeatureSet("here", "0", len(rows), (8, 8), 1, {}, {"pool": compute_moments(rows)}, {"pool": rows}, indices)
    reference.save_statistics(whole, tmp_path / "s.npz", suite.MAX_ROWS)
    np.testing.assert_array_equal(
        suite.row_subset(reference.load_statistics(tmp_path / "s.npz")), suite.row_subset(whole)
    )


def test_a_path_with_a_tilde(opened, features, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    reference.save_statistics(features, tmp_path / "stats.npz")
    assert opened(Path("~/stats.npz"))[0].hash == features.hash
