"""Moving averages of the weights: exponential, or power functions of the step (both in Karras et al. 2024)."""

import copy

import torch
from torch import Tensor

from tessera.models.network import Network
from tessera.monitoring import health
from tessera.training import parallel
from tessera.training.parallel import ParallelContext
from tessera.training.recipe import AnyEMA


class EMA:
    """One averaged copy of the network per decay, or per length. `network` is the first: sampling uses it."""

    def __init__(self, network: Network, config: AnyEMA, share_frozen: bool = False) -> None:
        """share_frozen: the averages have the frozen weights of the network itself, not copies of them"""
        self.config = config
        frozen = [parameter for parameter in network.parameters() if share_frozen and not parameter.requires_grad]
        self.networks = {}
        for average in config.averages:
            averaged = copy.deepcopy(network, memo={id(parameter): parameter for parameter in frozen})
            self.networks[average] = averaged.eval().requires_grad_(False)
        self.network = self.networks[config.averages[0]]
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
        self._averages = {average: local(averaged) for average, averaged in self.networks.items()}
        # On a GPU the update overlaps with the next step. It ends before the weights change again (`synchronize`).
        self._stream = torch.cuda.Stream() if self._weights[0].is_cuda else None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages after step number `step`, counted from 1."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for average, tensors in self._averages.items():
                new_weight = self.config.new_weight(average, step)
                torch._foreach_lerp_(tensors, self._weights, new_weight)  # pyright: ignore[reportPrivateImportUsage]

    def synchronize(self) -> None:
        """Make the device wait for the last update. Call it before the weights change or an average is read."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def squared_distance(self) -> Tensor:
        """This rank's part of (sum |average - weight|^2, sum |weight|^2) of the first average: [2]"""
        self.synchronize()
        return health.squared_distance(self._weights, self._averages[self.config.averages[0]])
