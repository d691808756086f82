"""Tokenizers of transformers."""

from typing import Any


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a folder or hub id. Raises the errors of transformers, and ValueError if its files are missing:
    transformers then returns a tokenizer without words, and no error.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError("the files of the tokenizer are missing")
    return tokenizer
