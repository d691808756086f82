"""Detection of steps that would damage the weights, and the record of the steps that a run skipped.

If the loss or gradient norm of a step is not finite, or far above recent values, the device does not apply its update
(`training.step.train_step`). So one bad batch has no effect. After several bad steps in a row the weights themselves
are bad, and the run rolls back to an earlier checkpoint (PaLM, Chowdhery et al. 2022, section 5.1, restarts and skips
batches).

RUN/skipped_steps.jsonl     one line for each batch: its position, the reason, and its samples
"""

import json
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from tessera.files import atomic_write
from tessera.monitoring.logger import read_log
from tessera.settings import Settings

SKIPPED_STEPS = "skipped_steps.jsonl"
UPDATE_EVERY = 16  # applied steps between updates of the limits
LAG = 2  # steps that a GPU may be ahead of the host's reading, so that the host never waits for it
NORMAL = 1.4826  # standard deviations of a normal distribution per median absolute deviation
# Lower bounds on the spread, for very even steps. With a threshold of 20, a loss below 1 + 20 x 0.05 = 2 times the
# median and a gradient norm below exp(20 x 0.1) = 7 times the median are never spikes.
MIN_LOSS_SPREAD, MIN_LOG_NORM_SPREAD = 0.05, 0.1


class StabilityConfig(Settings):
    """What counts as a bad step, and what the run does about it."""

    spike_threshold: PositiveFloat | None = Field(
        default=20, description="robust standard deviations above the median; null: only values that are not finite"
    )
    window: PositiveInt = Field(default=256, ge=16, description="number of recent steps that the median is taken over")
    max_consecutive_bad: PositiveInt = Field(
        default=8, description="bad steps in a row before the run rolls back to a checkpoint"
    )
    max_rollbacks: PositiveInt = Field(default=3, description="rollbacks before the run ends with a diagnosis")


@dataclass(frozen=True)
class StepRecord:
    """The result of a step, which the host reads a few steps later."""

    step: int
    position: int
    applied: bool
    loss: float
    grad_norm: float
    limits: tuple[float, float]

    @property
    def reason(self) -> str:
        """Why the update was not applied."""
        for name, value, limit in zip(("loss", "gradient norm"), (self.loss, self.grad_norm), self.limits):
            if not math.isfinite(value):
                return f"the {name} is not finite"
            if value > limit:
                return f"the {name} is {value:.4g}, above the limit of {limit:.4g} from the steps before"
        return "the update was applied"


class SpikeDetector:
    """Reads the results of steps without waiting for the device, and sets the limits for the next steps."""

    def __init__(self, config: StabilityConfig, device: torch.device) -> None:
        self.config = config
        self.limits = (math.inf, math.inf)  # of the loss and the gradient norm; infinite for the first quarter window
        self.consecutive_bad = 0
        self._lag = LAG if device.type == "cuda" else 0
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)
        self._num_applied = 0
        self._unread: deque[tuple[int, int, tuple[float, float], Tensor, Any]] = deque()

    def _update_limits(self) -> None:
        """Set limits from medians and median absolute deviations, which spikes in the window do not change."""
        threshold = self.config.spike_threshold
        if threshold is None or len(self._losses) < max(16, self.config.window // 4):
            return
        losses, log_norms = np.array(self._losses), np.log(np.maximum(np.array(self._norms), 1e-30))
        loss, log_norm = np.median(losses), np.median(log_norms)
        spread = max(NORMAL * np.median(abs(losses - loss)), MIN_LOSS_SPREAD * abs(loss))
        log_spread = max(NORMAL * np.median(abs(log_norms - log_norm)), MIN_LOG_NORM_SPREAD)
        self.limits = float(loss + threshold * spread), float(np.exp(min(log_norm + threshold * log_spread, 700.0)))

    def send(self, step: int, position: int, applied: Tensor, loss: Tensor, grad_norm: Tensor) -> None:
        """Start copying the result of a step to the host."""
        values = torch.stack((applied, loss, grad_norm))
        copied = None
        if self._lag:
            values = values.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._unread.append((step, position, self.limits, values, copied))

    def read(self, wait: bool = False) -> list[StepRecord]:
        """The steps that are ready: always the same number of steps later, on every rank; all of them if `wait`."""
        records = []
        while len(self._unread) > (0 if wait else self._lag):
            step, position, limits, values, copied = self._unread.popleft()
            if copied is not None:
                copied.synchronize()
            applied, loss, grad_norm = values.tolist()
            record = StepRecord(step, position, bool(applied), loss, grad_norm, limits)
            if record.applied:
                self._losses.append(loss)
                self._norms.append(grad_norm)
                self._num_applied, self.consecutive_bad = self._num_applied + 1, 0
                if self._num_applied % UPDATE_EVERY == 0:
                    self._update_limits()
            else:
                self.consecutive_bad += 1
            records.append(record)
        return records

    @property
    def should_roll_back(self) -> bool:
        return self.consecutive_bad >= self.config.max_consecutive_bad

    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint, so that a resumed run has the same limits."""
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._norms),
            "limits": [limit if math.isfinite(limit) else None for limit in self.limits],
            "num_applied": self._num_applied,
            "consecutive_bad": self.consecutive_bad,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore a saved state; an empty one resets the detector."""
        self._unread.clear()
        self._losses = deque(state.get("losses", ()), maxlen=self.config.window)
        self._norms = deque(state.get("grad_norms", ()), maxlen=self.config.window)
        loss, norm = (math.inf if limit is None else limit for limit in state.get("limits", (None, None)))
        self.limits = loss, norm
        self._num_applied, self.consecutive_bad = state.get("num_applied", 0), state.get("consecutive_bad", 0)


class SkippedSteps:
    """The record of skipped batches: outcome "skipped" if only the update was skipped, "excluded" if a rollback removed
    the batch from the rest of the run.
    """

    def __init__(self, run: Path, step: int) -> None:
        """Read the record of a run that is at `step`."""
        self.path = run / SKIPPED_STEPS
        self.records = read_skipped_steps(run)
        self.discard_after(step)

    @property
    def positions(self) -> set[int]:
        """The positions of the excluded batches."""
        return {record["position"] for record in self.records if record["outcome"] == "excluded"}

    @property
    def count(self) -> int:
        """The number of steps without an update."""
        return sum(record["outcome"] == "skipped" for record in self.records)

    @property
    def rollbacks(self) -> int:
        """The number of rollbacks."""
        return max((record.get("rollback", 0) for record in self.records), default=0)

    def positions_of_rollbacks(self, step: int, window: int) -> list[list[int]]:
        """The positions excluded by each recent rollback: those since the last `window` steps without a rollback.

        It depends only on the file, so a run that is killed and resumed does not get more rollbacks than another.
        """
        by_rollback: dict[int, list[dict[str, Any]]] = {}
        for record in self.records:
            if "rollback" in record:
                by_rollback.setdefault(record["rollback"], []).append(record)
        positions: list[list[int]] = []
        last = -window
        for _, records in sorted(by_rollback.items()):
            if records[0]["step"] > last + window:
                positions = []
            last = max(last, records[0]["step"])
            positions.append([record["position"] for record in records])
        return positions if step <= last + window else []

    def add(self, record: StepRecord, samples: list[str], rollback: int | None = None) -> None:
        """Add a skipped batch, or with `rollback` (its number) an excluded one."""
        values = {"loss": record.loss, "grad_norm": record.grad_norm}
        self.records.append(
            {
                "step": record.step,
                "position": record.position,
                "outcome": "skipped" if rollback is None else "excluded",
                **({} if rollback is None else {"rollback": rollback}),
                "reason": record.reason,
                **{name: value if math.isfinite(value) else None for name, value in values.items()},
                "samples": samples,
            }
        )

    def discard_after(self, step: int) -> None:
        """Remove the steps skipped after `step`, because they will be repeated."""
        self.records = [r for r in self.records if r["outcome"] == "excluded" or r["step"] <= step]

    def write(self) -> None:
        if self.records or self.path.exists():
            atomic_write(self.path, "".join(json.dumps(record) + "\n" for record in self.records))


def read_skipped_steps(run: Path) -> list[dict[str, Any]]:
    """The record of a run, oldest first; damaged lines are ignored."""
    return read_log(run, SKIPPED_STEPS)
