"""A dry run: everything a run does, a few times, to tell what the whole will take before it is spent."""

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tessera import runtime
from tessera.errors import TesseraError
from tessera.generation import pipeline
from tessera.reporting.text import format_duration
from tessera.training import loop
from tessera.training.checkpoint import checkpoint
from tessera.training.checkpoint.checkpoint import CheckpointWriter, TrainerState
from tessera.training.recipe import Recipe
from tessera.training.run import TrainingRun, build_run, check_agreement, checkpoint_to_resume
from tessera.training.step import train_step


@dataclass(frozen=True)
class Estimate:
    """What a dry run learns."""

    parameters: int
    gmacs: float
    images: int
    seconds_per_step: float
    seconds: float
    peak_bytes: int
    checkpoint_bytes: int
    skipped: int

    def __str__(self) -> str:
        return "\n".join(
            (
                f"network      {self.parameters:,} parameters, {self.gmacs:.4g} Gflops (multiply-adds) a forward pass",
                f"data         {self.images:,} images" + (f", {self.skipped} skipped so far" if self.skipped else ""),
                f"a step       {self.seconds_per_step * 1000:.4g} ms",
                f"the run      {format_duration(self.seconds)}",
                f"peak memory  {self.peak_bytes / 2**20:,.0f} MiB",
                f"disk         {self.checkpoint_bytes / 2**20:,.0f} MiB a checkpoint",
            )
        )


def dry_run(recipe: Recipe, resume: str = "auto", steps: int = 3) -> Estimate:
    """Everything a run does, a few times, on real data, into a folder that is thrown away.

    Tells what the whole run will take. Raises the TesseraError that the run would raise.
    """
    found = checkpoint_to_resume(Path(recipe.run_dir), resume)
    _writable(Path(recipe.run_dir))
    with tempfile.TemporaryDirectory(prefix=".tessera-", dir=_existing(Path(recipe.run_dir).absolute())) as scratch:
        run = build_run(recipe.model_copy(update={"run_dir": scratch}), found)
        if found is not None:
            check_agreement(run, found)
        config, device = run.recipe.training, run.ema_model.device
        batches = run.loader.batches()
        times = []
        try:
            for step in range(1 + steps):  # the first warms up
                began = time.monotonic()
                train_step(run.state, next(batches), run.objective, config.global_batch_size, run.accumulation_steps)
                run.ema.update(step + 1)
                runtime.synchronize(device)
                times.append(time.monotonic() - began)
        finally:
            batches.close()
        seconds = sorted(times[1:])[len(times[1:]) // 2]
        writer = CheckpointWriter(Path(scratch))
        loop.save(run, writer, TrainerState(1, config.global_batch_size))
        writer.wait()
        writer.close()
        saved = checkpoint.checkpoint_path(Path(scratch), 1).rglob("*")
        size = sum(file.stat().st_size for file in saved if file.is_file())
        free = shutil.disk_usage(_existing(Path(recipe.run_dir))).free
        needed = size * (config.keep_last + 1)
        if needed > free:
            raise TesseraError(f"checkpoints need {needed / 2**30:.2f} GiB, the disk has {free / 2**30:.2f} GiB free")
        return Estimate(
            parameters=sum(parameter.numel() for parameter in run.network.parameters()),
            gmacs=run.macs / 1e9,
            images=len(run.loader.dataset),
            seconds_per_step=seconds,
            seconds=seconds * config.steps + _drawing_seconds(run),
            peak_bytes=runtime.peak_memory(device),
            checkpoint_bytes=size,
            skipped=len(run.loader.invalid_samples),
        )


def _drawing_seconds(run: TrainingRun) -> float:
    """What the grids and the pictures that are scored take in a whole run, from a short drawing of one batch."""
    config, network, evaluation = run.recipe.training, run.recipe.network, run.recipe.evaluation
    count, steps = 16, min(2, run.recipe.sampling.num_steps)
    began = time.monotonic()
    pipeline.generate(run.ema_model, [0] if network.num_classes else None, list(range(count)), steps=steps)
    seconds = (time.monotonic() - began) / count / steps
    pictures_each = (min(network.num_classes, loop.COLUMNS) or 8) * config.sample_seeds
    pictures = pictures_each * (config.steps // config.sample_every + 2)
    pictures += evaluation.num_samples * sum(evaluation.due(step, config.steps) for step in range(1, config.steps + 1))
    return seconds * run.recipe.sampling.num_steps * pictures


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _writable(folder: Path) -> None:
    place = _existing(folder.absolute())
    if not place.is_dir():
        raise TesseraError(f"cannot write to output={folder}: {place} is a file, not a folder")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise TesseraError(f"cannot write to {folder}: {error.strerror or error}") from None
