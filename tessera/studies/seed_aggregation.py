"""Members that differ in their seed alone, as one; which metric decides; that all was scored by one protocol."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from tessera.errors import TesseraError, bullet_list
from tessera.evaluation.protocol import Score, protocol_differences
from tessera.reporting.estimates import Estimate
from tessera.studies.results import MemberResult

Against = Literal["gmacs", "flops"]


@dataclass(frozen=True)
class MeanPoint:
    """Scores of several seeds at one place. score: their mean, the lowest and the highest; of one seed its interval."""

    step: int
    samples: float
    flops: float
    seconds: float
    score: Estimate


@dataclass(frozen=True)
class MeanSamplingPoint:
    """Scores of several seeds that draw with so many steps."""

    num_steps: int
    macs: float  # multiply-adds for one picture
    score: Estimate


@dataclass(frozen=True)
class Variant:
    """One combination of values. Seeds that are done stand for it; while none is, all that were scored."""

    name: str
    values: dict[str, str]
    seeds: tuple[int, ...]
    done: bool
    parameters: int
    gmacs: float
    points: list[MeanPoint]  # where all its seeds were scored
    sampling_points: list[MeanSamplingPoint]


def main_metric(results: Sequence[MemberResult]) -> str | None:
    """The metric that decides: the first of the scores; None where nothing was scored."""
    scores = next((point.scores for result in results for point in result.points if point.scores), {})
    return next(iter(scores), None)


def is_measured(scores: Mapping[str, Score], metric: str) -> bool:
    """Whether the metric was scored as a number: a model that diverged may have none."""
    return metric in scores and math.isfinite(scores[metric].value)


def average_seeds(results: Sequence[MemberResult], metric: str) -> list[Variant]:
    """In the order of the members; a combination that was never scored is left out."""
    found: dict[tuple[str, ...], list[MemberResult]] = {}
    for result in results:
        if any(is_measured(point.scores, metric) for point in result.points):
            found.setdefault(tuple(result.values.values()), []).append(result)
    return [_setting(alike, metric) for alike in found.values()]


def _setting(alike: Sequence[MemberResult], metric: str) -> Variant:
    done = [result for result in alike if result.state == "done"]
    chosen = done or list(alike)
    first = chosen[0]
    steps = [{point.step: point for point in result.points if is_measured(point.scores, metric)} for result in chosen]
    points = []
    for step in sorted(set.intersection(*(set(each) for each in steps))):
        here = [each[step] for each in steps]
        score = _mean([point.scores[metric] for point in here])
        seconds = fmean(point.seconds for point in here)
        points.append(MeanPoint(step, here[0].samples, here[0].flops, seconds, score))
    drawn = [
        {each.num_steps: each for each in result.sampling_points if is_measured(each.scores, metric)}
        for result in chosen
    ]
    sampled = [
        MeanSamplingPoint(count, drawn[0][count].macs, _mean([each[count].scores[metric] for each in drawn]))
        for count in sorted(set.intersection(*(set(each) for each in drawn)))
    ]
    return Variant(
        name="-".join(first.values.values()),
        values=first.values,
        seeds=tuple(result.seed for result in chosen),
        done=bool(done),
        parameters=first.parameters,
        gmacs=first.macs / 1e9,
        points=points,
        sampling_points=sampled,
    )


def _mean(scores: Sequence[Score]) -> Estimate:
    if len(scores) == 1:
        return Estimate(scores[0].value, scores[0].low, scores[0].high)
    values = [score.value for score in scores]
    return Estimate(fmean(values), min(values), max(values))


def active(found: Sequence[Variant]) -> list[Variant]:
    """Those that are done; while none is, all."""
    return [setting for setting in found if setting.done] or list(found)


def common_steps(found: Sequence[Variant]) -> list[int]:
    """The steps at which every setting was scored: the last is the end, if all trained for as many steps."""
    return sorted(set.intersection(*({p.step for p in each.points if p.step > 0} for each in found))) if found else []


@dataclass(frozen=True)
class FinalPoints:
    """Where settings had come to, by their compute: what a law is fitted to."""

    description: str  # "after 2,000 steps"
    variants: list[Variant]
    x: list[float]
    y: list[Estimate]

    @property
    def values(self) -> list[float]:
        return [score.value for score in self.y]


def final_points(found: Sequence[Variant], against: Against) -> FinalPoints:
    """By GMACs after as many steps, or by training FLOPs at each one's end. Empty where no step is common to all."""
    chosen = [setting for setting in active(found) if setting.points]
    if against == "flops":
        last = [setting.points[-1] for setting in chosen]
        return FinalPoints(
            "at the end of training", chosen, [point.flops for point in last], [point.score for point in last]
        )
    steps = common_steps(chosen)
    if not steps:
        return FinalPoints("", [], [], [])
    return points_at_step(chosen, steps[-1])


def points_at_step(found: Sequence[Variant], step: int) -> FinalPoints:
    """By GMACs after so many steps, at which all were scored."""
    scores = [next(point.score for point in setting.points if point.step == step) for setting in found]
    return FinalPoints(f"after {step:,} steps", list(found), [setting.gmacs for setting in found], scores)


# One protocol


def check_one_protocol(results: Sequence[MemberResult]) -> None:
    """Raises TesseraError, with the members' names, where scores of one metric were made by different protocols.

    Scores along the way must agree in all; those of other sampling steps in all but the number of these steps.
    """
    first: dict[str, tuple[str, str, Score]] = {}
    faults = []
    for name, what, fingerprint, score in _protocols(results):
        whose, known, reference = first.setdefault(what, (name, fingerprint, score))
        if fingerprint != known:
            apart = "; ".join(protocol_differences(reference, score)[:3])
            faults.append(f"{what}: {whose} ({known}) and {name} ({fingerprint}), which differ in {apart}")
    if faults:
        raise TesseraError(
            "scores of different protocols cannot stand in one report. Expected one protocol for all members; score "
            f"these again by one, or give the study another folder:{bullet_list(list(dict.fromkeys(faults)))}"
        )


def _protocols(results: Iterable[MemberResult]) -> Iterator[tuple[str, str, str, Score]]:
    """Member, metric, fingerprint of what must be alike, score."""
    for result in results:
        for point in result.points:
            yield from ((result.name, metric, score.fingerprint, score) for metric, score in point.scores.items())
        for drawn in result.sampling_points:
            for metric, score in drawn.scores.items():
                drawing = {key: told for key, told in (score.protocol.sampling or {}).items() if key != "num_steps"}
                alike = score.protocol.model_copy(update={"sampling": drawing}).fingerprint
                yield result.name, f"{metric} of other sampling steps", alike, score
