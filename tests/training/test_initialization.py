"""Fine-tuning: what is kept of a trained model under other classes, another size, patch or number of channels."""

import shutil

import pytest
import torch
from PIL import Image

from tessera import bundle
from tessera.errors import TesseraError
from tessera.layers.patches import resample_head, resample_patches
from tessera.sampling import SamplingConfig
from tessera.studies.tuning import result
from tessera.training import loop
from tessera.training.initialization import PATCHES, POSITIONS, TABLE, start_from

NAMES = ("cat", "dog", "emu")
READOUT = ("final_layer.linear.weight", "final_layer.linear.bias")


def fresh(source, **changes):
    """A new network like the source's, but for some fields; every weight 0.5 off zero, to be told from copies."""
    network = source.config.network.model_copy(update=changes).build()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name != POSITIONS:
                weight.copy_(torch.rand(weight.shape) + 5)
    return network


def all_in(told) -> list[str]:
    return sorted(key for keys in told.values() for key in keys)


def same(network, source, keys) -> bool:
    ours, theirs = network.state_dict(), source.network.state_dict()
    return all(torch.equal(ours[key], theirs[key]) for key in keys)


def test_the_same_architecture_and_classes_keep_everything(tiny_model):
    network = fresh(tiny_model)
    told = start_from(network, NAMES, tiny_model, "m")
    assert told["resampled"] == told["anew"] == []
    assert all_in(told) == sorted(network.state_dict())
    assert same(network, tiny_model, network.state_dict())


def test_classes_keep_their_row_by_name_and_so_does_nothing_told(tiny_model):
    network = fresh(tiny_model, classes=4)
    before = network.state_dict()[TABLE].clone()
    told = start_from(network, ("ant", "emu", "cat", "yak"), tiny_model, "m")
    table, old = network.state_dict()[TABLE], tiny_model.network.state_dict()[TABLE]
    assert torch.equal(table[1], old[2])
    assert torch.equal(table[2], old[0])
    assert torch.equal(table[4], old[3])
    assert torch.equal(table[[0, 3]], before[[0, 3]])
    assert told["resampled"] == [TABLE]
    assert all_in(told) == sorted(network.state_dict())
    assert same(network, tiny_model, told["kept"])


def test_classes_in_another_order_keep_their_rows(tiny_model):
    network = fresh(tiny_model)
    told = start_from(network, ("emu", "dog", "cat"), tiny_model, "m")
    table, old = network.state_dict()[TABLE], tiny_model.network.state_dict()[TABLE]
    assert torch.equal(table, old[[2, 1, 0, 3]])
    assert TABLE in told["kept"]


def test_classes_that_share_no_name_are_made_anew_but_for_nothing_told(tiny_model):
    network = fresh(tiny_model)
    before = network.state_dict()[TABLE].clone()
    told = start_from(network, ("x", "y", "z"), tiny_model, "m")
    assert torch.equal(network.state_dict()[TABLE][:3], before[:3])
    assert torch.equal(network.state_dict()[TABLE][3], tiny_model.network.state_dict()[TABLE][3])
    assert told["anew"] == [TABLE]


@pytest.mark.parametrize("classes", [3, 2])
def test_a_source_without_names_is_matched_by_number_where_there_are_as_many(make_model, classes):
    source = make_model(class_names=())
    network = fresh(source, classes=classes)
    told = start_from(network, ("x", "y", "z")[:classes], source, "m")
    assert told["anew"] == ([] if classes == 3 else [TABLE])
    assert same(network, source, [TABLE]) == (classes == 3)


def test_without_a_null_class_on_one_side_no_row_is_taken_for_it(make_model):
    source = make_model(network={"learn_null_class": False})
    network = source.config.network.model_copy(update={"learn_null_class": True}).build()
    before = network.state_dict()[TABLE].clone()
    start_from(network, NAMES, source, "m")
    assert torch.equal(network.state_dict()[TABLE][:3], source.network.state_dict()[TABLE])
    assert torch.equal(network.state_dict()[TABLE][3], before[3])


def test_from_and_to_unconditional(make_model, tiny_model):
    free = make_model(network={"num_classes": 0}, class_names=())
    network = fresh(tiny_model)
    told = start_from(network, NAMES, free, "m")
    assert told["anew"] == [TABLE]
    assert all_in(told) == sorted(network.state_dict())
    network = fresh(free)
    told = start_from(network, (), tiny_model, "m")
    assert told["anew"] == told["resampled"] == []
    assert all_in(told) == sorted(network.state_dict())


def test_another_size_has_positions_of_its_own(tiny_model):
    network = fresh(tiny_model, size=(12, 16))
    positions = network.pos_embed.clone()
    told = start_from(network, NAMES, tiny_model, "m")
    assert told["resampled"] == [POSITIONS]
    assert told["anew"] == []
    assert torch.equal(network.pos_embed, positions)
    assert all_in(told) == sorted(network.state_dict())


def test_another_patch_is_resampled(tiny_model):
    network = fresh(tiny_model, size=(16, 16), patch=4)  # the same grid
    told = start_from(network, NAMES, tiny_model, "m")
    assert sorted(told["resampled"]) == sorted([PATCHES, *READOUT])
    assert told["anew"] == []
    old, new = tiny_model.network.state_dict(), network.state_dict()
    assert torch.equal(new[PATCHES], resample_patches(old[PATCHES], 4))
    for key in READOUT:
        assert torch.equal(new[key], resample_head(old[key], 2, 4))
    assert same(network, tiny_model, told["kept"])


def test_other_channels_are_made_anew(tiny_model):
    network = fresh(tiny_model, channels=3, outputs=6)
    before = {key: network.state_dict()[key].clone() for key in (PATCHES, *READOUT)}
    told = start_from(network, NAMES, tiny_model, "m")
    assert sorted(told["anew"]) == sorted(before)
    assert told["resampled"] == []
    assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())
    assert all_in(told) == sorted(network.state_dict())


def test_another_variance_makes_the_readout_anew_alone(tiny_model):
    told = start_from(fresh(tiny_model, outputs=1), NAMES, tiny_model, "m")
    assert sorted(told["anew"]) == sorted(READOUT)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 16}, r"x_embedder\.proj\.bias is \(32,\), expected \(16,\)"),
        ({"depth": 1}, r"blocks\.1\.\S+ has no place"),
        ({"depth": 3}, r"blocks\.2\.\S+ is missing"),
        ({"mlp_ratio": 2.0}, r"blocks\.0\.mlp\.fc1\.weight is \(128, 32\), expected \(64, 32\)"),
        ({"num_heads": 4}, r"it has 2 heads, network\.heads is 4"),
    ],
)
def test_another_transformer_is_refused_by_the_names_of_its_keys(tiny_model, changes, said):
    network = tiny_model.config.network.model_copy(update=changes).build()
    with pytest.raises(TesseraError, match=said) as caught:
        start_from(network, NAMES, tiny_model, "runs/old")
    assert "cannot start from runs/old" in str(caught.value)
    assert str(caught.value).count("\n") < 12


def test_another_block_is_refused(make_model, tiny_model):
    network = make_model(network={"block": "adaln"}).network
    said = r"its blocks are adaln-zero, network\.block is adaln: leave block: out"
    with pytest.raises(TesseraError, match=said) as caught:
        start_from(network, NAMES, tiny_model, "m")
    assert "\n" not in str(caught.value), "no list of keys"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({"positions": "rotary"}, {"positions": "sincos"}, "modern, network.block is modern positions=sincos"),
        ({"positions": "sincos"}, {"positions": "rotary"}, "modern positions=sincos, network.block is modern"),
    ],
)
def test_another_kind_of_position_is_refused(make_model, old, new, said):
    """No other weight tells rotary positions from a table."""
    source = make_model(network={"block": {"kind": "rope-swiglu", **old}})
    network = make_model(network={"block": {"kind": "rope-swiglu", **new}}).network
    with pytest.raises(TesseraError, match=said):
        start_from(network, NAMES, source, "m")


def test_a_modern_network_starts_from_one_of_another_size(make_model):
    source, network = (make_model(network={"block": "rope-swiglu", "input_size": size}, seed=size) for size in (8, 16))
    told = start_from(network.network, NAMES, source, "m")
    assert told["resampled"] == told["anew"] == []
    for name, weight in source.network.state_dict().items():
        assert torch.equal(network.network.state_dict()[name], weight)


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
    return recipe.output


def without(recipe, *names):
    """The recipe as if these sections had been left out."""
    told = {name: getattr(recipe, name) for name in recipe.model_fields_set if name not in names}
    return type(recipe)(**told)


@pytest.mark.parametrize("as_bundle", [False, True])
def test_what_the_recipe_leaves_unsaid_is_as_in_the_source(tiny, trained, weights, tmp_path, as_bundle):
    source = trained
    if as_bundle:
        bundle.save(bundle.load(bundle.checkpoints(trained)[0]), tmp_path / "saved")
        source = tmp_path / "saved"
    recipe = tiny(
        "new", f"training.init_from={source}", "training.optimizer.learning_rate=1e-12", "training.ema.decay=0"
    )
    recipe = without(recipe, "network", "process", "sampling")
    run = loop.train(recipe)
    new, old = bundle.load(bundle.checkpoints(run)[0]).config, bundle.load(bundle.checkpoints(trained)[0]).config
    assert new.network == old.network
    assert new.diffusion == old.diffusion
    assert new.sampling == old.sampling
    assert new.origin["started from"] == str(source)
    for key, value in weights(trained).items():
        torch.testing.assert_close(weights(run)[key], value, rtol=0, atol=1e-6)
    lines = (run / "init.txt").read_text().splitlines()
    keys = [key for line in lines for key in line.partition(": ")[2].split(", ")]
    assert sorted(keys) == sorted(weights(run))
    assert [line.partition(":")[0] for line in lines] == ["kept"]


def test_what_the_recipe_says_wins(tiny, trained):
    recipe = without(
        tiny("new", f"training.init_from={trained}", "network={patch: 2}", "sampling.num_steps=3"), "process"
    )
    run = loop.train(recipe)
    config = bundle.load(bundle.checkpoints(run)[0]).config
    assert (config.network.patch_size, config.network.hidden_size, config.network.mlp_ratio) == (2, 16, 2.0)
    assert config.sampling.num_steps == 3
    assert config.sampling.guidance_scale == 1.0
    assert config.diffusion.prediction == "x0"
    told = dict(line.split(": ") for line in (run / "init.txt").read_text().splitlines())
    assert set(told) == {"kept", "resampled"}
    assert PATCHES in told["resampled"]


def test_colour_may_start_from_grey(tiny, trained, tmp_path):
    for name in ("1/a", "1/b", "xyz/c"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (200, 10, 10)).save(tmp_path / f"data/{name}.png")
    data = {"kind": "folder", "path": str(tmp_path / "data"), "size": 16}
    recipe = tiny("new", f"training.init_from={trained}", "training.steps=2", data=data)
    run = loop.train(without(recipe, "network", "process", "sampling"))
    config = bundle.load(bundle.checkpoints(run)[0]).config
    assert (config.network.in_channels, config.network.input_size, config.class_names) == (3, (16, 16), ("1", "xyz"))
    assert config.codec.channels == 3
    told = dict(line.split(": ") for line in (run / "init.txt").read_text().splitlines())
    assert sorted(told["resampled"].split(", ")) == sorted([POSITIONS, TABLE])  # class '1' keeps its row
    assert sorted(told["anew"].split(", ")) == sorted([PATCHES, *READOUT])


def test_another_width_is_an_error_that_names_keys_and_leaves_nothing(tiny, trained, tmp_path):
    with pytest.raises(TesseraError, match=r"another architecture[\s\S]*x_embedder\.proj\.bias is \(16,\)"):
        loop.train(tiny("new", f"training.init_from={trained}", "network.hidden_size=32", "network.mlp_ratio=2"))
    assert not (tmp_path / "new").exists()


def test_a_missing_source_is_an_error(tiny, tmp_path):
    with pytest.raises(TesseraError, match="gone"):
        loop.train(tiny("new", f"training.init_from={tmp_path / 'gone'}"))


def test_fine_tuning_goes_on_when_its_source_is_gone(tiny, trained, state):
    def recipe(output, *changes):
        told = tiny(output, f"training.init_from={trained}", *changes)
        return without(told, "network", "process", "sampling")

    whole = loop.train(recipe("whole", "training.steps=6"))
    part = loop.train(recipe("part", "training.steps=3"))
    shutil.rmtree(trained)
    assert loop.train(recipe("part", "training.steps=6")) == part
    assert state(part) == state(whole)


def test_a_fine_tuned_run_that_was_tuned_goes_on_with_its_own_settings(tiny, trained):
    """Also where it scores itself: one curve, drawn in one way."""

    def recipe(*changes):
        told = tiny("new", f"training.init_from={trained}", "evaluation.every=2", "evaluation.num_samples=20", *changes)
        return without(told, "network", "process", "sampling")

    run = loop.train(recipe("training.steps=2"))
    newest = bundle.checkpoints(run)[0]
    result.record(newest, SamplingConfig(num_steps=7), "by a test", bundle.load(newest).network)
    assert bundle.load_config(newest).sampling.num_steps == 7
    loop.train(recipe("training.steps=4"))
    config = bundle.load_config(bundle.checkpoints(run)[0])
    assert (config.origin["steps"], config.sampling.num_steps, config.sampling.guidance_scale) == (4, 2, 1.5)


def test_a_shift_by_dimension_follows_the_size_of_the_data(tiny, tmp_path):
    flow = {"kind": "flow", "shift": "dimension"}
    old = loop.train(tiny("old", "training.steps=1", process=flow))
    (tmp_path / "data").mkdir()
    Image.new("L", (16, 16), 200).save(tmp_path / "data/a.png")
    data = {"kind": "folder", "path": str(tmp_path / "data"), "size": 16, "channels": 1}
    new = without(tiny("new", f"training.init_from={old}", data=data), "network", "process", "sampling")
    run = loop.build_run(new)
    assert bundle.load(bundle.checkpoints(old)[0]).diffusion.shift == 0.125
    assert run.objective.diffusion.shift == run.ema_model.diffusion.shift == 0.25


@pytest.mark.parametrize(("told", "prediction"), [("sit", "velocity"), (None, None)])
def test_bare_weights_are_read_as_the_recipe_says(tiny, make_model, tmp_path, told, prediction):
    """SiT's readout has the outputs of a learned variance, half of them unused, as DiT's has."""
    model = make_model(network={"num_classes": 10, "patch_size": 4}, class_names=())
    torch.save(model.network.state_dict(), tmp_path / "model.pt")
    changes = [
        f"training.init_from={tmp_path / 'model.pt'}",
        "training.init_num_heads=2",
        f"training.init_type={told or 'null'}",
    ]
    recipe = without(tiny("new", *changes), "network", "process", "sampling")
    run = loop.build_run(recipe)
    assert run.recipe.diffusion.kind == ("flow" if told else "gaussian")
    assert prediction in (None, run.recipe.diffusion.prediction)
