"""Official checkpoints: the architecture is inferred, and settings that the file cannot hold are reported."""

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
from tessera.interop.common import relative_difference
from tessera.models.dit import DiTConfig
from tessera.models.presets import NUM_HEADS_BY_WIDTH

PAPER = {"prediction": "epsilon"}


def state(model) -> dict:
    return {name: tensor.detach().clone() for name, tensor in model.network.state_dict().items()}


def saved(tensors, path):
    torch.save(tensors, path)
    return path


def read_error(path, **options) -> str:
    with pytest.raises(TesseraError) as caught:
        official.read(path, **options)
    return str(caught.value)


def same_weights(one, two) -> bool:
    before, after = one.network.state_dict(), two.network.state_dict()
    return list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)


# Inference of the architecture


@pytest.mark.parametrize("block", ["in-context", "cross-attention", "adaln", "adaln-zero"])
@pytest.mark.parametrize("classes", [0, 5])
def test_the_architecture_is_inferred_from_the_weights(make_model, tmp_path, block, classes):
    network = {"block": block, "num_classes": classes, "depth": 3, "patch_size": 4, "input_size": 16, "mlp_ratio": 2.0}
    model = make_model(network, PAPER)
    read = official.read(saved(state(model), tmp_path / "a.pt"), num_heads=2)
    assert read.config.network == model.config.network
    assert same_weights(read, model)


@pytest.mark.parametrize(("width", "heads"), NUM_HEADS_BY_WIDTH.items())
def test_the_papers_widths_determine_the_number_of_heads(width, heads):
    with torch.device("meta"):
        network = DiTConfig(hidden_size=width, num_heads=heads, depth=1, input_size=(8, 8)).build()
    tensors = {name: torch.empty(tensor.shape) for name, tensor in network.state_dict().items()}
    assert official.infer_config(tensors, "a.pt").num_heads == heads


def test_another_width_needs_the_heads(tiny_model, tmp_path):
    assert "width 32" in read_error(saved(state(tiny_model), tmp_path / "a.pt"))
    assert "pass num_heads (--num-heads)" in read_error(tmp_path / "a.pt")
    assert "heads 3" in read_error(tmp_path / "a.pt", num_heads=3)


def test_every_hidden_width_is_recovered():
    """The division is rounded; a product slightly too small would be truncated to one less."""
    for width in range(4, 200, 4):
        for hidden in range(1, 6 * width, 7):
            assert int(width * official._ratio(hidden, width)) == hidden


@pytest.mark.parametrize("size", [(8, 8), (4, 16), (16, 4), (2, 12)])
def test_the_position_table_determines_the_shape_of_the_grid(make_model, tmp_path, size):
    model = make_model({"input_size": size}, PAPER)  # 4 x 16 has as many patches as a square
    assert official.read(saved(state(model), tmp_path / "a.pt"), num_heads=2).config.network.input_size == size


def test_other_positions_are_a_square_or_need_a_size(make_model, tmp_path):
    tensors = state(make_model({"input_size": (4, 16)}, PAPER))
    tensors["pos_embed"] = torch.randn(tensors["pos_embed"].shape)
    path = saved(tensors, tmp_path / "a.pt")
    assert official.read(path, num_heads=2).config.network.input_size == (8, 8)
    read = official.read(path, num_heads=2, size=(4, 16))
    assert read.config.network.input_size == (4, 16)
    assert torch.equal(read.network.pos_embed, tensors["pos_embed"])
    assert "size 6 x 6 does not" in read_error(path, num_heads=2, size=6)
    tensors["pos_embed"] = tensors["pos_embed"][:, :12]
    assert "pass size=(height, width)" in read_error(saved(tensors, tmp_path / "b.pt"), num_heads=2)


def test_the_papers_process_and_the_official_sampling(make_model, tmp_path):
    read = official.read(saved(state(make_model(None, PAPER)), tmp_path / "a.pt"), num_heads=2)
    assert read.config.diffusion == GaussianDiffusionConfig()
    sampling = read.config.sampling
    assert (sampling.sampler.kind, sampling.num_steps, sampling.timestep_spacing.kind) == ("ancestral", 250, "uniform")
    assert (sampling.guidance_scale, sampling.guidance_channels) == (4.0, 3)


def test_a_plain_output_has_a_fixed_variance_and_no_classes_no_guidance(make_model, tmp_path):
    model = make_model({"out_channels": 1, "num_classes": 0}, PAPER | {"variance": "beta"})
    read = official.read(saved(state(model), tmp_path / "a.pt"), num_heads=2)
    assert read.config.diffusion.variance == "beta"
    assert read.config.sampling.guidance_scale == 1.0


def test_unsupported_numbers_of_outputs_are_refused(make_model, tmp_path):
    model = make_model({"out_channels": 3, "in_channels": 1})
    assert "3 output channels for 1 inputs" in read_error(saved(state(model), tmp_path / "a.pt"), num_heads=2)


# The codec


@pytest.mark.parametrize(
    ("channels", "codec"),
    [
        (1, {"kind": "pixels", "channels": 1}),
        (3, {"kind": "pixels", "channels": 3}),
        (4, {"kind": "autoencoder-kl", "source": "stabilityai/sd-vae-ft-ema"}),
    ],
)
def test_the_default_codec(make_model, tmp_path, channels, codec):
    model = make_model({"in_channels": channels, "out_channels": 2 * channels}, PAPER, {"kind": "pixels"})
    default = official.read(saved(state(model), tmp_path / "a.pt"), num_heads=2).config.codec
    assert default.model_dump().items() >= codec.items()


def test_a_codec_is_required_or_passed(make_model, tmp_path, autoencoder_folder):
    two = make_model({"in_channels": 2, "out_channels": 4}, PAPER, {"kind": "pixels"})
    assert "give --codec" in read_error(saved(state(two), tmp_path / "two.pt"), num_heads=2)
    assert "pixels have 1 (gray) or 3 (RGB)" in read_error(tmp_path / "two.pt", num_heads=2, codec="pixels")
    assert "has 2 channels, but" in read_error(tmp_path / "two.pt", num_heads=2, codec=str(autoencoder_folder))
    assert "no codec at ./nowhere" in read_error(tmp_path / "two.pt", num_heads=2, codec="./nowhere")
    assert "holds no codec" in read_error(tmp_path / "two.pt", num_heads=2, codec=str(tmp_path))
    four = saved(
        state(make_model({"in_channels": 4, "out_channels": 8}, PAPER, {"kind": "pixels"})), tmp_path / "four.pt"
    )
    read = official.read(four, num_heads=2, codec=str(autoencoder_folder))
    assert read.codec.latent_channels == 4
    assert official.read(four, num_heads=2, codec="some/hub-id").config.codec.source == "some/hub-id"


# The training script's dict


def training_dict(model, **args) -> dict:
    wrong = {name: torch.zeros_like(tensor) for name, tensor in state(model).items()}
    return {"model": wrong, "ema": state(model), "opt": {"state": {}}, "args": argparse.Namespace(**args)}


def test_the_ema_weights_of_a_training_checkpoint_are_used(make_model, tmp_path):
    model = make_model(None, PAPER)
    path = saved(training_dict(model, num_classes=3, vae="mse", results_dir="results"), tmp_path / "0400000.pt")
    read = official.read(path, num_heads=2)
    assert same_weights(read, model)
    assert (read.config.network.num_classes, read.config.network.learn_null_class) == (3, True)
    assert "0400000.pt (ema)" in read.config.provenance.converted_from


def test_the_args_select_the_autoencoder(make_model, tmp_path):
    model = make_model({"in_channels": 4, "out_channels": 8}, PAPER, {"kind": "pixels"})
    path = saved(training_dict(model, num_classes=3, vae="mse"), tmp_path / "a.pt")
    assert official.read(path, num_heads=2).config.codec.source == "stabilityai/sd-vae-ft-mse"


def test_the_args_determine_whether_there_is_a_null_class(make_model, tmp_path):
    model = make_model({"num_classes": 4, "learn_null_class": False}, PAPER)
    read = official.read(saved(training_dict(model, num_classes=4), tmp_path / "a.pt"), num_heads=2)
    assert (read.config.network.num_classes, read.config.network.learn_null_class) == (4, False)
    assert read.config.sampling.guidance_scale == 1.0
    assert "num_classes=7" in read_error(saved(training_dict(model, num_classes=7), tmp_path / "b.pt"), num_heads=2)


def test_weights_saved_from_a_wrapper_are_read(make_model, tmp_path):
    model = make_model(None, PAPER)
    wrapped = {f"module.{name}": tensor for name, tensor in state(model).items()}
    assert same_weights(official.read(saved(wrapped, tmp_path / "a.pt"), num_heads=2), model)


def test_half_precision_is_read_as_float32(make_model, tmp_path):
    halves = {name: tensor.half() for name, tensor in state(make_model(None, PAPER)).items()}
    read = official.read(saved(halves, tmp_path / "a.pt"), num_heads=2)
    assert {tensor.dtype for tensor in read.network.state_dict().values()} == {torch.float32}


def test_the_weights_do_not_depend_on_their_file(make_model, tmp_path):
    """A large file is memory-mapped while it is read."""
    model = make_model(None, PAPER)
    path = saved(state(model), tmp_path / "a.pt")
    read = official.read(path, num_heads=2)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert same_weights(read, model)


# Invalid files


class Bomb:
    """Runs a program when a careless reader unpickles it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", ["ema", "args"])
def test_a_program_in_a_pickle_is_refused_and_not_run(tiny_model, tmp_path, zipped, key):
    mark = tmp_path / "exploded"
    stored = training_dict(tiny_model) | {key: Bomb(mark)}
    torch.save(stored, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    message = read_error(tmp_path / "a.pt", num_heads=2)
    assert "is refused: it holds" in message
    assert "mkdir" in message
    assert not mark.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)  # the bomb is real
    assert mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_one_clear_error(tiny_model, tmp_path, zipped, fraction):
    path = tmp_path / "a.pt"
    torch.save(state(tiny_model), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    message = read_error(path, num_heads=2)
    assert message.startswith(f"{path} is damaged or not a PyTorch file: ")
    assert len(message.splitlines()) == 1


def test_a_file_that_is_not_a_checkpoint_is_one_clear_error(tmp_path):
    (tmp_path / "a.pt").write_text("hello")
    assert "is damaged or not a PyTorch file" in read_error(tmp_path / "a.pt")
    assert "is missing" in read_error(tmp_path / "none.pt")
    assert "holds no weights" in read_error(saved({"a": 1}, tmp_path / "b.pt"))
    assert "holds no weights" in read_error(saved(torch.ones(3), tmp_path / "c.pt"))
    message = read_error(saved({"conv.weight": torch.ones(3)}, tmp_path / "d.pt"))
    assert "is not a DiT" in message
    assert "first tensors are conv.weight" in message


def test_missing_and_unexpected_weights_are_named(tiny_model, tmp_path):
    tensors = state(tiny_model)
    tensors["blocks.1.attn.rel_pos"] = tensors.pop("blocks.1.attn.proj.weight")
    message = read_error(saved(tensors, tmp_path / "a.pt"), num_heads=2)
    assert "missing blocks.1.attn.proj.weight (32, 32)" in message
    assert "unexpected blocks.1.attn.rel_pos" in message
    del tensors["x_embedder.proj.weight"]
    assert "lacks x_embedder.proj.weight" in read_error(saved(tensors, tmp_path / "b.pt"), num_heads=2)


def test_another_number_of_modulation_vectors_is_named(tiny_model, tmp_path):
    tensors = state(tiny_model)
    tensors["blocks.0.adaLN_modulation.1.weight"] = torch.zeros(96, 32)
    assert "expected 192 rows (adaln-zero) or 128 (adaln)" in read_error(saved(tensors, tmp_path / "a.pt"), num_heads=2)


# Writing


@pytest.mark.parametrize("block", ["in-context", "cross-attention", "adaln", "adaln-zero"])
def test_a_written_file_is_read_back_bit_for_bit(make_model, tmp_path, block):
    model = make_model({"block": block, "input_size": (4, 8), "mlp_ratio": 2.7}, PAPER)
    message = official.write(model, tmp_path / "deep" / "a.pt")
    assert "num_heads=2" in message
    assert ("only Tessera reads" in message) == (block != "adaln-zero")
    read = official.read(tmp_path / "deep" / "a.pt", num_heads=2)
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
def test_other_blocks_are_refused(make_model, tmp_path, block, approximate):
    model = make_model({"block": block}, PAPER)
    with pytest.raises(TesseraError, match=f"has no {block} blocks.*convert to a bundle"):
        official.write(model, tmp_path / "a.pt", approximate)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TesseraError):  # nor are its weights read as another architecture
        official.read(saved(state(model), tmp_path / "a.pt"), num_heads=2)


def test_nothing_is_overwritten(make_model, tmp_path):
    (tmp_path / "a.pt").write_text("mine")
    with pytest.raises(TesseraError, match="exists already"):
        official.write(make_model(None, PAPER), tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_text() == "mine"
    with pytest.raises(TesseraError, match=re.escape(".pt or .pth")):
        official.write(make_model(None, PAPER), tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("network", "diffusion", "named"),
    [
        ({"timestep_freq_divisor": 127}, {}, "network.timestep_freq_divisor is 127; it would be read as 128"),
        ({"mlp_norm_eps": 1e-5}, {}, "network.mlp_norm_eps is 1e-05"),
        ({"learn_null_class": False}, {}, "network.learn_null_class is False"),
        ({}, {"schedule": "cosine"}, "diffusion.schedule"),
        ({}, {"num_timesteps": 100}, "diffusion.num_timesteps is 100, not 1000"),
        ({}, {"prediction": "v"}, "diffusion.prediction is 'v', not 'epsilon'"),
        ({"out_channels": 1}, {"variance": "posterior"}, "diffusion.variance is 'posterior', not 'beta'"),
    ],
)
def test_settings_that_the_file_cannot_hold_are_named(make_model, tmp_path, network, diffusion, named):
    model = make_model(network, PAPER | diffusion)
    with pytest.raises(TesseraError) as caught:
        official.write(model, tmp_path / "a.pt")
    assert named in str(caught.value)
    assert "approximate=True" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert named in official.write(model, tmp_path / "a.pt", approximate=True)


def test_the_initial_values_of_labels_are_no_setting_that_is_lost(make_model, tmp_path):
    official.write(make_model({"label_init_std": 1.0}, PAPER), tmp_path / "a.pt")
    assert (tmp_path / "a.pt").exists()


def test_the_difference_of_an_approximate_file_is_reported(make_model, tmp_path):
    model = make_model({"timestep_freq_divisor": 127}, PAPER)
    message = official.write(model, tmp_path / "a.pt", approximate=True)
    reported = float(re.search(r"differs by (\S+) \(relative", message)[1])
    read = official.read(tmp_path / "a.pt", num_heads=2)
    assert reported == pytest.approx(relative_difference(model.network, read.network), rel=1e-2)
    assert 0.001 < reported < 1
    same = official.write(make_model(None, PAPER | {"num_timesteps": 100}), tmp_path / "b.pt", approximate=True)
    assert "differs by 0 " in same  # the network is the same function; the process is lost


def test_a_file_is_the_same_after_a_round_trip_through_a_bundle(make_model, tmp_path):
    model = make_model(None, PAPER)
    path = saved(state(model), tmp_path / "a.pt")
    bundle.save(official.read(path, num_heads=2), tmp_path / "bundle")
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
