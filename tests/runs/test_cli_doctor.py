"""`tessera doctor`: text and JSON output."""

import json

import pytest

from tessera.settings import apply_overrides, read_yaml, to_yaml, validate
from tessera.training.recipe import Recipe


@pytest.fixture
def run(tmp_path, recipe):
    """A folder with only the files that the doctor reads."""
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = apply_overrides(
        read_yaml(recipe), ["training.condition_dropout=0", "sampling.guidance_scale=2", "network.num_classes=10"]
    )
    (folder / "recipe.yaml").write_text(to_yaml(validate(Recipe, recipe, "the recipe")))
    (folder / "log.jsonl").write_text('{"step": 4, "loss": 0.9, "mse": 0.9, "grad_norm": 1.0}\n')
    return folder


def test_findings_as_text(tessera, run):
    done = tessera("doctor", run)
    assert done.code == 0
    assert done.out.startswith("1. error: guidance without label dropout\n")
    assert "training.condition_dropout=0.1, or sampling.guidance_scale=1" in done.out


def test_findings_as_json(tessera, run):
    done = tessera("doctor", run, "--json")
    assert done.code == 0
    result = json.loads(done.out)
    assert [finding["name"] for finding in result["findings"]] == ["guidance without label dropout"]
    assert set(result["findings"][0]) == {"name", "severity", "what", "evidence", "change"}
    assert result["facts"]["step"] == "4 of 4"


def test_a_trained_run(tessera, recipe, tmp_path):
    assert tessera("train", recipe, "training.health_every=2").code == 0
    done = tessera("doctor", tmp_path / "run")
    assert done.code == 0, done.err
    assert "error:" not in done.out
    assert "4 of 4" in done.out


def test_a_folder_without_a_run(tessera, tmp_path):
    done = tessera("doctor", tmp_path)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert str(tmp_path) in done.err
