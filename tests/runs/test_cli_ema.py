"""`--ema` and `--ema-length`: one of the moving averages of a run, or one computed from them."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessera import bundle
from tessera.training import loop
from tessera.training.recipe import read_recipe

from .conftest import RECIPE


@pytest.fixture(scope="module")
def averaged(tmp_path_factory) -> Path:
    """A run with EMA decays 0.5 (the first), 0 and 0.9. Tests must not change it."""
    folder = tmp_path_factory.mktemp("averaged")
    (folder / "tiny.yaml").write_text(RECIPE)
    changes = ("training.ema={decay: 0.5, extra_decays: [0, 0.9]}", "training.optimizer.learning_rate=0.05")
    return loop.train(read_recipe(folder / "tiny.yaml", [f"run_dir={folder / 'run'}", *changes]))


def test_info_lists_the_decays_and_distinguishes_the_weights(tessera, averaged):
    outputs = {ema: tessera("info", averaged, *ema).out for ema in ((), ("--ema", "0.5"), ("--ema", "0.9"))}
    assert re.search(r"^EMA decays +0\.5, 0\.0, 0\.9 ", outputs[()], flags=re.MULTILINE)
    assert outputs[()] == outputs["--ema", "0.5"]
    weights = {
        ema: next(line for line in text.splitlines() if line.startswith("weights")) for ema, text in outputs.items()
    }
    assert weights[()] != weights["--ema", "0.9"]


def check_images(tessera, model, folder, option: str, values: tuple[str, str]) -> None:
    """Two averages give different images, which say which one it was."""
    for value in values:
        words = ("--classes", "3", "--seeds", "1", "--out", folder / value)
        assert tessera("sample", model, *words, option, value).code == 0
    one, other = (folder / value / "class-3-seed-1.png" for value in values)
    assert (np.asarray(Image.open(one)) != np.asarray(Image.open(other))).any()
    assert f"{option} {values[1]}" in tessera("info", other).out


def test_info_of_an_image_includes_the_decay(tessera, averaged, tmp_path):
    check_images(tessera, averaged, tmp_path, "--ema", ("0.5", "0.9"))


def test_a_decay_is_converted_to_a_bundle(tessera, averaged, tmp_path):
    assert tessera("convert", averaged, tmp_path / "alone", "--to", "bundle", "--ema", "0").code == 0
    newest = bundle.checkpoints(averaged)[0]
    assert (tmp_path / "alone/model.safetensors").read_bytes() == (newest / "ema/0.0.safetensors").read_bytes()
    assert not (tmp_path / "alone/ema").exists()
    assert "EMA decays" not in tessera("info", tmp_path / "alone").out
    assert tessera("info", tmp_path / "alone", "--ema", "0").code == 0


@pytest.mark.parametrize("verb", ["sample", "evaluate", "info"])
def test_a_decay_that_a_run_does_not_have(tessera, averaged, verb):
    done = tessera(verb, averaged, "--ema", "0.99")
    assert done.code == 1
    assert "0.99" in done.err
    assert "0.5, 0.0, 0.9" in done.err


def test_a_file_with_one_set_of_weights_has_no_decays(tessera, averaged, tmp_path):
    assert tessera("convert", averaged, tmp_path / "one.pt", "--to", "official", "--approximate").code == 0
    done = tessera("info", tmp_path / "one.pt", "--ema", "0.5")
    assert done.code == 1
    assert "--ema" in done.err


@pytest.fixture(scope="module")
def power(tmp_path_factory) -> Path:
    """A run with power-function averages of the lengths 0.05 and 0.1. Tests must not change it."""
    folder = tmp_path_factory.mktemp("power")
    (folder / "tiny.yaml").write_text(RECIPE)
    changes = ("training.ema={kind: power, snapshot_every: 1}", "training.steps=8")
    changes += ("training.optimizer.learning_rate=0.05",)
    return loop.train(read_recipe(folder / "tiny.yaml", [f"run_dir={folder / 'run'}", *changes]))


def test_a_length_is_sampled_evaluated_and_recorded_in_images(tessera, power, tmp_path):
    facts = tessera("info", power).out
    assert re.search(
        r"^EMA lengths +0\.05, 0\.1; 0\.0\d+ to 0\.\d+ can be computed \(--ema-length\)", facts, re.MULTILINE
    )
    assert re.search(r"^ema length +0\.05", facts, re.MULTILINE)
    check_images(tessera, power, tmp_path, "--ema-length", ("0.05", "0.08"))
    words = ("--num-samples", "20", "--metrics", "fd", "--out", tmp_path / "scores", "--ema-length", "0.08")
    assert tessera("evaluate", "score", power, *words).code == 0
    assert (tmp_path / "scores/scores.json").exists()


def test_a_computed_length_is_converted_to_a_bundle(tessera, power, tmp_path):
    assert tessera("convert", power, tmp_path / "alone", "--to", "bundle", "--ema-length", "0.08").code == 0
    lines = [tessera("info", *words).out for words in ((power, "--ema-length", "0.08"), (tmp_path / "alone",))]
    weights = [re.search(r"^weights +(\w+)", text, re.MULTILINE) for text in lines]
    assert weights[0] is not None
    assert weights[1] is not None
    assert weights[0][1] == weights[1][1]
    assert re.search(r"^EMA lengths +0\.08$", lines[1], re.MULTILINE)
    assert not (tmp_path / "alone/ema").exists()


def test_a_length_that_there_is_not(tessera, averaged, power, tmp_path):
    done = tessera("sample", power, "--ema-length", "0.29")
    assert done.code == 1
    assert "expected one above 0 and below 0.288" in done.err
    done = tessera("sample", averaged, "--ema-length", "0.1")
    assert done.code == 1
    assert "training.ema.kind=power" in done.err
    done = tessera("sample", power, "--ema", "0.9", "--ema-length", "0.1")
    assert done.code == 1
    assert "give one of them" in done.err
    assert tessera("convert", power, tmp_path / "one.pt", "--to", "official", "--approximate").code == 0
    done = tessera("info", tmp_path / "one.pt", "--ema-length", "0.1")
    assert done.code == 1
    assert "leave out --ema-length" in done.err
