"""`tessera.train`: a recipe as a path, a mapping or a Recipe."""

import pytest
import yaml

import tessera
from tessera.training.recipe import read_recipe

from .conftest import RECIPE


def test_a_mapping_a_path_and_a_recipe_train_the_same_model(recipe, tmp_path):
    mapping = yaml.safe_load(RECIPE)
    overrides = ["training.steps=2", f"run_dir={tmp_path / 'first'}"]
    assert tessera.train(mapping, overrides) == tmp_path / "first"
    assert mapping == yaml.safe_load(RECIPE)
    tessera.train(str(recipe), [overrides[0], f"run_dir={tmp_path / 'second'}"])
    tessera.train(read_recipe(recipe, [overrides[0], f"run_dir={tmp_path / 'third'}"]))
    runs = [tmp_path / name for name in ("first", "second", "third")]
    weights = {(next(run.glob("checkpoints/*2")) / "model.safetensors").read_bytes() for run in runs}
    assert len(weights) == 1
    assert tessera.load(tmp_path / "first").config.network.hidden_size == 16


def test_an_invalid_mapping_is_one_error():
    with pytest.raises(tessera.TesseraError, match="run_dir: Field required"):
        tessera.train({"data": "digits"})


def test_overrides_do_not_apply_to_a_recipe_object(recipe):
    with pytest.raises(tessera.TesseraError, match="overrides apply to a path or a mapping"):
        tessera.train(read_recipe(recipe), ["training.steps=2"])
