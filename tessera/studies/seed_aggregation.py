"""Averages over members that differ only in their seed, the main metric, and the check for one protocol."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from tessera.errors import TesseraError, bullet_list
from tessera.evaluation.protocol import Score, protocol_differences
from tessera.reporting.estimates import Estimate
from tessera.studies.results import MemberResult
from tessera.studies.study import Study

Against = Literal["gmacs", "flops"]
EQUAL = 1.05  # of the compute of two members, which is that of whole steps
MIN_SIZES = 3  # of which the best one is looked for


@dataclass(frozen=True)
class MeanPoint:
    """Scores of several seeds at one step: mean, lowest and highest; for one seed the score and its interval."""

    step: int
    samples: float
    flops: float
    seconds: float
    score: Estimate


@dataclass(frozen=True)
class MeanSamplingPoint:
    """Scores of several seeds with one number of sampling steps."""

    num_steps: int
    macs: float  # multiply-adds for one image
    score: Estimate


@dataclass(frozen=True)
class Variant:
    """One combination of axis values, averaged over the seeds that are done, or over all scored ones if none is."""

    name: str
    values: dict[str, str]
    seeds: tuple[int, ...]
    done: bool
    parameters: int
    gmacs: float
    points: list[MeanPoint]  # the steps at which all its seeds were scored
    sampling_points: list[MeanSamplingPoint]


def main_metric(results: Sequence[MemberResult]) -> str | None:
    """The first metric of the scores; None if there are no scores."""
    scores = next((point.scores for result in results for point in result.points if point.scores), {})
    return next(iter(scores), None)


def is_measured(scores: Mapping[str, Score], metric: str) -> bool:
    """Whether the score is a finite number, which it may not be for a model that diverged."""
    return metric in scores and math.isfinite(scores[metric].value)


def average_seeds(results: Sequence[MemberResult], metric: str) -> list[Variant]:
    """All variants that have been scored, in the order of the members."""
    groups: dict[tuple[str, ...], list[MemberResult]] = {}
    for result in results:
        if any(is_measured(point.scores, metric) for point in result.points):
            groups.setdefault(tuple(result.values.values()), []).append(result)
    return [_average(group, metric) for group in groups.values()]


def _average(group: Sequence[MemberResult], metric: str) -> Variant:
    done = [result for result in group if result.state == "done"]
    seeds = done or list(group)
    first = seeds[0]
    by_step = [{point.step: point for point in each.points if is_measured(point.scores, metric)} for each in seeds]
    points = []
    for step in sorted(set.intersection(*map(set, by_step))):
        at_step = [points_of_seed[step] for points_of_seed in by_step]
        score = _mean([point.scores[metric] for point in at_step])
        seconds = fmean(point.seconds for point in at_step)
        points.append(MeanPoint(step, at_step[0].samples, at_step[0].flops, seconds, score))
    by_num_steps = [
        {point.num_steps: point for point in each.sampling_points if is_measured(point.scores, metric)}
        for each in seeds
    ]
    sampling_points = [
        MeanSamplingPoint(
            number, by_num_steps[0][number].macs, _mean([points[number].scores[metric] for points in by_num_steps])
        )
        for number in sorted(set.intersection(*map(set, by_num_steps)))
    ]
    return Variant(
        name="-".join(first.values.values()),
        values=first.values,
        seeds=tuple(result.seed for result in seeds),
        done=bool(done),
        parameters=first.parameters,
        gmacs=first.macs / 1e9,
        points=points,
        sampling_points=sampling_points,
    )


def _mean(scores: Sequence[Score]) -> Estimate:
    if len(scores) == 1:
        return Estimate(scores[0].value, scores[0].low, scores[0].high)
    values = [score.value for score in scores]
    return Estimate(fmean(values), min(values), max(values))


def active(variants: Sequence[Variant]) -> list[Variant]:
    """The variants that are done; all variants if none is."""
    return [variant for variant in variants if variant.done] or list(variants)


def common_steps(variants: Sequence[Variant]) -> list[int]:
    """The steps at which every variant was scored. If all trained equally long, the last is the end."""
    if not variants:
        return []
    return sorted(set.intersection(*({p.step for p in variant.points if p.step > 0} for variant in variants)))


@dataclass(frozen=True)
class FinalPoints:
    """The last comparable scores of variants by their compute, to which a scaling law is fitted."""

    description: str  # "after 2,000 steps"
    variants: list[Variant]
    x: list[float]
    y: list[Estimate]

    @property
    def values(self) -> list[float]:
        return [score.value for score in self.y]


def final_points(variants: Sequence[Variant], against: Against) -> FinalPoints:
    """By GMACs after equal steps, or by training FLOPs at the end of each. Empty if no step is common to all."""
    scored = [variant for variant in active(variants) if variant.points]
    if against == "flops":
        last = [variant.points[-1] for variant in scored]
        x, y = [point.flops for point in last], [point.score for point in last]
        return FinalPoints("at the end of training", scored, x, y)
    steps = common_steps(scored)
    return points_at_step(scored, steps[-1]) if steps else FinalPoints("", [], [], [])


def points_at_step(variants: Sequence[Variant], step: int) -> FinalPoints:
    """By GMACs, at a step at which all variants were scored."""
    scores = [next(point.score for point in variant.points if point.step == step) for variant in variants]
    return FinalPoints(f"after {step:,} steps", list(variants), [variant.gmacs for variant in variants], scores)


def points_at_flops(variants: Sequence[Variant], flops: float) -> FinalPoints:
    """By GMACs, of the variants that were scored at this many training FLOPs, to a step."""
    scores = {
        variant.name: point.score
        for variant in variants
        for point in variant.points
        if flops / EQUAL <= point.flops <= flops * EQUAL
    }
    scored = [variant for variant in variants if variant.name in scores]
    gmacs, values = [variant.gmacs for variant in scored], [scores[variant.name] for variant in scored]
    return FinalPoints(f"at {flops:.3g} training FLOPs", scored, gmacs, values)


def sizes_at_equal_flops(study: Study, variants: Sequence[Variant]) -> list[tuple[float, FinalPoints]]:
    """The training FLOPs of the marks and of the end, each with the scores of at least three sizes there. Empty for a
    study whose members differ in more than their size, or are trained for equal steps.
    """
    variants = sorted(active(variants), key=lambda variant: variant.gmacs)
    different = len({variant.gmacs for variant in variants}) == len(variants)
    if study.budget.flops is None or study.compare is not None or study.law is not None or not different:
        return []
    levels = [(flops, points_at_flops(variants, flops)) for flops in sorted({*study.marks.flops, study.budget.flops})]
    return [(flops, points) for flops, points in levels if len(points.x) >= MIN_SIZES]


def check_one_protocol(results: Sequence[MemberResult]) -> None:
    """Raises TesseraError with the members' names if scores of one metric have different protocols.

    Protocols of scores with other numbers of sampling steps may differ in that number.
    """
    first: dict[str, tuple[str, str, Score]] = {}
    errors = []
    for name, what, fingerprint, score in _protocols(results):
        first_name, first_fingerprint, first_score = first.setdefault(what, (name, fingerprint, score))
        if fingerprint != first_fingerprint:
            differences = "; ".join(protocol_differences(first_score, score)[:3])
            errors.append(
                f"{what}: {first_name} ({first_fingerprint}) and {name} ({fingerprint}), which differ in {differences}"
            )
    if errors:
        raise TesseraError(
            "scores of different protocols cannot be compared in one report. Expected one protocol for all members; "
            f"score these again, or give the study another folder:{bullet_list(list(dict.fromkeys(errors)))}"
        )


def _protocols(results: Iterable[MemberResult]) -> Iterator[tuple[str, str, str, Score]]:
    """Member, metric, fingerprint of what must be equal, score."""
    for result in results:
        for point in result.points:
            yield from ((result.name, metric, score.fingerprint, score) for metric, score in point.scores.items())
        for point in result.sampling_points:
            for metric, score in point.scores.items():
                sampling = {key: value for key, value in (score.protocol.sampling or {}).items() if key != "num_steps"}
                fingerprint = score.protocol.model_copy(update={"sampling": sampling}).fingerprint
                yield result.name, f"{metric} with other numbers of sampling steps", fingerprint, score
