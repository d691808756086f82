"""What an adapter trains: each kind is a type with its own settings, and makes the layers that it adds to a network."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator
from torch import nn

from tessera.adapters.control import ChannelsControl, ControlLowRank, CopyControl, TokensControl, controlled_linears
from tessera.adapters.layers import AdapterLayer, BiasDelta, LowRank, OutputScale, Rows
from tessera.adapters.network import ATTRIBUTE, Layers
from tessera.conditioning.control import AnyControlImage, Edges
from tessera.errors import TesseraError
from tessera.layers.embeddings import LabelEmbedder
from tessera.layers.fused_linear import FusedLinear
from tessera.layers.modulation import Modulation
from tessera.models.dit import DiT
from tessera.models.network import Network
from tessera.settings import Settings, as_tuple, expand_kind

PROJECTIONS = {2: ("k", "v"), 3: ("q", "k", "v")}  # what is fused in a map, by the number of projections


class AdapterConfig(Settings, ABC):
    """What all kinds of adapters have."""

    kind: str

    @abstractmethod
    def layers(self, network: Network, class_names: tuple[str, ...]) -> Layers:
        """New layers for a network, which change nothing yet. Raises TesseraError if none of its modules is meant."""

    @abstractmethod
    def summary(self) -> str:
        """The adapter in one line."""


class LoRAConfig(AdapterConfig):
    """Low-rank changes of linear layers (Hu et al. 2021)."""

    kind: Literal["lora"] = "lora"  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)
    rank: PositiveInt = 16
    alpha: PositiveFloat | None = Field(default=None, description="the change is multiplied by alpha / rank; null: 1")
    where: str | None = Field(
        default=None,
        description="regular expression for the names of the layers to adapt; null: all of the blocks but modulation",
    )
    projections: Annotated[tuple[Literal["q", "k", "v"], ...], BeforeValidator(as_tuple)] = Field(
        default=(), description="of fused maps of queries, keys and values, only these, each with its own change"
    )
    dora: bool = Field(default=False, description="learn the length of each row of a weight apart (Liu et al. 2024)")

    @field_validator("where")
    @classmethod
    def _check_where(cls, where: str | None) -> str | None:
        try:
            re.compile(where or "")
        except re.error as error:
            raise ValueError(f"'{where}' is not a regular expression: {error}") from None
        return where

    def layers(self, network: Network, class_names: tuple[str, ...]) -> Layers:
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
        return layers

    def summary(self) -> str:
        where = f", where '{self.where}'" if self.where else ""
        parts = f", {' '.join(self.projections)} of attention" if self.projections else ""
        scale = "" if self.alpha in (None, self.rank) else f", alpha {self.alpha:g}"
        return f"{'DoRA' if self.dora else 'LoRA'} of rank {self.rank}{scale}{where}{parts}"


class DiffFitConfig(AdapterConfig):
    """Biases, embeddings of classes, and a factor for each output of each block part (Xie et al. 2023, "DiffFit")."""

    kind: Literal["difffit"] = "difffit"  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)
    scales: bool = Field(default=True, description="the factors")
    classes: bool = Field(default=True, description="the embeddings of classes")

    def layers(self, network: Network, class_names: tuple[str, ...]) -> Layers:
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
    classes: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(description="their names")

    def layers(self, network: Network, class_names: tuple[str, ...]) -> Layers:
        if unknown := [name for name in self.classes if name not in class_names]:
            raise TesseraError(
                f"adapter.classes has {', '.join(unknown)}; the model has the classes {', '.join(class_names[:10])}"
            )
        numbers = torch.tensor([class_names.index(name) for name in self.classes])
        for name, module in network.named_modules():
            if isinstance(module, LabelEmbedder):
                return {f"{name}.embedding_table": {Rows.kind: Rows(module.embedding_table, numbers)}}
        raise TesseraError("adapter.kind=classes needs a model with classes")

    def summary(self) -> str:
        return f"the classes {', '.join(self.classes)}"


class ControlConfig(AdapterConfig):
    """Control by an image, such as the edges of what is to be generated: see `tessera.adapters.control`."""

    kind: Literal["control"] = "control"  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)
    image: AnyControlImage = Field(
        default=Edges(), description="how the control image is made from an image, in training and of a photo"
    )
    how: Literal["channels", "copy", "tokens"] = Field(
        default="channels", description="extra input channels, copies of the first blocks, or further tokens"
    )
    rank: int | None = Field(
        default=None,
        ge=0,
        description="channels and tokens: of the low-rank changes of attention and MLP; null: 16, 0: none",
    )
    copies: PositiveInt | None = Field(
        default=None, description="copy: how many blocks are copied; null: half, without the last (13 of 28)"
    )

    @model_validator(mode="after")
    def _check_how(self) -> "ControlConfig":
        if self.how == "copy" and self.rank is not None:
            raise ValueError("rank has no effect with how=copy: copies are trained whole; leave it out")
        if self.how != "copy" and self.copies is not None:
            raise ValueError(f"copies has no effect with how={self.how}: it needs how=copy")
        return self

    @property
    def low_rank(self) -> int:
        """The rank of the changes of attention and MLP; 0: none"""
        return 0 if self.how == "copy" else 16 if self.rank is None else self.rank

    def layers(self, network: Network, class_names: tuple[str, ...]) -> Layers:
        if not isinstance(network, DiT) or network.config.is_temporal:
            kind = "clips" if network.config.is_temporal else network.config.kind
            raise TesseraError(f"adapter.kind=control needs a transformer for images (dit, pixart); this is for {kind}")
        if self.how == "copy":
            depth = len(network.blocks)
            try:
                return {"": {CopyControl.kind: CopyControl(network, self.copies or max((depth - 1) // 2, 1))}}
            except ValueError as error:
                raise TesseraError(f"adapter.copies: {error}") from None
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
        detail = f", {self.copies} blocks" if self.copies else f", rank {self.low_rank}" if self.low_rank else ""
        return f"control by {self.image.kind}, {self.how}{detail}"


AnyAdapter = Annotated[
    LoRAConfig | DiffFitConfig | ClassesConfig | ControlConfig,
    Field(discriminator="kind"),
    BeforeValidator(expand_kind),
]


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
