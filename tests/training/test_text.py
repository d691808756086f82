"""Recipes whose network reads text: what follows from encoder and captions, and errors."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tessera import bundle
from tessera.cli import app
from tessera.data import ShapesConfig
from tessera.data.captions import Captions, TextSizes
from tessera.encoders.pretrained_text import PretrainedTextEncoder
from tessera.encoders.text import FolderConfig, WordsConfig
from tessera.errors import TesseraError
from tessera.monitoring.logger import read_log
from tessera.settings import to_yaml
from tessera.studies.study_plan import resolve
from tessera.training import loop
from tessera.training.dry_run import dry_run
from tessera.training.plan_recipe import workload
from tessera.training.recipe import Recipe, inherit_text, read_recipe
from tessera.training.run import build_run

SHAPES = {"kind": "shapes", "count": 96}
NETWORK = {"kind": "dit", "patch_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 2}
KEYS = {**NETWORK, "block": {"kind": "rope-swiglu", "text": "keys"}}
PIXART = {**NETWORK, "kind": "pixart"}


@pytest.fixture
def text_recipe(tiny):
    def make(name="run", *changes: str, network=KEYS, data=SHAPES, **sections) -> Recipe:
        return tiny(name, *changes, network=network, data=data, **sections)

    return make


def vocabulary(**data) -> tuple[str, ...]:
    captions = Captions.of(ShapesConfig(**{"count": 96, **data}).open())
    assert captions is not None
    return WordsConfig().with_vocabulary(captions.text_counts()).vocabulary


def test_words_are_the_default_with_the_vocabulary_of_the_captions(text_recipe):
    run = build_run(text_recipe())
    network, text = run.recipe.network, run.recipe.text
    assert text == WordsConfig(vocabulary=vocabulary())
    assert (network.text_channels, network.vocabulary_size) == (0, WordsConfig.build(text).vocabulary_size)
    longest = max(len(caption.split()) for caption in map(run.loader.dataset.caption, range(96)))
    assert network.text_tokens == longest + 1
    assert (network.num_classes, run.ema_model.config.class_names) == (0, ())
    assert run.ema_model.config.text == text
    again = build_run(Recipe.model_validate_json(run.recipe.model_dump_json()))
    assert again.recipe == run.recipe


def test_the_effect_of_captions_is_recorded_and_does_not_change_the_training(text_recipe, state):
    run = loop.train(text_recipe("run", "training.steps=2", "training.health_every=1"))
    other = loop.train(text_recipe("other", "training.steps=2"))
    assert state(run) == state(other)
    record = read_log(run, "health.jsonl")[-1]
    rise = record["loss_wrong_captions"] / record["loss_probe"] - 1
    assert record["cost_wrong_captions"] == pytest.approx(rise, abs=1e-5)
    assert record["error_wrong_captions"] > 0
    assert record["change_wrong_captions"] > 0


def test_classes_and_text(text_recipe):
    run = build_run(text_recipe("run", "network.num_classes=30"))
    assert run.recipe.network.num_classes == 30
    assert len(run.ema_model.config.class_names) == 30
    condition = run.loader.load_batch(0).condition
    assert condition.label is not None
    assert condition.text is not None
    with pytest.raises(TesseraError, match="num_classes is 7 in the recipe, but data, codec and diffusion need 30"):
        build_run(text_recipe("run", "network.num_classes=7"))


def test_a_dry_run_says_what_the_start_of_the_run_says(text_recipe):
    reports: list[str] = []
    dry_run(text_recipe("run", text={"kind": "words", "max_tokens": 6}), log=reports.append)
    assert any("captions have more than 6 tokens and are cut" in report for report in reports)


def test_plan_and_dry_run_describe_the_text(text_recipe, text_encoder_folder, tmp_path):
    words = WordsConfig(vocabulary=vocabulary()).build()
    captions = Captions.of(ShapesConfig(**SHAPES).open()).texts.to_pylist()
    recipe = text_recipe()
    expected = (
        f"words: {words.vocabulary_size} ids, at most 128 tokens; {len(captions)} different captions, the longest has "
        f"{max(map(len, words.tokenize(captions)))} tokens"
    )
    assert workload(recipe).text == expected
    assert f"text         {expected}" in str(dry_run(recipe)).splitlines()
    text = {"kind": "folder", "source": str(text_encoder_folder)}
    frozen = text_recipe(text=text)
    tokens = sum(map(len, build_run(frozen).recipe.text.build().tokenize(captions)))
    summary = workload(frozen).text
    assert summary.startswith(f"folder ({text_encoder_folder}): 16 channels, at most 40 tokens; ")
    assert f"{2 * 16 * tokens / 1024:.3g} KiB of embeddings, computed at the start and kept in memory" in summary
    assert dry_run(frozen).text == summary
    cached = text_recipe(text={**text, "cache": str(tmp_path / "cache")})
    assert f"to be cached in {tmp_path / 'cache'} before training" in workload(cached).text
    (tmp_path / "cache" / "text").mkdir(parents=True)
    assert f"KiB of embeddings, cached in {tmp_path / 'cache'}" in workload(cached).text


def test_frozen_encoders_of_many_captions_are_estimated_from_some(monkeypatch, text_encoder_folder):
    captions = Captions.of(ShapesConfig(**SHAPES).open())
    encoder = FolderConfig(source=str(text_encoder_folder)).build()
    exact = TextSizes.measure(captions, encoder)
    monkeypatch.setattr("tessera.data.captions.TEXTS_AT_ONCE", 32)
    monkeypatch.setattr("tessera.data.captions.MAX_MEASURED", 32)
    sizes = TextSizes.measure(captions, encoder)
    assert (sizes.num_texts, sizes.counted_texts, exact.counted_texts) == (len(captions), 32, len(captions))
    assert sizes.embedding_bytes == pytest.approx(exact.embedding_bytes, rel=0.1)
    assert exact.embedding_bytes == 2 * 16 * sum(map(len, encoder.tokenize(captions.texts.to_pylist())))


def test_training_saves_a_model_of_its_words(text_recipe):
    run_dir = loop.train(text_recipe())
    model = bundle.load(bundle.checkpoints(run_dir)[0])
    assert model.config.text == WordsConfig(vocabulary=vocabulary())
    ids, mask = model.text_encoder.encode(["a large red circle"])
    assert model.text_encoder.tokenize(["a large red circle"])[0] == ids[0].tolist()
    assert mask.sum() == 5


def test_captions_that_are_cut_in_training_are_cut_in_its_grids(text_recipe):
    run_dir = loop.train(text_recipe("run", "text.kind=words", "text.max_tokens=6"))
    model = bundle.load(bundle.checkpoints(run_dir)[0])
    with pytest.raises(TesseraError, match="takes at most 6"):
        model.text_encoder.encode(["a large red circle left of a small blue square"])


def test_a_run_that_is_resumed_keeps_its_vocabulary(text_recipe):
    """Ids would have other meanings with that of data that changed."""
    run_dir = loop.train(text_recipe())
    changed = text_recipe("run", "training.steps=5", data={**SHAPES, "combinations": "held-out"})
    assert vocabulary(combinations="held-out") != vocabulary()
    loop.train(changed)
    newest = bundle.load_config(bundle.checkpoints(run_dir)[0])
    assert newest.provenance.steps == 5
    assert newest.text == WordsConfig(vocabulary=vocabulary())
    with pytest.raises(TesseraError, match="cannot resume .* text.max_tokens was 128, is 50"):
        loop.train(text_recipe("run", "training.steps=6", text={"kind": "words", "max_tokens": 50}))


def test_settings_without_a_kind_are_those_of_words(text_recipe):
    assert text_recipe("run", "text.max_tokens=50").text == WordsConfig(max_tokens=50)


def test_another_vocabulary_of_the_same_size_than_that_of_the_model_is_an_error(text_recipe):
    words = ("a", "red", "blue")
    recipe = text_recipe(text={"kind": "words", "vocabulary": words[::-1]})
    with pytest.raises(TesseraError, match="has 3 words, and is not that of the model .* leave text.vocabulary out"):
        inherit_text(recipe, WordsConfig(vocabulary=words))
    assert inherit_text(text_recipe(text="words"), WordsConfig(vocabulary=words)).text.vocabulary == words


def test_a_model_passes_its_vocabulary_on(text_recipe):
    run_dir = loop.train(text_recipe())
    changes = (f"training.init_from={run_dir}", "data.combinations=held-out")
    run = build_run(text_recipe("next", *changes))
    assert run.recipe.text == WordsConfig(vocabulary=vocabulary())
    assert resolve(text_recipe("next", *changes), {}).text == run.recipe.text


def test_frozen_encoders_need_no_words(text_recipe, text_encoder_folder):
    source = str(text_encoder_folder)
    run = build_run(text_recipe(text={"kind": "folder", "source": source}))
    assert (run.recipe.network.text_channels, run.recipe.network.vocabulary_size) == (16, 0)
    condition = run.loader.load_batch(0).condition
    assert condition.text.dtype == torch.float32
    assert condition.text.shape == (*condition.text_mask.shape, 16)


@pytest.mark.parametrize("is_cached", [False, True])
def test_an_encoder_is_loaded_once_for_the_prompts_of_all_grids(
    text_recipe, text_encoder_folder, tmp_path, monkeypatch, is_cached
):
    """Sample prompts and the empty text of null_text=empty. After the grids it is not in memory."""
    text = {"kind": "folder", "source": str(text_encoder_folder)}
    changes = ['training.sample_prompts=["a cat"]', "training.steps=3", "training.sample_every=1"]
    changes += ["sampling.null_text=empty", "sampling.guidance_scale=2"]
    if is_cached:
        text["cache"] = str(tmp_path / "cache")
        (tmp_path / "recipe.yaml").write_text(to_yaml(text_recipe("run", *changes, text=text)))
        result = CliRunner().invoke(app, ["data", "cache", str(tmp_path / "recipe.yaml"), "--device", "cpu"])
        assert result.exit_code == 0, result.output
    loaded, embed, unload = [], PretrainedTextEncoder.embed, PretrainedTextEncoder.unload

    def record_embed(self, *tokens):
        loaded.append("network" not in self.__dict__)
        return embed(self, *tokens)

    encoders = set()
    monkeypatch.setattr(PretrainedTextEncoder, "embed", record_embed)
    monkeypatch.setattr(PretrainedTextEncoder, "unload", lambda self: (encoders.add(self), unload(self)))
    loop.train(text_recipe("run", *changes, text=text))
    assert sum(loaded) == 1
    assert not any("network" in encoder.__dict__ for encoder in encoders)


def test_the_tokens_of_prompts_that_were_kept_are_those_of_the_encoder(text_recipe, text_encoder_folder):
    text = {"kind": "folder", "source": str(text_encoder_folder)}
    run = build_run(text_recipe("run", 'training.sample_prompts=["a cat"]', text=text))
    encoder, inner = run.loader.dataset.text.encoder, run.recipe.text.build()
    for _ in range(2):
        for prompts in (["a cat"], [""], ["another"]):
            for ours, theirs in zip(encoder.encode(prompts), inner.encode(prompts)):
                assert torch.equal(ours, theirs)
    assert {key[0] for key in encoder.prompt_rows} == {"a cat", ""}


def test_training_on_cached_embeddings(text_recipe, text_encoder_folder, tmp_path, monkeypatch):
    """The same batches as without a cache, up to batched products; the encoder is never loaded, also for the grids."""
    text = {"kind": "folder", "source": str(text_encoder_folder)}
    recipe, cached = text_recipe(text=text), text_recipe("cached", text={**text, "cache": str(tmp_path / "cache")})
    with pytest.raises(TesseraError, match="no cache of text in .*there is none"):
        build_run(cached)
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(cached))
    result = CliRunner().invoke(app, ["data", "cache", str(path), "--workers", "1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "different captions" in result.output
    assert f"text.cache={tmp_path / 'cache'}" in result.output
    result = CliRunner().invoke(app, ["data", "cache", str(path), "--verify"])
    assert "captions in 1 files, all checksums match" in result.output
    before, after = build_run(recipe), build_run(cached)
    for start in (0, 32):
        expected, condition = (run.loader.load_batch(start).condition for run in (before, after))
        torch.testing.assert_close(condition.text, expected.text, rtol=1e-3, atol=1e-3)
        assert torch.equal(condition.text_mask, expected.text_mask)
    weights = text_encoder_folder / "text_encoder" / "model.safetensors"

    def load(encoder):
        raise AssertionError("the text encoder is loaded")

    with monkeypatch.context() as patch:
        patch.setattr(PretrainedTextEncoder, "network", property(load))
        run_dir = loop.train(cached)
    assert bundle.load_config(bundle.checkpoints(run_dir)[0]).text.cache is None
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(TesseraError, match="text encoder was"):
        build_run(cached)


def test_a_bundle_holds_a_local_text_encoder(text_recipe, text_encoder_folder, tmp_path):
    source = tmp_path / "source"
    text_encoder_folder.rename(source)
    run_dir = loop.train(text_recipe(text={"kind": "folder", "source": str(source)}, network=PIXART))
    newest = bundle.checkpoints(run_dir)[0]
    assert json.loads((newest / "config.json").read_text())["text"]["source"] == "../../text"
    model = bundle.load(newest)
    expected = model.text_encoder.encode(["a red circle"])[0]
    bundle.save(model, tmp_path / "bundle")
    source.rename(tmp_path / "moved")
    (tmp_path / "run").rename(tmp_path / "run2")
    copy = bundle.load(tmp_path / "bundle")
    assert Path(copy.config.text.source).is_relative_to(tmp_path / "bundle")
    assert torch.equal(copy.text_encoder.encode(["a red circle"])[0], expected)


def test_a_text_encoder_that_does_not_fit(text_recipe):
    run_dir = loop.train(text_recipe())
    config = bundle.checkpoints(run_dir)[0] / "config.json"
    settings = json.loads(config.read_text())
    settings["text"]["vocabulary"] = ["a"]
    config.write_text(json.dumps(settings))
    with pytest.raises(TesseraError, match="is not that of this model: it gives 0 channels and 259 ids"):
        _ = bundle.load(config.parent).text_encoder
    settings["text"] = None
    config.write_text(json.dumps(settings))
    with pytest.raises(TesseraError, match="has no text encoder: give the tokens"):
        _ = bundle.load(config.parent).text_encoder


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"network": NETWORK, "text": "words"}, "its network reads no text: set network.block.text=keys"),
        ({"data": {"kind": "digits"}}, "the digits of scikit-learn, split model has no captions: add them as"),
        ({"network": {**KEYS, "text_tokens": 5}}, "text_tokens is 5, but a caption has 11: set network.text_tokens=11"),
        (
            {"network": {**KEYS, "vocabulary_size": 5}},
            "vocabulary_size is 5 in the recipe, but .* needs 277",
        ),
        ({"network": {**KEYS, "text_channels": 5}}, "text_channels is 5 in the recipe, but the text encoder needs 0"),
    ],
)
def test_errors(sections, message, text_recipe):
    with pytest.raises(TesseraError, match=message):
        build_run(text_recipe(**sections))
    with pytest.raises(TesseraError, match=message):
        resolve(text_recipe(**sections), {})


def test_pixart_needs_as_many_tokens_as_the_encoder_gives(text_recipe, text_encoder_folder):
    text = {"kind": "folder", "source": str(text_encoder_folder)}
    with pytest.raises(TesseraError, match="text_tokens is 8, but the text encoder gives up to 40: .*max_tokens=8"):
        build_run(text_recipe(text=text, network={**PIXART, "text_tokens": 8}))
    run = build_run(text_recipe(text={**text, "max_tokens": 8}, network={**PIXART, "text_tokens": 8}))
    assert run.recipe.network.text_tokens == 8


def test_plans_and_studies_resolve_the_same_recipe(text_recipe, text_encoder_folder):
    for sections in ({}, {"text": {"kind": "folder", "source": str(text_encoder_folder)}, "network": PIXART}):
        recipe = text_recipe(**sections)
        run = build_run(recipe)
        assert resolve(recipe, {}) == run.recipe
        assert workload(recipe).network == run.recipe.network


def test_plan_of_what_is_not_on_this_machine(text_recipe, tmp_path):
    hub = {"kind": "folder", "source": "hub:someone/t5", "max_tokens": 70}
    plan = workload(text_recipe(text=hub))
    assert (plan.network.text_channels, plan.network.text_tokens) == (4096, 70)
    assert any("4096 channels and 70 tokens are assumed" in note for note in plan.notes)
    absent = {"kind": "files", "path": str(tmp_path / "absent"), "size": 32}
    plan = workload(text_recipe(data=absent))
    assert (plan.network.vocabulary_size, plan.network.text_tokens) == (258, 128)
    assert any("258 ids and 128 tokens are assumed" in note for note in plan.notes)


def test_overrides(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: shapes\nnetwork: {block: {kind: rope-swiglu, text: keys}}\n")
    assert read_recipe(recipe, ["text=words"]).text == WordsConfig()
    assert read_recipe(recipe, ["text.kind=words", "text.max_tokens=9"]).text == WordsConfig(max_tokens=9)
