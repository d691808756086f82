"""Small feature networks: they learn, deterministically, and the built-in one separates digits."""

import json

import numpy as np
import pytest
import torch

from tessera import bundle
from tessera.data import DigitsConfig, FilesConfig
from tessera.errors import TesseraError
from tessera.evaluation import distances
from tessera.evaluation.features import FeatureExtractor, compute_moments, load_extractor
from tessera.evaluation.toy import feature_network
from tessera.evaluation.toy.feature_network import FeatureConfig, accuracy


class Halves:
    """Images whose class is their bright side."""

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
        image = np.random.default_rng(index).integers(0, 100, (1, 8, 8), dtype=np.uint8)
        image[..., 4 * (index % 2) : 4 * (index % 2) + 4] += 100
        return image


def fit(dataset=None, **changes):
    settings = {"hflip": False, "description": "halves", "width": 8, "steps": 40, "batch_size": 32, **changes}
    return feature_network.train(dataset or Halves(), (8, 8), 1, **settings)


@pytest.fixture(scope="module")
def network():
    return fit()


def test_it_learns_an_easy_classification(network):
    assert network.config.origin["held_out_accuracy"] >= 0.95
    assert network.config.origin["images"] == 180
    assert accuracy(network, Halves(333)) >= 0.95


def test_with_random_flips_these_classes_cannot_be_learned(network):
    assert fit(hflip=True).config.origin["held_out_accuracy"] < 0.9


def test_training_is_deterministic(network):
    again = fit().state_dict()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)


def test_progress_and_a_single_step(network):
    calls = []
    fit(steps=1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 1)]


def test_a_saved_network_is_loaded(network, tmp_path):
    feature_network.save(network, tmp_path / "net")
    assert feature_network.is_saved_at(tmp_path / "net")
    loaded = feature_network.load(tmp_path / "net")
    assert loaded.config == network.config
    images = torch.from_numpy(np.stack([Halves().pixels(i) for i in range(5)]))
    with torch.no_grad():
        for kind, values in network(images).items():
            torch.testing.assert_close(loaded(images)[kind], values, rtol=0, atol=0)
    extractor = load_extractor(str(tmp_path / "net"), torch.device("cpu"))
    assert (extractor.name, extractor.weights, extractor.size) == ("net", bundle.weights_hash(network), (8, 8))
    with pytest.raises(TesseraError, match="exists already"):
        feature_network.save(network, tmp_path / "net")


def test_damage_is_one_error_that_names_the_file(network, tmp_path):
    folder = tmp_path / "net"
    feature_network.save(network, folder)
    config, weights = (folder / "config.json").read_text(), (folder / "model.safetensors").read_bytes()
    for text, message in (
        (config[:-9], "cannot read .*config.json"),
        ("[]", r"config\.json is not valid"),
        (json.dumps({**json.loads(config), "size": [8, 0]}), r"config\.json is not valid"),
        (json.dumps({**json.loads(config), "width": 12}), r"config\.json is not valid.*\n.*width"),
        (json.dumps({**json.loads(config), "width": 16}), "holds another architecture"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(TesseraError, match=message):
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


def test_data_without_classes_or_with_too_few_images_are_an_error(make_folder):
    path = make_folder("plain", np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(TesseraError, match="halves has no classes: features are trained by classification"):
        fit(FilesConfig(path=str(path), size=(8, 8)).open())
    with pytest.raises(TesseraError, match="halves holds 99 images; features need at least 100"):
        fit(Halves(99))
    with pytest.raises(TesseraError, match="width"):
        fit(width=12)


@pytest.mark.parametrize("size", [(2, 2), (4, 4), (8, 8), (32, 32), (33, 70), (100, 64)])
def test_every_image_size_has_features(size):
    network = FeatureConfig(size=size, channels=3, num_classes=5).build()
    features = network(torch.zeros(2, 3, *size, dtype=torch.uint8))
    assert features["logits"].shape == (2, 5)
    assert features["pool"].shape[0] == features["spatial"].shape[0] == 2
    assert 24 <= features["pool"].shape[1] <= 96
    assert features["spatial"].shape[1] % 7 == 0


# The built-in network of the digits


@pytest.fixture(scope="module")
def held_out():
    return DigitsConfig(split="ceiling").open()


def test_it_classifies_held_out_digits(digits: FeatureExtractor, held_out):
    predictions = digits(held_out.images.transpose(0, 2, 3, 1), 100)["logits"].argmax(axis=1)
    assert (predictions == held_out.labels).mean() >= 0.95


def test_its_distance_of_noise_is_larger_than_that_of_digits(digits: FeatureExtractor, real, held_out):
    noise = np.random.default_rng(0).integers(0, 256, real.shape, dtype=np.uint8)
    unseen = held_out.images.transpose(0, 2, 3, 1)
    whole, other, noisy = (digits(images, 100)["pool"] for images in (real, unseen, noise))
    reference = compute_moments(whole)
    fd = {
        name: distances.frechet(rows, compute_moments(rows), reference).value
        for name, rows in (("same", whole), ("other", other), ("noise", noisy))
    }
    assert abs(fd["same"]) < 1e-6 * reference.cov.trace()
    assert fd["noise"] > 20 * fd["other"] > 0


class Moving:
    """Clips of a bright column that moves by a pixel in each frame, to the left or to the right: the class."""

    class_names = ("left", "right")
    text = image_sizes = None

    def __len__(self) -> int:
        return 300

    def label(self, index: int) -> int:
        return index % 2

    def name(self, index: int) -> str:
        return str(index)

    def pixels(self, index: int) -> np.ndarray:
        clip = np.random.default_rng(index).integers(0, 100, (1, 4, 8, 8), dtype=np.uint8)
        for frame in range(4):
            clip[:, frame, :, (index // 2 + (frame if index % 2 else -frame)) % 8] += 100
        return clip


def test_a_network_of_clips_sees_motion_and_takes_clips_of_any_length_and_images():
    settings = {"hflip": False, "description": "moving", "width": 8, "steps": 100, "batch_size": 32}
    network = feature_network.train(Moving(), (4, 8, 8), 1, **settings)  # frames are the same in both classes
    assert network.config.origin["held_out_accuracy"] >= 0.9
    extractor = FeatureExtractor("moving", "", "none", network, torch.device("cpu"), (1,), (4, 8, 8))
    clips = np.stack([np.moveaxis(Moving().pixels(index), 0, -1) for index in range(10)])
    features = extractor(clips, 3)
    widths = {kind: values.shape[1] for kind, values in features.items()}
    assert widths == extractor.widths | {"motion": 3}
    np.testing.assert_allclose(
        features["frames"].reshape(10, 4, -1)[:, 2], extractor(clips[:, 2], 50)["pool"], atol=1e-5
    )
    assert extractor(clips[:, :2], 10)["pool"].shape == features["pool"].shape
    assert extractor(np.repeat(clips[:, :1], 4, axis=1), 10)["motion"].max() == 0
    change = np.abs(np.diff(clips[0, :2].astype(int), axis=0)).mean()
    assert features["motion"][0, 0] == pytest.approx(change, rel=1e-5)
