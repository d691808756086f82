"""The guide's code runs, block after block, as a reader would run it, and makes the figures that the pages show.

Every chapter becomes a notebook. The Chinese pages have the headings and the code of the English ones.
"""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

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


@pytest.mark.parametrize(
    "page", [*CHAPTERS, *guide.chapters("zh")], ids=lambda page: f"{page.parent.parent.name}-{page.stem}"
)
def test_a_notebook_has_the_code_of_its_chapter(page):
    pytest.importorskip("jupytext")
    cells = guide.notebook(page).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert code == [block.rstrip("\n") for block in guide.code_blocks(page.read_text(encoding="utf-8"))]
    assert not any("<details" in cell.source or "figures/guide" in cell.source for cell in cells)


# The code of a Chinese chapter is that of the English one, so one of them is enough.
@pytest.mark.slow
@pytest.mark.parametrize("page", [*CHAPTERS, guide.chapters("zh")[5]], ids=lambda page: page.stem)
def test_a_notebook_runs_and_shows_figures(page, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    book = guide.notebook(page)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_the_first_model_is_trained_and_sampled(tmp_path):
    names = guide.run(DOCS / "tutorial" / "first-model.md", tmp_path)
    assert names["images"].shape == (2, 8, 8, 1)
    assert names["preview"].shape == (1, 8, 8, 1)
    assert (tmp_path / "runs" / "first-model").is_dir()


def headings(text: str) -> list[int]:
    """The levels of the headings of a page, in order."""
    return [len(marks) for marks in re.findall(r"^(#+) ", guide.FENCE.sub("", text), flags=re.MULTILINE)]


@pytest.mark.parametrize(("english", "chinese"), guide.translated(), ids=lambda page: page.stem)
def test_a_chinese_page_has_the_headings_and_the_code_of_the_english_one(english, chinese):
    source, text = english.read_text(encoding="utf-8"), chinese.read_text(encoding="utf-8")
    assert headings(text) == headings(source), f"{chinese} has other headings than {english}: translate the change"
    assert guide.fenced_blocks(text) == guide.fenced_blocks(source), "run: python docs/guide.py sync"
    assert figures_of(text) == figures_of(source)
    assert text.count("<details") == source.count("<details")


@pytest.mark.parametrize("page", [chinese for _, chinese in guide.translated()], ids=lambda page: page.stem)
def test_a_chinese_page_is_chinese_and_has_its_punctuation(page):
    prose = guide.FENCE.sub("", page.read_text(encoding="utf-8"))
    assert len(re.findall(r"[\u4e00-\u9fff]", prose)) > 200
    assert not re.findall(r"[\u4e00-\u9fff] ?[,;:?!](?=\s)", prose)


def test_the_navigation_has_both_languages():
    navigation = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    sections = {title: pages for section in navigation for title, pages in section.items()}
    english = [next(iter(page.values())) for page in sections["Guide"]]
    chinese = [next(iter(page.values())) for page in sections["中文"]]
    assert [f"zh/{page}" for page in english] == [page for page in chinese if page.startswith("zh/guide/")]
    assert chinese[:2] == ["zh/README.md", "zh/tutorial/first-model.md"]
