"""What samples are compared with: our file and those of others, and refusals of what does not go together."""

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
from tessera.evaluation.features import FeatureSet, extract, moments_of
from tessera.evaluation.reference import check, check_widths, open_reference
from tessera.evaluation.sources import Data, Npz
from tessera.runtime import Distributed


@pytest.fixture(scope="module")
def features(digits, tmp_path_factory) -> FeatureSet:
    """Of 120 real digits."""
    return extract(Data(DigitsConfig(), 120), digits, tmp_path_factory.mktemp("features"), Distributed())


@pytest.fixture
def opened(digits, make_npz, real, tmp_path):
    """Open a reference for 30 digits, or for an array of other pictures."""

    def run(told, pictures: np.ndarray = real[:30], network=digits):
        subject = Npz(make_npz("samples.npz", pictures))
        return open_reference(
            told if isinstance(told, DigitsConfig) else str(told), subject, network, tmp_path / "ref", Distributed()
        )

    return run


# Our file


@pytest.mark.parametrize("kept", [10_000, 50])
def test_what_is_saved_is_loaded(features, tmp_path, kept):
    reference.save(features, tmp_path / "stats.npz", kept)
    found = reference.load(tmp_path / "stats.npz")
    for part, moments in features.moments.items():
        np.testing.assert_array_equal(found.moments[part].mean, moments.mean)
        np.testing.assert_array_equal(found.moments[part].cov, moments.cov)
        assert found.moments[part].count == 120
    for name in ("hash", "count", "size", "channels", "features", "class_names", "unusable"):
        assert getattr(found, name) == getattr(features, name), name
    assert len(found.rows["pool"]) == min(kept, 120)
    assert sorted(set(found.number)) == list(found.number)
    np.testing.assert_array_equal(found.rows["pool"], features.rows["pool"][found.number])
    np.testing.assert_array_equal(found.label, features.label[found.number])
    assert found.where == "stats.npz (the digits of scikit-learn, split model)"


def test_a_file_without_rows_holds_none(features, tmp_path):
    reference.save(features, tmp_path / "stats.npz", 0)
    found = reference.load(tmp_path / "stats.npz")
    assert (found.rows, found.number, found.label) == ({}, None, None)


def test_others_read_our_file_by_their_own_names(features, tmp_path):
    reference.save(features, tmp_path / "stats.npz")
    with np.load(tmp_path / "stats.npz") as file:  # as pytorch-fid and ADM do
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(file.files)
        rows = features.rows["pool"].astype(np.float64)
        np.testing.assert_allclose(file["mu"], rows.mean(axis=0), rtol=1e-10)
        np.testing.assert_allclose(file["sigma"], np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-12)
        assert file["mu"].dtype == np.float64
        assert file["mu_s"].shape == (features.rows["spatial"].shape[1],)
        assert file["sigma_s"].shape == (len(file["mu_s"]),) * 2


def test_statistics_that_cannot_be_written(features, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TesseraError, match="cannot write"):
        reference.save(features, tmp_path / "file/stats.npz")


# Files of others


def gaussian(width: int = 96, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    root = np.random.default_rng(seed).normal(size=(width, 2 * width))
    return root[:, 0], root @ root.T / width


def test_the_reference_batch_of_adm(opened, real, tmp_path):
    (mu, sigma), (mu_s, sigma_s) = gaussian(), gaussian(112, 1)
    path = tmp_path / "VIRTUAL_imagenet.npz"
    np.savez(path, arr_0=real[:5], mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    found, subject = opened(path)
    assert subject is None
    assert (found.rows, found.count, found.features) == ({}, None, None)
    for part, mean, cov in (("pool", mu, sigma), ("spatial", mu_s, sigma_s)):
        np.testing.assert_array_equal(found.moments[part].mean, mean)
        np.testing.assert_array_equal(found.moments[part].cov, cov)


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_the_statistics_of_pytorch_fid_and_clean_fid(opened, tmp_path, kind):
    mu, sigma = (array.astype(kind) for array in gaussian())
    np.savez(tmp_path / "fid.npz", mu=mu, sigma=sigma)
    np.savez_compressed(tmp_path / "clean.npz", mu=mu, sigma=sigma, extra=np.array("unasked"))
    found, clean = opened(tmp_path / "fid.npz")[0], opened(tmp_path / "clean.npz")[0]
    assert list(found.moments) == ["pool"]
    np.testing.assert_array_equal(found.moments["pool"].cov, sigma)
    assert found.hash == clean.hash
    np.savez(tmp_path / "other.npz", mu=mu + 1, sigma=sigma)
    assert opened(tmp_path / "other.npz")[0].hash != found.hash


# Damage


def test_a_file_cut_anywhere_is_one_error(features, opened, tmp_path):
    path = tmp_path / "stats.npz"
    reference.save(features, path)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 300, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(TesseraError, match=r"stats\.npz is truncated or no \.npz file"):
            opened(path)
        with pytest.raises(TesseraError, match=r"stats\.npz is truncated or damaged"):
            reference.load(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_with_a_spoilt_byte_is_read_as_it_was_or_is_one_error(tmp_path, save, place, value):
    mu, sigma = gaussian(6)
    told = np.array(json.dumps({"format": 1, "where": "here", "count": 9, "size": [8, 8]}))
    save(tmp_path / "s.npz", mu=mu, sigma=sigma, tessera=told)
    content = bytearray((tmp_path / "s.npz").read_bytes())
    content[int(place * len(content))] ^= value
    (tmp_path / "s.npz").write_bytes(content)
    try:
        found = reference.load(tmp_path / "s.npz")
    except TesseraError:
        return
    for moments in found.moments.values():
        np.testing.assert_array_equal(moments.mean, mu)
        np.testing.assert_array_equal(moments.cov, sigma)


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY\x01\x00", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_npz_of_statistics(opened, tmp_path, content):
    (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(TesseraError, match=r"s\.npz"):
        opened(tmp_path / "s.npz")
    with pytest.raises(TesseraError, match=r"s\.npz"):
        reference.load(tmp_path / "s.npz")


def test_an_array_that_is_no_archive(tmp_path):
    with (tmp_path / "s.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(TesseraError, match=r"s\.npz is truncated or damaged"):
        reference.load(tmp_path / "s.npz")


MU, SIGMA = gaussian()


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mu": MU}, "holds mu, but no sigma"),
        ({"mu_s": MU, "sigma": SIGMA, "mu": MU, "sigma_s": SIGMA[:, 0]}, r"mu_s is \[96\] and its covariance \[96\]"),
        ({"mu": MU, "sigma": SIGMA, "mu_s": MU}, "holds mu_s, but no sigma_s"),
        ({"mu": MU, "sigma": SIGMA[:-1]}, r"mu is \[96\] and its covariance \[95, 96\]; expected \[D\] and \[D, D\]"),
        ({"mu": MU[None], "sigma": SIGMA}, r"mu is \[1, 96\]"),
        ({"mu": np.float64(1), "sigma": SIGMA}, r"mu is \[\]"),
        ({"mu": MU, "sigma": SIGMA.diagonal()}, r"its covariance \[96\]"),
        ({"mu": np.where(np.arange(96) == 3, np.nan, MU), "sigma": SIGMA}, "holds numbers that are not finite"),
        ({"mu": MU, "sigma": SIGMA * np.inf}, "holds numbers that are not finite"),
        ({"mu": np.array(["a"] * 96), "sigma": SIGMA}, "mu is no array of numbers"),
        ({"mu": MU, "sigma": SIGMA, "tessera": np.array("{")}, "what it says of itself cannot be read"),
        ({"mu": MU, "sigma": SIGMA, "tessera": np.array("[1]")}, "what it says of itself cannot be read"),
        ({"mu": MU, "sigma": SIGMA, "tessera": np.array("{}"), "features": MU}, r"features are \[96\]"),
        ({"mu": MU, "sigma": SIGMA, "tessera": np.array("{}"), "features": SIGMA[:, :9]}, r"features are \[96, 9\]"),
    ],
)
def test_statistics_that_are_not_whole_say_what_is_wrong(opened, tmp_path, arrays, said):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(TesseraError, match=said) as caught:
        opened(tmp_path / "s.npz")
    assert "s.npz" in str(caught.value)


def test_a_reference_that_is_not_there(opened, tmp_path):
    with pytest.raises(TesseraError, match=r"there is nothing at .*gone\.npz"):
        opened(tmp_path / "gone.npz")
    with pytest.raises(TesseraError, match="no data at"):
        opened(tmp_path / "gone")


# What goes together


def test_statistics_of_other_features_are_refused(features, opened, digits, tmp_path):
    reference.save(features, tmp_path / "stats.npz")
    assert opened(tmp_path / "stats.npz")[0].hash == features.hash
    assert opened(tmp_path / "stats.npz", network=replace(digits, name="by/another/path"))[0].hash == features.hash
    for other in (replace(digits, weights="0123"), replace(digits, resize="4")):
        with pytest.raises(TesseraError, match="is of the features tessera/digits .*; asked for are") as caught:
            opened(tmp_path / "stats.npz", network=other)
        theirs, ours = str(caught.value).split("is of the features ")[1].split("; asked for are ")
        assert theirs != ours


def test_statistics_of_others_of_another_width_are_refused(features, tmp_path):
    mu, sigma = gaussian(2048)
    np.savez(tmp_path / "fid.npz", mu=mu, sigma=sigma)
    width = features.rows["pool"].shape[1]
    said = rf"has 2048 pool features a picture, tessera/digits gives {width}: it is of other features"
    with pytest.raises(TesseraError, match=said):
        check_widths(reference.load(tmp_path / "fid.npz"), features)
    check_widths(features, features)


def test_statistics_of_another_size_or_of_other_channels_are_refused(features, digits, make_npz, tmp_path):
    reference.save(features, tmp_path / "stats.npz")
    found = reference.load(tmp_path / "stats.npz")
    for shape, said in (
        ((2, 8, 9, 1), "size differ: .* has 8 x 8, .* has 8 x 9"),
        ((2, 8, 8, 3), "channels differ: .* has 1, .* has 3"),
    ):
        with pytest.raises(TesseraError, match=said):
            check(found, Npz(make_npz("samples.npz", np.zeros(shape, np.uint8))), digits)


def test_pictures_of_another_size_or_of_other_channels_are_refused(opened, real, tmp_path):
    for pictures, said in (
        (np.zeros((3, 8, 9, 1), np.uint8), "size differ: the digits of scikit-learn.* has 8 x 8, .* has 8 x 9"),
        (np.zeros((3, 8, 8, 3), np.uint8), "channels differ: the digits of scikit-learn.* has 1, .* has 3"),
    ):
        with pytest.raises(TesseraError, match=said):
            opened("digits", pictures)
        np.savez(tmp_path / "real.npz", real[:4])
        with pytest.raises(TesseraError, match="differ: npz .*real"):
            opened(tmp_path / "real.npz", pictures)


def test_a_reference_is_data_a_word_or_an_npz_of_pictures(opened, features, real, tmp_path):
    np.savez(tmp_path / "real.npz", real)
    hashes = []
    for told in (DigitsConfig(), "digits", "digits:model", tmp_path / "real.npz"):
        found, subject = opened(told)
        assert subject.count == found.count == 1000
        hashes.append(found.hash)
    assert len(set(hashes)) == 1


def test_a_folder_as_a_reference_is_read_at_the_size_of_the_samples(opened, real, make_folder):
    large = real[:30].repeat(2, axis=1).repeat(2, axis=2)
    found, subject = opened(make_folder("large", large))
    assert (found.size, found.channels) == ((8, 8), 1)
    np.testing.assert_array_equal(subject.shard(0).pictures, real[:30])


def test_the_rows_that_a_file_keeps_are_those_that_a_large_set_is_judged_by(tmp_path):
    """So a score against statistics is the score against the data."""
    from tessera.evaluation import suite

    rows = np.random.default_rng(0).normal(size=(suite.MOST + 500, 2)).astype(np.float32)
    number = np.arange(len(rows))
    whole = FeatureSet("here", "0", len(rows), (8, 8), 1, {}, {"pool": moments_of(rows)}, {"pool": rows}, number)
    reference.save(whole, tmp_path / "s.npz", suite.MOST)
    np.testing.assert_array_equal(suite.few(reference.load(tmp_path / "s.npz")), suite.few(whole))


def test_a_path_of_home_is_followed(opened, features, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    reference.save(features, tmp_path / "stats.npz")
    assert opened(Path("~/stats.npz"))[0].hash == features.hash
