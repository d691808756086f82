"""Keys and values of earlier frames, kept while a causal network makes a clip frame by frame.

A frame of a causal network depends on itself and earlier frames alone. Once these are clean, their keys and values do
not change. So each step computes the new frames only, as language models do with new tokens. The clip is the one that
the whole network makes under its mask. Shapes: B batch, C channels, T new frames, P earlier frames, S tokens of a
frame, K heads, E channels of a head.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tessera.acceleration.first_block_cache import EmbedCondition
from tessera.conditioning import Condition
from tessera.models.blocks import Context
from tessera.models.dit import DiT
from tessera.models.network import check_times
from tessera.rows import Rows
from tessera.sampling.denoiser import CachedNetwork


@dataclass(frozen=True)
class EarlierFrames(Rows):
    """keys_values: of each block, [B, K, P S, E] each, or of the latest frames alone. frames: how many there were"""

    keys_values: tuple[tuple[Tensor, Tensor], ...] = ()
    frames: int = 0


class FrameCache(CachedNetwork):
    """A causal network that continues a clip. Its state changes when frames are finished: see `finish`."""

    def __init__(self, network: DiT, *, embed_condition: EmbedCondition | None = None) -> None:
        """embed_condition: a replacement for `network.embed_condition`"""
        self.network = network
        self.embed_condition = embed_condition or network.embed_condition

    def empty_state(self, x: Tensor) -> EarlierFrames:
        return EarlierFrames()

    def evaluate(self, x: Tensor, t: Tensor, condition: Condition, state: EarlierFrames) -> tuple[Tensor, Any]:
        return self.network.output(x, self._context(x, t, condition, state)), state

    def finish(self, x: Tensor, t: Tensor, condition: Condition, state: EarlierFrames) -> EarlierFrames:
        """The state with more frames: x [B, C, T, H, W] clean, t [B] their time in the units of the network"""
        record: list[tuple[Tensor, Tensor]] = []
        context = replace(self._context(x, t, condition, state), record=record)
        tokens, context = self.network.embed_patches(x, context)
        self.network.run_blocks(tokens, context)
        past = state.keys_values or [None] * len(record)
        keys_values = tuple(self._joined(old, new, context) for old, new in zip(past, record))
        return EarlierFrames(keys_values, state.frames + x.shape[2])

    def _context(self, x: Tensor, t: Tensor, condition: Condition, state: EarlierFrames) -> Context:
        context = self.embed_condition(check_times(t, x), condition, self.network.grid(x))
        return replace(context, past=state.keys_values, first_frame=state.frames)

    def _joined(
        self, past: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor], context: Context
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of all frames, or of as many as later frames attend to."""
        most, tokens = self.network.config.attention.most_past, math.prod(context.grid[-2:])
        joined = new if past is None else tuple(torch.cat(pair, dim=2) for pair in zip(past, new))
        first = 0 if most is None else max(0, joined[0].shape[2] - most * tokens)
        return joined[0][:, :, first:], joined[1][:, :, first:]
