"""Bundles: read back bit for bit, written whole or not at all, and a clear error for every kind of damage."""

import errno
import json
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tessera import __version__, bundle, checkpoint_files, model_card
from tessera.errors import TesseraError
from tessera.generation import generate


@pytest.fixture
def saved(tiny_model, tmp_path):
    bundle.save(tiny_model, tmp_path / "cats")
    return tmp_path / "cats"


def load_error(folder) -> str:
    with pytest.raises(TesseraError) as caught:
        bundle.load(folder)
    return str(caught.value)


def edit(folder, change):
    """Apply a change to config.json."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(config)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


# Round trips


@pytest.mark.parametrize("block", ["in-context", "cross-attention", "adaln", "adaln-zero"])
@pytest.mark.parametrize("classes", [0, 3])
def test_a_model_is_read_back_bit_for_bit(make_model, tmp_path, block, classes):
    network = {"block": block, "num_classes": classes, "input_size": (4, 8)}
    model = make_model(network, {"schedule": "cosine", "prediction": "v"}, provenance={"steps": 7})
    bundle.save(model, tmp_path / "deep" / "cats")
    loaded = bundle.load(tmp_path / "deep" / "cats")
    assert loaded.config == model.config
    before, after = model.network.state_dict(), loaded.network.state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name])
        assert after[name].dtype == torch.float32
    assert not loaded.network.training
    requires_grad = {name: parameter.requires_grad for name, parameter in model.network.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in loaded.network.named_parameters()} == requires_grad
    assert bundle.weights_hash(loaded.network) == bundle.weights_hash(model.network)


def test_a_loaded_model_generates_the_same_images(tiny_model, saved):
    request = {"classes": ["dog", "emu"], "seeds": [1, 2], "guidance_scale": 2.0}
    assert (generate(bundle.load(saved), **request) == generate(tiny_model, **request)).all()


def test_the_files_of_a_bundle(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    assert (config["format"], config["tessera_version"]) == (2, __version__)
    assert config["class_names"] == ["cat", "dog", "emu"]
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")  # the header that hubs read
    assert "cat, dog, emu" in card
    assert f"{sum(tensor.numel() for tensor in load_file(saved / 'model.safetensors').values()):,}" in card


def test_weights_in_half_precision_are_read_as_float32(tiny_model, saved):
    tensors = load_file(saved / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, saved / "model.safetensors")
    loaded = bundle.load(saved).network.state_dict()
    for name, tensor in tiny_model.network.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor.bfloat16().float())


def test_the_hash_depends_on_every_weight_and_its_name(make_model):
    before = bundle.weights_hash(make_model().network)
    assert bundle.weights_hash(make_model().network) == before
    changed = make_model().network
    with torch.no_grad():
        changed.blocks[1].mlp.fc2.bias[-1] += 1e-6
    assert bundle.weights_hash(changed) != before
    swapped = make_model().network
    swapped.blocks = swapped.blocks[::-1]
    assert bundle.weights_hash(swapped) != before


@pytest.mark.parametrize(
    ("sampling", "summary"),
    [
        ({}, "ddim, 50 steps, uniform"),
        (
            {
                "sampler": {"kind": "dpm++", "order": 3},
                "num_steps": 9,
                "timestep_spacing": {"kind": "shifted", "shift": 2},
            },
            "dpm++, 9 steps, shifted, order 3, shift 2.0",
        ),
        (
            {
                "guidance_scale": 2,
                "guidance_interval": [0.2, 0.8],
                "guidance_schedule": "cosine",
                "guidance_channels": 3,
            },
            "ddim, 50 steps, uniform, guidance 2, guidance channels 3, guidance interval (0.2, 0.8), "
            "guidance schedule cosine",
        ),
        (
            {"guidance_rescale": 0.5, "caching": {"kind": "first-block", "threshold": 0.2}},
            "ddim, 50 steps, uniform, guidance rescale 0.5, caching first-block, threshold 0.2",
        ),
    ],
)
def test_the_sampling_summary_names_settings_that_are_not_defaults(make_model, sampling, summary):
    model = make_model(sampling=sampling)
    assert model_card.describe(model)["sampling"] == model.config.sampling.summary() == summary
    assert f"| sampling | {summary} |" in model_card.render(model)


def test_class_names_default_to_numbers(make_model):
    assert make_model(class_names=()).class_names == ["0", "1", "2"]
    assert make_model({"num_classes": 0}, class_names=()).class_names == []


# Writing


def test_an_existing_folder_is_refused_and_untouched(tiny_model, make_model, saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(TesseraError, match="cats exists already"):
        bundle.save(make_model(seed=1), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("Error: I/O error: No space left on device")],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_leaves_nothing(tiny_model, tmp_path, monkeypatch, error):
    def half_written(tensors, path, **_):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint_files, "save_file", half_written)
    with pytest.raises(TesseraError, match=r"cannot write .*cats: .*No space left on device"):
        bundle.save(tiny_model, tmp_path / "cats")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_with_the_last_file_leaves_nothing(tiny_model, tmp_path, monkeypatch):
    """The weights and the configuration are written by then."""

    def full(*_):
        assert (tmp_path / "cats.partial" / "model.safetensors").exists()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(model_card, "render", full)
    with pytest.raises(TesseraError, match="No space left on device"):
        bundle.save(tiny_model, tmp_path / "cats")
    assert list(tmp_path.iterdir()) == []


# Damage


def test_a_folder_that_is_not_there(tmp_path):
    assert "config.json" in load_error(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["{", "", "\x00"])
def test_invalid_json(saved, content):
    (saved / "config.json").write_text(content)
    assert "cannot read" in load_error(saved)
    assert "config.json" in load_error(saved)


def test_json_that_is_not_an_object(saved):
    (saved / "config.json").write_text("[]")
    assert "config.json holds list; expected an object" in load_error(saved)


def test_another_format(saved):
    edit(saved, lambda config: (config.update(format=1), config.pop("tessera_version")))
    message = load_error(saved)
    assert "has bundle format 1, written by Tessera 0.6.0 or earlier" in message
    assert "reads format 2: train it again, or let that version convert it" in message
    edit(saved, lambda config: config.update(format=3, tessera_version="9.1.0"))
    assert load_error(saved).endswith("install Tessera 9.1.0")


def test_a_misspelt_key(saved):
    edit(saved, lambda config: config["network"].update(hiden_size=32))
    assert "network: unknown key 'hiden_size'; did you mean 'hidden_size'?" in load_error(saved)


def test_a_missing_section(saved):
    edit(saved, lambda config: config.pop("diffusion"))
    assert "diffusion: Field required" in load_error(saved)


def test_weights_missing(saved):
    (saved / "model.safetensors").unlink()
    assert load_error(saved).endswith("model.safetensors is missing")


@pytest.mark.parametrize("length", [0, 4, 100, -1, -1000])
def test_weights_truncated(saved, length):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert "model.safetensors is damaged" in load_error(saved)


def test_weights_that_are_not_safetensors(saved):
    (saved / "model.safetensors").write_text("not a safetensors file, but long enough to look like one")
    assert "model.safetensors is damaged" in load_error(saved)


def test_missing_unexpected_and_misshapen_weights_are_listed(saved):
    tensors = load_file(saved / "model.safetensors")
    missing = tensors.pop("blocks.1.attn.qkv.bias")
    tensors["extra.weight"] = missing
    tensors["final_layer.linear.bias"] = torch.zeros(5)
    save_file(tensors, saved / "model.safetensors")
    message = load_error(saved)
    assert "cats holds another architecture" in message
    assert "missing blocks.1.attn.qkv.bias (96,)" in message
    assert "unexpected extra.weight (96,)" in message
    assert "final_layer.linear.bias is (5,), expected (8,)" in message


def test_a_long_list_of_differences_is_cut(saved):
    edit(saved, lambda config: config["network"].update(depth=4))
    message = load_error(saved)
    assert "missing blocks.2." in message
    assert "more" in message
    assert len(message.splitlines()) < 12


def test_a_network_can_be_built_after_loading_one_like_it(saved):
    """Loading builds the network on the meta device, which must not affect the next network."""
    config = bundle.load(saved).config.network
    assert torch.isfinite(config.build().pos_embed).all()


# Checkpoints of a run


def test_checkpoints_newest_first(tmp_path):
    for name in ("step-000000010", "step-000000200", "step-000000003", "step-000000300.partial", "best"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    names = [path.name for path in bundle.checkpoints(tmp_path)]
    assert names == ["step-000000200", "step-000000010", "step-000000003"]
