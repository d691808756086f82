"""Links, images and file names of the documentation point to files and headings that exist. No network is used.

Addresses of other sites are checked for their form only.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
# They name files as they were at the time.
HISTORY = {"docs/log.md", "docs/decisions/index.md"}

FENCE = re.compile(r"^ *(```|~~~).*?^ *\1 *$", flags=re.DOTALL | re.MULTILINE)
CODE = re.compile(r"(`+)(.+?)\1", flags=re.DOTALL)
INLINE = re.compile(r"\]\(\s*<?([^\s()<>]+(?:\([^\s()]*\)[^\s()]*)*)>?(?:\s+[\"'][^)]*)?\s*\)")
HTML = re.compile(r"<(?:a|img|source|video)\b[^>]*?\b(?:href|src)\s*=\s*[\"']([^\"']+)[\"']")
AUTOMATIC = re.compile(r"<(https?:[^\s>]+)>")
DEFINITION = re.compile(r"^ {0,3}\[([^\]^]+)\]:\s+(\S+)", flags=re.MULTILINE)
REFERENCE = re.compile(r"\]\[([^\]]+)\]")
HEADING = re.compile(r"^#{1,6} +(.*?)(?: +#+)? *$", flags=re.MULTILINE)
EXTERNAL = re.compile(r"https://[\w-]+(\.[\w-]+)+(:\d+)?(/[^\s|`\"'<>]*)?")
OWN_FILE = re.compile(r"(?:tests|benchmarks|docs|recipes|tessera)/[\w./-]+\.(?:md|py|yaml|json|csv|png|svg|webp|npz)")


@dataclass(frozen=True)
class Text:
    prose: str  # without code
    code: list[str]  # the contents of code spans in prose


def read(markdown: str) -> Text:
    """Prose and code spans of a page. Fenced blocks are left out."""
    outside = FENCE.sub("", markdown)
    return Text(CODE.sub("``", outside), [match[2] for match in CODE.finditer(outside)])


def slugs(heading: str) -> set[str]:
    """The anchors of a heading that GitHub and MkDocs have in common: none if they differ."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "").strip().lower()
    github = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
    mkdocs = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text.encode("ascii", "ignore").decode()).strip())
    return {github} & {mkdocs}


@cache
def anchors(path: Path) -> set[str]:
    """All anchors of a page."""
    markdown = FENCE.sub("", path.read_text(encoding="utf-8"))
    names = set(re.findall(r"\bid=[\"']([^\"']+)[\"']", markdown))
    return names.union(*(slugs(match[1]) for match in HEADING.finditer(markdown)))


def targets(prose: str) -> Iterator[str]:
    """Every address that a page links to or shows."""
    for pattern, group in ((INLINE, 1), (HTML, 1), (AUTOMATIC, 1), (DEFINITION, 2)):
        yield from (match[group] for match in pattern.finditer(prose))


def problem(page: Path, target: str) -> str | None:
    """What is wrong with a link of a page, or None."""
    if re.match(r"[a-z][a-z0-9+.-]*:", target, flags=re.IGNORECASE):
        return None if EXTERNAL.fullmatch(target) or target.startswith("mailto:") else f"{target}: not https"
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    if not path.is_relative_to(ROOT) or not path.exists():
        return f"{target}: there is no such file"
    if anchor and anchor not in anchors(path):
        return f"{target}: {path.relative_to(ROOT)} has no such heading"
    return None


def problems(page: Path, markdown: str) -> list[str]:
    """The broken links of a page."""
    text = read(markdown)
    messages = [message for target in targets(text.prose) if (message := problem(page, target))]
    defined = {match[1].lower() for match in DEFINITION.finditer(text.prose)}
    used = {match[1].lower() for match in REFERENCE.finditer(text.prose)}
    messages += [f"[{name}] is not defined" for name in sorted(used - defined)]
    return messages + [f"[{name}] is not used" for name in sorted(defined - used)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_links_of_a_page_lead_somewhere(page):
    assert problems(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.relative_to(ROOT).as_posix() not in HISTORY],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_files_of_this_repository_that_a_page_names_exist(page):
    names = [span for span in read(page.read_text(encoding="utf-8")).code if OWN_FILE.fullmatch(span)]
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_pages_of_the_site_are_in_its_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in sorted((ROOT / "docs").rglob("*.md"))]
    assert [page for page in pages if f": {page}\n" not in navigation] == []


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("[a](docs/nothing.md)", "docs/nothing.md: there is no such file"),
        ("![a](docs/figures/nothing.png 'title')", "docs/figures/nothing.png: there is no such file"),
        ("[a](docs/glossary.md#no-such-heading)", "docs/glossary.md#no-such-heading: docs/glossary.md has no such"),
        ("[a](#no-such-heading)", "#no-such-heading: README.md has no such heading"),
        ("[a](http://example.com)", "http://example.com: not https"),
        ("[a](https://localhost)", "https://localhost: not https"),
        ("[a](../outside.md)", "../outside.md: there is no such file"),
        ('<img src="docs/nothing.png">', "docs/nothing.png: there is no such file"),
        ("[a][b]", "[b] is not defined"),
        ("[b]: https://example.com", "[b] is not used"),
        ("[a][b]\n\n[b]: docs/nothing.md", "docs/nothing.md: there is no such file"),
    ],
)
def test_the_check_detects_a_broken_link(markdown, expected):
    messages = problems(ROOT / "README.md", markdown)
    assert len(messages) == 1
    assert messages[0].startswith(expected)


def test_the_check_accepts_what_is_right():
    markdown = """
[a](docs/glossary.md) ![b](docs/figures/demo-digits.png) [c](#quickstart) [d](https://example.com/a_(b)#c) [e][f]
`[x](nothing.md)` and
```
[y](nothing.md)
```

[f]: https://example.com
"""
    assert problems(ROOT / "README.md", markdown) == []
    assert slugs("What is `read`, and why?") == {"what-is-read-and-why"}
    assert slugs("One - two") == set()  # GitHub: one---two, MkDocs: one-two
