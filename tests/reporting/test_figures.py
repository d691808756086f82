"""Charts: reproducible, robust to any number and any name, and small."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.reporting.figures import MAX_BINS, Line, bar_chart, heat_map, line_chart, set_log_scale, thin
from tessera.reporting.text import format_number

values = st.lists(st.floats(-1e30, 1e30) | st.none(), min_size=1, max_size=30)


def test_importing_reporting_loads_neither_matplotlib_nor_jinja2():
    code = "import sys, tessera.reporting.document, tessera.reporting.figures; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"matplotlib", "jinja2"} & set(done.stdout.split())


def test_a_line_chart_names_its_lines_with_their_latest_values(svg_text):
    lines = [Line("weights", [1, 2], [0.5, 0.25]), Line("EMA", [1, 2], [0.5, 0.125])]
    marks = [("rollback", [1.5]), ("skipped step", [])]
    figure = line_chart("Loss", lines, "mse", "log", levels=[("clip 1", 1.0)], marks=marks)
    text = svg_text(figure.image)
    assert {"weights 0.25", "EMA 0.125", "clip 1", "rollback", "step"} <= set(text)
    assert "skipped step" not in text
    assert (figure.title, figure.caption) == ("Loss", "mse")
    assert figure.text == "Loss: weights 0.25, EMA 0.125 at step 2"
    assert "latest 0.25" in line_chart("Loss", lines[:1]).caption


def test_the_same_data_give_the_same_bytes():
    line = Line("x", [1, 2], [1.0, 2.0], low=[0.5, 1.5], high=[1.5, 2.5])
    assert line_chart("x", [line]).image == line_chart("x", [line]).image


@settings(max_examples=15)
@given(values, st.sampled_from(["linear", "from zero", "log"]))
def test_any_numbers_make_a_line_chart_or_none(numbers, scale):
    figure = line_chart("x", [Line("x", list(range(len(numbers))), numbers)], scale=scale)
    assert (figure is None) == all(number is None for number in numbers)


@settings(max_examples=15)
@given(st.lists(st.lists(st.floats(-1e30, 1e30) | st.none(), min_size=2, max_size=2), min_size=1, max_size=99))
def test_any_numbers_make_a_heat_map_or_none(numbers):
    figure = heat_map("x", ["a", "b"], list(range(len(numbers))), numbers, scale="log")
    assert (figure is None) == all(number is None for record in numbers for number in record)


@pytest.mark.parametrize("name", ["<b>&", "$\\frac$", "猫", "a\x01\ud800b", "x" * 300])
def test_any_name_can_be_a_label(name, svg_text):
    charts = [
        line_chart(name, [Line(name, [1], [1.0]), Line("other", [1], [2.0])]),
        heat_map(name, [name], [1], [[1.0]]),
        bar_chart(name, [(name, 1)]),
    ]
    visible = name.replace("\x01", "\ufffd").replace("\ud800", "\ufffd")[:20]
    assert all(any(text.startswith(visible) for text in svg_text(chart.image)) for chart in charts)


def test_thinning_keeps_every_peak():
    numbers = np.random.default_rng(0).normal(size=100_000)
    numbers[[12_345, 67_890]] = 50, -50
    numbers[1000:3000] = math.nan
    steps, thinned = thin(range(len(numbers)), numbers)
    assert len(steps) <= 2 * MAX_BINS
    assert (np.nanmax(thinned), np.nanmin(thinned)) == (50, -50)
    assert np.isnan(thinned).any()
    np.testing.assert_array_equal(thinned, numbers[steps.astype(int)])


def test_charts_of_long_logs_are_small():
    steps = range(100_000)
    noise = np.random.default_rng(0).normal(size=len(steps)).tolist()
    assert len(line_chart("x", [Line("x", steps, noise)]).image) < 60_000
    assert len(heat_map("x", list("abc"), steps[:9000], [[n, 0.0, 1.0] for n in noise[:9000]]).image) < 60_000


def test_records_that_share_a_column_show_their_largest_and_a_gap_holds_the_last():
    from tessera.reporting.figures import _columns

    peak = [[1.0 if step == 503 else 0.0] for step in range(1000)]
    columns, edges = _columns(range(1000), peak, rows=1)
    assert np.flatnonzero(columns[0]).tolist() == [np.searchsorted(edges, 503, side="right") - 1]
    sparse, _ = _columns([0, 10, 20, 100], [[0.0], [15.0], [31.0], [0.0]], rows=1)
    assert sparse.tolist() == [[15.0, 31.0, 31.0, 0.0]]


@pytest.mark.parametrize(("low", "high"), [(1, 2.5), (0.03, 90), (1e-9, 1e3), (2e5, 3e5)])
def test_logarithmic_axes_have_a_few_labels(low, high):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    set_log_scale(axes.yaxis, low, high)
    inside = [tick for tick in axes.yaxis.get_major_locator()() if low <= tick <= high]
    assert 2 <= len(inside) <= 12
    assert axes.get_ylim() == (low, high)


def test_bars_show_their_numbers(svg_text):
    figure = bar_chart("Classes", [("cat", 12345), ("dog", 10), ("none", 0)], "the first 3")
    assert {"cat", "dog", "12,345", "10", "0"} <= set(svg_text(figure.image))
    assert figure.text == "Classes: cat 12,345, dog 10, none 0"
    assert bar_chart("nothing", []) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (3e-5, "3e-05"), (4.5678, "4.57"), (1234, "1234"), (9999.6, "10k"),
     (12345, "12.3k"), (999_999, "1M"), (4e6, "4M"), (-2.5e9, "-2.5G"), (math.nan, "nan")],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert format_number(value) == text
