"""Small sets of images and a feature network: 8 x 8 digits, shards of 20."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tessera.evaluation.features import FeatureExtractor, load_extractor
from tessera.generation import shards


@pytest.fixture(scope="session")
def real() -> np.ndarray:
    """The 1000 digits that models are trained on, uint8 [N, 8, 8, 1]."""
    pytest.importorskip("sklearn")
    from tessera.data.digits import DigitsConfig

    return DigitsConfig(split="model").open().images.transpose(0, 2, 3, 1)


@pytest.fixture(scope="session")
def digits() -> FeatureExtractor:
    """The feature network that comes with the package."""
    return load_extractor("digits", torch.device("cpu"))


@pytest.fixture
def small_shards(monkeypatch) -> int:
    """Shards of 20 images, so that few images have several shards."""
    monkeypatch.setattr(shards, "SHARD_SIZE", 20)
    return 20


@pytest.fixture
def make_folder(tmp_path) -> Callable[..., Path]:
    """uint8 [N, H, W, C] as PNG files in tmp_path / name, in their order; in class folders with labels."""

    def make(name: str, images: np.ndarray, labels=None) -> Path:
        for number, image in enumerate(images):
            inner = "" if labels is None else str(labels[number])
            path = tmp_path / name / inner / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)
        return tmp_path / name

    return make


@pytest.fixture
def make_npz(tmp_path) -> Callable[..., Path]:
    """Arrays arr_0, arr_1 as tmp_path / name."""

    def make(name: str, *arrays: np.ndarray, save=np.savez) -> Path:
        save(tmp_path / name, *arrays)
        return tmp_path / name

    return make
