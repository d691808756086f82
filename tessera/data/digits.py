"""The embedded data set: 1797 handwritten digits, 8 x 8 scans that ship with scikit-learn (Alpaydin & Kaynak 1998)."""

from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from tessera import randomness
from tessera.errors import TesseraError
from tessera.settings import Settings

if TYPE_CHECKING:
    from tessera.data.captions import EncodedCaptions

# Disjoint: training data of models, training data of the classifier that scores them, and test data of that classifier.
SPLITS = {"model": slice(0, 1000), "judge": slice(1000, 1500), "ceiling": slice(1500, 1797), "all": slice(0, 1797)}


class DigitsConfig(Settings):
    """Gray, 8 x 8, ten classes, never flipped."""

    kind: Literal["digits"] = "digits"
    split: Literal["model", "judge", "ceiling", "all"] = Field(
        default="model", description="1000, 500 or 297 scans, or all"
    )

    @property
    def description(self) -> str:
        return f"the digits of scikit-learn, split {self.split}"

    @property
    def size(self) -> tuple[int, int]:
        return 8, 8

    @property
    def frames(self) -> None:
        return None

    @property
    def channels(self) -> Literal[1]:
        return 1

    @property
    def hflip(self) -> bool:
        return False

    def open(self) -> "DigitsDataset":
        return DigitsDataset(self)


@cache
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 [N, 1, 8, 8], and labels, [N]. scikit-learn parses a text file, which takes most of the time."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise TesseraError("the embedded digits need scikit-learn: pip install 'tessera[demo]'") from None
    bunch: Any = load_digits()
    return np.round(bunch.images * (255 / 16)).astype(np.uint8)[:, None], bunch.target


class DigitsDataset:
    """The digits of one split. A fixed permutation mixes the writers."""

    class_names = tuple("0123456789")
    text: "EncodedCaptions | None" = None
    image_sizes: np.ndarray | None = None

    def __init__(self, config: DigitsConfig) -> None:
        images, labels = _all_digits()
        rows = randomness.permutation(0, 0, 0, len(labels)).numpy()[SPLITS[config.split]]
        self.split = config.split
        self.images = images[rows]
        self.labels = labels[rows]

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return f"digits {self.split} {index}"

    def pixels(self, index: int) -> np.ndarray:
        return self.images[index]
