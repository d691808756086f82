"""Classes of a trained model: added, removed, renamed, merged; the kept ones stay as they are, bit for bit."""

import numpy as np
import pytest
import torch
from PIL import Image

import tessera
from tessera import adapters, bundle
from tessera.adapters import ClassesConfig
from tessera.errors import TesseraError
from tessera.interop import load
from tessera.training import loop
from tessera.training.classes import change_classes
from tessera.training.initialization import TABLE
from tessera.training.recipe import read_recipe

UNET = {"kind": "unet", "learn_null_class": True}


def table(model) -> torch.Tensor:
    return model.network.state_dict()[TABLE]


def images(model, **request):
    return tessera.generate(model, seeds=[3, 4], guidance_scale=2.0, **request)


@pytest.mark.parametrize("network", [{}, UNET])
def test_kept_classes_give_the_same_images_and_new_ones_start_from_others(make_model, network):
    model = make_model(network=network)
    before = table(model).clone()
    changed = change_classes(
        model, add={"wolf": ["dog", "emu"], "unicorn": []}, remove=["cat"], rename={"hound": "dog"}
    )
    assert changed.config.class_names == ("hound", "emu", "wolf", "unicorn")
    assert changed.config.network.num_classes == changed.network.config.num_classes == 4
    _, dog, emu, null = before
    expected = torch.stack([dog, emu, (dog + emu) / 2, null, null])
    torch.testing.assert_close(table(changed), expected, rtol=1e-6, atol=0)
    assert torch.equal(table(changed)[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])  # bit for bit
    assert torch.equal(table(model), before)
    for old, new in (("dog", "hound"), ("emu", "emu")):
        np.testing.assert_array_equal(images(model, classes=[old] * 2), images(changed, classes=[new] * 2))
    assert np.any(images(changed, classes=["wolf"] * 2) != images(changed, classes=["emu"] * 2))


def test_merged_classes_are_the_mean_of_those_they_replace_and_may_keep_a_name(make_model):
    model = make_model()
    changed = change_classes(model, merge={"dog": ["dog", "cat"]})
    assert changed.config.class_names == ("emu", "dog")
    cat, dog, emu, null = table(model)
    torch.testing.assert_close(table(changed), torch.stack([emu, (cat + dog) / 2, null]), rtol=1e-6, atol=0)


def test_without_a_null_label_a_new_class_starts_as_the_mean_of_all(make_model):
    model = make_model(network={"learn_null_class": False})
    changed = change_classes(model, add={"yak": []})
    assert table(changed).shape == (4, table(model).shape[1])
    torch.testing.assert_close(table(changed)[3], table(model).mean(dim=0))


def test_names_may_be_exchanged_and_numbers_stand_for_classes_without_unique_names(make_model):
    model = make_model()
    changed = change_classes(model, rename={"cat": "dog", "dog": "cat"})
    assert changed.config.class_names == ("dog", "cat", "emu")
    assert torch.equal(table(changed), table(model))
    cranes = make_model(class_names=("crane", "cat", "crane"))
    assert change_classes(cranes, rename={"crane (bird)": 2}).config.class_names == ("crane", "cat", "crane (bird)")
    unnamed = make_model(class_names=())
    assert change_classes(unnamed, remove=[1]).config.class_names == ("0", "2")


def test_the_new_bundle_records_the_changes_and_every_format_is_read(make_model, tmp_path):
    model = make_model()
    load.convert(model, tmp_path / "official.pt", "official", approximate=True)
    loaded = load.load(tmp_path / "official.pt", device="cpu", num_heads=2)
    changed = change_classes(loaded, add={"yak": [0, 2]}, remove=[1])
    changed = change_classes(changed, rename={"ox": "yak"})
    bundle.save(changed, tmp_path / "new")
    again = load.load(tmp_path / "new", device="cpu")
    assert again.config.class_names == ("0", "2", "ox")
    assert again.config.provenance.classes_changed == "removed 1; added yak (mean of 0, 2); renamed yak to ox"
    assert torch.equal(table(again), table(changed))
    assert "classes changed" in (tmp_path / "new" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "nothing to change"),
        ({"remove": ["cta"]}, "unknown class 'cta'; did you mean 'cat'"),
        ({"add": {"yak": ["cow"]}}, "unknown class 'cow'"),
        ({"remove": [3]}, "class 3 is out of range"),
        ({"add": {"dog": []}}, "two classes would have the name 'dog'"),
        ({"rename": {"dog": "cat"}}, "two classes would have the name 'dog'"),
        ({"rename": {"x": "cat"}, "add": {"x": []}}, "two classes would have the name 'x'"),
        ({"add": {"dog": ["cat", "cat"]}, "remove": ["dog"]}, "give each class once"),
        ({"remove": ["cat", "cat"]}, "'cat' is removed, renamed or merged twice"),
        ({"remove": ["cat"], "rename": {"x": "cat"}}, "'cat' is removed, renamed or merged twice"),
        ({"merge": {"x": ["cat", "dog"], "y": ["dog", "emu"]}}, "'dog' is removed, renamed or merged twice"),
        ({"merge": {"x": ["cat"]}}, "from one class"),
        ({"remove": ["cat", "dog", "emu"]}, "no class would be left of 3"),
        ({"add": {" ": []}}, "empty name"),
    ],
)
def test_unclear_changes_are_errors(tiny_model, changes, words):
    with pytest.raises(TesseraError, match=words.replace("(", r"\(")):
        change_classes(tiny_model, **changes)


def test_models_without_classes_or_with_adapters_are_errors(make_model):
    with pytest.raises(TesseraError, match="unconditional"):
        change_classes(make_model(network={"num_classes": 0}), add={"cat": []})
    text = {"num_classes": 0, "block": {"kind": "rope-swiglu", "text": "keys"}, "vocabulary_size": 9, "text_tokens": 4}
    with pytest.raises(TesseraError, match="conditioned on text, not on classes"):
        change_classes(make_model(network=text), add={"cat": []})
    model = make_model()
    adapters.attach(model.network, "pets", ClassesConfig(classes=("cat",)).layers(model.network, ("cat", "dog", "emu")))
    with pytest.raises(TesseraError, match=r"has adapters \(pets\)"):
        change_classes(model, remove=["cat"])


LEVELS = {"dark": 40, "light": 215, "grey": 128}
RECIPE = """
data: {size: 8, channels: 1}
network: {patch_size: 4, hidden_size: 32, depth: 2, num_heads: 2}
diffusion: {num_timesteps: 100, schedule: cosine, prediction: v}
sampling: {num_steps: 10}
training:
  global_batch_size: 32
  optimizer: {learning_rate: 0.003}
  ema: {decay: 0.9}
  sample_every: 100000
  checkpoint_every: 100000
  health_every: 100000
  tensorboard: false
  device: cpu
"""


def train(tmp_path, name: str, classes: list[str], *settings: str):
    """Train on images of one level for each class, with noise; returns the model."""
    rng = np.random.default_rng(0)
    for each in classes:
        (folder := tmp_path / f"{name}-data" / each).mkdir(parents=True)
        for number in range(24):
            pixels = np.clip(LEVELS[each] + rng.normal(0, 6, (8, 8)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    path = tmp_path / f"{name}.yaml"
    path.write_text(f"run_dir: {tmp_path / name}\n{RECIPE}")
    loop.train(read_recipe(path, [f"data.path={tmp_path / f'{name}-data'}", *settings]))
    return load.load(tmp_path / name, device="cpu")


def error(model, name: str) -> float:
    """The mean distance of the levels of images to that of their class."""
    levels = tessera.generate(model, classes=[name] * 8, seeds=list(range(8))).mean(axis=(1, 2, 3))
    return float(abs(levels - LEVELS[name]).mean())


@pytest.mark.run
def test_a_class_that_was_added_is_learned_and_the_others_stay(tmp_path):
    base = train(tmp_path, "base", ["dark", "light"], "training.steps=150")
    bundle.save(change_classes(base, add={"grey": ["dark", "light"]}), tmp_path / "start")
    settings = (f"training.init_from={tmp_path / 'start'}", "training.steps=100")
    tuned = train(tmp_path, "tuned", ["dark", "grey", "light"], *settings)
    assert "copied" in (tmp_path / "tuned" / "init_report.txt").read_text()
    errors = {name: error(tuned, name) for name in LEVELS}
    assert max(errors.values()) < 25, errors


@pytest.mark.run
def test_a_class_that_was_added_is_trained_alone_and_the_others_stay_bit_for_bit(tmp_path):
    """As an adapter that trains one row of the label table."""
    base = train(tmp_path, "base", ["dark", "light"], "training.steps=150")
    start = change_classes(base, add={"grey": ["dark", "light"]})
    bundle.save(start, tmp_path / "start")
    adapter = ("adapter={kind: classes, classes: [grey]}", "training.condition_dropout=0")
    settings = (f"training.init_from={tmp_path / 'start'}", "training.steps=100", *adapter)
    tuned = train(tmp_path, "tuned", ["dark", "grey"], *settings, "training.optimizer.learning_rate=0.03")
    for name in ("dark", "light"):
        np.testing.assert_array_equal(images(tuned, classes=[name] * 2), images(start, classes=[name] * 2))
    before, after = error(start, "grey"), error(tuned, "grey")
    assert after < min(25, before / 2)
