"""The report of a run: its content agrees with the files of the run, whatever is missing or unusual in them."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from tessera import images
from tessera.errors import TesseraError
from tessera.monitoring import report
from tessera.settings import validate
from tessera.training.recipe import Recipe

BLOCKS = 3


def append(path: Path, *records: dict) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def recipe(tmp_path) -> dict:
    return {
        "run_dir": str(tmp_path / "run"),
        "data": {"kind": "digits"},
        "training": {"steps": 400, "global_batch_size": 64, "optimizer": {"kind": "adamw", "grad_clip_norm": 1.5}},
    }


@pytest.fixture
def findings(monkeypatch) -> list:
    """The findings of the doctor, which has its own tests."""
    findings: list = []
    monkeypatch.setattr("tessera.monitoring.doctor.diagnose", lambda run: findings)
    return findings


@pytest.fixture
def run(tmp_path, recipe, findings) -> Path:
    """The files of a run after 40 of 400 steps, with a record every tenth step."""
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for step in (10, 20, 30, 40):
        numbers = {"loss": 5 / step, "grad_norm": 3 - step / 40, "learning_rate": 1e-4, "images_per_second": 128.0}
        numbers |= {"mfu": 0.375, "data_wait": 0.02, "clipped": 0.5, "skipped_steps": 2, "rollbacks": step // 30}
        append(folder / "log.jsonl", {"step": step, **numbers, "invalid_samples": 0, "memory": 2**31})
    append(folder / "log.jsonl", {"step": 20, "fd": 9.0, "fd_low": 8.0, "fd_high": 10.0})
    append(folder / "log.jsonl", {"step": 40, "fd": 11.0, "fd_low": 10.0, "fd_high": 12.0})
    return folder


@pytest.fixture
def with_health(run) -> Path:
    """The same run with measurements of the network."""
    for step in (10, 20, 30, 40):
        lists = ("attention_logits", "gates", "scales", "activations")
        record = {name: [step / 10 + block for block in range(BLOCKS)] for name in lists}
        record["grad_norms"] = dict.fromkeys(("patches", "blocks.0", "blocks.1", "blocks.2", "head"), 1.0 + step)
        record |= {"loss_probe": 0.25, "loss_ema": 0.125, "loss_wrong_labels": 0.5, "ema_distance": 0.01}
        record |= {"dead_patches": 0.0, "still_patches": 0.5, "data_mean": 0.0, "data_std": 1.0, "data_spread": 0.5}
        record["loss_by_timestep"] = [None, *(0.1 * n for n in range(1, 10))]
        append(run / "health.jsonl", {"step": step, **record})
    return run


@pytest.fixture
def page_of(read_page):
    return lambda run: read_page(report.build_report(run, Recipe).html())


def charts(page) -> set[str]:
    """Titles of the charts, from their alt texts."""
    return {alt.partition(":")[0].partition(" over ")[0] for alt in page.alts if not alt.startswith("samples, ")}


def test_the_head_has_progress_times_and_the_latest_values(run, page_of):
    head = " ".join(page_of(run).sections[""].split())
    for text in ("40 of 400", "Not all steps are done", "0.125", "MFU 37.5%", "rollbacks 1", "skipped steps 2"):
        assert text in head
    assert "time in steps 20 s" in head  # 40 steps of 64 images at 128 images per second
    assert "about 3 min 0 s left" in head  # 360 such steps
    assert "fd 11 best 9 at step 20" in head  # lower is better


def test_the_curves_are_those_of_the_log(run, page_of, svg_text):
    page = page_of(run)
    assert charts(page) == {"Loss", "Gradient norm", "Steps clipped", "Learning rate", "fd", "Speed", "MFU",
                            "Waiting for data", "Memory"}  # fmt: skip
    (image,) = page.images("Gradient norm")
    assert {"clip 1.5", "rollback", "skipped step"} <= set(svg_text(image))
    (memory,) = (alt for alt in page.alts if alt.startswith("Memory"))
    assert memory.startswith("Memory: memory 2 ")  # GiB


def test_smoothing_is_a_local_mean_that_skips_missing_numbers():
    values = [1.0] * 100
    values[50:52] = None, 1e30
    smooth = report._smooth(values)
    assert smooth[:49] == pytest.approx([1.0] * 49)
    assert smooth[51] == pytest.approx(1e30 / 2)
    assert smooth[53:] == pytest.approx([1.0] * 47)
    assert report._smooth([None, 2.0]) == [None, 2.0]
    assert report._smooth([]) == []


def test_measurements_are_shown_by_timestep_by_part_and_by_block(with_health, page_of, svg_text):
    page = page_of(with_health)
    assert {"Loss by timestep", "Gradient norm by part", "Attention logits by block", "Gates by block",
            "Scales by block", "Activations by block", "EMA distance"} <= charts(page)  # fmt: skip
    (image,) = page.images("Gradient norm by part")
    assert {"patches", "blocks.0", "blocks.1", "blocks.2", "head"} <= set(svg_text(image))
    alts = " ".join(page.alts)
    for value in ("weights 0.25", "EMA 0.125", "wrong labels 0.5", "data 50"):
        assert value in alts


def test_a_network_without_gates_has_no_map_of_them(with_health, page_of):
    path = with_health / "health.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    append(path, *({**record, "gates": None} for record in records))
    assert {"Gates by block", "Scales by block"} & charts(page_of(with_health)) == {"Scales by block"}


def test_findings_are_shown_with_evidence_and_remedy(run, findings, page_of):
    assert "No findings" in page_of(run).sections["Diagnostics"]
    findings += [
        SimpleNamespace(name="b", severity="error", what="it fell", evidence="0 of 5", change="lift it"),
        SimpleNamespace(name="a", severity="warning", what="it sways", evidence="3 < 4", change="hold it"),
    ]
    text = page_of(run).sections["Diagnostics"]
    assert "3 < 4" in text
    assert text.index("it fell") < text.index("lift it") < text.index("it sways")


def test_a_run_that_the_doctor_cannot_read_still_has_a_report(run, monkeypatch, page_of):
    def refuse(run):
        raise TesseraError("unknown settings")

    monkeypatch.setattr("tessera.monitoring.doctor.diagnose", refuse)
    page = page_of(run)
    assert "unknown settings" in page.sections["Diagnostics"]
    assert "Loss" in charts(page)


def test_skipped_batches_and_invalid_samples_are_listed(run, page_of):
    record = {"step": 31, "position": 1984, "outcome": "excluded", "why": "the loss rose", "loss": 4.5}
    append(run / "skipped_steps.jsonl", {**record, "grad_norm": None, "samples": [f"s{n}" for n in range(64)]})
    (run / "skipped_samples.txt").write_text("a.jpg\tdamaged\nb.jpg\tdamaged\nc.jpg\ttoo small\n")
    text = " ".join(page_of(run).sections["Skipped batches"].split())
    for part in ("excluded: 1", "1984", "the loss rose", "4.5", "s0, s1", "and 56 more", "not be used: 3", "b.jpg"):
        assert part in text
    assert "2damaged" in text
    assert "1too small" in text


# Samples


def test_first_and_last_grids_are_shown_and_damaged_ones_are_not(run, page_of):
    for step in range(0, 500, 10):
        images.save_png(run / f"samples/step-{step:09d}.png", np.zeros((8, 1000, 3), np.uint8))
    page = page_of(run)
    grids = [alt for alt in page.alts if alt.startswith("samples, ")]
    assert len(grids) == report.MAX_GRIDS
    assert (grids[0], grids[-1]) == ("samples, step 0", "samples, step 490")
    assert "12 of 50 grids" in page.sections["Samples"]
    (run / "samples/step-000000490.png").write_bytes(b"no image")
    assert len(page_of(run).images("samples, ")) == report.MAX_GRIDS - 1


def test_a_wide_grid_is_scaled_down_and_a_small_one_is_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 1600, 1), dtype=np.uint8)
    images.save_png(tmp_path / "wide.png", pixels)
    assert Image.open(io.BytesIO(images.limit_width(tmp_path / "wide.png", 800))).size == (800, 20)
    same = np.asarray(Image.open(io.BytesIO(images.limit_width(tmp_path / "wide.png", 1600))))
    np.testing.assert_array_equal(same, pixels[..., 0])


# Settings


@pytest.fixture
def changed_settings(run):
    """(setting, value, default) of the settings that the report lists as different from their defaults."""

    def read(recipe: dict) -> set[tuple[str, ...]]:
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        tables = [block for block in report.build_report(run, Recipe).blocks if getattr(block, "head", ())]
        return {tuple(row) for table in tables if table.head[-1] == "default" for row in table.rows}

    return read


def test_settings_are_compared_with_their_defaults(recipe, changed_settings):
    assert changed_settings(recipe) == {
        ("training.steps", "400", "400000"),
        ("training.global_batch_size", "64", "256"),
        ("training.optimizer.grad_clip_norm", "1.5", "null"),
    }


def test_a_recipe_of_defaults_has_no_changed_settings(recipe, changed_settings):
    resolved = validate(Recipe, {"run_dir": "runs/x", "data": {"kind": "digits"}}, "recipe")
    assert changed_settings(resolved.model_dump(mode="json")) == set()


def test_settings_of_another_kind_are_compared_with_the_defaults_of_that_kind(recipe, changed_settings):
    recipe |= {"diffusion": {"kind": "flow"}, "training": {"optimizer": {"kind": "muon", "momentum": 0.9}}}
    assert changed_settings(recipe) == {
        ("diffusion.kind", "flow", "gaussian"),
        ("training.optimizer.kind", "muon", "adamw"),
        ("training.optimizer.momentum", "0.9", "0.95"),
    }


def test_unknown_settings_are_listed_without_defaults(run, recipe, page_of):
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "novelty": {"power": 9000}}))
    assert "novelty.power9000" in page_of(run).sections["Settings"]


# Missing, unusual or hostile content


def test_a_run_without_records_has_a_report(run, page_of):
    (run / "log.jsonl").unlink()
    shutil.rmtree(run / "samples")
    page = page_of(run)
    assert "No step is recorded yet" in page.sections[""]
    assert "no records" in page.sections["Curves"]
    assert "no grid" in page.sections["Samples"]
    assert "no health.jsonl" in page.sections["Internals"]
    assert "no checkpoint" in page.sections["Environment"]
    assert page.alts == []


@pytest.mark.parametrize("count", [1, 2, 3, 5000])
def test_any_number_of_records_makes_a_page_of_bounded_size(with_health, count, read_page):
    for name in ("log.jsonl", "health.jsonl"):
        record = json.loads((with_health / name).read_text().splitlines()[0])
        (with_health / name).unlink()
        append(with_health / name, *({**record, "step": step + 1} for step in range(count)))
    html = report.build_report(with_health, Recipe).html()
    assert {"Loss", "Gradient norm by part"} <= charts(read_page(html))
    assert len(html) < 600_000


def test_missing_numbers_and_truncated_lines_leave_gaps(run, page_of):
    append(run / "log.jsonl", {"step": 50, "loss": float("nan"), "grad_norm": None, "images_per_second": 0.0})
    with (run / "log.jsonl").open("a") as file:
        file.write('[1]\n{"loss": 1}\n{"step": 60, "lo')
    page = page_of(run)
    assert "50 of 400" in page.sections[""]
    assert "Loss" in charts(page)


@pytest.mark.parametrize("name", ["<script>alert(1)<script>", "a&b", "{title}", '"><img src=x onerror=y>', "$\\x$"])
def test_names_are_text_whatever_they_are(run, findings, name, page_of):
    findings.append(SimpleNamespace(name=name, severity=name, what=name, evidence=name, change=name))
    append(run / "log.jsonl", {"step": 40, name: 1.0, f"{name}_low": 1.0, f"{name}_high": 1.0})
    append(run / "health.jsonl", {"step": 40, "grad_norms": {name: 1.0}})
    append(run / "skipped_steps.jsonl", {"step": 40, "why": name, "samples": [name], name: name})
    (run / "skipped_samples.txt").write_text(f"{name}\t{name}\n")
    page = page_of(run.rename(run.with_name(name.replace("/", ""))))
    assert "script" not in page.tags
    assert all(link.startswith("data:image/") for link in page.links)
    for section in ("", "Diagnostics", "Curves", "Skipped batches"):
        assert name in page.sections[section]


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_a_run_is_an_error(tmp_path, exists):
    if exists:
        (tmp_path / "empty").mkdir()
    with pytest.raises(TesseraError, match=r"holds no run.*recipe\.yaml.*tessera train"):
        report.write(tmp_path / "empty", Recipe)
    assert not (tmp_path / "empty" / "report.html").exists()
