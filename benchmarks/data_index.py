"""A data set of a million samples, as an index: time to open and shuffle it, and memory.

    python benchmarks/data_index.py [--samples 1000000] [--epochs 3]
    python benchmarks/data_index.py --table cifar10/train.parquet

Writes an index of paths, sizes, labels and captions (no images: none is read here), then opens it in a process of its
own, shuffles epochs by the loader's order, and reads every sample's label, and one of every batch's name and caption,
in that order. Memory is the growth of the process since before it opened the index, in MiB (Linux).

--table: instead, reads the encoded images of a parquet file in shuffled order, in three ways: by row groups (two in
memory), all in memory, and decompressed into an arrow file that is memory-mapped. Each way has a process of its own.
Prints one table.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np

from tessera.data import FilesConfig, index
from tessera.data.sampler import ShuffledOrder

BATCH, CLASSES = 256, 1000
HEAD = "| | seconds | processor seconds | MiB |\n|---|---|---|---|"
WORDS = "a photograph of an old boat on a calm lake at dawn"


def written(folder: Path, samples: int) -> Path:
    """An index as a check of images in class folders would write it."""
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, samples)
    names = [f"class {number:04d}" for number in range(CLASSES)]
    target = folder / "index.parquet"
    table = index.build(
        folder,
        names,
        path=[f"{names[label]}/{number:09d}.jpg" for number, label in enumerate(labels.tolist())],
        height=random.integers(256, 2048, samples, np.int32),
        width=random.integers(256, 2048, samples, np.int32),
        label=labels.astype(np.int32),
        caption=[f"{WORDS[: 20 + number % 31]}, number {number}" for number in range(samples)],
        hash=random.integers(0, 2**64, samples, np.uint64),
    )
    index.write(table, target)
    return target


def resident() -> float:
    """MiB of memory of this process, without files that are mapped, whose pages the system can take back."""
    pages, mapped = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (pages - mapped) * 4096 / 2**20


@contextmanager
def row(what: str, base: float):
    """One row of a table: wall-clock time, processor time, memory beyond `base`."""
    start, busy = time.perf_counter(), time.process_time()
    yield
    took, worked = time.perf_counter() - start, time.process_time() - busy
    print(f"| {what} | {took:.2f} | {worked:.2f} | {resident() - base:.0f} |", flush=True)


def measure(path: Path, epochs: int) -> None:
    base = resident()
    with row("open", base):
        source = FilesConfig(path=str(path), size=256).open()
    if epochs == 0:
        return
    order = ShuffledOrder(len(source), BATCH, seed=0)
    batches = len(source) // BATCH
    for epoch in range(epochs):
        first = -(-epoch * len(source) // BATCH) * BATCH
        with row(f"epoch {epoch}: shuffle", base):
            order.batch(first)
        with row(f"epoch {epoch}: {batches:,} batches of labels", base):
            for start in range(first, first + batches * BATCH, BATCH):
                samples = order.batch(start)
                _ = source.labels[samples]
        with row(f"epoch {epoch}: {batches:,} names and captions", base):
            for start in range(first, first + batches * BATCH, BATCH):
                sample = int(order.batch(start)[0])
                _ = source.name(sample), source.caption(sample)


def read_at_random(path: Path, way: str) -> None:
    import pyarrow.compute
    import pyarrow.ipc  # noqa: F401
    from pyarrow import parquet

    from tessera.data import tables

    base = resident()
    file = parquet.ParquetFile(path)
    column = tables.find_image_column(file.schema_arrow, "auto", path)
    order = np.random.default_rng(0).permutation(file.metadata.num_rows)
    if way == "row groups":
        starts = np.cumsum([0] + [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
        group = lru_cache(maxsize=2)(lambda number: file.read_row_group(number, columns=[column])[column])
        order = order[:300]
        with row(f"{way}: {len(order):,} rows", base):
            for place in order:
                number = int(np.searchsorted(starts, place, side="right")) - 1
                _ = group(number)[int(place - starts[number])].as_py()
        return
    if way != "held":
        tables.MAX_IN_MEMORY = 0
    with row(f"{way}: open", base):
        images = tables.open_images([path], "auto")[0]
    with row(f"{way}: {len(order):,} rows", base):
        for place in order:
            _ = images[int(place)]


def apart(call: Callable[..., None], *arguments: object) -> None:
    """In a process of its own, so that memory is measured separately."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(call, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.table is not None:
            os.environ["TESSERA_CACHE"] = folder
            print(HEAD)
            for way in ("row groups", "held", "unpacked and mapped", "mapped again"):
                apart(read_at_random, options.table, way)
            return
        start = time.perf_counter()
        path = written(Path(folder), options.samples)
        took, size = time.perf_counter() - start, path.stat().st_size / 2**20
        print(f"made and written in {took:.1f} s, {size:.0f} MiB\n\n{HEAD}", flush=True)
        os.environ["TESSERA_CACHE"] = folder
        apart(measure, path, 0)  # a large index is unpacked
        apart(measure, path, options.epochs)


if __name__ == "__main__":
    main()
