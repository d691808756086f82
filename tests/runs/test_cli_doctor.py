"""`tessera doctor` as people type it."""

import json

import pytest

from tessera.settings import override, read_yaml, validate, write_yaml
from tessera.training.recipe import Recipe


@pytest.fixture
def run(tmp_path, recipe):
    """A run's folder of which only the files that the doctor reads are there."""
    folder = tmp_path / "run"
    folder.mkdir()
    told = override(
        read_yaml(recipe), ["training.label_dropout=0", "sampling.guidance_scale=2", "network.num_classes=10"]
    )
    (folder / "recipe.yaml").write_text(write_yaml(validate(Recipe, told, "the test's recipe")))
    (folder / "log.jsonl").write_text('{"step": 4, "loss": 0.9, "mse": 0.9, "gradient_norm": 1.0}\n')
    return folder


def test_findings_in_words(tessera, run):
    done = tessera("doctor", run)
    assert done.code == 0
    assert done.out.startswith("1. wrong: guidance without label dropout\n")
    assert "change: training.label_dropout=0.1, or sampling.guidance_scale=1" in done.out


def test_findings_for_programs(tessera, run):
    done = tessera("doctor", run, "--json")
    assert done.code == 0
    told = json.loads(done.out)
    assert [finding["name"] for finding in told["findings"]] == ["guidance without label dropout"]
    assert set(told["findings"][0]) == {"name", "severity", "what", "evidence", "change"}
    assert told["facts"]["step"] == "4 of 4"


def test_a_run_that_was_trained_here(tessera, recipe, tmp_path):
    assert tessera("train", recipe, "training.health_every=2").code == 0
    done = tessera("doctor", tmp_path / "run")
    assert done.code == 0, done.err
    assert done.out.startswith("nothing wrong found\n")
    assert "a wrong label costs" in done.out


def test_a_folder_that_holds_no_run(tessera, tmp_path):
    done = tessera("doctor", tmp_path)
    assert done.code == 1
    assert done.err.startswith(f"error: {tmp_path} holds no run")
