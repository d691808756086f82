"""Moving averages of the weights (Karras et al. 2024 call the classic form, used here, "traditional EMA")."""

import copy

import torch
from torch import Tensor

from tessera.models.dit import DiT
from tessera.training.recipe import EMA


class Average:
    """Networks whose weights follow those of the first, one for each decay; `network`, of the first decay, draws."""

    def __init__(self, network: DiT, config: EMA) -> None:
        self.config = config
        self.networks = {decay: copy.deepcopy(network).eval().requires_grad_(False) for decay in config.decays}
        self.network = self.networks[config.decay]
        trained = [live.requires_grad for live in network.parameters()]
        self._lives: list[Tensor] = [live for live, follows in zip(network.parameters(), trained) if follows]
        self._means: dict[float, list[Tensor]] = {
            decay: [mean for mean, follows in zip(average.parameters(), trained) if follows]
            for decay, average in self.networks.items()
        }

    @property
    def others(self) -> dict[float, DiT]:
        """All but the one that draws."""
        return {decay: self.networks[decay] for decay in self.config.also}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after `step` steps of training (1 for the first)."""
        for decay, means in self._means.items():
            if self.config.warmup:
                decay = min(decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(means, self._lives, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
