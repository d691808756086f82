"""The embedded data set: 1797 handwritten digits, 8 x 8 scans that ship with scikit-learn (Alpaydin & Kaynak 1998)."""

from typing import Any, Literal

import numpy as np
from pydantic import Field

from tessera import randomness
from tessera.errors import TesseraError
from tessera.settings import Settings

# Apart from each other for good: what a model learns from, what fits its judge, and what tells the judge's ceiling.
SPLITS = {"model": slice(0, 1000), "judge": slice(1000, 1500), "ceiling": slice(1500, 1797), "all": slice(0, 1797)}


class DigitsConfig(Settings):
    """Grey, 8 x 8, ten classes, never mirrored."""

    kind: Literal["digits"] = "digits"
    split: Literal["model", "judge", "ceiling", "all"] = Field(
        default="model", description="1000 / 500 / 297 scans, or all"
    )

    @property
    def where(self) -> str:
        return f"the digits of scikit-learn, split {self.split}"

    @property
    def size(self) -> tuple[int, int]:
        return 8, 8

    @property
    def channels(self) -> Literal[1]:
        return 1

    @property
    def hflip(self) -> bool:
        return False

    def open(self) -> "DigitsSource":
        return DigitsSource(self)


class DigitsSource:
    """The digits of one split, shuffled once and for all so that writers are mixed."""

    class_names = tuple("0123456789")

    def __init__(self, config: DigitsConfig) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise TesseraError("the embedded digits need scikit-learn: pip install 'tessera[demo]'") from None
        bunch: Any = load_digits()
        chosen = randomness.permutation(0, 0, 0, len(bunch.target)).numpy()[SPLITS[config.split]]
        self.split = config.split
        self.images = np.round(bunch.images[chosen] * (255 / 16)).astype(np.uint8)[:, None]  # [N, 1, 8, 8]
        self.labels = bunch.target[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return f"digits {self.split} {index}"

    def pixels(self, index: int) -> np.ndarray:
        return self.images[index]
