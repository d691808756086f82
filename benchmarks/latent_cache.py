"""The latent cache: latents/s from the memory map, memory for a million samples, images/s of encoding.

    OMP_NUM_THREADS=1 python benchmarks/latent_cache.py read [--count 20480] [--threads 1 2]
    OMP_NUM_THREADS=1 python benchmarks/latent_cache.py million [--counts 100000 1000000]
    OMP_NUM_THREADS=1 python benchmarks/latent_cache.py encode [--count 192] [--size 128] [--workers 1 2]

read      latents [8, 32, 32] in float16, mean and deviation of an autoencoder of 4 channels at 256 pixels, both
          orientations cached; gathered in random order in batches of 256, by threads that take batches alternately, as
          in the loader. All files are in the page cache: reading is measured without the disk
million   latents [2, 2, 2]: seconds and memory of writing, of opening, and of reading every sample once in random order
encode    `tessera data cache` as a command, by number of processes, on random JPEG files, by an AutoencoderKL of random
          weights with a quarter of the usual channels; start-up (imports, a codec for each) is subtracted with a
          second measurement of few images

Memory is that of the process itself (RssAnon), and the pages of files (RssFile), which the system can reclaim.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tessera.codecs import AutoencoderConfig, Codec
from tessera.data import FilesConfig
from tessera.data.cache import CacheWriter
from tessera.data.images import Dataset
from tessera.data.latents import LatentsDataset

BATCH = 256


class Noise(Dataset):
    """A number of noise images, of which 64 differ."""

    class_names = tuple(map(str, range(1000)))

    def __init__(self, count: int, side: int) -> None:
        self.count = count
        self.images = np.random.default_rng(0).integers(0, 256, (64, 3, side, side), np.uint8)

    def __len__(self) -> int:
        return self.count

    def label(self, index: int) -> int:
        return index % 1000

    def name(self, index: int) -> str:
        return f"noise {index}"

    def pixels(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
        return self.images[index % 64]


class Pooling(Codec):
    """Halves height and width, and has a number of channels."""

    pixel_channels, factor, stochastic = 3, 2, True

    def __init__(self, channels: int) -> None:
        self.latent_channels = channels

    def to(self, device: torch.device | str) -> "Pooling":
        return self

    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        grey = torch.nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 2)
        return grey.repeat(1, 2 * self.latent_channels, 1, 1).abs()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("this codec only encodes")

    def fingerprint(self) -> str:
        return f"pooling {self.latent_channels}"


def memory() -> dict[str, int]:
    """MiB of this process, by kind (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines if line.startswith(("RssAnon", "RssFile"))
    }


def write(out: Path, count: int, side: int, channels: int, flip: bool) -> None:
    """A finished cache of synthetic latents; prints seconds and memory."""
    began = time.perf_counter()
    config = FilesConfig(path="synthetic", size=(2 * side, 2 * side), hflip=flip)
    source = Noise(count, 2 * side)
    cache = CacheWriter(out, config, source, AutoencoderConfig(source="synthetic"), Pooling(channels))
    cache.begin()
    for _ in cache.write(range(len(cache)), torch.device("cpu"), BATCH):
        pass
    cache.finish()
    print(f"write {count:,}: {time.perf_counter() - began:.1f} s, {memory()}", flush=True)


def apart(call: Callable[..., None], *arguments: object) -> None:
    """In a process of its own, so that memory is measured separately."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(call, *arguments).result()


def home(out: Path) -> Path:
    return next(path.parent for path in out.glob("*/cache.json"))


def read_through(source: LatentsDataset, threads: int, most: int | None = None) -> float:
    """Seconds to read every sample once, in random order."""
    random = np.random.default_rng(1)
    order = random.permutation(len(source))[:most]
    mirrored = random.random(len(order)) < 0.5 if source.hflip else np.zeros(len(order), bool)
    starts = range(0, len(order), BATCH)
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for batch in pool.map(
            lambda start: source.gather(order[start : start + BATCH], mirrored[start : start + BATCH]), starts
        ):
            assert len(batch)
    return time.perf_counter() - began


def measure_reading(count: int, threads: list[int], rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        apart(write, Path(folder), count, 32, 4, True)
        source = LatentsDataset(home(Path(folder)))
        read_through(source, 1)  # into the page cache
        print(f"\n| threads | latents/s, median of {rounds} | slowest | fastest |\n|---|---|---|---|")
        for number in threads:
            rates = sorted(count / read_through(source, number) for _ in range(rounds))
            print(f"| {number} | {rates[rounds // 2]:,.0f} | {rates[0]:,.0f} | {rates[-1]:,.0f} |")


def measure_memory(out: Path, count: int) -> None:
    before, began = memory(), time.perf_counter()
    source = LatentsDataset(home(out))
    opened, seconds = memory(), time.perf_counter() - began
    read = read_through(source, 1)
    after = memory()
    cells = [f"{count:,}", f"{seconds:.2f}"]
    cells += [f"{opened[kind] - before[kind]} / {after[kind] - before[kind]}" for kind in ("RssAnon", "RssFile")]
    print("| " + " | ".join([*cells, f"{count / read:,.0f}"]) + " |", flush=True)


def measure_millions(counts: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            apart(write, Path(folder) / str(count), count, 2, 1, False)
        print("\n| samples | opening, s | growth of own memory, MiB: opened / read | pages of files, MiB | samples/s |")
        print("|---|---|---|---|---|")
        for count in counts:
            apart(measure_memory, Path(folder) / str(count), count)


def measure_encoding(count: int, size: int, workers: list[int], width: int, device: str, samples: int) -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            layers_per_block=2,
            latent_channels=4,
        ).save_pretrained(folder / "codec")
        random = np.random.default_rng(0)
        for part, number in (("few", 2 * samples), ("many", count)):
            (folder / part).mkdir()
            for index in range(number):
                coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
                coarse.resize((2 * size, 2 * size), Image.Resampling.BICUBIC).save(folder / part / f"{index:05d}.jpg")
        print("| processes | images/s |\n|---|---|")
        for number in workers:
            seconds = {}
            for part in ("few", "many"):
                words = {
                    "--out": folder / f"out-{number}", "--size": size, "--shard-size": samples, "--workers": number,
                    "--device": device,
                }  # fmt: skip
                command = [sys.executable, "-m", "tessera", "data", "cache", folder / part]
                command += [f"codec.source={folder}/codec", *(word for pair in words.items() for word in pair)]
                began = time.perf_counter()
                subprocess.run(list(map(str, command)), check=True, capture_output=True)
                seconds[part] = time.perf_counter() - began
            print(f"| {number} | {(count - 2 * samples) / (seconds['many'] - seconds['few']):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["read", "million", "encode"])
    parser.add_argument("--count", type=int)
    parser.add_argument("--counts", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--width", type=int, default=32, help="of the autoencoder's first layers (SD: 128)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=8, help="in a file of the cache")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    if options.what == "read":
        measure_reading(options.count or 20_480, options.threads, options.rounds)
    elif options.what == "million":
        measure_millions(options.counts)
    else:
        measure_encoding(
            options.count or 192, options.size, options.workers, options.width, options.device, options.samples
        )


if __name__ == "__main__":
    main()
