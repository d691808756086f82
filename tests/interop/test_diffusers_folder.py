"""Transformers of diffusers as networks: each class against diffusers' own pipeline, and there and back."""

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from tessera import generation, train
from tessera.acceleration.activation_checkpointing import checkpoint_activations
from tessera.cli import app
from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.interop import load
from tessera.models import DiffusersConfig
from tessera.models.diffusers_classes import CLASSES, pack, unpack
from tessera.monitoring.health import instrument
from tessera.sampling import sampling_noise
from tessera.training.recipe import read_recipe
from tessera.training.run import build_run

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("diffusers_pipelines.py"))))
diffusers.utils.logging.disable_progress_bar()

PROMPTS, NEGATIVE, STEPS = ["a red cat on the mat", "a dog"], "blue", 4
PACKED = {"FluxTransformer2DModel", "ChromaTransformer2DModel", "QwenImageTransformer2DModel"}
# The pipeline of PRX guides one prompt at a time; that of QwenImage rescales what is guided.
ONE_PROMPT, UNGUIDED = {"PRXTransformer2DModel"}, {"QwenImageTransformer2DModel"}


def pipeline(folder, name):
    theirs = getattr(diffusers, CLASSES[name].pipeline).from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def their_latents(name, noise):
    """Our noise as the pipeline takes it."""
    if name in PACKED:
        return pack(noise)
    if name == "CogVideoXTransformer3DModel":
        return noise.transpose(1, 2)
    return noise.flatten(2).transpose(1, 2) if name == "LTXVideoTransformer3DModel" else noise


def test_every_class_has_a_tiny_pipeline():
    assert set(tiny.PIPELINES) == set(CLASSES)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_pipeline_generates_the_same(folders, name, tmp_path):
    """Same noise, prompts, negative prompts, steps: equal pixels. Written back: equal weights."""
    folder = folders(name)
    theirs, model = pipeline(folder, name), load.load(folder, "cpu")
    network = model.config.network
    prompts = PROMPTS[:1] if name in ONE_PROMPT else PROMPTS
    seeds = torch.tensor([3, 4])[: len(prompts)]
    scale = 1.0 if name in UNGUIDED else 3.0
    size = tiny.SIZES.get(name, network.input_size)
    noise = sampling_noise(seeds, torch.zeros_like(seeds), (network.in_channels, *size))
    pixels = tuple(side * model.codec.factor for side in size[-2:])
    options = {"height": pixels[0], "width": pixels[1], "num_inference_steps": STEPS, "guidance_scale": scale}
    if len(size) == 3:
        options["num_frames"] = (size[0] - 1) * model.codec.frame_factor + 1
        pixels = options["num_frames"], *pixels
    options |= {"negative_prompt": [NEGATIVE] * len(prompts), "output_type": "np"} | tiny.OPTIONS.get(name, {})
    if "frames" in options:  # its name in the pipeline of SANA-Video
        options["frames"] = options.pop("num_frames")
    if "video_length" in options:  # that of Latte
        options["video_length"] = options.pop("num_frames")
    output = theirs(prompts, latents=their_latents(name, noise), **options)
    expected = output.frames if len(size) == 3 else output.images
    negative = {"negative_prompts": [NEGATIVE]} if scale != 1 else {}
    settings = {"num_steps": STEPS, "guidance_scale": scale, "size": pixels}
    *_, last = generation.generate_steps(model, seeds=seeds.tolist(), prompts=prompts, **settings, **negative)
    images = (model.codec.decode(last.x) / 2 + 0.5).clamp(0, 1).movedim(1, -1).numpy()
    assert images.shape == expected.shape
    assert np.abs(images - expected).max() < 1e-4
    assert expected.std() > 0.05  # it is not saturated
    text, mask = model.text_encoder.encode(prompts)
    counts = [len(ids) for ids in model.text_encoder.tokenize(prompts)]
    assert max(counts) <= text.shape[1] <= model.text_encoder.max_tokens
    assert CLASSES[name].is_masked or (mask.all() and set(counts) == {text.shape[1]})
    # The image depends on the prompt and the weights are diffusers' own, under its names.
    *_, other = generation.generate_steps(model, seeds=seeds.tolist(), prompts=["a blue mat"], **settings, **negative)
    assert (last.x - other.x).abs().max() > 1e-4
    target = tmp_path / "written"
    assert "exact weights" in load.convert(model, target, "diffusers")
    written = pipeline(target, name)
    for part in ("transformer", "vae"):
        state = getattr(theirs, part).state_dict()
        assert {key: value.shape for key, value in getattr(written, part).state_dict().items()} == {
            key: value.shape for key, value in state.items()
        }
        assert all(torch.equal(value, state[key]) for key, value in getattr(written, part).state_dict().items())
    again = load.load(target, "cpu").config
    assert again.network == network
    assert again.sampling.timestep_spacing == model.config.sampling.timestep_spacing
    assert sum(block is not None for block in model.network.blocks) >= 2
    assert any(key.endswith("weight") for key, _ in model.network.named_parameters())


@torch.no_grad()
def test_the_network_is_the_class_called_directly(folders):
    model = load.load(folders("SD3Transformer2DModel"), "cpu")
    theirs = diffusers.SD3Transformer2DModel.from_pretrained(folders("SD3Transformer2DModel"), subfolder="transformer")
    generator = torch.Generator().manual_seed(0)
    x, tokens = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 7, 40)))
    pooled, t = torch.randn(2, 40, generator=generator), torch.tensor([10.0, 900.0])
    expected = theirs(x, tokens, pooled, t, return_dict=False)[0]
    text = torch.cat((pooled[:, None], tokens), dim=1)
    condition = Condition(text=text, text_mask=torch.ones(2, 8, dtype=torch.bool))
    assert torch.equal(model.network(x, t, condition), expected)
    mask = torch.arange(8) < torch.tensor([[8], [5]])
    with pytest.raises(ValueError, match="all rows need the same number of tokens"):
        model.network(x, t, Condition(text=text, text_mask=mask))
    with pytest.raises(ValueError, match=r"expected \[2, M, 40\]"):
        model.network(x, t, Condition(text=text[..., :8]))
    with pytest.raises(ValueError, match="needs text"):
        model.network(x, t, Condition())
    with pytest.raises(ValueError, match="not multiples of 2"):
        model.network(x[..., :7], t, condition)


@torch.no_grad()
def test_lumina_predicts_the_other_way_and_with_the_other_time(folders):
    name = "Lumina2Transformer2DModel"
    model = load.load(folders(name), "cpu")
    theirs = diffusers.Lumina2Transformer2DModel.from_pretrained(folders(name), subfolder="transformer")
    x, tokens = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    mask = torch.ones(1, 5, dtype=torch.bool)
    t = model.diffusion.model_time(torch.tensor([0.25]))
    assert t.tolist() == [0.75]
    expected = -theirs(x, t, tokens, mask, return_dict=False)[0]
    assert torch.equal(model.network(x, t, Condition(text=tokens, text_mask=mask)), expected)


def test_packing_is_undone():
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(unpack(pack(x), (4, 6)), x)
    assert torch.equal(pack(x)[:, 1], x[:, :, :2, 2:4].flatten(1))


@torch.no_grad()
def test_a_transformer_alone(folders):
    """Its texts are tokens, and its codec that of the published model."""
    folder = folders("FluxTransformer2DModel")
    alone, whole = load.load(folder / "transformer", "cpu"), load.load(folder, "cpu")
    assert alone.config.text is None
    assert alone.config.codec.source == "black-forest-labs/FLUX.1-dev"
    text, _ = whole.text_encoder.encode(["a red cat"])
    alone = load.load(folder / "transformer", "cpu", codec=str(folder))
    images = [
        generation.generate(model, seeds=[0], num_steps=2, size=16, condition=condition)
        for model, condition in ((whole, {"text": ["a red cat"]}), (alone, {"text": [text[0]]}))
    ]
    # The whole pipeline has a dynamic shift: with the same grid they are the same.
    assert images[0].shape == images[1].shape == (1, 16, 16, 3)
    settings = {"timestep_spacing": whole.config.sampling.timestep_spacing}
    same = generation.generate(alone, seeds=[0], num_steps=2, size=16, condition={"text": [text[0]]}, **settings)
    assert (same == images[0]).all()


def edit(path, **changes):
    data = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("transformer/config.json", {"_class_name": "OmniGenTransformer2DModel"}, "FluxTransformer2DModel, Hunyuan"),
        ("model_index.json", {"_class_name": "WanImageToVideoPipeline"}, "Tessera reads WanPipeline"),
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "has two transformers"),
        ("model_index.json", {"expand_timesteps": True}, "expand_timesteps True is not supported"),
        ("transformer/config.json", {"image_dim": 32}, "with image_dim 32 is not supported"),
        ("transformer/config.json", {"num_layers": 3}, "missing transformer.blocks.2"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "is a DDIMScheduler; expected FlowMatch"),
    ],
)
def test_what_is_not_supported_is_named(folders, tmp_path, file, changes, words):
    folder = shutil.copytree(folders("WanTransformer3DModel"), tmp_path / "copy")
    edit(folder / file, **changes)
    with pytest.raises(TesseraError, match=words):
        load.load(folder, "cpu")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"class_name": "FluxTransformer"}, "did you mean 'FluxTransformer2DModel'"),
        ({"class_name": "SD3Transformer2DModel", "settings": {"depth": 3}}, "unknown setting 'depth'"),
        ({"class_name": "SD3Transformer2DModel", "in_channels": 3}, "in_channels is 3, and this SD3.* has 16"),
        ({"class_name": "SD3Transformer2DModel", "options": {"guidance": 3}}, "unknown option 'guidance'"),
    ],
)
def test_settings_of_a_network_are_checked(settings, words):
    with pytest.raises(ValueError, match=words):
        DiffusersConfig(**settings)


def test_sizes_follow_from_the_class():
    config = DiffusersConfig(class_name="FluxTransformer2DModel", settings={"joint_attention_dim": 64})
    assert (config.in_channels, config.input_size, config.text_channels, config.text_tokens) == (
        16,
        (128, 128),
        768,
        513,
    )
    assert config.model_fields_set == {"class_name", "settings"}
    assert DiffusersConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "Lumina2Transformer2DModel", "WanTransformer3DModel"])
def test_multiply_adds_are_those_of_a_forward_pass(folders, name):
    model = load.load(folders(name), "cpu")
    config = model.config.network.model_copy(update={"text_tokens": 9})
    model.network.config = config
    size = (2, 4, 4) if config.is_temporal else (8, 8)
    condition = Condition.example(("text", "text_mask"), 1, config)
    # The counter knows no fused attention of a CPU.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.network(torch.zeros(1, config.in_channels, *size), torch.zeros(1), condition)
    assert model.network.macs(size) == counter.get_total_flops() // 2 > 10_000


def test_long_prompts_are_cut_only_on_request(folders):
    encoder = load.load(folders("SD3Transformer2DModel"), "cpu").text_encoder
    fits = "cat " * 254  # with a start token and an end token; CLIP takes less, as in the pipeline
    assert encoder.encode([fits])[0].shape == (1, encoder.max_tokens, 40)
    with pytest.raises(TesseraError, match="StableDiffusion3Pipeline takes at most"):
        encoder.encode([fits + "dog"])
    assert torch.equal(encoder.encode([fits + "dog dog"], cut=True)[0], encoder.encode([fits + "dog"], cut=True)[0])


def test_activation_checkpointing_and_health_probes(folders):
    """Blocks of diffusers have other arguments and outputs than ours."""
    model = load.load(folders("FluxTransformer2DModel"), "cpu")
    network = model.network
    text, mask = model.text_encoder.encode(["a cat"])
    x, t, condition = torch.randn(1, 4, 4, 4), torch.tensor([0.5]), Condition(text=text, text_mask=mask)
    gradients = []
    for mode in ("none", "selective", "blocks"):
        checkpoint_activations(network, mode)
        network.zero_grad()
        network(x, t, condition).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert all(torch.equal(first, other) for each in gradients[1:] for first, other in zip(gradients[0], each))
    with instrument(network) as statistics, torch.no_grad():
        network(x, t, condition)
    assert len(network.blocks) == len(statistics["activations"]) == len(statistics["attention_logits"]) == 4
    assert all(value.isfinite() for name in ("activations", "attention_logits") for value in statistics[name])


@pytest.mark.run
@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "WanTransformer3DModel"])
def test_full_fine_tuning(folders, name, tmp_path):
    """Two steps change every matrix; the run is loaded, and written as a folder that diffusers loads."""
    recipe = {
        "run_dir": str(tmp_path / "run"),
        "data": {"kind": "shapes", "count": 8},
        "training": {"init_from": str(folders(name)), "steps": 2, "global_batch_size": 4, "device": "cpu"}
        | {"condition_dropout": 0.5, "sample_seeds": 1, "sample_every": 100, "tensorboard": False}
        | {"sample_prompts": ["a dog"], "activation_checkpointing": "blocks"},
        "sampling": {"num_steps": 1, "null_text": "empty", "guidance_scale": 2.0},
    }
    model = load.load(train(recipe), "cpu")
    before = load.load(folders(name), "cpu").network.state_dict()
    state = model.network.state_dict()
    # Norms near 1 change by less than float32 resolves in two steps of the EMA; SD3's last block has unused queries.
    matrices = [key for key, weight in model.network.named_parameters() if weight.ndim > 1 and "add_q_proj" not in key]
    assert all((state[key] != before[key]).any() for key in matrices)
    assert model.config.network.input_size == (32 // model.codec.factor,) * 2
    assert "exact weights" in load.convert(model, tmp_path / "written", "diffusers")
    written = pipeline(tmp_path / "written", name).transformer.state_dict()
    assert {f"transformer.{key}" for key in written} == set(state)
    assert all(torch.equal(value, state[f"transformer.{key}"]) for key, value in written.items())


def test_the_command_line(folders, tmp_path):
    folder = str(folders("PRXTransformer2DModel"))
    result = CliRunner().invoke(app, ["info", folder])
    assert result.exit_code == 0, result.output
    assert "PRXTransformer2DModel of diffusers" in result.output
    target = tmp_path / "image.png"
    words = ["sample", folder, "--prompt", "a cat", "--size", "16", "num_steps=2", "--out", str(target)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert target.exists()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("SanaTransformer2DModel", "DPMSolverMultistepScheduler"),  # those of the published folders
        ("WanTransformer3DModel", "UniPCMultistepScheduler"),
    ],
)
def test_flow_matching_with_other_schedulers(folders, tmp_path, name, kind):
    """Their times of the network are whole thousandths."""
    folder = shutil.copytree(folders(name), tmp_path / "copy")
    theirs = pipeline(folder, name)
    settings = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    theirs.scheduler = getattr(diffusers, kind)(**settings)
    theirs.scheduler.save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", kind])
    model = load.load(folder, "cpu")
    assert model.config.provenance.not_converted is None
    size = tiny.SIZES[name]
    noise = sampling_noise(torch.tensor([3]), torch.zeros(1, dtype=torch.int64), (4, *size))
    pixels = tuple(side * model.codec.factor for side in size[-2:])
    options = {"height": pixels[0], "width": pixels[1], "num_inference_steps": 6, "guidance_scale": 2.0}
    if len(size) == 3:
        options["num_frames"] = (size[0] - 1) * model.codec.frame_factor + 1
        pixels = options["num_frames"], *pixels
    options |= {"output_type": "latent", "negative_prompt": NEGATIVE} | tiny.OPTIONS.get(name, {})
    output = theirs(PROMPTS[0], latents=noise, **options)
    expected = output.frames if len(size) == 3 else output.images
    settings = {"num_steps": 6, "guidance_scale": 2.0, "size": pixels, "negative_prompts": [NEGATIVE]}
    *_, last = generation.generate_steps(model, seeds=[3], prompts=PROMPTS[:1], **settings)
    assert (last.x - expected).abs().max() < 1e-4 * expected.abs().max()
    load.convert(model, tmp_path / "written", "diffusers")
    again = load.load(tmp_path / "written", "cpu").config
    assert (again.sampling, again.diffusion) == (model.config.sampling, model.config.diffusion)


def test_the_empty_text_of_training_has_no_instruction(folders, tmp_path):
    """SANA's pipeline adds an instruction to prompts, and none to negative prompts."""
    folder = folders("SanaTransformer2DModel")
    encoder = load.load(folder, "cpu").text_encoder
    (prompt, _), (negative, mask) = encoder.encode([""]), encoder.encode_negative([""])
    assert prompt.shape[1] > negative.shape[1] == int(mask.sum())
    recipe = read_recipe(
        {
            "run_dir": str(tmp_path),
            "data": {"kind": "shapes", "count": 4},
            "training": {"init_from": str(folder), "global_batch_size": 4, "device": "cpu", "condition_dropout": 0.5},
        }
    )
    empty = build_run(recipe).objective.empty_text
    assert torch.equal(empty.text, negative)


def test_tables_follow_the_weights_to_their_device(folders):
    """Wan has tables of positions that no file holds; the only other device of every machine is meta."""
    network = load.load(folders("WanTransformer3DModel"), "cpu").network
    stored = network.state_dict()
    assert {name for name, _ in network.named_buffers()} - stored.keys()
    network.load_state_dict({name: value.to("meta") for name, value in stored.items()}, assign=True)
    assert all(each.is_meta for each in (*network.parameters(), *network.buffers()))


@torch.no_grad()
def test_latte_takes_the_frames_that_it_has_positions_for(folders):
    name = "LatteTransformer3DModel"
    model = load.load(folders(name), "cpu")
    theirs = diffusers.LatteTransformer3DModel.from_pretrained(folders(name), subfolder="transformer")
    generator = torch.Generator().manual_seed(0)
    tokens, t = torch.randn(2, 7, 32, generator=generator), torch.tensor([10.0, 900.0])
    condition = Condition(text=tokens, text_mask=torch.ones(2, 7, dtype=torch.bool))
    for frames in (1, 3):
        x = torch.randn(2, 4, frames, 8, 8, generator=generator)
        expected = theirs(x, t, tokens, return_dict=False)[0][:, :4]
        torch.testing.assert_close(model.network(x, t, condition), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="takes 1 or 3 frames, not 2"):
        model.network(x[:, :, :2], t, condition)
    with pytest.raises(TesseraError, match="takes 1 or 3 frames, not 4"):
        generation.generate(model, prompts=["a dog"], size=(4, 16, 16))
    frame = np.zeros((1, 16, 16, 3), np.uint8)
    with pytest.raises(TesseraError, match="has one time"):
        generation.generate(model, prompts=["a dog"], size=(3, 16, 16), given_frames=frame, given_indices=[0])
