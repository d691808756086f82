"""What an adapter trains: each kind is a type with its own settings, and makes the layers that it adds to a network."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator
from torch import Tensor, nn

from tessera.adapters.control import (
    ChannelsControl,
    ControlLowRank,
    CopyControl,
    PromptControl,
    TokensControl,
    controlled_linears,
)
from tessera.adapters.layers import AdapterLayer, BiasDelta, LowRank, OutputScale, Rows
from tessera.adapters.network import ATTRIBUTE, Layers
from tessera.adapters.quantized_base import BaseFormat
from tessera.conditioning.control import AnyControlImage, Edges
from tessera.encoders.text import WordsEncoder
from tessera.errors import TesseraError
from tessera.layers.embeddings import LabelEmbedder
from tessera.layers.fused_linear import FusedLinear
from tessera.layers.modulation import Modulation
from tessera.layers.text import TextEmbedder
from tessera.models.dit import DiT
from tessera.models.network import Network
from tessera.settings import Settings, as_tuple, expand_kind

Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
PROJECTIONS = {2: ("k", "v"), 3: ("q", "k", "v")}  # what is fused in a map, by the number of projections


class AdapterConfig(Settings, ABC):
    """What all kinds of adapters have."""

    kind: str
    base_weights: BaseFormat = Field(
        default="float32",
        description="how the frozen weights of the blocks are held in training; in fewer bits they take less memory",
    )

    @abstractmethod
    def layers(self, network: Network, class_names: tuple[str, ...], vocabulary: tuple[str, ...] = ()) -> Layers:
        """New layers for a network, which change nothing yet. Raises TesseraError if none of its modules is meant.

        vocabulary: of a network that reads words
        """

    @abstractmethod
    def summary(self) -> str:
        """The adapter in one line."""


class LoRAConfig(AdapterConfig):
    """Low-rank changes of linear layers (Hu et al. 2021)."""

    kind: Literal["lora"] = "lora"  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)
    rank: PositiveInt = Field(default=16, description="rank of the changes")
    alpha: PositiveFloat | None = Field(
        default=None, description="the change is multiplied by alpha / rank; null: by 1"
    )
    where: str | None = Field(
        default=None,
        description="regular expression for the names of the layers to adapt; null: all of the blocks but modulation",
    )
    projections: Annotated[tuple[Literal["q", "k", "v"], ...], BeforeValidator(as_tuple)] = Field(
        default=(), description="of fused maps of queries, keys and values, only these, each with its own change"
    )
    dora: bool = Field(default=False, description="learn the length of each row of a weight apart (Liu et al. 2024)")
    classes: Names = Field(default=(), description="also train the embeddings of these classes")
    words: Names = Field(default=(), description="also train the embeddings of these words of the vocabulary")

    @field_validator("where")
    @classmethod
    def _check_where(cls, where: str | None) -> str | None:
        try:
            re.compile(where or "")
        except re.error as error:
            raise ValueError(f"'{where}' is not a regular expression: {error}") from None
        return where

    def layers(self, network: Network, class_names: tuple[str, ...], vocabulary: tuple[str, ...] = ()) -> Layers:
        linears = dict(linear_layers(network))
        if self.where is None:
            inner = {name: module for name, module in linears.items() if name in block_layers(network)}
        else:
            inner = {name: module for name, module in linears.items() if re.search(self.where, name)}
        layers: dict[str, dict[str, AdapterLayer]] = {}
        for name, module in inner.items():
            numbers: tuple[int | None, ...] = (None,)
            names = PROJECTIONS.get(module.num_projections, ()) if isinstance(module, FusedLinear) else ()
            if self.projections and is_attention_map(name, module):
                numbers = tuple(names.index(each) for each in self.projections if each in names)
            for number in numbers:
                kind = LowRank.kind if number is None else f"{LowRank.kind}_{number}"
                scale = (self.alpha or self.rank) / self.rank
                try:
                    layers.setdefault(name, {})[kind] = LowRank(module, self.rank, scale, self.dora, number)
                except ValueError as error:
                    raise TesseraError(f"adapter.rank is {self.rank}, but in {name} {error}") from None
        if not layers:
            raise TesseraError(
                f"adapter.where '{self.where}' matches none of the {len(linears)} linear layers, such as "
                f"{', '.join(list(linears)[:4])}"
            )
        if self.classes:
            layers |= class_rows(network, self.classes, class_names)
        if self.words:
            layers |= word_rows(network, self.words, vocabulary)
        return layers

    def summary(self) -> str:
        where = f", where '{self.where}'" if self.where else ""
        parts = f", {' '.join(self.projections)} of attention" if self.projections else ""
        scale = "" if self.alpha in (None, self.rank) else f", alpha {self.alpha:g}"
        rows = "".join(f", the {kind} {', '.join(names)}" for kind, names in self.rows.items() if names)
        return f"{'DoRA' if self.dora else 'LoRA'} of rank {self.rank}{scale}{where}{parts}{rows}"

    @property
    def rows(self) -> dict[str, tuple[str, ...]]:
        """The embeddings that are trained with the layers."""
        return {"classes": self.classes, "words": self.words}


class DiffFitConfig(AdapterConfig):
    """Biases, embeddings of classes, and a factor for each output of each block part (Xie et al. 2023, "DiffFit")."""

    kind: Literal["difffit"] = "difffit"  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)
    scales: bool = Field(default=True, description="the factors")
    classes: bool = Field(default=True, description="the embeddings of classes")

    def layers(self, network: Network, class_names: tuple[str, ...], vocabulary: tuple[str, ...] = ()) -> Layers:
        layers: dict[str, dict[str, AdapterLayer]] = {}
        outputs = block_layers(network)
        for name, module in linear_layers(network):
            if module.bias is not None:
                layers.setdefault(name, {})[BiasDelta.kind] = BiasDelta(module)
            if self.scales and name in outputs and name.endswith((".proj", ".fc2")):
                layers.setdefault(name, {})[OutputScale.kind] = OutputScale(module)
        for name, module in network.named_modules():
            if self.classes and isinstance(module, LabelEmbedder):
                table = module.embedding_table
                rows = Rows(table, torch.arange(table.num_embeddings))
                layers[f"{name}.embedding_table"] = {Rows.kind: rows}
        return layers

    def summary(self) -> str:
        parts = ["biases", *["factors"] * self.scales, *["classes"] * self.classes]
        return f"DiffFit: {', '.join(parts)}"


class ClassesConfig(AdapterConfig):
    """The embeddings of some classes alone, as textual inversion trains one new word (Gal et al. 2022)."""

    kind: Literal["classes"] = "classes"  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)
    classes: Names = Field(description="their names")

    def layers(self, network: Network, class_names: tuple[str, ...], vocabulary: tuple[str, ...] = ()) -> Layers:
        return class_rows(network, self.classes, class_names)

    def summary(self) -> str:
        return f"the classes {', '.join(self.classes)}"


class WordsConfig(AdapterConfig):
    """The embeddings of some words alone (Gal et al. 2022, "An Image is Worth One Word"), in a model that learned its
    vocabulary. `tessera classes --add-word` adds new words to it."""

    kind: Literal["words"] = "words"  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)
    words: Names = Field(description="of the vocabulary")

    def layers(self, network: Network, class_names: tuple[str, ...], vocabulary: tuple[str, ...] = ()) -> Layers:
        return word_rows(network, self.words, vocabulary)

    def summary(self) -> str:
        return f"the words {', '.join(self.words)}"


class ControlConfig(AdapterConfig):
    """Control by an image, such as the edges of what is to be generated: see `tessera.adapters.control`."""

    kind: Literal["control"] = "control"  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)
    image: AnyControlImage = Field(
        default=Edges(), description="how the control image is made from an image, in training and of a photo"
    )
    how: Literal["channels", "copy", "tokens", "prompt"] = Field(
        default="channels",
        description="extra input channels, copies of the first blocks, further tokens, or an image prompt",
    )
    rank: int | None = Field(
        default=None,
        ge=0,
        description="channels and tokens: of the low-rank changes of attention and MLP; null: 16, 0: none",
    )
    copies: PositiveInt | None = Field(
        default=None, description="copy: how many blocks are copied; null: half, without the last (13 of 28)"
    )
    tokens: PositiveInt | None = Field(
        default=None, description="prompt: how many tokens an image becomes; null: 4, as in IP-Adapter"
    )

    @model_validator(mode="before")
    @classmethod
    def _prompt_with_the_image(cls, values: Any) -> Any:
        is_prompt = isinstance(values, dict) and values.get("how") == "prompt"
        return {"image": "image", **values} if is_prompt else values

    @model_validator(mode="after")
    def _check_how(self) -> "ControlConfig":
        if self.how in ("copy", "prompt") and self.rank is not None:
            raise ValueError(
                f"rank has no effect with how={self.how}, which changes no layer of the model: leave it out"
            )
        if self.how != "copy" and self.copies is not None:
            raise ValueError(f"copies has no effect with how={self.how}: it needs how=copy")
        if self.how != "prompt" and self.tokens is not None:
            raise ValueError(f"tokens has no effect with how={self.how}: it needs how=prompt")
        return self

    @property
    def low_rank(self) -> int:
        """The rank of the changes of attention and MLP; 0: none"""
        return 0 if self.how in ("copy", "prompt") else 16 if self.rank is None else self.rank

    def layers(self, network: Network, class_names: tuple[str, ...], vocabulary: tuple[str, ...] = ()) -> Layers:
        if not isinstance(network, DiT) or network.config.is_temporal:
            kind = "clips" if network.config.is_temporal else network.config.kind
            raise TesseraError(f"adapter.kind=control needs a transformer for images (dit, pixart); this is for {kind}")
        if self.how == "copy":
            depth = len(network.blocks)
            try:
                return {"": {CopyControl.kind: CopyControl(network, self.copies or max((depth - 1) // 2, 1))}}
            except ValueError as error:
                raise TesseraError(f"adapter.copies: {error}") from None
        if self.how == "prompt":
            return {"": {PromptControl.kind: PromptControl(network, self.tokens or 4)}}
        control = ChannelsControl(network) if self.how == "channels" else TokensControl(network)
        layers: dict[str, dict[str, AdapterLayer]] = {"": {control.kind: control}}
        # The tokens of a control image end with the keys and values of the last block.
        unused = re.compile(rf"blocks\.{len(network.blocks) - 1}\.(attn\.proj|mlp\.)") if self.how == "tokens" else None
        for name, module in controlled_linears(network) if self.low_rank else ():
            if unused is not None and unused.match(name):
                continue
            try:
                layers[name] = {ControlLowRank.kind: ControlLowRank(module, self.low_rank)}
            except ValueError as error:
                raise TesseraError(f"adapter.rank is {self.low_rank}, but in {name} {error}") from None
        return layers

    def summary(self) -> str:
        counts = {"blocks": self.copies, "tokens": self.tokens}
        detail = "".join(f", {count} {what}" for what, count in counts.items() if count)
        detail = f", rank {self.low_rank}" if self.low_rank else detail
        return f"control by {self.image.kind}, {self.how}{detail}"


AnyAdapter = Annotated[
    LoRAConfig | DiffFitConfig | ClassesConfig | WordsConfig | ControlConfig,
    Field(discriminator="kind"),
    BeforeValidator(expand_kind),
]


def class_rows(
    network: Network, names: Sequence[str], class_names: Sequence[str]
) -> Mapping[str, dict[str, AdapterLayer]]:
    """The layer of the embeddings of some classes. Raises TesseraError if the network does not have them."""
    for name, module in network.named_modules():
        if isinstance(module, LabelEmbedder):
            numbers = _numbers("classes", names, class_names)
            return {f"{name}.embedding_table": {Rows.kind: Rows(module.embedding_table, numbers)}}
    raise TesseraError("adapter.classes needs a model with classes")


def word_rows(
    network: Network, names: Sequence[str], vocabulary: Sequence[str]
) -> Mapping[str, dict[str, AdapterLayer]]:
    """The layer of the embeddings of some words. Raises TesseraError if the network does not have them."""
    if not vocabulary:
        raise TesseraError(
            "adapter.words needs a model whose text encoder is `words`: the vocabulary of a pretrained one is fixed; "
            "write a rare word into the captions and leave adapter.words out"
        )
    numbers = WordsEncoder.WORDS + _numbers("words", names, vocabulary)
    embedders = {name: module for name, module in network.named_modules() if isinstance(module, TextEmbedder)}
    [(name, module)] = embedders.items()
    assert module.embedding is not None
    return {f"{name}.embedding": {Rows.kind: Rows(module.embedding, numbers)}}


def _numbers(kind: str, names: Sequence[str], known: Sequence[str]) -> Tensor:
    if unknown := [name for name in names if name not in known]:
        raise TesseraError(
            f"adapter.{kind} has {', '.join(unknown)}; the model has the {kind} {', '.join(known[:10])}: `tessera "
            "classes` adds others"
        )
    return torch.tensor([known.index(name) for name in names])


def linear_layers(network: Network) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that adapters can change, by name."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and f".{ATTRIBUTE}." not in f".{name}":
            yield name, module


def block_layers(network: Network) -> set[str]:
    """The names of the linear layers of blocks, without those of the modulation."""
    modulation = {module.linear for module in network.modules() if isinstance(module, Modulation)}
    inside = {module for block in network.blocks for module in block.modules()} - modulation
    return {name for name, module in linear_layers(network) if module in inside}


def is_attention_map(name: str, module: nn.Linear) -> bool:
    """Whether queries, keys or values are fused in a map."""
    return isinstance(module, FusedLinear) and "mlp" not in name
