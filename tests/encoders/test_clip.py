"""CLIP of a folder against transformers: similarities, cut captions, the metric clip_score, and errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tessera.encoders import clip
from tessera.errors import TesseraError
from tessera.evaluation import suite
from tessera.evaluation.features import load_extractor
from tessera.generation.shards import ImageShard

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "red", "blue", "circle", "square", "above", "large"]
PREPROCESSING = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 28},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}
CAPTIONS = ["a red circle", "a large blue square above a red circle", "a square", "a blue circle above a red square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A CLIP network of 8 tokens with random weights, its preprocessing, and a tokenizer of words."""
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": len(WORDS), "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1}
    vision = {**SMALL, "image_size": 28, "patch_size": 14}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    transformers.CLIPModel(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(WORDS, range(len(WORDS)))), "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """uint8 [B, H, W, C]"""
    return np.random.default_rng(0).integers(0, 256, (4, 40, 32, 3), dtype=np.uint8)


@torch.no_grad()
def cosines(folder: Path, images: np.ndarray, captions: list[str]) -> np.ndarray:
    """Of transformers, one pair at a time, from its own preprocessing: the logits without their scale."""
    network = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    results = []
    for image, caption in zip(images, captions):
        pixels = processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
        tokens = tokenizer(caption, truncation=True, max_length=8, return_tensors="pt")
        output = network(input_ids=tokens["input_ids"], pixel_values=pixels)
        results.append(float(output.logits_per_image / network.logit_scale.exp()))
    return np.array(results)


def test_similarities_are_those_of_transformers(folder, images):
    network = clip.load(str(folder))
    ours = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), CAPTIONS)
    np.testing.assert_allclose(ours.numpy(), cosines(folder, images, CAPTIONS), atol=2e-5)
    assert network.max_tokens == 8
    assert network.num_cut(CAPTIONS) == 2  # those of 8 and 7 words with their two ends
    assert network.num_cut(CAPTIONS[:1]) == 0


class Captioned:
    """Images with captions, as a source of samples."""

    def __init__(self, images: np.ndarray, captions: list[str]) -> None:
        self.images, self.captions, self.count = images, captions, len(images)
        self.description, self.size, self.channels, self.class_names = "noise", images.shape[1:3], 3, ()
        self.plan = {"count": self.count}

    def shard(self, index: int) -> ImageShard:
        return ImageShard(self.images, np.arange(self.count), None, self.captions)


def test_the_clip_score_is_the_mean_of_100_times_the_positive_cosine(folder, images, tmp_path):
    images = np.concatenate((images[:, :32], images[::-1, 8:]))
    captions = CAPTIONS + CAPTIONS
    extractor = load_extractor("shapes", torch.device("cpu"))
    evaluation = suite.evaluate(
        Captioned(images, captions), "shapes:test", extractor, tmp_path, ["clip_score"], batch_size=3, clip=str(folder)
    )
    (score,) = evaluation.scores
    expected = 100 * cosines(folder, images, captions).clip(min=0)
    assert score.value == pytest.approx(expected.mean(), abs=2e-3)
    assert score.low <= score.value <= score.high
    assert score.protocol.definition["score"] == "100 max(cosine, 0)"
    assert score.protocol.features["name"] == str(folder)
    shifted = 100 * cosines(folder, images, captions[1:] + captions[:1]).clip(min=0).mean()
    other, real, cut = evaluation.notes
    assert float(other.rpartition(" ")[2]) == pytest.approx(shifted, abs=0.01)
    assert real.startswith("clip_score of 250 reference images is")
    assert cut == "CLIP reads 8 tokens: 4 of 8 captions are cut"


def test_what_is_not_clip_is_named(folder, images, tmp_path):
    with pytest.raises(TesseraError, match="cannot load the vision network"):
        clip.load(str(tmp_path / "none"))
    transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=28, patch_size=14)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    with pytest.raises(TesseraError, match="is a vit network; expected CLIP"):
        clip.load(str(tmp_path))
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(TesseraError, match="cannot load the tokenizer of CLIP"):
        clip.load(str(tmp_path))


@pytest.mark.parametrize(("metrics", "network"), [(["clip_score"], None), (["kid"], "folder")])
def test_metric_and_network_need_each_other(images, tmp_path, metrics, network):
    extractor = load_extractor("shapes", torch.device("cpu"))
    with pytest.raises(TesseraError, match="clip_score and the folder of a CLIP network"):
        suite.evaluate(Captioned(images, CAPTIONS), "shapes", extractor, tmp_path, metrics, clip=network)
