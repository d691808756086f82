"""PixArt trained further: from official files, diffusers folders and class-conditional DiTs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tessera import bundle
from tessera.cli import app
from tessera.conditioning import Condition
from tessera.data import ShapesConfig
from tessera.errors import TesseraError
from tessera.generation import generate_request
from tessera.generation.bulk import bulk_request
from tessera.interop import load
from tessera.models.pixart import PixArtConfig
from tessera.settings import validate
from tessera.training import loop
from tessera.training.initialization import init_from
from tessera.training.objective import prepare_batch
from tessera.training.run import build_run

CPU = torch.device("cpu")
SHAPES = {"kind": "shapes", "count": 64}
DIT = {"patch_size": 8, "hidden_size": 48, "depth": 3, "num_heads": 4, "input_size": (32, 32), "in_channels": 3}


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A folder of a tiny T5 with a tokenizer of letters: 8 channels."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((each, -1.0) for each in "▁abcdefghijklmnopqrstuvwxyz"),
    ]
    tokenizer = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0)
    settings = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
    torch.manual_seed(1)
    network = transformers.T5EncoderModel(transformers.T5Config(**settings))
    folder = tmp_path_factory.mktemp("t5")
    tokenizer.save_pretrained(folder / "tokenizer")
    network.save_pretrained(folder / "text_encoder")
    return {"kind": "folder", "source": str(folder), "max_tokens": 120}


@pytest.fixture
def make_pixart(make_model, encoder, randomise):
    """A PixArt for the shapes. changes: of the network"""

    def make(sampling=None, **changes) -> bundle.Model:
        network = PixArtConfig(**DIT, out_channels=6, text_channels=8, position_base=4, **changes)
        config = bundle.BundleConfig(
            network=network, diffusion={"kind": "gaussian"}, codec={"kind": "pixels"}, text=encoder,
            sampling=sampling or {},
        )  # fmt: skip
        torch.manual_seed(0)
        return bundle.Model(config, randomise(network.build()))

    return make


@pytest.fixture
def text_recipe(tiny, encoder):
    def make(name: str, init, *changes: str, **sections):
        sections = {"data": SHAPES, "text": encoder, **sections}
        changes = (f"training.init_from={init}", "training.global_batch_size=8", "training.init_num_heads=4", *changes)
        recipe = tiny(name, *changes, **sections)
        unset = {"network", "diffusion", "sampling"} - sections.keys()  # those of the source
        return recipe.model_validate(
            {key: value for key, value in recipe.model_dump(exclude_unset=True).items() if key not in unset}
        )

    return make


def examples(network, rows: int = 2):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, network.config.in_channels, *network.config.input_size, generator=generator)
    text = torch.randn(rows, 5, 8, generator=generator)
    return x, Condition(text=text, text_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool))


def error(got, expected) -> float:
    return float((got - expected).norm() / expected.norm())


# From a class-conditional DiT


@torch.no_grad()
@pytest.mark.parametrize(
    ("diffusion", "network"),
    [
        ({"kind": "gaussian"}, {}),
        ({"kind": "flow"}, {"out_channels": 3}),
        ({"kind": "gaussian"}, {"learn_null_class": False}),
        ({"kind": "gaussian"}, {"num_classes": 0}),
    ],
)
def test_a_pixart_begins_with_the_function_of_a_class_model(make_model, diffusion, network):
    source = make_model({**DIT, "out_channels": 6, **network}, diffusion)
    settings = {**DIT, "out_channels": source.config.network.out_channels}
    built = PixArtConfig(**settings, text_channels=8, position_base=4, size_conditions=True).build().eval()
    report = init_from(built, (), source, "m")
    x, condition = examples(built)
    condition = replace(condition, size=torch.tensor([[32.0, 32.0, 1.0]] * 2))
    label = None if not source.config.network.num_classes else torch.full((2,), -1)
    if network.get("learn_null_class") is False:  # the mean of all classes in its place
        table = source.network.y_embedder.embedding_table.weight
        table.copy_(table.mean(dim=0).expand_as(table))
        label = torch.tensor([0, 1])
    t = source.diffusion.model_time(torch.full((2,), 0.501))
    if diffusion["kind"] == "gaussian":
        assert t.tolist() == [500.0, 500.0]
    expected = source.network(x, t, Condition(label=label))
    assert error(built(x, t, condition), expected) < 1e-5
    assert error(built(x, t, replace(condition, text=condition.text.flip(1))), expected) < 1e-5
    # At other times it is near, which random weights of the shared layer are not.
    other = source.diffusion.model_time(torch.tensor([0.2, 0.9]))
    distance = error(built(x, other, condition), source.network(x, other, Condition(label=label)))
    assert distance > 1e-4
    assert "blocks.0.attn.qkv.weight" in report["copied"]
    assert "blocks.2.adaLN_modulation.table" in report["resampled"]
    assert "blocks.1.cross_attn.kv_linear.weight" in report["initialized"]
    assert sorted(name for names in report.values() for name in names) == sorted(built.state_dict())


def test_a_recipe_from_a_class_model_to_text(make_model, text_recipe, tmp_path):
    """Sizes, codec and diffusion process are those of the class model."""
    source = make_model({**DIT, "out_channels": 6, "num_classes": 3}, {"kind": "gaussian"}, {"kind": "pixels"})
    bundle.save(source, tmp_path / "dit")
    recipe = text_recipe("run", tmp_path / "dit", network={"kind": "pixart", "text_tokens": 120})
    run = build_run(recipe)
    network = run.recipe.network
    assert (network.depth, network.hidden_size, network.patch_size, network.num_heads) == (3, 48, 8, 4)
    assert (network.position_base, network.position_scale, network.num_classes) == (4, 1.0, 0)
    assert run.recipe.diffusion == source.config.diffusion
    x, condition = examples(run.network)
    t = torch.full((2,), 500.0)
    with torch.no_grad():
        expected = source.network(x, t, Condition(label=torch.tensor([-1, -1])))
        assert error(run.network(x, t, condition), expected) < 1e-5
    loop.train(recipe)
    model = bundle.load(bundle.checkpoints(tmp_path / "run")[0])
    assert model.config.network == network
    assert model.text_encoder.channels == 8


def test_other_blocks_are_an_error(make_model):
    source = make_model({**DIT, "block": "adaln-single"})
    with pytest.raises(TesseraError, match="a PixArt from m: its blocks are adaln-single; expected adaln-zero"):
        init_from(PixArtConfig(**DIT, text_channels=8, position_base=4).build(), (), source, "m")
    wide = PixArtConfig(**DIT | {"hidden_size": 96}, text_channels=8, position_base=4).build()
    with pytest.raises(TesseraError, match="another architecture"):
        init_from(wide, (), make_model(DIT), "m")


# Trained further


@pytest.mark.parametrize("form", ["official", "diffusers", "bundle"])
def test_a_pixart_trains_further_from_its_weights_and_resumes_exactly(make_pixart, text_recipe, tmp_path, state, form):
    path = tmp_path / ("source.pth" if form == "official" else "source")
    source = make_pixart(null_embedding=form != "diffusers")
    load.convert(source, path, form)
    block = {"kind": "pixart", "drop_path": 0.5}
    recipe = text_recipe("run", path, "training.steps=4", network={"kind": "pixart", "block": block})
    run = build_run(recipe)
    ours, theirs = run.network.state_dict(), source.network.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert run.recipe.sampling.null_text == {"diffusers": "empty"}.get(form, "embedding")
    assert run.objective.uniform_numbers == 6
    loop.train(recipe)
    expected = state(tmp_path / "run")
    assert any(not torch.equal(each, theirs[name]) for name, each in _weights(tmp_path / "run").items())
    again = recipe.model_copy(update={"run_dir": str(tmp_path / "again")})
    loop.train(again.model_copy(update={"training": again.training.model_copy(update={"steps": 2})}))
    loop.train(again)
    resumed = state(tmp_path / "again")
    assert resumed.keys() == expected.keys()
    assert all(resumed[name] == expected[name] for name in expected)


def _weights(run):
    return bundle.load(bundle.checkpoints(run)[0]).network.state_dict()


def test_a_model_of_diffusers_drops_captions_to_an_empty_prompt(make_pixart, text_recipe, tmp_path):
    load.convert(make_pixart(null_embedding=False), tmp_path / "source", "diffusers")
    changes = {"training.condition_dropout": 0.5, "training.global_batch_size": 32}
    run = build_run(text_recipe("run", tmp_path / "source", *(f"{key}={value}" for key, value in changes.items())))
    batch = run.loader.load_batch(0)
    _, condition, _ = prepare_batch(batch, run.objective, CPU)
    text, mask = run.recipe.text.build().encode([""])
    assert mask.tolist() == [[True]]
    dropped = condition.text_mask.sum(dim=1) == 1
    assert 8 < dropped.sum() < 24
    assert torch.equal(condition.text[dropped, :1], text.expand(int(dropped.sum()), 1, 8))
    assert torch.equal(condition.text[~dropped], batch.condition.text[~dropped])
    assert not condition.text.isnan().any()


def test_training_without_any_unconditional_text_is_an_error(make_pixart, text_recipe, tmp_path):
    load.convert(make_pixart(null_embedding=False), tmp_path / "source", "bundle")
    with pytest.raises(TesseraError, match="needs an unconditional text, and the network has no null embedding"):
        build_run(text_recipe("run", tmp_path / "source"))
    assert (
        build_run(text_recipe("run", tmp_path / "source", "training.condition_dropout=0")).objective.null_fields == ()
    )


@torch.no_grad()
def test_an_official_model_gets_size_conditions_another_null_embedding_and_another_size(make_pixart):
    """As PixArt-alpha's 1024 px model began, and PixArt-sigma's null embedding of more tokens."""
    block = {"kind": "pixart", "window_layers": [1], "relative_positions": True}
    source = make_pixart(block=block)
    changes = {"size_conditions": True, "text_tokens": 300, "input_size": (64, 64)}
    built = validate(PixArtConfig, source.config.network.model_dump() | changes, "a test").build().eval()
    report = init_from(built, (), source, "m")
    assert report["resampled"] == ["blocks.1.attn.rel_pos_h", "blocks.1.attn.rel_pos_w"]
    assert "y_embedder.y_embedding" in report["initialized"]
    assert built.blocks[1].attn.rel_pos_h.shape == (15, 12)
    x, condition = examples(source.network)
    t = torch.tensor([3.0, 700.0])
    sizes = replace(condition, size=torch.tensor([[1024.0, 512.0, 2.0]] * 2))
    large = torch.nn.functional.interpolate(x, (64, 64))  # the source resizes its table in each call
    assert error(built(large, t, sizes), source.network(large, t, condition)) < 1e-6
    plain = make_pixart()
    grown = validate(PixArtConfig, plain.config.network.model_dump() | changes, "a test").build().eval()
    init_from(grown, (), plain, "m")
    assert error(grown(x, t, sizes), plain.network(x, t, condition)) < 1e-6


@pytest.mark.parametrize("buckets", [None, {"multiple": 8, "aspect": 2.0}])
def test_size_conditions_are_those_of_the_file_and_the_ratio_of_the_crop(text_recipe, make_pixart, tmp_path, buckets):
    folder, random = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for number in range(32):
        shape = [(48, 64), (40, 40), (100, 50), (33, 47)][number % 4]
        Image.fromarray(random.integers(0, 256, (*shape, 3), np.uint8)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text("a cat")
    load.convert(make_pixart(), tmp_path / "source", "bundle")
    data = {"kind": "files", "path": str(folder), "size": 32, **({"buckets": buckets} if buckets else {})}
    network = {"kind": "pixart", "size_conditions": True}
    recipe = text_recipe("run", tmp_path / "source", data=data, network=network)
    batches = build_run(recipe).loader.batches()
    for _ in range(3):
        batch = next(batches)
        height, width = batch.pixels.shape[2:]
        assert torch.allclose(batch.condition.size[:, 2], torch.tensor(height / width))
        rows = {tuple(row) for row in batch.condition.size[:, :2].tolist()}
        assert rows <= {(48.0, 64.0), (40.0, 40.0), (100.0, 50.0), (33.0, 47.0)}
    batches.close()
    shapes = build_run(text_recipe("other", tmp_path / "source", network=network)).loader.load_batch(0)
    assert shapes.condition.size.tolist() == [[32.0, 32.0, 1.0]] * 8
    loop.train(recipe)


def test_bulk_sampling_gives_each_image_its_size(make_pixart, tmp_path):
    """With size conditions, the images are those of a request that lists the sizes."""
    model = make_pixart({"num_steps": 2, "guidance_scale": 2.0}, size_conditions=True)
    bundle.save(model, tmp_path / "model")
    words = ["sample", tmp_path / "model", "--num-samples", "5", "--captions", "shapes", "--class-policy", "balanced"]
    for size in ((32, 32), (16, 40)):
        target = tmp_path / f"{size[1]}.npz"
        options = ["--size", "x".join(map(str, size)), "--npz", target, "--batch-size", "2", "--device", "cpu"]
        result = CliRunner().invoke(app, [str(word) for word in words + options])
        assert result.exit_code == 0, result.output
        images = np.load(target)["arr_0"]
        request = bulk_request(model, 5, "balanced", data=ShapesConfig(), size=size)
        assert "size" not in request.condition  # it follows from the images
        ratio = size[0] / size[1]
        listed = replace(request, condition={**request.condition, "size": [(*size, ratio)] * 5})
        np.testing.assert_array_equal(images, generate_request(model, listed, 2))
        others = replace(listed, condition={**listed.condition, "size": [(512, 512)] * 5})
        assert (images != generate_request(model, others, 2)).any()
