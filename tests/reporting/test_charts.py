"""Charts: every number stands where its axis says, whatever the numbers are."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessera.reporting.charts import BOTTOM as BELOW
from tessera.reporting.charts import (
    HEIGHT,
    LEFT,
    LEVELS,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Line,
    StepMarks,
    bar_chart,
    heat_map,
    line_chart,
    ramp,
    short,
)

MOVES = re.compile(r"(-?[\d.]+) (-?[\d.]+)")
numbers = st.lists(st.floats(-1e30, 1e30) | st.none(), min_size=1, max_size=30)


def drawn(chart: str) -> list[tuple[float, float]]:
    """The points of the first line."""
    path = re.search(r'class="line" style="[^"]*" d="([^"]*)"', chart)
    return [(float(x), float(y)) for x, y in MOVES.findall(path.group(1))] if path else []


def labels(chart: str, kind: str) -> dict[float, float]:
    """Number on the axis -> place of its label."""
    place = {"end": "y", "middle": "x"}[kind]
    found = re.findall(rf'<text class="{kind}" x="([\d.]+)" y="([\d.]+)">([-\d.e]+)</text>', chart)
    return {float(text): float({"x": x, "y": y}[place]) for x, y, text in found}


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_point_stands_beside_its_number_on_the_axis(scale):
    values = [1.0, 2.0, 5.0, 10.0]
    chart = line_chart("loss", [Line("loss", [0, 100, 200, 300], values)], scale=scale)
    points, up, across = drawn(chart), labels(chart, "end"), labels(chart, "middle")
    beside = [number for number in values if number in up]
    assert len(beside) >= 2
    for number in beside:  # a label's baseline is 4 below the line it names
        assert points[values.index(number)][1] == pytest.approx(up[number] - 4, abs=0.11)
    for step in (0, 100, 200):
        assert points[step // 100][0] == pytest.approx(across[step], abs=0.11)


@given(numbers, st.sampled_from(["linear", "from zero", "log"]))
def test_whatever_the_numbers_the_line_stays_in_its_frame(values, scale):
    chart = line_chart("x", [Line("x", list(range(len(values))), values)], scale=scale)
    told = [value for value in values if value is not None]
    assert bool(chart) == bool(told)
    assert not re.search(r"\b(nan|inf)\b", chart)
    for x, y in drawn(chart):
        assert LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1
        assert TOP - 0.1 <= y <= HEIGHT - BELOW + 0.1


@given(st.floats(1e-12, 1e12), st.floats(1e-3, 1e6), st.sampled_from(["linear", "log"]))
def test_ticks_are_few_lie_on_the_axis_and_are_in_order(low, times, scale):
    axis = Axis(low, low * (1 + times), 0, 100, scale)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    assert all(-1e-3 <= axis(tick) <= 100.001 for tick in ticks)


def test_a_gap_breaks_the_line_and_a_lonely_number_is_a_dot():
    chart = line_chart("x", [Line("x", range(20), [1.0] * 5 + [None] + [2.0] + [None] + [3.0] * 12)])
    assert re.search(r'class="line"[^>]*d="([^"]*)"', chart).group(1).count("M") == 2
    assert chart.count("<circle") == 1


def test_no_peak_of_a_long_line_is_lost():
    values = np.random.default_rng(0).normal(size=100_000)
    values[[12_345, 67_890]] = 50, -50
    chart = line_chart("x", [Line("x", range(len(values)), list(values))])
    heights = [y for _, y in drawn(chart)]
    assert len(heights) < 1000
    above = sorted(heights)
    assert above[0] < above[1] - 50
    assert above[-1] > above[-2] + 50


def test_a_level_outside_the_numbers_is_still_in_the_frame():
    chart = line_chart("norm", [Line("norm", [1, 2], [0.1, 0.2])], scale="log", levels=[("clip 1", 1.0)])
    y = float(re.search(r'class="level" d="M\d+ ([\d.]+)H', chart).group(1))
    assert TOP <= y < drawn(chart)[1][1]


def test_marks_stand_at_their_steps_and_unused_ones_are_not_named():
    marks = [StepMarks("rollback", [50]), StepMarks("skipped step")]
    chart = line_chart("x", [Line("x", [0, 50, 100], [1.0, 2.0, 3.0])], marks=marks)
    x = float(re.search(r'class="mark"[^>]* d="M([\d.]+) ', chart).group(1))
    assert x == pytest.approx(drawn(chart)[1][0], abs=0.11)
    assert "rollback" in chart
    assert "skipped step" not in chart


def cells(chart: str) -> dict[tuple[int, int], str]:
    """(column, row) -> colour, of the map itself."""
    group = re.search(r"<g [^>]*>(.*?)</g>", chart).group(1)
    found = {}
    for colour, path in re.findall(r'fill="(#\w+)" d="([^"]*)"', group):
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v", path):
            found |= {(column, int(y)): colour for column in range(int(x), int(x) + int(width))}
    return found


def test_a_heat_map_colours_each_cell_by_its_value_first_row_on_top():
    values = [[0.0, 31.0], [10.0, None], [20.0, 5.0]]
    chart = heat_map("x", ["top", "low"], [100, 200, 300], values)
    expected = {(0, 0): 0, (1, 0): 10, (2, 0): 20, (0, 1): 31, (2, 1): 5}
    assert cells(chart) == {place: ramp(value / (LEVELS - 1)) for place, value in expected.items()}
    assert chart.index(">top<") < chart.index(">low<")


def test_records_that_share_a_column_show_their_largest_and_a_gap_holds_the_last():
    steps = list(range(1000))
    peak = [[1.0 if step == 503 else 0.0] for step in steps]
    told = cells(heat_map("x", ["a"], steps, peak))
    assert len(told) == 80
    assert list(told.values()).count(ramp(1)) == 1
    assert told[(round(503 / 999 * 79), 0)] == ramp(1)
    sparse = cells(heat_map("x", ["a"], [0, 10, 20, 100], [[0.0], [15.0], [31.0], [0.0]]))
    assert [sparse[(column, 0)] for column in range(4)] == [ramp(15 / 31), ramp(1), ramp(1), ramp(0)]


@given(st.lists(st.lists(st.floats(-1e30, 1e30) | st.none(), min_size=2, max_size=2), min_size=1, max_size=99))
def test_any_numbers_make_a_heat_map_or_none(values):
    chart = heat_map("x", ["a", "b"], list(range(len(values))), values, scale="log")
    assert bool(chart) == any(value is not None for record in values for value in record)
    assert not re.search(r"\b(nan|inf)\b", chart)


def test_the_ramp_grows_lighter():
    def light(colour: str) -> float:
        red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    told = [light(ramp(share / 20)) for share in range(21)]
    assert told == sorted(told)
    assert ramp(-1) == ramp(0)
    assert ramp(2) == ramp(1)


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (0.01234, "0.0123"), (3e-5, "3e-05"), (4.5678, "4.57"), (1234, "1234"), (9999.6, "10k"),
     (12345, "12.3k"), (999_999, "1M"), (4e6, "4M"), (-2.5e9, "-2.5G"), (math.nan, "nan")],
)  # fmt: skip
def test_numbers_are_short(value, said):
    assert short(value) == said


def test_bars_are_as_long_as_their_numbers():
    chart = bar_chart("classes", [("cat <x>", 40), ("dog", 10), ("none", 0)])
    widths = [float(width) for width in re.findall(r'<rect [^>]* width="([\d.]+)"', chart)]
    assert widths[0] == 4 * widths[1] > 0
    assert widths[2] == 0
    assert "cat &lt;x&gt;" in chart
    assert re.findall(r">([\d,]+)</text>", chart) == ["40", "10", "0"]
    assert bar_chart("nothing", []) == ""
