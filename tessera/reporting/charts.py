"""Charts as SVG inside a page: lines and heat maps over the steps of a run.

They take colours and font from the page, so that they fit its light and its dark theme, and need no script, no request
and no drawing library. STYLE is what a page must hold for them; `--ink`, `--soft`, `--rule` and `--panel` are the
page's own colours.

Shapes: R rows, N records, C columns.
"""

import html
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, TypeGuard

Scale = Literal["linear", "from zero", "log"]
Number = float | None  # None: nothing was measured there

WIDTH, HEIGHT = 460, 210  # of a chart in its own units; a page scales it
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 24
SPAN = 1e12  # of a logarithmic axis, at most
MOST_BINS = 400  # of a line; where there are more points, the lowest and the highest of each bin are drawn
MOST_COLUMNS = 80  # of a heat map
LEVELS = 32  # colours of a heat map

# Viridis (van der Walt & Smith 2015), even in lightness: readable in grey and to the colour-blind.
_RAMP = ((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
         (170, 220, 50), (253, 231, 37))  # fmt: skip

STYLE = """
:root { --c0: #2563eb; --c1: #d9730d; --c2: #12855f; --c3: #b02a8f; --c4: #7c6a00; --m0: #c62828; --m1: #a16207 }
@media (prefers-color-scheme: dark) {
  :root { --c0: #7aa7ff; --c1: #f2a65a; --c2: #4fd1a5; --c3: #ee8ad3; --c4: #d9c95a; --m0: #ff7b72; --m1: #d6a84b }
}
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 23em), 1fr)); gap: 1.6em 2em }
.chart { display: flex; flex-direction: column; justify-content: space-between }
.chart svg { display: block; width: 100%; height: auto; overflow: visible }
.chart svg text { font-size: 12px; fill: var(--soft) }
.chart .end { text-anchor: end } .chart .middle { text-anchor: middle }
.chart .axis { stroke: var(--rule); fill: none }
.chart .line { fill: none; stroke-width: 1.6; stroke-linejoin: round }
.chart .faint { stroke-width: 1; opacity: .35 } .chart .band { stroke: none; opacity: .18 }
.chart .level { stroke: var(--soft); stroke-dasharray: 5 4 } .chart .mark { stroke-dasharray: 2 3 }
.chart .ground { fill: var(--panel) }
.chart figcaption { margin-bottom: .3em; line-height: 1.35; color: var(--soft) }
.chart figcaption b { color: var(--ink) }
.chart .key { white-space: nowrap; font-size: .85em; margin-right: .9em }
.chart .key i { display: inline-block; width: .7em; height: .7em; margin-right: .35em; border-radius: 2px }
"""


@dataclass(frozen=True)
class Line:
    """Numbers over the steps; low and high are the ends of an interval."""

    name: str
    steps: Sequence[float]
    values: Sequence[Number]
    low: Sequence[Number] = ()
    high: Sequence[Number] = ()
    look: Literal["plain", "faint"] = "plain"  # faint: the raw numbers behind a smoothed line
    colour: str = ""  # CSS; the page's next one where none is given


@dataclass(frozen=True)
class Axis:
    """Numbers to places in a chart: from `low` to `high`, to `start` .. `end`."""

    low: float
    high: float
    start: float
    end: float
    scale: Scale = "linear"

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.scale == "log":
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def holds(self, value: Number) -> TypeGuard[float]:
        """Whether the number has a place: on a logarithmic axis zero has none, nor what is all but zero."""
        return _finite(value) and (self.scale != "log" or value >= self.low)

    def ticks(self, count: int = 4) -> list[float]:
        """About `count` round numbers."""
        if self.scale == "log" and self.high / self.low > 3:
            return _log_ticks(self.low, self.high, count)
        step = _round_up((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        return [tick * step for tick in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class StepMarks:
    """Steps at which something happened: dashed upright lines."""

    name: str
    steps: Sequence[float] = field(default_factory=tuple)


def line_chart(
    title: str,
    lines: Sequence[Line],
    unit: str = "",
    scale: Scale = "linear",
    levels: Sequence[tuple[str, float]] = (),
    marks: Sequence[StepMarks] = (),
    about: str = "",
) -> str:
    """Lines over the steps as an HTML figure; "" where there is no finite number to draw. Empty lines are left out.

    levels: name and height of dashed level lines. A logarithmic axis becomes a linear one where no number is positive.
    """
    lines = [line for line in lines if any(map(_finite, line.values))]
    numbers = [value for line in lines for value in (*line.values, *line.low, *line.high) if _finite(value)]
    steps = [step for line in lines for step in line.steps]
    if not numbers:
        return ""
    if max(numbers) <= 0:
        scale = "linear"
    numbers += [height for _, height in levels]
    across = Axis(*_ends(steps, "linear", margin=0), LEFT, WIDTH - RIGHT)
    up = Axis(*_ends(numbers, scale, margin=0.05), HEIGHT - BOTTOM, TOP, scale)
    drawn = [*_grid(across, up)]
    for height in (height for _, height in levels if up.holds(height)):
        drawn.append(f'<path class="level" d="M{LEFT} {up(height):.1f}H{WIDTH - RIGHT}"/>')
    shown = [(mark.name, mark.steps, f"var(--m{n})") for n, mark in enumerate(marks) if mark.steps]
    for _, at, colour in shown:
        places = [across(step) for step in at if across.low <= step <= across.high]
        path = "".join(f"M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" for x in places)
        drawn.append(f'<path class="mark" style="stroke:{colour}" d="{path}"/>')
    keys, plain, count = [], 0, sum(line.look == "plain" for line in lines)
    for line in lines:
        colour = line.colour or f"var(--c{plain % 5})"
        drawn += _drawn(line, colour, across, up)
        if line.look == "plain":
            last = next((value for value in reversed(line.values) if _finite(value)), None)
            named = line.name if count > 1 or shown else ""
            keys.append(_key(colour, f"{named} {'' if last is None or count > 5 else short(last)}".strip()))
            plain += not line.colour
    for name, height in levels:
        drawn.append(f'<text class="end" x="{WIDTH - RIGHT}" y="{up(height) - 4:.1f}">{html.escape(name)}</text>')
    keys += [_key(colour, name) for name, _, colour in shown]
    return _figure(title, unit, about, keys, HEIGHT, drawn)


def heat_map(
    title: str,
    rows: Sequence[str],
    steps: Sequence[float],
    values: Sequence[Sequence[Number]],
    unit: str = "",
    scale: Scale = "linear",
    about: str = "",
) -> str:
    """Numbers [N][R] by row and step as an HTML figure, the first row on top; "" where there is no finite number.

    A column is the largest of the records that share it, and holds until the next.
    """
    found = [value for record in values for value in record if _finite(value)]
    if not found or not rows:
        return ""
    if min(found) <= 0:
        scale = "linear"
    columns = _columns(steps, values, len(rows))
    low, high = min(found), max(found)
    low = max(low, high / SPAN) if scale == "log" else low
    spread = Axis(low, high, 0, LEVELS - 1, scale) if high > low else None
    paths: dict[int, list[str]] = {}
    for row in range(len(rows)):
        for start, length, level in _runs([_level(column[row], spread) for column in columns]):
            paths.setdefault(level, []).append(f"M{start} {row}h{length}v1h-{length}z")

    height = min(max(12 * len(rows), HEIGHT - BOTTOM), 300)
    left, right = LEFT + 16 if max(map(len, rows)) > 5 else LEFT - 8, WIDTH - 56
    drawn = [
        f'<rect class="ground" x="{left}" y="0" width="{right - left}" height="{height}"/>',
        _stretched(left, 0, right - left, height, len(columns), len(rows), paths),
        _stretched(right + 8, 0, 9, height, 1, LEVELS, {n: [f"M0 {LEVELS - 1 - n}h1v1h-1z"] for n in range(LEVELS)}),
    ]
    every = math.ceil(len(rows) / (height / 12))
    for row in range(0, len(rows), every):
        y = (row + 0.5) * height / len(rows) + 4
        drawn.append(f'<text class="end" x="{left - 5}" y="{y:.1f}">{html.escape(rows[row])}</text>')
    bar = Axis(low, high, height - 1, 1, scale) if high > low else None
    for tick in [low, *(_middle(low, high, scale)), high] if bar else [low]:
        y = (bar(tick) if bar else height / 2) + 4
        drawn.append(f'<text x="{right + 21}" y="{min(max(y, 9), height):.1f}">{short(tick)}</text>')
    half = (steps[-1] - steps[0]) / max(len(columns) - 1, 1) / 2 or 0.5
    across = Axis(steps[0] - half, steps[-1] + half, left, right)
    drawn += _steps(across, across.ticks() if len(steps) > 1 else [steps[0]], height + 15)
    return _figure(title, unit, about, [], height + 20, drawn)


def bar_chart(title: str, bars: Sequence[tuple[str, float]], about: str = "") -> str:
    """Numbers, none below zero, as lying bars below each other, as an HTML figure; "" where there are none."""
    if not bars:
        return ""
    most = max(value for _, value in bars) or 1.0
    step, left, right = 18, 150, 60
    drawn = []
    for row, (name, value) in enumerate(bars):
        y, width = row * step, (WIDTH - left - right) * value / most
        told = name if len(name) <= 22 else f"{name[:21]}…"
        drawn.append(f'<text class="end" x="{left - 8}" y="{y + 13}">{html.escape(told)}</text>')
        drawn.append(f'<rect style="fill:var(--c0)" x="{left}" y="{y + 3}" width="{width:.1f}" height="{step - 6}"/>')
        drawn.append(f'<text x="{left + width + 6:.1f}" y="{y + 13}">{value:,.10g}</text>')
    return _figure(title, "", about, [], step * len(bars), drawn)


def ramp(share: float) -> str:
    """A colour of the heat maps, share from 0 to 1, as CSS."""
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    index = min(int(place), len(_RAMP) - 2)
    mixed = (a + (b - a) * (place - index) for a, b in zip(_RAMP[index], _RAMP[index + 1]))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def short(value: float) -> str:
    """A number in few letters: 0.0123, 4.56, 12.3k, 3e-05."""
    if not math.isfinite(value):
        return str(value)
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}"


# What the two share


def _figure(title: str, unit: str, about: str, keys: list[str], height: float, drawn: list[str]) -> str:
    told = html.escape(title)
    caption = f"<b>{told}</b>" + (f" <small>{html.escape(unit)}</small>" if unit else "")
    caption += ("<br>" if len(keys) > 1 else " &nbsp;") + " ".join(keys) if keys else ""
    caption += f"<br><small>{html.escape(about)}</small>" if about else ""
    drawing = "".join(drawn)
    return (
        f'<figure class="chart"><figcaption>{caption}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{told}">{drawing}</svg></figure>'
    )


def _key(colour: str, text: str) -> str:
    return f'<span class="key"><i style="background:{colour}"></i>{html.escape(text)}</span>'


def _finite(value: Number) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _ends(numbers: Sequence[float], scale: Scale, margin: float) -> tuple[float, float]:
    """What an axis spans; a linear one begins at zero where the numbers do not stand far from it."""
    if scale == "log":
        positive = [math.log(number) for number in numbers if number > 0]
        low, high = max(min(positive), max(positive) - math.log(SPAN)), max(positive)
        room = max(margin * (high - low), 0.05)
        return math.exp(low - room), math.exp(high + room)
    low, high = min(numbers), max(numbers)
    room = margin * (high - low)
    bottom = 0.0 if 0 <= low <= (1.0 if scale == "from zero" else 0.5) * high else low - room
    if high - low <= 1e-9 * max(abs(low), abs(high)) and not (scale == "from zero" and high > 0):  # in the middle
        room = abs(high) / 2 or 1.0
        bottom = low - room
    return bottom, high + (room or 0.05 * high)


def _round_up(step: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * round_ for round_ in (1, 2, 5, 10) if step <= power * round_ * (1 + 1e-9))


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**power for power in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= count + 2:
            return ticks
    return ticks[:: math.ceil(len(ticks) / count)]


def _middle(low: float, high: float, scale: Scale) -> list[float]:
    return [math.sqrt(low * high) if scale == "log" else (low + high) / 2]


# Lines


def _grid(across: Axis, up: Axis) -> Iterator[str]:
    for tick in up.ticks():
        yield f'<path class="axis" d="M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text class="end" x="{LEFT - 6}" y="{up(tick) + 4:.1f}">{short(tick)}</text>'
    yield from _steps(across, across.ticks(5), HEIGHT - BOTTOM + 15)


def _steps(across: Axis, ticks: Sequence[float], y: float) -> Iterator[str]:
    """The words below a chart; a number that would touch the last of them is left out."""
    for tick in ticks:
        if across(tick) < across.end - 45:
            yield f'<text class="middle" x="{across(tick):.1f}" y="{y}">{short(tick)}</text>'
    yield f'<text class="end" x="{across.end}" y="{y}">step</text>'


def _drawn(line: Line, colour: str, across: Axis, up: Axis) -> Iterator[str]:
    if line.low:
        ends = [
            (across(step), up(low), up(high))
            for step, low, high in zip(line.steps, line.low, line.high)
            if up.holds(low) and up.holds(high)
        ]
        around = [f"{x:.1f} {y:.1f}" for x, _, y in ends] + [f"{x:.1f} {y:.1f}" for x, y, _ in reversed(ends)]
        if len(ends) > 1:
            yield f'<path class="band" style="fill:{colour}" d="M{"L".join(around)}z"/>'
        else:
            yield from (f'<path class="line" style="stroke:{colour}" d="M{x} {y}V{z}"/>' for x, y, z in ends)
    pieces: list[list[str]] = [[]]
    for step, value in _thinned(line.steps, line.values):
        if up.holds(value):
            pieces[-1].append(f"{across(step):.1f} {up(value):.1f}")
        else:
            pieces.append([])
    if path := "".join("M" + "L".join(piece) for piece in pieces if len(piece) > 1):
        faint = " faint" if line.look == "faint" else ""
        yield f'<path class="line{faint}" style="stroke:{colour}" d="{path}"/>'
    few = len(line.values) <= 12 and line.look == "plain"
    for x, y in (place.split() for piece in pieces if few or len(piece) == 1 for place in piece):
        yield f'<circle style="fill:{colour}" cx="{x}" cy="{y}" r="2.5"/>'


def _thinned(steps: Sequence[float], values: Sequence[Number]) -> list[tuple[float, Number]]:
    """The points of a long line that can be seen: the lowest and the highest of each bin, so that no peak is lost."""
    points = list(zip(steps, values))
    if len(points) <= 2 * MOST_BINS:
        return points
    kept: list[tuple[float, Number]] = []
    edges = [index * len(points) // MOST_BINS for index in range(MOST_BINS + 1)]
    for first, last in pairwise(edges):
        told = sorted((value, index) for index in range(first, last) if _finite(value := points[index][1]))
        kept += [points[index] for index in sorted({told[0][1], told[-1][1]})] if told else [points[first]]
    return kept


# Heat maps


def _columns(steps: Sequence[float], values: Sequence[Sequence[Number]], rows: int) -> list[list[Number]]:
    """Records [N][R] on columns of equal width in steps, [C][R]."""
    count = min(len(steps), MOST_COLUMNS)
    span = (steps[-1] - steps[0]) or 1.0
    edges = [steps[0] + (column - 0.5) * span / max(count - 1, 1) for column in range(count)]
    found: list[list[Number] | None] = [None] * count
    for step, record in zip(steps, values):
        column = bisect_right(edges, step) - 1
        told = [record[row] if row < len(record) and _finite(record[row]) else None for row in range(rows)]
        before = found[column] or [None] * rows
        found[column] = [max((v for v in pair if v is not None), default=None) for pair in zip(before, told)]
    for column in range(1, count):
        found[column] = found[column] or found[column - 1]
    return [column or [None] * rows for column in found]


def _level(value: Number, spread: Axis | None) -> int | None:
    if value is None:
        return None
    return LEVELS // 2 if spread is None else round(spread(max(value, spread.low)))


def _runs(levels: Sequence[int | None]) -> Iterator[tuple[int, int, int]]:
    """(start, length, level) of neighbours of one colour."""
    start = 0
    for place in range(1, len(levels) + 1):
        level = levels[start]
        if place == len(levels) or levels[place] != level:
            if level is not None:
                yield start, place - start, level
            start = place


def _stretched(
    x: float, y: float, width: float, height: float, columns: int, rows: int, paths: dict[int, list[str]]
) -> str:
    """Cells in units of one, stretched over a box."""
    drawn = "".join(f'<path fill="{ramp(n / (LEVELS - 1))}" d="{"".join(cells)}"/>' for n, cells in paths.items())
    scale = f"translate({x} {y}) scale({width / columns:.6g} {height / rows:.6g})"
    return f'<g transform="{scale}" shape-rendering="crispEdges">{drawn}</g>'
