"""Time and memory of `tessera data build` by the number of images.

    python benchmarks/data_build.py --data ../shared/data/cifar10 --counts 10000 30000 100000
    python benchmarks/data_build.py --noise 16 --counts 30000 100000 300000 1000000

Sources are parquet files of JPEG images of 64 x 64, each of four CIFAR-10 images, so that no two are alike, or of
noise; one in a hundred is a copy, and one in a hundred is cut off. Prints the rate, the processor time, the peak memory
of the command and all its processes together (without the cached pages of files), what was left out, and how many
images the index has.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image

ROWS = 5_000  # of a source file


def made_up(cifar: Path | None, side: int) -> Iterator[np.ndarray]:
    """Images without end, uint8 [H, W, 3]: four of CIFAR-10 each, or noise of a side."""
    generator = np.random.default_rng(0)
    if cifar is None:
        while True:
            yield from generator.integers(0, 256, (ROWS, side, side, 3), np.uint8)
    table = parquet.read_table(cifar / "train.parquet", columns=["image"])["image"]
    tiles = [np.asarray(Image.open(io.BytesIO(row["bytes"].as_py()))) for row in table.slice(0, 20_000)]
    while True:
        a, b, c, d = (tiles[index] for index in generator.integers(len(tiles), size=4))
        yield np.vstack((np.hstack((a, b)), np.hstack((c, d))))


def write_sources(images: Iterator[np.ndarray], folder: Path, count: int) -> tuple[int, int]:
    """Write the images; return the numbers of copies and of damaged images."""
    copies, damaged, last = 0, 0, b""
    folder.mkdir()
    for start in range(0, count, ROWS):
        files = []
        for number in range(start, min(start + ROWS, count)):
            if number % 100 == 50:
                copies, content = copies + 1, last
            else:
                buffer = io.BytesIO()
                Image.fromarray(next(images)).save(buffer, "jpeg", quality=90)
                last = content = buffer.getvalue()
            if number % 100 == 75:
                damaged, content = damaged + 1, content[: len(content) // 3]
            files.append({"bytes": content, "path": f"{number}.jpg"})
        parquet.write_table(pa.table({"image": files}), folder / f"train-{start // ROWS:05}.parquet")
    return copies, damaged


def private_memory(pid: int) -> int:
    """Bytes of memory of a process and its descendants, each page once, without the cached pages of files."""
    total, waiting = 0, [pid]
    while waiting:
        current = waiting.pop()
        try:
            lines = Path(f"/proc/{current}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
            for task in Path(f"/proc/{current}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # it has ended
    return total


def build(sources: Path, output: Path, side: int, workers: int | None) -> tuple[float, float, int]:
    """The seconds and the processor seconds that the command takes, and the largest sum of its memory."""
    recipe = Path(__file__).parent.parent / "recipes/build.yaml"
    settings = [f"sources={sources}", f"output={output}", f"size={side}"]
    settings += [] if workers is None else ["--workers", str(workers)]
    words = [sys.executable, "-m", "tessera", "data", "build", str(recipe), *settings]
    began, most, before = time.perf_counter(), 0, sum(os.times()[2:4])
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read() if process.stderr else ""))
    reader.start()
    while process.poll() is None:
        most = max(most, private_memory(process.pid))
        time.sleep(0.25)
    reader.join()
    if process.returncode:
        raise SystemExit(f"the build failed: {errors[0][-2000:]}")
    return time.perf_counter() - began, sum(os.times()[2:4]) - before, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--data", type=Path, help="the folder of CIFAR-10")
    images.add_argument("--noise", type=int, help="side of images of noise in pixels")
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--workers", type=int, help="processes; default: that of the command")
    options = parser.parse_args()
    side = options.noise or 64
    print("| images | seconds | processor seconds | images/s | peak MiB | copies, damaged | in the index |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for count in options.counts:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TESSERA_CACHE"] = f"{folder}/cache"  # where tables are unpacked: removed with the rest
            copies, damaged = write_sources(made_up(options.data, side), Path(folder, "sources"), count)
            seconds, processor, most = build(Path(folder, "sources"), Path(folder, "built"), side, options.workers)
            rows = parquet.read_metadata(Path(folder, "built/index.parquet")).num_rows
            print(
                f"| {count:,} | {seconds:.0f} | {processor:.0f} | {count / seconds:.0f} | {most / 2**20:.0f} | "
                f"{copies}, {damaged} | {rows:,} |",
                flush=True,
            )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
