"""Training a codec: exact resumption, latents of unit variance, scores of held-out images."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tessera import bundle, generation
from tessera.codecs import AutoencoderConfig
from tessera.codecs.tiny import Pair
from tessera.data.loader import flip_mask
from tessera.errors import Interrupted, TesseraError
from tessera.settings import apply_overrides, validate
from tessera.training import codec, loop, recipe
from tessera.training.codec import CodecRecipe, CodecTrainer

pytest.importorskip("diffusers")

TINY = {
    "data": {"kind": "shapes", "count": 60},
    "autoencoder": {"channels": [8, 16], "latent_channels": 3, "groups": 4},
    "training": {
        "steps": 6,
        "global_batch_size": 4,
        "num_held_out": 20,
        "log_every": 2,
        "checkpoint_every": 4,
        "device": "cpu",
    },
}


def make_recipe(run_dir, *changes: str) -> CodecRecipe:
    return validate(CodecRecipe, apply_overrides({"run_dir": str(run_dir), **TINY}, list(changes)), "the recipe")


def weights(run) -> dict[str, bytes]:
    tensors = load_file(run / "codec" / "diffusion_pytorch_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run. Tests must not change it."""
    folder = tmp_path_factory.mktemp("codec") / "run"
    assert codec.train_codec(make_recipe(folder)) == folder / "codec"
    return folder


def test_a_run_leaves_a_codec_scores_and_reconstructions(finished):
    config = json.loads((finished / "codec" / "config.json").read_text())
    assert (config["_class_name"], config["scaling_factor"]) == ("AutoencoderKL", 1.0)
    assert len(config["latents_mean"]) == len(config["latents_std"]) == 3
    built = AutoencoderConfig(source=str(finished / "codec")).build()
    assert (built.factor, built.latent_channels) == (2, 3)
    scores = json.loads((finished / "scores.json").read_text())
    assert (scores["images"], scores["steps"]) == (20, 6)
    assert {"psnr", "ssim", "fd", "latents"} <= scores.keys()
    records = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6]
    assert records[0]["loss"] == pytest.approx(records[0]["l1"] + 1e-4 * records[0]["kl"])
    with Image.open(finished / "reconstructions.png") as sheet:
        assert sheet.size == (8 * 34 - 2, 4 * 34 - 2)  # 16 images of 32 pixels in rows of 8, twice, gaps of 2


def test_scores_are_those_of_held_out_images(finished):
    trainer = CodecTrainer(make_recipe(finished))
    assert len(trainer.held_out) == 20
    assert set(trainer.held_out) | set(trainer.training_indices) == set(range(60))
    assert not set(trainer.held_out) & set(trainer.training_indices)
    assert set(CodecTrainer(make_recipe(finished, "training.seed=7")).held_out) == set(
        trainer.held_out
    )  # so that runs compare
    scores = json.loads((finished / "scores.json").read_text())
    pixels = torch.from_numpy(np.stack([trainer.dataset.pixels(int(index)) for index in trainer.held_out]))
    autoencoder = AutoencoderConfig(source=str(finished / "codec")).build()
    decoded = autoencoder.decode(autoencoder.encode(pixels / 127.5 - 1))
    error = (((decoded + 1) * 127.5).round().clamp(0, 255).double() - pixels).square().mean(dim=(1, 2, 3))
    assert scores["psnr"]["value"] == pytest.approx(float((10 * torch.log10(255**2 / error)).mean()), abs=1e-3)


def test_latents_have_mean_zero_and_variance_one_in_each_channel(finished):
    """Of samples from the posterior, as in the training of a diffusion model, with flipped images."""
    trainer, built = CodecTrainer(make_recipe(finished)), AutoencoderConfig(source=str(finished / "codec")).build()
    latents = []
    for start in range(0, 40, 4):
        pixels, noise = trainer.prepare_batch(trainer.loader.load_batch(start))
        latents.append(built.encode(pixels, noise))
    channels = torch.cat(latents).transpose(0, 1).flatten(1)
    assert channels.mean(dim=1).abs().max() < 0.03  # the noise of 10,240 numbers per channel
    assert (channels.std(dim=1) - 1).abs().max() < 0.03


@pytest.mark.parametrize("step", [2, 4, 5])
def test_an_interrupted_run_resumes_exactly(finished, tmp_path, monkeypatch, step):
    """Stopped between checkpoints, at one, and just before the end."""
    run, train_step = make_recipe(tmp_path / "run"), CodecTrainer.train_step

    def stop(trainer, batch):
        if trainer.step == step - 1:
            signal.raise_signal(signal.SIGINT)
        return train_step(trainer, batch)

    monkeypatch.setattr(CodecTrainer, "train_step", stop)
    with pytest.raises(Interrupted, match=f"stopped at step {step} of 6"):
        codec.train_codec(run)
    assert not (tmp_path / "run" / "codec").exists()
    monkeypatch.setattr(CodecTrainer, "train_step", train_step)
    codec.train_codec(run)
    assert weights(tmp_path / "run") == weights(finished)
    same = ("images", "psnr", "ssim", "fd", "latents")
    one, other = (json.loads((run_dir / "scores.json").read_text()) for run_dir in (finished, tmp_path / "run"))
    assert {name: one[name] for name in same} == {name: other[name] for name in same}


def test_a_killed_run_resumes_from_its_checkpoint(finished, tmp_path, monkeypatch):
    run, train_step = make_recipe(tmp_path / "run"), CodecTrainer.train_step

    def kill(trainer, batch):
        if trainer.step == 5:
            raise MemoryError
        return train_step(trainer, batch)

    monkeypatch.setattr(CodecTrainer, "train_step", kill)
    with pytest.raises(MemoryError):
        codec.train_codec(run)
    steps = []
    monkeypatch.setattr(
        CodecTrainer, "train_step", lambda trainer, batch: steps.append(trainer.step) or train_step(trainer, batch)
    )
    codec.train_codec(run)
    assert steps == [4, 5]  # checkpoint_every is 4
    assert weights(tmp_path / "run") == weights(finished)


def test_a_finished_run_is_not_trained_again(finished, monkeypatch):
    monkeypatch.setattr(CodecTrainer, "train_step", None)
    before = {path: path.stat().st_mtime_ns for path in (finished / "codec").iterdir()}
    assert codec.train_codec(make_recipe(finished)) == finished / "codec"
    assert {path: path.stat().st_mtime_ns for path in (finished / "codec").iterdir()} == before


@pytest.fixture
def photos(tmp_path) -> str:
    """An override: data with flips, which shapes do not have."""
    (tmp_path / "photos").mkdir()
    for index in range(30):
        noise = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{index:02d}.png")
    return f"data={{kind: folder, path: {tmp_path / 'photos'}, size: 32}}"


def test_a_step_is_l1_and_kl_by_adamw(tmp_path, photos):
    """Against the same step with the posterior and KL of diffusers."""
    optimizer = "training.optimizer={learning_rate: 0.01, grad_clip_norm: null}"
    trainer = CodecTrainer(make_recipe(tmp_path, photos, optimizer, "training.kl_weight=0.5"))
    batch = trainer.loader.load_batch(0)
    pixels = batch.pixels / 127.5 - 1
    flip = flip_mask(0, batch.position)[..., None, None]
    assert 0 < flip.sum() < 4
    pixels = torch.where(flip, pixels.flip(-1), pixels)
    network = CodecTrainer(make_recipe(tmp_path, photos)).network
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.0)
    posterior = network.encode(pixels).latent_dist
    _, noise = trainer.prepare_batch(batch)
    l1 = torch.nn.functional.l1_loss(network.decode(posterior.mean + posterior.std * noise).sample, pixels)
    kl = posterior.kl().mean() / noise[0].numel()
    (l1 + 0.5 * kl).backward()
    optimizer.step()
    losses = trainer.train_step(batch)
    assert (losses["l1"], losses["kl"]) == pytest.approx((float(l1.detach()), float(kl.detach())), rel=1e-5)
    for (name, one), other in zip(trainer.network.named_parameters(), network.parameters()):
        assert torch.allclose(one, other, rtol=0, atol=1e-4), name


def test_a_run_of_another_recipe_is_not_resumed(finished, tmp_path):
    with pytest.raises(TesseraError, match=r"training\.global_batch_size was 4, is 5"):
        codec.train_codec(make_recipe(finished, "training.global_batch_size=5"))
    assert codec.train_codec(make_recipe(finished, "training.num_workers=1")) == finished / "codec"  # allowed
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(TesseraError, match="holds a run of `tessera train`"):
        codec.train_codec(make_recipe(tmp_path / "run"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoint.pt").write_bytes(b"an earlier version")
    with pytest.raises(TesseraError, match=r"was written by Tessera 0\.6\.0 or earlier"):
        codec.train_codec(make_recipe(tmp_path / "other"))
    (tmp_path / "other" / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(TesseraError, match="is damaged"):
        codec.train_codec(make_recipe(tmp_path / "other"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.num_held_out=57", "too few"),
        ("autoencoder.channels=[8,8,8,8,8,8,8]", "not a multiple of 64"),
        ("autoencoder.groups=3", "not a multiple of groups 3"),
        ("data={kind: digits}", "SSIM"),
        ("autoencoder.chanels=[8]", "did you mean 'channels'"),
    ],
)
def test_an_invalid_recipe_is_an_error_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(TesseraError, match=message):
        codec.train_codec(make_recipe(tmp_path / "run", change))
    assert not (tmp_path / "run").exists()


def test_a_diffusion_model_is_trained_on_its_latents(finished, tmp_path):
    """The whole latent path, without a download."""
    data = {
        "run_dir": str(tmp_path / "dit"),
        "data": TINY["data"],
        "codec": {"kind": "autoencoder-kl", "source": str(finished / "codec")},
        "network": {"patch_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 2},
        "diffusion": {"num_timesteps": 20, "schedule": "cosine", "prediction": "v"},
        "sampling": {"num_steps": 2},
        "training": {"steps": 2, "global_batch_size": 4, "sample_seeds": 1, "tensorboard": False, "device": "cpu"},
    }
    folder = loop.train(validate(recipe.Recipe, data, "the recipe"))
    model = bundle.load(bundle.checkpoints(folder)[0])
    assert (model.config.network.in_channels, model.config.network.input_size) == (3, (16, 16))
    assert generation.generate(model, classes=[0], seeds=[0]).shape == (1, 32, 32, 3)


def test_a_diffusion_model_is_trained_on_the_latents_of_a_tiny_autoencoder(tmp_path):
    """Its files are copied into the folder of the run as safetensors; sampling does not need the originals."""
    torch.manual_seed(0)
    pair, weights_folder = Pair(latent_channels=4, pool=True), tmp_path / "weights"
    weights_folder.mkdir()
    for name, part in (("encoder", pair.encoder), ("decoder", pair.decoder)):
        torch.save(part.state_dict(), weights_folder / f"tiny_{name}.pth")
    data = {
        "run_dir": str(tmp_path / "dit"),
        "data": TINY["data"],
        "codec": {"kind": "autoencoder-tiny", "source": str(weights_folder), "scale": 2.0},
        "network": {"patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2},
        "diffusion": {"num_timesteps": 20, "schedule": "cosine", "prediction": "v"},
        "sampling": {"num_steps": 2},
        "training": {"steps": 2, "global_batch_size": 4, "sample_seeds": 1, "tensorboard": False, "device": "cpu"},
    }
    folder = loop.train(validate(recipe.Recipe, data, "the recipe"))
    shutil.rmtree(weights_folder)
    assert sorted(path.suffix for path in (folder / "codec").iterdir()) == [".safetensors"] * 2
    model = bundle.load(bundle.checkpoints(folder)[0])
    assert (model.config.network.in_channels, model.config.network.input_size, model.codec.scale) == (4, (4, 4), 2.0)
    assert generation.generate(model, classes=[0], seeds=[0]).shape == (1, 32, 32, 3)
