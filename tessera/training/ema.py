"""Moving averages of the weights (Karras et al. 2024 call the classic form, used here, "traditional EMA")."""

import copy

import torch
from torch import Tensor

from tessera.models.network import Network
from tessera.monitoring import health
from tessera.training import parallel
from tessera.training.parallel import ParallelContext
from tessera.training.recipe import EMAConfig


class EMA:
    """Networks whose weights follow those of the first, one for each decay; `network`, of the first decay, draws."""

    def __init__(self, network: Network, config: EMAConfig) -> None:
        self.config = config
        self.networks = {decay: copy.deepcopy(network).eval().requires_grad_(False) for decay in config.decays}
        self.network = self.networks[config.decay]
        self._follow(network)

    def distribute(self, network: Network, team: ParallelContext) -> None:
        """Divide the averages among processes as the network was."""
        for average in self.networks.values():
            team.distribute(average)
        self._follow(network)

    def _follow(self, network: Network) -> None:
        trained = [live.requires_grad for live in network.parameters()]
        self._lives = [parallel.local(live.detach()) for live, follows in zip(network.parameters(), trained) if follows]
        self._means = {
            decay: [parallel.local(mean) for mean, follows in zip(average.parameters(), trained) if follows]
            for decay, average in self.networks.items()
        }
        # On a GPU beside the work of the next step, which is done before the weights move again.
        self._stream = torch.cuda.Stream() if self._lives[0].is_cuda else None

    @property
    def others(self) -> dict[float, Network]:
        """All but the one that draws."""
        return {decay: self.networks[decay] for decay in self.config.extra_decays}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after `step` steps of training (1 for the first)."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for decay, means in self._means.items():
                if self.config.warmup:
                    decay = min(decay, (1 + step) / (10 + step))
                torch._foreach_lerp_(means, self._lives, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def synchronize(self) -> None:
        """Before the weights move, or an average is read: until the last update is done, as the device sees it."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def distance(self) -> Tensor:
        """This process's share of (sum |mean - weight|^2, sum |weight|^2) of the average that draws: [2]"""
        self.synchronize()
        return health.distance(self._lives, self._means[self.config.decay])
