"""`load` for every format, `convert` between them, and one clear error for everything else."""

import shutil

import pytest
import torch

import tessera
from tessera import bundle
from tessera.errors import TesseraError
from tessera.interop import load

THEIRS = {"timestep_freq_divisor": 127, "mlp_norm_eps": 1e-5, "in_channels": 3, "out_channels": 6}
PAPER = {"prediction": "epsilon"}


def same_weights(one, two) -> bool:
    return bundle.weights_hash(one.network) == bundle.weights_hash(two.network)


def load_error(*args, **options) -> str:
    with pytest.raises(TesseraError) as caught:
        load.load(*args, **options)
    return str(caught.value)


def checkpoint(run, step, model):
    bundle.save(model, run / "checkpoints" / f"step-{step:09d}")


# Recognized formats


def test_load_is_public():
    assert tessera.load is load.load


def test_a_bundle(tiny_model, tmp_path, monkeypatch):
    bundle.save(tiny_model, tmp_path / "cats")
    for path in (tmp_path / "cats", str(tmp_path / "cats")):
        read = load.load(path, "cpu")
        assert read.config == tiny_model.config
        assert same_weights(read, tiny_model)
    monkeypatch.chdir(tmp_path)
    assert same_weights(load.load("cats", "cpu"), tiny_model)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert same_weights(load.load("~/cats", "cpu"), tiny_model)


def test_a_run_is_its_newest_checkpoint(make_model, tmp_path):
    for step in (900, 1000, 20):
        checkpoint(tmp_path / "run", step, make_model(seed=step))
    (tmp_path / "run" / "checkpoints" / "step-000002000.partial").mkdir()
    assert same_weights(load.load(tmp_path / "run", "cpu"), make_model(seed=1000))
    one = load.load(tmp_path / "run" / "checkpoints" / "step-000000020", "cpu")
    assert same_weights(one, make_model(seed=20))


@pytest.mark.parametrize("content", ["checkpoints", "recipe"])
def test_a_run_without_a_checkpoint_is_an_error(tmp_path, content):
    if content == "checkpoints":
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    else:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "recipe.yaml").write_text("steps: 3")
    assert "has no checkpoint yet" in load_error(tmp_path / "run")


@pytest.mark.parametrize("name", ["a.pt", "a.pth"])
def test_an_official_file(make_model, tmp_path, name):
    model = make_model(None, PAPER)
    torch.save(model.network.state_dict(), tmp_path / name)
    assert same_weights(load.load(tmp_path / name, "cpu", num_heads=2), model)
    assert "pass num_heads" in load_error(tmp_path / name)


def test_a_diffusers_folder_and_its_transformer_need_no_diffusers(make_model, tmp_path, monkeypatch):
    model = make_model(THEIRS, PAPER)
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    load.convert(model, tmp_path / "pipe", "diffusers")
    assert same_weights(load.load(tmp_path / "pipe", "cpu"), model)
    assert same_weights(load.load(tmp_path / "pipe" / "transformer", "cpu"), model)


def test_a_model_is_loaded_onto_a_device(tiny_model, tmp_path):
    bundle.save(tiny_model, tmp_path / "cats")
    assert load.load(tmp_path / "cats", torch.device("cpu")).device.type == "cpu"
    if not torch.cuda.is_available():
        assert "device 'cuda' is not available here" in load_error(tmp_path / "cats", "cuda")


def test_heads_and_size_must_match_the_source(tiny_model, tmp_path):
    bundle.save(tiny_model, tmp_path / "cats")
    load.load(tmp_path / "cats", "cpu", num_heads=2, size=8)
    load.load(tmp_path / "cats", "cpu", size=(8, 8))
    assert "has num_heads 2, not 4" in load_error(tmp_path / "cats", "cpu", num_heads=4)
    assert "has size (8, 8), not 16" in load_error(tmp_path / "cats", "cpu", size=16)


def test_another_codec_for_any_source(make_model, tmp_path, autoencoder_folder):
    model = make_model(
        {**THEIRS, "in_channels": 4, "out_channels": 8}, PAPER, {"kind": "autoencoder-kl", "source": "some/hub-id"}
    )
    checkpoint(tmp_path / "run", 5, model)
    folder = str(autoencoder_folder)
    load.convert(model, tmp_path / "pipe", "diffusers", codec=folder)
    load.convert(model, tmp_path / "a.pt", "official", approximate=True)
    bundle.save(model, tmp_path / "bundle")
    for source in ("run", "pipe", "a.pt", "bundle"):
        read = load.load(tmp_path / source, "cpu", num_heads=2, codec=folder)
        assert read.config.codec.source == str(autoencoder_folder.resolve())
        assert read.codec.latent_channels == 4
        assert same_weights(read, model)
        assert "pixels have 1" in load_error(tmp_path / source, "cpu", num_heads=2, codec="pixels")
    assert model.config.codec.source == "some/hub-id"


# Everything else


@pytest.mark.parametrize("name", ["none", "none.pt", "empty", "notes.txt", "notes"])
def test_everything_else_is_one_error_that_lists_what_is_accepted(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").write_text("{}")
    message = load_error(tmp_path / name)
    assert str(tmp_path / name) in message
    assert "expected a bundle" in message
    assert "official checkpoint (.pt, .pth, .ckpt, .bin, .safetensors" in message
    assert len(message.splitlines()) == 1


def test_a_damaged_file_of_a_bundle_is_named(tiny_model, tmp_path):
    bundle.save(tiny_model, tmp_path / "cats")
    weights = tmp_path / "cats" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert f"{weights} is damaged" in load_error(tmp_path / "cats")
    weights.unlink()
    assert f"{weights} is missing" in load_error(tmp_path / "cats")
    (tmp_path / "cats" / "config.json").write_text('{"format": ')
    assert f"cannot read {tmp_path / 'cats' / 'config.json'}" in load_error(tmp_path / "cats")


def test_another_kind_of_diffusers_model_is_named(tmp_path, autoencoder_folder):
    assert "holds diffusers' AutoencoderKL" in load_error(autoencoder_folder)
    (tmp_path / "config.json").write_text('{"_class_name": "OmniGenTransformer2DModel"}')
    assert "holds diffusers' OmniGenTransformer2DModel" in load_error(tmp_path)


# Conversion


def test_every_format_to_every_other(make_model, tmp_path):
    """The weights are the same bit for bit."""
    model = make_model(THEIRS, PAPER)
    names = {"bundle": "bundle", "official": "official.pt", "diffusers": "diffusers"}
    for to, name in names.items():
        load.convert(model, tmp_path / name, to, approximate=True)
    for start, source in names.items():
        for to, name in names.items():
            target = tmp_path / f"{start}-{name}"
            message = load.convert(tmp_path / source, str(target), to, approximate=True, num_heads=2)
            assert message.startswith(f"wrote {target}: ")
            assert same_weights(load.load(target, "cpu", num_heads=2), model)


def test_a_run_becomes_a_bundle_with_its_autoencoder(make_model, tmp_path, autoencoder_folder):
    codec = {"kind": "autoencoder-kl", "source": str(autoencoder_folder)}
    model = make_model({"in_channels": 4, "out_channels": 8}, codec=codec)
    run = tmp_path / "run"
    shutil.copytree(autoencoder_folder, run / "codec")
    bundle.save(model, run / "checkpoints" / "step-000000007", shared_folder="../..")
    assert not (run / "checkpoints" / "step-000000007" / "codec").exists()
    load.convert(run, tmp_path / "cats", "bundle")
    shutil.rmtree(run)
    read, latents = load.load(tmp_path / "cats", "cpu"), torch.randn(1, 4, 8, 8)
    assert torch.equal(read.codec.decode(latents), model.codec.decode(latents))


def test_convert_errors(tiny_model, tmp_path):
    for to, named in (("bundel", "did you mean 'bundle'?"), ("diffusers", "approximate=True")):
        with pytest.raises(TesseraError) as caught:
            load.convert(tiny_model, tmp_path / "new", to)
        assert named in str(caught.value)
    with pytest.raises(TesseraError, match="there is nothing at"):
        load.convert(tmp_path / "none", tmp_path / "new", "bundle")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(TesseraError, match="exists already"):
        load.convert(tiny_model, tmp_path / "mine", "bundle")
    assert (tmp_path / "mine").read_text() == "mine"
