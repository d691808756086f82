"""Judges for data whose truth is known."""

from collections.abc import Sequence

import numpy as np

from tessera.data import AnyData
from tessera.data.digits import DigitsConfig, DigitsSource
from tessera.data.shapes import ShapesConfig
from tessera.evaluation.intervals import Estimate
from tessera.evaluation.toy.shape_reader import ShapesEvaluator


class DigitClassifier:
    """Reads drawn digits: a support vector classifier fitted on real digits that no model learned from.

    `ceiling` is its share on further real digits: no drawing can be expected to be read better.
    """

    reads = "the digit asked for, by a support vector classifier fitted on other scans"

    def __init__(self) -> None:
        from sklearn.svm import SVC

        fitted_on, held_out = DigitsSource(DigitsConfig(split="judge")), DigitsSource(DigitsConfig(split="ceiling"))
        self._classifier = SVC(gamma=0.02, C=10.0)  # pyright: ignore[reportArgumentType] (stub says str); on pixels in 0 .. 1
        self._classifier.fit(_features(fitted_on.images), fitted_on.labels)
        self.ceiling = float(np.mean(self.read(held_out.images.transpose(0, 2, 3, 1)) == held_out.labels))
        self.held_out = len(held_out)

    def read(self, pictures: np.ndarray) -> np.ndarray:
        """pictures uint8 [B, 8, 8, 1] -> the digit seen in each, int [B]"""
        return self._classifier.predict(_features(pictures))

    def share(self, pictures: np.ndarray, asked: Sequence[int]) -> float:
        """The share of pictures read as the digit that was asked for."""
        return float(np.mean(self.read(pictures) == np.asarray(asked)))

    def judge(self, pictures: np.ndarray, asked: Sequence[int] | None) -> dict[str, Estimate]:
        """The same share as "as asked", with its interval; nothing where nothing was asked."""
        if asked is None:
            return {}
        return {"as asked": Estimate.proportion(self.share(pictures, asked) * len(pictures), len(pictures))}


def _features(pictures: np.ndarray) -> np.ndarray:
    return pictures.reshape(len(pictures), -1) / 255.0


def oracle_for(data: AnyData) -> DigitClassifier | ShapesEvaluator | None:
    """The judge of a data set; None if its truth is not known."""
    match data:
        case DigitsConfig():
            return DigitClassifier()
        case ShapesConfig():
            return ShapesEvaluator()
    return None
