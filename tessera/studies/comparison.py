"""Comparison of the values of an axis with a baseline, at equal steps, training FLOPs or training time."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

from tessera.reporting.estimates import Estimate, differences_to_first, holm
from tessera.reporting.metrics import HIGHER_IS_BETTER
from tessera.studies.results import MemberResult, TrainingPoint
from tessera.studies.seed_aggregation import is_measured
from tessera.studies.study import Comparison

Scale = Literal["steps", "flops", "seconds"]  # of training, on which members are compared
SCALES: tuple[Scale, ...] = get_args(Scale)
SIGNIFICANCE = 0.05  # a verdict needs a p value below
ONE_SEED = "one seed: it is undecided whether the seed makes the difference"
SeedScores = dict[int, Estimate]  # of one value, by seed


@dataclass(frozen=True)
class ComparedValue:
    """One value of the compared axis.

    mean: over seeds with its t interval; for one seed, the score with its own interval. difference: to the baseline,
    paired by seed, with the t interval of that pair alone. relative: the difference as a fraction (0.1: 10 % above the
    baseline), from logarithms, because noise grows with the score, and with the noise of all values pooled, because
    few seeds estimate the noise of one value badly. p: of the same test, corrected by Holm for the number of values.
    If a score is not above zero, there is no relative difference and p is that of the scores themselves.
    """

    name: str
    seeds: tuple[int, ...]
    mean: Estimate
    difference: Estimate | None = None
    relative: Estimate | None = None
    p: float | None = None
    verdict: str = ""  # "baseline", "better", "worse", "undecided", or why there is none


@dataclass(frozen=True)
class AxisComparison:
    """The values of an axis at one point of training, with equal values on the other axes. The baseline is first."""

    scale: Scale
    x: float  # the farthest point that all have reached
    other_axes: dict[str, str]
    values: list[ComparedValue]
    excluded: list[str]  # members and the reason


def position(point: TrainingPoint, scale: Scale) -> float:
    """The progress of a member on a scale."""
    return {"steps": float(point.step), "flops": point.flops, "seconds": point.seconds}[scale]


def interpolate_score(
    result: MemberResult, metric: str, scale: Scale, x: float, tolerance: float = 0.0
) -> Estimate | None:
    """A member's score at x, linear in log x between scored points; None outside them.

    tolerance: the first point may lie beyond x by so much.
    """
    points = [
        (position(point, scale), Estimate(score.value, score.low, score.high))
        for point in result.points
        if is_measured(point.scores, metric) and position(point, scale) > 0
        for score in [point.scores[metric]]
    ]
    for at, score in points:
        if math.isclose(at, x, rel_tol=1e-9):
            return score
    for (before, a), (after, b) in pairwise(points):
        if before < x < after:
            weight = math.log(x / before) / math.log(after / before)
            pairs = zip((a.value, a.low, a.high), (b.value, b.low, b.high))
            return Estimate(*(left + weight * (right - left) for left, right in pairs))
    return points[0][1] if points and x < points[0][0] <= x + tolerance else None


def compare(comparison: Comparison, results: Sequence[MemberResult], metric: str) -> Iterator[AxisComparison]:
    """Compare on every scale, once for each combination of the other axes.

    Only members that are done are compared, or all scored members while fewer than two values have one that is done.
    """
    groups: dict[tuple[tuple[str, str], ...], list[MemberResult]] = {}
    for result in results:
        others = tuple((axis, value) for axis, value in result.values.items() if axis != comparison.axis)
        groups.setdefault(others, []).append(result)
    for scale in SCALES:
        comparisons = [_compare(comparison, group, metric, scale, dict(axes)) for axes, group in groups.items()]
        yield from _add_verdicts([each for each in comparisons if each is not None], metric)


def _compare(
    comparison: Comparison, group: Sequence[MemberResult], metric: str, scale: Scale, other_axes: dict[str, str]
) -> AxisComparison | None:
    """Without verdicts; None if fewer than two values, or not the baseline, have been scored."""
    axis = comparison.axis
    last = {member.name: _last_position(member, metric, scale) for member in group}
    scored = [member for member in group if last[member.name] > 0]
    done = [member for member in scored if member.state == "done"]
    included = done if len({member.values[axis] for member in done}) > 1 else scored
    excluded = [f"{member.name}: {member.state}" for member in group if member not in included]
    if not included:
        return None
    x = min(last[member.name] for member in included)
    # A budget in FLOPs is rounded to whole steps, so that members which are scored only at their ends, and should be
    # equal, are apart by up to half a step of each.
    step_flops = [point.flops / point.step for member in included for point in member.points[-1:] if point.step]
    tolerance = max(step_flops, default=0.0) if scale == "flops" else 0.0
    by_value: dict[str, SeedScores] = {member.values[axis]: {} for member in group}
    for member in included:
        score = interpolate_score(member, metric, scale, x, tolerance)
        if score is None:
            excluded.append(f"{member.name}: first scored after the point of comparison")
        else:
            by_value[member.values[axis]][member.seed] = score
    by_value = {name: scores for name, scores in by_value.items() if scores}
    if comparison.baseline not in by_value or len(by_value) < 2:
        return None
    baseline = by_value.pop(comparison.baseline)
    values = [ComparedValue(comparison.baseline, tuple(baseline), _mean(baseline), verdict="baseline")]
    tests = _test(baseline, by_value)
    for name, scores in by_value.items():
        value = ComparedValue(name, tuple(scores), _mean(scores))
        pairs = [(scores[seed].value, baseline[seed].value) for seed in scores if seed in baseline]
        if name in tests:
            relative, p = tests[name]
            value = replace(value, difference=Estimate.mean([a - b for a, b in pairs]), relative=relative, p=p)
        else:
            value = replace(value, verdict=ONE_SEED if pairs else "no seed in common with the baseline")
        values.append(value)
    return AxisComparison(scale, x, other_axes, values, excluded)


def _last_position(member: MemberResult, metric: str, scale: Scale) -> float:
    """The progress of a member when it was last scored; 0 if unknown."""
    positions = (position(point, scale) for point in member.points if is_measured(point.scores, metric))
    return max((at for at in positions if at > 0), default=0.0)  # NaN is not above zero


def _test(baseline: SeedScores, others: dict[str, SeedScores]) -> dict[str, tuple[Estimate | None, float]]:
    """Relative difference to the baseline and p value of all values that have two seeds in common with it.

    The noise is pooled over all values, on the seeds that all have; if these are fewer than two, each value is tested
    alone.
    """
    shared = sorted(set(baseline).intersection(*others.values()))
    if len(shared) < 2 and len(others) > 1:
        return {key: test for name in others for key, test in _test(baseline, {name: others[name]}).items()}
    if len(shared) < 2:
        return {}
    table = [[scores[seed].value for seed in shared] for scores in (baseline, *others.values())]
    if min(map(min, table)) <= 0:
        return {name: (None, p) for name, (_, p) in zip(others, differences_to_first(table))}
    tests = differences_to_first([[math.log(value) for value in row] for row in table])
    return {name: (difference.map(math.expm1), p) for name, (difference, p) in zip(others, tests)}


def _mean(scores: SeedScores) -> Estimate:
    values = list(scores.values())
    return values[0] if len(values) == 1 else Estimate.mean([score.value for score in values])


def _add_verdicts(comparisons: Sequence[AxisComparison], metric: str) -> Iterator[AxisComparison]:
    """Correct the p values for all tests on the scale and add the verdicts."""
    p_values = [value.p for each in comparisons for value in each.values if value.p is not None]
    corrected = iter(holm(p_values))
    for each in comparisons:
        values = []
        for value in each.values:
            if value.p is not None and value.difference is not None:
                p = next(corrected)
                better = (value.difference.value < 0) != (metric in HIGHER_IS_BETTER)
                verdict = "undecided" if p >= SIGNIFICANCE else "better" if better else "worse"
                value = replace(value, p=p, verdict=verdict)
            values.append(value)
        yield replace(each, values=values)
