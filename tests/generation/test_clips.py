"""Clips are generated, sampled in bulk, scored and written to files like images."""

import numpy as np
import pytest
import torch
from PIL import Image

from tessera import bundle, generation, images
from tessera.cli import image_files
from tessera.errors import TesseraError
from tessera.evaluation import suite
from tessera.evaluation.features import load_extractor
from tessera.evaluation.sources import NpzSource
from tessera.generation import SampleRequest
from tessera.generation.bulk import BulkSamples, bulk_request, generate_shards, write_npz
from tessera.runtime import Distributed

UNET = {"kind": "unet", "model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1}


@pytest.fixture(params=["dit", "rope-swiglu", "unet"])
def clip_model(request, make_model):
    """A model of clips of three frames of 8 x 8 pixels."""
    changes = {"dit": {}, "rope-swiglu": {"block": "rope-swiglu"}, "unet": UNET}[request.param]
    return make_model({"input_size": (3, 8, 8), **changes})


def close(one: np.ndarray, other: np.ndarray) -> None:
    assert one.shape == other.shape
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


@pytest.mark.parametrize(
    "options", [{}, {"guidance_scale": 2.0, "sampler": "ancestral"}, {"sampler": "unipc"}], ids=str
)
def test_a_clip_does_not_depend_on_its_batch(clip_model, options):
    clips = generation.generate(clip_model, [0, 1, 2, 0], [5, 6, 7, 8], batch_size=3, **options)
    assert (clips.shape, clips.dtype) == ((4, 3, 8, 8, 1), np.uint8)
    close(generation.generate(clip_model, [1], [6], **options), clips[1:2])
    assert (clips[:, 0] != clips[:, 1]).any()


def test_an_image_is_a_clip_of_one_frame(clip_model):
    image = generation.generate(clip_model, [2], [3], size=(8, 8), guidance_scale=2.0)
    clip = generation.generate(clip_model, [2], [3], size=(1, 8, 8), guidance_scale=2.0)
    assert (image.shape, clip.shape) == ((1, 8, 8, 1), (1, 1, 8, 8, 1))
    assert (clip[:, 0] == image).all()


def test_other_lengths_and_sizes(clip_model):
    assert generation.generate(clip_model, [0], size=(5, 4, 8), num_steps=2).shape == (1, 5, 4, 8, 1)


def test_caching_of_clips(make_model):
    model = make_model({"input_size": (3, 8, 8), "depth": 3})
    caching = {"kind": "first-block", "threshold": 0.4}
    together = generation.generate(model, [0, 1], [5, 6], caching=caching, num_steps=12, guidance_scale=2.0)
    close(generation.generate(model, [1], [6], caching=caching, num_steps=12, guidance_scale=2.0), together[1:])


def test_inpainting_keeps_the_pixels_of_every_frame(clip_model):
    random = np.random.default_rng(0)
    clip = random.integers(0, 256, (3, 8, 8, 1), np.uint8)
    mask = np.zeros((3, 8, 8), bool)
    mask[1:] = True  # the first frame stays: image to clip
    result = generation.generate(clip_model, [1], [4], size=(3, 8, 8), init_image=clip, mask=mask)[0]
    assert (result[0] == clip[0]).all()
    assert (result[1:] != clip[1:]).any()


def test_bulk_sampling_npz_and_scores(make_model, tmp_path):
    model = make_model({"input_size": (3, 8, 8), "num_classes": 0})
    samples = BulkSamples(model, bulk_request(model, 30, "uniform"), tmp_path / "shards")
    assert (samples.size, samples.plan["size"]) == ((3, 8, 8), [3, 8, 8])
    generate_shards(samples, Distributed())
    write_npz(samples, tmp_path / "clips.npz")
    clips = np.load(tmp_path / "clips.npz")["arr_0"]
    assert clips.shape == (30, 3, 8, 8, 1)
    close(clips[:2], generation.generate(model, None, [0, 1]))
    extractor = load_extractor("digits", torch.device("cpu"))
    frames = extractor(clips.reshape(-1, 8, 8, 1), 50)["pool"].reshape(30, 3, -1)
    np.testing.assert_allclose(extractor(clips, 7)["pool"], frames.mean(axis=1), rtol=1e-4, atol=1e-5)
    evaluation = suite.evaluate(
        samples, str(tmp_path / "clips.npz"), extractor, tmp_path / "work", ["fd"]
    )  # fmt: skip
    score, motion = evaluation.scores
    assert (motion.metric, motion.value) == ("motion", pytest.approx(0))
    assert score.value == pytest.approx(0, abs=1e-3)
    assert score.protocol.size == (3, 8, 8)
    assert NpzSource(tmp_path / "clips.npz").size == (3, 8, 8)


def test_files_show_the_frames_side_by_side(make_model, tmp_path):
    model = make_model({"input_size": (3, 8, 8)})
    request = SampleRequest([7, 8], {"label": [0, 1]})
    for _ in range(2):  # the second time from the files
        image_files.write_images(model, request, tmp_path / "out", 2, {"model": "m", "options": {}})
    clips = generation.generate(model, [0, 1], [7, 8])
    saved = np.asarray(Image.open(next((tmp_path / "out").glob("*seed-8.png"))))
    assert saved.shape == (8, 24)
    assert (saved[:, 8:16] == clips[1, 1, ..., 0]).all()
    assert images.grid(clips, 1, gap=1).shape == (17, 24, 1)


def test_a_bundle_of_clips(make_model, tmp_path):
    model = make_model({"input_size": (3, 8, 8)})
    bundle.save(model, tmp_path / "bundle")
    loaded = bundle.load(tmp_path / "bundle")
    assert loaded.config.network.input_size == (3, 8, 8)
    assert (generation.generate(loaded, [1], [2]) == generation.generate(model, [1], [2])).all()
    card = (tmp_path / "bundle/README.md").read_text()
    assert "1 x 3 x 8 x 8" in card
    assert "uint8 [B, T, H, W, C]" in card


@pytest.mark.parametrize(
    ("network", "size", "words"),
    [
        ({}, (3, 8, 8), "is for images, and the input is a clip of 3 frames"),
        ({"input_size": (3, 8, 8)}, (3, 7, 8), "size 7 x 8: height and width must be multiples of 2"),
        ({"input_size": (4, 8, 8), "temporal_patch_size": 2}, (3, 8, 8), "does not divide 3 frames"),
        ({"input_size": (3, 8, 8)}, (8,), "a size is"),
    ],
)
def test_impossible_sizes(make_model, network, size, words):
    with pytest.raises(TesseraError, match=words):
        generation.generate(make_model(network), [0], size=size)


def test_a_codec_of_images_decodes_each_frame_by_itself(make_model, autoencoder_folder):
    codec = {"kind": "autoencoder-kl", "source": str(autoencoder_folder)}
    model = make_model({"in_channels": 4, "out_channels": 8, "input_size": (3, 8, 8)}, codec=codec)
    clips = generation.generate(model, [0, 1])
    assert clips.shape == (2, 3, 16, 16, 3)
    for state in generation.generate_steps(model, [0, 1]):
        latents = state.x
    for frame in range(3):  # rounding of other batch sizes
        difference = generation.decode(model, latents[:, :, frame]).astype(int) - clips[:, frame]
        assert np.abs(difference).max() <= 1
    assert generation.generate(model, [0], size=(16, 16)).shape == (1, 16, 16, 3)
