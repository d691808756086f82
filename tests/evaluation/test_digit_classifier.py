"""The oracle of the digits, and which data have an oracle."""

import numpy as np
import pytest

from tessera.data import FilesConfig, ShapesConfig
from tessera.data.digits import DigitsConfig


@pytest.fixture(scope="module")
def classifier():
    pytest.importorskip("sklearn")
    from tessera.evaluation.toy.digit_classifier import DigitClassifier

    return DigitClassifier()


def test_held_out_digits_are_classified_correctly(classifier):
    assert classifier.num_real == 297
    assert classifier.real_accuracy >= 0.95


def test_training_digits_of_models_are_classified_correctly(classifier):
    dataset = DigitsConfig(split="model").open()
    images = dataset.images.transpose(0, 2, 3, 1)
    assert classifier.accuracy(images, dataset.labels) >= 0.95
    assert classifier.accuracy(images, (dataset.labels + 1) % 10) <= 0.05


def test_noise_is_not_classified_correctly(classifier):
    noise = np.random.default_rng(0).integers(0, 256, (500, 8, 8, 1), dtype=np.uint8)
    assert classifier.accuracy(noise, np.arange(500) % 10) < 0.25


def test_accuracy_is_the_fraction_of_correct_predictions(classifier):
    images = DigitsConfig(split="ceiling").open().images.transpose(0, 2, 3, 1)[:10]
    predictions = classifier.predict(images)
    assert predictions.shape == (10,)
    labels = np.where(np.arange(10) < 4, predictions, (predictions + 1) % 10)
    assert classifier.accuracy(images, labels) == pytest.approx(0.4)


def test_the_score_is_the_accuracy_with_its_interval(classifier):
    images = DigitsConfig(split="ceiling").open().images.transpose(0, 2, 3, 1)[:10]
    predictions = classifier.predict(images)
    score = classifier.score(images, np.where(np.arange(10) < 4, predictions, (predictions + 1) % 10))
    assert set(score) == {"accuracy"}
    assert score["accuracy"].value == pytest.approx(0.4)
    assert (score["accuracy"].low, score["accuracy"].high) == pytest.approx((0.168, 0.687), abs=1e-3)
    assert classifier.score(images, None) == {}


def test_data_with_a_ground_truth_have_an_oracle():
    pytest.importorskip("sklearn")
    from tessera.evaluation.toy.digit_classifier import DigitClassifier, load_oracle
    from tessera.evaluation.toy.shape_reader import ShapesEvaluator

    for data, kind in ((DigitsConfig(), DigitClassifier), (ShapesConfig(split="train"), ShapesEvaluator)):
        oracle = load_oracle(data)
        assert isinstance(oracle, kind)
        assert oracle.description
        assert oracle.real_accuracy > 0.9
    assert load_oracle(FilesConfig(path="images")) is None
