"""A new word, and embeddings of classes and words that are trained with a LoRA."""

import numpy as np
import pytest
import torch

import tessera
from tessera import adapters
from tessera.encoders.text import WordsConfig, WordsEncoder
from tessera.errors import TesseraError
from tessera.training.words import EMBEDDING, add_words

VOCABULARY = ("a", "red", "dog", "cat")
TEXT = {
    "num_classes": 0, "vocabulary_size": WordsEncoder.WORDS + 4, "text_tokens": 8,
    "block": {"kind": "rope-swiglu", "text": "keys"},
}  # fmt: skip

PIXART = {key: value for key, value in TEXT.items() if key != "block"} | {"kind": "pixart", "text_channels": 0}


@pytest.fixture(params=["rope-swiglu", "pixart"])
def model(request, make_model):
    network = TEXT if request.param == "rope-swiglu" else PIXART
    return make_model(network=network, text=WordsConfig(vocabulary=VOCABULARY).model_dump())


def images(model, *prompts: str) -> np.ndarray:
    return tessera.generate(model, prompts=list(prompts), seeds=range(len(prompts)), guidance_scale=2.0)


def test_a_new_word_begins_as_the_mean_of_others_and_changes_no_other_text(model):
    before = model.network.state_dict()[EMBEDDING].clone()
    changed = add_words(model, {"zwx": ["dog", "cat"], "qqq": []})
    table = changed.network.state_dict()[EMBEDDING]
    words = before[WordsEncoder.WORDS :]
    assert torch.equal(table[:-2], before)
    torch.testing.assert_close(table[-2], words[2:].mean(dim=0))
    torch.testing.assert_close(table[-1], words.mean(dim=0))
    assert torch.equal(model.network.state_dict()[EMBEDDING], before)
    np.testing.assert_array_equal(images(changed, "a red dog", "a cat"), images(model, "a red dog", "a cat"))
    alias = add_words(model, {"hound": ["dog"]})
    np.testing.assert_array_equal(images(alias, "a red hound"), images(model, "a red dog"))
    assert changed.config.provenance.words_added == "zwx (mean of dog, cat); qqq (mean of all words)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"dog": []}, "has the word 'dog' already"),
        ({"zwx": ["wolf"]}, "'zwx' cannot begin as 'wolf', which is not among the 4 words"),
        ({"zwx": ["dog", "dog"]}, "mean of a word and itself"),
        ({"two words": []}, "'two words' is not one word in lower case"),
        ({}, "no word to add"),
    ],
)
def test_words_that_cannot_be_added_are_errors(model, words, message):
    with pytest.raises(TesseraError, match=message):
        add_words(model, words)


def test_only_a_learned_vocabulary_takes_words(make_model):
    with pytest.raises(TesseraError, match="not conditioned on text"):
        add_words(make_model(), {"zwx": []})
    network = {**TEXT, "vocabulary_size": 0, "text_channels": 384}
    with pytest.raises(TesseraError, match=r"\(minilm\) is pretrained, and its vocabulary fixed"):
        add_words(make_model(network=network, text={"kind": "minilm"}), {"zwx": []})
    with pytest.raises(TesseraError, match="needs a model whose text encoder is `words`"):
        adapters.WordsConfig(words=("zwx",)).layers(make_model(network=network).network, ())


def test_words_and_classes_are_trained_alone_or_with_a_lora(model, make_model):
    number = WordsEncoder.WORDS + 2
    alone = adapters.WordsConfig(words=("dog",)).layers(model.network, (), VOCABULARY)
    with_lora = adapters.LoRAConfig(rank=2, words=("dog",)).layers(model.network, (), VOCABULARY)
    assert alone.keys() == {"text_embedder.embedding"}
    assert with_lora.keys() == adapters.LoRAConfig(rank=2).layers(model.network, ()).keys() | alone.keys()
    assert with_lora["text_embedder.embedding"]["rows"].numbers.tolist() == [number]
    before = images(model, "a dog", "a cat")
    adapters.attach(model.network, "subject", alone)
    alone["text_embedder.embedding"]["rows"].values.data.fill_(3)
    after = images(model, "a dog", "a cat")
    assert (after[0] != before[0]).any()
    np.testing.assert_array_equal(after[1], before[1])
    with pytest.raises(TesseraError, match="adapter.words has wolf; the model has the words a, red, dog, cat"):
        adapters.WordsConfig(words=("wolf",)).layers(model.network, (), VOCABULARY)
    config, network = adapters.LoRAConfig(rank=2, classes=("emu",)), make_model().network
    rows = config.layers(network, ("cat", "dog", "emu"))["y_embedder.embedding_table"]["rows"]
    assert rows.numbers.tolist() == [2]
    assert config.summary() == "LoRA of rank 2, the classes emu"
