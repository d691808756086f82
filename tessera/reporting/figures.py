"""Charts for reports: lines, heat maps over the steps of a run, and bars, as SVG made by matplotlib.

matplotlib is imported when a figure is made. The same data give the same bytes.

Shapes: R rows, N records, K columns.
"""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import numpy as np

from tessera.reporting.document import Figure
from tessera.reporting.text import format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure as MplFigure

Scale = Literal["linear", "from zero", "log"]
Number = float | None  # None: not measured

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe & Ito 2008
MARK_COLORS = ("#c62828", "#a16207")
MAX_BINS = 200  # of a line; of longer ones the lowest and the highest point of each bin are plotted
MAX_COLUMNS = 80  # of a heat map
MAX_LOG_RANGE = 1e12  # the largest over the smallest number on a logarithmic axis
MAX_MARKERS = 12  # a line of at most as many points has a marker at each
MAX_LABEL = 28  # characters
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.parse_math": False,  # names come from users: a "$" is a character
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.formatter.useoffset": False,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "image.composite_image": False,  # images in an SVG keep their own resolution
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 6,
    "svg.fonttype": "none",  # text remains text
    "svg.hashsalt": "tessera",  # the same ids each time
}


@dataclass(frozen=True)
class Line:
    """Numbers over the steps; low and high are the ends of an interval. faint: raw numbers behind a smoothed line."""

    label: str
    steps: Sequence[float]
    values: Sequence[Number]
    low: Sequence[Number] = ()
    high: Sequence[Number] = ()
    faint: bool = False
    color: Any = None


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's settings while figures are made and saved."""
    from matplotlib import rc_context

    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has more fonts than matplotlib
        yield


def new_figure(width: float, height: float) -> "MplFigure":
    """An empty figure, size in inches. It belongs to no window."""
    from matplotlib.figure import Figure as MplFigure

    return MplFigure(figsize=(width, height), layout="constrained")


def encode(figure: "MplFigure", kind: Literal["svg", "png"]) -> bytes:
    """The figure as a file, without a date. The layout is computed once, so that all files agree."""
    buffer = io.BytesIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type")) if kind == "svg" else {}
    figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    figure.set_layout_engine("none")
    return buffer.getvalue()


def label(text: str) -> str:
    """A name that fits a figure, without characters that XML does not allow."""
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 1]}…"


def set_log_scale(axis: "Axis", low: float, high: float) -> None:
    """A logarithmic axis from low to high, with round numbers at the ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    name = axis.axis_name  # pyright: ignore[reportAttributeAccessIssue]
    axis.axes.set(**{f"{name}scale": "log", f"{name}lim": (low, high)})
    decades = math.log10(high / low)
    subs = (1, 1.5, 2, 3, 4, 5, 7) if decades < 0.8 else (1, 2, 5) if decades < 2.5 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    axis.set_minor_formatter(NullFormatter())


def line_chart(
    title: str,
    lines: Sequence[Line],
    unit: str = "",
    scale: Scale = "linear",
    levels: Sequence[tuple[str, float]] = (),
    marks: Sequence[tuple[str, Sequence[float]]] = (),
) -> Figure | None:
    """Lines over the steps; None where there is no finite number. Lines without one are left out.

    levels: (label, height) of dashed horizontal lines. marks: (label, steps) of dotted vertical lines. A logarithmic
    axis becomes a linear one where no number is positive.
    """
    lines = [line for line in lines if any(map(is_finite, line.values))]
    if not lines:
        return None
    latest = {line.label: next(v for v in reversed(line.values) if is_finite(v)) for line in lines if not line.faint}
    summary = {name: f"{label(name)} {format_number(value)}" for name, value in latest.items()}
    with style():
        figure = new_figure(4.8, 2.3 if len(latest) < 2 else 2.6)
        axes = figure.subplots()
        for number, line in enumerate(lines):
            color = line.color or COLORS[number % len(COLORS)]
            name = label(line.label) if len(lines) > 5 else summary.get(line.label)
            _plot(axes, line, color, None if line.faint else name)
        for name, height in levels:
            axes.axhline(height, color="0.4", linestyle="--", linewidth=0.9, label=name)
        for (name, steps), color in zip(marks, MARK_COLORS):
            if len(steps):
                steps = steps[:: -(-len(steps) // MAX_BINS)]
                axes.vlines(steps, 0, 1, color=color, linestyle=":", label=name, transform=axes.get_xaxis_transform())
        numbers = [v for line in lines for v in (*line.values, *line.low, *line.high) if is_finite(v)]
        _set_scale(axes, numbers + [height for _, height in levels], scale)
        _set_steps(axes)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            figure.legend(loc="outside upper left", ncols=5 if len(lines) > 5 else 3, handlelength=1.2)
        image = encode(figure, "svg")
    alt = f"{title}: {', '.join(summary.values())} at step {lines[-1].steps[-1]:g}"
    newest = [f"latest {format_number(value)}" for value in latest.values()] if len(latest) == 1 else []
    return Figure(image, ", ".join(filter(None, (unit, *newest))), title, alt)


def heat_map(
    title: str,
    rows: Sequence[str],
    steps: Sequence[float],
    values: Sequence[Sequence[Number]],
    unit: str = "",
    scale: Scale = "linear",
) -> Figure | None:
    """Numbers [N][R] by row and step, the first row on top; None where there is no finite number.

    A column is the largest of the records that share it, and holds until the next.
    """
    if not steps or not rows:
        return None
    columns, edges = _columns(steps, values, len(rows))
    finite = columns[np.isfinite(columns)]
    if not finite.size:
        return None
    low, high = float(finite.min()), float(finite.max())
    with style():
        from matplotlib.colors import LogNorm, Normalize

        log = scale == "log" and 0 < low < high
        norm = LogNorm(max(low, high / MAX_LOG_RANGE), high) if log else Normalize(low, high if high > low else low + 1)
        figure = new_figure(4.8, min(max(0.13 * len(rows) + 0.6, 2.3), 4))
        axes = figure.subplots()
        axes.grid(False)
        extent = (edges[0], edges[-1], len(rows) - 0.5, -0.5)
        image = axes.imshow(columns, norm=norm, aspect="auto", interpolation="nearest", extent=extent)
        every = math.ceil(len(rows) / 24)
        axes.set_yticks(range(0, len(rows), every), [label(row) for row in rows[::every]])
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        if log and high / low > 1.5:
            set_log_scale(bar.ax.yaxis, max(low, high / MAX_LOG_RANGE), high)
        _set_steps(axes)
        encoded = encode(figure, "svg")
    alt = f"{title} over {len(steps)} records: from {format_number(low)} to {format_number(high)}"
    return Figure(encoded, unit, title, alt)


def bar_chart(title: str, bars: Sequence[tuple[str, float]], caption: str = "") -> Figure | None:
    """Numbers as horizontal bars below each other, each with its value; None where there are none."""
    if not bars:
        return None
    names, values = [label(name) for name, _ in bars], [value for _, value in bars]
    with style():
        figure = new_figure(4.8, 0.4 + 0.17 * len(bars))
        axes = figure.subplots()
        patches = axes.barh(range(len(bars)), values, color=COLORS[0])
        axes.bar_label(patches, [f"{value:,.10g}" for value in values], padding=3)
        axes.set_yticks(range(len(bars)), names)
        axes.set(xticks=[], xlim=(0, 1.18 * (max(values) or 1)), ylim=(len(bars) - 0.4, -0.6))
        axes.spines["bottom"].set_visible(False)
        axes.grid(False)
        image = encode(figure, "svg")
    alt = f"{title}: {', '.join(f'{name} {value:,.10g}' for name, value in bars[:5])}{', ...' * (len(bars) > 5)}"
    return Figure(image, caption, title, alt)


def thin(steps: Sequence[float], values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest point of each bin of a long line, so that no peak is lost."""
    places = np.arange(len(values))
    if len(values) > 2 * MAX_BINS:
        ends: list[int] = []
        for part in np.array_split(places, MAX_BINS):
            ends.append(part[np.nan_to_num(values[part], nan=math.inf).argmin()])
            ends.append(part[np.nan_to_num(values[part], nan=-math.inf).argmax()])
        places = np.unique(ends)
    return np.asarray(steps, float)[places], values[places]


def is_finite(value: Number) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _floats(values: Sequence[Number]) -> np.ndarray:
    return np.array([value if is_finite(value) else math.nan for value in values])


def _plot(axes: "Axes", line: Line, color: Any, name: str | None) -> None:
    steps, values = thin(line.steps, _floats(line.values))
    around = np.isfinite(np.concatenate(([math.nan], values, [math.nan])))
    marked = np.isfinite(values) if len(values) <= MAX_MARKERS else around[1:-1] & ~around[:-2] & ~around[2:]
    look: dict[str, Any] = {"alpha": 0.35, "linewidth": 0.8} if line.faint else {}
    axes.plot(
        steps,
        values,
        color=color,
        label=name,
        marker="o" if marked.any() else None,
        markersize=3,
        markevery=np.flatnonzero(marked).tolist(),
        **look,
    )
    if line.low:
        axes.fill_between(line.steps, _floats(line.low), _floats(line.high), color=color, alpha=0.18, linewidth=0)


def _set_scale(axes: "Axes", numbers: Sequence[float], scale: Scale) -> None:
    positive = [number for number in numbers if number > 0]
    if scale == "log" and positive and max(positive) > 1.5 * min(positive):
        high = max(positive)
        low = max(min(positive), high / MAX_LOG_RANGE)
        room = (high / low) ** 0.05
        set_log_scale(axes.yaxis, low / room, high * room)
    elif scale == "from zero" and positive:
        axes.set_ylim(min(0, *numbers), 1.05 * max(positive))


def _set_steps(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    axes.set_xlabel("step")


def _columns(steps: Sequence[float], values: Sequence[Sequence[Number]], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Records [N][R] on columns of equal width in steps [R, K], and the edges of the columns [K + 1]."""
    count = min(len(steps), MAX_COLUMNS)
    half = (steps[-1] - steps[0]) / max(count - 1, 1) / 2 or 0.5
    edges = np.linspace(steps[0] - half, steps[-1] + half, count + 1)
    columns, filled = np.full((rows, count), math.nan), np.zeros(count, bool)
    for step, record in zip(steps, values):
        column = min(int(np.searchsorted(edges, step, side="right")) - 1, count - 1)
        numbers = _floats([*record, *[None] * rows][:rows])
        columns[:, column] = np.fmax(columns[:, column], numbers)
        filled[column] = True
    for column in np.flatnonzero(~filled):
        columns[:, column] = columns[:, column - 1]
    return columns, edges
