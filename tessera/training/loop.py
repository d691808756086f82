"""The training loop: resume, train, log, sample, save, and stop so that the run can be resumed."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from torch import distributed

from tessera import bundle, clips, images, runtime
from tessera.data import Batch
from tessera.errors import Interrupted, TesseraError
from tessera.files import atomic_write, exclusive_lock
from tessera.monitoring import health
from tessera.monitoring.logger import MetricLogger
from tessera.planning import FLOPS_PER_MAC
from tessera.runtime import Distributed
from tessera.training import checkpoint, parallel, scores
from tessera.training.checkpoint import CheckpointWriter, TrainerState
from tessera.training.objective import probe_inputs
from tessera.training.optimizers import learning_rate, set_learning_rate
from tessera.training.recipe import Recipe
from tessera.training.recovery import Recovery
from tessera.training.resume import changed_data, changed_settings, find_checkpoint, restore_run
from tessera.training.run import (
    INIT_REPORT,
    SAMPLES,
    SHORT_SAMPLES,
    SKIPPED_SAMPLES,
    TrainingRun,
    build_run,
    prepare_folder,
    prune_checkpoints,
    save_checkpoint,
    unusable_classes,
)
from tessera.training.samples import sample_grid
from tessera.training.schedule import Stopwatch, due_after
from tessera.training.signals import stop_signals
from tessera.training.step import MetricAccumulator, StepMetrics, train_step

# Settings whose change may change the usual size of losses and gradients.
AFFECTS_LOSS = (
    "data.",
    "codec.",
    "diffusion.",
    "training.global_batch_size",
    "training.condition_dropout",
    "training.optimizer.",
)


def train(recipe: Recipe, resume: str = "auto") -> Path:
    """Train a recipe and return the folder of the run. The processes that torchrun started train together.

    resume: "auto" resumes from the newest valid checkpoint in the folder of the run, if there is one; "never" refuses a
    folder that holds a run; a path resumes from that run or checkpoint. Ctrl-C and SIGTERM save a checkpoint and raise
    Interrupted.
    """
    run_dir, remote = checkpoint.local_folder(recipe.run_dir), checkpoint.remote_run(recipe.run_dir)
    device = runtime.choose_device(recipe.training.device)
    with (
        runtime.distributed_session(device) as world,
        _report_lost_ranks(run_dir, world),
        _local_copy(remote, recipe.training.keep_last, world),
    ):
        is_locked = world.is_main and remote is None  # a local copy is locked already

        def log(text: str) -> None:  # until there is a MetricLogger
            if world.is_main:
                print(text, file=sys.stderr, flush=True)

        def quarantine(path: Path, problems: list[str]) -> None:
            log(f"{path} is damaged ({'; '.join(problems[:3])}): it is renamed, and an earlier checkpoint is used")
            if world.is_main:
                checkpoint.quarantine(path)

        with exclusive_lock(run_dir) if is_locked and run_dir.exists() else nullcontext():
            path = find_checkpoint(run_dir, resume, world, quarantine)
        run = build_run(recipe, path, world, log)
        run.remote = remote if world.is_main else None
        state = restore_run(run, path)
        with exclusive_lock(run_dir) if is_locked else nullcontext():
            if world.is_main:
                prepare_folder(run)
            world.barrier()
            if run.scorer is not None and world.is_main:
                run.scorer.begin(state.step)
            config = run.recipe.training
            logger = MetricLogger(run_dir, state.step, config.steps, config.tensorboard, silent=not world.is_main)
            try:
                Trainer(run, state, logger).train(path)
            finally:
                logger.close()
    return run_dir


@contextmanager
def _local_copy(remote: checkpoint.RemoteRun | None, keep: int, world: Distributed) -> Iterator[None]:
    """Hold the folder of a run in a bucket, download it, and upload the rest at the end. keep: checkpoints."""
    if remote is None:
        yield
        return
    if int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size)) < world.world_size:
        raise TesseraError(
            f"run_dir={remote.address} is in a bucket, which works for the processes of one machine: give a folder "
            "that all machines share"
        )
    if not world.is_main:
        world.barrier()
        yield
        return

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with exclusive_lock(remote.local, name=remote.address), remote.exclusive(log):
        remote.pull(keep)
        world.barrier()
        try:
            yield
        except BaseException:
            with suppress(TesseraError):  # the first error is the one to report
                remote.push()
            raise
        remote.push()


@contextmanager
def _report_lost_ranks(run_dir: Path, world: Distributed) -> Iterator[None]:
    """If another rank is gone, raise an error about that instead of the error of the failed communication."""
    try:
        yield
    except (RuntimeError, distributed.DistError) as error:
        lost = isinstance(error, distributed.DistError) or "gloo" in str(error).lower()
        if world.world_size == 1 or not lost:
            raise
        saved = bundle.checkpoints(run_dir)
        raise TesseraError(
            f"process {world.rank} of {world.world_size} lost the others: one of them ended, or the network between "
            f"them failed; the last checkpoint is {saved[0] if saved else 'not written yet'}; run the same command "
            "again to resume"
        ) from error


class Trainer:
    """The steps of a run, from a position to its end."""

    def __init__(self, run: TrainingRun, state: TrainerState, logger: MetricLogger) -> None:
        self.run, self.logger, self.world = run, logger, run.parallel.world
        self.config = run.recipe.training
        self.step, self.position = state.step, state.position
        self.writer = CheckpointWriter(run.run_dir, self.world, run.remote)
        self.recovery = Recovery(run, state, self.writer, logger)
        self.metrics, self.stopwatch = MetricAccumulator(), Stopwatch()
        self.invalid_samples: dict[str, str] = {}
        self.invalid_rows: set[int] = set()
        self.short_samples: dict[str, str] = {}
        self.unusable_classes: set[str] = set()
        self.num_checked = -1  # invalid rows at the last look for classes without a usable image

    def train(self, resumed_from: Path | None) -> None:
        """Train until the last step. Raises Interrupted or TesseraError; the run can be resumed after both."""
        run, config, logger = self.run, self.config, self.logger
        self._log_start(resumed_from)
        score_due = run.scorer is not None and run.recipe.evaluation.due(self.step, config.steps)
        if score_due and self.step not in self.world.broadcast(list(scores.history(run.run_dir))):
            self._score()  # the run was killed between the checkpoint and its scores
        if self.step >= config.steps:
            if config.sample_every is not None and not self.world.broadcast(self._grid_path.exists()):
                self._sample()  # the run was killed before the last grid
            logger.info(f"nothing left to do: {self.step} of {config.steps} steps are done")
            return
        try:
            with stop_signals() as signals:
                if self.step == 0:
                    if config.sample_every is not None:
                        logger.info("sampling the first grid")
                        self._sample()
                    if resumed_from is None:
                        if self.world.is_main:
                            run.delete_saved_after(-1)
                        self._save()  # for rollbacks
                elif self.world.is_main:
                    run.delete_saved_after(self.step)  # averages of a process that was killed
                logger.start(self.step)
                self.stopwatch = Stopwatch()
                while self.step < config.steps:
                    self._train_steps(signals)
            self.writer.wait()
        finally:
            self.writer.close()
        if self.invalid_samples:
            path = run.run_dir / SKIPPED_SAMPLES
            logger.info(f"{len(self.invalid_samples)} images could not be used: {path} lists them")
        logger.info(f"trained {config.steps} steps; the model is in {run.address}")

    def _log_start(self, resumed_from: Path | None) -> None:
        run, info = self.run, self.logger.info
        if self.world.world_size > 1:
            info(
                f"{self.world.world_size} ranks: {run.parallel.replicas} copies of the weights, each in "
                f"{run.parallel.shards} shards"
            )
        if resumed_from is not None:
            info(f"resuming from step {self.step} ({resumed_from})")
            for change in [*changed_settings(run, resumed_from), *changed_data(run, resumed_from)]:
                info(f"changed since the checkpoint: {change}")
                if change.startswith(AFFECTS_LOSS):
                    self.recovery.detector.restore({})
            for part in checkpoint.missing_state(resumed_from, run.network, run.ema, run.state.optimizer):
                info(f"not in the checkpoint, begins now: {part}")
        if run.init_report:
            path = run.run_dir / INIT_REPORT
            if self.world.is_main:
                atomic_write(path, run.init_report + "\n")
            info(f"started from {run.recipe.training.init_from}: {path} lists the weights that were taken")

    def _train_steps(self, signals: list[int]) -> None:
        """Train until the last step or a rollback."""
        run, config = self.run, self.config
        batches = run.loader.batches(self.position)
        try:
            while self.step < config.steps:
                run.parallel.begin_flag_reduction(bool(signals), self.writer.failed)
                with self.stopwatch.measure("waiting"):
                    batch = next(batches)
                metrics = self._train_step(batch)
                stopping, failed = run.parallel.reduced_flags(bool(signals), self.writer.failed)
                if failed:
                    self.writer.wait()  # raises the error
                due = due_after(run.recipe, self.step, stopping)
                detector = self.recovery.detector
                state = self.recovery.check(detector.read(wait=due.save or due.snapshot), due.last)
                if state is not None:
                    self.step, self.position = state.step, state.position
                    self.metrics, self.stopwatch = MetricAccumulator(), Stopwatch()
                    return
                good = not detector.consecutive_bad  # otherwise the weights may be bad
                if due.health:
                    with self.stopwatch.measure("paused"):
                        self._record_health(batch, metrics)
                if due.log:
                    self._log()
                self.logger.advance(self.step)
                with self.stopwatch.measure("paused"):
                    if due.snapshot and good:
                        run.ema.synchronize()
                        self.writer.save_snapshot(self.step, run.ema)
                    if due.save and (good or stopping):
                        self._save()
                    if due.score and good:
                        self._score()
                    if due.sample:
                        self._sample()
                if stopping and not due.last:
                    self.writer.wait()
                    raise Interrupted(
                        f"stopped at step {self.step} of {config.steps}, everything is saved in {run.address}\n"
                        "run the same command again to resume"
                    )
        finally:
            batches.close()

    def _train_step(self, batch: Batch) -> StepMetrics:
        run, config, detector = self.run, self.config, self.recovery.detector
        start = run.loader.next_position(self.position)
        set_learning_rate(run.state.optimizer, learning_rate(config.optimizer, self.step, config.steps))
        limits = torch.tensor(detector.limits)
        metrics = train_step(run.state, batch, run.objective, config.global_batch_size, run.accumulation_steps, limits)
        self.step, self.position = self.step + 1, start + config.global_batch_size
        run.ema.update(self.step)
        self.metrics.add(metrics)
        values = metrics.values
        detector.send(self.step, start, metrics.applied, values["loss"], values["grad_norm"])
        return metrics

    def _log(self) -> None:
        run, skipped = self.run, self.recovery.skipped
        steps, means = self.metrics.steps, self.metrics.means()
        with self.stopwatch.measure("paused"):
            loader = run.loader
            facts = dict(loader.invalid_samples), set(loader.invalid_rows), dict(loader.short_samples)
            for part, rows, short in self.world.gather(facts):
                self.invalid_samples |= part
                self.invalid_rows |= rows
                self.short_samples |= short
            self._write_samples(SKIPPED_SAMPLES, self.invalid_samples, "skipping images that cannot be used")
            how = getattr(run.recipe.data, "short", "")
            self._write_samples(SHORT_SAMPLES, self.short_samples, f"using short clips as data.short={how} specifies")
            self._report_unusable_classes()
            device = run.ema_model.device
            memory = max(self.world.gather(runtime.peak_memory(device)))
        seconds, waited = self.stopwatch.lap()
        rate = steps * self.config.global_batch_size / seconds
        mfu = {}
        if device.type != "cpu":  # whose peak depends on the load of the machine when it was measured
            peak_flops = runtime.peak_flops(device, run.objective.dtype or torch.float32)
            mfu["mfu"] = rate * FLOPS_PER_MAC * run.macs / peak_flops / self.world.world_size
        self.logger.record(
            self.step,
            **means,
            learning_rate=run.state.optimizer.param_groups[0]["lr"],
            images_per_second=rate,
            **mfu,
            data_wait=waited / seconds,
            skipped_steps=skipped.count,
            rollbacks=skipped.rollbacks,
            invalid_samples=len(self.invalid_samples),
            epoch=self.position / len(run.loader.dataset),
            memory=memory,
        )

    def _write_samples(self, file: str, samples: dict[str, str], what: str) -> None:
        """List samples with something in common in a file of the run, and report the first."""
        if not samples or not self.world.is_main:
            return
        path = self.run.run_dir / file
        old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        lines = list(dict.fromkeys(old + [f"{name}\t{reason}" for name, reason in samples.items()]))
        if lines == old:
            return
        atomic_write(path, "\n".join(lines) + "\n")
        if not old:
            name, reason = next(iter(samples.items()))
            self.logger.info(f"{what}, for example {name} ({reason}); {path} lists all")

    def _report_unusable_classes(self) -> None:
        if len(self.invalid_rows) == self.num_checked:
            return
        self.num_checked = len(self.invalid_rows)
        names = unusable_classes(self.run.loader.dataset, self.invalid_rows) - self.unusable_classes
        self.unusable_classes |= names
        if names:
            self.logger.info(
                f"none of the images of {len(names)} classes can be used ({', '.join(sorted(names)[:5])}): the network "
                "learns nothing of them, and they stay classes; remove them from the data, or repair their images"
            )

    def _record_health(self, batch: Batch, metrics: StepMetrics) -> None:
        run = self.run
        names, _ = run.state.parameter_groups
        distance, norm = run.parallel.all_reduce_sum(run.ema.squared_distance())
        objective, inputs = run.objective, probe_inputs(batch, run.objective, run.state.device)
        settings = objective.diffusion, run.recipe.network.num_classes, objective.dtype
        probe = health.probe(run.network, run.ema.network, *inputs, *settings)
        if objective.distillation is not None:
            x0, condition, noise = inputs
            with torch.compiler.set_stance("force_eager"):
                errors = objective.distillation.errors(run.ema.network, x0, noise, condition)
            probe["average_velocity_error"] = errors
            values = ", ".join(f"{error:.2g} ({step})" for step, error in errors.items())
            self.logger.info(f"error of the average velocity, relative to the teacher's path: {values}")
        for network in (run.network, run.ema.network):
            parallel.reshard(network)
        values = {
            "loss_by_timestep": self.metrics.loss_by_timestep(),
            "grad_norms": dict(zip(names, metrics.group_squared_norms.sqrt().tolist())),
            "ema_distance": (distance / norm.clamp(min=1e-30)).sqrt().item(),
        }
        self.logger.health(self.step, values | probe)

    def _save(self) -> None:
        spike_detector = self.recovery.detector.state()
        mode, data = self.run.compile_mode, self.run.data_fingerprint
        state = TrainerState(self.step, self.position, spike_detector, mode, data)
        save_checkpoint(self.run, self.writer, state)

    def _score(self) -> None:
        """Score the EMA model, log the scores, and prune the checkpoints."""
        run, logger, step = self.run, self.logger, self.step
        assert run.scorer is not None
        logger.info(f"sampling {run.recipe.evaluation.num_samples} images to score step {step}")
        try:
            metrics = run.scorer.score(step, run.full_ema_model(), self.world, logger.progress)
            if not self.world.is_main:
                return
            logger.record(step, **metrics)
            history = scores.history(run.run_dir)
            if best := scores.best(history):
                best_step, score = best
                current = history[step][score.metric].value
                logger.info(
                    f"{score.metric} {current:.5g}; the best is {score.value:.5g} at step {best_step}, which is kept"
                )
            scores.plot(history, run.run_dir / scores.FOLDER / "curve.png")
            if not self.writer.busy:
                prune_checkpoints(run)
        except (TesseraError, OSError, RuntimeError) as error:  # a full disk or GPU must not end a run of days
            if self.world.world_size > 1:
                raise  # the other ranks wait for this one
            logger.info(f"step {step} could not be scored: {error}")
        finally:
            run.unload_text_encoder()

    @property
    def _grid_path(self) -> Path:
        return self.run.run_dir / SAMPLES / f"step-{self.step:09d}.png"

    def _sample(self) -> None:
        """Save a grid of samples of the EMA model."""
        run = self.run
        model = run.full_ema_model()
        if self.world.is_main:
            grid, animation = sample_grid(run.recipe, model, run.loader.dataset)
            if animation is not None:
                clips.save_clip(self._grid_path.with_suffix(".webp"), animation, clips.frame_rate(run.recipe.data))
            images.save_png(self._grid_path, grid)
            self.logger.image(self.step, grid)
        run.unload_text_encoder()
        self.world.barrier()
