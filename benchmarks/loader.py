"""Samples per second of our loader against a plain pipeline of Hugging Face `datasets` and PyTorch's DataLoader.

    python benchmarks/loader.py [--data ../shared/data] [--workers 2] [--rounds 7]

The same files, the same work: decode, crop to the size, uint8 batches of 64 in a shuffled order; two workers each
(ours: threads, or processes; DataLoader: processes, kept between rounds). They are measured alternately for --seconds
each, after the other has finished reading ahead. A row has medians, and the median of the ratios of a round. "in
memory": the default; a small data set stays in memory once it was read, and has been read before the measurement.
"decoded again": each image is decoded every time.

cifar    50,000 JPEGs of 32 x 32 in a parquet file
emoji    2,789 PNGs of 64 x 64 in a parquet file
photos   400 synthetic JPEGs of about 600 x 500 in a folder, to 256 x 256
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tessera.data import Loader
from tessera.data import loader as loading
from tessera.data.files import FilesConfig
from tessera.data.images import center_crop

BATCH = 64


def made_up_photos(folder: Path, count: int, side: int) -> Path:
    """JPEGs with detail at all scales, so that decoding them costs what decoding photographs does."""
    random = np.random.default_rng(0)
    for number in range(count):
        height, width = random.integers(side * 3 // 4, side * 7 // 6, 2)
        pixels = np.zeros((height, width, 3))
        for cells in (4, 16, 64, 256):
            coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), np.uint8))
            pixels += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float) / 4
        place = folder / f"class {number % 4}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.jpg", quality=90)
    return folder


class Transform:
    """The usual transform for `datasets`: it decodes, and the same function as ours crops."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pixels = [np.asarray(center_crop(image.convert("RGB"), (self.size, self.size))) for image in rows["image"]]
        columns = {"pixels": [torch.from_numpy(each.transpose(2, 0, 1).copy()) for each in pixels]}
        return columns | ({"label": rows["label"]} if "label" in rows else {})


def plain(path: Path, size: int, workers: int) -> Iterator[dict[str, torch.Tensor]]:
    """datasets and DataLoader, endless."""
    import datasets
    from torch.utils.data import DataLoader

    kind = "parquet" if path.suffix == ".parquet" else "imagefolder"
    place = {"data_files": str(path)} if kind == "parquet" else {"data_dir": str(path)}
    rows = datasets.load_dataset(kind, split="train", **place, cache_dir=tempfile.mkdtemp())
    rows = rows.select_columns([name for name in ("image", "label") if name in rows.column_names])
    rows = rows.cast_column("image", datasets.Image()).with_transform(Transform(size))
    loader = DataLoader(
        rows,  # pyright: ignore[reportArgumentType]
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=True,
    )
    while True:
        yield from loader


def ours(path: Path, size: int, workers: int, kept: bool, decoding: str, processes: int = 0) -> Iterator[Any]:
    config = FilesConfig.model_validate({"path": str(path), "size": (size, size), "decoding": decoding})
    loading.MEMORY_LIMIT = 2**30 if kept else 0
    source = config.open()
    loader = Loader(source, BATCH, seed=0, num_workers=workers, decode_processes=processes)
    batches = loader.batches()
    for _ in range(-(-len(source) // BATCH) if kept else 1):
        next(batches)
    return batches


def rate(batches: Iterator[Any], seconds: float) -> float:
    """Samples per second."""
    for _ in range(math.ceil(5 * seconds)):  # until the other has stopped reading ahead; not longer if others are busy
        if idle() > 0.8:
            break
    for _ in range(5):  # what was read ahead before
        next(batches)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        next(batches)
        count += BATCH
    return count / (time.perf_counter() - began)


def idle(seconds: float = 0.3) -> float:
    """The fraction of idle processor time. Linux."""

    def read() -> list[int]:
        return [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]

    before = read()
    time.sleep(seconds)
    spent = [now - then for now, then in zip(read(), before)]
    return spent[3] / max(1, sum(spent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TESSERA_SHARED") or "../shared/data"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--photos", type=int, default=400, help="number of synthetic photographs")
    parser.add_argument("--side", type=int, default=600, help="their size in pixels")
    parser.add_argument("--only", nargs="+", default=["cifar", "emoji", "photos"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        sets = {
            "cifar": (options.data / "cifar10/train.parquet", 32),
            "emoji": (options.data / "emoji/train.parquet", 64),
            "photos": (made_up_photos(Path(place, "photos"), options.photos, options.side), 256),
        }
        print("| data | mode | datasets + DataLoader, samples/s | Tessera, samples/s | ratio | lowest, highest |")
        print("|---|---|---|---|---|---|")
        for name in options.only:
            path, size = sets[name]
            other = plain(path, size, options.workers)
            ways = {
                "in memory": ours(path, size, options.workers, True, "exact"),
                "decoded again": ours(path, size, options.workers, False, "exact"),
                "decoded again, by processes": ours(path, size, options.workers, False, "exact", options.workers),
            }
            if name == "photos":
                ways["decoded again, decoding: fast"] = ours(path, size, options.workers, False, "fast")
            rates: dict[str, list[float]] = {way: [] for way in ("plain", *ways)}
            for _ in range(options.rounds):
                for way, batches in {"plain": other, **ways}.items():
                    rates[way].append(rate(batches, options.seconds))
            for way in ways:
                ratios = [b / a for a, b in zip(rates["plain"], rates[way])]
                first, second = statistics.median(rates["plain"]), statistics.median(rates[way])
                print(
                    f"| {name} | {way} | {first:,.0f} | {second:,.0f} | {statistics.median(ratios):.2f} | "
                    f"{min(ratios):.2f}, {max(ratios):.2f} |",
                    flush=True,
                )
            for batches in (other, *ways.values()):
                batches.close()  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    main()
