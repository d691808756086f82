"""Words added to the vocabulary of a trained model of text, before they are trained."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from tessera.bundle import Model, assemble
from tessera.encoders.text import WordsConfig, WordsEncoder
from tessera.errors import TesseraError
from tessera.settings import validate
from tessera.training.classes import check_no_adapters

EMBEDDING = "text_embedder.embedding.weight"


@torch.no_grad()
def add_words(model: Model, words: Mapping[str, Sequence[str]]) -> Model:
    """A model whose vocabulary has more words, after its own. Texts without them mean what they did, bit for bit.

    words: new word -> the words whose mean is its first embedding; none: the mean of all. The given model stays as it
    is and shares its other weights with the new one. Raises TesseraError for a model with another text encoder, and for
    words that are unknown, repeated or already there.
    """
    text = vocabulary_of(model)
    check_no_adapters(model)
    if not words:
        raise TesseraError("no word to add")
    if present := [word for word in words if word in text.vocabulary]:
        raise TesseraError(f"the vocabulary has the word '{present[0]}' already: choose one that is rare")
    numbers = {word: number for number, word in enumerate(text.vocabulary, WordsEncoder.WORDS)}
    new_text = validate(WordsConfig, {**text.model_dump(), "vocabulary": (*text.vocabulary, *words)}, "the new words")
    old = model.network.state_dict()[EMBEDDING]
    rows, parts = [], []
    for word, sources in words.items():
        if unknown := [each for each in sources if each not in numbers]:
            raise TesseraError(
                f"'{word}' cannot begin as '{unknown[0]}', which is not among the {len(numbers)} words of the model, "
                f"such as {', '.join(text.vocabulary[:5])}"
            )
        if len(set(sources)) < len(sources):
            raise TesseraError(f"'{word}' would be the mean of a word and itself: give each word once")
        known = [numbers[each] for each in sources] or list(numbers.values()) or list(range(len(old)))
        rows.append(old[known].mean(dim=0, keepdim=True))
        parts.append(f"{word} (mean of {', '.join(sources) or 'all words'})")
    provenance = model.config.provenance
    history = "; ".join([*([provenance.words_added] if provenance.words_added else []), *parts])
    network = model.config.network
    config = model.config.model_copy(
        update={
            "network": network.model_copy(update={"vocabulary_size": len(old) + len(rows)}),
            "text": new_text,
            "provenance": provenance.model_copy(update={"words_added": history}),
        }
    )
    state = {**model.network.state_dict(), EMBEDDING: torch.cat((old, *rows))}
    new_network = assemble(config, state, "the model", model.device).network
    return replace(model, config=config, network=new_network, loaded_text_encoder=None)


def vocabulary_of(model: Model) -> WordsConfig:
    """The text encoder of a model whose words can be added to. Raises TesseraError for any other model."""
    text = model.config.text
    if isinstance(text, WordsConfig):
        return text
    if not model.config.network.uses_text:
        raise TesseraError("this model is not conditioned on text: it has no words; --add adds a class")
    raise TesseraError(
        f"the text encoder of this model ({'not known' if text is None else text.kind}) is pretrained, and its "
        "vocabulary fixed: write a rare word into the captions of your images, and train a LoRA"
    )
