"""Exponential moving averages of the weights ("traditional EMA" in Karras et al. 2024)."""

import copy

import torch
from torch import Tensor

from tessera.models.network import Network
from tessera.monitoring import health
from tessera.training import parallel
from tessera.training.parallel import ParallelContext
from tessera.training.recipe import EMAConfig


class EMA:
    """One averaged copy of the network per decay. `network` has the first decay: sampling uses it."""

    def __init__(self, network: Network, config: EMAConfig, share_frozen: bool = False) -> None:
        """share_frozen: the averages have the frozen weights of the network itself, not copies of them"""
        self.config = config
        frozen = [parameter for parameter in network.parameters() if share_frozen and not parameter.requires_grad]
        self.networks = {}
        for decay in config.decays:
            averaged = copy.deepcopy(network, memo={id(parameter): parameter for parameter in frozen})
            self.networks[decay] = averaged.eval().requires_grad_(False)
        self.network = self.networks[config.decay]
        self._collect(network)

    def distribute(self, network: Network, parallel_context: ParallelContext) -> None:
        """Shard the averages as the network is sharded."""
        for averaged in self.networks.values():
            parallel_context.distribute(averaged)
        self._collect(network)

    def _collect(self, network: Network) -> None:
        """List the trained weights and their averages."""
        trained = [parameter.requires_grad for parameter in network.parameters()]

        def local(averaged: Network) -> list[Tensor]:
            pairs = zip(averaged.parameters(), trained)
            return [parallel.local_tensor(parameter.detach()) for parameter, is_trained in pairs if is_trained]

        self._weights = local(network)
        self._averages = {decay: local(averaged) for decay, averaged in self.networks.items()}
        # On a GPU the update overlaps with the next step. It ends before the weights change again (`synchronize`).
        self._stream = torch.cuda.Stream() if self._weights[0].is_cuda else None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages after step number `step`, counted from 1."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for decay, averages in self._averages.items():
                if self.config.warmup:
                    decay = min(decay, (1 + step) / (10 + step))
                torch._foreach_lerp_(averages, self._weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def synchronize(self) -> None:
        """Make the device wait for the last update. Call it before the weights change or an average is read."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def squared_distance(self) -> Tensor:
        """This rank's part of (sum |average - weight|^2, sum |weight|^2) of the first decay: [2]"""
        self.synchronize()
        return health.squared_distance(self._weights, self._averages[self.config.decay])
