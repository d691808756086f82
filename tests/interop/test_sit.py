"""SiT's checkpoints, against an independent implementation of its network and ODE, in SiT's time (0 noise, 1 data)."""

import argparse
import math
import shlex
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from tessera import bundle, cli, generation
from tessera.conditioning import Condition
from tessera.diffusion import FlowMatchingConfig, GaussianDiffusionConfig
from tessera.errors import TesseraError
from tessera.interop import load
from tessera.models.dit import DiTConfig

HEADS, CLASSES = 2, 5


def sit_weights(randomise, **changes) -> dict[str, torch.Tensor]:
    """A random state dict with SiT's keys and shapes, which are DiT's."""
    network = {
        "input_size": (8, 8),
        "in_channels": 4,
        "out_channels": 8,
        "patch_size": 2,
        "hidden_size": 32,
        "num_heads": HEADS,
        "depth": 2,
        "num_classes": CLASSES,
    }
    config = DiTConfig.model_validate({**network, **changes})
    return randomise(config.build()).state_dict()


def velocity(w: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """SiT (Ma et al. 2024), from the paper and DiT's: w its state dict, x [B, C, H, W], t [B] of 0 .. 1, y [B]."""

    def linear(name, value):
        return functional.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(value, shift, scale):
        return functional.layer_norm(value, value.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    patch, width = w["x_embedder.proj.weight"].shape[-1], w["pos_embed"].shape[-1]
    batch, channels, height, image_width = x.shape
    tokens = functional.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch)
    tokens = tokens.flatten(2).mT + w["pos_embed"]
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = torch.cat((angles.cos(), angles.sin()), dim=1)
    time = linear("t_embedder.mlp.2", functional.silu(linear("t_embedder.mlp.0", time)))
    c = functional.silu(time + w["y_embedder.embedding_table.weight"][y])
    for i in range(2):
        block = f"blocks.{i}"
        parts = linear(f"{block}.adaLN_modulation.1", c).chunk(6, dim=1)
        qkv = linear(f"{block}.attn.qkv", norm(tokens, parts[0], parts[1]))
        q, k, v = qkv.view(batch, -1, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / math.sqrt(width // HEADS)).softmax(dim=-1)
        attended = (weights @ v).transpose(1, 2).flatten(2)
        tokens = tokens + parts[2][:, None] * linear(f"{block}.attn.proj", attended)
        hidden = functional.gelu(linear(f"{block}.mlp.fc1", norm(tokens, parts[3], parts[4])), approximate="tanh")
        tokens = tokens + parts[5][:, None] * linear(f"{block}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    output = linear("final_layer.linear", norm(tokens, shift, scale))
    output = output.view(batch, height // patch, image_width // patch, patch, patch, -1)
    output = output.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, image_width)
    return output[:, :channels]  # SiT discards the other half, where there is one


def ode(w, noise, label, steps, guidance=1.0, heun=False) -> torch.Tensor:
    """dx/dt = v from t = 0 to 1 by Euler's method or Heun's; guidance on three channels, as sample.py does."""

    def guided(x, t):
        v = velocity(w, x, torch.full((len(x),), t), label)
        if guidance != 1:
            uncond = velocity(w, x, torch.full((len(x),), t), torch.full_like(label, CLASSES))
            v[:, :3] = (1 - guidance) * uncond[:, :3] + guidance * v[:, :3]
        return v

    x = noise
    for step in range(steps):
        v = guided(x, step / steps)
        if heun and step < steps - 1:
            v = (v + guided(x + v / steps, (step + 1) / steps)) / 2
        x = x + v / steps
    return x


def saved(tensors, path):
    torch.save(tensors, path)
    return path


def load_error(*args, **options) -> str:
    with pytest.raises(TesseraError) as caught:
        load.load(*args, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def training_dict(tensors, **args) -> dict:
    wrong = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    arguments = {"path_type": "Linear", "prediction": "velocity", "loss_weight": None, "num_classes": CLASSES, **args}
    return {"model": wrong, "ema": tensors, "opt": {"state": {}}, "args": argparse.Namespace(**arguments)}


def first_and_last(model, label, **changes):
    states = [state.x for state in generation.generate_steps(model, label.tolist(), range(len(label)), **changes)]
    return states[0], states[-1]


# The network and its images


@pytest.mark.parametrize(
    "changes", [{}, {"out_channels": 4}, {"in_channels": 3, "out_channels": 6, "patch_size": 4, "input_size": (16, 16)}]
)
def test_the_network_is_sits_with_the_velocity_reversed(randomise, tmp_path, changes):
    tensors = sit_weights(randomise, **changes)
    model = load.load(saved(tensors, tmp_path / "a.pt"), "cpu", checkpoint_type="sit", num_heads=HEADS)
    config = model.config.network
    assert config.out_channels == config.in_channels
    x = torch.randn(6, config.in_channels, *config.input_size, generator=torch.Generator().manual_seed(1))
    t, label = torch.linspace(0, 1, 6), torch.tensor([0, 1, 2, 3, 4, -1])
    with torch.no_grad():
        ours = model.network(x, model.diffusion.model_time(t), Condition(label=label))
        expected = -velocity(tensors, x, 1 - t, torch.where(label < 0, CLASSES, label))
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 1), ("euler", 50), ("heun", 25)])
def test_the_image_is_that_of_sits_ode(randomise, tmp_path, guidance, sampler, steps):
    tensors = sit_weights(randomise)
    model = load.load(saved(tensors, tmp_path / "a.pt"), "cpu", checkpoint_type="sit", num_heads=HEADS)
    label = torch.tensor([3, 0])
    noise, ours = first_and_last(model, label, sampler=sampler, num_steps=steps, guidance_scale=guidance)
    with torch.no_grad():
        expected = ode(tensors, noise, label, steps, guidance, heun=sampler == "heun")
    assert (expected - noise).std() > 0.1  # the result is not the noise
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    # Read as a DiT, the same file generates something else.
    other = load.load(tmp_path / "a.pt", "cpu", checkpoint_type="dit", num_heads=HEADS)
    assert (first_and_last(other, label, sampler="ddim", num_steps=max(steps, 2))[1] - expected).std() > 0.1


def test_the_gvp_path_converges_to_the_same_image(randomise, tmp_path):
    """DDIM and Euler are two first-order methods for one ODE: their difference falls like 1 / steps."""
    tensors = sit_weights(randomise)
    model = load.load(saved(tensors, tmp_path / "a.pt"), "cpu", checkpoint_type="sit-gvp", num_heads=HEADS)
    assert model.config.diffusion.path == "gvp"
    label, differences = torch.tensor([3, 0]), []
    for steps in (25, 50, 100):
        noise, ours = first_and_last(model, label, sampler="ddim", num_steps=steps, guidance_scale=1.0)
        with torch.no_grad():
            differences.append(float((ours - ode(tensors, noise, label, steps)).norm() / ours.norm()))
    assert differences[0] > 1.6 * differences[1] > 2.5 * differences[2]
    assert differences[2] < 0.1


# What a file records, and what must be passed


def test_sits_process_and_sampling(randomise, tmp_path):
    config = load.load(
        saved(sit_weights(randomise), tmp_path / "a.pt"), "cpu", checkpoint_type="sit", num_heads=HEADS
    ).config
    assert config.diffusion == FlowMatchingConfig(network_times=(1, 0))
    sampling = config.sampling
    assert (sampling.sampler.kind, sampling.num_steps, sampling.timestep_spacing.kind) == ("heun", 125, "uniform")
    assert (sampling.guidance_scale, sampling.guidance_channels) == (4, 3)
    assert config.provenance.converted_from == "SiT checkpoint a.pt (state dict)"


@pytest.mark.parametrize(("path_type", "path"), [("Linear", "linear"), ("GVP", "gvp")])
def test_a_training_checkpoint_records_its_type(randomise, tmp_path, path_type, path):
    file = saved(training_dict(sit_weights(randomise), path_type=path_type), tmp_path / "a.pt")
    model = load.load(file, "cpu", num_heads=HEADS)
    assert model.config.diffusion == FlowMatchingConfig(network_times=(1, 0), path=path)
    assert model.config.provenance.converted_from == "SiT checkpoint a.pt (ema)"
    types = {"Linear": "sit", "GVP": "sit-gvp"}
    assert load.load(file, "cpu", num_heads=HEADS, checkpoint_type=types.pop(path_type)).config == model.config
    for other in ("dit", *types.values()):
        assert f"records that it is sit{'-gvp' if path == 'gvp' else ''}, not {other}" in load_error(
            file, "cpu", num_heads=HEADS, checkpoint_type=other
        )


def test_a_sit_that_predicts_noise_is_not_reversed(randomise, tmp_path):
    tensors = sit_weights(randomise)
    file = saved(training_dict(tensors, prediction="noise"), tmp_path / "a.pt")
    model = load.load(file, "cpu", num_heads=HEADS)
    assert (model.config.diffusion.prediction, model.config.diffusion.loss) == ("epsilon", "epsilon")
    x, t, label = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([0, 1])
    with torch.no_grad():
        ours = model.network(x, model.diffusion.model_time(t), Condition(label=label))
    torch.testing.assert_close(ours, velocity(tensors, x, 1 - t, label), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"path_type": "VP"}, "is a SiT with the VP path; Tessera supports Linear and GVP"),
        ({"prediction": "score"}, "predicts the score; Tessera supports velocity and noise"),
    ],
)
def test_an_unsupported_sit_is_named(randomise, tmp_path, args, message):
    assert message in load_error(
        saved(training_dict(sit_weights(randomise), **args), tmp_path / "a.pt"), "cpu", num_heads=HEADS
    )


def test_bare_weights_are_a_dit_unless_half_their_outputs_are_untrained(randomise, tmp_path):
    tensors = sit_weights(randomise)
    assert isinstance(
        load.load(saved(tensors, tmp_path / "a.pt"), "cpu", num_heads=HEADS).config.diffusion, GaussianDiffusionConfig
    )
    tensors["final_layer.linear.weight"].view(4, 8, 32)[:, 4:] = 0
    file = saved(tensors, tmp_path / "b.pt")
    assert "pass checkpoint_type='sit' (--checkpoint-type sit, in a recipe training.init_type), or 'dit'" in load_error(
        file, "cpu", num_heads=HEADS
    )
    assert load.load(file, "cpu", num_heads=HEADS, checkpoint_type="sit").config.diffusion.kind == "flow"
    assert load.load(file, "cpu", num_heads=HEADS, checkpoint_type="dit").config.diffusion.kind == "gaussian"
    tensors["final_layer.linear.weight"].zero_()  # a DiT before its first step
    assert load.load(saved(tensors, tmp_path / "c.pt"), "cpu", num_heads=HEADS).config.diffusion.kind == "gaussian"


def test_wrong_checkpoint_types_are_one_clear_error(randomise, tiny_model, tmp_path):
    file = saved(sit_weights(randomise), tmp_path / "a.pt")
    assert "unknown checkpoint type 'sitt'; did you mean 'sit'?" in load_error(
        file, "cpu", num_heads=HEADS, checkpoint_type="sitt"
    )
    bundle.save(tiny_model, tmp_path / "cats")
    message = load_error(tmp_path / "cats", "cpu", checkpoint_type="sit")
    assert "records what it was trained as (Gaussian, 1000 steps" in message
    assert "leave out --checkpoint-type" in message
    five = saved(sit_weights(randomise, out_channels=5), tmp_path / "odd.pt")
    assert "has 5 output channels for 4 inputs" in load_error(five, "cpu", num_heads=HEADS, checkpoint_type="sit")
    with pytest.raises(TesseraError, match="leave out --checkpoint-type"):
        load.convert(tiny_model, tmp_path / "new", "bundle", checkpoint_type="sit")
    assert not (tmp_path / "new").exists()


def test_missing_and_misshapen_weights_are_named(randomise, tmp_path):
    tensors = sit_weights(randomise)
    bias = tensors.pop("final_layer.linear.bias")
    options = {"device": "cpu", "num_heads": HEADS, "checkpoint_type": "sit"}
    with pytest.raises(TesseraError, match=r"missing final_layer\.linear\.bias \(16,\)"):
        load.load(saved(tensors, tmp_path / "a.pt"), **options)
    tensors["final_layer.linear.bias"] = bias
    tensors["final_layer.linear.weight"] = torch.cat((tensors["final_layer.linear.weight"], torch.ones(1, 32)))
    with pytest.raises(TesseraError, match=r"final_layer\.linear\.weight is \(17, 32\), expected \(16, 32\)"):
        load.load(saved(tensors, tmp_path / "b.pt"), **options)


# Conversion and the command line


def test_a_sit_in_safetensors_becomes_a_bundle_that_generates_the_same(randomise, tmp_path):
    save_file(sit_weights(randomise, in_channels=3, out_channels=6), tmp_path / "a.safetensors")
    model = load.load(tmp_path / "a.safetensors", "cpu", checkpoint_type="sit", num_heads=HEADS)
    load.convert(tmp_path / "a.safetensors", tmp_path / "sit", "bundle", checkpoint_type="sit", num_heads=HEADS)
    read = load.load(tmp_path / "sit", "cpu")
    assert read.config == model.config
    one, two = (generation.generate(each, [1], [7], num_steps=3) for each in (model, read))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(("to", "name"), [("official", "b.pt"), ("diffusers", "pipe")])
def test_formats_that_cannot_hold_a_flow_refuse_it(randomise, tmp_path, to, name):
    file = saved(sit_weights(randomise, in_channels=3, out_channels=6), tmp_path / "a.pt")
    with pytest.raises(TesseraError) as caught:
        load.convert(file, tmp_path / name, to, checkpoint_type="sit", num_heads=HEADS)
    assert "diffusion is flow, linear path, velocity prediction" in str(caught.value)
    assert not (tmp_path / name).exists()


def test_on_the_command_line(randomise, tmp_path, monkeypatch, capsys):
    def tessera(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tessera", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    file = saved(sit_weights(randomise, in_channels=3, out_channels=6), tmp_path / "a.pt")
    as_sit = ("--checkpoint-type", "sit", "--num-heads", HEADS)
    code, out, _ = tessera("info", file, *as_sit)
    assert code == 0
    assert "flow, linear path, velocity prediction" in out
    request = ("num_steps=3", "--classes", "1", "--seeds", "7")
    assert tessera("sample", file, *as_sit, *request, "--out", tmp_path / "one")[0] == 0
    code, out, _ = tessera("info", tmp_path / "one" / "class-1-seed-7.png")  # the command that reproduces it
    words = shlex.split(out, comments=True)
    assert words[words.index("--checkpoint-type") + 1] == "sit"
    assert tessera(*words[1:], "--out", tmp_path / "again")[0] == 0
    assert tessera("convert", file, tmp_path / "sit", "--to", "bundle", *as_sit)[0] == 0
    assert tessera("sample", tmp_path / "sit", *request, "--out", tmp_path / "two")[0] == 0
    first, *others = (
        np.asarray(Image.open(tmp_path / folder / "class-1-seed-7.png")) for folder in ("one", "again", "two")
    )
    assert all(np.array_equal(first, other) for other in others)
    code, _, err = tessera("sample", tmp_path / "sit", "--checkpoint-type", "sit", "--out", tmp_path / "three")
    assert code == 1
    assert "leave out --checkpoint-type" in err
    code, _, err = tessera("evaluate", tmp_path / "one", "--checkpoint-type", "sit")
    assert code == 1
    assert "--checkpoint-type" in err
