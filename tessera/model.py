"""A trained model in memory, and its configuration."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field

from tessera import __version__
from tessera.codecs import AnyCodec, Codec
from tessera.diffusion import AnyDiffusionConfig, DiffusionProcess
from tessera.encoders.text import AnyTextEncoder, TextEncoder
from tessera.errors import TesseraError
from tessera.models import AnyNetwork, DiT, Network
from tessera.models.routing import RoutedDiT, TokenRoutingConfig
from tessera.sampling import SamplingConfig
from tessera.settings import Settings

FORMAT = 2  # of bundles; 0.6.0 and earlier wrote format 1


class Provenance(Settings):
    """What a model is for, and where its weights come from. Every field is None where it is not known."""

    about: str | None = Field(default=None, description="what the model generates, in one line")
    license: str | None = Field(default=None, description="of the weights, and of the data where it asks for it")
    trained_with: str | None = Field(default=None, description="versions of tessera and torch, and the hardware")
    device: str | None = Field(default=None, description="the type of the device it was trained on, such as cuda")
    data: str | None = Field(default=None, description="what it was trained on")
    steps: int | None = None
    images_seen: int | None = None
    global_batch_size: int | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    ema_decay: float | None = Field(default=None, description="of the weights in this bundle")
    ema_length: float | None = Field(default=None, description="of their power-function average")
    init_from: str | None = Field(default=None, description="the model that training started from")
    converted_from: str | None = Field(default=None, description="the file or folder of another format")
    not_converted: str | None = Field(default=None, description="what that file or folder holds and Tessera left out")
    assumed: str | None = Field(default=None, description="what that file or folder does not record")
    classes_changed: str | None = Field(default=None, description="classes added, removed, renamed or merged")
    words_added: str | None = Field(default=None, description="words added to the vocabulary")
    sampling_chosen: str | None = Field(default=None, description="how the sampling settings were chosen")

    def facts(self) -> dict[str, Any]:
        """The known fields, by readable names."""
        return {name.replace("_", " "): value for name, value in self.model_dump(exclude_none=True).items()}


class AdapterInfo(Settings):
    """What an adapter is, and which base it belongs to."""

    adapter_format: Literal[1] = 1
    tessera_version: str = __version__
    summary: str = Field(default="adapter", description="what it changes, in one line")
    settings: dict[str, Any] | None = Field(default=None, description="of the recipe that trained it")
    base: str | None = Field(default=None, description="the hash of the weights that it was trained on")
    base_network: str | None = Field(default=None, description="their network, in one line")
    provenance: Provenance = Provenance()


class BundleConfig(Settings):
    """config.json of a bundle."""

    format: Literal[2] = FORMAT
    tessera_version: str = __version__
    network: AnyNetwork
    diffusion: AnyDiffusionConfig
    codec: AnyCodec
    text: AnyTextEncoder | None = Field(default=None, description="the text encoder; null: no text, or not known")
    sampling: SamplingConfig = SamplingConfig()
    class_names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = Field(
        default=(), description="images of each class in the training data; empty: not known"
    )
    base: str | None = Field(
        default=None, description="the bundle with the weights below the adapters, relative to this; null: its own"
    )
    adapters: dict[str, float] = Field(default_factory=dict, description="the strength of each adapter")
    provenance: Provenance = Provenance()
    recipe: dict[str, Any] | None = Field(default=None, description="the resolved recipe of its training")


@dataclass
class Model:
    """A network with everything needed to sample: diffusion process, codec, text encoder, class names and sampling
    settings."""

    config: BundleConfig
    network: Network
    loaded_codec: Codec | None = None
    loaded_text_encoder: TextEncoder | None = None
    adapters: dict[str, AdapterInfo] = field(default_factory=dict)  # facts about those attached to the network

    @cached_property
    def diffusion(self) -> DiffusionProcess:
        network = self.config.network
        return self.config.diffusion.resolve(network.in_channels, network.input_size).build()

    @property
    def codec(self) -> Codec:
        """Loaded at first use: it may be large, or on a hub."""
        if self.loaded_codec is None:
            self.loaded_codec = self.config.codec.build().to(self.device)
        return self.loaded_codec

    @property
    def text_encoder(self) -> TextEncoder:
        """Loaded at first use. Raises TesseraError if the model has none."""
        if self.loaded_text_encoder is None:
            if self.config.text is None:
                reads_text = self.config.network.uses_text
                remedy = "give the tokens of its encoder as text" if reads_text else "it is not conditioned on text"
                raise TesseraError(f"this model has no text encoder: {remedy}")
            encoder, network = self.config.text.build().to(self.device), self.config.network
            if (encoder.channels, encoder.vocabulary_size) != (network.text_channels, network.vocabulary_size):
                raise TesseraError(
                    f"the text encoder ({self.config.text.kind}) is not that of this model: it gives "
                    f"{encoder.channels} channels and {encoder.vocabulary_size} ids; the network reads "
                    f"{network.text_channels} channels and {network.vocabulary_size} ids"
                )
            self.loaded_text_encoder = encoder
        return self.loaded_text_encoder

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def routed(self) -> "Model":
        """The same model with some tokens skipping blocks, as in its training: a weaker one to guide away from.

        Raises TesseraError if it was not trained with token routing.
        """
        routing = ((self.config.recipe or {}).get("training") or {}).get("token_routing")
        if routing is None or not isinstance(self.network, DiT):
            raise TesseraError("the model was not trained with training.token_routing, which this guidance needs")
        if self.network.controls:
            raise TesseraError("guidance by routed tokens does not go with control adapters: leave out one of them")
        network = RoutedDiT(self.network, TokenRoutingConfig.model_validate(routing))
        return replace(self, network=network)

    @property
    def null_fields(self) -> tuple[str, ...]:
        """The fields of the condition that have a null value; those that adapters add included."""
        return (*self.config.network.null_fields, *(["control"] if self.network.controls else []))

    @property
    def class_names(self) -> list[str]:
        """One name for each class; their numbers if the model has no names."""
        return list(self.config.class_names) or [str(i) for i in range(self.config.network.num_classes)]
