"""Recipes: validation errors, defaults, and the settings that follow from the data."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from tessera.codecs import PixelsConfig
from tessera.data import DigitsConfig, build
from tessera.data.captions import TextSizes
from tessera.errors import TesseraError
from tessera.models import parameter_count
from tessera.settings import to_yaml
from tessera.training import codec
from tessera.training.optimizers import AdamWConfig, CosineDecay, MuonConfig, WarmupStableDecay
from tessera.training.recipe import Recipe, infer_pixel_channels, read_recipe, resolve_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def resolved(recipe: Recipe) -> Recipe:
    recipe = infer_pixel_channels(recipe)
    return resolve_recipe(recipe, recipe.data.open().class_names, recipe.codec.build())


def test_a_study_is_no_recipe_and_the_message_names_the_command():
    path = RECIPES[0].parent / "studies" / "blocks.yaml"
    with pytest.raises(TesseraError, match="is a study, which trains several models") as caught:
        read_recipe(path)
    assert f"`tessera study {path} --dry-run`" in str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid_and_starts_with_its_command(path):
    text = path.read_text(encoding="utf-8")
    if re.search(rf"tessera data build \S*{path.name}", text):
        assert build.read_recipe(path).output
        return
    command = re.search(rf"tessera (codec )?train \S*{path.name}", text)
    assert command
    recipe = codec.read_codec_recipe(path, []) if command[1] else read_recipe(path, [])
    assert recipe.run_dir


def test_there_are_recipes():
    assert RECIPES


def test_run_dir_defaults_to_the_name_of_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: {kind: digits}")
    assert read_recipe(path, []).run_dir == "runs/mine"
    assert read_recipe(path, ["run_dir=elsewhere"]).run_dir == "elsewhere"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trainin.steps=3", r"unknown key 'trainin'; did you mean 'training'\?"),
        ("training.step=3", r"training: unknown key 'step'; did you mean 'steps'\?"),
        ("training.optimizer.lr=3", r"training\.optimizer.*: unknown key 'lr'"),
        ("network.hiden_size=3", r"network: unknown key 'hiden_size'; did you mean 'hidden_size'\?"),
        ("data.split=modell", r"data.*split: .*'model'.*got 'modell'"),
        ("data.kind=foldr", r"data: .*'foldr'.*'folder'"),
        ("diffusion.schedule=cosin", r"diffusion.*'cosin'.*'cosine'"),
        ("training.steps=many", r"training\.steps: .*integer.*got 'many'"),
        ("training.steps=0", r"training\.steps: .*greater than 0.*got 0"),
        ("training.global_batch_size=1.5", r"training\.global_batch_size: .*integer.*got 1\.5"),
        ("training.optimizer.learning_rate=-1", r"learning_rate: .*greater than 0.*got -1"),
        ("training.optimizer.betas=[0.9, 1.5]", r"betas.*less than 1.*got 1\.5"),
        ("training.condition_dropout=1", r"condition_dropout: .*less than 1"),
        ("training.optimizer=moun", r"training\.optimizer.*'moun'.*'muon'"),
        ("training.optimizer=mun", r"unknown optimizer 'mun'; did you mean 'muon'\?"),
        ("network.block=rope-swigl", r"network\.block: unknown block 'rope-swigl'; did you mean 'rope-swiglu'\?"),
        ("diffusion=flwo", r"diffusion: unknown diffusion 'flwo'; did you mean 'flow'\?"),
        ("sampling.guidance_scale=.inf", r"sampling\.guidance_scale: .*finite number"),
        ("diffusion={kind: flow, shift: .inf}", r"shift.*: .*finite number"),
        ("training.optimizer.momentum=0.9", r"optimizer: unknown key 'momentum'.*adamw"),
        ("training.optimizer={kind: muon, momentum: 1.5}", r"training\.optimizer\.momentum: .*less than 1.*got 1\.5"),
        ("training.optimizer.lr_schedule=cosin", r"optimizer.*lr_schedule: .*'cosin'.*'cosine'"),
        (
            "training.optimizer.lr_schedule={kind: wsd, cooldown: 0}",
            r"optimizer\.lr_schedule\.cooldown: .*greater than 0",
        ),
        ("training.ema.extra_decays=[0.9, 1.5]", r"ema\.extra_decays\.1: .*less than 1"),
        (
            "training.ema.extra_decays=[0.9, 0.9]",
            r"ema: the decays must differ, got 0\.9999, 0\.9, 0\.9",
        ),
        ("training.ema.decay=2", r"ema\.decay: .*less than 1"),
        ("training.ema=power-function", r"unknown ema 'power-function'; did you mean 'power'"),
        ("training.ema={kind: power, decay: 0.9}", r"ema: unknown key 'decay'.*power"),
        ("training.ema={kind: power, lengths: [0.05, 0.3]}", r"ema\.lengths\.1: .*less than 0\.288.*got 0\.3"),
        ("training.ema={kind: power, lengths: [0.1, 0.1]}", r"ema: the lengths must differ, got 0\.1, 0\.1"),
        ("training.ema={kind: power, lengths: []}", r"ema\.lengths: .*at least 1"),
        ("training.ema={kind: power, snapshot_every: 0}", r"ema\.snapshot_every: .*greater than 0"),
        ("training.micro_batch_size=5", "global_batch_size 32 is not a multiple of micro_batch_size 5"),
        ("training.device=gpu", r"training\.device: .*'cuda'.*got 'gpu'"),
        ("network.num_heads=3", "16 .*3"),
        ("network.preset=DiT-XL/3", r"unknown preset 'DiT-XL/3'; did you mean 'DiT-XL/\d'"),
        ("network.block=adaln-one", r"network\.block: unknown block 'adaln-one'; did you mean 'adaln"),
        ("data=5", r"data: "),
    ],
)
def test_an_invalid_setting_is_named_with_the_nearest_valid_one(tiny, change, message):
    with pytest.raises(TesseraError, match=message) as caught:
        tiny("run", change)
    assert "pydantic" not in str(caught.value)


def test_several_errors_are_reported_at_once(tiny):
    with pytest.raises(
        TesseraError, match=r"training\.steps[\s\S]*network: unknown key 'widht'|network[\s\S]*training"
    ):
        tiny("run", "training.steps=x", "network.widht=3")


def test_data_are_required(tmp_path):
    (tmp_path / "a.yaml").write_text("run_dir: x")
    with pytest.raises(TesseraError, match="data: Field required"):
        read_recipe(tmp_path / "a.yaml", [])


@pytest.mark.parametrize("text", ["- a\n- b", "just text", "", "a: [1", "a: b: c"])
def test_a_recipe_must_be_a_mapping(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(TesseraError, match=r"a\.yaml"):
        read_recipe(tmp_path / "a.yaml", [])


def test_a_missing_recipe(tmp_path):
    with pytest.raises(TesseraError, match=r"no recipe at .*gone\.yaml"):
        read_recipe(tmp_path / "gone.yaml", [])


# The optimizer


def test_an_optimizer_without_a_kind_is_adamw_and_another_is_selected_by_name(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "data: {kind: digits}\ntraining: {optimizer: {learning_rate: 0.001, betas: [0.8, 0.9], lr_schedule: wsd}}"
    )

    def optimizer(*changes):
        return read_recipe(path, list(changes)).training.optimizer

    decay = WarmupStableDecay()
    assert optimizer() == AdamWConfig(learning_rate=0.001, betas=(0.8, 0.9), lr_schedule=decay)
    assert optimizer("training.optimizer.grad_clip_norm=1") == AdamWConfig(
        learning_rate=0.001, betas=(0.8, 0.9), lr_schedule=decay, grad_clip_norm=1
    )
    assert optimizer("training.optimizer=muon") == MuonConfig()  # another kind has other fields
    assert optimizer("training.optimizer.kind=muon") == MuonConfig()
    changes = (
        "training.optimizer.kind=muon",
        "training.optimizer.learning_rate=1e-3",
        "training.optimizer.lr_schedule=cosine",
    )
    assert optimizer(*changes) == MuonConfig(learning_rate=0.001, lr_schedule=CosineDecay())
    cooled = optimizer("training.optimizer.lr_schedule.cooldown=0.1")
    assert cooled.lr_schedule == WarmupStableDecay(cooldown=0.1)
    path.write_text("data: {kind: digits}")
    assert optimizer() == AdamWConfig()
    assert optimizer("training.optimizer.kind=muon", "training.optimizer.nesterov=false") == MuonConfig(nesterov=False)


# Settings that follow from data, codec and diffusion process


@pytest.mark.parametrize(("variance", "outputs"), [("learned", 2), ("posterior", 1)])
def test_sizes_follow_from_data_and_diffusion(tiny, variance, outputs):
    network = resolved(tiny("run", f"diffusion.variance={variance}")).network
    assert (network.input_size, network.in_channels, network.out_channels, network.num_classes) == (
        (8, 8),
        1,
        outputs,
        10,
    )
    assert (network.patch_size, network.hidden_size, network.depth) == (4, 16, 1)


def test_a_resolved_recipe_written_and_read_is_the_same(tiny, tmp_path):
    recipe = resolved(tiny())
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    again = read_recipe(tmp_path / "again.yaml", [])
    assert again == recipe
    assert resolved(again) == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["network.num_classes=5"], "network.num_classes is 5 in the recipe, but data, codec and diffusion need 10"),
        (["network.input_size=16"], r"network\.input_size is \(16, 16\) in the recipe, .* need \(8, 8\)"),
        (["network.out_channels=1"], "network.out_channels is 1 in the recipe, .* need 2"),
        (["network.in_channels=4"], "network.in_channels is 4 in the recipe, .* need 1"),
        (["codec={kind: pixels, channels: 3}"], "the codec takes 3 channels, but data.channels is 1"),
        (["network.patch_size=3"], "3 does not divide .*8 x 8"),
        (["network.learn_null_class=false"], r"condition_dropout needs network\.learn_null_class=true"),
        (
            ["network.learn_null_class=false", "training.condition_dropout=0", "sampling.guidance_scale=2"],
            r"sampling\.guidance_scale is 2, but guidance needs classes and network\.learn_null_class",
        ),
        (["sampling.num_steps=21"], r"steps is 21; .* 20"),
    ],
)
def test_contradicting_settings_are_an_error(tiny, changes, message):
    with pytest.raises(TesseraError, match=message):
        resolved(tiny("run", *changes))


def test_settings_may_repeat_what_follows_from_the_data(tiny):
    recipe = resolved(tiny("run", "network.num_classes=10", "network.input_size=8", "network.in_channels=1"))
    assert recipe.network.num_classes == 10


def test_the_pixel_codec_has_the_channels_of_the_data_by_default(tiny):
    assert infer_pixel_channels(tiny()).codec == PixelsConfig(channels=1)
    assert infer_pixel_channels(tiny("run", "codec={kind: pixels, channels: 3}")).codec == PixelsConfig(channels=3)


def test_a_single_extra_decay_needs_no_list(tiny):
    assert tiny("run", "training.ema.extra_decays=0.9").training.ema.extra_decays == (0.9,)


def test_the_defaults_are_those_of_the_paper():
    recipe = Recipe(run_dir="x", data=DigitsConfig())
    training, network, diffusion = recipe.training, recipe.network, recipe.diffusion
    assert (training.global_batch_size, training.steps, training.condition_dropout) == (256, 400_000, 0.1)
    assert (training.optimizer.learning_rate, training.optimizer.weight_decay) == (1e-4, 0.0)
    assert (training.optimizer.kind, training.optimizer.lr_schedule.kind) == ("adamw", "constant")
    assert (training.optimizer.warmup_steps, training.optimizer.grad_clip_norm) == (0, None)
    assert (training.ema.decay, training.ema.extra_decays, training.ema.warmup) == (0.9999, (), False)
    assert (network.depth, network.hidden_size, network.num_heads, network.patch_size) == (28, 1152, 16, 2)
    assert (diffusion.num_timesteps, diffusion.schedule.kind, diffusion.prediction) == (1000, "linear", "epsilon")


def test_a_recipe_is_written_as_plain_yaml(tiny):
    assert yaml.safe_load(to_yaml(tiny()))["network"]["hidden_size"] == 16


def test_pixart_has_the_published_settings():
    """PixArt-alpha's configuration for 256 px, and the size of its published network."""
    recipe = read_recipe(next(path for path in RECIPES if path.stem == "pixart"), [])
    codec = SimpleNamespace(pixel_channels=3, latent_channels=4, factor=8, latent_size=lambda size: (32, 32))
    network = resolve_recipe(recipe, [], codec, text=TextSizes(4096, 0, 120, 120)).network
    assert (network.input_size, network.grid, network.text_tokens) == ((32, 32), (16, 16), 120)
    with torch.device("meta"):
        built = network.build()
    assert parameter_count(built) == 610_856_096
    optimizer = recipe.training.optimizer.build(built)
    settings = optimizer.defaults | {"warmup": recipe.training.optimizer.warmup_steps}
    expected = {"lr": 2e-5, "weight_decay": 0.03, "eps": 1e-10, "betas": (0.9, 0.999), "warmup": 1000}
    assert {name: settings[name] for name in expected} == expected
    assert (recipe.training.optimizer.grad_clip_norm, recipe.training.ema.decay) == (0.01, 0.9999)
    assert recipe.training.condition_dropout == 0.1
    assert recipe.diffusion.build().out_channels(4) == 8
