"""Text encoders: words as ids."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tessera.encoders.text import AnyTextEncoder, WordsConfig, WordsEncoder, split_words
from tessera.errors import TesseraError
from tessera.settings import Settings

CAPTIONS = ("A red circle.", "a blue circle above a red square", "")
KNOWN = ("a", "circle", "red", ".", "above", "blue", "square")  # by frequency, then alphabet


def words(captions=CAPTIONS, **settings) -> WordsEncoder:
    return WordsConfig(**settings).with_vocabulary((caption, 1) for caption in captions).build()


def test_vocabulary_of_captions():
    assert words().config.vocabulary == KNOWN
    assert words(max_words=2).config.vocabulary == KNOWN[:2]
    assert words().vocabulary_size == WordsEncoder.WORDS + len(KNOWN)
    counted = WordsConfig().with_vocabulary([("red", 1), ("blue", 5)])
    assert counted.vocabulary == ("blue", "red")


def test_words_are_split_as_written():
    assert split_words("Don't  stop: 3 Äpfel, e\u0301!") == ["don", "'", "t", "stop", ":", "3", "äpfel", ",", "é", "!"]
    assert split_words("赤い丸 red_x") == ["赤", "い", "丸", "red", "_", "x"]


def test_ids_and_mask():
    encoder = words()
    ids, mask = encoder.encode(CAPTIONS)
    a, circle, red, dot, above, blue, square = range(encoder.WORDS, encoder.WORDS + 7)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [
        [a, red, circle, dot, 0, 0, 0, 0],
        [a, blue, circle, above, a, red, square, 0],
        [0] * 8,
    ]
    assert mask.sum(dim=1).tolist() == [5, 8, 1]  # the end token counts, also alone
    assert ids.max() < encoder.vocabulary_size


def spelled(ids: list[int], vocabulary: tuple[str, ...]) -> list[str]:
    """The words of ids: the inverse of the encoder, written from its description."""
    result, current = [], None
    for number in ids[:-1]:
        if number == 1:
            current = bytearray()
            result.append(current)
        elif number < 258:
            current.append(number - 2)
        else:
            result.append(vocabulary[number - 258])
    return [word.decode() if isinstance(word, bytearray) else word for word in result]


@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_no_word_is_lost(text):
    encoder = words()
    [ids] = encoder.tokenize([f"red {text}"])
    assert ids[-1] == 0
    assert spelled(ids, encoder.config.vocabulary) == split_words(f"red {text}")
    assert max(ids) < encoder.vocabulary_size


def test_long_captions_are_errors_or_cut():
    encoder = words(max_tokens=4)
    assert encoder.encode(["a red circle"])[0].shape == (1, 4)
    with pytest.raises(
        TesseraError, match="has 8 tokens, and the text encoder takes at most 4: shorten 'a blue circle"
    ):
        encoder.encode([CAPTIONS[1]])
    ids, mask = encoder.encode([CAPTIONS[1]], cut=True)
    assert ids.tolist() == [[*encoder.tokenize(["a blue circle"])[0]]]
    assert mask.all()


class Section(Settings):
    text: AnyTextEncoder


def test_settings():
    def read(text):
        return Section.model_validate({"text": text}).text

    assert read("words") == WordsConfig()
    with pytest.raises(ValidationError, match="'Red' is not one word in lower case"):
        read({"kind": "words", "vocabulary": ["Red"]})
    with pytest.raises(ValidationError, match="'red' is repeated"):
        read({"kind": "words", "vocabulary": ["red", "a", "red"]})


def test_fingerprint():
    assert words().fingerprint() == words().fingerprint()
    others = (words(max_tokens=9), words(("red",)))
    assert len({words().fingerprint(), *(each.fingerprint() for each in others)}) == 3
