"""The figures of a study, and of the paper's table: colours tell the first axis, markers the second.

Each function gives a `Drawing`, or None where there is nothing to draw. matplotlib is needed, and imported only here.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import numpy as np
from PIL import Image

from tessera.errors import TesseraError
from tessera.files import atomic_write
from tessera.planning import published
from tessera.planning.scaling_law import EvalPoint, fit, frontier, held_out, largest
from tessera.planning.statistics import Estimate
from tessera.studies.comparison import SCALES, Scale
from tessera.studies.results import Result
from tessera.studies.seed_aggregation import Mean, Setting, active, after, equal_steps, final_points
from tessera.studies.study import Study
from tessera.training.scores import HIGHER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe & Ito 2008
MARKERS = "os^Dv*PX<>"
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")
COLUMNS = 4  # panels side by side
XLABELS: dict[Scale, str] = {"steps": "training steps", "flops": "training FLOPs", "seconds": "seconds of training"}
RING: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": "0.15", "markeredgewidth": 1.0}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 6,
    "lines.markeredgecolor": "white",
    "lines.markeredgewidth": 0.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "tessera",
}
Keys = list[tuple[Any, str]]  # lines and words of a legend
P = ParamSpec("P")
R = TypeVar("R")


def _styled(draw: Callable[P, R]) -> Callable[P, R]:
    """matplotlib's settings while a figure is drawn."""

    @wraps(draw)
    def within(*args: P.args, **kwargs: P.kwargs) -> R:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return within


@dataclass(frozen=True)
class StudyFigure:
    """A figure, the name of its files, and what it shows."""

    name: str
    about: str
    figure: Figure

    def save(self, folder: Path) -> bytes:
        """name.png and name.svg. Returns the PNG."""
        from matplotlib import rc_context

        found = {}
        for kind in ("png", "svg"):
            buffer = io.BytesIO()
            with rc_context(STYLE):
                dated = {"Date": None} if kind == "svg" else {}
                self.figure.savefig(buffer, format=kind, dpi=150, metadata=dated)
            self.figure.set_layout_engine("none")  # the places it found hold for the other file, too
            found[kind] = buffer.getvalue()
            atomic_write(folder / f"{self.name}.{kind}", found[kind])
        return found["png"]


class Looks:
    """How each setting is drawn: colour by the first axis, marker by the second, dashes by the third."""

    def __init__(self, axes: Mapping[str, Sequence[str]]) -> None:
        self.axes = {axis: list(values) for axis, values in axes.items()}
        self.names = list(self.axes)

    def of(self, values: Mapping[str, str]) -> dict[str, Any]:
        """Arguments of `plot`. A study of one axis tells its values by markers, too."""
        place = [self.axes[axis].index(values[axis]) for axis in self.names]
        marker = place[1] if len(place) > 1 else place[0]
        dash = place[2] if len(place) > 2 else 0
        return {
            "color": self.colour(place[0]),
            "marker": MARKERS[marker % len(MARKERS)],
            "linestyle": DASHES[dash % len(DASHES)],
        }

    def colour(self, place: int) -> Any:
        count = len(self.axes[self.names[0]])
        if count <= len(COLOURS):
            return COLOURS[place]
        from matplotlib import colormaps

        return colormaps["viridis"](0.95 * place / (count - 1))

    def keys(self, shown: Sequence[Setting]) -> Iterator[tuple[Any, str]]:
        """Lines and words of a legend, an axis after the other, only of values that are shown."""
        from matplotlib.lines import Line2D

        for number, axis in enumerate(self.names):
            yield Line2D([], [], linestyle="none"), axis
            for place, value in enumerate(self.axes[axis]):
                if not any(setting.values[axis] == value for setting in shown):
                    continue
                if number == 0:
                    look = self.of({axis: value} | {name: self.axes[name][0] for name in self.names[1:]})
                    marker = "none" if len(self.names) > 1 else look["marker"]
                    yield Line2D([], [], color=look["color"], marker=marker, linewidth=2.5), value
                elif number == 1:
                    marker = MARKERS[place % len(MARKERS)]
                    yield Line2D([], [], color="0.3", linestyle="none", marker=marker), value
                elif number == 2:
                    yield Line2D([], [], color="0.3", linestyle=DASHES[place % len(DASHES)]), value


def looks_of(study: Study) -> Looks:
    return Looks({axis: list(values) for axis, values in study.axes.items()})


# The figures of a study


@_styled
def against_compute(study: Study, found: Sequence[Setting], metric: str) -> StudyFigure | None:
    """Metric against training compute for every run, with the frontier."""
    shown = [setting for setting in found if any(point.flops > 0 for point in setting.points)]
    if not shown:
        return None
    figure, (axes,) = _figure(1)
    looks = looks_of(study)
    for setting in shown:
        _line(axes, [point for point in setting.points if point.flops > 0], "flops", looks.of(setting.values))
    best = frontier(scored(shown)) if metric not in HIGHER else []
    keys = list(looks.keys(shown))
    if len(best) > 1:
        (line,) = axes.plot(
            [point.flops for point in best], [point.value for point in best], color="0.55", linewidth=6, alpha=0.35,
            zorder=1, solid_capstyle="round",
        )  # fmt: skip
        keys.append((line, "frontier"))
    intervals: list[Estimate] = []
    if study.law is not None and study.law.against == "flops" and metric not in HIGHER:
        at = final_points(found, "flops")
        more, intervals = _law(axes, at.x, at.values, largest(at.x, min(study.law.held_out, len(at.x))))
        keys += more
    _named(axes, "training FLOPs (6 × multiply-adds × samples)", metric)
    _scaled(axes, "x", [point.flops for setting in shown for point in setting.points if point.flops > 0])
    _scaled(axes, "y", _values(_ends(shown)), [*_ends(shown), *intervals])
    _legend(figure, keys)
    about = f"{metric} against training compute of every run; {_bars(shown)}"
    return StudyFigure("compute", about + ("; the broad line is the frontier." if len(best) > 1 else "."), figure)


@_styled
def against_gmacs(study: Study, found: Sequence[Setting], metric: str) -> StudyFigure | None:
    """Metric against GMACs at equal steps: a panel for each mark of steps and the end, with the law and its band."""
    found = active([setting for setting in found if setting.points])
    steps = equal_steps(found)
    steps = [step for step in steps if step in study.marks.steps or step == steps[-1]]
    if not steps or len({setting.gmacs for setting in found}) < 2:
        return None
    figure, panels = _figure(len(steps), share="both")
    looks = looks_of(study)
    keys = list(looks.keys(found))
    drawn: list[Estimate] = []
    for axes, step in zip(panels, steps):
        at = after(found, step)
        for setting, score in zip(found, at.y):
            look = looks.of(setting.values)
            _bar(axes, [setting.gmacs], [score], look["color"])
            axes.plot(setting.gmacs, score.value, **{**look, "linestyle": "none"})
        axes.set_title(at.where)
        _named(axes, "GMACs of a forward pass", metric)
        if study.law is not None and study.law.against == "gmacs" and metric not in HIGHER:
            more, intervals = _law(axes, at.x, at.values, largest(at.x, min(study.law.held_out, len(at.x))))
            keys += [] if drawn else more
            drawn += intervals
    for axes in panels:
        _scaled(axes, "x", [setting.gmacs for setting in found])
        _scaled(axes, "y", _values(_ends(found, steps)), [*_ends(found, steps), *drawn])
    _outer(panels)
    _legend(figure, keys)
    return StudyFigure("gmacs", f"{metric} against GMACs after equal training steps; {_bars(found)}.", figure)


@_styled
def over_steps(study: Study, found: Sequence[Setting], metric: str) -> StudyFigure | None:
    """The paper's two rows: one axis held and the other varied, metric over training steps, a panel each."""
    shown = [setting for setting in found if any(point.step > 0 for point in setting.points)]
    if all(len(setting.points) < 2 for setting in shown):  # there is no way to be seen
        return None
    looks = looks_of(study)
    first, *more = looks.names
    groups = [(more[0], value) for value in looks.axes[more[0]]] if more else []
    groups += [(first, value) for value in looks.axes[first]] if more else [("", "")]
    groups = [(axis, value) for axis, value in groups if any(s.values.get(axis, "") == value for s in shown)]
    held = [axis for axis, _ in groups]
    rows = [[group for group in groups if group[0] == axis] for axis in dict.fromkeys(held)]
    wide = max(map(len, rows))
    figure, panels = _figure(wide * len(rows), columns=wide, share="both")
    used = []
    for row, members in enumerate(rows):
        for column in range(wide):
            axes = panels[row * wide + column]
            if column >= len(members):
                axes.remove()
                continue
            axis, value = members[column]
            used.append(axes)
            for setting in shown:
                if setting.values.get(axis, "") == value:
                    points = [point for point in setting.points if point.step > 0]
                    _line(axes, points, "steps", looks.of(setting.values))
            if axis:
                axes.set_title(f"{axis} {value}")
            _named(axes, "training steps", metric)
            _scaled(axes, "x", [point.step for setting in shown for point in setting.points if point.step > 0])
            _scaled(axes, "y", _values(_ends(shown)), _ends(shown))
    _outer(used)
    _legend(figure, looks.keys(shown))
    rows_told = f" Above, one {more[0]} a panel; below, one {first} a panel." if more else ""
    return StudyFigure("steps", f"{metric} over training steps; {_bars(shown)}.{rows_told}", figure)


@_styled
def sampling_compute(study: Study, found: Sequence[Setting], metric: str) -> StudyFigure | None:
    """Metric against the compute of drawing a picture, one line a model: what more sampling steps buy."""
    shown = [setting for setting in found if setting.drawn]
    if not shown:
        return None
    figure, (axes,) = _figure(1)
    looks = looks_of(study)
    for setting in shown:
        look = looks.of(setting.values)
        x, y = [drawn.macs / 1e9 for drawn in setting.drawn], [drawn.score for drawn in setting.drawn]
        _bar(axes, x, y, look["color"])
        axes.plot(x, [score.value for score in y], **look)
    _named(axes, "GMACs to draw a picture (all calls of the network)", metric)
    scores = [drawn.score for setting in shown for drawn in setting.drawn]
    _scaled(axes, "x", [drawn.macs / 1e9 for setting in shown for drawn in setting.drawn])
    _scaled(axes, "y", _values(scores), scores)
    _legend(figure, looks.keys(shown))
    counts = sorted({drawn.steps for setting in shown for drawn in setting.drawn})
    about = f"{metric} against the compute of drawing, {', '.join(map(str, counts))} sampling steps; {_bars(shown)}."
    return StudyFigure("sampling", about, figure)


@_styled
def picture_grids(study: Study, results: Sequence[Result]) -> StudyFigure | None:
    """The last grid of samples of every member of the first seed that has one, arranged by the axes."""
    looks = looks_of(study)
    across, *more = looks.names
    shown: dict[tuple[str, str], np.ndarray] = {}
    rows: list[str] = []
    for result in results:
        row = " ".join(result.values[axis] for axis in more)
        crop = _crop(result.pictures) if (result.values[across], row) not in shown else None
        if crop is not None:
            shown[result.values[across], row] = crop
            rows += [row] if row not in rows else []
    if not shown:
        return None
    columns = [value for value in looks.axes[across] if any(column == value for column, _ in shown)]
    order = [" ".join(values) for values in product(*(looks.axes[axis] for axis in more))]
    rows = sorted(rows, key=order.index)
    figure, panels = _figure(len(rows) * len(columns), columns=len(columns), size=(1.5, 1.55), margin=0.4)
    for number, axes in enumerate(panels):
        row, column = rows[number // len(columns)], columns[number % len(columns)]
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        if (column, row) in shown:
            axes.imshow(shown[column, row])
        else:
            axes.text(0.5, 0.5, "none", ha="center", va="center", color="0.5", transform=axes.transAxes)
        if number < len(columns):
            axes.set_title(f"{across} {column}")
        if number % len(columns) == 0 and row:
            axes.set_ylabel(" ".join([*more, row]) if len(more) == 1 else row)
    early = [result.name for result in results if result.pictures is not None and result.state != "done"]
    about = "The last grid of samples of each member: the same seeds everywhere, a column a class, cropped."
    about += f" Not done: {', '.join(early)}." if early else ""
    return StudyFigure("pictures", about, figure)


@_styled
def comparison(study: Study, found: Sequence[Setting], metric: str) -> StudyFigure | None:
    """Metric against steps, training FLOPs and wall-clock, the mean over seeds with their spread."""
    if study.compare is None:
        return None
    others = [axis for axis in study.axes if axis != study.compare.axis]
    looks = Looks({axis: list(study.axes[axis]) for axis in (study.compare.axis, *others)})
    shown = [setting for setting in found if setting.points]
    if not shown:
        return None
    figure, panels = _figure(len(SCALES), columns=len(SCALES), share="y")
    for axes, scale in zip(panels, SCALES):
        xs = []
        for setting in shown:
            points = [point for point in setting.points if _place(point, scale) > 0]
            x, look = [_place(point, scale) for point in points], looks.of(setting.values)
            xs += x
            low, high = [p.score.low for p in points], [p.score.high for p in points]
            axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
            if len(points) == 1:  # of which no band is seen
                _bar(axes, x, [points[0].score], look["color"])
            axes.plot(x, [point.score.value for point in points], **look)
        _named(axes, XLABELS[scale], metric)
        _scaled(axes, "x", xs)
        _scaled(axes, "y", _values(_ends(shown)), _ends(shown))
    _outer(panels)
    _legend(figure, looks.keys(shown))
    about = f"{metric} at equal steps, equal training FLOPs and equal time of training; {_bars(shown, 'band')}."
    return StudyFigure("comparison", about, figure)


def scored(found: Sequence[Setting]) -> list[EvalPoint]:
    """What the frontier is made of."""
    return [
        EvalPoint(setting.name, setting.gmacs, round(point.samples), point.score.value)
        for setting in found
        for point in setting.points
    ]


# The paper's table


@_styled
def paper_law(out: Sequence[bool]) -> StudyFigure:
    """FID-50K after 400K steps against GMACs for the twelve models, with the law; out: which are held out of it."""
    figure, (axes,) = _figure(1)
    looks = Looks({"input_size": published.SIZES, "patch_size": [str(patch) for patch in published.PATCHES]})
    for model in published.MODELS:
        look = looks.of({"input_size": model.size, "patch_size": str(model.patch)})
        axes.plot(model.gmacs, model.fid, **{**look, "linestyle": "none"})
    gmacs, fid = [model.gmacs for model in published.MODELS], [model.fid for model in published.MODELS]
    more, drawn = _law(axes, gmacs, fid, out)
    _named(axes, "GMACs of a forward pass (the paper's Gflops)", "FID-50K")
    _scaled(axes, "x", gmacs)
    _scaled(axes, "y", fid, drawn)
    shown = [
        Setting(m.name, {"input_size": m.size, "patch_size": str(m.patch)}, (0,), True, m.parameters, m.gmacs, [], [])
        for m in published.MODELS
    ]
    _legend(figure, [*looks.keys(shown), *more])
    return StudyFigure("paper-law", f"FID-50K after 400K steps against GMACs ({published.SOURCE})", figure)


# What they share


def _figure(
    panels: int,
    columns: int | None = None,
    share: Literal["none", "y", "both"] = "none",
    size: tuple[float, float] | None = None,
    margin: float = 1.3,
) -> tuple[Figure, list[Axes]]:
    """Panels row by row; one alone is large. size: of a panel in inches; margin: at the right, for the legend."""
    from matplotlib.figure import Figure

    wide = columns or min(panels, COLUMNS)
    high = -(-panels // wide)
    width, height = size or ((5.6, 4.2) if panels == 1 else (3.6, 3.2) if wide < 3 else (2.8, 2.7))
    figure = Figure(figsize=(width * wide + margin, height * high), layout="constrained")
    found = list(figure.subplots(high, wide, sharex=share == "both", sharey=share != "none", squeeze=False).flat)
    for axes in found[panels:]:
        axes.remove()
    return figure, found[:panels]


def _line(axes: Axes, points: Sequence[Mean], scale: Scale, look: dict[str, Any]) -> None:
    x = [_place(point, scale) for point in points]
    _bar(axes, x, [point.score for point in points], look["color"])
    axes.plot(x, [point.score.value for point in points], **look)


def _bar(axes: Axes, x: Sequence[float], scores: Sequence[Estimate], colour: Any) -> None:
    low, high = [score.low for score in scores], [score.high for score in scores]
    axes.vlines(x, low, high, color=colour, linewidth=0.9, alpha=0.5)


def _law(axes: Axes, x: Sequence[float], y: Sequence[float], out: Sequence[bool]) -> tuple[Keys, list[Estimate]]:
    """The law with its band; the held out ringed, with what the law of the others said. Nothing where there is none.

    Returns lines and words for the legend, and the intervals that were drawn.
    """
    from matplotlib.lines import Line2D

    try:
        law = fit(x, y)
    except TesseraError:
        return [], []
    line = np.geomspace(law.low, law.high, 60)
    band = [law.band(float(at)) for at in line]
    low, high = [each.low for each in band], [each.high for each in band]
    axes.fill_between(line, low, high, color="0.5", alpha=0.18, linewidth=0, zorder=0)
    (drawn,) = axes.plot(line, [each.value for each in band], color="0.35", zorder=1, linewidth=1.2)
    keys: Keys = [(drawn, "law of all, 95 % band")]
    try:
        predicted = held_out(x, y, out)
    except TesseraError:
        return keys, band
    for each in predicted:
        axes.plot(each.x, each.measured, "o", markersize=12, **RING)
        axes.vlines(each.x, each.predicted.low, each.predicted.high, color="0.15", linewidth=0.9, linestyle=":")
        axes.plot(each.x, each.predicted.value, "_", markersize=11, **RING)
    if predicted:
        ring = Line2D([], [], linestyle="none", marker="o", markersize=10, **RING)
        bar = Line2D([], [], linestyle=":", linewidth=0.9, color="0.15", marker="_", markersize=9, **RING)
        keys += [(ring, "held out"), (bar, "predicted, 95 %")]
    return keys, band + [each.predicted for each in predicted]


def _place(point: Mean, scale: Scale) -> float:
    return {"steps": float(point.step), "flops": point.flops, "seconds": point.seconds}[scale]


def _named(axes: Axes, x: str, metric: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(f"{metric} ({'higher' if metric in HIGHER else 'lower'} is better)")


def _scaled(axes: Axes, along: Literal["x", "y"], values: Sequence[float], ends: Sequence[Estimate] = ()) -> None:
    """Logarithmic where all values are above zero and far apart, with round numbers at the ticks.

    ends: intervals, which are shown as far as they do not push the values together.
    """
    from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, LogLocator, MaxNLocator, NullFormatter

    if not values:
        return
    lowest, highest = min(values), max(values)
    spread = highest / lowest if lowest > 0 else 0
    axis = axes.xaxis if along == "x" else axes.yaxis
    if spread <= 2:
        axis.set_major_locator(MaxNLocator(5))
        return
    axes.set(**{f"{along}scale": "log"})
    shown = [
        *values,
        *(min(max(e, lowest / 2), highest * 2) for each in ends for e in (each.low, each.high) if math.isfinite(e)),
    ]
    room = (max(shown) / min(shown)) ** 0.06
    axes.set(**{f"{along}lim": (min(shown) / room, max(shown) * room)})
    plain = lowest >= 1e-3 and highest < 1e5
    if spread < 300:
        dense = (1, 2, 3, 5, 7) if spread < 8 and along == "y" else (1, 2, 5)
        sparse = (1, 3) if plain else (1,)  # powers of ten beside each other need room
        axis.set_major_locator(LogLocator(subs=dense if spread < 40 or along == "y" else sparse))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,g}")
        if plain
        else LogFormatterSciNotation(minor_thresholds=(math.inf, math.inf))
    )


def _ends(found: Sequence[Setting], steps: Sequence[int] | None = None) -> list[Estimate]:
    return [p.score for setting in found for p in setting.points if p.step > 0 and (steps is None or p.step in steps)]


def _values(scores: Sequence[Estimate]) -> list[float]:
    return [score.value for score in scores]


def _bars(found: Sequence[Setting], what: str = "bars") -> str:
    """What the intervals of a figure are."""
    if any(len(setting.seeds) > 1 for setting in found):
        return f"lines are means over seeds, {what} from the lowest to the highest seed"
    return f"one seed, {what} the metric's own 95 % interval"


def _outer(panels: Sequence[Axes]) -> None:
    for axes in panels:
        axes.label_outer()


def _legend(figure: Figure, keys: Iterable[tuple[Any, str]]) -> None:
    """At the right of all panels; the names of axes in bold."""
    lines, words = zip(*keys)
    legend = figure.legend(lines, words, loc="outside right upper", fontsize=8.5, handlelength=1.8)
    for line, text in zip(lines, legend.get_texts()):
        if line.get_linestyle() in ("None", "none") and line.get_marker() in ("None", "none", None, ""):
            text.set_fontweight("bold")


def _crop(path: Path | None) -> np.ndarray | None:
    """The upper left of a grid of samples: all rows of as many columns, at most; None if it cannot be read."""
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            side = min(image.width, image.height)
            cropped = image.convert("RGB").crop((0, 0, side, side))
    except (OSError, ValueError, SyntaxError):  # Pillow's word for a broken PNG
        return None
    return np.asarray(cropped)
