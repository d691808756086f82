"""The document model of all reports, rendered to Markdown and to one self-contained HTML page.

A `Document` is a title and blocks. Every text in a block is plain text and is escaped when it is rendered. On the HTML
page images are data URIs, so a page makes no request and needs no file beside it.
"""

import base64
import functools
import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tessera.files import atomic_write

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATE = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    rows: Sequence[Sequence[str]]
    head: Sequence[str] = ()


@dataclass(frozen=True)
class Code:
    """Text to paste into a shell or a recipe, and nothing else."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Short facts shown as tiles: (label, value, note)."""

    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Figure:
    """An image with a title and a caption. image: PNG or SVG, or None for one that cannot be shown."""

    image: bytes | None
    caption: str = ""
    title: str = ""
    alt: str = ""  # text in place of the image; the title and the caption if empty
    file: str = ""  # path of the image relative to the Markdown file

    @property
    def text(self) -> str:
        """What a reader without the image gets."""
        return self.alt or ": ".join(filter(None, (self.title, self.caption)))

    @property
    def uri(self) -> str:
        image = self.image or b""
        media = "png" if image.startswith(b"\x89PNG") else "svg+xml"
        return f"data:image/{media};base64,{base64.b64encode(image).decode()}"


@dataclass(frozen=True)
class Images:
    """Figures in columns. thumbnails: small images at their own size, enlarged without smoothing."""

    figures: Sequence[Figure]
    thumbnails: bool = False


@dataclass(frozen=True)
class Notice:
    """A finding with a severity: error, warning or note."""

    severity: str
    title: str
    blocks: "Sequence[Block]" = ()


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away on the HTML page until the reader opens them."""

    summary: str
    blocks: "Sequence[Block]"


Block = Heading | Paragraph | Bullets | Table | Code | Facts | Figure | Images | Notice | Details


@dataclass(frozen=True)
class Document:
    title: str
    blocks: Sequence[Block]

    def html(self) -> str:
        """The page as one HTML file."""
        return _encodable(_template().render(document=self))

    def markdown(self) -> str:
        """The document as Markdown, which refers to the `file` of each figure."""
        return _encodable("\n\n".join(_markdown([Heading(self.title, level=1), *self.blocks])) + "\n")

    def save(self, folder: Path) -> None:
        """Write report.md with the files of its figures, and report.html. Raises TesseraError."""
        for block in self.blocks:
            if isinstance(block, Figure) and block.file and block.image:
                atomic_write(folder / block.file, block.image)
        atomic_write(folder / "report.md", self.markdown())
        atomic_write(folder / "report.html", self.html())


@functools.cache
def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["kind"] = lambda block: type(block).__name__
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _markdown(blocks: Sequence[Block]) -> Iterator[str]:
    for block in blocks:
        match block:
            case Heading():
                yield f"{'#' * block.level} {_line(block.text)}"
            case Paragraph():
                yield _line(block.text)
            case Bullets():
                yield "\n".join(f"- {_line(item)}" for item in block.items)
            case Table():
                yield _markdown_table(block.head, block.rows)
            case Code():
                yield f"```\n{block.text}\n```"
            case Facts():
                yield _markdown_table((), block.items)
            case Figure():
                text = _line(block.text).replace("[", "(").replace("]", ")")
                yield f"![{text}]({block.file})" if block.file else text
                if block.caption and block.file:
                    yield _line(block.caption)
            case Images():
                yield from _markdown(block.figures)
            case Notice():
                yield f"**{_line(block.severity)}: {_line(block.title)}**"
                yield from _markdown(block.blocks)
            case Details():
                yield f"**{_line(block.summary)}**"
                yield from _markdown(block.blocks)


def _encodable(text: str) -> str:
    """Names of files need not be Unicode: what is not becomes "?"."""
    return text.encode("utf-8", "replace").decode()


def _line(text: str) -> str:
    """Text on one line, without HTML in it."""
    return html.escape(" ".join(text.split()), quote=False)


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = head or [""] * max(map(len, rows), default=1)
    lines = [[_line(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
