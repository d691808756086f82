"""A dry run: a few real steps and a checkpoint, to estimate what the whole run needs."""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tessera import generation, power_ema, runtime
from tessera.errors import TesseraError
from tessera.generation.bulk import bulk_request
from tessera.models.network import parameter_count
from tessera.planning.trace import meta_network
from tessera.reporting.text import format_duration
from tessera.training import checkpoint
from tessera.training.checkpoint import CheckpointWriter, TrainerState
from tessera.training.plan_recipe import text_summary
from tessera.training.recipe import Recipe
from tessera.training.resume import check_compatible, find_checkpoint
from tessera.training.run import TrainingRun, build_run, save_checkpoint
from tessera.training.samples import images_per_grid, num_grids
from tessera.training.step import train_step


@dataclass(frozen=True)
class RunEstimate:
    """What a run needs, as a dry run measured it."""

    parameters: int
    gmacs: float
    images: int
    seconds_per_step: float
    seconds: float
    peak_bytes: int
    checkpoint_bytes: int
    invalid_samples: int
    text: str = ""  # the text encoder and the captions; "" without text
    trained_parameters: int = 0
    base_bytes: int = 0  # of the copy of the weights below an adapter, on disk; 0 if all weights are trained
    num_snapshots: int = 0  # of averages, from which others are computed
    snapshot_bytes: int = 0  # of one

    def __str__(self) -> str:
        invalid = f", {self.invalid_samples} invalid so far" if self.invalid_samples else ""
        return "\n".join(
            (
                f"network      {self.parameters:,} parameters, {self.gmacs:.4g} GMACs per forward pass",
                f"data         {self.images:,} images{invalid}",
                *([f"adapter      {self.trained_parameters:,} parameters are trained"] if self.base_bytes else []),
                *([f"text         {self.text}"] if self.text else []),
                f"step         {self.seconds_per_step * 1000:.4g} ms",
                f"run          {format_duration(self.seconds)}",
                f"peak memory  {self.peak_bytes / 2**20:,.0f} MiB",
                f"disk         {self.checkpoint_bytes / 2**20:,.0f} MiB per checkpoint"
                + (f", and {self.base_bytes / 2**20:,.0f} MiB for the base" if self.base_bytes else "")
                + (
                    f", and {self.num_snapshots * self.snapshot_bytes / 2**20:,.0f} MiB for {self.num_snapshots} "
                    f"snapshots of the EMA, {self.snapshot_bytes / 2**20:.3g} MiB each"
                    if self.num_snapshots
                    else ""
                ),
            )
        )


def dry_run(
    recipe: Recipe, resume: str = "auto", steps: int = 3, log: Callable[[str], None] = lambda text: None
) -> RunEstimate:
    """Do everything that a run does, a few times, on the real data, in a temporary folder.

    log: called with what the start of the run states. Raises the TesseraError that the run would raise.
    """
    run_dir = checkpoint.local_folder(recipe.run_dir)
    path = find_checkpoint(run_dir, resume)
    _check_writable(run_dir)
    with tempfile.TemporaryDirectory(prefix=".tessera-", dir=_existing_parent(run_dir.absolute())) as scratch:
        run = build_run(recipe.model_copy(update={"run_dir": scratch}), path, log=log)
        if path is not None:
            check_compatible(run, path)
        config, device = run.recipe.training, run.ema_model.device
        base_bytes = sum(tensor.nbytes for tensor in (run.base or {}).values())
        run.base = None
        batches = run.loader.batches()
        times = []
        try:
            for step in range(1 + steps):  # the first one is a warm-up
                start = time.monotonic()
                train_step(run.state, next(batches), run.objective, config.global_batch_size, run.accumulation_steps)
                run.ema.update(step + 1)
                runtime.synchronize(device)
                times.append(time.monotonic() - start)
        finally:
            batches.close()
        seconds_per_step = sorted(times[1:])[len(times[1:]) // 2]
        writer = CheckpointWriter(Path(scratch))
        save_checkpoint(run, writer, TrainerState(1, config.global_batch_size))
        writer.wait()
        num_snapshots = config.ema.num_snapshots(config.steps, config.steps)
        if num_snapshots:
            writer.save_snapshot(1, run.ema)
            writer.wait()
        snapshot_bytes = sum(path.stat().st_size for path in power_ema.snapshot_files(Path(scratch)).values())
        writer.close()
        files = checkpoint.checkpoint_path(Path(scratch), 1).rglob("*")
        size = sum(file.stat().st_size for file in files if file.is_file())
        free = shutil.disk_usage(_existing_parent(run_dir)).free
        needed = size * (config.keep_last + 1) + base_bytes + num_snapshots * snapshot_bytes
        if needed > free:
            what = "checkpoints and snapshots of the EMA" if num_snapshots else "checkpoints"
            raise TesseraError(f"{what} need {needed / 2**30:.2f} GiB, the disk has {free / 2**30:.2f} GiB free")
        text = run.loader.dataset.text
        trained = sum(weight.numel() for weight in run.network.parameters() if weight.requires_grad)
        return RunEstimate(
            parameters=parameter_count(meta_network(run.recipe.network)),
            gmacs=run.macs / 1e9,
            images=len(run.loader.dataset),
            seconds_per_step=seconds_per_step,
            seconds=seconds_per_step * config.steps + _sampling_seconds(run),
            peak_bytes=runtime.peak_memory(device),
            checkpoint_bytes=size,
            invalid_samples=len(run.loader.invalid_samples),
            text="" if text is None else text_summary(run.recipe, text.sizes),
            trained_parameters=trained,
            base_bytes=base_bytes,
            num_snapshots=num_snapshots,
            snapshot_bytes=snapshot_bytes,
        )


def _sampling_seconds(run: TrainingRun) -> float:
    """The time of all grids and scored samples of a run, estimated from one batch with few steps."""
    config, evaluation = run.recipe.training, run.recipe.evaluation
    count, num_steps = 16, min(2, run.recipe.sampling.num_steps)
    start = time.monotonic()
    settings = {"num_steps": num_steps}
    request = bulk_request(run.ema_model, count, "balanced", data=run.loader.dataset, settings=settings)
    generation.generate_request(run.ema_model, request)
    seconds = (time.monotonic() - start) / count / num_steps
    images = num_grids(run.recipe) * images_per_grid(run.recipe)
    images += evaluation.num_samples * evaluation.count(config.steps)
    return seconds * run.recipe.sampling.num_steps * images


def _existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _check_writable(run_dir: Path) -> None:
    parent = _existing_parent(run_dir.absolute())
    if not parent.is_dir():
        raise TesseraError(f"cannot write to run_dir={run_dir}: {parent} is a file, not a folder")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise TesseraError(f"cannot write to {run_dir}: {error.strerror or error}") from None
