"""The autoencoder: scale and shift, samples of the posterior, tiles, fingerprints, and copies in bundles."""

import json
import shutil

import pytest
import torch

from tessera import bundle, generation
from tessera.codecs import AutoencoderConfig
from tessera.errors import TesseraError
from tessera.settings import validate

pytest.importorskip("diffusers")


@pytest.fixture
def shifted(autoencoder_folder, tmp_path):
    """The same autoencoder with a shift, as newer ones have."""
    folder = tmp_path / "shifted"
    shutil.copytree(autoencoder_folder, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"shift_factor": 0.25}), encoding="utf-8")
    return folder


def build(folder, **settings):
    return AutoencoderConfig(source=str(folder), **settings).build()


def normal(*shape, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_channels_factor_and_scale(autoencoder_folder):
    codec = build(autoencoder_folder)
    assert (codec.pixel_channels, codec.latent_channels, codec.factor) == (3, 4, 2)
    assert (codec.scale, codec.shift) == (0.5, 0.0)
    assert not any(parameter.requires_grad for parameter in codec.vae.parameters())
    assert codec.encode(normal(2, 3, 8, 12)).shape == (2, 4, 4, 6)
    assert codec.decode(normal(2, 4, 4, 6)).shape == (2, 3, 8, 12)


def test_scale_and_shift_are_applied_once_each_way(shifted):
    codec = build(shifted)
    assert (codec.scale, codec.shift) == (0.5, 0.25)
    pixels, latents = normal(2, 3, 8, 8), normal(2, 4, 4, 4)
    with torch.no_grad():
        raw = codec.vae.encode(pixels).latent_dist.mean
        decoded = codec.vae.decode(latents / 0.5 + 0.25).sample
    assert torch.allclose(codec.encode(pixels), (raw - 0.25) * 0.5, rtol=0, atol=1e-6)
    assert torch.allclose(codec.decode(latents), decoded, rtol=0, atol=1e-6)


def test_noise_gives_a_sample_of_the_posterior(shifted):
    codec = build(shifted)
    pixels = normal(2, 3, 8, 8)
    with torch.no_grad():
        posterior = codec.vae.encode(pixels).latent_dist
        theirs = posterior.sample(torch.Generator().manual_seed(3))
    noise = normal(2, 4, 4, 4, seed=3)
    assert torch.allclose(codec.encode(pixels, noise), (theirs - 0.25) * 0.5, rtol=0, atol=1e-6)
    mean, std = posterior.mean, torch.exp(0.5 * posterior.logvar)
    assert torch.allclose(codec.encode(pixels, noise), (mean + std * noise - 0.25) * 0.5, rtol=0, atol=1e-6)
    assert torch.equal(codec.encode(pixels, torch.zeros_like(noise)), codec.encode(pixels))


def test_large_images_are_processed_in_tiles(autoencoder_folder):
    """Tiles of 64 pixels: images of 96 differ a little, because each tile has its own norms and attention; images of
    64 do not."""
    whole, tiled = build(autoencoder_folder), build(autoencoder_folder, tile_above=64)
    small, large = normal(1, 4, 32, 32), normal(1, 4, 48, 48)
    assert torch.equal(tiled.decode(small), whole.decode(small))
    one, two = whole.decode(large), tiled.decode(large)
    assert two.shape == one.shape
    assert 0 < (one - two).norm() / one.norm() < 0.2
    pixels = normal(1, 3, 96, 96)
    one, two = whole.encode(pixels), tiled.encode(pixels)
    assert two.shape == one.shape
    assert 0 < (one - two).norm() / one.norm() < 0.2


def test_a_large_image_does_not_affect_the_next(autoencoder_folder):
    codec = build(autoencoder_folder, tile_above=64)
    small, pixels = normal(1, 4, 32, 32), normal(1, 3, 64, 64)
    before = codec.decode(small), codec.encode(pixels)
    codec.decode(normal(1, 4, 40, 40))
    assert torch.equal(codec.decode(small), before[0])
    assert torch.equal(codec.encode(pixels), before[1])


def test_it_is_saved_and_read_back(shifted, tmp_path):
    codec = build(shifted)
    codec.save(tmp_path / "deep" / "copy")
    copy, latents = build(tmp_path / "deep" / "copy"), normal(1, 4, 4, 4)
    assert torch.equal(copy.decode(latents), codec.decode(latents))
    assert (copy.scale, copy.shift) == (0.5, 0.25)


def test_a_bundle_contains_the_codec(make_model, shifted, tmp_path):
    shutil.move(shifted, tmp_path / "pipeline" / "vae")
    codec = {"kind": "autoencoder-kl", "source": str(tmp_path / "pipeline"), "subfolder": "vae"}
    model = make_model({"in_channels": 4, "out_channels": 8}, codec=codec)
    images = generation.generate(model, classes=["dog"], seeds=[3])
    assert images.shape == (1, 16, 16, 3)
    bundle.save(model, tmp_path / "bundle")
    shutil.rmtree(tmp_path / "pipeline")
    moved = shutil.move(tmp_path / "bundle", tmp_path / "elsewhere")
    loaded = bundle.load(moved)
    assert (generation.generate(loaded, classes=["dog"], seeds=[3]) == images).all()
    # So does a bundle of a loaded bundle.
    bundle.save(loaded, tmp_path / "again")
    shutil.rmtree(moved)
    assert (generation.generate(bundle.load(tmp_path / "again"), classes=["dog"], seeds=[3]) == images).all()


def test_pickled_weights_are_read_and_saved_as_safetensors(make_model, autoencoder_folder, tmp_path):
    codec = build(autoencoder_folder)
    codec.vae.save_pretrained(tmp_path / "old", safe_serialization=False)
    assert not list((tmp_path / "old").glob("*.safetensors"))
    latents = normal(1, 4, 4, 4)
    assert torch.equal(build(tmp_path / "old").decode(latents), codec.decode(latents))
    old = {"kind": "autoencoder-kl", "source": str(tmp_path / "old")}
    bundle.save(make_model({"in_channels": 4, "out_channels": 8}, codec=old), tmp_path / "bundle")
    assert not list((tmp_path / "bundle").rglob("*.bin"))
    assert torch.equal(bundle.load(tmp_path / "bundle").codec.decode(latents), codec.decode(latents))


def test_a_program_in_pickled_weights_is_not_run(autoencoder_folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "exploded"), "w")

    (tmp_path / "old").mkdir()
    shutil.copyfile(autoencoder_folder / "config.json", tmp_path / "old" / "config.json")
    torch.save({"decoder.conv_in.bias": Bomb()}, tmp_path / "old" / "diffusion_pytorch_model.bin")
    with pytest.raises(TesseraError, match="cannot load the autoencoder"):
        build(tmp_path / "old")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
def test_a_folder_without_an_autoencoder_is_one_clear_error(autoencoder_folder, tmp_path, damage):
    folder = tmp_path / "autoencoder"
    if damage != "missing":
        folder.mkdir()
    if damage == "truncated":
        shutil.copytree(autoencoder_folder, folder, dirs_exist_ok=True)
        weights = folder / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(TesseraError) as caught:
        build(folder)
    assert f"cannot load the autoencoder '{folder}'" in str(caught.value)
    assert "give a folder written by" in str(caught.value)


def with_config(folder, target, **changes):
    """A copy with changes to its configuration."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return target


MEAN, STD = [0.1, -0.2, 0.3, 0.4], [0.5, 1.0, 2.0, 4.0]


def test_statistics_per_channel_are_used_as_in_diffusers(autoencoder_folder, tmp_path):
    """Its image-to-image pipeline: (latents - mean) * scaling_factor / std; the decoder undoes it."""
    folder = with_config(autoencoder_folder, tmp_path / "each", latents_mean=MEAN, latents_std=STD)
    codec, pixels = build(folder), normal(2, 3, 8, 8)
    mean, std = (torch.tensor(numbers).view(1, 4, 1, 1) for numbers in (MEAN, STD))
    with torch.no_grad():
        raw = codec.vae.encode(pixels).latent_dist.mean
        decoded = codec.vae.decode(raw).sample
    latents = codec.encode(pixels)
    assert torch.allclose(latents, (raw - mean) * 0.5 / std, rtol=0, atol=1e-6)
    assert torch.allclose(codec.decode(latents), decoded, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("scale", "shift"), [(3.0, None), (None, -1.0), ([1.0, 2.0, 3.0, 4.0], None), (2.0, MEAN), ([1.0] * 4, 0.5)]
)
def test_settings_override_the_folder(shifted, tmp_path, scale, shift):
    codec, plain, pixels = build(shifted, scale=scale, shift=shift), build(shifted), normal(2, 3, 8, 8)
    one, other = (
        torch.tensor(default if value is None else value).view(-1, 1, 1)
        for value, default in ((scale, 0.5), (shift, 0.25))
    )
    raw = plain.moments(pixels)[:, :4]
    latents = codec.encode(pixels)
    assert torch.allclose(latents, (raw - other) * one, rtol=0, atol=1e-6)
    assert torch.allclose(codec.decode(latents), plain.decode(plain.encode(pixels)), rtol=0, atol=1e-5)
    codec.save(tmp_path / "saved")  # now in diffusers' configuration
    assert torch.allclose(build(tmp_path / "saved").encode(pixels), latents, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{"scale": [1.0, 2.0]}, {"shift": [1.0] * 5}])
def test_numbers_for_other_channels_are_an_error(autoencoder_folder, settings):
    with pytest.raises(TesseraError, match="the latents have 4 channels"):
        build(autoencoder_folder, **settings)


@pytest.mark.parametrize("scale", [0.0, -1.0, [1.0, 1.0, 0.0, 1.0]])
def test_a_scale_is_greater_than_zero(scale):
    with pytest.raises(TesseraError, match="greater than 0"):
        validate(AutoencoderConfig, {"source": "x", "scale": scale}, "the codec")


def test_moments_do_not_depend_on_scale_and_shift(shifted):
    """A cache holds raw moments, from which training samples the posterior."""
    codec, pixels, noise = build(shifted), normal(2, 3, 8, 8), normal(2, 4, 4, 4)
    moments = codec.moments(pixels)
    assert moments.shape == (2, 8, 4, 4)
    with torch.no_grad():
        posterior = codec.vae.encode(pixels).latent_dist
    assert torch.equal(moments, torch.cat((posterior.mean, posterior.std), dim=1))
    assert torch.equal(codec.latents(moments, noise), codec.encode(pixels, noise))
    other = build(shifted, scale=[1.0, 2.0, 3.0, 4.0], shift=0.0)
    assert torch.equal(other.moments(pixels), moments)
    assert torch.equal(other.latents(moments, noise), other.encode(pixels, noise))
    stored = codec.latents(moments.half(), noise)  # in half precision
    assert stored.dtype == torch.float32
    assert torch.allclose(stored, codec.encode(pixels, noise), rtol=0, atol=4e-3)


def test_the_fingerprint_depends_on_what_raw_moments_depend_on(shifted, autoencoder_folder, tmp_path):
    known = build(autoencoder_folder).fingerprint()
    assert len(known) == 64
    assert build(shifted).fingerprint() == known  # another shift
    assert build(autoencoder_folder, scale=[1.0] * 4, shift=2.0).fingerprint() == known
    assert build(with_config(autoencoder_folder, tmp_path / "each", latents_std=STD)).fingerprint() == known
    assert build(autoencoder_folder, tile_above=64).fingerprint() != known
    groups = with_config(autoencoder_folder, tmp_path / "groups", norm_num_groups=8)
    assert build(groups).fingerprint() != known
    for name, same in (("decoder.conv_in.bias", True), ("encoder.conv_in.bias", False), ("quant_conv.bias", False)):
        codec = build(autoencoder_folder)
        codec.vae.get_parameter(name).add_(1)
        assert (codec.fingerprint() == known) == same, name
