"""Which value is better: against scipy's paired test, equal footing by hand, and how often chance is believed."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from tessera.studies.comparison import ONE_SEED, AxisComparison, compare, interpolate_score


def at(found: list[AxisComparison], scale: str) -> AxisComparison:
    (one,) = [each for each in found if each.scale == scale]
    return one


def test_verdicts_are_those_of_paired_tests(synthetic):
    study = synthetic.designs()
    results = synthetic.designed(study)
    found = at(list(compare(study.compare, results, "fd")), "steps")
    ends = {name: [r.points[-1].scores["fd"].value for r in results if r.values["design"] == name]
            for name in study.axes["design"]}  # fmt: skip
    baseline, crossed, zero = found.values
    assert (baseline.name, baseline.verdict, baseline.seeds) == ("in-context", "baseline", (0, 1, 2))
    assert baseline.mean.value == pytest.approx(np.mean(ends["in-context"]))
    for value in (crossed, zero):
        interval = scipy.stats.ttest_rel(ends[value.name], ends["in-context"]).confidence_interval()
        assert (value.difference.low, value.difference.high) == pytest.approx((interval.low, interval.high))
        ratio = scipy.stats.gmean(ends[value.name]) / scipy.stats.gmean(ends["in-context"])
        assert value.relative.value == pytest.approx(ratio - 1)
        assert value.relative.low < value.relative.value < value.relative.high
    assert (crossed.verdict, zero.verdict) == ("undecided", "better")
    assert zero.p < 0.001
    alone = [result for result in results if result.values["design"] != "cross-attention"]  # then it is the paired test
    _, zero = at(list(compare(study.compare, alone, "fd")), "steps").values
    truth = scipy.stats.ttest_rel(np.log(ends["adaln-zero"]), np.log(ends["in-context"]))
    assert zero.p == pytest.approx(truth.pvalue)
    assert zero.relative.low == pytest.approx(math.expm1(truth.confidence_interval().low))


def test_a_value_of_other_seeds_does_not_spoil_the_others(synthetic):
    study = synthetic.designs()
    results = synthetic.designed(study)
    for index in (1, 4):  # cross-attention, seeds 0 and 1
        results[index] = replace(results[index], state="failed", points=[])
    _, crossed, zero = at(list(compare(study.compare, results, "fd")), "steps").values
    assert crossed.verdict == ONE_SEED
    assert (zero.verdict, zero.seeds) == ("better", (0, 1, 2))


def test_numbers_that_may_be_below_zero_are_compared_too(synthetic):
    study = synthetic.designs()
    results = [
        replace(r, points=[replace(p, scores={"kid": synthetic.score("kid", p.scores["fd"].value - 2)})
                           for p in r.points])
        for r in synthetic.designed(study)
    ]  # fmt: skip
    zero = at(list(compare(study.compare, results, "kid")), "steps").values[2]
    assert (zero.verdict, zero.relative) == ("better", None)
    assert zero.difference.high < 0


def test_all_are_compared_where_the_last_has_come_to(synthetic):
    """Cross-attention costs 1.2 times as much, so that at equal FLOPs it stands between its scored points."""
    study = synthetic.designs()
    results = synthetic.designed(study)
    found = list(compare(study.compare, results, "fd"))
    least = 6 * 0.1e9 * 1000 * synthetic.BATCH
    assert (at(found, "steps").x, at(found, "flops").x, at(found, "seconds").x) == pytest.approx((1000, least, 100))
    one = next(result for result in results if result.name == "cross-attention-seed0")
    before, after = (point.scores["fd"].value for point in one.points[-2:])
    share = math.log(2 / 1.2) / math.log(2)  # from 500 steps to 1000
    assert interpolate_score(one, "fd", "flops", least).value == pytest.approx(before + share * (after - before))
    assert interpolate_score(one, "fd", "steps", 500).value == before
    assert interpolate_score(one, "fd", "steps", 100) is None
    assert interpolate_score(one, "fd", "steps", 1001) is None


def test_of_one_seed_nothing_is_decided(synthetic):
    study = synthetic.designs(seeds=[0])
    results = synthetic.designed(study)
    for each in compare(study.compare, results, "fd"):
        assert all(value.verdict == ONE_SEED and value.p is None for value in each.values[1:])
    score = results[0].points[-1].scores["fd"]
    baseline = at(list(compare(study.compare, results, "fd")), "steps").values[0]
    assert (baseline.mean.low, baseline.mean.high) == (score.low, score.high)


def test_higher_is_better_where_it_is(synthetic):
    study = synthetic.designs()
    results = [
        replace(result, points=[replace(point, scores={"recall": point.scores["fd"]}) for point in result.points])
        for result in synthetic.designed(study)
    ]
    assert at(list(compare(study.compare, results, "recall")), "steps").values[2].verdict == "worse"


def test_members_that_are_not_done_take_no_part(synthetic):
    study = synthetic.designs()
    results = synthetic.designed(study)
    results[1] = replace(results[1], state="failed", points=results[1].points[:1])  # cross-attention, seed 0
    found = at(list(compare(study.compare, results, "fd")), "steps")
    assert found.x == 1000
    assert found.values[1].seeds == (1, 2)
    assert found.excluded == ["cross-attention-seed0: failed"]
    nobody = [replace(result, points=[]) for result in results]
    assert list(compare(study.compare, nobody, "fd")) == []


def test_other_axes_are_held(synthetic):
    study = synthetic.scaling(compare={"axis": "size", "baseline": "S"})
    found = [each for each in compare(study.compare, synthetic.scaled(study), "fd") if each.scale == "steps"]
    assert [each.other_axes for each in found] == [{"patch_size": "4"}, {"patch_size": "2"}]
    assert [len(each.values) for each in found] == [4, 4]


def test_chance_is_seldom_believed(synthetic):
    """Designs that differ by chance alone: in at most 5 % of studies (within what 300 allow) any is called a winner."""
    study = synthetic.designs(seeds=list(range(4)))
    results, random, believed = synthetic.designed(study), np.random.default_rng(1), 0
    for _ in range(300):
        drawn = [
            replace(r, points=[replace(r.points[-1], scores={"fd": synthetic.score("fd", random.normal(5, 1))})])
            for r in results
        ]
        found = at(list(compare(study.compare, drawn, "fd")), "steps")
        believed += any(value.verdict in ("better", "worse") for value in found.values)
    assert believed <= 27
