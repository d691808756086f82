"""Recovery from bad steps: single ones are skipped, several in a row roll the run back to a checkpoint."""

from dataclasses import replace

from tessera import bundle
from tessera.errors import TesseraError
from tessera.monitoring.logger import MetricLogger
from tessera.monitoring.spikes import SkippedSteps, SpikeDetector, StepRecord
from tessera.training import checkpoint
from tessera.training.checkpoint import CheckpointWriter, TrainerState
from tessera.training.run import TrainingRun


class Recovery:
    """The spike detector of a run, the record of its skipped steps, and the way back to a checkpoint."""

    def __init__(self, run: TrainingRun, state: TrainerState, writer: CheckpointWriter, logger: MetricLogger) -> None:
        self.run, self.writer, self.logger = run, writer, logger
        self.config, self.world = run.recipe.training.stability, run.parallel.world
        self.detector = SpikeDetector(self.config, run.ema_model.device)
        self.detector.restore(state.spike_detector)
        self.skipped = SkippedSteps(run.run_dir, state.step)
        run.loader.skipped_positions = self.skipped.positions

    def check(self, records: list[StepRecord], last: bool) -> TrainerState | None:
        """Record the skipped steps. If there are too many in a row, roll back and return the state after that.

        The last step must be a good one, because it leaves the final model.
        """
        bad = [record for record in records if not record.applied]
        for record in bad:
            self.skipped.add(record, self.run.loader.names(record.position))
            self.logger.info(f"step {record.step} is skipped: {record.reason}")
        if bad and self.world.is_main:
            self.skipped.write()
        if self.detector.should_roll_back or (last and self.detector.consecutive_bad):
            return self._roll_back(records[-1])
        return None

    def _roll_back(self, record: StepRecord) -> TrainerState:
        """Restore the last checkpoint, or an earlier one at each attempt, and skip the batches that caused the trouble.

        Raises TesseraError after too many attempts.
        """
        run, batch_size = self.run, self.run.recipe.training.global_batch_size
        self.writer.wait()
        consecutive_bad = self.detector.consecutive_bad
        previous = self.skipped.positions_of_rollbacks(record.step, self.config.window)
        attempt = len(previous) + 1
        # Not those that were saved between bad steps because the run was stopping.
        checkpoints = self.world.broadcast(
            [
                path
                for path in bundle.checkpoints(run.run_dir)
                if not checkpoint.read_state(path).spike_detector.get("consecutive_bad")
            ]
        )
        if attempt > self.config.max_rollbacks or not checkpoints:
            raise TesseraError(self._diagnosis(record, len(previous)))
        target = checkpoints[min(attempt, len(checkpoints)) - 1]
        run.ema.synchronize()
        state = checkpoint.restore(target, run.network, run.ema, run.state.optimizer)
        # The batch before the first bad step led to it. If skipping it did not help, skip one batch more.
        end = min(map(min, previous), default=record.position + batch_size)
        start = max(end - (self.config.max_consecutive_bad + 1) * batch_size, state.position)
        number, known = self.skipped.rollbacks + 1, self.skipped.positions
        for position in range(start, record.position + 1, batch_size):
            if position not in known:
                self.skipped.add(replace(record, position=position), run.loader.names(position), number)
        self.skipped.discard_after(state.step)
        run.loader.skipped_positions = self.skipped.positions
        if self.world.is_main:  # in this order: a run killed in between meets the same trouble and does the same again
            run.delete_saved_after(state.step)
            self.skipped.write()
            if run.scorer is not None:
                run.scorer.begin(state.step)
        self.detector.restore(state.spike_detector)
        self.detector.consecutive_bad = 0
        self.logger.rewind(state.step)
        self.logger.info(
            f"{consecutive_bad} bad steps in a row, the last because {record.reason}: rolled back to step "
            f"{state.step}; the batches before step {record.step} are skipped (rollback {attempt} of "
            f"{self.config.max_rollbacks})"
        )
        return state

    def _diagnosis(self, record: StepRecord, rollbacks: int) -> str:
        saved = bundle.checkpoints(self.run.run_dir)
        return (
            f"training diverged at step {record.step}: {record.reason}, {self.detector.consecutive_bad} steps in a "
            f"row, and {rollbacks} rollbacks did not help; the last checkpoint is "
            f"{saved[0] if saved else 'not written yet'}\n"
            "lower training.optimizer.learning_rate, set training.optimizer.grad_clip_norm=1, or increase "
            f"training.optimizer.warmup_steps; `tessera doctor {self.run.run_dir}` lists the problems it finds"
        )
