"""Files per second of `tessera data check` by number of processes, and the cost of reporting a million samples.

python benchmarks/data_check.py --data ../shared/data [--samples 1000000]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np

from tessera.data import check, index
from tessera.data.check import scan
from tessera.data.files import FilesConfig, FilesDataset

SCAN = """
import os, sys, time
from pathlib import Path
from tessera.data.check import CheckRequest, scan_data
if __name__ == "__main__":
    data, out, workers = sys.argv[1:]
    request = CheckRequest(data, Path(out))
    count = len(request.dataset)
    began, before = time.perf_counter(), sum(os.times()[:4])
    scan_data(request, int(workers))
    print(count, time.perf_counter() - began, sum(os.times()[:4]) - before)
"""


def scan_cost(data: Path, workers: int) -> tuple[int, float, float]:
    """The number of samples, and the wall-clock and processor seconds of scanning them, including process start-up."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "scan_data.py")
        script.write_text(SCAN)
        words = [sys.executable, str(script), str(data), f"{folder}/out", str(workers)]
        output = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    return int(output[0]), float(output[1]), float(output[2])


def synthetic(count: int, folder: Path) -> check.CheckRequest:
    """Synthetic scan results of `count` images: 1 % copies and 1 % near copies, uniformly distributed."""
    import pyarrow as pa

    generator = np.random.default_rng(0)
    (folder / "data").mkdir()
    table = index.build(
        folder / "data",
        [f"class {number}" for number in range(1000)],
        path=[f"{row % 1000:03d}/{row:08d}.jpg" for row in range(count)],
        label=np.arange(count, dtype=np.int32) % 1000,
    )
    index.write(table, folder / "index.parquet")
    config = FilesConfig(path=str(folder / "index.parquet"), size=(1, 1))
    source = FilesDataset(config)
    (folder / "out/parts").mkdir(parents=True)
    hundredth = count // 100
    hashes = generator.integers(0, 2**64, count, dtype=np.uint64)
    hashes[-hundredth:] = hashes[:hundredth]
    hashes[-2 * hundredth : -hundredth] = hashes[:hundredth] ^ np.uint64(0b11)
    for part in range(scan.num_parts(source)):
        rows = np.arange(part * scan.PART_SIZE, min((part + 1) * scan.PART_SIZE, count))
        same = np.where(rows >= count - hundredth, rows - count + hundredth, rows)
        alike = np.where(rows >= count - 2 * hundredth, (rows - count + 2 * hundredth) % hundredth, rows)
        colors = [np.random.default_rng(row).integers(0, 256, 192, dtype=np.uint8).tobytes() for row in alike.tolist()]
        plain = scan.SampleStats(
            "", None, "", 100_000, None, "JPEG", "RGB", 512, 512, contrast=255, visible_contrast=255
        )
        columns = {name: [value] * len(rows) for name, value in vars(plain).items()}
        columns["name"] = [f"{row % 1000:03d}/{row:08d}.jpg" for row in rows.tolist()]
        columns["digest"] = [int(row).to_bytes(32, "little") for row in same]
        columns["hash"], columns["color_grid"] = hashes[rows], colors
        made = pa.table(columns, scan.schema()).replace_schema_metadata({"key": scan.part_key(source, part)})
        path = str(scan.part_path(folder / "out/parts", part))
        with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, made.schema) as writer:
            writer.write_table(made)
    return check.CheckRequest(str(folder / "index.parquet"), folder / "out")


def report_cost(count: int) -> dict[str, float]:
    """Seconds and memory of reporting the findings of `count` samples, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        synthetic(count, Path(folder))
        words = [sys.executable, __file__, "--report", folder]
        return json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)


def anonymous_memory() -> float:
    """MiB of this process without mapped files, which the system can drop at any time; 0 where it is not known."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def report(folder: Path) -> None:
    samples: list[float] = [anonymous_memory()]

    def watch() -> None:
        while True:
            samples.append(anonymous_memory())
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.perf_counter()
    done = check.report_findings(
        check.CheckRequest(str(folder / "index.parquet"), folder / "out"), write_index=folder / "kept.parquet"
    )
    seconds = time.perf_counter() - began
    counts = {finding.kind: finding.count for finding in done.findings}
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    memory = {"MiB before": before, "MiB at most": most}
    memory |= {"anonymous MiB before": samples[0], "anonymous MiB at most": max(samples)}
    print(json.dumps({"seconds": seconds, **memory, **counts}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TESSERA_SHARED") or "../shared/data"))
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("scan", "report"), help="one of the two measurements")
    options = parser.parse_args()
    if options.report:
        report(options.report)
        return
    if options.only != "report":
        measure_scan(options.data)
    if options.only != "scan":
        print(f"report of {options.samples:,}: {report_cost(options.samples)}")


def measure_scan(data: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(data / "tiles/tiles.zip") as tiles:
            tiles.extractall(folder)
        for name, path in (("tiles", Path(folder)), ("CIFAR-10", data / "cifar10/train.parquet")):
            for workers in (1, 2):
                count, seconds, processor = scan_cost(path, workers)
                print(
                    f"{name}, processes {workers}: {count} in {seconds:.1f} s, {count / seconds:,.0f} per second;",
                    end=" ",
                )
                print(f"processor time {count / processor:,.0f} per second (load {os.getloadavg()[0]:.1f})", flush=True)


if __name__ == "__main__":
    main()
