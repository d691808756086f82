"""Tiny autoencoders: folders of diffusers, and pairs of files in their author's layout."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tessera import bundle, generation
from tessera.codecs import AutoencoderConfig, TinyConfig
from tessera.codecs.resolve import resolve_codec
from tessera.codecs.tiny import Pair
from tessera.errors import TesseraError
from tessera.interop.load import convert, load

TAEF2 = Path(os.environ.get("TESSERA_SHARED", Path(__file__).parents[3] / "shared" / "data")) / "taef2"


def normal(*shape, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def diffusers_folder(tmp_path):
    diffusers: Any = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    tiny.save_pretrained(tmp_path / "diffusers")
    return tmp_path / "diffusers"


@pytest.fixture
def pair_folder(tmp_path):
    """Random weights in their author's layout, in half precision."""
    torch.manual_seed(0)
    network, folder = Pair(latent_channels=4, pool=True), tmp_path / "pair"
    folder.mkdir()
    for name in ("encoder", "decoder"):
        weights = {key: tensor.half() for key, tensor in getattr(network, name).state_dict().items()}
        torch.save(weights, folder / f"some_{name}.pth")
    return folder


def test_a_diffusers_folder_computes_what_diffusers_computes(diffusers_folder):
    theirs = pytest.importorskip("diffusers").AutoencoderTiny.from_pretrained(diffusers_folder).eval()
    codec = TinyConfig(source=str(diffusers_folder)).build()
    assert (codec.pixel_channels, codec.latent_channels, codec.factor) == (3, 4, 2)
    assert (codec.scale, codec.shift, codec.stochastic) == (0.5, 0.25, False)
    pixels, latents = normal(2, 3, 8, 12).clamp(-1, 1), normal(2, 4, 4, 6)
    with torch.no_grad():
        raw, decoded = theirs.encode(pixels).latents, theirs.decode(latents / 0.5 + 0.25).sample
    assert torch.equal(codec.moments(pixels), torch.cat((raw, torch.zeros_like(raw)), dim=1))
    assert torch.allclose(codec.encode(pixels), (raw - 0.25) * 0.5, rtol=0, atol=1e-6)
    assert torch.equal(codec.decode(latents), decoded)


def test_the_pixels_of_a_pair_are_in_minus_1_to_1(pair_folder):
    """The network itself works in 0 .. 1."""
    codec = TinyConfig(source=str(pair_folder)).build()
    pixels, latents = normal(1, 3, 16, 16).clamp(-1, 1), normal(1, 4, 2, 2)
    with torch.no_grad():
        assert torch.allclose(codec.encode(pixels), codec.network.encoder((pixels + 1) / 2), rtol=0, atol=1e-6)
        assert torch.allclose(codec.decode(latents), codec.network.decoder(latents) * 2 - 1, rtol=0, atol=1e-6)
        # The decoder clamps its latents smoothly.
        far, clamped = torch.full((1, 4, 2, 2), 1e4), torch.full((1, 4, 2, 2), 1e5)
        assert torch.equal(codec.decode(far), codec.decode(clamped))


def test_a_pair_without_pool_branches_is_the_network_of_diffusers():
    """TAESD's layout, against diffusers' class with the same weights."""
    diffusers: Any = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    ours, theirs = Pair(latent_channels=4, pool=False).eval(), diffusers.AutoencoderTiny().eval()
    for part in ("encoder", "decoder"):
        weights = getattr(ours, part).state_dict()
        names = getattr(theirs, part).layers.state_dict()
        # The decoder of diffusers clamps outside its list of layers.
        down = 1 if part == "decoder" else 0
        renamed = {f"{int(key.split('.')[0]) - down}.{key.partition('.')[2]}": value for key, value in weights.items()}
        assert renamed.keys() == names.keys()
        getattr(theirs, part).layers.load_state_dict(renamed)
    pixels, latents = normal(1, 3, 32, 24).clamp(-1, 1), 4 * normal(1, 4, 4, 3)
    with torch.no_grad():
        assert torch.allclose(ours.encode(pixels), theirs.encode(pixels).latents, rtol=0, atol=1e-5)
        assert torch.allclose(ours.decode(latents), theirs.decode(latents).sample, rtol=0, atol=1e-5)


def test_noise_has_no_effect(pair_folder):
    codec = TinyConfig(source=str(pair_folder), scale=2.0, shift=(0.0, 1.0, 2.0, 3.0)).build()
    pixels = normal(2, 3, 16, 8)
    latents = codec.encode(pixels)
    assert torch.equal(codec.encode(pixels, normal(2, 4, 2, 1)), latents)
    raw = codec.moments(pixels)[:, :4]
    assert torch.equal(latents, (raw - torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None, None]) * 2.0)


@pytest.mark.parametrize("layout", ["diffusers_folder", "pair_folder"])
def test_it_is_saved_and_read_back(request, layout, tmp_path):
    codec = TinyConfig(source=str(request.getfixturevalue(layout))).build()
    codec.save(tmp_path / "deep" / "copy")
    assert not list((tmp_path / "deep" / "copy").glob("*.pth"))
    copy = TinyConfig(source=str(tmp_path / "deep" / "copy")).build()
    pixels = normal(1, 3, 16, 16)
    assert torch.equal(copy.moments(pixels), codec.moments(pixels))
    assert torch.equal(copy.decode(codec.encode(pixels)), codec.decode(codec.encode(pixels)))
    assert copy.fingerprint() == codec.fingerprint()
    assert (copy.scale, copy.shift) == (codec.scale, codec.shift)


def test_weights_of_half_precision_are_saved_as_such(pair_folder, tmp_path):
    """Half the size, the same bits; other weights stay in float32."""
    full, half = (TinyConfig(source=str(pair_folder)).build() for _ in range(2))
    with torch.no_grad():
        for weight in full.network.parameters():
            weight.add_(1e-5 * torch.rand_like(weight))
    half.network.half().float()
    full.save(tmp_path / "full")
    half.save(tmp_path / "half")
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).iterdir()) for name in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    for codec, name in ((full, "full"), (half, "half")):
        saved = TinyConfig(source=str(tmp_path / name)).build().network.state_dict()
        assert all(torch.equal(saved[key], weight) for key, weight in codec.network.state_dict().items())
        assert {weight.dtype for weight in saved.values()} == {torch.float32}


@pytest.mark.parametrize("layout", ["diffusers_folder", "pair_folder"])
def test_a_bundle_contains_the_codec(request, layout, make_model, tmp_path):
    folder = request.getfixturevalue(layout)
    codec = {"kind": "autoencoder-tiny", "source": str(folder), "scale": [1.0, 2.0, 3.0, 4.0]}
    model = make_model({"in_channels": 4, "out_channels": 8}, codec=codec)
    images = generation.generate(model, classes=["dog"], seeds=[3])
    bundle.save(model, tmp_path / "bundle")
    shutil.rmtree(folder)
    shutil.move(tmp_path / "bundle", tmp_path / "elsewhere")
    loaded = bundle.load(tmp_path / "elsewhere")
    assert (generation.generate(loaded, classes=["dog"], seeds=[3]) == images).all()
    assert not list((tmp_path / "elsewhere").rglob("*.pth"))
    assert str(folder) not in (tmp_path / "elsewhere/README.md").read_text()


def test_the_fingerprint_depends_on_the_encoder_only(pair_folder, tmp_path):
    first = TinyConfig(source=str(pair_folder)).build().fingerprint()
    assert len(first) == 64
    assert TinyConfig(source=str(pair_folder), scale=3.0, shift=1.0).build().fingerprint() == first
    for part, same in (("decoder", True), ("encoder", False)):
        weights = torch.load(pair_folder / f"some_{part}.pth", weights_only=True)
        weights["1.conv.0.bias" if part == "encoder" else "3.conv.0.bias"] += 1
        torch.save(weights, pair_folder / f"some_{part}.pth")
        assert (TinyConfig(source=str(pair_folder)).build().fingerprint() == first) == same


def test_a_program_in_a_file_is_not_run(pair_folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "exploded"), "w")

    torch.save({"0.weight": Bomb()}, pair_folder / "some_encoder.pth")
    with pytest.raises(TesseraError, match=r"some_encoder\.pth is refused: it holds"):
        TinyConfig(source=str(pair_folder)).build()
    assert not (tmp_path / "exploded").exists()


def test_folders_without_a_tiny_autoencoder_are_one_clear_error(pair_folder, tmp_path):
    def build_error(folder) -> str:
        with pytest.raises(TesseraError) as caught:
            TinyConfig(source=str(folder)).build()
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "no *_encoder.pth or .safetensors" in build_error(tmp_path / "empty")
    shutil.copyfile(pair_folder / "some_encoder.pth", pair_folder / "other_encoder.pth")
    assert "2 encoders: other_encoder, some_encoder" in build_error(pair_folder)
    (pair_folder / "other_encoder.pth").write_bytes(b"nothing")
    (pair_folder / "some_encoder.pth").unlink()
    assert "other_encoder.pth is damaged" in build_error(pair_folder)
    save_file({"0.weight": torch.zeros(4, 3)}, pair_folder / "other_encoder.safetensors")
    assert "does not match a tiny autoencoder" in build_error(pair_folder)


def test_a_codec_is_resolved_by_its_folder(diffusers_folder, pair_folder, autoencoder_folder, tmp_path):
    assert resolve_codec(str(diffusers_folder)) == TinyConfig(source=str(diffusers_folder))
    assert resolve_codec(str(pair_folder)) == TinyConfig(source=str(pair_folder))
    assert resolve_codec(str(autoencoder_folder)) == AutoencoderConfig(source=str(autoencoder_folder))
    assert resolve_codec("someone/some-vae") == AutoencoderConfig(source="someone/some-vae")
    for parent, name in (("run", "codec"), ("pipeline", "vae")):
        shutil.copytree(autoencoder_folder, tmp_path / parent / name)
        assert resolve_codec(str(tmp_path / parent)).source == str(tmp_path / parent / name)
    with pytest.raises(TesseraError, match="holds no codec"):
        resolve_codec(str(tmp_path))
    with pytest.raises(TesseraError, match="no codec at"):
        resolve_codec(str(tmp_path / "absent"))


@pytest.mark.parametrize("layout", ["diffusers_folder", "pair_folder"])
def test_every_command_resolves_the_folder_of_a_tiny_autoencoder(request, layout, make_model, tmp_path):
    """`--codec` of sample, info and evaluate is `load(codec=)`; that of convert is `convert(codec=)`."""
    folder = request.getfixturevalue(layout)
    bundle.save(make_model({"in_channels": 4, "out_channels": 8}, codec={"kind": "pixels"}), tmp_path / "bundle")
    loaded = load(tmp_path / "bundle", "cpu", codec=str(folder))
    convert(tmp_path / "bundle", tmp_path / "converted", "bundle", codec=str(folder))
    for model in (loaded, bundle.load(tmp_path / "converted")):
        assert model.config.codec.kind == "autoencoder-tiny"
        assert model.codec.latent_channels == 4


def psnr(image):
    """PSNR of an 8-bit image [H, W, 3] after taef2 and rounding."""
    import numpy as np

    codec = TinyConfig(source=str(TAEF2)).build()
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None] / 127.5 - 1
    decoded = ((codec.decode(codec.encode(pixels))[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).round().numpy()
    return 10 * np.log10(255**2 / np.square(decoded - image.astype(np.float64)).mean())


@pytest.mark.skipif(not TAEF2.is_dir(), reason="the shared weights of taef2 are not here")
def test_the_shared_weights_reconstruct_a_photo():
    datasets = pytest.importorskip("sklearn.datasets")
    pytest.importorskip("PIL")
    flower = datasets.load_sample_image("flower.jpg")
    assert psnr(flower[100:356, 200:456]) > 26
