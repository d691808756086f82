"""docs/figures.py: the figures of the study pages come from the tables beside them."""

import importlib.util
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
GRIDS = ("samples", "images")  # names of figures
spec = importlib.util.spec_from_file_location("docs_figures", ROOT / "docs/figures.py")
assert spec is not None
assert spec.loader is not None
docs_figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs_figures)


@pytest.mark.parametrize("name", docs_figures.STUDY_METRICS)
def test_a_page_shows_the_figures_of_its_tables(name):
    """All but the grids of samples, which are not in the tables."""
    page = (docs_figures.STUDIES / f"{name}.md").read_text(encoding="utf-8")
    shown = {each for each in re.findall(rf"figures/{name}/([\w-]+)\.png", page) if not each.startswith(GRIDS)}
    assert {figure.name for figure in docs_figures.study_figures(name)} == shown


def test_the_legend_of_many_members_fits_into_a_low_figure():
    figure = next(figure for figure in docs_figures.study_figures("scaling") if figure.name == "gmacs")
    pixels = np.asarray(Image.open(io.BytesIO(figure.png)).convert("L"))
    assert (pixels[-1] == 255).all()  # nothing is cut off at the lower edge
    assert (pixels[:, -1] == 255).all()


def test_the_values_of_the_axes_are_those_of_the_recipe():
    for name in docs_figures.STUDY_METRICS:
        study = docs_figures.read_study(ROOT / f"recipes/studies/{name}.yaml")
        results = docs_figures.results(study, name)
        for axis, values in study.axes.items():
            tabled = {result.values[axis] for result in results}
            assert tabled == set(values)


def test_the_figure_of_a_tuning_has_every_row_of_its_table():
    trials = docs_figures.trials()
    assert len(trials) == 5
    assert trials[0][0].startswith("baseline")
    assert all(fd.low < fd.value < fd.high for _, _, fd in trials)
    assert docs_figures.tuning_figure()[:4] == b"\x89PNG"
