"""Steps that would ruin the weights: found by what they tell, kept out of the weights, and, if they do not end, left
behind by going back to an earlier checkpoint.

A step whose loss or gradient is not finite, or far above those before it, leaves the weights as they are: the device
sees to that by itself (`step.train_step`). So one bad batch costs nothing. When several in a row are like that, it is
the weights that are bad, and the run goes back (PaLM, Chowdhery et al. 2022, section 5.1, restarts and skips batches).

RUN/passed.jsonl     the batches concerned, one a line: where, why, and which samples
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
from tessera.settings import Settings
from tessera.training.step import StepMetrics

SKIPPED_STEPS = "passed.jsonl"
RENEWED = 16  # kept steps after which the limits are set anew
LAG = 2  # steps a GPU may be ahead of what is read of it, so that it is never waited for
NORMAL = 1.4826  # standard deviations of a normal distribution in one median absolute deviation
# However alike the steps before were: a loss is no spike below 1 + spike x 0.05 of the median (twice, where spike is
# 20), a gradient not below exp(spike x 0.1) (7 times).
LEAST_LOSS, LEAST_LOG_NORM = 0.05, 0.1


class StabilityConfig(Settings):
    """What counts as a bad step, and what is done about it."""

    spike_threshold: PositiveFloat | None = Field(
        default=20, description="robust standard deviations above the median; null: only what is not a number"
    )
    window: PositiveInt = Field(default=256, ge=16, description="steps that the median is of")
    max_consecutive_bad: PositiveInt = Field(
        default=8, description="bad steps in a row before the run goes back to a checkpoint"
    )
    max_rollbacks: PositiveInt = Field(default=3, description="times to go back before the run ends with a diagnosis")


@dataclass(frozen=True)
class StepRecord:
    """What the host learns of a step, a little later."""

    step: int
    position: int
    applied: bool
    loss: float
    gradient_norm: float
    limits: tuple[float, float]

    @property
    def why(self) -> str:
        for what, value, limit in zip(("loss", "gradient's length"), (self.loss, self.gradient_norm), self.limits):
            if not math.isfinite(value):
                return f"the {what} is not a number"
            if value > limit:
                return f"the {what} is {value:.4g}, above the limit of {limit:.4g} that the steps before it set"
        return "it was kept"


class SpikeDetector:
    """Reads what steps tell without waiting for the device, and sets the limits for those to come."""

    def __init__(self, config: StabilityConfig, device: torch.device) -> None:
        self.config = config
        self.limits = (math.inf, math.inf)  # of the loss and the gradient norm; until a quarter of a window is seen
        self.consecutive_bad = 0  # bad steps
        self._lag = LAG if device.type == "cuda" else 0
        self._device = device
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)
        self._kept = 0
        self._unread: deque[tuple[int, int, tuple[float, float], Tensor, Any]] = deque()

    def _renew(self) -> None:
        """The largest loss and gradient norm that the next steps may have.

        Medians and median absolute deviations: spikes in the window do not move them.
        """
        spike = self.config.spike_threshold
        if spike is None or len(self._losses) < max(16, self.config.window // 4):
            return
        losses, norms = np.array(self._losses), np.log(np.maximum(np.array(self._norms), 1e-30))
        middle, typical = np.median(losses), np.median(norms)
        spread = max(NORMAL * np.median(abs(losses - middle)), LEAST_LOSS * abs(middle))
        log_spread = max(NORMAL * np.median(abs(norms - typical)), LEAST_LOG_NORM)
        self.limits = float(middle + spike * spread), float(np.exp(min(typical + spike * log_spread, 700.0)))

    def send(self, step: int, position: int, told: StepMetrics) -> None:
        """Have the numbers of a step come to the host, some time."""
        numbers = torch.stack((told.applied, told.values["loss"], told.values["gradient_norm"]))
        arrived = None
        if self._lag:
            numbers = numbers.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._unread.append((step, position, self.limits, numbers, arrived))

    def read(self, wait: bool = False) -> list[StepRecord]:
        """The steps that can be read by now: always the same number of steps later, on every process; all if `wait`."""
        found = []
        while len(self._unread) > (0 if wait else self._lag):
            step, position, limits, numbers, arrived = self._unread.popleft()
            if arrived is not None:
                arrived.synchronize()
            kept, loss, norm = numbers.tolist()
            seen = StepRecord(step, position, bool(kept), loss, norm, limits)
            if seen.applied:
                self._losses.append(loss)
                self._norms.append(norm)
                self._kept, self.consecutive_bad = self._kept + 1, 0
                if self._kept % RENEWED == 0:
                    self._renew()
            else:
                self.consecutive_bad += 1
            found.append(seen)
        return found

    @property
    def should_roll_back(self) -> bool:
        """Whether bad steps do not end."""
        return self.consecutive_bad >= self.config.max_consecutive_bad

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of it, so that a resumed run sets the same limits."""
        return {
            "losses": list(self._losses),
            "gradient_norms": list(self._norms),
            "limits": [limit if math.isfinite(limit) else None for limit in self.limits],
            "kept": self._kept,
            "in_a_row": self.consecutive_bad,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """As it was when it told its state; an empty one begins anew."""
        self._unread.clear()
        self._losses = deque(state.get("losses", ()), maxlen=self.config.window)
        self._norms = deque(state.get("gradient_norms", ()), maxlen=self.config.window)
        loss, norm = (math.inf if limit is None else limit for limit in state.get("limits", (None, None)))
        self.limits = loss, norm
        self._kept, self.consecutive_bad = int(state.get("kept", 0)), int(state.get("in_a_row", 0))


class SkippedSteps:
    """The record of batches that were kept out of the weights (outcome "skipped") or are never shown again (outcome
    "passed over").
    """

    def __init__(self, run: Path, step: int) -> None:
        """Read it, for a run that stands at a step."""
        self.path = run / SKIPPED_STEPS
        self.records = read_skipped_steps(run)
        self.forget_after(step)

    @property
    def positions(self) -> set[int]:
        """Where the batches start that are never shown again."""
        return {record["position"] for record in self.records if record["outcome"] == "passed over"}

    @property
    def count(self) -> int:
        """Steps that were left undone."""
        return sum(record["outcome"] == "skipped" for record in self.records)

    @property
    def rollbacks(self) -> int:
        """Times the run went back."""
        return max((record.get("rollback", 0) for record in self.records), default=0)

    def positions_of_rollbacks(self, step: int, window: int) -> list[list[int]]:
        """The positions passed over each time the run went back in the trouble that a step belongs to: no window of
        steps went well since. What is on disk, so that a run killed meanwhile tries no more often than another.
        """
        times: dict[int, list[dict[str, Any]]] = {}
        for record in self.records:
            if "rollback" in record:
                times.setdefault(record["rollback"], []).append(record)
        found: list[list[int]] = []
        last = -window
        for _, records in sorted(times.items()):
            if records[0]["step"] > last + window:
                found = []
            last = max(last, records[0]["step"])
            found.append([record["position"] for record in records])
        return found if step <= last + window else []

    def add(self, seen: StepRecord, samples: list[str], rollback: int | None = None) -> None:
        """Note a batch: kept out of the weights, or passed over after so many times of going back."""
        numbers = {"loss": seen.loss, "gradient_norm": seen.gradient_norm}
        self.records.append(
            {
                "step": seen.step,
                "position": seen.position,
                "outcome": "skipped" if rollback is None else "passed over",
                **({} if rollback is None else {"rollback": rollback}),
                "why": seen.why,
                **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
                "samples": samples,
            }
        )

    def forget_after(self, step: int) -> None:
        """What was skipped past a step will be skipped again."""
        self.records = [
            record for record in self.records if record["outcome"] == "passed over" or record["step"] <= step
        ]

    def write(self) -> None:
        if self.records or self.path.exists():
            atomic_write(self.path, "".join(json.dumps(record) + "\n" for record in self.records))


def read_skipped_steps(run: Path) -> list[dict[str, Any]]:
    """The record of a run, oldest first; a damaged line is left out."""
    records = []
    path = run / SKIPPED_STEPS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
