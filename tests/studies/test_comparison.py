"""Comparisons against scipy's paired test, interpolation by hand, and the rate of false verdicts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from tessera.studies.comparison import ONE_SEED, AxisComparison, compare, interpolate_score


def on_scale(comparisons: list[AxisComparison], scale: str) -> AxisComparison:
    (comparison,) = [each for each in comparisons if each.scale == scale]
    return comparison


def test_verdicts_are_those_of_paired_tests(synthetic):
    study = synthetic.design_study()
    results = synthetic.design_results(study)
    comparison = on_scale(list(compare(study.compare, results, "fd")), "steps")
    ends = {name: [r.points[-1].scores["fd"].value for r in results if r.values["design"] == name]
            for name in study.axes["design"]}  # fmt: skip
    baseline, cross, zero = comparison.values
    assert (baseline.name, baseline.verdict, baseline.seeds) == ("in-context", "baseline", (0, 1, 2))
    assert baseline.mean.value == pytest.approx(np.mean(ends["in-context"]))
    for value in (cross, zero):
        interval = scipy.stats.ttest_rel(ends[value.name], ends["in-context"]).confidence_interval()
        assert (value.difference.low, value.difference.high) == pytest.approx((interval.low, interval.high))
        ratio = scipy.stats.gmean(ends[value.name]) / scipy.stats.gmean(ends["in-context"])
        assert value.relative.value == pytest.approx(ratio - 1)
        assert value.relative.low < value.relative.value < value.relative.high
    assert (cross.verdict, zero.verdict) == ("undecided", "better")
    assert zero.p < 0.001
    alone = [result for result in results if result.values["design"] != "cross-attention"]
    _, zero = on_scale(list(compare(study.compare, alone, "fd")), "steps").values
    expected = scipy.stats.ttest_rel(np.log(ends["adaln-zero"]), np.log(ends["in-context"]))
    assert zero.p == pytest.approx(expected.pvalue)
    assert zero.relative.low == pytest.approx(math.expm1(expected.confidence_interval().low))


def test_a_value_without_common_seeds_does_not_affect_the_others(synthetic):
    study = synthetic.design_study()
    results = synthetic.design_results(study)
    for index in (1, 4):  # cross-attention, seeds 0 and 1
        results[index] = replace(results[index], state="failed", points=[])
    _, cross, zero = on_scale(list(compare(study.compare, results, "fd")), "steps").values
    assert cross.verdict == ONE_SEED
    assert (zero.verdict, zero.seeds) == ("better", (0, 1, 2))


def test_members_scored_only_at_their_ends_are_compared_though_budgets_are_rounded_to_steps(synthetic):
    study = synthetic.design_study()
    steps = {"in-context": (1000, 3.0e10), "cross-attention": (667, 4.5e10), "adaln-zero": (909, 3.3e10)}
    results = []
    for result in synthetic.design_results(study):
        count, flops = steps[result.values["design"]]  # 3e13 FLOPs, 15e9 more and 3e9 less
        results.append(replace(result, points=[replace(result.points[-1], step=count, flops=count * flops)]))
    comparison = on_scale(list(compare(study.compare, results, "fd")), "flops")
    assert [(value.name, value.seeds) for value in comparison.values] == [(name, (0, 1, 2)) for name in steps]
    assert comparison.values[2].verdict == "better"
    assert not [each for each in compare(study.compare, results, "fd") if each.scale == "steps"]
    late = [replace(r, points=[replace(r.points[0], step=1002, flops=1002 * 3.0e10)])
            if r.values["design"] == "in-context" else r for r in results]  # fmt: skip
    assert not [each for each in compare(study.compare, late, "fd") if each.scale == "flops"]


def test_scores_below_zero_are_compared(synthetic):
    study = synthetic.design_study()
    results = [
        replace(r, points=[replace(p, scores={"kid": synthetic.score("kid", p.scores["fd"].value - 2)})
                           for p in r.points])
        for r in synthetic.design_results(study)
    ]  # fmt: skip
    zero = on_scale(list(compare(study.compare, results, "kid")), "steps").values[2]
    assert (zero.verdict, zero.relative) == ("better", None)
    assert zero.difference.high < 0


def test_values_are_compared_at_the_farthest_common_point(synthetic):
    """Cross-attention costs 1.2 times as much: at equal FLOPs it is between its scored points."""
    study = synthetic.design_study()
    results = synthetic.design_results(study)
    comparisons = list(compare(study.compare, results, "fd"))
    least = 6 * 0.1e9 * 1000 * synthetic.BATCH
    assert (
        on_scale(comparisons, "steps").x,
        on_scale(comparisons, "flops").x,
        on_scale(comparisons, "seconds").x,
    ) == pytest.approx((1000, least, 100))
    one = next(result for result in results if result.name == "cross-attention-seed0")
    before, after = (point.scores["fd"].value for point in one.points[-2:])
    weight = math.log(2 / 1.2) / math.log(2)  # from 500 steps to 1000
    assert interpolate_score(one, "fd", "flops", least).value == pytest.approx(before + weight * (after - before))
    assert interpolate_score(one, "fd", "steps", 500).value == before
    assert interpolate_score(one, "fd", "steps", 100) is None
    assert interpolate_score(one, "fd", "steps", 1001) is None


def test_one_seed_is_undecided(synthetic):
    study = synthetic.design_study(seeds=[0])
    results = synthetic.design_results(study)
    for each in compare(study.compare, results, "fd"):
        assert all(value.verdict == ONE_SEED and value.p is None for value in each.values[1:])
    score = results[0].points[-1].scores["fd"]
    baseline = on_scale(list(compare(study.compare, results, "fd")), "steps").values[0]
    assert (baseline.mean.low, baseline.mean.high) == (score.low, score.high)


def test_for_some_metrics_higher_is_better(synthetic):
    study = synthetic.design_study()
    results = [
        replace(result, points=[replace(point, scores={"recall": point.scores["fd"]}) for point in result.points])
        for result in synthetic.design_results(study)
    ]
    assert on_scale(list(compare(study.compare, results, "recall")), "steps").values[2].verdict == "worse"


def test_members_that_are_not_done_are_excluded(synthetic):
    study = synthetic.design_study()
    results = synthetic.design_results(study)
    results[1] = replace(results[1], state="failed", points=results[1].points[:1])  # cross-attention, seed 0
    comparison = on_scale(list(compare(study.compare, results, "fd")), "steps")
    assert comparison.x == 1000
    assert comparison.values[1].seeds == (1, 2)
    assert comparison.excluded == ["cross-attention-seed0: failed"]
    unscored = [replace(result, points=[]) for result in results]
    assert list(compare(study.compare, unscored, "fd")) == []


def test_each_combination_of_the_other_axes_is_compared(synthetic):
    study = synthetic.scaling_study(compare={"axis": "size", "baseline": "S"})
    comparison = [
        each for each in compare(study.compare, synthetic.scaling_results(study), "fd") if each.scale == "steps"
    ]
    assert [each.other_axes for each in comparison] == [{"patch_size": "4"}, {"patch_size": "2"}]
    assert [len(each.values) for each in comparison] == [4, 4]


def test_false_verdicts_are_rare(synthetic):
    """Designs that differ by chance: at most 5 % of the studies, within what 300 allow, have a verdict."""
    study = synthetic.design_study(seeds=list(range(4)))
    results, random, false_verdicts = synthetic.design_results(study), np.random.default_rng(1), 0
    for _ in range(300):
        samples = [
            replace(r, points=[replace(r.points[-1], scores={"fd": synthetic.score("fd", random.normal(5, 1))})])
            for r in results
        ]
        comparison = on_scale(list(compare(study.compare, samples, "fd")), "steps")
        false_verdicts += any(value.verdict in ("better", "worse") for value in comparison.values)
    assert false_verdicts <= 27
