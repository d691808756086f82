"""diffusers' folders, against diffusers' own classes, with random weights, in both directions."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tessera import bundle, sampling
from tessera.conditioning import NULL_LABEL, Condition
from tessera.diffusion.gaussian import GaussianDiffusionConfig
from tessera.errors import TesseraError
from tessera.interop import diffusers as interop
from tessera.interop import official
from tessera.layers.positions import sincos_grid
from tessera.sampling import SamplingConfig
from tessera.sampling.denoiser import Denoiser
from tessera.sampling.timesteps import timestep_grid
from tessera.settings import validate

diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()

THEIRS = {"timestep_freq_divisor": 127, "mlp_norm_eps": 1e-5, "in_channels": 4, "out_channels": 8}
PAPER = {"prediction": "epsilon"}
PIXELS = {"kind": "pixels"}


@pytest.fixture
def make_theirs(make_model, autoencoder_folder):
    """Our model of a network that diffusers can hold exactly, with a tiny autoencoder."""

    def make(network=None, diffusion=None, **changes):
        codec = {"kind": "autoencoder-kl", "source": str(autoencoder_folder)}
        network = THEIRS | (network or {})
        if network["in_channels"] != 4:
            codec = {"kind": "pixels", "channels": network["in_channels"]}
        names = tuple(f"animal {i}" for i in range(network.get("num_classes", 3)))
        return make_model(network, PAPER | (diffusion or {}), codec, **{"class_names": names, **changes})

    return make


def transformer(**changes):
    """diffusers' network with random weights, none of them zero."""
    config = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "in_channels": 4}
    config |= {"out_channels": 8, "num_embeds_ada_norm": 5, **changes}
    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(**config).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    first = network.transformer_blocks[0].norm1.emb
    for block in network.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first.state_dict())
    return network


def inputs(network, rows: int = 6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, network.in_channels, *network.input_size, generator=generator)
    t = torch.tensor([0, 1, 20, 333, 980, 999])[:rows]
    label = torch.randint(network.num_classes, (rows,), generator=generator)
    label[1] = NULL_LABEL
    return x, t, label


def max_difference(ours, theirs) -> float:
    """Largest relative L2 distance of a row; theirs is a network of diffusers."""
    x, t, label = inputs(ours.config)
    with torch.no_grad():
        one = ours(x, t.float(), Condition(label=label))
        class_labels = torch.where(label < 0, ours.config.num_classes, label)
        two = theirs(x, timestep=t, class_labels=class_labels).sample
    assert two.flatten(1).norm(dim=1).min() > 0.1  # the outputs are not all near zero
    return float(((one - two).flatten(1).norm(dim=1) / two.flatten(1).norm(dim=1)).max())


def same_weights(one, two) -> bool:
    before, after = one.network.state_dict(), two.network.state_dict()
    return list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)


def read_error(folder, **options) -> str:
    with pytest.raises(TesseraError) as caught:
        interop.read(folder, **options)
    return str(caught.value)


def edit(path, **changes):
    data = json.loads(path.read_text(encoding="utf-8")) | changes
    data = {name: value for name, value in data.items() if value is not ...}
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.fixture
def exported(make_theirs, tmp_path):
    interop.write(make_theirs(), tmp_path / "exported")
    return tmp_path / "exported"


# The network


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_eps": 1e-6, "out_channels": None, "num_layers": 3},
        {"in_channels": 3, "out_channels": 3, "patch_size": 4, "sample_size": 16},
        {"sample_size": 64, "patch_size": 8},
        {"sample_size": 128, "patch_size": 8},  # where diffusers' other networks scale the positions
    ],
)
def test_an_imported_network_is_the_same_function(tmp_path, changes):
    theirs = transformer(**changes)
    theirs.save_pretrained(tmp_path / "dit")
    read = interop.read(tmp_path / "dit")
    assert max_difference(read.network, theirs) < 1e-6
    assert torch.allclose(read.network.pos_embed, theirs.pos_embed.pos_embed, rtol=0, atol=1e-7)


def test_a_wrong_divisor_or_eps_is_detected(tmp_path):
    """The test above would not detect them if the networks hardly depended on them."""
    theirs = transformer()
    theirs.save_pretrained(tmp_path / "dit")
    read = interop.read(tmp_path / "dit")
    for change, least in (({"timestep_freq_divisor": 128}, 1e-3), ({"mlp_norm_eps": 1e-6}, 3e-6)):
        wrong = read.config.network.model_copy(update=change).build().eval()
        wrong.load_state_dict(read.network.state_dict())
        assert max_difference(wrong, theirs) > least


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mlp_norm_eps": 1e-6, "out_channels": 4, "depth": 1},
        {"in_channels": 3, "out_channels": 3, "patch_size": 4, "num_classes": 7},
    ],
)
def test_an_exported_network_is_the_same_function(make_theirs, tmp_path, changes):
    variance = "learned" if changes.get("out_channels", 8) == 8 else "posterior"
    model = make_theirs(changes, {"variance": variance})
    assert "exact" in interop.write(model, tmp_path / "pipe")
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "pipe", subfolder="transformer")
    assert max_difference(model.network, theirs.eval()) < 1e-6


def test_weights_are_bit_identical_through_every_format(make_theirs, tmp_path):
    model = make_theirs()
    bundle.save(model, tmp_path / "one")
    first = bundle.load(tmp_path / "one")
    official.write(first, tmp_path / "two.pt", approximate=True)
    second = official.read(tmp_path / "two.pt", num_heads=2, codec=model.config.codec)
    bundle.save(second, tmp_path / "three")
    interop.write(bundle.load(tmp_path / "three"), tmp_path / "four", approximate=True)
    third = interop.read(tmp_path / "four")
    bundle.save(third, tmp_path / "five")
    for converted in (first, second, third, bundle.load(tmp_path / "five")):
        assert same_weights(converted, model)


@pytest.mark.parametrize("zero", [False, True])
def test_an_export_is_imported_completely(make_theirs, tmp_path, zero):
    process = {"schedule": "cosine", "prediction": "v", "num_timesteps": 100, "zero_terminal_snr": zero}
    model = make_theirs({"num_classes": 4}, process)
    interop.write(model, tmp_path / "pipe")
    read = interop.read(tmp_path / "pipe")
    assert same_weights(read, model)
    assert read.config.network == model.config.network
    assert read.config.diffusion == model.config.diffusion
    assert read.config.class_names == model.config.class_names
    assert read.config.codec.source == str((tmp_path / "pipe" / "vae").resolve())
    assert read.config.sampling.model_dump()["sampler"]["kind"] == "ddim"
    assert (read.config.sampling.num_steps, read.config.sampling.timestep_spacing.kind) == (50, "leading")
    assert (read.config.sampling.guidance_scale, read.config.sampling.guidance_channels) == (4.0, "all")
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(read.codec.decode(latents), model.codec.decode(latents))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe"]


# The pipeline


def sampled(model, latents, label, guidance, steps):
    """Tessera's DDIM from these latents, with the settings of an import."""
    condition = Condition(label=torch.tensor([label]))
    denoise = Denoiser(model.network, model.diffusion, condition, guidance, model.config.sampling.guidance_channels)
    config = model.config.sampling
    states = sampling.sample_loop(
        config.sampler,
        denoise,
        latents,
        timestep_grid(config.timestep_spacing, steps, model.diffusion),
        lambda: latents,
    )
    with torch.no_grad():
        return list(states)[-1].x


@pytest.mark.parametrize(
    ("classes", "guidance", "diffusion"),
    [
        (3, 1.0, {}),
        (1000, 4.0, {}),
        (1000, 1.5, {"schedule": "cosine", "prediction": "v"}),
        (1000, 1.5, {"prediction": "v", "zero_terminal_snr": True}),
        (3, 1.0, {"prediction": "x0", "num_timesteps": 100}),
    ],
)
def test_diffusers_pipeline_generates_the_same_image(make_theirs, tmp_path, classes, guidance, diffusion):
    model = make_theirs({"num_classes": classes}, diffusion)
    message = interop.write(model, tmp_path / "pipe")
    assert ("guidance_scale=1" in message) == (classes != 1000)
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "pipe")
    assert pipeline.get_label_ids(["animal 2"]) == [2]
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        [2],
        guidance_scale=guidance,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
        return_dict=False,
    )[0]
    read = interop.read(tmp_path / "pipe")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    ours = (read.codec.decode(sampled(read, noise, 2, guidance, 10)) / 2 + 0.5).clamp(0, 1)
    assert image.std() > 0.01  # not a constant image
    assert torch.allclose(image, ours, rtol=0, atol=2e-4)
    # The image depends on the seed, the class and the guidance.
    other = (read.codec.decode(sampled(read, noise, 1, guidance, 10)) / 2 + 0.5).clamp(0, 1)
    assert (image - other).abs().max() > 4e-4


@pytest.mark.parametrize(
    "process",
    [
        {},
        {"num_timesteps": 250},
        {"schedule": {"kind": "linear", "start": 2e-4, "end": 0.01}},
        {"schedule": "cosine"},
        {"schedule": {"kind": "cosine", "offset": 0.02}},  # which diffusers has no name for: written as a list
        {"num_timesteps": 10},  # whose last betas are clipped
        {"prediction": "v", "zero_terminal_snr": True},
        {"prediction": "x0", "zero_terminal_snr": True, "schedule": "cosine", "num_timesteps": 100},
        {"prediction": "v", "zero_terminal_snr": True, "num_timesteps": 10},
    ],
)
def test_diffusers_scheduler_has_the_alphas_of_the_process(make_theirs, tmp_path, process):
    model = make_theirs(None, process)
    interop.write(model, tmp_path / "pipe")
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path / "pipe", subfolder="scheduler")
    assert len(theirs.alphas_cumprod) == model.config.diffusion.num_timesteps
    zero = model.config.diffusion.zero_terminal_snr  # computed by differences in float32 there
    assert torch.allclose(
        theirs.alphas_cumprod.double(), model.diffusion.alpha_bar[1:], rtol=2e-4, atol=1e-6 if zero else 1e-9
    )
    assert bool(theirs.alphas_cumprod[-1] == 0) == zero


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"beta_start": 2e-4, "beta_end": 0.03, "prediction_type": "sample"},
        {"num_train_timesteps": 250, "beta_start": 4e-4, "beta_end": 0.08},
        {"trained_betas": torch.linspace(1e-4, 0.02, 1000).tolist()},
        {"trained_betas": torch.linspace(3e-4, 0.01, 1000).tolist(), "beta_schedule": "scaled_linear"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True, "prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
    ],
)
def test_the_process_has_the_alphas_of_diffusers_scheduler(exported, kind, settings):
    theirs = getattr(diffusers, kind)(**settings)
    shutil.rmtree(exported / "scheduler")
    theirs.save_pretrained(exported / "scheduler")
    read = interop.read(exported)
    zero = settings.get("rescale_betas_zero_snr", False)
    assert torch.allclose(
        theirs.alphas_cumprod.double(), read.diffusion.alpha_bar[1:], rtol=2e-4, atol=1e-6 if zero else 1e-9
    )
    assert read.config.diffusion.zero_terminal_snr == zero
    assert read.config.diffusion.prediction == interop.PREDICTIONS[settings.get("prediction_type", "epsilon")]
    assert read.config.diffusion.variance == "learned"
    solvers = {"DDPMScheduler": "ancestral", "DDIMScheduler": "ddim", "DPMSolverMultistepScheduler": "dpm++"}
    assert read.config.sampling.sampler.kind == solvers[kind]


def test_fixed_variance_and_spacing_are_those_of_the_scheduler(make_theirs, tmp_path):
    interop.write(make_theirs({"out_channels": 4}, {"variance": "posterior"}), tmp_path / "pipe")
    assert interop.read(tmp_path / "pipe").config.diffusion.variance == "posterior"
    path = tmp_path / "pipe" / "scheduler" / "scheduler_config.json"
    edit(path, _class_name="DDPMScheduler", variance_type="fixed_large", timestep_spacing="trailing")
    assert interop.read(tmp_path / "pipe").config.diffusion.variance == "beta"
    assert interop.read(tmp_path / "pipe").config.sampling.timestep_spacing.kind == "trailing"


def test_scheduler_settings_that_are_not_converted_are_recorded(exported):
    assert interop.read(exported).config.provenance.not_converted is None
    edit(exported / "scheduler" / "scheduler_config.json", clip_sample=..., steps_offset=1)
    not_converted = interop.read(exported).config.provenance.not_converted
    assert not_converted is None
    edit(exported / "scheduler" / "scheduler_config.json", timestep_spacing="linspace")
    assert (
        "timestep_spacing linspace: DDIMScheduler steps back" in interop.read(exported).config.provenance.not_converted
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"rescale_betas_zero_snr": True}, "zero_terminal_snr needs prediction v or x0"),
        ({"rescale_betas_zero_snr": "often"}, "rescale_betas_zero_snr"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "beta_schedule": ..., "trained_betas": ...}, "FlowMatch"),
        ({"trained_betas": [0.1] * 999 + [0.3]}, "neither linear nor the cosine"),
        ({"trained_betas": [0.1] * 3}, "3 betas"),
        ({"beta_start": "much"}, "beta_start"),
        ({"beta_start": 0}, "start"),
    ],
)
def test_unsupported_schedulers_are_named(exported, changes, named):
    edit(exported / "scheduler" / "scheduler_config.json", **changes)
    assert named in read_error(exported)


# Folders of other versions, and damage


def test_a_transformer_alone_gets_the_papers_process(exported):
    read = interop.read(exported / "transformer")
    assert read.config.diffusion == GaussianDiffusionConfig()
    assert read.config.codec.source == "stabilityai/sd-vae-ft-ema"
    assert read.config.class_names == ()
    assert read.config.provenance.not_converted is None


def test_folders_of_old_versions_are_read(make_theirs, exported):
    """As the first released folders: another class name, no norm_eps, pickled weights, several names per class."""
    folder = exported / "transformer"
    weights = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), folder / "diffusion_pytorch_model.bin")
    weights.unlink()
    edit(folder / "config.json", _class_name="Transformer2DModel", norm_eps=..., cross_attention_dim=None)
    edit(exported / "model_index.json", id2label={"0": "tench, Tinca tinca", "2": "crane"})
    read = interop.read(exported)
    assert same_weights(read, make_theirs())
    assert read.config.network.mlp_norm_eps == 1e-5
    assert read.config.class_names == ("tench, Tinca tinca", "1", "crane")


@pytest.mark.parametrize("pickled", [False, True])
def test_shards_are_read(make_theirs, exported, pickled):
    folder = exported / "transformer"
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    suffix, weight_map = ("bin" if pickled else "safetensors"), {}
    for i in range(3):
        file = f"diffusion_pytorch_model-{i}.{suffix}"
        part = dict(list(tensors.items())[i::3])
        torch.save(part, folder / file) if pickled else save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"diffusion_pytorch_model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert same_weights(interop.read(exported), make_theirs())
    (folder / f"diffusion_pytorch_model-1.{suffix}").unlink()
    assert f"diffusion_pytorch_model-1.{suffix} is missing" in read_error(exported)
    index.write_text(json.dumps({"weight_map": {"a": "../../secret"}}))
    assert "files beside it" in read_error(exported)


@pytest.mark.parametrize("shards", [False, True])
def test_a_variant_is_read_where_there_is_nothing_else(make_theirs, exported, shards):
    """As save_pretrained(variant="fp16") names the files of every part."""
    pipeline = diffusers.DiTPipeline.from_pretrained(exported)
    options = {"variant": "fp16", "safe_serialization": True} | ({"max_shard_size": "20kB"} if shards else {})
    shutil.rmtree(exported / "transformer")
    shutil.rmtree(exported / "vae")
    pipeline.transformer.save_pretrained(exported / "transformer", **options)
    pipeline.vae.save_pretrained(exported / "vae", variant="fp16")
    names = [path.name for path in (exported / "transformer").iterdir()]
    assert (len(names) > 3) == shards
    assert all("fp16" in name for name in names if name != "config.json")
    read = interop.read(exported)
    assert same_weights(read, make_theirs())
    assert read.config.provenance.converted_from == "diffusers folder exported (variant fp16)"
    latents = torch.randn(1, 4, 8, 8)
    assert torch.equal(read.codec.decode(latents), make_theirs().codec.decode(latents))


def test_wrappers_in_the_names_are_removed(make_theirs, exported):
    path = exported / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({f"module._orig_mod.{name}": tensor for name, tensor in load_file(path).items()}, path)
    assert same_weights(interop.read(exported), make_theirs())


def test_a_program_in_pickled_weights_is_refused(exported, tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "exploded"), "w")

    folder = exported / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"proj_out_1.bias": Bomb()}, folder / "diffusion_pytorch_model.bin")
    assert "is refused: it holds" in read_error(exported)
    assert not (tmp_path / "exploded").exists()


def test_embeddings_that_differ_from_block_to_block_are_refused(exported):
    path = exported / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    tensors[name][3] += 1e-3
    save_file(tensors, path)
    message = read_error(exported)
    assert f"{name} differs from transformer_blocks.0.norm1.emb.timestep_embedder.linear_2.bias (1 of 2" in message
    assert "training there unties them" in message
    assert "training.init_from" in message


def test_missing_and_unexpected_weights_have_diffusers_names(exported):
    path = exported / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["transformer_blocks.0.attn2.to_q.weight"] = tensors.pop("transformer_blocks.0.attn1.to_q.weight")
    save_file(tensors, path)
    assert "missing transformer_blocks.0.attn1.to_q.weight" in read_error(exported)
    assert "unexpected transformer_blocks.0.attn2.to_q.weight" in read_error(exported)
    tensors["transformer_blocks.0.attn1.to_q.weight"] = tensors.pop("transformer_blocks.0.attn2.to_q.weight")
    tensors["proj_out_1.bias"] = torch.zeros(7)
    save_file(tensors, path)
    assert "final_layer.adaLN_modulation.1.bias is (7,), expected (64,)" in read_error(exported)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"_class_name": "PixArtTransformer2DModel"}, "PixArtTransformer2DModel"),
        ({"norm_type": "ada_norm_single"}, "norm_type"),
        ({"activation_fn": "geglu"}, "activation_fn"),
        ({"attention_bias": False}, "attention_bias"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine"),
        ({"interpolation_scale": 2}, "interpolation_scale 2"),
        ({"sample_size": 9}, "patch_size 2 does not divide the size 9 x 9"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_layers": 3}, "missing transformer_blocks.2"),
    ],
)
def test_unsupported_networks_are_named(exported, changes, named):
    edit(exported / "transformer" / "config.json", **changes)
    assert named in read_error(exported)


@pytest.mark.parametrize("length", [0, 5, 1000])
def test_truncated_weights_are_one_clear_error(exported, length):
    path = exported / "transformer" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert f"{path} is damaged" in read_error(exported)


def test_missing_and_damaged_parts_are_named(exported):
    (exported / "scheduler" / "scheduler_config.json").rename(exported / "scheduler" / "moved.json")
    assert "scheduler_config.json" in read_error(exported)
    (exported / "scheduler" / "moved.json").rename(exported / "scheduler" / "scheduler_config.json")
    (exported / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert "holds no weights: expected diffusion_pytorch_model.safetensors" in read_error(exported)
    (exported / "transformer" / "config.json").write_text("{")
    assert f"cannot read {exported / 'transformer' / 'config.json'}" in read_error(exported)
    (exported / "transformer" / "config.json").write_text("[]")
    assert "expected an object" in read_error(exported)


def test_an_autoencoder_of_other_channels_is_refused(exported):
    edit(exported / "vae" / "config.json", latent_channels=16)
    assert "has 4 channels, but" in read_error(exported)
    assert interop.read(exported, codec="some/hub-id").config.codec.source == "some/hub-id"


# Export


@pytest.mark.parametrize(
    ("network", "named"),
    [
        ({"block": "adaln"}, "block is adaln"),
        ({"block": "adaln-single"}, "block is adaln-single"),
        ({"block": "rope-swiglu"}, "block is rope-swiglu"),
        ({"input_size": (8, 16)}, "8 x 16"),
        ({"mlp_ratio": 2.0}, "mlp_ratio is 2"),
        ({"num_classes": 0}, "unconditional"),
        ({"learn_null_class": False}, "learn_null_class is false"),
    ],
)
def test_unsupported_models_are_refused_by_name(make_theirs, tmp_path, network, named):
    with pytest.raises(TesseraError) as caught:
        interop.write(make_theirs(network, class_names=()), tmp_path / "pipe", approximate=True)
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2
    assert list(tmp_path.iterdir()) == []


def test_other_position_tables_are_refused(make_theirs, tmp_path):
    model = make_theirs()
    model.network.pos_embed.data += 0.01
    with pytest.raises(TesseraError, match="not the sin-cos table"):
        interop.write(model, tmp_path / "pipe")


def test_the_official_divisor_is_exported_only_as_an_approximation(make_theirs, tmp_path):
    model = make_theirs({"timestep_freq_divisor": 128, "mlp_norm_eps": 1e-6})
    with pytest.raises(TesseraError, match="approximate=True"):
        interop.write(model, tmp_path / "pipe")
    assert list(tmp_path.iterdir()) == []
    message = interop.write(model, tmp_path / "pipe", approximate=True)
    reported = float(re.search(r"differs by (\S+) \(relative", message)[1])
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "pipe", subfolder="transformer").eval()
    assert max_difference(model.network, theirs) / 5 < reported < max_difference(model.network, theirs) * 5
    assert reported > 1e-3
    # The import computes what diffusers computes, with the same weights.
    read = interop.read(tmp_path / "pipe")
    assert max_difference(read.network, theirs) < 1e-6
    assert same_weights(read, model)


def test_a_network_of_pixels_is_exported_without_an_autoencoder(make_theirs, tmp_path):
    model = make_theirs({"in_channels": 3, "out_channels": 6})
    assert "there is no vae/" in interop.write(model, tmp_path / "pipe")
    assert not (tmp_path / "pipe" / "vae").exists()
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "pipe", vae=None)
    assert max_difference(model.network, pipeline.transformer.eval()) < 1e-6
    read = interop.read(tmp_path / "pipe")
    assert read.config.codec.kind == "pixels"
    assert read.config.class_names == model.config.class_names


def test_an_autoencoder_with_a_shift_is_refused(make_theirs, autoencoder_folder, tmp_path):
    shutil.copytree(autoencoder_folder, tmp_path / "shifted")
    edit(tmp_path / "shifted" / "config.json", shift_factor=0.1)
    codec = {"kind": "autoencoder-kl", "source": str(tmp_path / "shifted")}
    model = make_theirs()
    model.config = model.config.model_copy(update={"codec": type(model.config.codec)(**codec)})
    with pytest.raises(TesseraError, match="ignores an autoencoder's shift_factor"):
        interop.write(model, tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()


@pytest.mark.parametrize("source", ["settings", "folder"])
def test_an_autoencoder_scaled_channel_by_channel_is_refused(make_theirs, autoencoder_folder, tmp_path, source):
    codec: dict = {"kind": "autoencoder-kl", "source": str(tmp_path / "each")}
    shutil.copytree(autoencoder_folder, tmp_path / "each")
    if source == "settings":
        codec |= {"scale": [1.0, 2.0, 3.0, 4.0]}
    else:
        edit(tmp_path / "each" / "config.json", latents_mean=[0.0] * 4, latents_std=[1.0, 2.0, 3.0, 4.0])
    model = make_theirs()
    model.config = model.config.model_copy(update={"codec": type(model.config.codec)(**codec)})
    with pytest.raises(TesseraError, match="channel by channel"):
        interop.write(model, tmp_path / "pipe")


def test_a_scale_of_the_settings_is_written(make_theirs, autoencoder_folder, tmp_path):
    codec = {"kind": "autoencoder-kl", "source": str(autoencoder_folder), "scale": 0.75}
    model = make_theirs()
    model.config = model.config.model_copy(update={"codec": type(model.config.codec)(**codec)})
    model.loaded_codec = None
    interop.write(model, tmp_path / "pipe")
    assert json.loads((tmp_path / "pipe" / "vae" / "config.json").read_text())["scaling_factor"] == 0.75


def test_nothing_is_overwritten(make_theirs, tmp_path):
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "mine").write_text("mine")
    with pytest.raises(TesseraError, match="exists already"):
        interop.write(make_theirs(), tmp_path / "pipe")
    assert [path.name for path in (tmp_path / "pipe").iterdir()] == ["mine"]


def test_every_tensor_is_mapped_once(make_theirs):
    model = make_theirs({"depth": 3})
    ours = [mapping.ours for mapping in interop.tensor_mappings(3)]
    assert sorted([*ours, "pos_embed"]) == sorted(model.network.state_dict())
    theirs = [name for mapping in interop.tensor_mappings(3) for name in mapping.theirs]
    assert sorted(theirs) == sorted(transformer(num_layers=3).state_dict())
    assert torch.equal(sincos_grid((4, 4), 32), model.network.pos_embed[0])


def test_a_written_folder_says_what_its_scheduler_replaces(make_theirs, tmp_path):
    def message(number: int, **sampling) -> str:
        model = make_theirs()
        model = dataclasses.replace(
            model, config=model.config.model_copy(update={"sampling": validate(SamplingConfig, sampling, "sampling")})
        )
        return interop.write(model, tmp_path / str(number))

    assert "scheduler is DDIM" not in message(1, timestep_spacing="leading")
    assert "timestep_spacing.kind was uniform, is leading" in message(2)
    text = message(3, sampler="dpm++", timestep_spacing="trailing")
    assert "samples otherwise than this model: sampler.kind was dpm++, is ddim" in text
    assert "timestep_spacing" not in text
    assert "sampler.eta was 0.5, is 0.0" in message(4, sampler={"kind": "ddim", "eta": 0.5}, timestep_spacing="leading")
