"""What every network has in common: `network(x, t, condition) -> raw`, made from settings that say what it sees.

Shapes: B batch, C channels, O raw output channels, H W height and width.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tessera.conditioning import Condition
from tessera.settings import Settings, Size

DATA_DEPENDENT = (
    "input_size",
    "in_channels",
    "out_channels",
    "num_classes",
)  # which follow from data, codec and process


class NetworkConfig(Settings, ABC):
    """What a network sees and answers, whatever it is made of."""

    display_name: ClassVar[str]  # what it is, for people
    kind: str
    input_size: Size = Field(
        default=(32, 32), description="height and width of what the network sees (latents or pixels)"
    )
    in_channels: PositiveInt = Field(default=4, description="channels of what the network sees")
    out_channels: PositiveInt = Field(
        default=8, description="raw output channels: twice `channels` where the variance is learned"
    )
    num_classes: int = Field(default=1000, ge=0, description="0: unconditional")
    learn_null_class: bool = Field(default=True, description="a learned null label, which guidance needs")

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """Height and width of whatever the network sees must be multiples of this."""

    @property
    def grid(self) -> tuple[int, int]:
        """The configured size in units: a DiT's grid of tokens, a U-Net's deepest level."""
        return self.input_size[0] // self.size_multiple, self.input_size[1] // self.size_multiple

    @abstractmethod
    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ValueError unless the network accepts inputs of a size."""

    @abstractmethod
    def summary(self) -> str:
        """The architecture in one line, without what it sees."""

    @abstractmethod
    def build(self) -> "Network":
        """The network with fresh weights."""


class Network(nn.Module, ABC):
    """A network as the trainer, the sampler and the adapters know it.

    `blocks` hold most of the weights: they are what is compiled, sharded, recomputed and watched one by one, each
    called as `block(x, context)`.
    """

    config: NetworkConfig
    blocks: nn.ModuleList

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x [B, C, H, W], t [B] in the units the network was trained in -> [B, O, H, W]

        H and W may differ from the configured size. Raises ValueError if they do not fit, or labels are missing.
        """

    @abstractmethod
    def macs(self, size: tuple[int, int] | None = None) -> int:
        """Multiply-adds of one forward pass of one image of `size` (the configured one by default).

        The paper's "Gflops" are these; twice as many are the floating-point operations.
        """


def parameter_count(network: nn.Module) -> int:
    """All parameters, frozen ones (DiT's position table) included, as the paper counts them."""
    return sum(parameter.numel() for parameter in network.parameters())
