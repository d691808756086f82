"""The page of an evaluation: whole by itself, safe whatever things are called, and it shows what was copied."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tessera.data import DigitsConfig
from tessera.evaluation import protocol, report
from tessera.evaluation.sources import Folder, Npz
from tessera.evaluation.suite import evaluate


class Page(HTMLParser):
    """What a browser would find: tags with what they point to, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def written(digits, tmp_path):
    """Evaluate a subject against the real digits, and write the report into tmp_path / out."""

    def run(subject, told: str = "digits", **more):
        done = evaluate(subject, told, digits, tmp_path / "out", **more)
        report.write(done, tmp_path / "out", "tessera evaluate 'it'")
        return tmp_path / "out"

    return run


def test_the_page_is_whole_by_itself(written, make_npz, real, small_shards):
    labels = DigitsConfig().open().labels
    folder = written(Npz(make_npz("s.npz", real[:300], labels[:300])))
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert len(page.links) == page.tags.count("img") == 2
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?:|@import|url\(", text)
    for score in protocol.load(folder):
        assert score.metric in page.text
        assert score.fingerprint in page.text
        assert f"{score.value:.5g}" in page.text
    for said in ("tessera evaluate 'it'", "Class by class", "Is it copying?", "drawing", "environment.torch"):
        assert said in page.text


def test_the_markdown_names_the_same_numbers_and_its_pictures_are_beside_it(written, make_npz, real):
    folder = written(Npz(make_npz("s.npz", real[:100])))
    text = (folder / "report.md").read_text()
    for score in protocol.load(folder):
        assert f"| {score.metric} | {score.value:.5g} |" in text
    shown = re.findall(r"!\[.*\]\((.*)\)", text)
    assert shown == ["grid.png", "neighbours.png"]
    for name in shown:
        Image.open(folder / name).verify()


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a&b", "{body}", '"><img src=x onerror=y>', "|"])
def test_names_are_text_whatever_they_are(written, make_folder, real, name):
    inner = name.replace("/", "")
    labels = DigitsConfig().open().labels[:40]
    folder = written(Folder(make_folder(inner, real[:40], labels)))
    page = Page((folder / "report.html").read_text())
    assert "script" not in page.tags
    assert page.tags.count("img") == 2
    assert inner in page.text
    assert "{title}" not in page.text


def test_class_names_are_text(written, make_npz, make_folder, real, tmp_path):
    labels = ["<b>cat</b>", "<i>dog</i>"]
    pair = (
        Folder(make_folder(name, real[part], labels * 30)) for name, part in (("s", np.s_[:60]), ("r", np.s_[60:120]))
    )
    subject, told = pair
    folder = written(subject, str(told.path))
    page = Page((folder / "report.html").read_text())
    assert not {"b", "i"} & set(page.tags)
    assert "<b>cat" in page.text


def test_an_exact_copy_is_found_beside_its_original_at_no_distance(written, make_npz, real, small_shards):
    pictures = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), dtype=np.uint8)
    pictures[33] = real[777]
    folder = written(Npz(make_npz("s.npz", pictures)), metrics=["kid"])
    sheet = np.asarray(Image.open(folder / "neighbours.png"))
    zoom = 8
    first, below = (sheet[row * (64 + 2) : row * (64 + 2) + 64 : zoom, 0:64:zoom] for row in (0, 1))
    np.testing.assert_array_equal(first, real[777, ..., 0])
    np.testing.assert_array_equal(below, real[777, ..., 0])


def test_against_statistics_there_are_no_neighbours_to_show(written, make_npz, real, digits, tmp_path):
    from tessera.evaluation import reference
    from tessera.evaluation.features import extract
    from tessera.evaluation.sources import Data
    from tessera.runtime import Distributed

    reference.save(extract(Data(DigitsConfig()), digits, tmp_path / "w", Distributed()), tmp_path / "stats.npz")
    folder = written(Npz(make_npz("s.npz", real[:50])), str(tmp_path / "stats.npz"))
    assert not (folder / "neighbours.png").exists()
    assert "Is it copying?" not in (folder / "report.html").read_text()
    assert "kid" in (folder / "report.html").read_text()


@pytest.mark.parametrize("count", [1, 2, 7])
def test_few_pictures_still_make_a_page(written, make_npz, real, count):
    folder = written(Npz(make_npz("s.npz", real[:count])))
    assert len(Page((folder / "report.html").read_text()).links) == 2


def test_a_first_shard_without_a_usable_picture_still_makes_a_page(written, make_folder, real, small_shards):
    from tessera.data import FilesConfig
    from tessera.evaluation.sources import Data

    path = make_folder("data", real[:45])
    for file in sorted(path.iterdir())[:20]:
        file.write_text("no image")
    folder = written(Data(FilesConfig(path=str(path), size=(8, 8), channels=1)), metrics=["kid"])
    grid = np.asarray(Image.open(folder / "grid.png"))
    np.testing.assert_array_equal(grid[:64:8, :64:8], real[20, ..., 0])
