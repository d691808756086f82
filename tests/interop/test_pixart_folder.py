"""diffusers' PixArt folders, against diffusers' own transformer and pipelines with random weights, both ways."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tessera import bundle, generation
from tessera.cli import app
from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.interop import load, official
from tessera.sampling import sampling_noise

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()

ALPHA, SIGMA = "PixArtAlphaPipeline", "PixArtSigmaPipeline"
SMALL = {
    "num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 2, "sample_size": 8, "cross_attention_dim": 48,
    "caption_channels": 32,
}  # fmt: skip
PROMPTS = ["A red cat on a blue dog.", "a Dog"]


def transformer(**changes):
    """diffusers' network with random weights, none of them zero."""
    torch.manual_seed(0)
    network = diffusers.PixArtTransformer2DModel(**SMALL | changes).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return network


@pytest.fixture(scope="session")
def text_parts():
    """A tiny T5 and its tokenizer."""
    words = [("▁" + word, -1.0) for word in ("a", "red", "cat", "blue", "dog", "on")]
    letters = [(letter, -2.5) for letter in "abcdefghijklmnopqrstuvwxyz.▁"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters, *words]
    tokenizer = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0)
    torch.manual_seed(1)
    settings = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": len(tokenizer)}
    encoder = transformers.T5EncoderModel(transformers.T5Config(**settings, feed_forward_proj="gated-gelu")).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return tokenizer, encoder


@pytest.fixture
def make_folder(text_parts, autoencoder_folder, tmp_path):
    """A folder of a pipeline. changes: of the transformer"""

    def make(pipeline=ALPHA, scheduler=None, name="pipe", **changes):
        tokenizer, encoder = text_parts
        vae = diffusers.AutoencoderKL.from_pretrained(autoencoder_folder)
        scheduler = scheduler or diffusers.DPMSolverMultistepScheduler()
        parts = {"tokenizer": tokenizer, "text_encoder": encoder, "vae": vae, "scheduler": scheduler}
        folder = tmp_path / name
        getattr(diffusers, pipeline)(transformer=transformer(**changes), **parts).save_pretrained(folder)
        return folder

    return make


def edit(path, **changes):
    data = json.loads(path.read_text(encoding="utf-8")) | changes
    data = {name: value for name, value in data.items() if value is not ...}
    path.write_text(json.dumps(data), encoding="utf-8")


def error(got, expected) -> float:
    return float((got - expected).norm() / expected.norm())


# The network


@torch.no_grad()
@pytest.mark.parametrize(
    ("sample_size", "sizes", "scale", "more"),
    [
        (8, False, None, {}),
        (16, False, 2.0, {"out_channels": None}),
        (128, True, 0.5, {"patch_size": 8}),
        (128, None, None, {"patch_size": 8}),
        (8, True, None, {}),
    ],
)
def test_an_imported_transformer_is_the_same_function(sample_size, sizes, scale, more, tmp_path):
    changes = {"sample_size": sample_size, "use_additional_conditions": sizes, "interpolation_scale": scale, **more}
    theirs = transformer(**changes)
    theirs.save_pretrained(tmp_path / "transformer")
    model = load.load(tmp_path / "transformer", "cpu")
    x, t = torch.randn(2, 4, sample_size, sample_size), torch.tensor([7.0, 900.0])
    text, mask = torch.randn(2, 6, 32), torch.arange(6) < torch.tensor([[6], [3]])
    size = torch.tensor([[512.0, 640.0, 0.8], [256.0, 256.0, 1.0]])
    has_sizes = sizes or sample_size == 128
    conditions = {"resolution": size[:, :2], "aspect_ratio": size[:, 2:]} if has_sizes else {}
    expected = theirs(
        x, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=t,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None} | conditions,
    ).sample  # fmt: skip
    got = model.network(x, t, Condition(text=text, text_mask=mask, size=size if has_sizes else None))
    assert error(got, expected) < 1e-5
    config = model.config
    assert config.network.null_fields == ()
    assert config.text is None  # the channels are not those of the published encoder
    assert (config.sampling.sampler.kind, config.sampling.null_text) == ("dpm++", "empty")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_type": "ada_norm"}, "_class_name|norm_type"),
        ({"attention_type": "gated"}, "attention_type"),
        ({"norm_eps": 1e-5}, "norm_eps is 1e-05; expected 1e-06"),
        ({"cross_attention_dim": 96}, "cross_attention_dim is 96; expected the width, 48"),
        ({"caption_channels": ...}, "caption_channels"),
        ({"num_layers": 1}, "unexpected transformer_blocks.1.attn1.to_k.bias"),
        ({"num_layers": 3}, "missing transformer_blocks.2.attn1.to_k.bias"),
        ({"caption_channels": 16}, r"y_proj.fc1.weight is \(48, 32\), expected \(48, 16\)"),
    ],
)
def test_settings_that_are_not_supported_are_named(changes, words, tmp_path):
    transformer().save_pretrained(tmp_path / "transformer")
    edit(tmp_path / "transformer" / "config.json", **changes)
    with pytest.raises(TesseraError, match=words):
        load.load(tmp_path / "transformer", "cpu")


def test_other_pipelines_are_named(make_folder):
    folder = make_folder()
    edit(folder / "model_index.json", _class_name="PixArtAlphaControlnetPipeline")
    with pytest.raises(TesseraError, match="is diffusers' PixArtAlphaControlnetPipeline; Tessera reads PixArtAlpha"):
        load.load(folder, "cpu")


def test_folders_of_old_versions_are_read(make_folder):
    """Another class name, and a null embedding that later versions ignore: both rules can be chosen."""
    folder = make_folder()
    edit(folder / "transformer" / "config.json", _class_name="Transformer2DModel", num_vector_embeds=None)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    null = torch.randn(120, 32)
    save_file({**load_file(path), "caption_projection.y_embedding": null}, path)
    model = load.load(folder, "cpu")
    assert torch.equal(model.network.y_embedder.y_embedding, null)
    assert model.config.sampling.null_text == "empty"
    images = [
        generation.generate(model, seeds=[0], prompts=["a cat"], num_steps=2, null_text=rule)
        for rule in ("empty", "embedding")
    ]
    assert (images[0] != images[1]).any()


# The pipeline


SCHEDULERS = [
    ("DPMSolverMultistepScheduler", {}),  # of the published folders
    ("DDIMScheduler", {"clip_sample": False}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
]


@torch.no_grad()
@pytest.mark.parametrize("pipeline", [ALPHA, SIGMA])
@pytest.mark.parametrize(("kind", "settings"), SCHEDULERS)
def test_the_pipeline_generates_the_same_image(make_folder, pipeline, kind, settings):
    folder = make_folder(pipeline, getattr(diffusers, kind)(**settings))
    theirs = getattr(diffusers, pipeline).from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    seeds = torch.tensor([3, 4])
    noise = sampling_noise(seeds, torch.zeros(2, dtype=torch.int64), (4, 8, 8))
    options = {"num_inference_steps": 7, "guidance_scale": 3.0, "use_resolution_binning": False, "output_type": "np"}
    expected = theirs(PROMPTS, latents=noise, clean_caption=False, **options).images
    model = load.load(folder, "cpu")
    assert model.config.provenance.not_converted is None
    assert model.config.text.max_tokens == {ALPHA: 120, SIGMA: 300}[pipeline]
    assert (model.config.sampling.num_steps, model.config.sampling.guidance_scale) == (20, 4.5)
    changes = {"num_steps": 7, "guidance_scale": 3.0}
    images = generation.generate(model, seeds=seeds.tolist(), prompts=PROMPTS, **changes)
    assert abs(images / 255 - expected).max() < 0.6 / 255
    *_, last = generation.generate_steps(model, seeds=seeds.tolist(), prompts=PROMPTS, **changes)
    options["output_type"] = "latent"
    latents = theirs(PROMPTS, latents=noise, clean_caption=False, **options).images
    assert error(last.x, latents) < 1e-5
    # The default is to clean captions: where bs4 and ftfy are not installed it is the same, and for these prompts, too.
    assert torch.equal(theirs(PROMPTS, latents=noise, **options).images, latents)
    # The image depends on the prompt, its letters but not their case, the guidance and the rule of the empty prompt.
    assert error(_latents(model, ["A RED cat on a blue DOG. ", "a dog"], **changes), latents) < 1e-5
    assert error(_latents(model, ["a red cat on a blue cat.", "a dog"], **changes), latents) > 1e-3
    assert error(_latents(model, PROMPTS, **changes | {"guidance_scale": 1.0}), latents) > 1e-3
    negative = theirs(PROMPTS, latents=noise, negative_prompt="a red dog", **options).images
    assert error(_latents(model, PROMPTS, negative_prompts=["a red dog"], **changes), negative) < 1e-5
    assert error(negative, latents) > 1e-3
    with pytest.raises(TesseraError, match="has no null text embedding: set null_text=empty"):
        _latents(model, PROMPTS, null_text="embedding", **changes)


def _latents(model, prompts, **options):
    *_, last = generation.generate_steps(model, seeds=[3, 4], prompts=prompts, **options)
    return last.x


# Export


def weights_of(folder):
    return {
        str(path.relative_to(folder)): (set(tensors := load_file(path)), tensors)
        for path in sorted(folder.rglob("*.safetensors"))
    }


@torch.no_grad()
@pytest.mark.parametrize("pipeline", [ALPHA, SIGMA])
@pytest.mark.parametrize(("kind", "settings"), SCHEDULERS[:2])
def test_a_folder_through_a_bundle_is_written_with_the_same_weights(make_folder, tmp_path, pipeline, kind, settings):
    folder = make_folder(pipeline, getattr(diffusers, kind)(**settings))
    load.convert(folder, tmp_path / "bundle", "bundle")
    shutil.move(folder, tmp_path / "before")  # the bundle has all parts
    message = load.convert(tmp_path / "bundle", tmp_path / "again", "diffusers")
    assert message == (
        f"wrote {tmp_path / 'again'}: a folder of diffusers' {pipeline}, with exact weights\n"
        "sample there with use_resolution_binning=False: it has no bins for sample_size 8"
    )
    before, after = weights_of(tmp_path / "before"), weights_of(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, (keys, tensors) in before.items():
        assert keys == after[name][0]
        assert all(torch.equal(tensors[key], after[name][1][key]) for key in keys)
    model = load.load(tmp_path / "again", "cpu")
    original = load.load(tmp_path / "before", "cpu")
    assert model.config.network == original.config.network
    assert model.config.diffusion == original.config.diffusion
    assert model.config.sampling == original.config.sampling
    theirs = getattr(diffusers, pipeline).from_pretrained(tmp_path / "again")
    theirs.set_progress_bar_config(disable=True)
    noise = sampling_noise(torch.tensor([3, 4]), torch.zeros(2, dtype=torch.int64), (4, 8, 8))
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, "use_resolution_binning": False}
    expected = theirs(PROMPTS, latents=noise, output_type="latent", **options).images
    assert (
        error(_latents(load.load(tmp_path / "bundle", "cpu"), PROMPTS, num_steps=5, guidance_scale=3.0), expected)
        < 1e-5
    )


def test_an_official_model_becomes_a_folder_and_back(make_folder, tmp_path):
    """Only the null embedding has no place there, and the message reports it."""
    torch.manual_seed(0)
    source = load.load(make_folder(), "cpu")
    network = source.config.network.model_copy(update={"null_embedding": True}).build()
    network.load_state_dict(source.network.state_dict(), strict=False)
    official.write(bundle.Model(source.config, network), tmp_path / "one.pth")
    model = load.load(tmp_path / "one.pth", "cpu", num_heads=4, codec=source.config.codec)
    assert model.config.sampling.null_text == "embedding"
    assert model.config.text is None
    message = load.convert(model, tmp_path / "folder", "diffusers")
    assert "the null embedding has no place there" in message
    assert "there is no text_encoder/" in message
    read = load.load(tmp_path / "folder", "cpu")
    before, after = model.network.state_dict(), read.network.state_dict()
    assert before.keys() - after.keys() == {"y_embedder.y_embedding"}
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert (model.config.sampling.sampler.kind, read.config.sampling.sampler.kind) == ("dpm++", "dpm++")


@pytest.mark.parametrize(
    ("network", "config", "words"),
    [
        ({"block": {"kind": "pixart", "qk_norm": True}}, {}, "block is pixart qk_norm=True"),
        ({"block": {"kind": "pixart", "compressed_layers": [1]}}, {}, r"compressed_layers=\(1,\)"),
        ({"block": {"kind": "pixart", "window_layers": [1], "window_size": 2}}, {}, "window_size=2"),
        ({"mlp_ratio": 2}, {}, "mlp_ratio is 2; only 4"),
        ({"vocabulary_size": 300, "text_channels": 0}, {"text": None}, "embeds ids of a vocabulary"),
        ({"out_channels": 4}, {"diffusion": {"kind": "flow"}}, "only Gaussian is supported"),
    ],
)
def test_what_diffusers_has_no_place_for_is_an_error(make_folder, tmp_path, network, config, words):
    source = load.load(make_folder(), "cpu").config
    data = source.model_dump() | config
    data["network"] |= network
    changed = bundle.BundleConfig.model_validate(data)
    with pytest.raises(TesseraError, match=words):
        load.convert(bundle.Model(changed, changed.network.build()), tmp_path / "new", "diffusers")
    assert not (tmp_path / "new").exists()


def test_the_command_line(make_folder, tmp_path):
    """tessera sample FOLDER --prompt, and tessera convert."""
    folder = make_folder()
    for words in (
        f"sample {folder} --seeds 0-1 num_steps=2 --out {tmp_path / 'one'} --prompt",
        f"convert {folder} {tmp_path / 'bundle'} --to bundle",
        f"sample {tmp_path / 'bundle'} --seeds 0-1 num_steps=2 --out {tmp_path / 'two'} --prompt",
    ):
        prompt = ["a red cat"] if words.endswith("--prompt") else []
        result = CliRunner().invoke(app, [*words.split(), *prompt])
        assert result.exit_code == 0, result.output
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).glob("*.png")} for name in ("one", "two")]
    assert len(files[0]) == 3
    assert files[0].keys() == files[1].keys()


def test_another_text_encoder(make_folder, tmp_path, make_model):
    """An official file of other channels than T5's has no encoder: --text-encoder names one, and a bundle keeps it."""
    folder = make_folder()
    source = load.load(folder, "cpu")
    network = source.config.network.model_copy(update={"null_embedding": True}).build()
    official.write(bundle.Model(source.config, network), tmp_path / "one.pth")
    words = f"convert {tmp_path / 'one.pth'} {tmp_path / 'bundle'} --to bundle --num-heads 4 --text-encoder {folder}"
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 0, result.output
    shutil.rmtree(folder)
    model = load.load(tmp_path / "bundle", "cpu")
    assert model.config.text.max_tokens == 120
    assert model.text_encoder.encode(["a cat"])[0].shape == (1, 3, 32)
    same = load.load(tmp_path / "bundle", "cpu", text_encoder=str(tmp_path / "bundle" / "text")).config.text
    assert same == model.config.text
    assert load.load(tmp_path / "bundle", "cpu", text_encoder="minilm").config.text.kind == "minilm"
    with pytest.raises(TesseraError, match="is not conditioned on text: leave out the text encoder"):
        load.convert(make_model(), tmp_path / "new", "bundle", text_encoder="minilm")
