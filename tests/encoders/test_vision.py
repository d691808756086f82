"""Vision networks of transformers: which output is the feature, preprocessing, and errors."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tessera.encoders.vision import VisionEncoder, load
from tessera.errors import TesseraError

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SQUARE = {"image_size": 28, "patch_size": 14}
PREPROCESSING = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 32},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def _folder(network, folder: Path, **changes) -> str:
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING | changes))
    return str(folder)


def _dinov2():
    torch.manual_seed(0)
    return transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, **SQUARE))


def _clip():
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": 50, "max_position_embeddings": 8}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config={**SMALL, **SQUARE}, projection_dim=24)
    )


def _vit(**settings):
    torch.manual_seed(0)
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, **SQUARE), **settings)


def _convnext():
    torch.manual_seed(0)
    return transformers.ConvNextModel(transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]))


def _siglip():
    torch.manual_seed(0)
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL, **SQUARE))


def _images(height: int = 40, width: int = 50) -> torch.Tensor:
    generator = np.random.Generator(np.random.Philox(key=[height, width]))
    return torch.from_numpy(generator.integers(0, 256, (2, 3, height, width), dtype=np.uint8))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> VisionEncoder:
    return load(_folder(_dinov2(), tmp_path_factory.mktemp("dinov2")))


@pytest.mark.parametrize(
    ("build", "feature"),
    [
        # FD-DINOv2: the class token (the first) after the last norm, which is part of last_hidden_state.
        (_dinov2, lambda network, x: network(x).last_hidden_state[:, 0]),
        (_clip, lambda network, x: network.visual_projection(network.vision_model(x).pooler_output)),
        (_vit, lambda network, x: network.pooler(network(x).last_hidden_state)),
        (lambda: _vit(add_pooling_layer=False), lambda network, x: network(x).last_hidden_state.mean(1)),
        (_convnext, lambda network, x: network.layernorm(network(x).last_hidden_state.mean((2, 3)))),
        (_siglip, lambda network, x: network(x).pooler_output),
    ],
    ids=["dinov2", "clip", "vit", "vit without pooler", "convnext", "siglip"],
)
@torch.no_grad()
def test_the_feature_of_each_family(build, feature, tmp_path):
    changes = {"crop_size": {"height": 32, "width": 32}} if build is _convnext else {}  # halved five times
    network = build().eval()
    ours = load(_folder(network, tmp_path, **changes))
    images = _images()
    features = ours(images)
    expected = feature(network, ours.preprocessing(images))
    assert features.keys() == {"pool"}
    assert features["pool"].shape == (2, ours.parts["pool"])
    torch.testing.assert_close(features["pool"], expected)


def test_a_missing_pooler_is_not_random(tmp_path):
    classifier = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, **SQUARE)).eval()
    ours = load(_folder(classifier, tmp_path))
    images = _images()
    with torch.no_grad():
        expected = classifier.vit(ours.preprocessing(images)).last_hidden_state.mean(1)
    torch.testing.assert_close(ours(images)["pool"], expected)


@pytest.mark.parametrize("size", [(40, 50), (301, 200), (9, 20), (32, 32)], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resample": 2},
        {"size": {"height": 28, "width": 28}, "do_center_crop": False},
        {"size": 28, "image_processor_type": "ViTImageProcessor", "do_center_crop": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
        {"do_normalize": False},
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 28}, "do_center_crop": False},
    ],
    ids=["bicubic", "bilinear", "both sides", "old size", "other range", "no normal", "convnext"],
)
def test_preprocessing_is_that_of_transformers_on_pillow(size, changes, tmp_path):
    ours = load(_folder(_dinov2(), tmp_path, **changes))
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    images = _images(*size)
    pil_images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    expected = theirs(pil_images, return_tensors="pt")["pixel_values"]
    pixel_values = ours.preprocessing(images)
    assert pixel_values.shape == expected.shape
    torch.testing.assert_close(pixel_values, expected, rtol=1e-5, atol=1e-5)


def test_grey_images_are_repeated_to_three_channels(dinov2):
    grey = _images()[:, :1]
    assert torch.equal(dinov2(grey)["pool"], dinov2(grey.repeat(1, 3, 1, 1))["pool"])


def test_the_preprocessing_is_described(dinov2):
    normalized = "mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)"
    assert dinov2.resize == f"bicubic as in Pillow, shorter side to 32, center crop 28 x 28, {normalized}"


def test_weights_in_half_precision_compute_in_float32(tmp_path):
    ours = load(_folder(_dinov2().half(), tmp_path))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = ours(_images())["pool"]
    assert features.dtype == torch.float32
    assert torch.equal(features, ours(_images())["pool"])


def test_other_images_are_refused(dinov2):
    with pytest.raises(TesseraError, match=r"got torch.float32 \[1, 3, 8, 8\]; expected torch.uint8"):
        dinov2(torch.zeros(1, 3, 8, 8))


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TesseraError, match=r"pip install 'tessera\[vision\]'"):
        load("facebook/dinov2-large")


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(TesseraError, match="cannot load the vision network(?s:.*)give a folder that holds config.json"):
        load(str(tmp_path))


def test_a_text_model_is_refused(tmp_path):
    config = transformers.BertConfig(**SMALL, vocab_size=50, max_position_embeddings=8)
    with pytest.raises(TesseraError, match="is a bert network; expected a vision network"):
        load(_folder(transformers.BertModel(config), tmp_path))


def test_missing_weights_are_refused(tmp_path):
    folder = _folder(_dinov2(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(TesseraError, match=r"cannot load the vision network.*model.safetensors"):
        load(folder)


def test_incomplete_weights_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = _folder(_dinov2(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TesseraError, match="incomplete; missing:\n  layernorm.weight"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"resample": 1}, "uses the filter"),
        ({"do_resize": False}, "does not resize"),
        ({"size": {"longest_edge": 28}}, "has the size"),
    ],
)
def test_unsupported_preprocessing_is_refused(changes, reason, tmp_path):
    with pytest.raises(TesseraError, match=reason):
        load(_folder(_dinov2(), tmp_path, **changes))


def test_preprocessing_of_another_size_fails_when_loading(tmp_path):
    with pytest.raises(TesseraError, match="cannot load the vision network"):
        load(_folder(_siglip(), tmp_path, size={"height": 42, "width": 42}, do_center_crop=False))
