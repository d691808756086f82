"""Small sets of pictures, and the network that looks at them: digits of 8 x 8, shards of 20."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tessera.evaluation import report, sources
from tessera.evaluation.features import Extractor, extractor


@pytest.fixture(scope="session")
def real() -> np.ndarray:
    """The 1000 digits that models learn from, uint8 [N, 8, 8, 1]."""
    pytest.importorskip("sklearn")
    from tessera.data.digits import DigitsConfig

    return DigitsConfig(split="model").open().images.transpose(0, 2, 3, 1)


@pytest.fixture(scope="session")
def digits() -> Extractor:
    """The features that come with the package."""
    return extractor("digits", torch.device("cpu"))


@pytest.fixture
def small_shards(monkeypatch) -> int:
    """Shards so small that few pictures make many."""
    for module in (sources, report):
        monkeypatch.setattr(module, "SHARD", 20)
    return 20


@pytest.fixture
def make_folder(tmp_path) -> Callable[..., Path]:
    """uint8 [N, H, W, C] as PNG files in tmp_path / name, in their order; of several classes where labels are told."""

    def make(name: str, pictures: np.ndarray, labels=None) -> Path:
        for number, picture in enumerate(pictures):
            inner = "" if labels is None else str(labels[number])
            path = tmp_path / name / inner / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(path)
        return tmp_path / name

    return make


@pytest.fixture
def make_npz(tmp_path) -> Callable[..., Path]:
    """Arrays arr_0, arr_1 as tmp_path / name."""

    def make(name: str, *arrays: np.ndarray, save=np.savez) -> Path:
        save(tmp_path / name, *arrays)
        return tmp_path / name

    return make
