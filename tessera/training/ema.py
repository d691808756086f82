"""The moving average of the weights (Karras et al. 2024 call the classic form, used here, "traditional EMA")."""

import copy

import torch

from tessera.models.dit import DiT
from tessera.training.recipe import EMA


class Average:
    """A second network whose weights follow the first: `network` is what draws."""

    def __init__(self, network: DiT, config: EMA) -> None:
        self.config = config
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        pairs = zip(self.network.parameters(), network.parameters())
        self._pairs = [(mean, live) for mean, live in pairs if live.requires_grad]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after `step` steps of training (1 for the first)."""
        decay = self.config.decay
        if self.config.warmup:
            decay = min(decay, (1 + step) / (10 + step))
        means, lives = zip(*self._pairs)
        torch._foreach_lerp_(means, lives, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
