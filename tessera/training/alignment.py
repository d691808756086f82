"""Alignment of features: a block of the network also learns to predict better features than its own.

The features of the weight average at a later block and less noise (Jiang et al. 2025, "No Other Representation
Component Is Needed", SRA), or those of a frozen encoder of clean images (Yu et al. 2024, "Representation Alignment for
Generation", REPA). A small head predicts them; sampling does not use it. Shapes: B images, N tokens, D width of the
network, F channels of the features, C channels, H W height and width.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import torch
from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from tessera import randomness, runtime
from tessera.codecs import Codec
from tessera.conditioning import Condition
from tessera.diffusion import DiffusionProcess
from tessera.diffusion.process import Losses
from tessera.encoders import vision
from tessera.models.dit import DiT, DiTConfig
from tessera.models.network import Network, NetworkConfig
from tessera.settings import Settings, expand_kind
from tessera.training import parallel

if TYPE_CHECKING:
    from tessera.training.ema import EMA

ALIGNMENT_STREAM = 10  # random stream, see `tessera.training.objective`


class AlignmentSettings(Settings):
    """What every kind of alignment has."""

    block: PositiveInt | None = Field(
        default=None, description="the block whose output is aligned, counted from 1; null: a third of the depth"
    )
    weight: PositiveFloat = Field(default=0.5, description="of the alignment, 1 - cosine, in the loss")
    until: float = Field(
        default=1.0, gt=0, le=1, description="fraction of the steps after which the alignment ends (HASTE)"
    )

    def block_of(self, depth: int) -> int:
        """The number of blocks before the aligned tokens."""
        return self.block or max(1, round(depth / 3))

    def check(self, depth: int) -> str | None:
        """What is wrong for a network of a depth, as the end of a sentence about training.alignment"""
        block = self.block_of(depth)
        return f"has block {block}, and the network has {depth}" if block > depth else None


class SelfAlignment(AlignmentSettings):
    """Features of the weight average (EMA) at a later block, from the same image with less noise: SRA."""

    kind: Literal["self"] = "self"
    target_block: PositiveInt | None = Field(
        default=None, description="the later block that gives the features; null: two thirds of the depth"
    )
    time_gap: float = Field(
        default=0.2, ge=0, le=1, description="the time of the features is earlier by a uniform number up to this"
    )

    def target_block_of(self, depth: int) -> int:
        return self.target_block or max(2, round(2 * depth / 3))

    def check(self, depth: int) -> str | None:
        block, target = self.block_of(depth), self.target_block_of(depth)
        if target <= block:
            return f"has block {block} and target_block {target}: the features must come from a later block"
        if target > depth:
            return f"has target_block {target}, and the network has {depth} blocks"
        return None


class EncoderAlignment(AlignmentSettings):
    """Features of a frozen encoder of clean images, such as DINOv2, through transformers: REPA."""

    kind: Literal["encoder"] = "encoder"
    source: str = Field(description="folder of an image encoder of transformers, or its id on the hub")
    size: PositiveInt | None = Field(
        default=None, description="height and width that images are resized to for it; null: its own"
    )


AnyAlignment = Annotated[
    SelfAlignment | EncoderAlignment,
    Field(discriminator="kind"),
    BeforeValidator(expand_kind),  # behind it: it also applies where the field may be null
]


class Features(Protocol):
    """Where the features come from."""

    def __call__(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition, position: Tensor) -> Tensor:
        """The features of the tokens of latents x0 [B, C, h, w], without gradients: [B, N, F]

        t [B] or [B, N]: the times that the network is trained at; position [B].
        """
        ...


class AverageFeatures(Features):
    """The tokens of the weight average after one of its blocks."""

    def __init__(self, config: SelfAlignment, ema: "EMA", diffusion: DiffusionProcess, seed: int) -> None:
        network = ema.network
        assert isinstance(network, DiT)
        self.ema, self.diffusion, self.seed, self.time_gap = ema, diffusion, seed, config.time_gap
        self.block = config.target_block_of(len(network.blocks))

    @torch.no_grad()
    def __call__(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition, position: Tensor) -> Tensor:
        network = self.ema.network
        assert isinstance(network, DiT)
        gap = self.time_gap * randomness.uniform(self.seed, position.cpu(), ALIGNMENT_STREAM)[:, 0]
        cleaner = t if t.ndim == 1 else t.amin(dim=1)  # of two times of an image, the one with less noise
        cleaner = torch.maximum(cleaner - gap.to(cleaner), self.diffusion.sample_timesteps(torch.zeros_like(cleaner)))
        x = self.diffusion.add_noise(x0, noise, cleaner)
        time = self.diffusion.model_time(cleaner).to(x0.device, non_blocking=True)
        self.ema.synchronize()
        tokens = network.block_output(x, time, condition, self.block)
        parallel.reshard(network)  # the weights of the average change before the next call
        return tokens


class EncoderFeatures(Features):
    """The patches of a frozen encoder, resampled to the token grid."""

    def __init__(self, config: EncoderAlignment, codec: Codec, patch_size: int, device: torch.device) -> None:
        self.codec, self.patch_size = codec, patch_size
        self.encoder = _load_encoder(config.source, config.size).to(device)

    @torch.no_grad()
    def __call__(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition, position: Tensor) -> Tensor:
        grid = x0.shape[2] // self.patch_size, x0.shape[3] // self.patch_size
        images = self.codec.decode(x0)  # exact in pixels; latents may come from a cache without the images
        patches = self.encoder.patches(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
        return interpolate(patches, grid, mode="bilinear", antialias=True).flatten(2).mT


@dataclass(frozen=True)
class Alignment:
    """The part of the loss."""

    config: AnyAlignment
    features: Features
    num_positions: int  # of the training, after which it ends
    dtype: torch.dtype | None  # of autocast

    def is_active(self, position: Tensor) -> bool:
        """Whether the samples of a batch, at these positions [B], are aligned."""
        return bool(position[0] < self.num_positions)

    def add(
        self,
        losses: Losses,
        predicted: Tensor | None,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        condition: Condition,
        position: Tensor,
    ) -> Losses:
        """Losses with 1 - the cosine of predicted and true features [B, N, F], the mean over the tokens of an image.

        predicted: None once the alignment has ended. The other arguments are those of `Features`.
        """
        if predicted is None:
            return replace(losses, alignment=torch.zeros_like(losses.mse))
        with runtime.autocast(self.dtype, x0.device):
            features = self.features(x0, noise, t, condition, position)
        alignment = 1 - cosine_similarity(predicted.float(), features.float(), dim=-1).mean(dim=1)
        return replace(losses, total=losses.total + self.config.weight * alignment, alignment=alignment)


def added_macs(config: AnyAlignment, network: Network) -> float:
    """A third of the multiply-adds that an alignment adds to a training step, for one image.

    Those of an encoder are not known here, and not counted.
    """
    assert isinstance(network, DiT)
    assert network.feature_head is not None
    added = network.feature_head.macs(math.prod(network.config.grid))
    if isinstance(config, SelfAlignment):
        depth = len(network.blocks)
        added += network.macs() * config.target_block_of(depth) / depth / 3  # a forward pass alone
    return config.until * added


def build_features(
    config: AnyAlignment, ema: "EMA", diffusion: DiffusionProcess, codec: Codec, device: torch.device, seed: int
) -> Features:
    """Where the features come from. Raises TesseraError if an encoder cannot be used."""
    if isinstance(config, EncoderAlignment):
        return EncoderFeatures(config, codec, ema.network.config.size_multiple, device)
    return AverageFeatures(config, ema, diffusion, seed)


def feature_channels(config: AnyAlignment, network: DiTConfig) -> int:
    """The channels of the features. Raises TesseraError if an encoder cannot be used."""
    if isinstance(config, SelfAlignment):
        return network.hidden_size
    encoder = _load_encoder(config.source, config.size)
    device = next(encoder.parameters()).device  # of an earlier run of this process
    return encoder.patches(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device)).shape[1]


@cache
def _load_encoder(source: str, size: int | None) -> vision.VisionEncoder:
    return vision.load(source, size=size)


def alignment_problem(config: AnyAlignment, network: NetworkConfig) -> str | None:
    """Why a network cannot be aligned, as the end of a sentence about training.alignment; None if it can"""
    if type(network) is not DiTConfig:
        return f"needs a DiT, and this is a {network.display_name}"
    if network.is_temporal:
        return "needs a network for images, and this one is for clips"
    return config.check(network.depth)
