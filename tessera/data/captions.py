"""The captions of a data set, and the same as tokens of a text encoder.

Shapes: N samples, C captions, U different texts, B batch, M tokens of the longest of a batch, E channels.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tessera import randomness
from tessera.conditioning.text import NULL_TOKEN
from tessera.data.files import FilesDataset
from tessera.data.images import Dataset
from tessera.data.index import arrow, compute
from tessera.data.latents import LatentsDataset
from tessera.data.packed import progress
from tessera.encoders.text import TextEncoder
from tessera.errors import TesseraError

VISIT_STREAM = 0x76697374  # random stream that selects one of several captions of a sample at a position
TEXTS_AT_ONCE = 1024  # texts tokenized together
BATCH_SIZE = 32  # texts encoded together
MAX_MEASURED = 10_000  # texts whose tokens are counted where an estimate is enough


@dataclass(frozen=True)
class Captions:
    """counts: captions of each sample, int64 [N]; numbers: the text of each caption, int64 [C]; texts: each different
    text once, in order of first appearance, an arrow array of strings [U]."""

    counts: np.ndarray
    numbers: np.ndarray
    texts: Any

    @classmethod
    def of(cls, dataset: Dataset | LatentsDataset, description: str = "the data set") -> "Captions":
        """Those of a data set (of latents: of the images). Raises TesseraError if it has none."""
        pa = arrow()
        source = dataset.source if isinstance(dataset, LatentsDataset) else dataset
        if isinstance(source, FilesDataset):
            counts, column = source.all_captions()
        elif source is not None and (caption := getattr(source, "caption", None)) is not None:
            column = pa.chunked_array([pa.array([caption(index) for index in range(len(source))], pa.string())])
            counts = np.ones(len(source), np.int64)
        else:
            counts, column = np.zeros(0, np.int64), pa.chunked_array([pa.array([], pa.string())])
        coded = column.dictionary_encode().combine_chunks()
        if not len(coded):
            raise TesseraError(
                f"the network reads text, but {description} has no captions: add them as a metadata.jsonl with "
                "file_name and caption, as .txt files beside the images, or in a column of a table "
                "(data.caption=COLUMN)"
            )
        return cls(counts, coded.indices.cast(pa.int64()).to_numpy(), coded.dictionary)

    def __len__(self) -> int:
        """U"""
        return len(self.texts)

    def batches(self) -> Iterator[list[str]]:
        """All different texts, in order."""
        for start in range(0, len(self.texts), TEXTS_AT_ONCE):
            yield self.texts.slice(start, TEXTS_AT_ONCE).to_pylist()

    def text_counts(self) -> Iterator[tuple[str, int]]:
        """All different texts, and how often each occurs."""
        counts = iter(np.bincount(self.numbers, minlength=len(self.texts)).tolist())
        return ((text, next(counts)) for batch in self.batches() for text in batch)

    @cached_property
    def digest(self) -> str:
        """A hash of the texts in their order."""
        digest = hashlib.sha256()
        for batch in self.batches():
            for text in batch:
                content = text.encode("utf-8", "replace")
                digest.update(len(content).to_bytes(8, "little") + content)
        return digest.hexdigest()


@dataclass(frozen=True)
class TextSizes:
    """What a network must know about its text.

    channels: E of the embeddings, or 0 for ids. vocabulary_size: of ids, or 0. max_tokens: of the encoder. longest:
    tokens of the longest caption. num_texts: different captions; 0: not known. counted_texts, counted_tokens: those
    whose tokens were counted, and how many they have.
    """

    channels: int
    vocabulary_size: int
    max_tokens: int
    longest: int
    num_texts: int = 0
    counted_texts: int = 0
    counted_tokens: int = 0

    @classmethod
    def measure(cls, captions: Captions, encoder: TextEncoder) -> "TextSizes":
        """Without encoding. Of frozen encoders, only the first 10,000 texts are counted."""
        lengths: list[int] = []
        for batch in captions.batches():
            lengths += map(len, encoder.tokenize(batch, cut=True))
            if encoder.channels and len(lengths) >= MAX_MEASURED:
                break
        return cls.of(encoder, max(1, *lengths), len(captions), len(lengths), sum(lengths))

    @classmethod
    def of(cls, encoder: TextEncoder, *sizes: int) -> "TextSizes":
        """Those of an encoder, and the others."""
        return cls(encoder.channels, encoder.vocabulary_size, encoder.max_tokens, *sizes)

    @property
    def embedding_bytes(self) -> int:
        """Bytes of the float16 embeddings of all different captions, in a cache or in memory; 0 for ids."""
        if not self.num_texts:
            return 0
        return round(2 * self.channels * self.counted_tokens * self.num_texts / self.counted_texts)


class Tokens(Protocol):
    """The tokens of each different text. lengths: int64 [U]; is_cut: whether it was too long, bool [U]"""

    lengths: np.ndarray
    is_cut: np.ndarray

    def __getitem__(self, number: int) -> np.ndarray:
        """Ids [M] or embeddings [M, E] of a text."""
        ...


@dataclass
class TokensInMemory:
    """values: ids int32 [T] or embeddings float16 [T, E] of all texts one after the other."""

    lengths: np.ndarray
    is_cut: np.ndarray
    values: np.ndarray
    _starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._starts = self.lengths.cumsum() - self.lengths

    def __getitem__(self, number: int) -> np.ndarray:
        start = self._starts[number]
        return self.values[start : start + self.lengths[number]]


@dataclass
class EncodedCaptions:
    """The captions of samples as tokens: `dataset.text`.

    first, counts: the first caption of each sample and their number, int64 [N]. numbers: the text of each caption.
    encoder: for any text.
    """

    first: np.ndarray
    counts: np.ndarray
    numbers: np.ndarray
    values: Tokens
    encoder: "CaptionEncoder"
    sizes: TextSizes
    seed: int

    def tokens(self, samples: Sequence[int], positions: Tensor) -> Tensor:
        """The tokens of one caption of each sample, chosen by the position: float32 [B, M, E], or ids int64 [B, M].

        Masked tokens are 0. Samples without a caption are null rows: NaN or NULL_TOKEN.
        """
        texts = self._choose(samples, positions)
        shape = len(texts), self._num_tokens(texts)
        if self.sizes.channels:
            result, null = np.zeros((*shape, self.sizes.channels), np.float32), np.nan
        else:
            result, null = np.zeros(shape, np.int64), NULL_TOKEN
        for row, text in enumerate(texts.tolist()):
            if text < 0:
                result[row] = null
            else:
                values = self.values[text]
                result[row, : len(values)] = values
        return torch.from_numpy(result)

    def mask(self, samples: Sequence[int], positions: Tensor) -> Tensor:
        """Which of these tokens are valid: bool [B, M]; in null rows the first one, as that of an empty text."""
        texts = self._choose(samples, positions)
        lengths = np.where(texts < 0, 1, self.values.lengths[texts])
        return torch.from_numpy(np.arange(self._num_tokens(texts)) < lengths[:, None])

    def _num_tokens(self, texts: np.ndarray) -> int:
        present = texts[texts >= 0]
        return int(self.values.lengths[present].max()) if len(present) else 1

    def _choose(self, samples: Sequence[int], positions: Tensor) -> np.ndarray:
        """The text of each sample at a position, int64 [B]; -1: none"""
        rows = np.asarray(samples, np.int64)
        counts = self.counts[rows]
        choices = np.zeros(len(rows), np.int64)
        if (counts > 1).any():  # the first 24 bits of a random word
            uniform = randomness.uniform(self.seed, torch.as_tensor(positions), VISIT_STREAM)[:, 0].double().numpy()
            choices = (uniform * counts).astype(np.int64)
        captions = np.minimum(self.first[rows] + choices, len(self.numbers) - 1)  # the minimum: of a last null row
        return np.where(counts > 0, self.numbers[captions], -1)


def encode_captions(
    dataset: Dataset | LatentsDataset,
    captions: Captions,
    encoder: TextEncoder,
    seed: int,
    values: Tokens | None = None,
    report: Callable[[str], None] = lambda text: None,
    prompts: Sequence[str] = (),
) -> EncodedCaptions:
    """The captions of a data set as tokens.

    values: those of all texts, if they are computed already. prompts: further texts that are encoded again and again;
    they are encoded now, so that a frozen encoder is loaded once.
    """
    if values is None:
        values = _encode_texts(captions, encoder, report)
    first = captions.counts.cumsum() - captions.counts
    rows = dataset.indices if isinstance(dataset, LatentsDataset) else slice(None)
    counts, first = captions.counts[rows], first[rows]
    if missing := int((counts == 0).sum()):
        report(f"{missing:,} of {len(counts):,} samples have no caption: they are trained unconditionally")
    if num_cut := int(values.is_cut[captions.numbers].sum()):
        report(f"{num_cut:,} captions have more than {encoder.max_tokens} tokens and are cut (text.max_tokens)")
    longest = max(1, int(values.lengths.max()))
    sizes = TextSizes.of(encoder, longest, len(captions), len(captions), int(values.lengths.sum()))
    encoder = CaptionEncoder(encoder, captions, values, prompts)
    if prompts:
        encoder.encode(prompts)
    if "" in prompts:
        encoder.encode_exactly("", is_negative=True)
    encoder.unload()
    return EncodedCaptions(first, counts, captions.numbers, values, encoder, sizes, seed)


class CaptionEncoder(TextEncoder):
    """An encoder that has the tokens of training captions ready, so that its network is loaded for other texts only.

    It keeps those of `prompts` and of the empty text once they were encoded. Training captions that are too long are
    cut, as in training.
    """

    def __init__(self, encoder: TextEncoder, captions: Captions, values: Tokens, prompts: Sequence[str] = ()) -> None:
        self.inner, self.captions, self.values = encoder, captions, values
        self.prompts = {"", *prompts}
        self.prompt_rows: dict[tuple[str, bool, bool], Tensor] = {}
        self.channels, self.vocabulary_size = encoder.channels, encoder.vocabulary_size
        self.max_tokens = encoder.max_tokens

    def to(self, device: torch.device | str) -> Self:
        self.inner.to(device)
        return self

    def unload(self) -> None:
        self.inner.unload()

    def tokenize(self, captions: Sequence[str], cut: bool = False) -> list[list[int]]:
        return self.inner.tokenize(captions, cut)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.inner.embed(ids, mask)

    def fingerprint(self) -> str:
        return self.inner.fingerprint()

    def encode(self, captions: Sequence[str], cut: bool | None = None) -> tuple[Tensor, Tensor]:
        return _padded([self._row(caption, self.cut_long if cut is None else cut) for caption in captions])

    def encode_negative(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        if not self._has_negative:
            return self.encode(captions)
        return _padded([self.encode_exactly(caption, self.cut_long, is_negative=True) for caption in captions])

    @property
    def _has_negative(self) -> bool:
        """Whether negative prompts are encoded otherwise than others."""
        return type(self.inner).encode_negative is not TextEncoder.encode_negative

    def _row(self, caption: str, cut: bool) -> Tensor:
        """The valid tokens of a text."""
        number = compute().index(self.captions.texts, caption).as_py()
        if number < 0:
            return self.encode_exactly(caption, cut)
        return torch.from_numpy(self.values[number].astype(np.float32 if self.channels else np.int64))

    def encode_exactly(self, caption: str, cut: bool = False, is_negative: bool = False) -> Tensor:
        """The valid tokens of a text by the inner encoder: those of captions are rounded to float16."""
        is_negative = is_negative and self._has_negative
        key = caption, cut, is_negative
        if key not in self.prompt_rows:
            tokens, _ = self.inner.encode_negative([caption]) if is_negative else self.inner.encode([caption], cut)
            if caption not in self.prompts:
                return tokens[0]
            self.prompt_rows[key] = tokens[0]
        return self.prompt_rows[key]


def _padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one batch, and which of them are valid."""
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True), mask


def _encode_texts(captions: Captions, encoder: TextEncoder, report: Callable[[str], None]) -> TokensInMemory:
    """The tokens of all texts."""
    total = -(-len(captions.texts) // TEXTS_AT_ONCE)
    if encoder.channels:
        report(f"encoding {len(captions.texts):,} captions; `tessera data cache` stores them for all further runs")
    lengths, values, is_cut = [], [], []
    for texts in progress(captions.batches(), total, 2 if encoder.channels else 50, "encoding captions"):
        for text_values, cut in encode_batch(encoder, texts):
            lengths.append(len(text_values))
            values.append(text_values)
            is_cut.append(cut)
    return TokensInMemory(np.asarray(lengths, np.int64), np.asarray(is_cut, bool), np.concatenate(values))


def encode_batch(
    encoder: TextEncoder, texts: Sequence[str], batch_size: int = BATCH_SIZE
) -> list[tuple[np.ndarray, bool]]:
    """For each text, its ids int32 [M] or embeddings float16 [M, E], and whether it was cut. Raises TesseraError."""
    full = [len(ids) for ids in encoder.tokenize(texts)]
    results: list[tuple[np.ndarray, bool]] = [(np.zeros(0), False)] * len(texts)
    order = sorted(range(len(texts)), key=lambda row: full[row])  # texts of about one length: little padding
    for start in range(0, len(texts), batch_size):
        rows = order[start : start + batch_size]
        tokens, mask = encoder.encode([texts[row] for row in rows], cut=True)
        stored = tokens.to(torch.float16 if encoder.channels else torch.int32)
        for row, values, valid in zip(rows, stored, mask):
            result = values[valid].numpy()
            if encoder.channels and not np.isfinite(result).all():
                raise TesseraError(
                    f"the text encoder gives embeddings of '{texts[row][:60]}' that float16 cannot hold: "
                    "set text.dtype to float32"
                )
            results[row] = result, full[row] > encoder.max_tokens
    return results
