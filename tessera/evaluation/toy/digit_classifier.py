"""Oracles: evaluators for data with a known ground truth."""

from collections.abc import Sequence

import numpy as np

from tessera.data import AnyData
from tessera.data.digits import DigitsConfig, DigitsDataset
from tessera.data.shapes import ShapesConfig
from tessera.evaluation.toy.shape_reader import ShapesEvaluator
from tessera.reporting.estimates import Estimate


class DigitClassifier:
    """Classifies generated digits with a support vector classifier fitted on real digits that no model was trained on.

    `real_accuracy` is its accuracy on further real digits: generated ones cannot be expected to do better.
    """

    description = "the requested digit, with a support vector classifier fitted on other scans"

    def __init__(self) -> None:
        from sklearn.svm import SVC

        fitted_on, held_out = DigitsDataset(DigitsConfig(split="judge")), DigitsDataset(DigitsConfig(split="ceiling"))
        self._classifier = SVC(gamma=0.02, C=10.0)  # pyright: ignore[reportArgumentType] (the stub has str)
        self._classifier.fit(_to_rows(fitted_on.images), fitted_on.labels)
        self.real_accuracy = float(np.mean(self.predict(held_out.images.transpose(0, 2, 3, 1)) == held_out.labels))
        self.num_real = len(held_out)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """images uint8 [B, 8, 8, 1] -> class labels, int [B]"""
        return self._classifier.predict(_to_rows(images))

    def accuracy(self, images: np.ndarray, labels: Sequence[int]) -> float:
        """The fraction of images classified as their labels."""
        return float(np.mean(self.predict(images) == np.asarray(labels)))

    def score(self, images: np.ndarray, labels: Sequence[int] | None) -> dict[str, Estimate]:
        """{"accuracy": with its interval}; empty without labels."""
        if labels is None:
            return {}
        return {"accuracy": Estimate.proportion(self.accuracy(images, labels) * len(images), len(images))}


def _to_rows(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0


def load_oracle(data: AnyData) -> DigitClassifier | ShapesEvaluator | None:
    """The oracle of a data set; None if its ground truth is not known."""
    match data:
        case DigitsConfig():
            return DigitClassifier()
        case ShapesConfig():
            return ShapesEvaluator()
    return None
