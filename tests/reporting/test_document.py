"""Documents: all text is escaped, a page is self-contained, and Markdown and HTML have the same content."""

import re

import numpy as np
import pytest

from tessera import images
from tessera.errors import TesseraError
from tessera.reporting.document import (
    Bullets,
    Code,
    Details,
    Document,
    Facts,
    Figure,
    Heading,
    Images,
    Notice,
    Paragraph,
    Table,
)

PNG = images.to_png(np.zeros((4, 4, 1), np.uint8))
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=y>', "{{ 7 * 7 }}", "a & b", "a|b"]


def everything(text: str) -> Document:
    """Every block, with the same text wherever a block has one."""
    figure = Figure(PNG, text, title=text, alt=text)
    blocks = [Heading(text), Paragraph(text), Bullets([text]), Table([(text,)], (text,)), Code(text), figure]
    blocks += [Facts([(text, text, text)]), Images([figure, Figure(None, text)], thumbnails=True), Images([figure])]
    return Document(text, [*blocks, Notice(text, text, blocks), Details(text, blocks)])


@pytest.mark.parametrize("text", HOSTILE)
def test_names_are_text_in_every_block(text, read_page):
    page = read_page(everything(text).html())
    assert page.tags.count("img") == 9
    assert not {"script", "iframe", "object", "link"} & set(page.tags)
    assert "49" not in page.text
    assert set(page.alts) == {text}
    assert page.codes == [text] * 3
    assert page.text.count(text) > 30


def test_a_page_makes_no_request(read_page):
    html = everything("x").html()
    assert all(link.startswith("data:image/png;base64,") for link in read_page(html).links)
    assert not re.search(r"https?:|@import|url\(", html)
    assert html == everything("x").html()


def test_markdown_has_the_same_content_and_refers_to_files():
    blocks = [Heading("Scores"), Table([("fd", "a|b\nc")], ("metric", "value")), Code("tessera info runs/x")]
    blocks += [
        Bullets(["one", "two"]),
        Figure(PNG, "<b> digits", file="grid.png"),
        Details("More", [Paragraph("inner")]),
    ]
    text = Document("A & B", blocks).markdown()
    assert text.startswith("# A &amp; B\n\n## Scores\n")
    assert "| metric | value |\n| --- | --- |\n| fd | a\\|b c |" in text
    assert "```\ntessera info runs/x\n```" in text
    assert "- one\n- two" in text
    assert "![&lt;b&gt; digits](grid.png)" in text
    assert "inner" in text


def test_save_writes_both_files_and_the_figures(tmp_path):
    Document("Title", [Figure(PNG, "a", file="figures/a.png"), Figure(PNG, "b")]).save(tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"report.md", "report.html", "figures/a.png"}
    assert (tmp_path / "figures/a.png").read_bytes() == PNG
    with pytest.raises(TesseraError, match="cannot write"):
        Document("Title", []).save(tmp_path / "report.md")


def test_names_that_are_not_unicode_can_be_written(tmp_path):
    Document("file \udcff.png", [Paragraph("file \udcff.png")]).save(tmp_path)
    assert "file ?.png" in (tmp_path / "report.md").read_text()
