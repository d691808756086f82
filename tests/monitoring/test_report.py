"""The page of a run: whole by itself, true to the files it is made from, and made of whatever there is."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from tessera import images
from tessera.errors import TesseraError
from tessera.monitoring import report
from tessera.settings import validate
from tessera.training import loop
from tessera.training.recipe import Recipe

BLOCKS = 3


class Page(HTMLParser):
    """What a browser would find: tags, what they point to, the text by section, charts by title, bold settings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links, self.charts, self.told, self.sections = [], [], [], [], {"": ""}
        self._section, self._title, self._bold = "", False, False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        found = dict(attrs)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self._title = tag == "h2" or (self._title and tag != "section")
        if tag == "svg":
            self.charts.append(found["aria-label"])
        if tag == "tr":
            self._bold = found.get("class") == "told"
            self.told += [""] if self._bold else []

    def handle_endtag(self, tag):
        self._title = self._title and tag != "h2"
        self._bold = self._bold and tag != "tr"

    def handle_data(self, data):
        if self._title:
            self._section = data
        self.sections[self._section] = self.sections.get(self._section, "") + data
        if self._bold:
            self.told[-1] += data + " "


def page_of(run: Path) -> Page:
    return Page(report.page(run))


def append(path: Path, *records: dict) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def recipe(tmp_path) -> dict:
    return {
        "output": str(tmp_path / "run"),
        "data": {"kind": "digits"},
        "training": {"steps": 400, "batch": 64, "optimizer": {"kind": "adamw", "clip": 1.5}},
    }


@pytest.fixture
def doctor(monkeypatch) -> list:
    """What the doctor finds; its own judgement has its own tests."""
    findings: list = []
    monkeypatch.setattr("tessera.monitoring.doctor.diagnose", lambda run: findings)
    return findings


@pytest.fixture
def run(tmp_path, recipe, doctor) -> Path:
    """The files that a run leaves, as they are written: 40 of 400 steps, every tenth recorded."""
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for step in (10, 20, 30, 40):
        numbers = {"loss": 5 / step, "gradient_norm": 3 - step / 40, "learning_rate": 1e-4, "images_per_second": 128.0}
        numbers |= {"utilisation": 0.375, "stalled": 0.02, "clipped": 0.5, "kept_out": 2, "rollbacks": step // 30}
        append(folder / "log.jsonl", {"step": step, **numbers, "skipped": 0, "memory": 2**31})
    append(folder / "log.jsonl", {"step": 20, "fd": 9.0, "fd_low": 8.0, "fd_high": 10.0})
    append(folder / "log.jsonl", {"step": 40, "fd": 11.0, "fd_low": 10.0, "fd_high": 12.0})
    return folder


@pytest.fixture
def healthy(run) -> Path:
    """The same with all that is measured inside the network."""
    for step in (10, 20, 30, 40):
        lists = ("attention_logits", "gates", "scales", "activations")
        inside = {name: [step / 10 + block for block in range(BLOCKS)] for name in lists}
        norms = dict.fromkeys(("patches", "blocks.0", "blocks.1", "blocks.2", "readout"), 1.0 + step)
        probe = {"loss_probe": 0.25, "loss_ema": 0.125, "loss_wrong_labels": 0.5, "ema_distance": 0.01}
        data = {"dead_patches": 0.0, "still_patches": 0.5, "data_mean": 0.0, "data_std": 1.0, "data_spread": 0.5}
        by_time = [None, *(0.1 * n for n in range(1, 10))]
        record = {"step": step, "loss_by_time": by_time, "gradient_norms": norms, **inside, **probe, **data}
        append(run / "health.jsonl", record)
    return run


# The whole


def test_the_page_of_a_real_run_is_whole_by_itself(tiny):
    pytest.importorskip("sklearn")
    target = report.write(loop.train(tiny("run", "training.sample_every=2")))
    assert target.name == "report.html"
    text = target.read_text()
    page = Page(text)
    assert len(page.links) == page.tags.count("img") == 3  # before the first step, after 2 and 4
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?:|@import|url\(", text)
    assert "4 of 4" in page.sections[""]
    assert "All steps are done" in page.sections[""]
    assert "1,797" not in page.sections["Where it was made"]  # the split for models has 1,000
    assert "1,000 images" in page.sections["Where it was made"]
    assert {"Loss", "Learning rate", "Speed"} <= set(page.charts)


def test_the_head_tells_where_the_run_stands(run):
    head = page_of(run).sections[""]
    for said in ("40 of 400", "Not all steps are done", "0.125", "37.5%", "rollbacks1", "skipped steps2"):
        assert said in head
    assert "time in steps20 s" in head  # 40 steps of 64 images at 128 images a second
    assert "about 3 min 0 s left" in head  # 360 such steps
    assert "fd11best 9 at step 20" in head  # lower is better


def test_the_curves_are_those_of_the_log(run):
    page = page_of(run)
    assert page.charts == ["Loss", "Gradient norm", "Steps clipped", "Learning rate", "fd", "Speed", "Utilisation",
                           "Waiting for data", "Memory"]  # fmt: skip
    assert "clip 1.5" in page.sections["Curves"]
    assert "rollback" in page.sections["Curves"]
    assert "skipped step" in page.sections["Curves"]


def test_health_is_shown_by_time_by_part_and_by_depth(healthy):
    page = page_of(healthy)
    told = page.sections["Inside the network"]
    for title in ("Loss by time", "Gradient norm by part", "Attention logits by block", "Gates by block",
                  "Scales by block", "Activations by block", "EMA away from the weights"):  # fmt: skip
        assert page.charts.count(title) == 1
    for group in ("patches", "blocks.0", "blocks.1", "blocks.2", "readout"):
        assert group in told
    for value in ("weights 0.25", "EMA 0.125", "told wrong labels 0.5", "data 50"):
        assert value in told


def test_a_design_without_gates_has_no_map_of_them(healthy):
    path = healthy / "health.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    append(path, *({**record, "gates": None} for record in records))
    page = page_of(healthy)
    assert "Gates by block" not in page.charts
    assert "Scales by block" in page.charts


def test_findings_are_told_the_wrong_ones_first(run, doctor):
    assert "Nothing to remark" in page_of(run).sections["What the doctor says"]
    doctor += [
        SimpleNamespace(name="a", severity="watch", what="it sways", evidence="3 < 4", change="hold it"),
        SimpleNamespace(name="b", severity="wrong", what="it fell", evidence="0 of 5", change="lift it"),
    ]
    told = page_of(run).sections["What the doctor says"]
    assert "3 < 4" in told
    assert told.index("it fell") < told.index("lift it") < told.index("it sways")


def test_a_run_that_the_doctor_cannot_read_still_has_a_page(run, monkeypatch):
    def refuse(run):
        raise TesseraError("no settings that I know")

    monkeypatch.setattr("tessera.monitoring.doctor.diagnose", refuse)
    page = page_of(run)
    assert "no settings that I know" in page.sections["What the doctor says"]
    assert "Loss" in page.charts


def test_what_was_passed_over_is_named(run):
    place = {"step": 31, "position": 1984, "outcome": "passed over", "why": "the loss rose"}
    seen = {"loss": 4.5, "gradient_norm": None, "samples": [f"s{n}" for n in range(64)]}
    append(run / "passed.jsonl", {**place, **seen})
    (run / "skipped.txt").write_text("a.jpg\tdamaged\nb.jpg\tdamaged\nc.jpg\ttoo small\n")
    told = page_of(run).sections["What was passed over"]
    for said in ("passed over: 1", "1984", "the loss rose", "4.5", "s0, s1", "and 56 more", "not be used: 3"):
        assert said in told
    assert "2damaged" in told
    assert "1too small" in told


# The pictures


def test_first_and_last_grids_are_among_those_shown_and_a_damaged_one_is_not(run):
    sheet = np.zeros((8, 1000, 3), np.uint8)
    for step in range(0, 500, 10):
        images.save_png(run / f"samples/step-{step:09d}.png", sheet)
    assert page_of(run).tags.count("img") == report.GRIDS
    told = page_of(run).sections["What it draws"]
    assert "12 of 50 grids" in told
    assert "step 0step" in told
    assert told.strip().endswith("step 490")
    (run / "samples/step-000000490.png").write_bytes(b"no picture")
    assert page_of(run).tags.count("img") == report.GRIDS - 1


def test_a_wide_grid_is_scaled_down_and_a_small_one_left_as_it_is(tmp_path):
    import io

    from PIL import Image

    drawn = np.random.default_rng(0).integers(0, 256, (40, 1600, 1), dtype=np.uint8)
    images.save_png(tmp_path / "wide.png", drawn)
    assert Image.open(io.BytesIO(images.limit_width(tmp_path / "wide.png", 800))).size == (800, 20)
    same = np.asarray(Image.open(io.BytesIO(images.limit_width(tmp_path / "wide.png", 1600))))
    np.testing.assert_array_equal(same, drawn[..., 0])


# Settings


def test_settings_that_differ_from_the_defaults_stand_out_with_the_default(run):
    told = [line.split() for line in page_of(run).told]
    assert ["steps", "400", "instead", "of", "400000"] in told
    assert ["batch", "64", "instead", "of", "256"] in told
    assert ["optimizer.", "clip", "1.5", "instead", "of", "null"] in told
    assert len(told) == 3


def test_a_recipe_of_defaults_differs_in_nothing(run):
    data = {"output": "runs/x", "data": {"kind": "digits"}}
    resolved = validate(Recipe, data, "the test's recipe").model_dump(mode="json")
    (run / "recipe.yaml").write_text(yaml.safe_dump(resolved))
    assert page_of(run).told == []


def test_another_kind_differs_in_its_kind_and_its_own_settings_compare_with_its_own_defaults(run, recipe):
    recipe |= {"process": {"kind": "flow"}, "training": {"optimizer": {"kind": "muon", "momentum": 0.9}}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    told = [line.split() for line in page_of(run).told]
    assert ["kind", "flow", "instead", "of", "gaussian"] in told
    assert ["optimizer.", "kind", "muon", "instead", "of", "adamw"] in told
    assert ["optimizer.", "momentum", "0.9", "instead", "of", "0.95"] in told
    assert len(told) == 3


def test_settings_of_another_tessera_are_listed_without_comparison(run, recipe):
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "novelty": {"power": 9000}}))
    page = page_of(run)
    assert "novelty.power9000" in page.sections["Settings"]
    assert page.told == []


# Little, odd or hostile material


def test_a_run_that_wrote_nothing_yet_says_so(run):
    (run / "log.jsonl").unlink()
    shutil.rmtree(run / "samples")
    page = page_of(run)
    assert "No step is written down yet" in page.sections[""]
    assert "no records" in page.sections["Curves"]
    assert "No grid" in page.sections["What it draws"]
    assert "no health.jsonl" in page.sections["Inside the network"]
    assert "no checkpoint" in page.sections["Where it was made"]
    assert page.charts == []


@pytest.mark.parametrize("count", [1, 2, 3, 5000])
def test_any_number_of_records_makes_a_page_of_bounded_size(healthy, count):
    for name in ("log.jsonl", "health.jsonl"):
        record = json.loads((healthy / name).read_text().splitlines()[0])
        (healthy / name).unlink()
        append(healthy / name, *({**record, "step": step + 1} for step in range(count)))
    text = report.page(healthy)
    assert {"Loss", "Gradient norm by part"} <= set(Page(text).charts)
    assert len(text) < 600_000
    assert not re.search(r"\b(nan|inf)\b", " ".join(re.findall(r'd="([^"]*)"', text)))


def test_records_of_an_older_tessera_show_what_they_have(run):
    (run / "log.jsonl").unlink()
    append(run / "log.jsonl", *({"step": n, "loss": 1 / n, "mse": 1 / n, "vb": 0.1 / n} for n in (1, 2, 3)))
    page = page_of(run)
    assert page.charts == ["Loss", "Parts of the loss"]
    assert "utilisation" not in page.sections[""]


def test_numbers_that_are_none_and_lines_cut_short_leave_gaps(run):
    append(run / "log.jsonl", {"step": 50, "loss": float("nan"), "gradient_norm": None, "images_per_second": 0.0})
    with (run / "log.jsonl").open("a") as file:
        file.write('[1]\n{"loss": 1}\n{"step": 60, "lo')
    page = page_of(run)
    assert "50 of 400" in page.sections[""]
    assert "Loss" in page.charts


@pytest.mark.parametrize("name", ["<script>alert(1)<script>", "a&b", "{title}", '"><img src=x onerror=y>'])
def test_names_are_text_whatever_they_are(run, doctor, name):
    doctor.append(SimpleNamespace(name=name, severity=name, what=name, evidence=name, change=name))
    append(run / "log.jsonl", {"step": 40, name: 1.0, f"{name}_low": 1.0, f"{name}_high": 1.0})
    append(run / "health.jsonl", {"step": 40, "gradient_norms": {name: 1.0}})
    append(run / "passed.jsonl", {"step": 40, "why": name, "samples": [name], name: name})
    (run / "skipped.txt").write_text(f"{name}\t{name}\n")
    renamed = run.rename(run.with_name(name.replace("/", "")))
    page = page_of(renamed)
    assert not {"script", "img"} & set(page.tags)
    for section in ("", "What the doctor says", "Curves", "Inside the network", "What was passed over"):
        assert name in page.sections[section]


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_that_holds_no_run_is_an_error(tmp_path, made):
    if made:
        (tmp_path / "empty").mkdir()
    with pytest.raises(TesseraError, match=r"holds no run.*recipe\.yaml.*tessera train"):
        report.write(tmp_path / "empty")
    assert not (tmp_path / "empty" / "report.html").exists()
