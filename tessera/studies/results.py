"""What came of a study's members: where each stands, what it cost, how it scored on its way."""

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


@dataclass(frozen=True)
class TrainingPoint:
    """The scores of a member somewhere on its way."""

    step: int
    samples: int  # learned from so far
    flops: float  # of training so far: 6 x multiply-adds x samples
    seconds: float  # of training so far by the clock, without scoring, drawing and saving
    scores: dict[str, Score]  # by metric, the deciding one first


@dataclass(frozen=True)
class SamplingPoint:
    """The scores of a finished member that draws with another number of steps."""

    num_steps: int
    macs: float  # multiply-adds for one picture: all calls of the network, guidance included
    scores: dict[str, Score]


@dataclass(frozen=True)
class MemberResult:
    """One member. `points` are in the order of steps; the last is the end, if state is done."""

    name: str
    values: dict[str, str]  # axis: value
    seed: int
    state: Literal["done", "unfinished", "failed", "not begun"]
    error: str | None  # why it failed, for people
    parameters: int
    macs: float  # multiply-adds of a forward pass of one sample
    planned_seconds: float  # of training, as planned before it began
    points: list[TrainingPoint]
    sampling_points: list[SamplingPoint]
    sample_grid: Path | None  # the last grid of samples, one column a class


def read_results(study: Study, folder: Path) -> list[MemberResult]:
    """What the files of a study's folder say, whatever state they are in; members in the study's order.

    Raises TesseraError if no study was begun there.
    """
    planned = read_plan(folder)
    if planned is None:
        raise TesseraError(f"{folder} holds no study yet: begin it with `tessera study STUDY.yaml`")
    names = [member.name for member in members(study)]
    if unknown := [name for name in names if name not in planned.members]:
        raise TesseraError(
            f"{unknown[0]} is not planned in {folder}: the study has changed; begin it with `tessera study STUDY.yaml`"
        )
    return [_result(study, name, planned.members[name], folder / MEMBERS / name) for name in names]


def _result(study: Study, name: str, planned: MemberPlan, run: Path) -> MemberResult:
    log, batch = read_log(run), planned.recipe.training.global_batch_size
    points = [
        TrainingPoint(step, step * batch, planned.flops_per_step * step, training_seconds(log, batch, step), found)
        for step, found in scores.history(run).items()
    ]
    drawn = [
        SamplingPoint(steps, planned.sampling_macs[steps], _by_metric(sampling_scores_path(run, steps)))
        for steps in sorted(study.sampling_steps)
        if sampling_scores_path(run, steps).exists()
    ]
    failed = run / FAILED
    state: Literal["done", "unfinished", "failed", "not begun"] = "not begun"
    if is_done(run, planned.steps, study.sampling_steps):
        state = "done"
    elif failed.exists():
        state = "failed"
    elif run.exists():
        state = "unfinished"
    return MemberResult(
        name=name,
        values=planned.values,
        seed=planned.seed,
        state=state,
        error=failed.read_text(encoding="utf-8").strip() if state == "failed" else None,
        parameters=planned.parameters,
        macs=planned.macs,
        planned_seconds=planned.seconds,
        points=points,
        sampling_points=drawn,
        sample_grid=max((run / SAMPLES).glob("step-*.png"), default=None),
    )


def _by_metric(path: Path) -> dict[str, Score]:
    return {score.metric: score for score in protocol.load(path)}


def training_seconds(log: Sequence[dict[str, Any]], batch: int, step: int) -> float:
    """Seconds of training up to a step, from a run's log; not a number where the log says nothing yet.

    A record tells how fast the steps since the one before it went; those past the last one are taken to go as fast. Of
    steps that were made twice, after an interruption, the log holds the second time alone.
    """
    rates = [(record["step"], record["images_per_second"]) for record in log if "images_per_second" in record]
    if not rates:
        return math.nan
    seconds, at = 0.0, 0
    for logged, rate in (*rates, (step, rates[-1][1])):
        until = min(logged, step)
        seconds += max(0, until - at) * batch / rate
        at = max(at, until)
    return seconds
