"""The run itself: resume, step, watch, log, draw, save, and end resumable whatever happens."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed

import tessera
from tessera import bundle, images, runtime
from tessera.data import Batch
from tessera.errors import TesseraError
from tessera.files import atomic_write, exclusive_lock
from tessera.generation import pipeline
from tessera.monitoring import health
from tessera.monitoring.logger import MetricLogger
from tessera.monitoring.spikes import SkippedSteps, SpikeDetector, StepRecord
from tessera.runtime import Distributed
from tessera.training import parallel, scores
from tessera.training.checkpoint import checkpoint
from tessera.training.checkpoint.checkpoint import CheckpointWriter, TrainerState
from tessera.training.optimizers import learning_rate, set_learning_rate
from tessera.training.recipe import Recipe
from tessera.training.run import (
    INIT,
    SAMPLES,
    SKIPPED,
    TrainingRun,
    build_run,
    changed,
    check_agreement,
    checkpoint_to_resume,
    prepare_folder,
)
from tessera.training.step import MetricAccumulator, StepMetrics, train_step

COLUMNS = 16  # of a grid of samples, at most
# Changes after which losses and gradients may be of another size than those before.
OTHER_LOSSES = (
    "data.",
    "codec.",
    "process.",
    "training.global_batch_size",
    "training.label_dropout",
    "training.optimizer.",
)


class Interrupted(TesseraError):
    """The run was asked to stop, and is saved."""

    exit_code = 130  # as a shell reports Ctrl-C


def train(recipe: Recipe, resume: str = "auto") -> Path:
    """Train as the recipe says and return the run's folder. Processes that torchrun started train together.

    resume: auto goes on from the newest whole checkpoint in the run's folder, if there is one; never refuses a folder
    that holds a run; a path goes on from that checkpoint. Ctrl-C and SIGTERM save and end by Interrupted.
    """
    folder = Path(recipe.run_dir)
    with runtime.distributed_session(runtime.choose_device(recipe.training.device)) as ranks, _together(folder, ranks):

        def say(text: str) -> None:  # before there is a journal
            if ranks.is_main:
                print(text, file=sys.stderr, flush=True)

        def set_aside(path: Path, faults: list[str]) -> None:
            say(f"{path} is damaged ({'; '.join(faults[:3])}): it is set aside, and the one before is taken")
            if ranks.is_main:
                checkpoint.quarantine(path)

        with exclusive_lock(folder) if ranks.is_main and folder.exists() else nullcontext():
            found = checkpoint_to_resume(folder, resume, ranks, set_aside)
        run = build_run(recipe, found, ranks, say)
        place = TrainerState(step=0, position=0)
        if found is not None:
            check_agreement(run, found)
            place = checkpoint.restore(found, run.network, run.ema, run.state.optimizer)
        with exclusive_lock(folder) if ranks.is_main else nullcontext():
            if ranks.is_main:
                prepare_folder(run)
            ranks.barrier()
            if run.scorer is not None and ranks.is_main:
                run.scorer.begin(place.step)
            config = run.recipe.training
            journal = MetricLogger(folder, place.step, config.steps, config.tensorboard, silent=not ranks.is_main)
            try:
                Training(run, place, journal).go(found)
            finally:
                journal.close()
    return folder


@contextmanager
def _together(folder: Path, ranks: Distributed) -> Iterator[None]:
    """Where another process is gone, say so: what this one was doing is no news."""
    try:
        yield
    except (RuntimeError, distributed.DistError) as error:
        lost = isinstance(error, distributed.DistError) or "gloo" in str(error).lower()
        if ranks.world_size == 1 or not lost:
            raise
        present = bundle.checkpoints(folder)
        raise TesseraError(
            f"process {ranks.rank} of {ranks.world_size} lost the others: one of them ended, or the network between them "
            f"did; the last checkpoint is {present[0] if present else 'not written yet'}; run the same command again "
            "to go on"
        ) from error


class Training:
    """The steps of a run, from a place in it to its end."""

    def __init__(self, run: TrainingRun, place: TrainerState, journal: MetricLogger) -> None:
        self.run, self.journal, self.ranks = run, journal, run.parallel.ranks
        self.config = run.recipe.training
        self.step, self.position = place.step, place.position
        self.watch = SpikeDetector(self.config.stability, run.ema_model.device)
        self.watch.restore(place.spike_detector)
        self.passed = SkippedSteps(run.run_dir, place.step)
        run.loader.skipped_positions = self.passed.positions
        self.tally, self.clock = MetricAccumulator(), Clock()
        self.writer = CheckpointWriter(run.run_dir, self.ranks)
        self.skipped_images: dict[str, str] = {}

    def go(self, found: Path | None) -> None:
        """Train until the last step. Raises Interrupted, or the TesseraError that ends the run; it can go on."""
        run, config, journal = self.run, self.config, self.journal
        self._greet(found)
        due = run.scorer is not None and run.recipe.evaluation.due(self.step, config.steps)
        if due and self.step not in self.ranks.broadcast(list(scores.history(run.run_dir))):
            self._score()  # killed between the checkpoint and its scores
        if self.step >= config.steps:
            if not self.ranks.broadcast(self._sheet.exists()):
                self._draw()  # killed before it
            journal.info(f"nothing left to do: {self.step} of {config.steps} steps are done")
            return
        try:
            with stop_signals() as stopping:
                if self.step == 0:
                    journal.info("drawing the first grid of samples")
                    self._draw()
                    if found is None:
                        if self.ranks.is_main:
                            checkpoint.delete_after(run.run_dir, -1)
                        self._save()  # to go back to
                journal.start(self.step)
                self.clock = Clock()
                while self.step < config.steps:
                    self._leg(stopping)
            self.writer.wait()
        finally:
            self.writer.close()
        if self.skipped_images:
            journal.info(f"{len(self.skipped_images)} images could not be used: {run.run_dir / SKIPPED} names them")
        journal.info(f"trained {config.steps} steps; the model is in {run.run_dir}")

    def _greet(self, found: Path | None) -> None:
        """Say where the run starts from."""
        run, say = self.run, self.journal.info
        if self.ranks.world_size > 1:
            say(
                f"{self.ranks.world_size} processes: {run.parallel.replicas} copies of the weights, each in {run.parallel.shards}"
            )
        if found is not None:
            say(f"going on from step {self.step} ({found})")
            for change in changed(run, found):
                say(f"changed since: {change}")
                if change.startswith(OTHER_LOSSES):
                    self.watch.restore({})
            for what in checkpoint.missing_state(found, run.network, run.ema, run.state.optimizer):
                say(f"begins anew: {what}")
        if run.init_report:
            if self.ranks.is_main:
                atomic_write(run.run_dir / INIT, run.init_report + "\n")
            say(f"started from {run.recipe.training.init_from}: see {run.run_dir / INIT} for what was kept")

    def _leg(self, stopping: list[int]) -> None:
        """Steps until the last, or until the run has gone back to an earlier one."""
        run, config = self.run, self.config
        batches = run.loader.batches(self.position)
        try:
            while self.step < config.steps:
                run.parallel.begin_flag_reduction(bool(stopping), self.writer.failed)
                with self.clock.stalled():
                    batch = next(batches)
                told = self._one_step(batch)
                stop, failed = run.parallel.reduced_flags(bool(stopping), self.writer.failed)
                if failed:
                    self.writer.wait()  # raises what befell it
                last = self.step == config.steps
                judged = run.scorer is not None and run.recipe.evaluation.due(self.step, config.steps) and not stop
                saves = self.step % config.checkpoint_every == 0 or judged or last or stop
                if self._heed(self.watch.read(wait=saves), last):
                    return
                sound = not self.watch.consecutive_bad  # else the weights may be what is bad
                with self.clock.paused():
                    if config.health_every and self.step % config.health_every == 0:
                        self._look_inside(batch, told)
                if self.step % config.log_every == 0 or last:
                    self._log()
                self.journal.advance(self.step)
                with self.clock.paused():
                    if saves and (sound or stop):
                        self._save()
                    if judged and sound:
                        self._score()
                    if (self.step % config.sample_every == 0 and not stop) or last:
                        self._draw()
                if stop and not last:
                    self.writer.wait()
                    raise Interrupted(
                        f"stopped at step {self.step} of {config.steps}, everything saved in {run.run_dir}\n"
                        "run the same command again to go on"
                    )
        finally:
            batches.close()

    def _one_step(self, batch: Batch) -> StepMetrics:
        run, config = self.run, self.config
        start = run.loader.start(self.position)
        set_learning_rate(run.state.optimizer, learning_rate(config.optimizer, self.step, config.steps))
        limits = torch.tensor(self.watch.limits)
        told = train_step(run.state, batch, run.objective, config.global_batch_size, run.accumulation_steps, limits)
        self.step, self.position = self.step + 1, start + config.global_batch_size
        run.ema.update(self.step)
        self.tally.add(told)
        self.watch.send(self.step, start, told)
        return told

    # What goes wrong

    def _heed(self, seen: list[StepRecord], last: bool) -> bool:
        """Note the steps that were kept out of the weights; go back if they do not end, and say whether it was so.

        The last step must be a good one: what it leaves is the model.
        """
        bad = [one for one in seen if not one.applied]
        for one in bad:
            self.passed.add(one, self.run.loader.names(one.position))
            self.journal.info(f"step {one.step} is kept out of the weights: {one.why}")
        if bad and self.ranks.is_main:
            self.passed.write()
        if not (self.watch.should_roll_back or (last and self.watch.consecutive_bad)):
            return False
        self._go_back(seen[-1])
        return True

    def _go_back(self, seen: StepRecord) -> None:
        """To the last checkpoint, or an earlier one each time, and past the batches that did the harm.

        Raises TesseraError if that was tried often enough.
        """
        run, config = self.run, self.config.stability
        self.writer.wait()
        in_a_row = self.watch.consecutive_bad
        before = self.passed.positions_of_rollbacks(seen.step, config.window)
        tries = len(before) + 1
        present = self.ranks.broadcast(
            # None that was saved amid the trouble, when the run was asked to stop.
            [
                one
                for one in bundle.checkpoints(run.run_dir)
                if not checkpoint.read_state(one).spike_detector.get("in_a_row")
            ]
        )
        if tries > config.max_rollbacks or not present:
            raise TesseraError(self._diagnosis(seen, len(before)))
        target = present[min(tries, len(present)) - 1]
        run.ema.synchronize()
        place = checkpoint.restore(target, run.network, run.ema, run.state.optimizer)
        # The one before the first bad one led to it; if that did not help, one further back.
        after = min(map(min, before), default=seen.position + self.config.global_batch_size)
        first = after - (config.max_consecutive_bad + 1) * self.config.global_batch_size
        rollback, known = self.passed.rollbacks + 1, self.passed.positions
        for position in range(max(first, place.position), seen.position + 1, self.config.global_batch_size):
            if position not in known:
                self.passed.add(replace(seen, position=position), run.loader.names(position), rollback)
        self.passed.forget_after(place.step)
        run.loader.skipped_positions = self.passed.positions
        if (
            self.ranks.is_main
        ):  # in this order: killed in between, the run meets the same trouble and does the same again
            checkpoint.delete_after(run.run_dir, place.step)
            self.passed.write()
            if run.scorer is not None:
                run.scorer.begin(place.step)
        self.step, self.position = place.step, place.position
        self.watch.restore(place.spike_detector)
        self.watch.consecutive_bad = 0
        self.tally, self.clock = MetricAccumulator(), Clock()
        self.journal.rewind(place.step)
        self.journal.info(
            f"bad steps in a row: {in_a_row}, the last because {seen.why}: back to step {place.step} and past "
            f"the batches before step {seen.step} (try {tries} of {config.max_rollbacks})"
        )

    def _diagnosis(self, seen: StepRecord, tried: int) -> str:
        present = bundle.checkpoints(self.run.run_dir)
        return (
            f"training diverged at step {seen.step}: {seen.why}, {self.watch.consecutive_bad} steps in a row, and "
            f"going back {tried} times did not help; the last checkpoint is "
            f"{present[0] if present else 'not written yet'}\n"
            "lower training.optimizer.learning_rate, set training.optimizer.grad_clip_norm=1, or lengthen "
            f"training.optimizer.warmup_steps; `tessera doctor {self.run.run_dir}` says what it sees"
        )

    # What is written down

    def _log(self) -> None:
        run = self.run
        count = self.tally.steps
        means = self.tally.means()
        with self.clock.paused():
            for part in self.ranks.gather(dict(run.loader.skipped)):
                self.skipped_images |= part
            self._report_skips()
            device = run.ema_model.device
            peak = runtime.peak_flops(device, run.objective.dtype or torch.float32)
            memory = max(self.ranks.gather(runtime.peak_memory(device)))
        seconds, stalled = self.clock.lap()
        rate = count * self.config.global_batch_size / seconds
        flops = 6 * run.macs  # of a sample: a multiply-add is two, forward and backward three
        self.journal.record(
            self.step,
            **means,
            learning_rate=run.state.optimizer.param_groups[0]["lr"],
            images_per_second=rate,
            utilisation=rate * flops / peak / self.ranks.world_size,
            stalled=stalled / seconds,
            kept_out=self.passed.count,
            rollbacks=self.passed.rollbacks,
            skipped=len(self.skipped_images),
            epoch=self.position / len(run.loader.source),
            memory=memory,
        )

    def _report_skips(self) -> None:
        if not self.skipped_images or not self.ranks.is_main:
            return
        path = self.run.run_dir / SKIPPED
        old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        lines = [f"{name}\t{reason}" for name, reason in self.skipped_images.items()]
        both = list(dict.fromkeys(old + lines))
        if both == old:
            return
        atomic_write(path, "\n".join(both) + "\n")
        if not old:
            name, reason = next(iter(self.skipped_images.items()))
            self.journal.info(
                f"skipping images that cannot be used, for example {name} ({reason}); all are named in {path}"
            )

    def _look_inside(self, batch: Batch, told: StepMetrics) -> None:
        run = self.run
        names, _ = run.state.parameter_groups
        values: dict[str, Any] = {
            "loss_by_time": self.tally.loss_by_time(),
            "gradient_norms": dict(zip(names, told.squares.sqrt().tolist())),
        }
        apart = run.parallel.all_reduce_sum(run.ema.distance())
        inside = health.probe(run.network, run.ema.network, batch, run.objective)
        for network in (run.network, run.ema.network):
            parallel.reshard(network)
        values["ema_distance"] = (apart[0] / apart[1].clamp(min=1e-30)).sqrt().item()
        self.journal.health(self.step, values | inside)

    def _save(self) -> None:
        save(self.run, self.writer, TrainerState(self.step, self.position, self.watch.state(), self.run.compile_mode))

    def _score(self) -> None:
        """Score the EMA, write it down, and keep the best checkpoint."""
        run, journal, step = self.run, self.journal, self.step
        assert run.scorer is not None
        journal.info(f"drawing {run.recipe.evaluation.num_samples} pictures to score step {step}")
        try:
            found = run.scorer.score(step, run.full_ema_model(), self.ranks, journal.progress)
            if not self.ranks.is_main:
                return
            journal.record(step, **found)
            scored = scores.history(run.run_dir)
            if best := scores.best(scored):
                at, score = best
                now = scored[step][score.metric].value
                journal.info(
                    f"{score.metric} {now:.5g}; the best so far is {score.value:.5g} at step {at}, and is kept"
                )
            scores.plot(scored, run.run_dir / scores.FOLDER / "curve.png")
            if not self.writer.busy:
                prune(run)
        except (TesseraError, OSError, RuntimeError) as error:  # a full disk or card is no reason to end a run of days
            if self.ranks.world_size > 1:
                raise  # the others wait for this one
            journal.info(f"step {step} could not be scored: {error}")

    @property
    def _sheet(self) -> Path:
        return self.run.run_dir / SAMPLES / f"step-{self.step:09d}.png"

    def _draw(self) -> None:
        """A grid of samples from fixed seeds, one column a class."""
        run = self.run
        model = run.full_ema_model()
        if self.ranks.is_main:
            sheet = grid(run.recipe, model)
            images.save_png(self._sheet, sheet)
            self.journal.image(self.step, sheet)
        self.ranks.barrier()


def grid(recipe: Recipe, model: bundle.Model):
    """Pictures of fixed seeds, one column a class: uint8 [H, W, C]"""
    classes = recipe.network.num_classes
    columns = min(classes, COLUMNS) or 8
    rows = recipe.training.sample_seeds
    told = [index * classes // columns for index in range(columns)] * rows if classes else None
    seeds = [row for row in range(rows) for _ in range(columns)] if classes else list(range(rows * columns))
    drawn = pipeline.generate(model, told, seeds)
    return images.grid(drawn, columns, zoom=max(1, 32 // drawn.shape[1]))


def save(run: TrainingRun, writer: CheckpointWriter, place: TrainerState) -> None:
    """Begin to write a checkpoint; the ones that are no longer kept go when it stands."""
    device = run.ema_model.device
    runtime.synchronize(device)
    config = run.recipe
    processes = run.parallel.ranks.world_size
    origin = {
        "trained by": f"tessera {tessera.__version__}, torch {torch.__version__}, on {runtime.device_name(device)}"
        + (f", {processes} processes" if processes > 1 else ""),
        "trained on": f"{len(run.loader.source):,} images ({config.data.where})",
        "steps": place.step,
        "images seen": place.position,
        "batch": config.training.global_batch_size,
        "optimizer": config.training.optimizer.kind,
        "learning rate": config.training.optimizer.learning_rate,
        bundle.DECAY: config.training.ema.decay,
        "started from": config.training.init_from or "fresh weights",
    }
    model = replace(run.ema_model, config=run.ema_model.config.model_copy(update={"origin": origin}))
    run.ema.synchronize()
    writer.save(place, model, run.network, run.ema, run.state.optimizer, after=lambda: prune(run))


def prune(run: TrainingRun) -> None:
    """Remove the checkpoints that the recipe does not keep."""
    best = scores.best(scores.history(run.run_dir)) if run.scorer else None
    config = run.recipe.training
    checkpoint.prune(run.run_dir, config.keep_last, config.keep_every_n_steps, best[0] if best else None)


@dataclass
class Clock:
    """Where the time goes between two records: what is paused is no training; what is stalled waits for data."""

    def __post_init__(self) -> None:
        self._began = time.perf_counter()
        self._paused = self._stalled = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began

    @contextmanager
    def stalled(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._stalled += time.perf_counter() - began

    def lap(self) -> tuple[float, float]:
        """Seconds of training since the last time, and how many of them were stalled."""
        seconds = max(time.perf_counter() - self._began - self._paused, 1e-9)
        stalled = self._stalled
        self.__post_init__()
        return seconds, stalled


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM arrives; a second Ctrl-C is not held back."""
    received: list[int] = []

    def remember(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:  # SIGTERM may come from the cluster and from torchrun
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are its business
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
