"""Feature networks of our own: they learn, they are the same twice, and that of the digits tells digits apart."""

import json

import numpy as np
import pytest
import torch

from tessera import bundle
from tessera.data import DigitsConfig, FilesConfig
from tessera.errors import TesseraError
from tessera.evaluation import distances
from tessera.evaluation.features import Extractor, extractor, moments_of
from tessera.evaluation.toy import feature_network
from tessera.evaluation.toy.feature_network import FeatureConfig, accuracy


class Halves:
    """Pictures whose class is the side on which they are bright."""

    class_names = ("left", "right")

    def __init__(self, count: int = 200) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def label(self, index: int) -> int:
        return index % 2

    def name(self, index: int) -> str:
        return str(index)

    def pixels(self, index: int) -> np.ndarray:
        picture = np.random.default_rng(index).integers(0, 100, (1, 8, 8), dtype=np.uint8)
        picture[..., 4 * (index % 2) : 4 * (index % 2) + 4] += 100
        return picture


def fit(source=None, **changes):
    settings = {"flip": False, "where": "halves", "width": 8, "steps": 40, "batch": 32, **changes}
    return feature_network.train(source or Halves(), (8, 8), 1, **settings)


@pytest.fixture(scope="module")
def network():
    return fit()


def test_it_learns_to_tell_apart_what_is_easily_told(network):
    assert network.config.origin["held-out accuracy"] >= 0.95
    assert network.config.origin["pictures"] == 180
    assert accuracy(network, Halves(333)) >= 0.95


def test_mirrored_at_random_these_classes_cannot_be_told(network):
    assert fit(flip=True).config.origin["held-out accuracy"] < 0.9


def test_it_is_the_same_twice(network):
    again = fit().state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)


def test_progress_and_a_single_step(network):
    told = []
    fit(steps=1, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 1)]


def test_what_is_saved_is_loaded(network, tmp_path):
    feature_network.save(network, tmp_path / "net")
    assert feature_network.is_saved_at(tmp_path / "net")
    loaded = feature_network.load(tmp_path / "net")
    assert loaded.config == network.config
    pictures = torch.from_numpy(np.stack([Halves().pixels(i) for i in range(5)]))
    with torch.no_grad():
        for part, values in network(pictures).items():
            torch.testing.assert_close(loaded(pictures)[part], values, rtol=0, atol=0)
    found = extractor(str(tmp_path / "net"), torch.device("cpu"))
    assert (found.name, found.weights, found.size) == ("net", bundle.weights_hash(network), (8, 8))
    with pytest.raises(TesseraError, match="exists already"):
        feature_network.save(network, tmp_path / "net")


def test_damage_is_one_error_that_names_the_file(network, tmp_path):
    folder = tmp_path / "net"
    feature_network.save(network, folder)
    config, weights = (folder / "config.json").read_text(), (folder / "model.safetensors").read_bytes()
    for text, said in (
        (config[:-9], "cannot read .*config.json"),
        ("[]", r"config\.json is not valid"),
        (json.dumps({**json.loads(config), "size": [8, 0]}), r"config\.json is not valid"),
        (json.dumps({**json.loads(config), "width": 12}), r"config\.json is not valid.*\n.*width"),
        (json.dumps({**json.loads(config), "width": 16}), "holds another architecture"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(TesseraError, match=said):
            feature_network.load(folder)
    (folder / "config.json").write_text(config)
    for length in (0, 5, len(weights) // 2, len(weights) - 1):
        (folder / "model.safetensors").write_bytes(weights[:length])
        with pytest.raises(TesseraError, match=r"model\.safetensors is damaged"):
            feature_network.load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(TesseraError, match=r"model\.safetensors is missing"):
        feature_network.load(folder)
    assert not feature_network.is_saved_at(tmp_path)


def test_data_that_nothing_can_be_learned_from(make_folder):
    path = make_folder("plain", np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(TesseraError, match="halves has no classes: features are learned by telling classes apart"):
        fit(FilesConfig(path=str(path), size=(8, 8)).open())
    with pytest.raises(TesseraError, match="halves holds 99 pictures; features need at least 100"):
        fit(Halves(99))
    with pytest.raises(TesseraError, match="width"):
        fit(width=12)


@pytest.mark.parametrize("size", [(2, 2), (4, 4), (8, 8), (32, 32), (33, 70), (100, 64)])
def test_every_size_of_picture_has_features(size):
    network = FeatureConfig(size=size, channels=3, classes=5).build()
    found = network(torch.zeros(2, 3, *size, dtype=torch.uint8))
    assert found["logits"].shape == (2, 5)
    assert found["pool"].shape[0] == found["spatial"].shape[0] == 2
    assert 24 <= found["pool"].shape[1] <= 96
    assert found["spatial"].shape[1] % 7 == 0


# The network of the digits


@pytest.fixture(scope="module")
def ceiling():
    return DigitsConfig(split="ceiling").open()


def test_the_network_of_the_digits_reads_digits_it_has_not_seen(digits: Extractor, ceiling):
    said = digits(ceiling.images.transpose(0, 2, 3, 1), 100)["logits"].argmax(axis=1)
    assert (said == ceiling.labels).mean() >= 0.95


def test_by_it_equal_sets_are_equal_and_noise_is_farther_than_digits(digits: Extractor, real, ceiling):
    noise = np.random.default_rng(0).integers(0, 256, real.shape, dtype=np.uint8)
    unseen = ceiling.images.transpose(0, 2, 3, 1)
    whole, other, noisy = (digits(pictures, 100)["pool"] for pictures in (real, unseen, noise))
    reference = moments_of(whole)
    fd = {
        name: distances.frechet(rows, moments_of(rows), reference).value
        for name, rows in (("same", whole), ("other", other), ("noise", noisy))
    }
    assert abs(fd["same"]) < 1e-6 * reference.cov.trace()
    assert fd["noise"] > 20 * fd["other"] > 0
