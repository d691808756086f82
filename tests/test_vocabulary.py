"""The words of docs/glossary.md: its last column lists the words that code and documents do not use."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The log keeps its words; the glossary lists the words itself.
EXEMPT = {"docs/glossary.md", "docs/log.md"}
# Names of other libraries: Pillow's ImageDraw, matplotlib's canvas.draw. RESIZING: a part of the key of caches.
ALLOWED = re.compile(r"ImageDraw|canvas\.draw|\.draw\(|^RESIZING = ")
ACTS = {"told", "untold", "found", "seen", "asked", "given", "said", "drawn", "kept", "wanted", "says", "anew"}


def replaced_words() -> set[str]:
    """The last column of the glossary's tables."""
    words = set()
    for line in (ROOT / "docs/glossary.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 3 and cells[2] != "Do not write" and not set(cells[2]) <= {"-"}:
            words |= {word.strip() for word in cells[2].split(",")}
    return words


# A word ends at an underscore or a digit, too, so that names in code are read word by word.
PATTERN = re.compile(
    rf"(?<![A-Za-z])({'|'.join(sorted(map(re.escape, replaced_words()), key=len, reverse=True))})(?![A-Za-z])", re.I
)
TEXTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "tessera").rglob("*.py"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "docs").rglob("*.py"),
        *(ROOT / "recipes").rglob("*.yaml"),
    )
)
CODE = [text for text in TEXTS if text.endswith(".py")]


def uses(text: str) -> list[str]:
    """Lines of a text that use a replaced word."""
    lines = enumerate(text.splitlines(), 1)
    matches = ((number, PATTERN.search(line)) for number, line in lines if not ALLOWED.search(line))
    return [f"{number}: {match[1]}" for number, match in matches if match]


def variables(source: str) -> list[str]:
    """Variables and parameters that are named for an act instead of the thing they hold."""
    names = (
        (node.lineno, node.id if isinstance(node, ast.Name) else node.arg)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.arg) or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    )
    return [f"{line}: {name}" for line, name in names if name in ACTS]


@pytest.mark.parametrize("path", [text for text in TEXTS if text not in EXEMPT])
def test_a_file_uses_the_words_of_the_glossary(path):
    assert uses((ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", CODE)
def test_variables_are_named_for_what_they_hold(path):
    assert variables((ROOT / path).read_text(encoding="utf-8")) == []


def test_the_check_detects_words_in_prose_and_in_names():
    assert len(replaced_words()) > 40
    for text in ("The picture is drawn anew.", "def draw_picture():", "state.was_told"):
        assert uses(text)
    assert not uses("withdrawn, pictured-like, ImageDraw.Draw(image)")
    assert variables("found = 1\ndef f(told): ...") == ["1: found", "2: told"]
