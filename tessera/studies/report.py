"""What a study found, for people and for programs: sentences made from the numbers, tables, figures, a law.

    FOLDER/report.md, report.html     the question, the answer, figures, members, what the scale cannot show
    FOLDER/figures/*.png, *.svg
    FOLDER/table.csv, sampling.csv    one row a scored point
    FOLDER/law.json                   the best size for a budget, which `tessera plan --budget` reads

Written from whatever is there: members that are unfinished or failed are named, and so is what cannot be said yet.
"""

import csv
import html
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from tessera.errors import TesseraError
from tessera.evaluation.protocol import Score
from tessera.files import atomic_write
from tessera.planning import scaling_law, statistics
from tessera.planning.scaling_law import Law
from tessera.planning.statistics import Estimate
from tessera.reporting import page as page_html
from tessera.reporting.charts import short
from tessera.studies import figures
from tessera.studies.comparison import Compared, Scale, Value, compare
from tessera.studies.figures import StudyFigure, scored
from tessera.studies.results import Result
from tessera.studies.seed_aggregation import FinalPoints, Setting, check_alike, deciding, final_points, settings
from tessera.studies.study import Study
from tessera.training.scores import HIGHER

REPORT, FIGURES = "report.md", "figures"
TITLES = {  # of the figures, by their names
    "compute": "Against training compute",
    "gmacs": "At equal steps",
    "steps": "Over training",
    "sampling": "Sampling compute against model compute",
    "comparison": "The comparison",
    "pictures": "Pictures",
}
EQUAL: dict[Scale, str] = {"steps": "steps", "flops": "training FLOPs", "seconds": "time of training"}


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    file: str  # relative to the report
    png: bytes
    about: str


Part = str | list[str] | Table | Figure  # a heading ("## ...") or a paragraph; the points of a list; ...


def write(study: Study, results: Sequence[Result], folder: Path) -> Path:
    """Write the report of a study, in whatever state it is, into a folder. Returns report.md.

    Raises TesseraError if scores of one metric were made by different protocols, or if it cannot be written.
    """
    check_alike(results)
    metric = deciding(results)
    found = settings(results, metric) if metric else []
    atomic_write(folder / "table.csv", _points(study, results))
    atomic_write(folder / "sampling.csv", _drawn(study, results))
    best, reason = _law(study, results, found, metric)
    if best is None:
        (folder / scaling_law.FILE).unlink(missing_ok=True)  # an earlier one would be taken for this report's
    else:
        best.save(folder / scaling_law.FILE)

    parts: list[Part] = [f"# {study.question}", _state(results)]
    if metric:
        told = [*_scaling(study, found, metric), *(best.words() if best else [reason] * bool(reason))]
        compared = list(compare(study.compare, results, metric)) if study.compare else []
        told += [*_sampling(found, metric), *(_verdict(study, each, metric) for each in compared)]
        if study.compare and not compared:
            told.append(
                f"Nothing to compare yet: {study.compare.baseline} and another {study.compare.axis} must be scored."
            )
        if not (study.law or study.compare):
            told = [*_best(study, found, metric), *told]
        parts += ["## Answer", told]
        parts += _figures(study, results, found, metric, folder / FIGURES)
        parts += _comparisons(compared, metric)
        parts += _exponents(study, found, metric)
    parts += _members(results)
    parts += ["## What this cannot show", list(_limits(study, results, found, metric))]
    parts += _protocol(results)
    atomic_write(folder / REPORT, "\n\n".join(map(_markdown, parts)) + "\n")
    style = "img { image-rendering: auto; background: #fff } figure { margin: 1em 0 }"
    atomic_write(folder / "report.html", page_html.document(study.question, "\n".join(map(_html, parts)), style))
    return folder / REPORT


# The answer


def _state(results: Sequence[Result]) -> str:
    done = [result for result in results if result.state == "done"]
    told = f"{len(done)} of {len(results)} members are done."
    for state in ("failed", "unfinished", "not begun"):
        names = [result.name for result in results if result.state == state]
        told += f" {state.capitalize()}: {', '.join(names)}." if names else ""
    return told


def _best(study: Study, found: Sequence[Setting], metric: str) -> Iterator[str]:
    """Where neither a law nor a comparison is asked for: the best of each value on the first axis."""
    axis = next(iter(study.axes))
    for value in study.axes[axis]:
        ends = {s.name: s.points[-1].score for s in found if s.points and s.values[axis] == value}
        if not ends:
            continue
        best = (max if metric in HIGHER else min)(ends, key=lambda name: ends[name].value)
        near = [name for name in ends if name != best and _overlap(ends[name], ends[best])]
        told = f"Of {axis} {value}, {best} has the best {metric}" if len(ends) > 1 else f"{best} has {metric}"
        yield f"{told}, {_range(ends[best])}." + (f" Intervals overlap with {', '.join(near)}." if near else "")


def _overlap(one: Estimate, other: Estimate) -> bool:
    return one.low <= other.high and other.low <= one.high


def _scaling(study: Study, found: Sequence[Setting], metric: str) -> Iterator[str]:
    """Does more compute mean a better metric?"""
    if study.law is None:
        return
    what = "GMACs" if study.law.against == "gmacs" else "training FLOPs"
    at = final_points(found, study.law.against)
    better = "higher" if metric in HIGHER else "lower"
    if not at.x:
        yield f"Whether more {what} mean a {better} {metric} cannot be said: no step is common to all that were scored."
        return
    try:
        rho, tau = (measure(at.x, at.values) for measure in (statistics.spearman, statistics.kendall))
    except TesseraError as error:
        yield f"Whether more {what} mean a {better} {metric} cannot be said {at.where}: {error}."
    else:
        falls, rises = rho.high < 0, rho.low > 0
        opening = (
            f"More {what} go with a {'lower' if falls else 'higher'} {metric} {at.where}"
            if falls or rises
            else f"Whether more {what} go with a lower or a higher {metric} {at.where} is undecided"
        )
        yield (
            f"{opening}: Spearman's rank correlation is {_range(rho)}, Kendall's {_range(tau)}, over {len(at.x)} "
            "settings."
        )
    if metric in HIGHER:
        yield f"No law: a higher {metric} is the better, and the law is of metrics that fall."
        return
    try:
        line = scaling_law.fit(at.x, at.values)
    except TesseraError as error:
        yield _sentence(str(error))
        return
    sure = "" if line.exponent.low > 0 else " As the interval holds zero, this may be no fall at all."
    yield (
        f"{metric} follows {what}^-{line.exponent.value:.3f} (exponent {line.exponent.low:.3f} to "
        f"{line.exponent.high:.3f}) {at.where}, over {_times(max(at.x) / min(at.x))} in {what}; points lie "
        f"{_spread(line.error)} off the line.{sure}"
    )
    yield from _held_out(study, at, metric)


def _held_out(study: Study, at: FinalPoints, metric: str) -> Iterator[str]:
    assert study.law is not None
    out = scaling_law.largest(at.x, min(study.law.held_out, len(at.x)))
    try:
        predicted = scaling_law.held_out(at.x, at.values, out)
    except TesseraError as error:
        yield f"The law cannot be tried on the largest: {str(error).removeprefix('no law: ')} without the held out."
        return
    names = sorted((x, setting.name) for x, setting, held in zip(at.x, at.settings, out) if held)
    for (_, name), each in zip(names, predicted):
        within = "inside" if each.inside else "outside"
        yield (
            f"Held out: the law of the others predicts {metric} {_range(each.predicted)} for {name}; measured "
            f"{each.measured:.4g}. An error of {_percent(each.error)}, {within} the prediction interval."
        )


def _sampling(found: Sequence[Setting], metric: str) -> Iterator[str]:
    """Can more sampling steps stand for a larger model?"""
    wins = pairs = 0
    sign = -1 if metric in HIGHER else 1
    for one, other in combinations([setting for setting in found if setting.drawn], 2):
        small, large = sorted((one, other), key=lambda setting: setting.gmacs)
        if large.gmacs <= small.gmacs * 1.01:
            continue
        for less in large.drawn:
            for more in small.drawn:
                if more.macs >= less.macs:
                    pairs += 1
                    wins += sign * (more.score.value - less.score.value) < 0
    if pairs:
        yield (
            f"A smaller model that spends as much compute on a picture as a larger one, or more, has the better "
            f"{metric} in {wins} of {pairs} pairs ({wins / pairs:.0%})."
        )


def _verdict(study: Study, each: Compared, metric: str) -> str:
    """Which value wins, by how much, and is it significant?"""
    assert study.compare is not None
    baseline, *others = each.values
    winner = (max if metric in HIGHER else min)(each.values, key=lambda value: value.mean.value)
    alike = f", {' '.join(f'{axis} {value}' for axis, value in each.alike.items())}" if each.alike else ""
    told = f"At equal {EQUAL[each.scale]} ({_at(each)}{alike}) "
    worse = [value.name for value in others if value.verdict == "worse"]
    rest = f" Worse than the baseline at 95 %: {', '.join(worse)}." if worse else ""
    if winner is baseline:
        told += f"no {study.compare.axis} beats the baseline {baseline.name}, {metric} {_range(baseline.mean)}."
        unsure = " One seed." if all(value.p is None for value in others) else " None is worse at 95 %, either."
        return told + (rest or unsure)
    told += f"{winner.name} has the best {metric}, {_range(winner.mean)}; the baseline {baseline.name} has "
    told += f"{_range(baseline.mean)}. "
    share = _share(winner, baseline)
    if winner.difference is None or winner.p is None:
        return f"{told}{f'That is {share}: ' if share else ''}{winner.verdict}.{rest}"
    told += f"The difference is {_range(winner.difference)}, {f'{share}, ' if share else ''}p = {winner.p:.2g}: "
    better = [value.name for value in others if value.verdict == "better" and value is not winner]
    also = f" Better, too: {', '.join(better)}." if better else ""
    return f"{told}{winner.verdict} at 95 %.{also}{rest}"


def _share(value: Value, baseline: Value) -> str:
    """How far it is from the baseline, relatively; of one seed without an interval."""
    if value.relative is not None:
        relative = value.relative
        return f"{relative.value:+.1%} ({relative.low:+.1%} to {relative.high:+.1%})"
    if len(value.seeds) == 1 and min(value.mean.value, baseline.mean.value) > 0:
        return f"{value.mean.value / baseline.mean.value - 1:+.1%}"
    return ""


def _law(
    study: Study, results: Sequence[Result], found: Sequence[Setting], metric: str | None
) -> tuple[Law | None, str]:
    """The law of the best size for a budget, or why there is none."""
    if study.law is None or metric is None or metric in HIGHER:
        return None, ""
    fingerprint = next(p.scores[metric].fingerprint for r in results for p in r.points if metric in p.scores)
    try:
        return Law(metric, fingerprint, study.question, tuple(scored(found))), ""
    except TesseraError as error:
        return None, _sentence(str(error))


# Figures and tables


def _figures(
    study: Study, results: Sequence[Result], found: Sequence[Setting], metric: str, folder: Path
) -> Iterator[Part]:
    """Those that there is something for; files of others that an earlier report left are removed."""
    made: dict[str, Callable[[], StudyFigure | None]] = {
        "comparison": lambda: figures.comparison(study, found, metric),
        "compute": lambda: figures.against_compute(study, found, metric),
        "gmacs": lambda: figures.against_gmacs(study, found, metric) if study.law else None,
        "steps": lambda: figures.over_steps(study, found, metric),
        "sampling": lambda: figures.sampling_compute(study, found, metric),
        "pictures": lambda: figures.picture_grids(study, results),
    }
    asked = {"sampling": study.sampling_steps, "gmacs": study.law, "comparison": study.compare}
    for name, draw in made.items():
        try:
            drawing = draw()
        except ImportError:
            yield "No figures: matplotlib is not installed (`pip install tessera[demo]`)."
            return
        if drawing is None:
            for ending in ("png", "svg"):
                (folder / f"{name}.{ending}").unlink(missing_ok=True)
            if asked.get(name, True):
                yield f"There is nothing to draw yet for the figure “{TITLES[name]}”."
            continue
        yield f"## {TITLES[name]}"
        yield Figure(f"{FIGURES}/{name}.png", drawing.save(folder), drawing.about)


def _comparisons(compared: Sequence[Compared], metric: str) -> Iterator[Part]:
    if not compared:
        return
    yield "## Better or worse"
    yield (
        "Members are compared where all have come to; between scored points a score is read off a straight line over "
        "the logarithm of steps, FLOPs or seconds. Means have t intervals over seeds (of one seed: the metric's own "
        "interval). Differences are paired by seed, with the t interval of that pair alone. The relative change is of "
        "logarithms, with the noise of all values pooled (values by seeds; of two values it is the paired t test); p "
        "is of the same, corrected by Holm for the number of values, and a verdict is given below 0.05."
    )
    head = ["value", "seeds", metric, "minus baseline", "relative", "p", "verdict"]
    for each in compared:
        alike = "".join(f", {axis} {value}" for axis, value in each.alike.items())
        yield f"### At equal {EQUAL[each.scale]}: {_at(each)}{alike}"
        yield Table(head, [_value(value, each.values[0]) for value in each.values])
        if each.missing:
            yield f"Without {', '.join(each.missing)}."


def _value(value: Value, baseline: Value) -> list[str]:
    difference = "" if value.difference is None else _range(value.difference, sign="+")
    p = "" if value.p is None else f"{value.p:.2g}"
    seeds = str(len(value.seeds))
    share = "" if value is baseline else _share(value, baseline)
    return [value.name, seeds, _range(value.mean), difference, share, p, value.verdict]


def _exponents(study: Study, found: Sequence[Setting], metric: str) -> Iterator[Part]:
    """The law of all, and with each value of each axis held: does it hold along both axes alike?"""
    if study.law is None or metric in HIGHER:
        return
    at = final_points(found, study.law.against)
    rows = []
    groups = [("all", lambda setting: True)]
    groups += [
        (f"{axis} {value}", lambda setting, axis=axis, value=value: setting.values[axis] == value)
        for axis, values in study.axes.items()
        if len(study.axes) > 1
        for value in values
    ]
    for name, belongs in groups:
        chosen = [index for index, setting in enumerate(at.settings) if belongs(setting)]
        try:
            line = scaling_law.fit([at.x[index] for index in chosen], [at.values[index] for index in chosen])
        except TesseraError as error:
            rows.append([name, str(len(chosen)), str(error), ""])
        else:
            rows.append([name, str(len(chosen)), _range(line.exponent, 3), _spread(line.error)])
    yield f"## The law, {at.where or 'of what there is'}"
    yield Table(["settings", "points", "exponent (95 %)", "off the line"], rows)


def _members(results: Sequence[Result]) -> Iterator[Part]:
    yield "## Members"
    metrics = _metrics(point.scores for result in results for point in result.points)
    timed = [
        result
        for result in results
        if result.state == "done" and result.points and result.points[-1].seconds > 0 and result.planned_seconds > 0
    ]
    rows = []
    for result in results:
        last = result.points[-1] if result.points else None
        row = [result.name, f"{result.parameters:,}", f"{result.macs / 1e9:.4g}", result.state]
        row += [f"{last.step:,}", f"{last.flops:.3g}"] if last else ["", ""]
        row += [_time(result.planned_seconds), _time(last.seconds) if last else ""]
        row += [f"{last.seconds / result.planned_seconds:.2f}" if last and result in timed else ""]
        row += [_score(last.scores[metric]) if last and metric in last.scores else "" for metric in metrics]
        rows.append(row)
    head = ["member", "parameters", "GMACs", "state", "steps", "training FLOPs", "planned", "actual", "ratio"]
    yield Table([*head, *metrics], rows)
    if timed:
        planned = sum(result.planned_seconds for result in timed)
        actual = sum(result.points[-1].seconds for result in timed)
        yield (
            f"Training of the {len(timed)} that are done: planned {_time(planned)}, actual {_time(actual)} "
            f"({actual / planned:.2f} of the plan). Scoring and drawing are not in it."
        )
    failed = [result for result in results if result.state == "failed"]
    if failed:
        yield [f"{result.name} failed: {_first_line(result.fault)}" for result in failed]


def _limits(study: Study, results: Sequence[Result], found: Sequence[Setting], metric: str | None) -> Iterator[str]:
    """What the numbers are too few or too near for."""
    if metric is None:
        yield "Nothing was scored yet, so nothing can be said."
        return
    fewest = min((len(setting.seeds) for setting in found), default=0)
    if fewest < 2:
        yield "One seed: intervals are the metric's own, and do not hold what another seed would change."
    elif fewest < 5:
        yield f"{fewest} seeds: an interval of a mean over so few is wide, and small differences stay undecided."
    if away := [result.name for result in results if result.state != "done"]:
        yield f"{len(away)} of {len(results)} members are not done, and the answer may change with them."
    gmacs = [setting.gmacs for setting in found]
    flops = [point.flops for setting in found for point in setting.points if point.flops > 0]
    if study.law and flops:
        yield (
            f"{len(found)} settings over {_times(max(gmacs) / min(gmacs))} in GMACs, up to {max(flops):.2g} training "
            "FLOPs: what lies beyond is not measured. The paper's models span a 330-fold range, up to 7.3e+19 FLOPs at "
            "400K steps."
        )
        yield "Settings that share a size or a patch are not independent, so the law's intervals are rather too narrow."
        yield "The frontier is made of the lowest scores, which are partly the luckiest: it lies a little too low."
    counts = {p.scores[metric].protocol.samples for r in results for p in r.points if metric in p.scores}
    yield (
        f"{metric} is of {', '.join(f'{count:,}' for count in sorted(counts))} pictures by one kind of features on one "
        "data set: its level, and the order of neighbours, may differ with others."
    )
    if study.compare:
        yield "All members share their other settings: each design might do better with a learning rate of its own."


def _protocol(results: Sequence[Result]) -> Iterator[Part]:
    """How each metric was scored."""
    told: dict[str, list[str]] = {}
    for result in results:
        for point in result.points:
            for name, score in point.scores.items():
                facts = score.protocol
                drawing = facts.sampling or {}
                sampler = drawing.get("sampler")
                kind = sampler.get("kind", "") if isinstance(sampler, dict) else str(sampler or "")
                steps = f"{kind}, {drawing.get('steps')} steps" if drawing else ""
                told[name] = [name, score.fingerprint, f"{facts.samples:,}", facts.features.get("name", ""), steps]
    if told:
        yield "## How it was scored"
        yield Table(["metric", "fingerprint", "pictures", "features", "sampler"], list(told.values()))


# For programs


def _points(study: Study, results: Sequence[Result]) -> str:
    metrics = _metrics(point.scores for result in results for point in result.points)
    head = ["member", *study.axes, "seed", "state", "parameters", "gmacs"]
    head += ["step", "samples", "training_flops", "seconds"]
    rows = []
    for result in results:
        whose = [result.name, *(result.values[axis] for axis in study.axes), result.seed, result.state]
        whose += [result.parameters, result.macs / 1e9]
        for point in result.points:
            where = [point.step, point.samples, point.flops, point.seconds]
            rows.append([*whose, *where, *_numbers(point.scores, metrics)])
    return _csv(head, metrics, rows)


def _drawn(study: Study, results: Sequence[Result]) -> str:
    metrics = _metrics(drawn.scores for result in results for drawn in result.drawn)
    head = ["member", *study.axes, "seed", "parameters", "gmacs", "sampling_steps", "gmacs_a_picture"]
    rows = []
    for result in results:
        whose = [result.name, *(result.values[axis] for axis in study.axes), result.seed]
        whose += [result.parameters, result.macs / 1e9]
        for drawn in result.drawn:
            rows.append([*whose, drawn.steps, drawn.macs / 1e9, *_numbers(drawn.scores, metrics)])
    return _csv(head, metrics, rows)


def _metrics(scores: Iterable[dict[str, Score]]) -> list[str]:
    return list(dict.fromkeys(metric for each in scores for metric in each))


def _numbers(scores: dict[str, Score], metrics: Sequence[str]) -> list[float | str]:
    found: list[float | str] = []
    for metric in metrics:
        score = scores.get(metric)
        found += ["", "", "", ""] if score is None else [score.value, score.low, score.high, score.fingerprint]
    return found


def _csv(head: Sequence[str], metrics: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*head, *(f"{metric}{end}" for metric in metrics for end in ("", "_low", "_high", "_fingerprint"))])
    writer.writerows(rows)
    return text.getvalue()


# Words


def _range(estimate: Estimate, digits: int = 4, sign: str = "") -> str:
    form = f"{sign}.{digits}g"
    return f"{estimate.value:{form}} ({estimate.low:{form}} to {estimate.high:{form}})"


def _score(score: Score) -> str:
    return _range(Estimate(score.value, score.low, score.high))


def _percent(share: float) -> str:
    return f"{share:+.1%}"


def _spread(error: float) -> str:
    """A standard deviation in logarithms as a share."""
    return f"{math.expm1(error):.1%}"


def _times(ratio: float) -> str:
    return f"a {short(ratio)}-fold range"


def _time(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _at(each: Compared) -> str:
    if each.scale == "seconds":
        return _time(each.x)
    return f"{each.x:,.0f}" if each.scale == "steps" else f"{each.x:.3g}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _first_line(fault: str | None) -> str:
    lines = (fault or "no reason is known").strip().splitlines()
    return lines[0][:300] if lines else "no reason is known"


def _markdown(part: Part) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, list):
        return "\n".join(f"- {line}" for line in part)
    if isinstance(part, Figure):
        return f"![{part.about}]({part.file})\n\n{part.about}"
    lines = [part.head, ["---"] * len(part.head), *part.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _html(part: Part) -> str:
    if isinstance(part, list):
        return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in part)}</ul>"
    if isinstance(part, Figure):
        return page_html.picture(part.png, part.about)
    if isinstance(part, Table):
        return page_html.table(part.head, part.rows)
    for mark, tag in (("### ", "h3"), ("## ", "h2"), ("# ", "h1")):
        if part.startswith(mark):
            return f"<{tag}>{html.escape(part.removeprefix(mark))}</{tag}>"
    return f"<p>{html.escape(part)}</p>"
