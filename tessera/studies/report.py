"""The report of a study: sentences computed from the scores, tables, figures, and the scaling law.

    FOLDER/report.md, report.html     the question, the answer, figures, members, limits
    FOLDER/figures/*.png, *.svg
    FOLDER/table.csv, sampling.csv    one row per scored point
    FOLDER/law.json                   the best size for a compute budget, which `tessera plan --budget` reads

A report can be written at any time. It names the members that are unfinished or failed, and what is still undecided.
"""

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from tessera.errors import TesseraError
from tessera.evaluation.protocol import Score
from tessera.files import atomic_write
from tessera.planning import scaling_law
from tessera.planning.scaling_law import Law
from tessera.reporting.document import Block, Bullets, Document, Figure, Heading, Paragraph, Table
from tessera.reporting.estimates import Estimate, kendall, spearman
from tessera.reporting.metrics import HIGHER_IS_BETTER
from tessera.reporting.text import format_duration, format_number
from tessera.studies import figures
from tessera.studies.comparison import AxisComparison, ComparedValue, Scale, compare
from tessera.studies.figures import StudyFigure, eval_points
from tessera.studies.results import MemberResult
from tessera.studies.seed_aggregation import (
    FinalPoints,
    Variant,
    average_seeds,
    check_one_protocol,
    final_points,
    main_metric,
    sizes_at_equal_flops,
)
from tessera.studies.study import Study

REPORT, FIGURES = "report.md", "figures"
TITLES = {  # of the figures, by name
    "comparison": "Comparison",
    "compute": "By training compute",
    "sizes": "By size, at equal training compute",
    "gmacs": "At equal steps",
    "steps": "Over training",
    "sampling": "By sampling compute",
    "images": "Samples",
}
SCALE_NAMES: dict[Scale, str] = {"steps": "steps", "flops": "training FLOPs", "seconds": "training time"}
COMPARISON_METHOD = (
    "Members are compared at the last point that all have reached. Between scored points a score is interpolated "
    "linearly in the logarithm of steps, FLOPs or seconds. Means have t intervals over seeds; with one seed, the "
    "metric's own interval. Differences are paired by seed, with the t interval of that pair alone. The relative "
    "change is computed from logarithms, with the noise pooled over all values (values by seeds; for two values this "
    "is the paired t test). p belongs to the same test, corrected by Holm for the number of values. Verdicts use 0.05."
)


def write(study: Study, results: Sequence[MemberResult], folder: Path) -> Path:
    """Write the report of a study in any state to a folder. Returns the path of report.md.

    Raises TesseraError if scores of one metric have different protocols, or if a file cannot be written.
    """
    check_one_protocol(results)
    metric = main_metric(results)
    averaged = average_seeds(results, metric) if metric else []
    atomic_write(folder / "table.csv", _points_csv(results))
    atomic_write(folder / "sampling.csv", _sampling_csv(results))
    law, no_law_reason = _fit_law(study, results, averaged, metric)
    if law is None:
        (folder / scaling_law.LAW_FILE).unlink(missing_ok=True)  # a previous one would not belong to this report
    else:
        law.save(folder / scaling_law.LAW_FILE)

    blocks: list[Block] = [Paragraph(_state(results))]
    if metric:
        compared = list(compare(study.compare, results, metric)) if study.compare else []
        answer = [*_best_sizes(study, averaged, metric)]
        answer = answer or ([] if study.law or study.compare else [*_best(study, averaged, metric)])
        answer += [*_scaling(study, averaged, metric), *(law.summary() if law else filter(None, [no_law_reason]))]
        answer += [*_sampling(averaged, metric), *(_verdict(study, each, metric) for each in compared)]
        if study.compare and not compared:
            answer.append(
                f"No comparison yet: {study.compare.baseline} and another {study.compare.axis} must be scored first."
            )
        blocks += [Heading("Answer"), Bullets(answer), *_figures(study, results, averaged, metric, folder / FIGURES)]
        blocks += [*_comparisons(compared, metric), *_exponents(study, averaged, metric)]
        blocks += _sizes(study, averaged, metric)
    blocks += [*_members(results), Heading("Limits"), Bullets([*_limits(study, results, averaged, metric)])]
    blocks += _protocol(results)
    Document(study.question, blocks).save(folder)
    return folder / REPORT


# The answer


def _state(results: Sequence[MemberResult]) -> str:
    text = f"{sum(result.state == 'done' for result in results)} of {len(results)} members are done."
    for state in ("failed", "unfinished", "not started"):
        names = [result.name for result in results if result.state == state]
        text += f" {state.capitalize()}: {', '.join(names)}." if names else ""
    return text


def _best(study: Study, averaged: Sequence[Variant], metric: str) -> Iterator[str]:
    """Without a law or a comparison: the best setting for each value of the first axis."""
    axis = next(iter(study.axes))
    for value in study.axes[axis]:
        final = {s.name: s.points[-1].score for s in averaged if s.points and s.values[axis] == value}
        if not final:
            continue
        best = (max if metric in HIGHER_IS_BETTER else min)(final, key=lambda name: final[name].value)
        score = final[best]
        near = [name for name, other in final.items() if name != best and _overlap(other, score)]
        text = f"Of {axis} {value}, {best} has the best {metric}" if len(final) > 1 else f"{best} has {metric}"
        yield f"{text}, {_range(score)}." + (f" Intervals overlap with {', '.join(near)}." if near else "")


def _best_sizes(study: Study, averaged: Sequence[Variant], metric: str) -> Iterator[str]:
    """The best size at each training compute, and its law."""
    sign, lower = (-1, "highest") if metric in HIGHER_IS_BETTER else (1, "lowest")
    levels, sizes = sizes_at_equal_flops(study, averaged), {}
    for flops, points in levels:
        best = min(range(len(points.x)), key=lambda i: sign * points.values[i])
        name, score = points.variants[best].name, points.y[best]
        text = f"{_sentence(points.description)[:-1]} {name} has the {lower} {metric}, {_range(score)}"
        size = None if sign < 0 else scaling_law.best_size(points.x, points.values)
        if size is not None:
            sizes[flops] = size
            text += f"; the minimum is at {size:.3g} GMACs"
        elif best in (0, len(points.x) - 1):
            end, other = ("smallest", "smaller") if best == 0 else ("largest", "larger")
            text += f": the {end} size, so the best one may be {other}"
        near = [v.name for v, y in zip(points.variants, points.y) if v.name != name and _overlap(y, score)]
        yield f"{text}." + (f" Ranges overlap with {', '.join(near)}." if near else "")
    try:
        line = scaling_law.fit([*sizes], [*sizes.values()]) if levels and sign > 0 else None
    except TesseraError:
        yield (
            f"No law of the best size: it has a minimum between measured sizes at {len(sizes)} of {len(levels)} "
            f"training FLOPs, and a law needs {scaling_law.MIN_POINTS}."
        )
        return
    if line is not None:
        growth = line.exponent
        yield (
            f"The best GMACs follow compute^{-growth.value:.2f} ({-growth.high:.2f} to {-growth.low:.2f}), the best "
            f"number of samples compute^{1 + growth.value:.2f}, by {line.points} minima between {line.low:.2g} and "
            f"{line.high:.2g} training FLOPs."
        )


def _scaling(study: Study, averaged: Sequence[Variant], metric: str) -> Iterator[str]:
    """Whether more compute gives a better metric."""
    if study.law is None:
        return
    compute = "GMACs" if study.law.against == "gmacs" else "training FLOPs"
    points = final_points(averaged, study.law.against)
    try:
        if not points.x:
            raise TesseraError("no step is common to all that were scored")
        rho, tau = (measure(points.x, points.values) for measure in (spearman, kendall))
    except TesseraError as error:
        where = f" {points.description}" if points.description else ""
        yield f"The correlation of {metric} with {compute}{where} is unknown: {error}."
        if not points.x:
            return
    else:
        sign = "lower" if rho.high < 0 else "higher" if rho.low > 0 else ""
        opening = f"More {compute} go with a {sign} {metric}" if sign else f"No clear effect of {compute} on {metric}"
        correlations = f"Spearman's rank correlation is {_range(rho)}, Kendall's {_range(tau)}"
        yield f"{opening} {points.description}: {correlations}, over {len(points.x)} settings."
    if metric in HIGHER_IS_BETTER:
        yield f"No law: for {metric} higher is better, and laws are fitted to metrics that fall."
        return
    try:
        line = scaling_law.fit(points.x, points.values)
    except TesseraError as error:
        yield _sentence(str(error))
        return
    exponent = line.exponent
    yield (
        f"{metric} follows {compute}^-{exponent.value:.3f} (exponent {exponent.low:.3f} to {exponent.high:.3f}) "
        f"{points.description}, over {_fold(max(points.x) / min(points.x))} in {compute}. The points deviate by "
        f"{_deviation(line.error)} from the line."
        + ("" if exponent.low > 0 else " The interval contains zero: there may be no decrease at all.")
    )
    yield from _held_out(points, min(study.law.held_out, len(points.x)), metric)


def _held_out(points: FinalPoints, count: int, metric: str) -> Iterator[str]:
    mask = scaling_law.largest_mask(points.x, count)
    try:
        predicted = scaling_law.predict_held_out(points.x, points.values, mask)
    except TesseraError as error:
        yield f"The law cannot be tested on the largest: {str(error).removeprefix('no law: ')} without those held out."
        return
    names = sorted((x, setting.name) for x, setting, held_out in zip(points.x, points.variants, mask) if held_out)
    for (_, name), point in zip(names, predicted):
        yield (
            f"Held out: the law of the others predicts {metric} {_range(point.predicted)} for {name}; measured "
            f"{point.measured:.4g}. The error is {point.error:+.1%}, {'inside' if point.inside else 'outside'} the "
            "prediction interval."
        )


def _sampling(averaged: Sequence[Variant], metric: str) -> Iterator[str]:
    """Whether more sampling steps can replace a larger model."""
    wins = pairs = 0
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    for one, other in combinations([setting for setting in averaged if setting.sampling_points], 2):
        small, large = sorted((one, other), key=lambda setting: setting.gmacs)
        if large.gmacs <= small.gmacs * 1.01:
            continue
        for less in large.sampling_points:
            for more in (sampled for sampled in small.sampling_points if sampled.macs >= less.macs):
                pairs += 1
                wins += sign * (more.score.value - less.score.value) < 0
    if pairs:
        yield (
            f"A smaller model with at least as much compute per image as a larger one has the better {metric} in "
            f"{wins} of {pairs} pairs ({wins / pairs:.0%})."
        )


def _verdict(study: Study, compared: AxisComparison, metric: str) -> str:
    """Which value is best, by how much, and whether the difference is significant."""
    assert study.compare is not None
    baseline, *others = compared.values
    winner = (max if metric in HIGHER_IS_BETTER else min)(compared.values, key=lambda value: value.mean.value)
    worse = [value.name for value in others if value.verdict == "worse"]
    suffix = f" Worse than the baseline at 95 %: {', '.join(worse)}." if worse else ""
    start = f"At equal {SCALE_NAMES[compared.scale]} ({_at(compared)}{_alike(compared)})"
    if winner is baseline:
        undecided = " One seed." if all(value.p is None for value in others) else " None is worse at 95 % either."
        start += f" no {study.compare.axis} has a better {metric} than the baseline {baseline.name}"
        return f"{start}, {_range(baseline.mean)}.{suffix or undecided}"
    start += f" {winner.name} has the best {metric}, {_range(winner.mean)}; the baseline {baseline.name} has "
    start += f"{_range(baseline.mean)}."
    change = _relative_change(winner, baseline)
    if winner.difference is None or winner.p is None:
        return f"{start} {f'The change is {change}: ' if change else ''}{winner.verdict}.{suffix}"
    better = ", ".join(value.name for value in others if value.verdict == "better" and value is not winner)
    return (
        f"{start} The difference is {_range(winner.difference)}, {f'{change}, ' if change else ''}p = {winner.p:.2g}: "
        f"{winner.verdict} at 95 %.{f' Also better: {better}.' if better else ''}{suffix}"
    )


def _relative_change(value: ComparedValue, baseline: ComparedValue) -> str:
    """The relative difference to the baseline; with one seed, without an interval."""
    if value.relative is not None:
        relative = value.relative
        return f"{relative.value:+.1%} ({relative.low:+.1%} to {relative.high:+.1%})"
    if len(value.seeds) == 1 and min(value.mean.value, baseline.mean.value) > 0:
        return f"{value.mean.value / baseline.mean.value - 1:+.1%}"
    return ""


def _fit_law(
    study: Study, results: Sequence[MemberResult], averaged: Sequence[Variant], metric: str | None
) -> tuple[Law | None, str]:
    """The law of the best size for a compute budget, or the reason why there is none."""
    if study.law is None or metric is None or metric in HIGHER_IS_BETTER:
        return None, ""
    fingerprint = next(p.scores[metric].fingerprint for r in results for p in r.points if metric in p.scores)
    try:
        return Law(metric, fingerprint, study.question, tuple(eval_points(averaged))), ""
    except TesseraError as error:
        return None, _sentence(str(error))


# Figures and tables


def _figures(
    study: Study, results: Sequence[MemberResult], averaged: Sequence[Variant], metric: str, folder: Path
) -> Iterator[Block]:
    """The figures for which there are data. Files of the others, from an earlier report, are removed."""
    makers: dict[str, tuple[Any, Callable[[], StudyFigure | None]]] = {  # whether the study requests it, and how
        "comparison": (study.compare, lambda: figures.comparison(study, averaged, metric)),
        "compute": (True, lambda: figures.against_compute(study, averaged, metric)),
        "sizes": (sizes_at_equal_flops(study, averaged), lambda: figures.by_size(study, averaged, metric)),
        "gmacs": (study.law, lambda: figures.against_gmacs(study, averaged, metric)),
        "steps": (True, lambda: figures.over_steps(study, averaged, metric)),
        "sampling": (study.sampling_steps, lambda: figures.sampling_compute(study, averaged, metric)),
        "images": (True, lambda: figures.image_grids(study, results)),
    }
    for name, (requested, make) in makers.items():
        figure = make() if requested else None
        if figure is not None:
            figure.save(folder)
            yield Heading(TITLES[name])
            yield Figure(figure.png, figure.caption, file=f"{FIGURES}/{name}.png")
            continue
        for suffix in ("png", "svg"):
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)
        if requested:
            yield Paragraph(f"There are no data yet for the figure “{TITLES[name]}”.")


def _comparisons(compared: Sequence[AxisComparison], metric: str) -> Iterator[Block]:
    if compared:
        yield Heading("Comparison at equal cost")
        yield Paragraph(COMPARISON_METHOD)
    for each in compared:
        rows = []
        for value in each.values:
            difference = "" if value.difference is None else _range(value.difference, sign="+")
            change = "" if value is each.values[0] else _relative_change(value, each.values[0])
            p = "" if value.p is None else f"{value.p:.2g}"
            rows.append([value.name, str(len(value.seeds)), _range(value.mean), difference, change, p, value.verdict])
        yield Heading(f"At equal {SCALE_NAMES[each.scale]}: {_at(each)}{_alike(each)}", level=3)
        yield Table(rows, ["value", "seeds", metric, "minus baseline", "relative", "p", "verdict"])
        if each.excluded:
            yield Paragraph(f"Without {', '.join(each.excluded)}.")


def _exponents(study: Study, averaged: Sequence[Variant], metric: str) -> Iterator[Block]:
    """The law of all settings, and of those with each value of each axis: is it the same along both axes?"""
    if study.law is None or metric in HIGHER_IS_BETTER:
        return
    points = final_points(averaged, study.law.against)
    groups = {"all": list(range(len(points.variants)))}
    for axis, values in study.axes.items() if len(study.axes) > 1 else ():
        for value in values:
            groups[f"{axis} {value}"] = [i for i, s in enumerate(points.variants) if s.values[axis] == value]
    rows = []
    for name, chosen in groups.items():
        try:
            line = scaling_law.fit([points.x[i] for i in chosen], [points.values[i] for i in chosen])
        except TesseraError as error:
            rows.append([name, str(len(chosen)), str(error), ""])
        else:
            rows.append([name, str(len(chosen)), _range(line.exponent, 3), _deviation(line.error)])
    yield Heading(f"Scaling law {points.description}".strip())
    yield Table(rows, ["settings", "points", "exponent (95 %)", "deviation"])


def _sizes(study: Study, averaged: Sequence[Variant], metric: str) -> Iterator[Block]:
    """Every size at each training compute."""
    levels = sizes_at_equal_flops(study, averaged)
    if levels:
        names = {variant.name: variant for _, points in levels for variant in points.variants}
        rows = []
        for flops, points in levels:
            scores = {variant.name: _range(score) for variant, score in zip(points.variants, points.y)}
            rows.append([f"{flops:.3g}", *(scores.get(name, "") for name in names)])
        yield Heading("Sizes at equal training FLOPs")
        head = [f"{name}: {variant.gmacs:.3g} GMACs" for name, variant in names.items()]
        yield Table(rows, ["training FLOPs", *head])


def _members(results: Sequence[MemberResult]) -> Iterator[Block]:
    metrics = list(dict.fromkeys(name for result in results for point in result.points for name in point.scores))
    times = {  # actual and planned seconds
        result.name: (result.points[-1].seconds, result.planned_seconds)
        for result in results
        if result.state == "done" and result.points and result.points[-1].seconds > 0 and result.planned_seconds > 0
    }
    rows = []
    for result in results:
        last = result.points[-1] if result.points else None
        row = [result.name, f"{result.parameters:,}", f"{result.macs / 1e9:.4g}", result.state]
        row += [f"{last.step:,}", f"{last.flops:.3g}"] if last else ["", ""]
        row += [format_duration(result.planned_seconds), format_duration(last.seconds) if last else ""]
        row.append(f"{times[result.name][0] / times[result.name][1]:.2f}" if result.name in times else "")
        scores = [last.scores.get(metric) if last else None for metric in metrics]
        rows.append([*row, *("" if s is None else _range(Estimate(s.value, s.low, s.high)) for s in scores)])
    head = ["member", "parameters", "GMACs", "state", "steps", "training FLOPs", "planned", "actual", "ratio"]
    yield Heading("Members")
    yield Table(rows, [*head, *metrics])
    if times:
        actual, planned = map(sum, zip(*times.values()))
        yield Paragraph(
            f"Training of the {len(times)} that are done: planned {format_duration(planned)}, actual "
            f"{format_duration(actual)} ({actual / planned:.2f} of the plan). Scoring and sampling are not included."
        )
    failed = [(result.name, (result.error or "").strip()) for result in results if result.state == "failed"]
    if failed:
        yield Bullets(
            [f"{name} failed: {(fault or 'no reason is known').splitlines()[0][:300]}" for name, fault in failed]
        )


def _limits(
    study: Study, results: Sequence[MemberResult], averaged: Sequence[Variant], metric: str | None
) -> Iterator[str]:
    """For what the data are too few or too close together."""
    if metric is None:
        yield "Nothing is scored yet."
        return
    fewest = min((len(setting.seeds) for setting in averaged), default=0)
    if fewest < 2:
        yield "One seed: intervals are the metric's own and do not include the variation between seeds."
    elif fewest < 5:
        yield f"{fewest} seeds: intervals of a mean over so few are wide, and small differences stay undecided."
    if count := sum(result.state != "done" for result in results):
        yield f"{count} of {len(results)} members are not done. The answer may change with them."
    flops = [point.flops for setting in averaged for point in setting.points if point.flops > 0]
    if study.law and flops:
        gmacs = [setting.gmacs for setting in averaged]
        yield (
            f"{len(averaged)} settings over {_fold(max(gmacs) / min(gmacs))} in GMACs, up to {max(flops):.2g} training "
            "FLOPs: everything beyond is not measured. The paper's models span a 330-fold range, up to 7.3e+19 FLOPs "
            "at 400K steps."
        )
        yield "Settings that share a size or a patch size are not independent, so the law's intervals are too narrow."
        yield "The frontier consists of the lowest scores, which are partly lucky: it lies a little too low."
    counts = {p.scores[metric].protocol.samples for r in results for p in r.points if metric in p.scores}
    yield (
        f"{metric} is computed from {', '.join(f'{count:,}' for count in sorted(counts))} images, with one kind of "
        "features, on one data set. Its level, and the order of close settings, may differ with others."
    )
    if study.compare:
        yield "All members share their other settings. Each design might improve with its own learning rate."


def _protocol(results: Sequence[MemberResult]) -> Iterator[Block]:
    """How each metric was scored."""
    rows: dict[str, list[str]] = {}
    for name, score in (pair for result in results for point in result.points for pair in point.scores.items()):
        protocol, sampling = score.protocol, score.protocol.sampling or {}
        sampler = sampling.get("sampler")
        kind = sampler.get("kind", "") if isinstance(sampler, dict) else str(sampler or "")
        steps = f"{kind}, {sampling.get('num_steps')} steps" if sampling else ""
        rows[name] = [name, score.fingerprint, f"{protocol.samples:,}", protocol.features.get("name", ""), steps]
    if rows:
        yield Heading("Protocol")
        yield Table(list(rows.values()), ["metric", "fingerprint", "samples", "features", "sampler"])


# CSV


def _points_csv(results: Sequence[MemberResult]) -> str:
    rows = []
    for result in results:
        member = {"member": result.name, **result.values, "seed": result.seed, "state": result.state}
        member |= {"parameters": result.parameters, "gmacs": result.macs / 1e9}
        for point in result.points:
            progress = {"step": point.step, "samples": point.samples, "training_flops": point.flops}
            rows.append(member | progress | {"seconds": point.seconds} | _score_columns(point.scores))
    return _csv(rows)


def _sampling_csv(results: Sequence[MemberResult]) -> str:
    rows = []
    for result in results:
        member = {"member": result.name, **result.values, "seed": result.seed}
        member |= {"parameters": result.parameters, "gmacs": result.macs / 1e9}
        for sampled in result.sampling_points:
            cost = {"sampling_steps": sampled.num_steps, "gmacs_per_image": sampled.macs / 1e9}
            rows.append(member | cost | _score_columns(sampled.scores))
    return _csv(rows)


def _score_columns(scores: dict[str, Score]) -> dict[str, Any]:
    columns = {}
    for metric, score in scores.items():
        columns |= {metric: score.value, f"{metric}_low": score.low, f"{metric}_high": score.high}
        columns[f"{metric}_fingerprint"] = score.fingerprint
    return columns


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# Text


def _overlap(one: Estimate, other: Estimate) -> bool:
    return one.low <= other.high and other.low <= one.high


def _range(estimate: Estimate, digits: int = 4, sign: str = "") -> str:
    form = f"{sign}.{digits}g"
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def _deviation(error: float) -> str:
    """A standard deviation of logarithms as a relative deviation."""
    return f"{math.expm1(error):.1%}"


def _fold(ratio: float) -> str:
    return f"a {format_number(ratio)}-fold range"


def _at(compared: AxisComparison) -> str:
    if compared.scale == "seconds":
        return format_duration(compared.x)
    return f"{compared.x:,.0f}" if compared.scale == "steps" else f"{compared.x:.3g}"


def _alike(compared: AxisComparison) -> str:
    return "".join(f", {axis} {value}" for axis, value in compared.other_axes.items())


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
