"""The page of a data check: self-contained, safe for any file name, and its code blocks can be pasted."""

import io
import re
import shlex

import numpy as np
import pytest
from PIL import Image

from tessera import images
from tessera.data.check import CheckRequest, report_findings, scan_data

HOSTILE = '"><img src=x> & $x$.png'


@pytest.fixture
def checked(tmp_path):
    """A data set with copies, a damaged file and a hostile name, its check, and the folder of the report."""
    random = np.random.default_rng(0)
    data = tmp_path / "my data"
    for number in range(30):
        pixels = random.integers(0, 256, (8, 40 + number % 2, 3), dtype=np.uint8)
        images.save_png(data / ("cat", "dog")[number % 2] / f"{number}.png", pixels)
    (data / "dog" / HOSTILE).write_bytes((data / "cat" / "0.png").read_bytes())
    (data / "cat" / "broken.png").write_bytes(b"")
    request = CheckRequest(str(data), tmp_path / "out")
    scan_data(request)
    result = report_findings(request, command="tessera data check 'my data'")
    return result, tmp_path / "out"


def test_the_page_has_the_findings_with_thumbnails(checked, read_page):
    result, folder = checked
    html = (folder / "report.html").read_text()
    page = read_page(html)
    assert {finding.kind for finding in result.findings} >= {"empty", "duplicates", "conflicts"}
    for finding in result.findings:
        assert finding.kind in page.sections["Findings"]
        assert f"{finding.message[1:]}: {finding.count}" in page.sections["Findings"]
    assert all(link.startswith("data:image/") for link in page.links)
    assert not re.search(r"https?:|@import|url\(", html)
    assert HOSTILE in page.text
    (thumbnail, *_) = page.images("cat/0.png")
    assert max(Image.open(io.BytesIO(thumbnail)).size) <= 96


def test_charts_have_the_counts(checked, read_page, svg_text):
    page = read_page((checked[1] / "report.html").read_text())
    (classes,) = page.images("Images per class")
    assert {"cat", "dog", "15", "16"} <= set(svg_text(classes))
    (sizes,) = page.images("Sizes")
    assert {"8 x 40", "8 x 41"} <= set(svg_text(sizes))


def test_code_blocks_hold_only_commands(checked, read_page):
    result, folder = checked
    codes = read_page((folder / "report.html").read_text()).codes
    assert codes == ["tessera data check 'my data'", *(c for finding in result.findings for c in finding.commands)]
    assert {shlex.split(code)[0] for code in codes} <= {"tessera", "mv", "chmod", "find", "magick"}
    assert all(finding.advice or finding.commands for finding in result.findings)
