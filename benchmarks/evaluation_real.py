"""Do the distances order degraded images correctly, and how do they depend on the number of samples? On CIFAR-10.

    tessera evaluate train-features DATA/cifar10/train.parquet --size 32 --out cifar-features
    python benchmarks/evaluation_real.py --data DATA/cifar10 --features cifar-features

The reference is the whole training set. Equally many images of the test set are scored: unchanged, without one class,
blurred, with noise. Prints Markdown.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from tessera.data import FilesConfig
from tessera.evaluation import suite
from tessera.evaluation.features import FeatureExtractor, FeatureSet, compute_moments, extract, load_extractor
from tessera.evaluation.sources import DatasetSource, ImageShard
from tessera.reporting.estimates import Estimate
from tessera.runtime import Distributed

COUNTS = (100, 250, 500, 1000, 2500, 5000, 10000)
MISSING = 3  # the class that is left out: cats


class Changed(DatasetSource):
    """A data set whose images are changed one by one."""

    def __init__(self, config: FilesConfig, name: str, change: Callable[[np.ndarray, int], np.ndarray]) -> None:
        super().__init__(config)
        self.name, self.change = name, change

    @property
    def plan(self):
        return super().plan | {"changed": self.name}

    def shard(self, index: int) -> ImageShard:
        shard = super().shard(index)
        changed = [self.change(image, int(row)) for image, row in zip(shard.images, shard.indices)]
        return ImageShard(np.stack(changed), shard.indices, shard.labels)


def blurred(radius: float) -> Callable[[np.ndarray, int], np.ndarray]:
    return lambda image, row: np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def noised(deviation: float) -> Callable[[np.ndarray, int], np.ndarray]:
    def change(image: np.ndarray, row: int) -> np.ndarray:
        noise = np.random.default_rng(row).normal(0, deviation, image.shape)
        return (image + noise).round().clip(0, 255).astype(np.uint8)

    return change


def rows(features: FeatureSet, chosen: np.ndarray) -> FeatureSet:
    """Some rows of a feature set, as a set of their own."""
    selected = {part: np.asarray(values[chosen]) for part, values in features.rows.items()}
    return FeatureSet(
        description=features.description,
        hash=features.hash,
        count=len(chosen),
        size=features.size,
        channels=features.channels,
        features=features.features,
        moments={part: compute_moments(selected[part]) for part in features.moments},
        rows=selected,
    )


def shown(measured: Estimate) -> str:
    return f"{measured.value:.4g} ({measured.low:.4g} to {measured.high:.4g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--features", default="cifar-features")
    parser.add_argument(
        "--count", type=int, default=9000, help="images of each copy: the size of the test set without one class"
    )
    parser.add_argument("--work", type=Path, help="folder for the features, to resume after an interruption")
    options = parser.parse_args()
    network: FeatureExtractor = load_extractor(options.features, torch.device("cpu"))
    work = options.work or Path(tempfile.mkdtemp())

    def config(split: str) -> FilesConfig:
        return FilesConfig(path=str(options.data / f"{split}.parquet"), size=(32, 32))

    def look(subject: DatasetSource, name: str) -> FeatureSet:
        return extract(subject, network, work / name, Distributed(), batch_size=250)

    train, test = look(DatasetSource(config("train")), "train"), look(DatasetSource(config("test")), "test")
    assert test.labels is not None
    order = np.random.default_rng(0).permutation(test.count or 0)
    without = order[test.labels[order] != MISSING][: options.count]
    changes = {
        "noise of 8 levels": noised(8),
        "blurred, 0.5 px": blurred(0.5),
        "noise of 16 levels": noised(16),
        "noise of 24 levels": noised(24),
        "blurred, 1 px": blurred(1.0),
    }
    copies = {"test set": rows(test, order[: options.count]), "without cats": rows(test, without)}
    for name, change in changes.items():
        copies[name] = rows(look(Changed(config("test"), name, change), name), order[: options.count])
    names = ["fd", "fd_inf", "kid", "prdc"]
    results = {
        name: {key: value for metric in names for key, value in suite.METRICS[metric].compute(copy, train).items()}
        for name, copy in copies.items()
    }
    print(f"features {network.name}, weights {network.weights}; {options.count} images each against {train.count}\n")
    print("| images | fd | fd_inf | 1000 kid | precision | recall | density | coverage |")
    print("|---|---|---|---|---|---|---|---|")
    for name, scores in results.items():
        kid = scores["kid"]
        cells = [shown(scores["fd"]), shown(scores["fd_inf"])]
        cells.append(shown(Estimate(1000 * kid.value, 1000 * kid.low, 1000 * kid.high)))
        cells += [f"{scores[key].value:.3f}" for key in ("precision", "recall", "density", "coverage")]
        print(f"| {name} | " + " | ".join(cells) + " |")

    print("\n| samples of the test set | fd | fd_inf | 1000 kid |\n|---|---|---|---|")
    for count in (each for each in COUNTS if each <= len(order)):
        few = rows(test, order[:count])
        kid = suite.METRICS["kid"].compute(few, train)["kid"]
        cells = [shown(suite.METRICS["fd"].compute(few, train)["fd"])]
        enough = count >= 4 * few.rows["pool"].shape[1]
        cells.append(shown(suite.METRICS["fd_inf"].compute(few, train)["fd_inf"]) if enough else "too few")
        cells.append(shown(Estimate(1000 * kid.value, 1000 * kid.low, 1000 * kid.high)))
        print(f"| {count:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
