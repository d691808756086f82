"""Which checkpoints of a run are kept."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from tessera import bundle, power_ema


def expired(
    steps: Sequence[int], keep_last: int, keep_every_n_steps: int | None = None, best_step: int | None = None
) -> list[int]:
    """All steps but the newest, multiples of `keep_every_n_steps`, and the best."""
    return [
        step
        for step in sorted(steps, reverse=True)[keep_last:]
        if step != best_step and (keep_every_n_steps is None or step == 0 or step % keep_every_n_steps)
    ]


def prune(run_dir: Path, keep_last: int, keep_every_n_steps: int | None = None, best_step: int | None = None) -> None:
    """Delete the expired checkpoints."""
    checkpoints = {_step(checkpoint): checkpoint for checkpoint in bundle.checkpoints(run_dir)}
    for step in expired(list(checkpoints), keep_last, keep_every_n_steps, best_step):
        shutil.rmtree(checkpoints[step], ignore_errors=True)


def delete_after(run_dir: Path, step: int) -> None:
    """Delete the checkpoints and the averages of the steps after one that the run resumes from."""
    power_ema.delete_snapshots_after(run_dir, step)
    for checkpoint in bundle.checkpoints(run_dir):
        if _step(checkpoint) > step:
            shutil.rmtree(checkpoint, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
