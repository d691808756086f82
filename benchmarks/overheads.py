"""The time of checkpoints, health probes and the log, as fractions of the time of the steps.

    OMP_NUM_THREADS=1 python benchmarks/overheads.py [--width 384] [--depth 12] [--batch 8] [--rounds 9]

One process trains a network of DiT-S's size on 64 tokens, as DiT-S/4 does at 256 pixels: the digits, one token per
pixel. Each is done as in a run (`loop.Trainer`), and measured alternately with plain steps:

held       the time that a checkpoint blocks the loop: the state is copied
written    a whole checkpoint: the steps until it is written, less as many plain steps around them
health     one probe
log        one record, with the state of processes and memory; the machine's peak is measured before

The fraction is of the steps between two of them at the default intervals and the given batch size: it is smaller for a
larger batch. Wall-clock time is what a run waits, inexact on a busy machine. CPU time counts only this process's
threads.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tessera import bundle, runtime
from tessera.models.network import parameter_count
from tessera.monitoring.logger import MetricLogger
from tessera.settings import validate
from tessera.training.checkpoint import TrainerState
from tessera.training.loop import Trainer
from tessera.training.recipe import Recipe, TrainingConfig
from tessera.training.run import build_run, prepare_folder


def begin(folder: Path, width: int, depth: int, batch: int) -> Trainer:
    settings = {
        "run_dir": str(folder),
        "data": {"kind": "digits"},
        "network": {"patch_size": 1, "hidden_size": width, "depth": depth, "num_heads": max(1, width // 64)},
        "training": {"global_batch_size": batch, "device": "cpu", "keep_last": 1, "tensorboard": True},
    }
    run = build_run(validate(Recipe, settings, "the benchmark's recipe"))
    prepare_folder(run)
    return Trainer(
        run, TrainerState(0, 0), MetricLogger(folder, 0, run.recipe.training.steps, tensorboard=True, silent=True)
    )


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runtime.peak_flops(torch.device("cpu"))
    spent_seconds: dict[str, list[tuple[float, float]]] = {
        name: [] for name in ("step", "held", "written", "health", "log")
    }
    with tempfile.TemporaryDirectory() as place:
        training = begin(Path(place, "run"), options.width, options.depth, options.batch)
        batches = training.run.loader.batches()
        batch = next(batches)
        metrics = training._train_step(batch)

        def step() -> None:
            nonlocal batch, metrics
            batch = next(batches)
            metrics = training._train_step(batch)
            training.recovery.check(training.recovery.detector.read(), last=False)

        for number in range(options.rounds + 1):  # the first warms up
            before = [timed(step) for _ in range(2)]
            blocked = timed(training._save)
            meanwhile = []
            while training.writer.busy:
                meanwhile.append(timed(step))
            training.writer.wait()
            after = [timed(step) for _ in range(2)]
            plain = [statistics.median(values) for values in zip(*before, *after)]
            if number:
                spent_seconds["step"] += before + after
                spent_seconds["held"].append(blocked)
                extra = [sum(values) - len(meanwhile) * usual for values, usual in zip(zip(*meanwhile), plain)]
                spent_seconds["written"].append((blocked[0] + extra[0], blocked[1] + extra[1]))
            for name, work in (("health", lambda: training._record_health(batch, metrics)), ("log", training._log)):
                spent = timed(work)
                if number:
                    spent_seconds[name].append(spent)
        batches.close()
        training.writer.close()
        size = sum(path.stat().st_size for path in bundle.checkpoints(Path(place, "run"))[0].rglob("*"))
        training.logger.close()
    every = TrainingConfig(steps=1)
    intervals = {
        "held": every.checkpoint_every,
        "written": every.checkpoint_every,
        "health": every.health_every or 1,
        "log": every.log_every,
    }
    medians = {name: [statistics.median(values) for values in zip(*spent)] for name, spent in spent_seconds.items()}
    wall, cpu = medians["step"]
    print(f"{parameter_count(training.run.network):,} parameters, a checkpoint of {size / 1e6:.0f} MB; ", end="")
    print(f"a step of {options.batch}: {wall:.2f} s wall, {cpu:.2f} s CPU (medians of {options.rounds} rounds)\n")
    print("| what | interval, steps | wall, ms | CPU, ms | fraction of the steps, wall | fraction of the steps, CPU |")
    print("|---|---|---|---|---|---|")
    for name, interval in intervals.items():
        shares = [spent / (interval * usual) for spent, usual in zip(medians[name], (wall, cpu))]
        spent = [f"{1000 * value:.1f}" for value in medians[name]]
        print(f"| {name} | {interval} | {' | '.join(spent)} | {' | '.join(f'{share:.3%}' for share in shares)} |")


if __name__ == "__main__":
    main()
