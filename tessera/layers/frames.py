"""Attention among the frames of a clip: modes that say which tokens attend to each other, on the same weights.

An image, or a clip of one frame, is the same in every mode: all its tokens attend to each other. Shapes: B batch, K
heads, T frames, S tokens of a frame, N = T S tokens, P earlier frames whose keys and values are known, n frames that a
frame attends to, M further keys, E channels of a head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tessera.settings import Settings, expand_kind

Frames = Sequence[int]


class AttentionMode(Settings):
    """Which tokens of a clip attend to each other. The weights of a network do not depend on it."""

    is_causal: ClassVar[bool] = False  # a frame depends on itself and earlier frames alone

    @property
    def most_past(self) -> int | None:
        """How many frames before a frame it attends to, in a causal mode; None: all"""
        return None

    def for_block(self, number: int) -> "AnyAttention":
        """The mode of one block."""
        return self  # pyright: ignore[reportReturnType]

    def frames(self, count: int) -> list[Frames]:
        """The frames that each of `count` frames attends to."""
        return [range(count)] * count

    def keys(self, grid: Sequence[int]) -> int:
        """The number of keys that are computed for a token of a grid (h, w) or (t, h, w)."""
        frames, tokens = (grid[0] if len(grid) == 3 else 1), math.prod(grid[-2:])
        return tokens * max(len(each) for each in self.frames(frames))


class Full(AttentionMode):
    """All tokens of all frames: 3-D attention."""

    kind: Literal["full"] = "full"


class Spatial(AttentionMode):
    """The tokens of the same frame: a network of images, which sees no motion."""

    kind: Literal["spatial"] = "spatial"
    is_causal: ClassVar[bool] = True

    @property
    def most_past(self) -> int:
        return 0

    def frames(self, count: int) -> list[Frames]:
        return [[frame] for frame in range(count)]


class Temporal(AttentionMode):
    """The tokens at the same place in all frames."""

    kind: Literal["temporal"] = "temporal"

    def keys(self, grid: Sequence[int]) -> int:
        return grid[0] if len(grid) == 3 and grid[0] > 1 else math.prod(grid[-2:])


class Alternating(AttentionMode):
    """Spatial in blocks 0, 2, ..., temporal in the others, as in Latte (Ma et al. 2024, variant 1)."""

    kind: Literal["alternating"] = "alternating"

    def for_block(self, number: int) -> "AnyAttention":
        return Temporal() if number % 2 else Spatial()


class Window(AttentionMode):
    """The tokens of frames that are not far away."""

    kind: Literal["window"] = "window"
    radius: NonNegativeInt = Field(default=2, description="frames before and after that a frame attends to")

    def frames(self, count: int) -> list[Frames]:
        return [range(max(0, frame - self.radius), min(count, frame + self.radius + 1)) for frame in range(count)]


class Causal(AttentionMode):
    """The tokens of the same and of earlier frames (block-causal), as in autoregressive video models (Yin et al. 2025,
    "From slow bidirectional to fast autoregressive video diffusion models"). Sampling frame by frame can keep keys and
    values of earlier frames."""

    kind: Literal["causal"] = "causal"
    is_causal: ClassVar[bool] = True
    past: PositiveInt | None = Field(default=None, description="earlier frames that a frame attends to; null: all")

    @property
    def most_past(self) -> int | None:
        return self.past

    def frames(self, count: int) -> list[Frames]:
        return [range(max(0, frame - (count if self.past is None else self.past)), frame + 1) for frame in range(count)]


class Previous(AttentionMode):
    """The tokens of the previous frame, and perhaps of the first: the keys and values that image models are given to
    make clips without temporal layers (Wu et al. 2023, "Tune-A-Video", section 3.3; Khachatryan et al. 2023,
    "Text2Video-Zero"). The first frame attends to itself."""

    kind: Literal["previous"] = "previous"
    is_causal: ClassVar[bool] = True
    first: bool = Field(default=False, description="attend to the first frame, too")
    own: bool = Field(default=False, description="attend to the frame itself, too")

    @property
    def most_past(self) -> int | None:
        return None if self.first else 1

    def frames(self, count: int) -> list[Frames]:
        return [
            sorted({max(0, frame - 1), *([0] if self.first else []), *([frame] if self.own else [])})
            for frame in range(count)
        ]


_Attention = Full | Spatial | Temporal | Alternating | Window | Causal | Previous
AnyAttention = Annotated[_Attention, BeforeValidator(expand_kind), Field(discriminator="kind")]


@dataclass(frozen=True)
class ClipAttention:
    """The mode of an attention layer, the token grid, and keys and values [B, K, P S, E] of earlier frames."""

    mode: AttentionMode
    grid: Sequence[int]
    past: tuple[Tensor, Tensor] | None = None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clip: ClipAttention,
    keys_values: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(q k' / sqrt(E)) v among the frames of a clip: [B, K, N, E] each -> [B, K, N, E]

    keys_values: [B, K, M, E] each, which all tokens attend to, too. mask: of those, bool (attended or not) or float
    (added to the logits) [B, 1 or K, 1, M].
    """
    tokens = math.prod(clip.grid[-2:])
    if clip.past is not None:
        k, v = (torch.cat((past.to(own.dtype), own), dim=2) for past, own in zip(clip.past, (k, v)))
    count, total = q.shape[2] // tokens, k.shape[2] // tokens
    own_mask, dims = None, (0, 1, 2, 3)
    if total > 1 and isinstance(clip.mode, Temporal):
        dims = (0, 3, 1, 2)  # B K T S E -> (B S) K T E
        q, k, v = (each.unflatten(2, (-1, tokens)).permute(*dims, 4).flatten(0, 1) for each in (q, k, v))
    elif total > 1 and not isinstance(clip.mode, Full):
        frames = clip.mode.frames(total)[-count:]
        most = max(len(each) for each in frames)
        if most == total:
            own_mask = _dense_mask(frames, total, tokens, q.device)
        else:
            dims = (0, 2, 1, 3)  # B K T S E -> (B T) K S E
            index, own_mask = _gathered(frames, most, tokens, len(q), q.device)
            q = q.unflatten(2, (-1, tokens)).permute(*dims, 4).flatten(0, 1)
            k, v = (_by_frame(each.unflatten(2, (-1, tokens)), index, frames, total) for each in (k, v))
    if keys_values is not None:
        k, v, own_mask = _with_keys(k, v, own_mask, *keys_values, mask)
    x = scaled_dot_product_attention(q, k, v, attn_mask=own_mask)
    if dims == (0, 1, 2, 3):
        return x
    groups = tokens if dims[1] == 3 else count
    inverse = [dims.index(axis) for axis in range(4)]
    return x.unflatten(0, (-1, groups)).permute(*inverse, 4).flatten(2, 3)


def _dense_mask(frames: list[Frames], total: int, tokens: int, device: torch.device) -> Tensor | None:
    """bool [T S, total S]; None if every frame attends to all"""
    if all(len(each) == total for each in frames):
        return None
    attended = torch.zeros(len(frames), total, dtype=torch.bool)
    for row, each in zip(attended, frames):
        row[list(each)] = True
    return attended.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1).to(device)


def _gathered(
    frames: list[Frames], most: int, tokens: int, num_rows: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The numbers of the frames that each frame attends to, int64 [T n], filled up with frame 0, and which of their
    tokens are attended to: bool [B T, 1, 1, n S]; None: all"""
    index = torch.tensor([[*each, *[0] * (most - len(each))] for each in frames])
    lengths = torch.tensor([len(each) for each in frames])
    mask = None
    if int(lengths.min()) < most:
        mask = (torch.arange(most) < lengths[:, None]).repeat_interleave(tokens, 1)[:, None, None]
        mask = mask.repeat(num_rows, 1, 1, 1).to(device)
    return index.flatten().to(device), mask


def _by_frame(keys: Tensor, index: Tensor, frames: list[Frames], total: int) -> Tensor:
    """The keys for each frame: B K (P + T) S E -> (B T) K (n S) E"""
    if len(index) != total or any(list(each) != [number] for number, each in enumerate(frames)):
        keys = keys.index_select(2, index)
    return keys.unflatten(2, (len(frames), -1)).transpose(1, 2).flatten(3, 4).flatten(0, 1)


def _with_keys(
    k: Tensor, v: Tensor, own_mask: Tensor | None, keys: Tensor, values: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values with further ones before them, and the mask of both."""
    groups, own, further = len(k) // len(keys), k.shape[2], keys.shape[2]
    keys, values = (each.repeat_interleave(groups, 0) for each in (keys, values))
    k, v = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
    if own_mask is None and mask is None:
        return k, v, None
    if mask is None:
        mask = torch.ones(1, 1, 1, further, dtype=torch.bool, device=k.device)
    own_mask = torch.ones(1, 1, 1, own, dtype=torch.bool, device=k.device) if own_mask is None else own_mask
    own_mask = own_mask.view(*(1,) * (4 - own_mask.ndim), *own_mask.shape)
    if mask.is_floating_point():
        own_mask = torch.zeros_like(own_mask, dtype=mask.dtype).masked_fill(~own_mask, -math.inf)
    mask = mask.repeat_interleave(groups, 0) if len(mask) > 1 else mask
    shape = torch.broadcast_shapes(mask.shape[:3], own_mask.shape[:3])
    return k, v, torch.cat((mask.expand(*shape, -1), own_mask.expand(*shape, -1)), dim=3)
