"""Which checkpoints of a run are kept."""

import shutil
from pathlib import Path

from tessera import bundle


def prune(run_dir: Path, keep_last: int, keep_every_n_steps: int | None = None, best_step: int | None = None) -> None:
    """Delete all but the newest checkpoints, those of multiples of `keep_every_n_steps`, and the best."""
    for checkpoint in bundle.checkpoints(run_dir)[keep_last:]:
        step = _step(checkpoint)
        if step != best_step and (keep_every_n_steps is None or step == 0 or step % keep_every_n_steps):
            shutil.rmtree(checkpoint, ignore_errors=True)


def delete_after(run_dir: Path, step: int) -> None:
    """Delete the checkpoints after a step that the run has rolled back to."""
    for checkpoint in bundle.checkpoints(run_dir):
        if _step(checkpoint) > step:
            shutil.rmtree(checkpoint, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
