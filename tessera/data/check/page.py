"""The check of a data set as one HTML page: numbers, bars, and the samples of every finding as small pictures."""

import html
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from PIL import Image, ImageOps

from tessera.data.check.findings import Finding, ScanResult
from tessera.data.files import FilesDataset
from tessera.data.images import InvalidSample, flatten
from tessera.reporting import charts
from tessera.reporting import page as page_html

SHOWN = 16  # samples of a finding
GROUPS, OF_GROUP = 12, 6  # groups of a finding, and samples of each
NAMED = 30  # of what is no sample
BARS = 30
SIDE = 96  # pixels of the longer side of a small picture, at most

STYLE = """
.shown { display: flex; flex-wrap: wrap; gap: .8em; margin: .8em 0 }
.shown figure { width: 112px } .shown img { max-width: 112px; min-width: 48px; border: 1px solid var(--rule) }
.shown figcaption { font-size: .72em; line-height: 1.25; overflow-wrap: anywhere }
.group { border-left: 3px solid var(--rule); padding-left: .8em }
.gone { width: 64px; height: 64px; display: grid; place-items: center; background: var(--panel); color: var(--soft) }
.wrong { color: var(--m0) } .doubtful { color: var(--m1) } .note { color: var(--soft) }
"""


@dataclass(frozen=True)
class Thumbnail:
    """A sample as the page shows it; png is None where it cannot be decoded."""

    name: str
    png: bytes | None
    about: str


def page(survey: ScanResult, found: Sequence[Finding], keep: np.ndarray, command: str = "") -> str:
    """The whole page. keep: which samples are kept, bool [N]"""
    parts = [
        f"<h1>Check of {html.escape(survey.path)}</h1>",
        page_html.table(("", ""), summary(survey, keep)),
        f"<pre>{html.escape(command)}</pre>" if command else "",
        f'<div class="charts">{"".join(_bars(survey))}</div>',
        "" if found else "<h2>Nothing was found</h2>",
        *(_section(survey, finding) for finding in found),
    ]
    return page_html.document(f"Check of {survey.path}", "\n".join(parts), charts.STYLE + STYLE)


def summary(survey: ScanResult, keep: np.ndarray) -> list[tuple[str, str]]:
    """What there is, in a handful of rows. keep: bool [N]"""
    usable, labels = survey.usable, survey.source.class_names
    captions = survey.source.table["caption"]
    rows = [
        ("samples", f"{len(usable):,}"),
        ("can be read", f"{int(usable.sum()):,}"),
        ("kept", f"{int(keep.sum()):,}"),
        ("bytes", f"{int(survey.column('length').sum()):,}"),
        ("classes", f"{len(labels):,}" if labels else "none"),
        ("with a caption", f"{len(captions) - captions.null_count:,}"),
    ]
    if usable.any():
        height, width = survey.column("height")[usable], survey.column("width")[usable]
        area = height * width
        least, most = int(area.argmin()), int(area.argmax())
        rows.append(("sizes", f"{height[least]} x {width[least]} to {height[most]} x {width[most]} (height x width)"))
    rows.append(("checked", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")))
    return rows


def _bars(survey: ScanResult) -> Iterator[str]:
    usable, names = survey.usable, survey.source.class_names
    if names:
        labels = survey.labels[usable & (survey.labels >= 0)]
        counts = sorted(zip(names, np.bincount(labels, minlength=len(names)).tolist()), key=lambda told: -told[1])
        yield _chart("Images of each class", counts)
    sizes, counts = np.unique(
        np.stack((survey.column("height"), survey.column("width")), 1)[usable], axis=0, return_counts=True
    )
    told = [(f"{height} x {width}", count) for (height, width), count in zip(sizes.tolist(), counts.tolist())]
    yield _chart("Sizes (height x width)", sorted(told, key=lambda told: -told[1]))
    kinds = Counter(
        f"{one} {mode}" for one, mode in zip(survey.column("format")[usable], survey.column("mode")[usable])
    )
    yield _chart("Formats", kinds.most_common())


def _chart(title: str, told: Sequence[tuple[str, float]]) -> str:
    more = f"the first {BARS} of {len(told):,}" if len(told) > BARS else ""
    return charts.bar_chart(title, told[:BARS], more)


def _section(survey: ScanResult, finding: Finding) -> str:
    parts = [
        f'<h2><span class="{finding.severity}">{finding.severity}</span> {html.escape(finding.kind)}</h2>',
        f"<p>{html.escape(finding.message)}.</p>",
        "".join(f"<pre>{html.escape(line)}</pre>" for line in finding.advice),
    ]
    if finding.groups:
        for group in finding.groups[:GROUPS]:
            shown = [thumbnail(survey, row, finding.reasons.get(row, "")) for row in group[:OF_GROUP]]
            parts.append(f'<div class="group">{_shown(shown)}{_more(len(group), OF_GROUP, "in this group")}</div>')
        parts.append(_more(len(finding.groups), GROUPS, "groups"))
    elif finding.samples:
        parts.append(_shown([thumbnail(survey, row, finding.reasons.get(row, "")) for row in finding.samples[:SHOWN]]))
        parts.append(_more(len(finding.samples), SHOWN, "samples"))
    if finding.names:
        parts.append(f"<p>{'<br>'.join(map(html.escape, finding.names[:NAMED]))}</p>")
        parts.append(_more(len(finding.names), NAMED, "names"))
    return "\n".join(filter(None, parts))


def _more(count: int, shown: int, what: str) -> str:
    return (
        f'<p class="note">and {count - shown:,} more {what}; all stand in decisions.jsonl</p>' if count > shown else ""
    )


def _shown(thumbnails: Sequence[Thumbnail]) -> str:
    figures = []
    for one in thumbnails:
        told = f"{one.name}: {one.about}" if one.about else one.name
        if one.png is None:
            figures.append(f'<figure><div class="gone">?</div><figcaption>{html.escape(told)}</figcaption></figure>')
        else:
            figures.append(page_html.picture(one.png, told))
    return f'<div class="shown">{"".join(figures)}</div>'


def thumbnail(survey: ScanResult, row: int, about: str = "") -> Thumbnail:
    return Thumbnail(survey.name(row), small_picture(survey.source, row), about)


def small_picture(source: FilesDataset, row: int) -> bytes | None:
    """A sample as a PNG of at most SIDE pixels a side, as training sees it; None if it cannot be decoded."""
    try:
        content = source.encoded(row)
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))
            shown = flatten(ImageOps.exif_transpose(image), source.config).convert("RGB")
    except InvalidSample:
        return None
    except Exception:  # decoders raise anything on damaged bytes
        return None
    shown.thumbnail((SIDE, SIDE))
    held = io.BytesIO()
    shown.save(held, "PNG")
    return held.getvalue()
