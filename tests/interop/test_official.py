"""Official checkpoints: everything is read off the tensors, and what a file cannot say is never lost in silence."""

import argparse
import os
import re

import pytest
import torch
from safetensors.torch import save_file

from tessera import bundle
from tessera.conditioning import Condition
from tessera.diffusion.gaussian import GaussianDiffusionConfig
from tessera.errors import TesseraError
from tessera.interop import official
from tessera.models.dit import DiTConfig
from tessera.models.presets import HEADS_OF_WIDTH

PAPER = {"prediction": "epsilon"}


def state(model) -> dict:
    return {name: tensor.detach().clone() for name, tensor in model.network.state_dict().items()}


def saved(tensors, path):
    torch.save(tensors, path)
    return path


def fault(path, **told) -> str:
    with pytest.raises(TesseraError) as caught:
        official.read(path, **told)
    return str(caught.value)


def same_weights(one, two) -> bool:
    before, after = one.network.state_dict(), two.network.state_dict()
    return list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)


# What is read off the tensors


@pytest.mark.parametrize("block", ["in-context", "cross-attention", "adaln", "adaln-zero"])
@pytest.mark.parametrize("classes", [0, 5])
def test_the_architecture_is_read_off_the_weights(make_model, tmp_path, block, classes):
    network = {"block": block, "num_classes": classes, "depth": 3, "patch_size": 4, "input_size": 16, "mlp_ratio": 2.0}
    model = make_model(network, PAPER)
    read = official.read(saved(state(model), tmp_path / "a.pt"), heads=2)
    assert read.config.network == model.config.network
    assert same_weights(read, model)


@pytest.mark.parametrize(("width", "heads"), HEADS_OF_WIDTH.items())
def test_the_papers_widths_tell_the_heads(width, heads):
    with torch.device("meta"):
        network = DiTConfig(hidden_size=width, num_heads=heads, depth=1, input_size=(8, 8)).build()
    tensors = {name: torch.empty(tensor.shape) for name, tensor in network.state_dict().items()}
    assert official.infer(tensors, "a.pt").num_heads == heads


def test_another_width_needs_the_heads(tiny_model, tmp_path):
    assert "width 32" in fault(saved(state(tiny_model), tmp_path / "a.pt"))
    assert "give heads= (--heads)" in fault(tmp_path / "a.pt")
    assert "width 32 is not divisible by heads 3" in fault(tmp_path / "a.pt", heads=3)


def test_every_hidden_width_comes_back():
    """The division is rounded, and a product a hair too small would be cut off to one less."""
    for width in range(4, 200, 4):
        for hidden in range(1, 6 * width, 7):
            assert int(width * official._ratio(hidden, width)) == hidden


@pytest.mark.parametrize("size", [(8, 8), (4, 16), (16, 4), (2, 12)])
def test_the_position_table_tells_the_shape_of_the_grid(make_model, tmp_path, size):
    model = make_model({"input_size": size}, PAPER)  # 4 x 16 has as many patches as a square
    assert official.read(saved(state(model), tmp_path / "a.pt"), heads=2).config.network.input_size == size


def test_other_positions_are_a_square_or_the_size_is_asked_for(make_model, tmp_path):
    tensors = state(make_model({"input_size": (4, 16)}, PAPER))
    tensors["pos_embed"] = torch.randn(tensors["pos_embed"].shape)
    path = saved(tensors, tmp_path / "a.pt")
    assert official.read(path, heads=2).config.network.input_size == (8, 8)
    read = official.read(path, heads=2, size=(4, 16))
    assert read.config.network.input_size == (4, 16)
    assert torch.equal(read.network.pos_embed, tensors["pos_embed"])
    assert "size 6 x 6 does not have as many" in fault(path, heads=2, size=6)
    tensors["pos_embed"] = tensors["pos_embed"][:, :12]
    assert "give size= (height, width)" in fault(saved(tensors, tmp_path / "b.pt"), heads=2)


def test_the_papers_process_and_the_official_sampling(make_model, tmp_path):
    read = official.read(saved(state(make_model(None, PAPER)), tmp_path / "a.pt"), heads=2)
    assert read.config.diffusion == GaussianDiffusionConfig()
    sampling = read.config.sampling
    assert (sampling.sampler.kind, sampling.num_steps, sampling.timestep_spacing.kind) == ("ancestral", 250, "uniform")
    assert (sampling.guidance_scale, sampling.guidance_channels) == (4.0, 3)


def test_a_plain_output_has_a_fixed_variance_and_no_classes_no_guidance(make_model, tmp_path):
    model = make_model({"out_channels": 1, "num_classes": 0}, PAPER | {"variance": "beta"})
    read = official.read(saved(state(model), tmp_path / "a.pt"), heads=2)
    assert read.config.diffusion.variance == "beta"
    assert read.config.sampling.guidance_scale == 1.0


def test_odd_outputs_are_refused(make_model, tmp_path):
    model = make_model({"out_channels": 3, "in_channels": 1})
    assert "3 raw output channels for 1 channels" in fault(saved(state(model), tmp_path / "a.pt"), heads=2)


# The codec


@pytest.mark.parametrize(
    ("channels", "codec"),
    [
        (1, {"kind": "pixels", "channels": 1}),
        (3, {"kind": "pixels", "channels": 3}),
        (4, {"kind": "autoencoder-kl", "source": "stabilityai/sd-vae-ft-ema"}),
    ],
)
def test_the_usual_codec(make_model, tmp_path, channels, codec):
    model = make_model({"in_channels": channels, "out_channels": 2 * channels}, PAPER, {"kind": "pixels"})
    found = official.read(saved(state(model), tmp_path / "a.pt"), heads=2).config.codec
    assert found.model_dump().items() >= codec.items()


def test_a_codec_is_asked_for_or_given(make_model, tmp_path, autoencoder_folder):
    two = make_model({"in_channels": 2, "out_channels": 4}, PAPER, {"kind": "pixels"})
    assert "give codec= (--codec)" in fault(saved(state(two), tmp_path / "two.pt"), heads=2)
    assert "pixels have 1 (grey) or 3 (RGB)" in fault(tmp_path / "two.pt", heads=2, codec="pixels")
    assert "sees 2 channels, but" in fault(tmp_path / "two.pt", heads=2, codec=str(autoencoder_folder))
    assert "no codec at ./nowhere" in fault(tmp_path / "two.pt", heads=2, codec="./nowhere")
    assert "holds no AutoencoderKL" in fault(tmp_path / "two.pt", heads=2, codec=str(tmp_path))
    four = saved(
        state(make_model({"in_channels": 4, "out_channels": 8}, PAPER, {"kind": "pixels"})), tmp_path / "four.pt"
    )
    read = official.read(four, heads=2, codec=str(autoencoder_folder))
    assert read.codec.latent_channels == 4
    assert official.read(four, heads=2, codec="some/hub-id").config.codec.source == "some/hub-id"


# The training script's dict


def training_dict(model, **args) -> dict:
    wrong = {name: torch.zeros_like(tensor) for name, tensor in state(model).items()}
    return {"model": wrong, "ema": state(model), "opt": {"state": {}}, "args": argparse.Namespace(**args)}


def test_the_training_scripts_ema_is_taken(make_model, tmp_path):
    model = make_model(None, PAPER)
    path = saved(training_dict(model, num_classes=3, vae="mse", results_dir="results"), tmp_path / "0400000.pt")
    read = official.read(path, heads=2)
    assert same_weights(read, model)
    assert (read.config.network.num_classes, read.config.network.learn_null_class) == (3, True)
    assert "0400000.pt (ema)" in read.config.origin["from"]


def test_the_args_say_which_autoencoder(make_model, tmp_path):
    model = make_model({"in_channels": 4, "out_channels": 8}, PAPER, {"kind": "pixels"})
    path = saved(training_dict(model, num_classes=3, vae="mse"), tmp_path / "a.pt")
    assert official.read(path, heads=2).config.codec.source == "stabilityai/sd-vae-ft-mse"


def test_the_args_say_whether_there_is_a_null_class(make_model, tmp_path):
    model = make_model({"num_classes": 4, "learn_null_class": False}, PAPER)
    read = official.read(saved(training_dict(model, num_classes=4), tmp_path / "a.pt"), heads=2)
    assert (read.config.network.num_classes, read.config.network.learn_null_class) == (4, False)
    assert read.config.sampling.guidance_scale == 1.0
    assert "num_classes=7" in fault(saved(training_dict(model, num_classes=7), tmp_path / "b.pt"), heads=2)


def test_weights_saved_out_of_a_wrapper_are_read(make_model, tmp_path):
    model = make_model(None, PAPER)
    wrapped = {f"module.{name}": tensor for name, tensor in state(model).items()}
    assert same_weights(official.read(saved(wrapped, tmp_path / "a.pt"), heads=2), model)


def test_half_precision_is_read_as_float32(make_model, tmp_path):
    halves = {name: tensor.half() for name, tensor in state(make_model(None, PAPER)).items()}
    read = official.read(saved(halves, tmp_path / "a.pt"), heads=2)
    assert {tensor.dtype for tensor in read.network.state_dict().values()} == {torch.float32}


def test_the_weights_outlive_their_file(make_model, tmp_path):
    """A large file is mapped while it is read; nothing may hang on it afterwards."""
    model = make_model(None, PAPER)
    path = saved(state(model), tmp_path / "a.pt")
    read = official.read(path, heads=2)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert same_weights(read, model)


# Files that are not as they must be


class Bomb:
    """Runs a program when a careless reader unpickles it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["ema", "args"])
def test_a_program_in_a_pickle_is_refused_and_not_run(tiny_model, tmp_path, zipped, place):
    mark = tmp_path / "exploded"
    stored = training_dict(tiny_model) | {place: Bomb(mark)}
    torch.save(stored, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    text = fault(tmp_path / "a.pt", heads=2)
    assert "is refused: it holds" in text
    assert "mkdir" in text
    assert not mark.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)  # the bomb is real
    assert mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_one_sentence(tiny_model, tmp_path, zipped, kept):
    path = tmp_path / "a.pt"
    torch.save(state(tiny_model), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    text = fault(path, heads=2)
    assert text.startswith(f"{path} is damaged or no PyTorch file: ")
    assert len(text.splitlines()) == 1


def test_what_is_no_checkpoint_is_one_sentence(tmp_path):
    (tmp_path / "a.pt").write_text("hello")
    assert "is damaged or no PyTorch file" in fault(tmp_path / "a.pt")
    assert "is missing" in fault(tmp_path / "none.pt")
    assert "holds no weights" in fault(saved({"a": 1}, tmp_path / "b.pt"))
    assert "holds no weights" in fault(saved(torch.ones(3), tmp_path / "c.pt"))
    text = fault(saved({"conv.weight": torch.ones(3)}, tmp_path / "d.pt"))
    assert "no weights of a DiT" in text
    assert "it begins with conv.weight" in text


def test_missing_and_unexpected_weights_are_named(tiny_model, tmp_path):
    tensors = state(tiny_model)
    tensors["blocks.1.attn.rel_pos"] = tensors.pop("blocks.1.attn.proj.weight")
    text = fault(saved(tensors, tmp_path / "a.pt"), heads=2)
    assert "missing blocks.1.attn.proj.weight (32, 32)" in text
    assert "unexpected blocks.1.attn.rel_pos" in text
    del tensors["x_embedder.proj.weight"]
    assert "lacks x_embedder.proj.weight" in fault(saved(tensors, tmp_path / "b.pt"), heads=2)


def test_another_steering_is_named(tiny_model, tmp_path):
    tensors = state(tiny_model)
    tensors["blocks.0.adaLN_modulation.1.weight"] = torch.zeros(96, 32)
    assert "expected 192 rows (adaln-zero) or 128 (adaln)" in fault(saved(tensors, tmp_path / "a.pt"), heads=2)


# Writing


@pytest.mark.parametrize("block", ["in-context", "cross-attention", "adaln", "adaln-zero"])
def test_what_is_written_is_read_back_to_the_bit(make_model, tmp_path, block):
    model = make_model({"block": block, "input_size": (4, 8), "mlp_ratio": 2.7}, PAPER)
    said = official.write(model, tmp_path / "deep" / "a.pt")
    assert "heads=2" in said
    assert ("only Tessera reads" in said) == (block != "adaln-zero")
    read = official.read(tmp_path / "deep" / "a.pt", heads=2)
    assert same_weights(read, model)
    assert read.config.network.input_size == (4, 8)
    x, t, label = torch.randn(2, 1, 4, 8), torch.tensor([3.0, 900.0]), Condition(label=torch.tensor([0, -1]))
    assert torch.equal(read.network(x, t, label), model.network(x, t, label))


def test_the_file_is_a_bare_state_dict_of_plain_tensors(make_model, tmp_path):
    model = make_model(None, PAPER)
    official.write(model, tmp_path / "a.pt")
    stored = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(stored) == list(model.network.state_dict())
    assert {type(tensor) for tensor in stored.values()} == {torch.Tensor}
    assert not any(tensor.requires_grad for tensor in stored.values())
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("block", ["adaln-single", "rope-swiglu"])
@pytest.mark.parametrize("approximate", [False, True])
def test_later_blocks_are_refused(make_model, tmp_path, block, approximate):
    model = make_model({"block": block}, PAPER)
    with pytest.raises(TesseraError, match=f"knows no {block} blocks.*convert to a bundle"):
        official.write(model, tmp_path / "a.pt", approximate)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TesseraError):  # nor is it taken for another, if its weights are saved by hand
        official.read(saved(state(model), tmp_path / "a.pt"), heads=2)


def test_nothing_is_overwritten(make_model, tmp_path):
    (tmp_path / "a.pt").write_text("mine")
    with pytest.raises(TesseraError, match="exists already"):
        official.write(make_model(None, PAPER), tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_text() == "mine"
    with pytest.raises(TesseraError, match=re.escape(".pt or .pth")):
        official.write(make_model(None, PAPER), tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("network", "process", "named"),
    [
        ({"timestep_freq_divisor": 127}, {}, "network.timestep_freq_divisor is 127; it would be read as 128"),
        ({"mlp_norm_eps": 1e-5}, {}, "network.mlp_norm_eps is 1e-05"),
        ({"learn_null_class": False}, {}, "network.learn_null_class is False"),
        ({}, {"schedule": "cosine"}, "process.schedule"),
        ({}, {"steps": 100}, "process.steps is 100, not 1000"),
        ({}, {"prediction": "v"}, "process.prediction is 'v', not 'epsilon'"),
        ({"outputs": 1}, {"variance": "posterior"}, "process.variance is 'posterior', not 'beta'"),
    ],
)
def test_what_the_file_cannot_say_is_refused_by_name(make_model, tmp_path, network, process, named):
    model = make_model(network, PAPER | process)
    with pytest.raises(TesseraError) as caught:
        official.write(model, tmp_path / "a.pt")
    assert named in str(caught.value)
    assert "approximate=True" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert named in official.write(model, tmp_path / "a.pt", approximate=True)


def test_an_approximate_file_says_by_how_much_it_differs(make_model, tmp_path):
    model = make_model({"timestep_freq_divisor": 127}, PAPER)
    said = official.write(model, tmp_path / "a.pt", approximate=True)
    told = float(re.search(r"differs by (\S+) \(relative", said)[1])
    read = official.read(tmp_path / "a.pt", heads=2)
    assert told == pytest.approx(official.difference(model.network, read.network), rel=1e-2)
    assert 0.001 < told < 1
    same = official.write(make_model(None, PAPER | {"steps": 100}), tmp_path / "b.pt", approximate=True)
    assert "differs by 0 " in same  # the weights are the same function; the process is lost


def test_a_released_file_becomes_a_bundle_and_comes_back(make_model, tmp_path):
    model = make_model(None, PAPER)
    path = saved(state(model), tmp_path / "a.pt")
    bundle.save(official.read(path, heads=2), tmp_path / "bundle")
    official.write(bundle.load(tmp_path / "bundle"), tmp_path / "b.pt")
    before, after = torch.load(path, weights_only=True), torch.load(tmp_path / "b.pt", weights_only=True)
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_state_dict_in_safetensors_is_read_like_the_pt_file(make_model, tmp_path):
    model = make_model({"hidden_size": 384, "num_heads": 6, "depth": 1}, PAPER)
    save_file(state(model), tmp_path / "a.safetensors")
    read = official.read(tmp_path / "a.safetensors")
    assert read.config.network == official.read(saved(state(model), tmp_path / "a.pt")).config.network
    assert same_weights(read, model)


@pytest.mark.parametrize("block", ["adaln-single", "rope-swiglu"])
@pytest.mark.parametrize("approximate", [False, True])
def test_later_designs_are_refused(make_model, tmp_path, block, approximate):
    with pytest.raises(TesseraError, match=f"knows no {block} blocks.*convert to a bundle"):
        official.write(make_model(network={"block": block}), tmp_path / "model.pt", approximate)
    assert not (tmp_path / "model.pt").exists()
