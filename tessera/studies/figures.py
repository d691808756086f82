"""The figures of a study and of the published table. Axis 1 sets the color, axis 2 the marker, axis 3 the dashes.

Each function returns a `StudyFigure`, or None if there is nothing to plot. matplotlib is imported when one is made.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from tessera.errors import TesseraError
from tessera.files import atomic_write
from tessera.planning import published
from tessera.planning.scaling_law import EvalPoint, best_size, fit, frontier, largest_mask, predict_held_out
from tessera.reporting.estimates import Estimate
from tessera.reporting.figures import COLORS, encode, label, new_figure, set_log_scale, style
from tessera.reporting.metrics import HIGHER_IS_BETTER
from tessera.studies.comparison import SCALES, Scale
from tessera.studies.results import MemberResult
from tessera.studies.seed_aggregation import (
    EQUAL,
    FinalPoints,
    MeanPoint,
    Variant,
    active,
    common_steps,
    final_points,
    points_at_step,
    sizes_at_equal_flops,
)
from tessera.studies.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "os^Dv*PX<>"
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")
MAX_COLUMNS = 4  # panels in a row
RING: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": "0.15", "markeredgewidth": 1.0}
X_LABELS: dict[Scale, str] = {"steps": "training steps", "flops": "training FLOPs", "seconds": "seconds of training"}
X_VALUES: dict[Scale, Callable[[MeanPoint], float]] = {
    "steps": lambda point: float(point.step),
    "flops": lambda point: point.flops,
    "seconds": lambda point: point.seconds,
}
Values = Mapping[str, Collection[str]]  # the axes of a study: name and values


@dataclass(frozen=True)
class StudyFigure:
    """A figure as PNG and as SVG, the name of its files, and a caption."""

    name: str
    caption: str
    png: bytes
    svg: bytes

    def save(self, folder: Path) -> None:
        """Write name.png and name.svg."""
        atomic_write(folder / f"{self.name}.png", self.png)
        atomic_write(folder / f"{self.name}.svg", self.svg)


@dataclass(frozen=True)
class Curve:
    """Scores of one setting, by x."""

    setting: Variant
    x: Sequence[float]
    scores: Sequence[Estimate]


@dataclass(frozen=True)
class LawPoints:
    """The points that a power law is fitted to. held_out: those that it is tested on, without being fitted to them."""

    x: Sequence[float]
    y: Sequence[float]
    held_out: Sequence[bool]


@dataclass(frozen=True)
class Panel:
    curves: Sequence[Curve]
    x_label: str
    title: str = ""
    frontier: Sequence[EvalPoint] = ()
    law: LawPoints | None = None


def against_compute(study: Study, settings: Sequence[Variant], metric: str) -> StudyFigure | None:
    """Metric against training compute of every run, with the frontier."""
    curves = _curves(settings, "flops")
    if not curves:
        return None
    ends = [x for curve in curves for x in curve.x]
    if len(curves) == len(ends) > 1 and max(ends) <= EQUAL * min(ends):
        return _at_equal_compute(study, curves, metric, _intervals(settings))
    best = frontier(eval_points([curve.setting for curve in curves])) if metric not in HIGHER_IS_BETTER else []
    law = _law_points(study, final_points(settings, "flops"), "flops", metric)
    panel = Panel(
        curves, "training FLOPs (6 × multiply-adds × samples)", frontier=best if len(best) > 1 else (), law=law
    )
    caption = f"{metric} against training compute of every run; {_intervals(settings)}"
    return _plot(
        "compute",
        caption + ("; the broad line is the frontier." if panel.frontier else "."),
        study.axes,
        metric,
        [[panel]],
    )


def _at_equal_compute(study: Study, curves: Sequence[Curve], metric: str, intervals: str) -> StudyFigure:
    """One score of each setting, below each other: against compute they would be a column."""
    with style():
        figure = new_figure(6.2, 0.9 + 0.34 * len(curves))
        axes = figure.subplots()
        for row, curve in enumerate(curves):
            look, (score,) = _look(study.axes, curve.setting.values), curve.scores
            axes.hlines(row, score.low, score.high, color=look["color"], linewidth=1.4, alpha=0.6)
            axes.plot(
                score.value,
                row,
                look["marker"],
                color=look["color"],
                markersize=7,
                markeredgecolor="white",
                clip_on=False,
            )
        axes.set_yticks(range(len(curves)), [label(curve.setting.name) for curve in curves])
        axes.set_ylim(len(curves) - 0.4, -0.6)
        axes.set_xlim(left=min(0.0, *(curve.scores[0].low for curve in curves)))
        axes.set_xlabel(_metric_label(metric))
        caption = f"{metric} at {curves[0].x[0]:.3g} training FLOPs each; {intervals}."
        return StudyFigure("compute", caption, encode(figure, "png"), encode(figure, "svg"))


def against_gmacs(study: Study, settings: Sequence[Variant], metric: str) -> StudyFigure | None:
    """Metric against GMACs after equal steps: one panel for each step of study.marks and for the end, with the law."""
    settings = active([setting for setting in settings if setting.points])
    steps = common_steps(settings)
    steps = [step for step in steps if step in study.marks.steps or step == steps[-1]]
    if not steps or len({setting.gmacs for setting in settings}) < 2:
        return None
    panels = []
    for points in (points_at_step(settings, step) for step in steps):
        curves = [Curve(setting, [setting.gmacs], [score]) for setting, score in zip(settings, points.y)]
        law = _law_points(study, points, "gmacs", metric)
        panels.append(Panel(curves, "GMACs of a forward pass", points.description, law=law))
    caption = f"{metric} against GMACs after equal training steps; {_intervals(settings)}."
    rows = [panels[start : start + MAX_COLUMNS] for start in range(0, len(panels), MAX_COLUMNS)]
    return _plot("gmacs", caption, study.axes, metric, rows)


def by_size(study: Study, settings: Sequence[Variant], metric: str) -> StudyFigure | None:
    """Metric against GMACs at equal training FLOPs: one line for each, with its minimum."""
    from matplotlib import colormaps

    levels = sizes_at_equal_flops(study, settings)
    if not levels:
        return None
    with style():
        figure = new_figure(6.9, 4.2)
        axes = figure.subplots()
        for number, (flops, points) in enumerate(levels):
            color = colormaps["viridis"](0.9 * (1 - number / max(1, len(levels) - 1)))
            axes.vlines(points.x, [y.low for y in points.y], [y.high for y in points.y], color=color, alpha=0.5)
            axes.plot(points.x, points.values, "o-", color=color, label=f"{flops:.3g}")
            if metric not in HIGHER_IS_BETTER and (size := best_size(points.x, points.values)) is not None:
                axes.axvline(size, color=color, linestyle=":", linewidth=1)
        axes.set_xlabel("GMACs of a forward pass")
        axes.set_ylabel(_metric_label(metric))
        _set_scale(axes.xaxis, [x for _, points in levels for x in points.x])
        _set_scale(
            axes.yaxis,
            [v for _, points in levels for v in points.values],
            [y for _, points in levels for y in points.y],
        )
        _add_legend(figure, "training FLOPs")
        caption = f"{metric} against GMACs at equal training FLOPs; {_intervals(settings)}"
        caption += "; dotted: the minimum of a parabola, where it lies between measured sizes."
        return StudyFigure("sizes", caption, encode(figure, "png"), encode(figure, "svg"))


def over_steps(study: Study, settings: Sequence[Variant], metric: str) -> StudyFigure | None:
    """Metric over training steps. One panel for each value of the second axis; below, of the first axis."""
    curves = _curves(settings, "steps")
    if all(len(curve.x) < 2 for curve in curves):
        return None
    first, *others = study.axes
    rows = []
    for axis in (others[0], first) if others else ():
        by_value = {value: [c for c in curves if c.setting.values[axis] == value] for value in study.axes[axis]}
        rows.append([Panel(part, X_LABELS["steps"], f"{axis} {value}") for value, part in by_value.items() if part])
    layout = f" Above, one {others[0]} per panel; below, one {first} per panel." if others else ""
    caption = f"{metric} over training steps; {_intervals(settings)}.{layout}"
    return _plot("steps", caption, study.axes, metric, rows or [[Panel(curves, X_LABELS["steps"])]])


def sampling_compute(study: Study, settings: Sequence[Variant], metric: str) -> StudyFigure | None:
    """Metric against the compute of one image, one line for each model: the effect of more sampling steps."""
    curves = [
        Curve(
            setting,
            [sampled.macs / 1e9 for sampled in setting.sampling_points],
            [sampled.score for sampled in setting.sampling_points],
        )
        for setting in settings
        if setting.sampling_points
    ]
    if not curves:
        return None
    counts = sorted({sampled.num_steps for curve in curves for sampled in curve.setting.sampling_points})
    caption = f"{metric} against the compute of one image, {', '.join(map(str, counts))} sampling steps"
    panel = Panel(curves, "GMACs per image (all calls of the network)")
    return _plot("sampling", f"{caption}; {_intervals(settings)}.", study.axes, metric, [[panel]])


def comparison(study: Study, settings: Sequence[Variant], metric: str) -> StudyFigure | None:
    """Metric against steps, training FLOPs and time: means over seeds with their range."""
    if study.compare is None or not _curves(settings, "steps"):
        return None
    others = [axis for axis in study.axes if axis != study.compare.axis]
    axes = {axis: list(study.axes[axis]) for axis in (study.compare.axis, *others)}
    panels = [Panel(_curves(settings, scale), X_LABELS[scale]) for scale in SCALES]
    caption = f"{metric} at equal steps, equal training FLOPs and equal training time; {_intervals(settings, 'bands')}."
    return _plot("comparison", caption, axes, metric, [panels], bands=True)


def paper_law(held_out: Sequence[bool]) -> StudyFigure:
    """FID-50K after 400K steps against GMACs for the twelve published models, with the law."""
    curves = []
    for model in published.MODELS:
        values = {"size": model.size, "patch_size": str(model.patch_size)}
        setting = Variant(model.name, values, (0,), True, model.parameters, model.gmacs, [], [])
        curves.append(Curve(setting, [model.gmacs], [Estimate(model.fid, model.fid, model.fid)]))
    gmacs, fid = [model.gmacs for model in published.MODELS], [model.fid for model in published.MODELS]
    panel = Panel(curves, "GMACs of a forward pass (the paper's Gflops)", law=LawPoints(gmacs, fid, held_out))
    axes = {"size": published.SIZES, "patch_size": [str(patch) for patch in published.PATCHES]}
    caption = f"FID-50K after 400K steps against GMACs ({published.SOURCE})"
    return _plot("paper-law", caption, axes, "FID-50K", [[panel]])


def image_grids(study: Study, results: Sequence[MemberResult]) -> StudyFigure | None:
    """The last grid of samples of every setting, from its first seed that has one, arranged by the axes."""
    first, *others = study.axes
    crops: dict[tuple[str, str], np.ndarray] = {}
    for result in results:
        key = (" ".join(result.values[axis] for axis in others), result.values[first])
        crop = _crop(result.sample_grid) if key not in crops else None
        if crop is not None:
            crops[key] = crop
    if not crops:
        return None
    order = (" ".join(values) for values in product(*(study.axes[axis] for axis in others)))
    rows = [row for row in order if any(row == key[0] for key in crops)]
    columns = [value for value in study.axes[first] if any(value == key[1] for key in crops)]
    with style():
        figure = new_figure(1.5 * len(columns) + 0.4, 1.55 * len(rows))
        panels = figure.subplots(len(rows), len(columns), squeeze=False).flat
        for axes, (row, column) in zip(panels, product(rows, columns)):
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(False)
            if (row, column) in crops:
                axes.imshow(crops[row, column])
            else:
                axes.text(0.5, 0.5, "none", ha="center", va="center", color="0.5", transform=axes.transAxes)
            if row == rows[0]:
                axes.set_title(label(f"{first} {column}"))
            if column == columns[0] and row:
                axes.set_ylabel(label(f"{others[0]} {row}" if len(others) == 1 else row))
        caption = "The last grid of samples of each member: the same seeds, one column per class, cropped."
        unfinished = [result.name for result in results if result.sample_grid is not None and result.state != "done"]
        caption += f" Not done: {', '.join(unfinished)}." if unfinished else ""
        return StudyFigure("images", caption, encode(figure, "png"), encode(figure, "svg"))


def eval_points(settings: Sequence[Variant]) -> list[EvalPoint]:
    """Every scored point: what the frontier is made of."""
    return [
        EvalPoint(setting.name, setting.gmacs, round(point.samples), point.score.value)
        for setting in settings
        for point in setting.points
    ]


def _curves(settings: Sequence[Variant], scale: Scale) -> list[Curve]:
    """Scores on the way of each setting, where x is above zero."""
    x = X_VALUES[scale]
    points = [(setting, [point for point in setting.points if x(point) > 0]) for setting in settings]
    return [Curve(s, [x(point) for point in part], [point.score for point in part]) for s, part in points if part]


def _law_points(study: Study, points: FinalPoints, against: Literal["gmacs", "flops"], metric: str) -> LawPoints | None:
    if study.law is None or study.law.against != against or metric in HIGHER_IS_BETTER:
        return None
    return LawPoints(points.x, points.values, largest_mask(points.x, min(study.law.held_out, len(points.x))))


def _metric_label(metric: str) -> str:
    return f"{metric} ({'higher' if metric in HIGHER_IS_BETTER else 'lower'} is better)"


def _intervals(settings: Sequence[Variant], shape: str = "bars") -> str:
    counts = {len(setting.seeds) for setting in settings}
    if max(counts, default=1) > 1:
        of_one_seed = ", with one seed the metric's own 95 % interval" if 1 in counts else ""
        return f"means over seeds, {shape} from the lowest to the highest seed{of_one_seed}"
    return f"one seed, {shape} the metric's own 95 % interval"


# Plotting


def _plot(
    name: str, caption: str, values: Values, metric: str, rows: Sequence[Sequence[Panel]], bands: bool = False
) -> StudyFigure:
    """Panels in rows, with the same y axis, and one legend at the right. bands: intervals as bands, not as bars."""
    columns = max(map(len, rows))
    width, height = (5.6, 4.2) if columns * len(rows) == 1 else (3.6, 3.2) if columns < 3 else (2.8, 2.7)
    panels = [panel for row in rows for panel in row]
    with style():
        figure = new_figure(width * columns + 1.3, height * len(rows))
        grid = figure.subplots(
            len(rows), columns, sharex=len({p.x_label for p in panels}) == 1, sharey=True, squeeze=False
        )
        intervals: list[Estimate] = []
        for number, axes in enumerate(grid.flat):
            row, column = divmod(number, columns)
            if column >= len(rows[row]):
                axes.remove()
                continue
            panel = rows[row][column]
            for curve in panel.curves:
                _plot_curve(axes, curve, _look(values, curve.setting.values), bands)
            if panel.frontier:
                x, y = [point.flops for point in panel.frontier], [point.value for point in panel.frontier]
                axes.plot(x, y, color="0.55", linewidth=6, alpha=0.35, zorder=1, label="frontier")
            if panel.law:
                intervals += _plot_law(axes, panel.law)
            axes.set_title(label(panel.title))
            axes.set_xlabel(panel.x_label)
            axes.set_ylabel(_metric_label(metric))
            axes.label_outer()
            _set_scale(axes.xaxis, [x for curve in panel.curves for x in curve.x])
        scores = [score for panel in panels for curve in panel.curves for score in curve.scores]
        _set_scale(grid.flat[0].yaxis, [score.value for score in scores], [*scores, *intervals])
        _add_legend(figure, " × ".join(values))
        return StudyFigure(name, caption, encode(figure, "png"), encode(figure, "svg"))


def _look(axes: Values, values: Mapping[str, str]) -> dict[str, Any]:
    """Color, marker and dashes of a setting. With one axis the marker differs, too."""
    from matplotlib import colormaps

    positions = [list(axes[axis]).index(values[axis]) for axis in axes]
    count = len(axes[next(iter(axes))])
    color = COLORS[positions[0]] if count <= len(COLORS) else colormaps["viridis"](0.95 * positions[0] / (count - 1))
    marker, dashes = [*positions, 0, 0][1:3] if len(positions) > 1 else (positions[0], 0)
    return {"color": color, "marker": MARKERS[marker % len(MARKERS)], "linestyle": DASHES[dashes % len(DASHES)]}


def _plot_curve(axes: "Axes", curve: Curve, look: dict[str, Any], band: bool) -> None:
    low, high = [score.low for score in curve.scores], [score.high for score in curve.scores]
    if band and len(curve.x) > 1:
        axes.fill_between(curve.x, low, high, color=look["color"], alpha=0.15, linewidth=0)
    else:
        axes.vlines(curve.x, low, high, color=look["color"], linewidth=0.9, alpha=0.5)
    values = [score.value for score in curve.scores]
    axes.plot(curve.x, values, label=label(curve.setting.name), markeredgecolor="white", markeredgewidth=0.5, **look)


def _plot_law(axes: "Axes", points: LawPoints) -> list[Estimate]:
    """The law with its band, a ring around each held-out point and its prediction. Returns the intervals."""
    try:
        law = fit(points.x, points.y)
    except TesseraError:
        return []
    x = np.geomspace(law.low, law.high, 60)
    band = [law.confidence(float(value)) for value in x]
    axes.fill_between(x, [b.low for b in band], [b.high for b in band], color="0.5", alpha=0.18, linewidth=0, zorder=0)
    axes.plot(x, [b.value for b in band], color="0.35", zorder=1, linewidth=1.2, label="law of all, 95 % band")
    try:
        predicted = predict_held_out(points.x, points.y, points.held_out)
    except TesseraError:
        return band
    for point in predicted:
        low, value, high = point.predicted.low, point.predicted.value, point.predicted.high
        axes.plot(point.x, point.measured, "o", markersize=12, label="held out", **RING)
        axes.errorbar(
            point.x,
            value,
            [[value - low], [high - value]],
            fmt="_",
            ecolor="0.15",
            elinewidth=0.9,
            label="predicted, 95 %",
            **RING,
        )
    return band + [point.predicted for point in predicted]


def _set_scale(axis: Any, values: Sequence[float], intervals: Sequence[Estimate] = ()) -> None:
    """Logarithmic if all values are positive and the largest is over twice the smallest.

    Intervals extend the axis by at most a factor of two on each side.
    """
    low, high = min(values), max(values)
    if not (low > 0 and high > 2 * low):
        return
    ends = [end for interval in intervals for end in (interval.low, interval.high) if math.isfinite(end)]
    ends = [*values, *(min(max(end, low / 2), 2 * high) for end in ends)]
    room = (max(ends) / min(ends)) ** 0.06
    set_log_scale(axis, min(ends) / room, max(ends) * room)


def _add_legend(figure: "Figure", title: str) -> None:
    """One entry for each label, at the right of all panels."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        entries |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels())}
    rows = max(1, int(figure.get_figheight() / 0.2) - 1)  # of 0.2 inches; one for the title
    figure.legend(
        list(entries.values()), list(entries), title=title, loc="outside right upper", handlelength=1.8,
        ncols=math.ceil(len(entries) / rows),
    )  # fmt: skip


def _crop(path: Path | None) -> np.ndarray | None:
    """The upper left square of a grid of samples, or None if it cannot be read."""
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            side = min(image.width, image.height)
            return np.asarray(image.convert("RGB").crop((0, 0, side, side)))
    except (OSError, ValueError, SyntaxError):  # Pillow raises SyntaxError for a broken PNG
        return None
