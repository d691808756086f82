"""The report of an evaluation: self-contained, the same numbers in all files, and copies are visible."""

import re
import shlex

import numpy as np
import pytest
from PIL import Image

from tessera.data import DigitsConfig
from tessera.evaluation import protocol, reference, report
from tessera.evaluation.features import extract
from tessera.evaluation.sources import DatasetSource, FolderSource, NpzSource
from tessera.evaluation.suite import evaluate

COMMAND = "tessera evaluate 'my samples.npz' --reference digits"


@pytest.fixture
def write_report(digits, tmp_path):
    """Evaluate a source against the real digits, and write the report to tmp_path / out."""

    def run(source, reference: str = "digits", **options):
        evaluation = evaluate(source, reference, digits, tmp_path / "out", **options)
        report.write(evaluation, tmp_path / "out", COMMAND)
        return tmp_path / "out"

    return run


def test_the_page_is_self_contained_and_has_all_scores(write_report, make_npz, real, small_shards, read_page):
    labels = DigitsConfig().open().labels
    folder = write_report(NpzSource(make_npz("s.npz", real[:300], labels[:300])))
    html = (folder / "report.html").read_text()
    page = read_page(html)
    assert len(page.links) == page.tags.count("img") == 2
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?:|@import|url\(", html)
    for score in protocol.load(folder):
        for text in (score.metric, score.fingerprint, f"{score.value:.5g}", f"{score.low:.5g} to {score.high:.5g}"):
            assert text in page.text
    assert {"KID by class", "Nearest reference images", "Protocol"} <= set(page.sections)
    assert "environment.torch" in page.sections["Protocol"]


def test_code_blocks_can_be_pasted(write_report, make_npz, real, read_page):
    folder = write_report(NpzSource(make_npz("s.npz", real[:30])), metrics=["kid"])
    (code,) = read_page((folder / "report.html").read_text()).codes
    assert shlex.split(code) == ["tessera", "evaluate", "my samples.npz", "--reference", "digits"]


def test_the_markdown_has_the_same_numbers_and_its_images_are_beside_it(write_report, make_npz, real):
    folder = write_report(NpzSource(make_npz("s.npz", real[:100])))
    text = (folder / "report.md").read_text()
    for score in protocol.load(folder):
        assert f"| {score.metric} | {score.value:.5g} |" in text
    files = re.findall(r"!\[.*\]\((.*)\)", text)
    assert files == [report.GRID, report.NEIGHBORS]
    for name in files:
        Image.open(folder / name).verify()


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x onerror=y>', "|"])
def test_names_are_text_whatever_they_are(write_report, make_folder, real, name, read_page):
    name = name.replace("/", "")
    folder = write_report(FolderSource(make_folder(name, real[:40])), metrics=["kid"])
    page = read_page((folder / "report.html").read_text())
    assert "script" not in page.tags
    assert page.tags.count("img") == 2
    assert name in page.text


def test_class_names_are_text(write_report, make_folder, real, read_page):
    labels = ["<i>cat<b>", "<i>dog<b>"]
    source = FolderSource(make_folder("samples", real[:60], labels * 30))
    reference = make_folder("reference", real[60:120], labels * 30)
    page = read_page((write_report(source, str(reference)) / "report.html").read_text())
    assert not {"b", "i"} & set(page.tags)
    assert "<i>cat<b>" in page.sections["KID by class"]


def test_an_exact_copy_is_shown_above_its_original(write_report, make_npz, real, small_shards):
    samples = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), dtype=np.uint8)
    samples[33] = real[777]
    folder = write_report(NpzSource(make_npz("s.npz", samples)), metrics=["kid"])
    sheet = np.asarray(Image.open(folder / report.NEIGHBORS))
    zoom = 8
    above, below = (sheet[row * (64 + 2) : row * (64 + 2) + 64 : zoom, 0:64:zoom] for row in (0, 1))
    np.testing.assert_array_equal(above, real[777, ..., 0])
    np.testing.assert_array_equal(below, real[777, ..., 0])


def test_statistics_as_reference_have_no_nearest_images(write_report, make_npz, real, digits, tmp_path):
    features = extract(DatasetSource(DigitsConfig()), digits, tmp_path / "work")
    reference.save_statistics(features, tmp_path / "statistics.npz")
    folder = write_report(NpzSource(make_npz("s.npz", real[:50])), str(tmp_path / "statistics.npz"))
    assert not (folder / report.NEIGHBORS).exists()
    html = (folder / "report.html").read_text()
    assert "Nearest reference images" not in html
    assert "kid" in html


@pytest.mark.parametrize("count", [1, 2, 7])
def test_few_samples_have_a_report(write_report, make_npz, real, count, read_page):
    folder = write_report(NpzSource(make_npz("s.npz", real[:count])))
    assert len(read_page((folder / "report.html").read_text()).links) == 2


def test_a_first_shard_without_a_valid_image_is_skipped(write_report, make_folder, real, small_shards):
    from tessera.data import FilesConfig

    path = make_folder("data", real[:45])
    for file in sorted(path.iterdir())[:20]:
        file.write_text("no image")
    config = FilesConfig(path=str(path), size=(8, 8), channels=1)
    folder = write_report(DatasetSource(config), metrics=["kid"])
    grid = np.asarray(Image.open(folder / report.GRID))
    np.testing.assert_array_equal(grid[:64:8, :64:8], real[20, ..., 0])
