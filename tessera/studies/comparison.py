"""Which value of an axis is better, by more than seeds differ: at equal steps, training FLOPs or time of training."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from tessera.reporting.estimates import Estimate, differences_to_first, holm
from tessera.reporting.metrics import HIGHER_IS_BETTER
from tessera.studies.results import TrainingPoint, MemberResult
from tessera.studies.seed_aggregation import is_measured
from tessera.studies.study import Comparison

Scale = Literal["steps", "flops", "seconds"]  # of training, on which members are made equal
SCALES: tuple[Scale, ...] = ("steps", "flops", "seconds")
SIGNIFICANCE = 0.05  # a difference is told where its p value is below
ONE_SEED = "one seed: undecided whether it is the seed"


@dataclass(frozen=True)
class ComparedValue:
    """One value of the compared axis.

    mean: over seeds with its t interval; of one seed, the score with its own sampling interval. difference: to the
    baseline, paired by seed, with the t interval of that pair alone. relative: the same as a share (0.1: 10 % above
    the baseline), from logarithms, as noise grows with the number, and with the noise of all values pooled: few seeds
    tell little of the noise of one. p: that chance alone makes such a difference, from the same, corrected by Holm for
    the number of values compared. Where a number is not above zero there is no share, and p is of the numbers as they
    are.
    """

    name: str
    seeds: tuple[int, ...]
    mean: Estimate
    difference: Estimate | None = None
    relative: Estimate | None = None
    p: float | None = None
    verdict: str = ""  # "better", "worse", "undecided", or why there is none


@dataclass(frozen=True)
class AxisComparison:
    """The values of an axis at one place of training, all other axes alike. The baseline comes first."""

    scale: Scale
    x: float  # the farthest that all have come to
    other_axes: dict[str, str]  # the values of the other axes
    values: list[ComparedValue]
    excluded: list[str]  # members that take no part, with the reason


def position(point: TrainingPoint, scale: Scale) -> float:
    """How far a member had come."""
    return {"steps": float(point.step), "flops": point.flops, "seconds": point.seconds}[scale]


def interpolate_score(result: MemberResult, metric: str, scale: Scale, x: float) -> Estimate | None:
    """A member's score at x of its training: between scored points straight in log x; None where it was not scored."""
    points = [
        (position(point, scale), point.scores[metric]) for point in result.points if is_measured(point.scores, metric)
    ]
    points = [(at, Estimate(score.value, score.low, score.high)) for at, score in points if at > 0]
    for at, score in points:
        if math.isclose(at, x, rel_tol=1e-9):
            return score
    for (before, low), (after, high) in pairwise(points):
        if before < x < after:
            share = math.log(x / before) / math.log(after / before)
            ends = zip((low.value, low.low, low.high), (high.value, high.low, high.high))
            return Estimate(*(a + share * (b - a) for a, b in ends))
    return None


def compare(comparison: Comparison, results: Sequence[MemberResult], metric: str) -> Iterator[AxisComparison]:
    """At equal steps, at equal training FLOPs, at equal wall-clock: one for each combination of the other axes.

    Only members that are done take part, or, while no two values have one, whoever has been scored.
    """
    others: dict[tuple[tuple[str, str], ...], list[MemberResult]] = {}
    for result in results:
        alike = tuple((axis, value) for axis, value in result.values.items() if axis != comparison.axis)
        others.setdefault(alike, []).append(result)
    for scale in SCALES:
        found = [_compared(comparison, members, metric, scale, dict(alike)) for alike, members in others.items()]
        yield from _corrected([each for each in found if each is not None], metric)


def _compared(
    comparison: Comparison, members: Sequence[MemberResult], metric: str, scale: Scale, alike: dict[str, str]
) -> AxisComparison | None:
    """Without verdicts; None where fewer than two values, or not the baseline, have been scored."""
    axis = comparison.axis
    reached = {member.name: _reached(member, metric, scale) for member in members}
    scored = [member for member in members if reached[member.name] > 0]
    done = [member for member in scored if member.state == "done"]
    chosen = done if len({member.values[axis] for member in done}) > 1 else scored
    missing = [f"{member.name}: {member.state}" for member in members if member not in chosen]
    if not chosen:
        return None
    x = min(reached[member.name] for member in chosen)
    found: dict[str, dict[int, Estimate]] = {}
    for member in chosen:
        score = interpolate_score(member, metric, scale, x)
        if score is None:
            missing.append(f"{member.name}: first scored later than where all are equal")
        else:
            found.setdefault(member.values[axis], {})[member.seed] = score
    if comparison.baseline not in found or len(found) < 2:
        return None
    baseline = found.pop(comparison.baseline)
    order = [member.values[axis] for member in members]
    values = [ComparedValue(comparison.baseline, tuple(baseline), _mean(list(baseline.values())), verdict="baseline")]
    others = dict(sorted(found.items(), key=lambda item: order.index(item[0])))
    tested = _tested(baseline, others)
    for name, scores in others.items():
        value = ComparedValue(name, tuple(scores), _mean(list(scores.values())))
        pairs = [(scores[seed].value, baseline[seed].value) for seed in scores if seed in baseline]
        if name in tested:
            relative, p = tested[name]
            value = replace(value, difference=Estimate.mean([a - b for a, b in pairs]), relative=relative, p=p)
        else:
            value = replace(value, verdict=ONE_SEED if pairs else "no seed in common with the baseline")
        values.append(value)
    return AxisComparison(scale, x, alike, values, missing)


def _reached(member: MemberResult, metric: str, scale: Scale) -> float:
    """How far a member had come when it was last scored; 0 where that is not known."""
    places = (position(point, scale) for point in member.points if is_measured(point.scores, metric))
    return max((at for at in places if at > 0), default=0.0)  # what is not a number is not above zero


Scores = dict[int, Estimate]  # of one value, by seed


def _tested(baseline: Scores, others: dict[str, Scores]) -> dict[str, tuple[Estimate | None, float]]:
    """Relative difference to the baseline and p value of all values that share two seeds with it.

    The noise is pooled over all values, at the seeds that all have; where these are fewer than two, each is tested
    alone.
    """
    shared = sorted(set(baseline).intersection(*others.values()))
    if len(shared) < 2 and len(others) > 1:
        return {key: told for name in others for key, told in _tested(baseline, {name: others[name]}).items()}
    if len(shared) < 2:
        return {}
    table = [[scores[seed].value for seed in shared] for scores in (baseline, *others.values())]
    if min(map(min, table)) <= 0:
        return {name: (None, p) for name, (_, p) in zip(others, differences_to_first(table))}
    logarithms = [[math.log(value) for value in row] for row in table]
    return {name: (apart.map(math.expm1), p) for name, (apart, p) in zip(others, differences_to_first(logarithms))}


def _mean(scores: list[Estimate]) -> Estimate:
    return scores[0] if len(scores) == 1 else Estimate.mean([score.value for score in scores])


def _corrected(found: Sequence[AxisComparison], metric: str) -> Iterator[AxisComparison]:
    """With p values corrected for all that is compared on a scale, and the verdicts."""
    raw = [value.p for each in found for value in each.values if value.p is not None]
    corrected = iter(holm(raw))
    for each in found:
        values = []
        for value in each.values:
            if value.p is not None and value.difference is not None:
                p = next(corrected)
                better = (value.difference.value < 0) != (metric in HIGHER_IS_BETTER)
                value = replace(
                    value, p=p, verdict="undecided" if p >= SIGNIFICANCE else "better" if better else "worse"
                )
            values.append(value)
        yield replace(each, values=values)
