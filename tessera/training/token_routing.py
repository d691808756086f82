"""Token routing: in training, some tokens skip the blocks in the middle, which saves their compute.

Krause et al. 2025, "TREAD: Token Routing for Efficient Architecture-agnostic Diffusion Training": a random part of the
tokens goes from an early block straight to a late one, where it joins the others again. The loss is that of all tokens,
and sampling routes nothing. Shapes: N tokens of an image.
"""

import math
from dataclasses import dataclass

from pydantic import Field, PositiveInt
from torch import Tensor

from tessera import randomness
from tessera.models.dit import DiT, DiTConfig, Route
from tessera.models.network import Network, NetworkConfig
from tessera.settings import Settings

ROUTING_STREAM = 11  # random stream, see `tessera.training.objective`


class TokenRoutingConfig(Settings):
    """Random tokens skip the blocks after `start` up to `end`, in training."""

    start: PositiveInt | None = Field(default=None, description="blocks before the route; null: a sixth of the depth")
    end: PositiveInt | None = Field(
        default=None, description="the last block that they skip, counted from 1; null: two thirds of the depth"
    )
    fraction: float = Field(default=0.5, gt=0, lt=1, description="fraction of the tokens that skip these blocks")

    def blocks(self, depth: int) -> tuple[int, int]:
        """The number of blocks before the route, and with it."""
        start = self.start or max(1, round(depth / 6))
        return start, self.end or max(start + 1, round(2 * depth / 3))

    def num_kept(self, tokens: int) -> int:
        """How many tokens do not skip."""
        return max(1, round((1 - self.fraction) * tokens))

    def problem(self, network: NetworkConfig) -> str | None:
        """Why a network cannot route tokens, as the end of a sentence about training.token_routing; None if it can"""
        if type(network) is not DiTConfig:
            return f"needs a DiT, and this is a {network.display_name}"
        if network.is_temporal:
            return "needs a network for images, and this one is for clips"
        start, end = self.blocks(network.depth)
        if start >= end or end > network.depth:
            return f"has start {start} and end {end}: expected start < end, and end at most the depth, {network.depth}"
        return None


@dataclass(frozen=True)
class TokenRouting:
    """The routes of a training."""

    config: TokenRoutingConfig
    global_batch_size: int
    seed: int

    def route(self, network: DiT, tokens: int, position: Tensor) -> Route:
        """The route of the batch with these positions [B]: the same tokens for all images of a step, whatever part of
        it this is, so that the result does not depend on the number of ranks.
        """
        step = int(position[0]) // self.global_batch_size
        order = randomness.permutation(self.seed, ROUTING_STREAM, step, tokens)
        rows = order[: self.config.num_kept(tokens)].sort().values
        return Route(*self.config.blocks(len(network.blocks)), rows)


def skipped_macs(config: TokenRoutingConfig, network: Network) -> float:
    """Multiply-adds of a forward pass for one image that routing saves."""
    assert isinstance(network, DiT)
    grid = network.config.grid
    start, end = config.blocks(len(network.blocks))
    whole, routed = network.block_macs(grid), network.block_macs(grid, config.num_kept(math.prod(grid)))
    return sum(whole[start:end]) - sum(routed[start:end])
