"""The results of a study's members: state, cost, and scores during and after training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tessera.errors import TesseraError
from tessera.evaluation import protocol
from tessera.evaluation.protocol import Score
from tessera.monitoring.logger import read_log
from tessera.studies.study import Study, members
from tessera.studies.study_plan import MEMBERS, MemberPlan, read_plan
from tessera.studies.worker import FAILED, is_done, sampling_scores_path
from tessera.training import scores
from tessera.training.run import SAMPLES

State = Literal["done", "unfinished", "failed", "not started"]


@dataclass(frozen=True)
class TrainingPoint:
    """The scores of a member at one step."""

    step: int
    samples: int  # training samples so far
    flops: float  # training FLOPs so far: 6 x multiply-adds x samples
    seconds: float  # wall-clock seconds of training so far, without evaluation, sampling and saving
    scores: dict[str, Score]  # by metric, the main one first


@dataclass(frozen=True)
class SamplingPoint:
    """The scores of a finished member with another number of sampling steps."""

    num_steps: int
    macs: float  # multiply-adds of all network evaluations for one image, with guidance
    scores: dict[str, Score]


@dataclass(frozen=True)
class MemberResult:
    """One member. `points` are in the order of steps; the last is the end of training if the state is "done"."""

    name: str
    values: dict[str, str]  # axis: value
    seed: int
    state: State
    error: str | None  # why it failed
    parameters: int
    macs: float  # multiply-adds of a forward pass of one sample
    planned_seconds: float  # of training, as planned before it started
    points: list[TrainingPoint]
    sampling_points: list[SamplingPoint]
    sample_grid: Path | None  # the last one, with a column for each class


def read_results(study: Study, folder: Path) -> list[MemberResult]:
    """Read the results so far from a study's folder, in the order of the members.

    Raises TesseraError if no study was started there.
    """
    plan = read_plan(folder)
    if plan is None:
        raise TesseraError(f"{folder} holds no study yet: start it with `tessera study STUDY.yaml`")
    names = [member.name for member in members(study)]
    if unplanned := [name for name in names if name not in plan.members]:
        raise TesseraError(
            f"{unplanned[0]} is not planned in {folder}: the study has changed; start it with "
            "`tessera study STUDY.yaml`"
        )
    return [_read_member(study, name, plan.members[name], folder / MEMBERS / name) for name in names]


def _read_member(study: Study, name: str, plan: MemberPlan, run_dir: Path) -> MemberResult:
    log, batch_size = read_log(run_dir), plan.recipe.training.global_batch_size
    points = [
        TrainingPoint(
            step, step * batch_size, plan.flops_per_step * step, training_seconds(log, batch_size, step), by_metric
        )
        for step, by_metric in scores.history(run_dir).items()
    ]
    sampling_points = []
    for num_steps in sorted(study.sampling_steps):
        path = sampling_scores_path(run_dir, num_steps)
        if path.exists():
            by_metric = {score.metric: score for score in protocol.load(path)}
            sampling_points.append(SamplingPoint(num_steps, plan.sampling_macs[num_steps], by_metric))
    state: State = "unfinished" if run_dir.exists() else "not started"
    error = None
    if is_done(run_dir, plan.steps, study.sampling_steps):
        state = "done"
    elif (run_dir / FAILED).exists():
        state, error = "failed", (run_dir / FAILED).read_text(encoding="utf-8").strip()
    return MemberResult(
        name=name,
        values=plan.values,
        seed=plan.seed,
        state=state,
        error=error,
        parameters=plan.parameters,
        macs=plan.macs,
        planned_seconds=plan.seconds,
        points=points,
        sampling_points=sampling_points,
        sample_grid=max((run_dir / SAMPLES).glob("step-*.png"), default=None),
    )


def training_seconds(log: Sequence[dict[str, Any]], batch_size: int, step: int) -> float:
    """Seconds of training up to a step, from a run's log; NaN if the log is empty.

    A record has the rate of the steps since the previous record. Steps after the last record are assumed to have its
    rate. For steps that were repeated after an interruption, the log holds only the second time.
    """
    rates = [(record["step"], record["images_per_second"]) for record in log if "images_per_second" in record]
    if not rates:
        return math.nan
    seconds, position = 0.0, 0
    for logged_step, rate in (*rates, (step, rates[-1][1])):
        end = min(logged_step, step)
        seconds += max(0, end - position) * batch_size / rate
        position = max(position, end)
    return seconds
