"""The fit of an autoencoder: exact on going on, latents of unit variance, scores of what was held out."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tessera import bundle
from tessera.codecs import AutoencoderConfig
from tessera.codecs.tiny import Pair
from tessera.data.loader import flip_mask
from tessera.errors import TesseraError
from tessera.generation import pipeline
from tessera.settings import override, validate
from tessera.training import codec, loop, recipe
from tessera.training.codec import CodecRecipe, Fit
from tessera.training.loop import Interrupted

pytest.importorskip("diffusers")

TINY = {
    "data": {"kind": "shapes", "count": 60},
    "autoencoder": {"channels": [8, 16], "latent_channels": 3, "groups": 4},
    "training": {"steps": 6, "batch": 4, "held_out": 20, "log_every": 2, "checkpoint_every": 4, "device": "cpu"},
}


def told(output, *changes: str) -> CodecRecipe:
    return validate(CodecRecipe, override({"output": str(output), **TINY}, list(changes)), "the recipe")


def weights(run) -> dict[str, bytes]:
    found = load_file(run / "codec" / "diffusion_pytorch_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in found.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nobody may write into."""
    folder = tmp_path_factory.mktemp("codec") / "run"
    assert codec.train(told(folder)) == folder / "codec"
    return folder


def test_a_run_leaves_a_codec_scores_and_pictures(finished):
    config = json.loads((finished / "codec" / "config.json").read_text())
    assert (config["_class_name"], config["scaling_factor"]) == ("AutoencoderKL", 1.0)
    assert len(config["latents_mean"]) == len(config["latents_std"]) == 3
    built = AutoencoderConfig(source=str(finished / "codec")).build()
    assert (built.factor, built.latent_channels) == (2, 3)
    scores = json.loads((finished / "scores.json").read_text())
    assert (scores["pictures"], scores["steps"]) == (20, 6)
    assert {"psnr", "ssim", "fd", "latents"} <= scores.keys()
    records = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6]
    assert records[0]["loss"] == pytest.approx(records[0]["l1"] + 1e-4 * records[0]["kl"])
    with Image.open(finished / "reconstructions.png") as sheet:
        assert sheet.size == (8 * 34 - 2, 4 * 34 - 2)  # 16 pictures of 32 pixels in rows of 8, twice, gaps of 2


def test_scores_are_of_pictures_that_nothing_was_learned_from(finished):
    fit = Fit(told(finished))
    assert len(fit.held_out) == 20
    assert set(fit.held_out) | set(fit.learned_from) == set(range(60))
    assert not set(fit.held_out) & set(fit.learned_from)
    assert set(Fit(told(finished, "training.seed=7")).held_out) == set(fit.held_out)  # so that runs compare
    scores = json.loads((finished / "scores.json").read_text())
    held = torch.from_numpy(np.stack([fit.source.pixels(int(index)) for index in fit.held_out]))
    autoencoder = AutoencoderConfig(source=str(finished / "codec")).build()
    again = autoencoder.decode(autoencoder.encode(held / 127.5 - 1))
    error = (((again + 1) * 127.5).round().clamp(0, 255).double() - held).square().mean(dim=(1, 2, 3))
    assert scores["psnr"]["value"] == pytest.approx(float((10 * torch.log10(255**2 / error)).mean()), abs=1e-3)


def test_latents_have_mean_nought_and_variance_one_in_each_channel(finished):
    """Of draws from the posterior, as a diffusion transformer sees them: mirrored pictures among them."""
    fit, built = Fit(told(finished)), AutoencoderConfig(source=str(finished / "codec")).build()
    latents = []
    for start in range(0, 40, 4):
        pixels, noise = fit.prepared(fit.loader.read(start))
        latents.append(built.encode(pixels, noise))
    drawn = torch.cat(latents).transpose(0, 1).flatten(1)
    assert drawn.mean(dim=1).abs().max() < 0.03  # the noise of 10,240 numbers a channel
    assert (drawn.std(dim=1) - 1).abs().max() < 0.03


@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_run_cut_off_goes_on_exactly(finished, tmp_path, monkeypatch, step):
    """Stopped between checkpoints, at one, and just before the end."""
    run, real = told(tmp_path / "run"), Fit.train_step

    def stopped(fit, batch):
        if fit.step == step - 1:
            signal.raise_signal(signal.SIGINT)
        return real(fit, batch)

    monkeypatch.setattr(Fit, "train_step", stopped)
    with pytest.raises(Interrupted, match=f"stopped at step {step} of 6"):
        codec.train(run)
    assert not (tmp_path / "run" / "codec").exists()
    monkeypatch.setattr(Fit, "train_step", real)
    codec.train(run)
    assert weights(tmp_path / "run") == weights(finished)
    same = ("pictures", "psnr", "ssim", "fd", "latents")
    one, other = (json.loads((place / "scores.json").read_text()) for place in (finished, tmp_path / "run"))
    assert {name: one[name] for name in same} == {name: other[name] for name in same}


def test_a_killed_run_goes_on_from_its_checkpoint(finished, tmp_path, monkeypatch):
    run, real = told(tmp_path / "run"), Fit.train_step

    def killed(fit, batch):
        if fit.step == 5:
            raise MemoryError
        return real(fit, batch)

    monkeypatch.setattr(Fit, "train_step", killed)
    with pytest.raises(MemoryError):
        codec.train(run)
    seen = []
    monkeypatch.setattr(Fit, "train_step", lambda fit, batch: seen.append(fit.step) or real(fit, batch))
    codec.train(run)
    assert seen == [4, 5]  # checkpoint_every is 4
    assert weights(tmp_path / "run") == weights(finished)


def test_a_finished_run_is_not_done_again(finished, monkeypatch):
    monkeypatch.setattr(Fit, "train_step", None)
    before = {path: path.stat().st_mtime_ns for path in (finished / "codec").iterdir()}
    assert codec.train(told(finished)) == finished / "codec"
    assert {path: path.stat().st_mtime_ns for path in (finished / "codec").iterdir()} == before


@pytest.fixture
def photos(tmp_path) -> str:
    """An override: data that may be mirrored, which shapes may not."""
    (tmp_path / "photos").mkdir()
    for index in range(30):
        noise = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{index:02d}.png")
    return f"data={{kind: folder, path: {tmp_path / 'photos'}, size: 32}}"


def test_a_step_is_l1_and_kl_by_adamw(tmp_path, photos):
    """Against the same step written out with diffusers' own posterior and KL."""
    fit = Fit(told(tmp_path, photos, "training.optimizer={learning_rate: 0.01, clip: null}", "training.kl=0.5"))
    batch = fit.loader.read(0)
    pixels = batch.pixels / 127.5 - 1
    turned = flip_mask(0, batch.position)[..., None, None]
    assert 0 < turned.sum() < 4
    pixels = torch.where(turned, pixels.flip(-1), pixels)
    theirs = Fit(told(tmp_path, photos)).network
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.0)
    posterior = theirs.encode(pixels).latent_dist
    _, noise = fit.prepared(batch)
    l1 = torch.nn.functional.l1_loss(theirs.decode(posterior.mean + posterior.std * noise).sample, pixels)
    kl = posterior.kl().mean() / noise[0].numel()
    (l1 + 0.5 * kl).backward()
    optimizer.step()
    found = fit.train_step(batch)
    assert (found["l1"], found["kl"]) == pytest.approx((float(l1.detach()), float(kl.detach())), rel=1e-5)
    for (name, one), other in zip(fit.network.named_parameters(), theirs.parameters()):
        assert torch.allclose(one, other, rtol=0, atol=1e-4), name


def test_another_recipe_does_not_go_on(finished, tmp_path):
    with pytest.raises(TesseraError, match=r"training\.batch was 4, is 5"):
        codec.train(told(finished, "training.global_batch_size=5"))
    assert codec.train(told(finished, "training.num_workers=1")) == finished / "codec"  # which changes nothing
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(TesseraError, match="holds a run of `tessera train`"):
        codec.train(told(tmp_path / "run"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(TesseraError, match="is damaged"):
        codec.train(told(tmp_path / "other"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("training.held_out=57", "too few"),
        ("autoencoder.channels=[8,8,8,8,8,8,8]", "not a multiple of 64"),
        ("autoencoder.groups=3", "not a multiple of groups 3"),
        ("data={kind: digits}", "SSIM"),
        ("autoencoder.chanels=[8]", "did you mean 'channels'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_done(tmp_path, change, words):
    with pytest.raises(TesseraError, match=words):
        codec.train(told(tmp_path / "run", change))
    assert not (tmp_path / "run").exists()


def test_a_transformer_learns_from_its_latents_and_draws(finished, tmp_path):
    """The whole latent path, with no download."""
    data = {
        "output": str(tmp_path / "dit"),
        "data": TINY["data"],
        "codec": {"kind": "autoencoder-kl", "source": str(finished / "codec")},
        "network": {"patch_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 2},
        "process": {"steps": 20, "schedule": "cosine", "prediction": "v"},
        "sampling": {"steps": 2},
        "training": {"steps": 2, "batch": 4, "sample_seeds": 1, "tensorboard": False, "device": "cpu"},
    }
    folder = loop.train(validate(recipe.Recipe, data, "the recipe"))
    model = bundle.load(bundle.checkpoints(folder)[0])
    assert (model.config.network.in_channels, model.config.network.input_size) == (3, (16, 16))
    assert pipeline.generate(model, classes=[0], seeds=[0]).shape == (1, 32, 32, 3)


def test_a_transformer_learns_from_the_latents_of_a_tiny_autoencoder(tmp_path):
    """Its files travel into the run's folder, as safetensors, and the run draws when they are gone."""
    torch.manual_seed(0)
    pair, weights_folder = Pair(latent_channels=4, middle=True), tmp_path / "weights"
    weights_folder.mkdir()
    for name, part in (("encoder", pair.encoder), ("decoder", pair.decoder)):
        torch.save(part.state_dict(), weights_folder / f"tiny_{name}.pth")
    data = {
        "output": str(tmp_path / "dit"),
        "data": TINY["data"],
        "codec": {"kind": "autoencoder-tiny", "source": str(weights_folder), "scale": 2.0},
        "network": {"patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2},
        "process": {"steps": 20, "schedule": "cosine", "prediction": "v"},
        "sampling": {"steps": 2},
        "training": {"steps": 2, "batch": 4, "sample_seeds": 1, "tensorboard": False, "device": "cpu"},
    }
    folder = loop.train(validate(recipe.Recipe, data, "the recipe"))
    shutil.rmtree(weights_folder)
    assert sorted(path.suffix for path in (folder / "codec").iterdir()) == [".safetensors"] * 2
    model = bundle.load(bundle.checkpoints(folder)[0])
    assert (model.config.network.in_channels, model.config.network.input_size, model.codec.scale) == (4, (4, 4), 2.0)
    assert pipeline.generate(model, classes=[0], seeds=[0]).shape == (1, 32, 32, 3)
