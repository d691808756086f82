"""One HTML file, whole by itself: its frame in a light and a dark theme, tables, pictures. No script, no request."""

import base64
import html
from collections.abc import Sequence


def document(title: str, body: str, style: str = "") -> str:
    """A page around a body of HTML; style is CSS beside the page's own."""
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}{style}</style>\n<body>\n{body}\n</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are text. A wide table scrolls by itself."""
    told = "".join(f"<th>{html.escape(cell)}</th>" for cell in head) if any(head) else ""
    lines = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{f"<tr>{told}</tr>" if told else ""}{lines}</table></div>'


def picture(png: bytes, about: str) -> str:
    """A PNG inside the page, with what it shows."""
    told = html.escape(about)
    data = base64.b64encode(png).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt="{told}"><figcaption>{told}</figcaption></figure>'


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #667085; --rule: #e3e6eb; --panel: #f4f5f8; --paper: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ec; --soft: #9aa3b2; --rule: #2f343e; --panel: #1f232b; --paper: #15181e }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68em; margin: 2em auto 4em; padding: 0 1em;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.6em; margin: 0 0 .3em; overflow-wrap: anywhere } h2 { font-size: 1.2em; margin: 2.2em 0 .7em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { text-align: left; vertical-align: top; padding: .25em .9em .25em 0; border-bottom: 1px solid var(--rule) }
th { color: var(--soft); font-weight: 500 }
.wide { overflow-x: auto }
img { max-width: 100%; image-rendering: pixelated } figure { margin: 0 } figcaption { color: var(--soft) }
pre { background: var(--panel); padding: .6em; overflow: auto }
"""
