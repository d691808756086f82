"""A DiT in which some tokens skip the blocks in the middle: in training (training.token_routing), and as the weaker
model of guidance.

Shapes: N tokens of an image, K of them that do not skip.
"""

import math
from collections.abc import Sequence

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tessera import randomness
from tessera.conditioning import Condition
from tessera.models.dit import DiT, DiTConfig, Route
from tessera.models.network import Network, NetworkConfig
from tessera.settings import Settings

ORDER_SEED = 0  # of the tokens that skip in sampling


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


class RoutedDiT(Network):
    """A DiT with the same weights whose tokens take a route: for less compute a weaker prediction.

    To guide away from it needs no null condition (Krause et al. 2026, "Guiding Token-Sparse Diffusion Models"). The
    tokens that skip are random in space, and the same in every call.
    """

    def __init__(self, network: DiT, routing: TokenRoutingConfig) -> None:
        super().__init__()
        self.network, self.routing = network, routing
        self.config: DiTConfig = network.config  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)

    @property
    def blocks(self) -> nn.ModuleList:  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)
        return self.network.blocks

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """See `Network.forward`."""
        tokens = math.prod(self.network.grid(x))
        order = randomness.permutation(ORDER_SEED, 0, 0, tokens)
        rows = order[: self.routing.num_kept(tokens)].sort().values
        route = Route(*self.routing.blocks(len(self.blocks)), rows)
        return self.network.training_forward(x, t, condition, route=route)[0]

    def prepare(self, condition: Condition) -> Condition:
        return self.network.prepare(condition)

    def macs(self, size: Sequence[int] | None = None) -> int:
        grid = self.config.grid if size is None else self.config.token_grid(size)
        return self.network.macs(size) - saved_macs(self.network, self.routing, grid)


def saved_macs(network: DiT, routing: TokenRoutingConfig, grid: tuple[int, ...]) -> int:
    """Multiply-adds of a forward pass for one image that routing saves."""
    start, end = routing.blocks(len(network.blocks))
    whole = network.block_macs(grid)
    routed = network.block_macs(grid, routing.num_kept(math.prod(grid)))
    return sum(whole[start:end]) - sum(routed[start:end])
