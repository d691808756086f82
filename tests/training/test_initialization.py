"""Initial weights from a trained model with other classes, another size, patch size or number of channels."""

import shutil

import pytest
import torch
from PIL import Image

from tessera import bundle
from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.layers.patches import resample_head, resample_patches
from tessera.models.blocks import RoPESwiGLU
from tessera.sampling import SamplingConfig
from tessera.studies.tuning import result
from tessera.training import loop
from tessera.training.initialization import (
    PATCHES,
    POSITIONS,
    TABLE,
    freeze_image_layers,
    inherit_settings,
    init_from,
)
from tessera.training.recipe import read_recipe

NAMES = ("cat", "dog", "emu")
HEAD = ("final_layer.linear.weight", "final_layer.linear.bias")


def new_network(source, **changes):
    """A network like the source's with some settings changed, and weights between 5 and 6."""
    network = source.config.network.model_copy(update=changes).build()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name != POSITIONS:
                weight.copy_(torch.rand(weight.shape) + 5)
    return network


def all_names(report) -> list[str]:
    return sorted(name for names in report.values() for name in names)


def equal(network, source, keys) -> bool:
    ours, theirs = network.state_dict(), source.network.state_dict()
    return all(torch.equal(ours[key], theirs[key]) for key in keys)


def test_with_the_same_architecture_and_classes_all_weights_are_copied(tiny_model):
    network = new_network(tiny_model)
    report = init_from(network, NAMES, tiny_model, "m")
    assert report["resampled"] == report["initialized"] == []
    assert all_names(report) == sorted(network.state_dict())
    assert equal(network, tiny_model, network.state_dict())


def test_classes_keep_their_embedding_by_name_and_so_does_the_null_label(tiny_model):
    network = new_network(tiny_model, num_classes=4)
    before = network.state_dict()[TABLE].clone()
    report = init_from(network, ("ant", "emu", "cat", "yak"), tiny_model, "m")
    table, old = network.state_dict()[TABLE], tiny_model.network.state_dict()[TABLE]
    assert torch.equal(table[1], old[2])
    assert torch.equal(table[2], old[0])
    assert torch.equal(table[4], old[3])
    assert torch.equal(table[[0, 3]], before[[0, 3]])
    assert report["resampled"] == [TABLE]
    assert all_names(report) == sorted(network.state_dict())
    assert equal(network, tiny_model, report["copied"])


def test_classes_in_another_order_keep_their_embeddings(tiny_model):
    network = new_network(tiny_model)
    report = init_from(network, ("emu", "dog", "cat"), tiny_model, "m")
    table, old = network.state_dict()[TABLE], tiny_model.network.state_dict()[TABLE]
    assert torch.equal(table, old[[2, 1, 0, 3]])
    assert TABLE in report["copied"]


def test_classes_with_new_names_are_initialized_and_the_null_label_is_copied(tiny_model):
    network = new_network(tiny_model)
    before = network.state_dict()[TABLE].clone()
    report = init_from(network, ("x", "y", "z"), tiny_model, "m")
    assert torch.equal(network.state_dict()[TABLE][:3], before[:3])
    assert torch.equal(network.state_dict()[TABLE][3], tiny_model.network.state_dict()[TABLE][3])
    assert report["initialized"] == [TABLE]


@pytest.mark.parametrize("classes", [3, 2])
def test_a_source_without_names_is_matched_by_number_if_there_are_as_many_classes(make_model, classes):
    source = make_model(class_names=())
    network = new_network(source, num_classes=classes)
    report = init_from(network, ("x", "y", "z")[:classes], source, "m")
    assert report["initialized"] == ([] if classes == 3 else [TABLE])
    assert equal(network, source, [TABLE]) == (classes == 3)


def test_without_a_null_class_in_the_source_its_embedding_is_initialized(make_model):
    source = make_model(network={"learn_null_class": False})
    network = source.config.network.model_copy(update={"learn_null_class": True}).build()
    before = network.state_dict()[TABLE].clone()
    init_from(network, NAMES, source, "m")
    assert torch.equal(network.state_dict()[TABLE][:3], source.network.state_dict()[TABLE])
    assert torch.equal(network.state_dict()[TABLE][3], before[3])


def test_from_and_to_unconditional_models(make_model, tiny_model):
    unconditional = make_model(network={"num_classes": 0}, class_names=())
    network = new_network(tiny_model)
    report = init_from(network, NAMES, unconditional, "m")
    assert report["initialized"] == [TABLE]
    assert all_names(report) == sorted(network.state_dict())
    network = new_network(unconditional)
    report = init_from(network, (), tiny_model, "m")
    assert report["initialized"] == report["resampled"] == []
    assert all_names(report) == sorted(network.state_dict())


def test_another_size_has_its_own_positions(tiny_model):
    network = new_network(tiny_model, input_size=(12, 16))
    positions = network.pos_embed.clone()
    report = init_from(network, NAMES, tiny_model, "m")
    assert report["resampled"] == [POSITIONS]
    assert report["initialized"] == []
    assert torch.equal(network.pos_embed, positions)
    assert all_names(report) == sorted(network.state_dict())


def test_another_patch_size_is_resampled(tiny_model):
    network = new_network(tiny_model, input_size=(16, 16), patch_size=4)  # the same grid
    report = init_from(network, NAMES, tiny_model, "m")
    assert sorted(report["resampled"]) == sorted([PATCHES, *HEAD])
    assert report["initialized"] == []
    old, new = tiny_model.network.state_dict(), network.state_dict()
    assert torch.equal(new[PATCHES], resample_patches(old[PATCHES], 4))
    for key in HEAD:
        assert torch.equal(new[key], resample_head(old[key], 2, 4))
    assert equal(network, tiny_model, report["copied"])


def test_with_other_channels_patches_and_head_are_initialized(tiny_model):
    network = new_network(tiny_model, in_channels=3, out_channels=6)
    before = {key: network.state_dict()[key].clone() for key in (PATCHES, *HEAD)}
    report = init_from(network, NAMES, tiny_model, "m")
    assert sorted(report["initialized"]) == sorted(before)
    assert report["resampled"] == []
    assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())
    assert all_names(report) == sorted(network.state_dict())


def test_with_other_output_channels_only_the_head_is_initialized(tiny_model):
    report = init_from(new_network(tiny_model, out_channels=1), NAMES, tiny_model, "m")
    assert sorted(report["initialized"]) == sorted(HEAD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 16}, r"x_embedder\.proj\.bias is \(32,\), expected \(16,\)"),
        ({"depth": 1}, r"blocks\.1\.\S+ is unexpected"),
        ({"depth": 3}, r"blocks\.2\.\S+ is missing"),
        ({"mlp_ratio": 2.0}, r"blocks\.0\.mlp\.fc1\.weight is \(128, 32\), expected \(64, 32\)"),
        ({"num_heads": 4}, r"its num_heads is 2, network\.num_heads is 4"),
    ],
)
def test_another_architecture_is_an_error_that_lists_the_differences(tiny_model, changes, message):
    network = tiny_model.config.network.model_copy(update=changes).build()
    with pytest.raises(TesseraError, match=message) as caught:
        init_from(network, NAMES, tiny_model, "runs/old")
    assert "cannot start from runs/old" in str(caught.value)
    assert str(caught.value).count("\n") < 12


def test_another_block_is_an_error(make_model, tiny_model):
    network = make_model(network={"block": "adaln"}).network
    message = r"its blocks are adaln-zero, network\.block is adaln: leave block: out"
    with pytest.raises(TesseraError, match=message) as caught:
        init_from(network, NAMES, tiny_model, "m")
    assert "\n" not in str(caught.value), "no list of weights"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            {"positions": "rotary"},
            {"positions": "sincos"},
            "rope-swiglu, network.block is rope-swiglu positions=sincos",
        ),
        (
            {"positions": "sincos"},
            {"positions": "rotary"},
            "rope-swiglu positions=sincos, network.block is rope-swiglu",
        ),
    ],
)
def test_another_kind_of_position_is_an_error(make_model, old, new, message):
    """The shapes of the weights do not differ."""
    source = make_model(network={"block": {"kind": "rope-swiglu", **old}})
    network = make_model(network={"block": {"kind": "rope-swiglu", **new}}).network
    with pytest.raises(TesseraError, match=message):
        init_from(network, NAMES, source, "m")


def test_a_network_with_rotary_positions_starts_from_one_of_another_size(make_model):
    source, network = (make_model(network={"block": "rope-swiglu", "input_size": size}, seed=size) for size in (8, 16))
    report = init_from(network.network, NAMES, source, "m")
    assert report["resampled"] == report["initialized"] == []
    for name, weight in source.network.state_dict().items():
        assert torch.equal(network.network.state_dict()[name], weight)


@torch.no_grad()
@pytest.mark.parametrize("block", ["adaln-zero", "cross-attention", "rope-swiglu"])
@pytest.mark.parametrize("attention", ["full", "alternating", "causal"])
@pytest.mark.parametrize("temporal", [False, True])
def test_a_network_of_clips_starts_from_one_of_images(make_model, block, attention, temporal):
    """Exact on images, in every mode."""
    source = make_model({"block": block})
    changes = {"attention": attention, "temporal_attention": temporal}
    network = make_model({"block": block, "input_size": (3, 8, 8), **changes}, seed=1).network
    report = init_from(network, NAMES, source, "m")
    assert report["resampled"] == []
    assert all(".temporal." in name for name in report["initialized"])
    assert bool(report["initialized"]) == temporal
    x, t, condition = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 400.0]), Condition([0, 2])
    assert torch.equal(network(x[:, :, None], t, condition)[:, :, 0], source.network(x, t, condition))


def test_only_temporal_layers_are_trained(make_model, tiny_model):
    network = make_model({"input_size": (3, 8, 8), "temporal_attention": True}).network
    freeze_image_layers(network)
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (".temporal." in name)
    with pytest.raises(TesseraError, match="needs network.temporal_attention=true"):
        freeze_image_layers(tiny_model.network)


# Through a recipe


@pytest.fixture
def trained(tiny):
    """A run on digits: x0 prediction, 30 steps, guidance 1.5."""
    recipe = tiny(
        "old",
        "diffusion.prediction=x0",
        "diffusion.num_timesteps=30",
        "sampling.guidance_scale=1.5",
        "network.mlp_ratio=2",
    )
    loop.train(recipe)
    return recipe.run_dir


def without(recipe, *names):
    """The recipe without these sections."""
    sections = {name: getattr(recipe, name) for name in recipe.model_fields_set if name not in names}
    return type(recipe)(**sections)


@pytest.mark.parametrize("as_bundle", [False, True])
def test_settings_that_the_recipe_leaves_out_are_those_of_the_source(tiny, trained, weights, tmp_path, as_bundle):
    source = trained
    if as_bundle:
        bundle.save(bundle.load(bundle.checkpoints(trained)[0]), tmp_path / "saved")
        source = tmp_path / "saved"
    recipe = tiny(
        "new", f"training.init_from={source}", "training.optimizer.learning_rate=1e-12", "training.ema.decay=0"
    )
    recipe = without(recipe, "network", "diffusion", "sampling")
    run = loop.train(recipe)
    new, old = bundle.load(bundle.checkpoints(run)[0]).config, bundle.load(bundle.checkpoints(trained)[0]).config
    assert new.network == old.network
    assert new.diffusion == old.diffusion
    assert new.sampling == old.sampling
    assert new.provenance.init_from == str(source)
    for key, value in weights(trained).items():
        torch.testing.assert_close(weights(run)[key], value, rtol=0, atol=1e-6)
    lines = (run / "init_report.txt").read_text().splitlines()
    keys = [key for line in lines for key in line.partition(": ")[2].split(", ")]
    assert sorted(keys) == sorted(weights(run))
    assert [line.partition(":")[0] for line in lines] == ["copied"]


def test_settings_of_the_recipe_take_precedence(tiny, trained):
    recipe = without(
        tiny("new", f"training.init_from={trained}", "network={patch_size: 2}", "sampling.num_steps=3"), "diffusion"
    )
    run = loop.train(recipe)
    config = bundle.load(bundle.checkpoints(run)[0]).config
    assert (config.network.patch_size, config.network.hidden_size, config.network.mlp_ratio) == (2, 16, 2.0)
    assert config.sampling.num_steps == 3
    assert config.sampling.guidance_scale == 1.0
    assert config.diffusion.prediction == "x0"
    report = dict(line.split(": ") for line in (run / "init_report.txt").read_text().splitlines())
    assert set(report) == {"copied", "resampled"}
    assert PATCHES in report["resampled"]


def test_a_color_model_may_start_from_a_grey_one(tiny, trained, tmp_path):
    for name in ("1/a", "1/b", "xyz/c"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (200, 10, 10)).save(tmp_path / f"data/{name}.png")
    data = {"kind": "folder", "path": str(tmp_path / "data"), "size": 16}
    recipe = tiny("new", f"training.init_from={trained}", "training.steps=2", data=data)
    run = loop.train(without(recipe, "network", "diffusion", "sampling"))
    config = bundle.load(bundle.checkpoints(run)[0]).config
    assert (config.network.in_channels, config.network.input_size, config.class_names) == (3, (16, 16), ("1", "xyz"))
    assert config.codec.channels == 3
    report = dict(line.split(": ") for line in (run / "init_report.txt").read_text().splitlines())
    assert sorted(report["resampled"].split(", ")) == sorted([POSITIONS, TABLE])  # class '1' keeps its row
    assert sorted(report["initialized"].split(", ")) == sorted([PATCHES, *HEAD])


def test_another_width_is_an_error_and_writes_nothing(tiny, trained, tmp_path):
    with pytest.raises(TesseraError, match=r"another architecture[\s\S]*x_embedder\.proj\.bias is \(16,\)"):
        loop.train(tiny("new", f"training.init_from={trained}", "network.hidden_size=32", "network.mlp_ratio=2"))
    assert not (tmp_path / "new").exists()


def test_a_missing_source_is_an_error(tiny, tmp_path):
    with pytest.raises(TesseraError, match="gone"):
        loop.train(tiny("new", f"training.init_from={tmp_path / 'gone'}"))


def test_a_fine_tuned_run_resumes_without_its_source(tiny, trained, state):
    def recipe(name, *changes):
        full = tiny(name, f"training.init_from={trained}", *changes)
        return without(full, "network", "diffusion", "sampling")

    whole = loop.train(recipe("whole", "training.steps=6"))
    part = loop.train(recipe("part", "training.steps=3"))
    shutil.rmtree(trained)
    assert loop.train(recipe("part", "training.steps=6")) == part
    assert state(part) == state(whole)


def test_a_fine_tuned_run_whose_sampling_was_tuned_resumes_with_its_own_settings(tiny, trained):
    """Also with evaluations, so that all scores of the run compare."""

    def recipe(*changes):
        full = tiny("new", f"training.init_from={trained}", "evaluation.every=2", "evaluation.num_samples=20", *changes)
        return without(full, "network", "diffusion", "sampling")

    run = loop.train(recipe("training.steps=2"))
    newest = bundle.checkpoints(run)[0]
    result.write_settings(newest, SamplingConfig(num_steps=7), "by a test", bundle.load(newest).network)
    assert bundle.load_config(newest).sampling.num_steps == 7
    loop.train(recipe("training.steps=4"))
    config = bundle.load_config(bundle.checkpoints(run)[0])
    assert (config.provenance.steps, config.sampling.num_steps, config.sampling.guidance_scale) == (4, 2, 1.5)


def test_a_shift_by_dimension_follows_the_size_of_the_data(tiny, tmp_path):
    flow = {"kind": "flow", "shift": "dimension"}
    old = loop.train(tiny("old", "training.steps=1", diffusion=flow))
    (tmp_path / "data").mkdir()
    Image.new("L", (16, 16), 200).save(tmp_path / "data/a.png")
    data = {"kind": "folder", "path": str(tmp_path / "data"), "size": 16, "channels": 1}
    new = without(tiny("new", f"training.init_from={old}", data=data), "network", "diffusion", "sampling")
    run = loop.build_run(new)
    assert bundle.load(bundle.checkpoints(old)[0]).diffusion.shift == 0.125
    assert run.objective.diffusion.shift == run.ema_model.diffusion.shift == 0.25


@pytest.mark.parametrize(("init_type", "prediction"), [("sit", "velocity"), (None, None)])
def test_weights_without_settings_are_read_as_the_recipe_specifies(tiny, make_model, tmp_path, init_type, prediction):
    """The head of SiT has the outputs of a learned variance, as that of DiT, and does not use half of them."""
    model = make_model(network={"num_classes": 10, "patch_size": 4}, class_names=())
    torch.save(model.network.state_dict(), tmp_path / "model.pt")
    changes = [
        f"training.init_from={tmp_path / 'model.pt'}",
        "training.init_num_heads=2",
        f"training.init_type={init_type or 'null'}",
    ]
    recipe = without(tiny("new", *changes), "network", "diffusion", "sampling")
    run = loop.build_run(recipe)
    assert run.recipe.diffusion.kind == ("flow" if init_type else "gaussian")
    assert prediction in (None, run.recipe.diffusion.prediction)


# From classes to text


@pytest.mark.parametrize(("text", "keeps_classes"), [("keys", False), ("cross", False), ("keys", True)])
@torch.no_grad()
def test_a_text_model_begins_as_the_class_model_it_starts_from(make_model, text, keeps_classes):
    source = make_model({"block": "rope-swiglu"}, {"kind": "flow", "prediction": "velocity"})
    network = {"block": {"kind": "rope-swiglu", "text": text}} | ({"num_classes": 3} if keeps_classes else {})
    recipe = read_recipe({"run_dir": "run", "data": "shapes", "network": network, "training": {"init_from": "m"}})
    recipe = inherit_settings(recipe, source)
    assert recipe.network.block.text_offset == (text == "keys")
    assert recipe.network.hidden_size == source.config.network.hidden_size
    sizes = source.config.network.model_dump(include={"input_size", "in_channels", "out_channels"})
    sizes |= {"num_classes": 3 * keeps_classes, "vocabulary_size": 9, "text_tokens": 4}
    new = recipe.network.model_copy(update=sizes).build().eval()
    report = init_from(new, NAMES if keeps_classes else (), source, "m")
    assert all("text" in name or "cross_attn" in name for name in report["initialized"])
    assert all_names(report) == sorted(new.state_dict())
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    text_condition = Condition(
        label=torch.tensor([2, 0, -1]) if keeps_classes else None,
        text=torch.tensor([[1, 2, 8, 3], [5, 5, 0, 0], [-1, -1, -1, -1]]),
        text_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool),
    )
    expected = source.network(x, t, Condition(torch.tensor([2, 0, -1] if keeps_classes else [-1, -1, -1])))
    torch.testing.assert_close(new(x, t, text_condition), expected, rtol=0, atol=3e-6)


def test_text_in_another_design_than_that_of_the_source_is_an_error(make_model):
    sizes = {"num_classes": 0, "vocabulary_size": 9, "text_tokens": 4}
    source = make_model({"block": {"kind": "rope-swiglu", "text": "keys"}, **sizes})
    network = new_network(source, block=RoPESwiGLU(text="cross"))
    with pytest.raises(TesseraError, match="its blocks are rope-swiglu text=keys, network.block is rope-swiglu text=c"):
        init_from(network, (), source, "m")


def test_another_text_encoder_than_that_of_the_source_is_an_error(make_model):
    sizes = {"num_classes": 0, "vocabulary_size": 9, "text_tokens": 4}
    source = make_model({"block": {"kind": "rope-swiglu", "text": "keys"}, **sizes})
    network = new_network(source, vocabulary_size=0, text_channels=8)
    with pytest.raises(TesseraError, match=r"the text encoder, hidden_size.*agree \(leave network: and text: out"):
        init_from(network, (), source, "m")
