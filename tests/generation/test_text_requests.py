"""Requests to a model of text: negative prompts by row, empty prompts, captions of data, and inputs that do not fit."""

from typing import Any

import numpy as np
import pytest
import torch

from tessera import generation, model_card
from tessera.encoders.text import WordsConfig
from tessera.errors import TesseraError
from tessera.generation.bulk import BulkSamples, bulk_request
from tessera.generation.request import SampleRequest

WORDS = ("a", "red", "blue", "circle", "square")
PROMPTS = ["a red circle", "a blue square square"]


@pytest.fixture
def make_text_model(make_model):
    def make(words=WORDS, **changes):
        text = WordsConfig(vocabulary=words, max_tokens=8)
        network = {
            "block": {"kind": "rope-swiglu", "text": "keys"},
            "vocabulary_size": text.build().vocabulary_size,
            "text_tokens": 8,
        }
        return make_model(network, text=text.model_dump(), **changes)

    return make


@pytest.fixture
def model(make_text_model):
    """A model of three classes and of texts of at most 8 tokens."""
    return make_text_model()


class Captioned:
    """Data with one caption."""

    def __init__(self, caption: str) -> None:
        self.text = caption

    def __len__(self) -> int:
        return 1

    def caption(self, index: int) -> str:
        return self.text


def latents(model, **options) -> torch.Tensor:
    return list(generation.generate_steps(model, [0, 1], [3, 4], prompts=PROMPTS, **options))[-1].x


def test_a_row_without_a_negative_prompt_keeps_the_null_text(model):
    both = latents(model, guidance_scale=3, negative_prompts=["red red", None])
    torch.testing.assert_close(both[0], latents(model, guidance_scale=3, negative_prompts=["red red"])[0])
    torch.testing.assert_close(both[1], latents(model, guidance_scale=3)[1])
    assert (both[1] - latents(model, guidance_scale=3, negative_prompts=["red red"])[1]).abs().max() > 1e-3
    both = latents(model, guidance_scale=3, negative_prompts=["red red", None], null_text="empty")
    torch.testing.assert_close(both[1], latents(model, guidance_scale=3, null_text="empty")[1])
    assert torch.equal(latents(model, guidance_scale=3, negative_prompts=[None]), latents(model, guidance_scale=3))


@pytest.mark.parametrize(
    "options", [{"guidance_scales": {"text": 3.0}}, {"guidance_scale": 3, "negative": {"label": [2]}}], ids=str
)
def test_null_text_empty_is_an_empty_negative_prompt_in_every_term(model, options):
    empty = latents(model, null_text="empty", **options)
    options = {**options, "negative": {**options.get("negative", {}), "text": [""]}}
    assert torch.equal(empty, latents(model, **options))
    assert (empty - latents(model, **{**options, "negative": {}})).abs().max() > 1e-4


def test_a_guidance_model_of_another_text_is_an_error(make_text_model, model):
    assert (latents(model, guidance_scale=2, guidance_model=make_text_model(seed=1)) != 0).any()
    with pytest.raises(TesseraError, match="does not match the model: another vocabulary"):
        latents(model, guidance_scale=2, guidance_model=make_text_model(WORDS[::-1]))
    with pytest.raises(TesseraError, match="vocabulary_size 262, not 263; another vocabulary"):
        latents(model, guidance_scale=2, guidance_model=make_text_model(WORDS[1:]))


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ({"text": "a red circle"}, r"prompts is one text: give a list, \['a red circle'\]"),
        ({"text": [[3, 4, 5]], "text_mask": [[1, 1]]}, "2 entries, 3 tokens"),
        ({"text": [[3, 263]]}, "ids of a text are from 0 to 262; got 3 to 263"),
        ({"text": ["a red a red a red a red"]}, "a text has 9 tokens, and the text encoder takes at most 8"),
    ],
)
def test_texts_that_do_not_fit(model, condition, words):
    with pytest.raises(TesseraError, match=words):
        generation.generate(model, condition={"label": [0], **condition})


def test_captions_of_data_are_cut_as_in_training(model):
    data: Any = Captioned("a red circle a blue square a red circle")
    request = bulk_request(model, 2, "balanced", data=data)
    expected = generation.generate(model, request.classes, [0, 1], prompts=["a red circle a blue square a"])
    np.testing.assert_array_equal(generation.generate_request(model, request), expected)


def test_a_folder_of_images_of_other_negative_prompts_or_scales_is_another_plan(model, tmp_path):
    changes = [
        {},
        {"negative": {"text": ["red"]}},
        {"negative": {"text": ["blue"]}},
        {"guidance_scale": [2.0, 3.0]},
        {"guidance_scale": [3.0, 2.0]},
    ]
    plans = []
    for change in changes:
        inputs = {"label": [0, 1], "text": PROMPTS}
        request = SampleRequest([0, 1], inputs, **{"guidance_scale": 2.0, **change})
        plans.append(str(BulkSamples(model, request, tmp_path).plan))
    assert len(set(plans)) == len(changes)


def test_the_card_says_what_a_model_is_conditioned_on(model, make_text_model, make_model):
    facts = model_card.describe(model)
    assert (facts["input"], facts["text encoder"]) == ("1 x 8 x 8, 3 classes and text", "words, 5 words")
    assert 'tessera sample FOLDER --classes all --prompt "a cat"' in model_card.render(model)
    assert 'prompts=["a cat"]' in model_card.render(model)
    unconditional = make_model({"num_classes": 0})
    assert model_card.describe(unconditional)["input"] == "1 x 8 x 8, unconditional"
    assert "tessera sample FOLDER --num-samples 4" in model_card.render(unconditional)
