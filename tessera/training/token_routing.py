"""Token routing: in training, some tokens skip the blocks in the middle, which saves their compute.

Krause et al. 2025, "TREAD: Token Routing for Efficient Architecture-agnostic Diffusion Training": a random part of the
tokens goes from an early block straight to a late one, where it joins the others again. The loss is that of all tokens,
and sampling routes nothing, but may guide away from a routed output (`tessera.models.routing`).
"""

from dataclasses import dataclass

from torch import Tensor

from tessera import randomness
from tessera.models.dit import DiT, Route
from tessera.models.routing import TokenRoutingConfig

ROUTING_STREAM = 11  # random stream, see `tessera.training.objective`


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
