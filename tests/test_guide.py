"""The guide's code runs, block after block, as a reader runs it, prints what the pages show, and makes their figures.

Every chapter becomes a notebook. The Chinese pages have the headings and the code of the English ones.
"""

import codeop
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


NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?")


def figures_of(text: str) -> set[str]:
    """The names of the guide's figures that a page shows."""
    return set(re.findall(r"!\[[^\]]*\]\([^)]*figures/guide/([\w-]+\.png)\)", text))


@pytest.mark.parametrize("page", PARAMETERS)
def test_the_blocks_of_a_chapter_run_in_turn_print_its_outputs_and_make_its_figures(page, tmp_path):
    _, printed = guide.run(page, tmp_path)
    shown = guide.outputs_of(page.read_text(encoding="utf-8"))
    assert any(shown)
    for output, expected in zip(printed, shown, strict=True):
        assert NUMBER.sub("#", output) == NUMBER.sub("#", expected), f"run: python docs/guide.py outputs {page}"
        if page.name != TRAINS:  # a training's numbers depend on the machine, and some on its load
            numbers, expected_numbers = (
                [float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (output, expected)
            )
            assert numbers == pytest.approx(expected_numbers, rel=0.1)
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == figures_of(page.read_text(encoding="utf-8"))
    assert all((guide.FIGURES / name).exists() for name in figures)


@pytest.mark.parametrize("page", [*CHAPTERS, DOCS / "tutorial" / "first-model.md"], ids=lambda page: page.stem)
def test_blocks_can_be_pasted_into_a_python_session(page):
    """Python before 3.13 takes a paste line by line: a loop ends with an empty line, and a function has none inside."""
    for block in guide.code_blocks(page.read_text(encoding="utf-8")):
        lines: list[str] = []
        for line in [*block.splitlines(), ""]:
            lines.append(line)
            if codeop.compile_command("\n".join(lines), symbol="single") is not None:
                lines = []
        assert not lines


def test_outputs_follow_their_block_in_place_of_earlier_ones():
    page = "```python\nprint(1)\n```\n```output\n2\n```\ntext\n```text\na = b\n```\n```python\nx = 1\n```\n"
    assert guide.outputs_of(page) == ["2\n", ""]
    changed = guide.with_outputs(page, ["1\n", ""])
    assert changed == page.replace("2", "1")
    assert guide.with_outputs(changed, ["", "3\n"]).count("```output") == 1


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
    assert not any(part in cell.source for cell in cells for part in ("<details", "figures/guide", "```output"))


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
    names, _ = guide.run(DOCS / "tutorial" / "first-model.md", tmp_path)
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
