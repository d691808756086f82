"""`--ema`: one of the averages that a run keeps, wherever a model is named."""

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
    """A run with averages of decay 0.5 (the first), 0 and 0.9; not to be changed."""
    folder = tmp_path_factory.mktemp("averaged")
    (folder / "tiny.yaml").write_text(RECIPE)
    changes = ("training.ema={decay: 0.5, also: [0, 0.9]}", "training.optimizer.learning_rate=0.05")
    return loop.train(read_recipe(folder / "tiny.yaml", [f"output={folder / 'run'}", *changes]))


def test_info_names_the_averages_and_tells_them_apart(tessera, averaged):
    told = {ema: tessera("info", averaged, *ema).out for ema in ((), ("--ema", "0.5"), ("--ema", "0.9"))}
    assert re.search(r"^averages kept +0\.5, 0\.0, 0\.9 \(--ema takes one of them\)$", told[()], flags=re.MULTILINE)
    assert told[()] == told["--ema", "0.5"]
    weights = {
        ema: next(line for line in text.splitlines() if line.startswith("weights")) for ema, text in told.items()
    }
    assert weights[()] != weights["--ema", "0.9"]


def test_a_picture_of_an_average_can_be_made_again(tessera, averaged, tmp_path):
    for ema in ("0.5", "0.9"):
        words = ("--classes", "3", "--seeds", "1", "--out", tmp_path / ema)
        assert tessera("sample", averaged, *words, "--ema", ema).code == 0
    one, other = (tmp_path / ema / "class-3-seed-1.png" for ema in ("0.5", "0.9"))
    assert (np.asarray(Image.open(one)) != np.asarray(Image.open(other))).any()
    assert "--ema 0.9" in tessera("info", other).out


def test_a_converted_average_is_the_weights_of_its_bundle(tessera, averaged, tmp_path):
    assert tessera("convert", averaged, tmp_path / "alone", "--to", "bundle", "--ema", "0").code == 0
    newest = bundle.checkpoints(averaged)[0]
    assert (tmp_path / "alone/model.safetensors").read_bytes() == (newest / "ema/0.0.safetensors").read_bytes()
    assert not (tmp_path / "alone/ema").exists()
    assert "averages kept" not in tessera("info", tmp_path / "alone").out
    assert tessera("info", tmp_path / "alone", "--ema", "0").code == 0


@pytest.mark.parametrize("verb", ["sample", "evaluate", "info"])
def test_an_average_that_a_run_does_not_have(tessera, averaged, verb):
    done = tessera(verb, averaged, "--ema", "0.99")
    assert done.code == 1
    assert "has no average of decay 0.99; it has 0.5, 0.0, 0.9" in done.err


def test_a_file_of_one_set_of_weights_has_no_averages_to_choose_from(tessera, averaged, tmp_path):
    assert tessera("convert", averaged, tmp_path / "one.pt", "--to", "official", "--approximate").code == 0
    done = tessera("info", tmp_path / "one.pt", "--ema", "0.5")
    assert done.code == 1
    assert "holds one set of weights, no average of decay 0.5: leave ema (--ema) out" in done.err
