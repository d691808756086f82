"""The guide's code runs, block after block, as a reader would run it, and makes the figures that the pages show.

Every chapter becomes a notebook.
"""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
spec = importlib.util.spec_from_file_location("guide", DOCS / "guide.py")
assert spec is not None
assert spec.loader is not None
guide = importlib.util.module_from_spec(spec)
spec.loader.exec_module(guide)

CHAPTERS = guide.chapters()
TRAINS = "13-training.md"
PARAMETERS = [
    pytest.param(page, id=page.stem, marks=[pytest.mark.run] if page.name == TRAINS else []) for page in CHAPTERS
]


def figures_of(text: str) -> set[str]:
    """The names of the guide's figures that a page shows."""
    return set(re.findall(r"!\[[^\]]*\]\([^)]*figures/guide/([\w-]+\.png)\)", text))


@pytest.mark.parametrize("page", PARAMETERS)
def test_the_blocks_of_a_chapter_run_in_turn_and_make_its_figures(page, tmp_path, capsys):
    guide.run(page, tmp_path)
    assert capsys.readouterr().out
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == figures_of(page.read_text(encoding="utf-8"))
    assert all((guide.FIGURES / name).exists() for name in figures)


def test_all_figures_are_shown_and_small():
    shown = set().union(*(figures_of(page.read_text(encoding="utf-8")) for page in CHAPTERS))
    assert {path.name for path in guide.FIGURES.iterdir()} == shown
    assert max(path.stat().st_size for path in guide.FIGURES.iterdir()) < 200_000


def test_each_chapter_has_code_exercises_with_answers_and_a_place_in_the_contents():
    assert len(CHAPTERS) == 14
    contents = (DOCS / "guide" / "index.md").read_text(encoding="utf-8")
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    for page in CHAPTERS:
        text = page.read_text(encoding="utf-8")
        exercises = re.findall(r"^\d\. ", text[text.index("\n## Exercises\n") :], flags=re.MULTILINE)
        assert len(exercises) >= 2
        assert text.count("<details") == text.count("</details>") == len(exercises)
        assert len(guide.code_blocks(text)) >= 3
        assert f"({page.name})" in contents
        assert f"guide/{page.name}\n" in navigation


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_a_notebook_has_the_code_of_its_chapter(page):
    jupytext = pytest.importorskip("jupytext")
    assert jupytext is not None
    text = page.read_text(encoding="utf-8")
    cells = guide.notebook(page).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert code == [block.rstrip("\n") for block in guide.code_blocks(text)]
    assert not any("<details" in cell.source or "figures/guide" in cell.source for cell in cells)


@pytest.mark.slow
def test_all_notebooks_run(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    for path in guide.write_notebooks(tmp_path):
        book = nbformat.read(path, as_version=4)
        nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
        images = [
            output for cell in book.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
        ]
        assert images, f"{path.name} shows no figure"
