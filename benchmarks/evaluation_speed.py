"""Speed and memory of scoring: extractors, the whole pipeline, and a comparison with torchmetrics' FID.

    python benchmarks/evaluation_speed.py extractors
    python benchmarks/evaluation_speed.py memory --samples 10000 50000
    python benchmarks/evaluation_speed.py torchmetrics

The weights of Inception and DINOv2 are random, which does not affect speed. Prints Markdown.
"""

import argparse
import math
import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tessera.evaluation import features
from tessera.evaluation.distances import frechet_distance
from tessera.evaluation.features import FeatureExtractor, extract
from tessera.evaluation.moments import Moments
from tessera.evaluation.sources import NpzSource
from tessera.evaluation.toy import feature_network
from tessera.runtime import Distributed

CPU = torch.device("cpu")
BATCH = 50


def inception(device: torch.device) -> FeatureExtractor:
    from tessera.evaluation.inception import Inception

    torch.manual_seed(0)
    network = Inception().eval().fused().to(device, memory_format=torch.channels_last)  # pyright: ignore
    return FeatureExtractor("inception", "random", "", network, device)


def dinov2(width: int, depth: int, heads: int, device: torch.device) -> FeatureExtractor:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    from tessera.encoders import vision

    folder = tempfile.mkdtemp()
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, image_size=518, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    crop = {"height": 224, "width": 224}
    BitImageProcessor(
        size={"shortest_edge": 256}, crop_size=crop, image_mean=mean, image_std=deviation
    ).save_pretrained(folder)
    network = vision.load(folder).to(device)
    return FeatureExtractor(f"DINOv2 {width} wide", "random", network.resize, network, device)


def rate(work: Callable[[], object], count: int, rounds: int) -> float:
    """Images per second: the median of some rounds, after one to warm up."""
    work()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return count / statistics.median(seconds)


def noise_images(count: int, side: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def extractors(device: torch.device, scale: float, rounds: int) -> None:
    many = scale * (1 if device.type == "cpu" else 40)
    own = feature_network.FeatureConfig(size=(32, 32), channels=3, num_classes=10).build().eval().to(device)
    chosen = [
        (features.load_extractor("digits", device), noise_images(math.ceil(500 * many), 8, 1)),
        (FeatureExtractor("own, 32 px", "random", "", own, device), noise_images(math.ceil(500 * many), 32)),
        (inception(device), noise_images(math.ceil(32 * many), 32)),
        (inception(device), noise_images(math.ceil(32 * many), 256)),
        (dinov2(384, 12, 6, device), noise_images(math.ceil(16 * many), 256)),
        (dinov2(768, 12, 12, device), noise_images(math.ceil(16 * many), 256)),
    ]
    print("| features | images | width | images/s, network alone | images/s, from .npz to features on disk |")
    print("|---|---|---|---|---|")
    for network, pixels in chosen:
        alone = rate(partial(network, pixels, BATCH), len(pixels), rounds)
        with tempfile.TemporaryDirectory() as folder:
            np.savez(Path(folder) / "samples.npz", pixels)
            subject = NpzSource(Path(folder) / "samples.npz")
            whole = rate(partial(_extract_again, subject, network, Path(folder) / "features"), len(pixels), rounds)
        width = network(pixels[:1], 1)["pool"].shape[1]
        size = f"{pixels.shape[1]} x {pixels.shape[2]} x {pixels.shape[3]}"
        print(f"| {network.name} | {size} | {width} | {alone:.4g} | {whole:.4g} |", flush=True)


def _extract_again(subject: NpzSource, network: FeatureExtractor, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    extract(subject, network, folder, Distributed())


class Fast(nn.Module):
    """2048 features of an image at almost no cost, to measure the cost of the pipeline."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Linear(3 * 8 * 8, 2048)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        small = nn.functional.adaptive_avg_pool2d(images.float() / 255, 8)
        return torch.relu(self.mix(small.flatten(1)))

    def parts(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pool": self(images)}


def _score(path: str, folder: str, count: int) -> tuple[int, float]:
    """Scoring in a process of its own: the growth of its peak memory, and seconds."""
    network = FeatureExtractor("fast", "random", "", Fast().parts, CPU)
    network(noise_images(50, 64), 50)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    extracted = extract(NpzSource(Path(path), count), network, Path(folder), Distributed())
    frechet_distance(
        extracted.moments["pool"].mean,
        extracted.moments["pool"].cov,
        extracted.moments["pool"].mean,
        extracted.moments["pool"].cov,
    )
    seconds = time.perf_counter() - start
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, seconds


def memory(samples: list[int]) -> None:
    print("| samples (64 px, 2048 features) | images | features on disk | memory beyond the program | seconds |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        most = max(samples)
        np.savez(Path(folder) / "samples.npz", noise_images(most, 64))
        for count in samples:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                work = pool.submit(_score, str(Path(folder) / "samples.npz"), f"{folder}/{count}", count)
                used, seconds = work.result()
            images, rows = count * 64 * 64 * 3 / 2**20, count * 2048 * 4 / 2**20
            print(
                f"| {count:,} | {images:.0f} MiB | {rows:.0f} MiB | {used / 1024:.0f} MiB | {seconds:.1f} |", flush=True
            )


def torchmetrics(count: int, rounds: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    network = Fast().eval()
    network.num_features = 2048
    real, fake = (
        torch.from_numpy(noise_images(2 * count, 64).transpose(0, 3, 1, 2)[part::2].copy()) for part in (0, 1)
    )
    fake = (fake.float() * 0.9).to(torch.uint8)

    def theirs() -> float:
        metric = FrechetInceptionDistance(feature=network, normalize=False, input_img_size=(3, 64, 64))
        for start in range(0, count, 50):
            metric.update(real[start : start + 50], real=True)
            metric.update(fake[start : start + 50], real=False)
        return float(metric.compute())

    def ours() -> float:
        moments = []
        for images in (real, fake):
            moments.append(Moments())
            for start in range(0, count, 1000):
                with torch.no_grad():
                    rows = [network(images[at : at + 50]) for at in range(start, start + 1000, 50)]
                moments[-1].add(torch.cat(rows).numpy())
        return frechet_distance(moments[0].mean, moments[0].cov, moments[1].mean, moments[1].cov)

    taken: dict[str, list[float]] = {"torchmetrics": [], "ours": []}
    values = {}
    for _ in range(rounds):
        for name, work in (("torchmetrics", theirs), ("ours", ours)):
            start = time.perf_counter()
            with torch.no_grad():
                values[name] = work()
            taken[name].append(time.perf_counter() - start)
    ratios = [theirs / ours for theirs, ours in zip(taken["torchmetrics"], taken["ours"])]
    print(f"{count} against {count} images, the same network of 2048 features, {rounds} rounds interleaved\n")
    print("| | value | seconds, median |\n|---|---|---|")
    for name, seconds in taken.items():
        print(f"| {name} | {values[name]:.6f} | {statistics.median(seconds):.2f} |")
    print(f"\nours is {statistics.median(ratios):.2f} times as fast (lowest {min(ratios):.2f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["extractors", "memory", "torchmetrics"])
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 50_000])
    parser.add_argument("--scale", type=float, default=1, help="of the numbers of images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="of the extractors")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.what == "extractors":
        extractors(device, options.scale, options.rounds)
    elif options.what == "memory":
        memory(options.samples)
    else:
        torchmetrics(math.ceil(4000 * options.scale), options.rounds)
