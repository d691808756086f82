"""The interface of all networks: `network(x, t, condition) -> raw`, built from its settings.

Shapes: B batch, C channels, O raw output channels, H W height and width.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tessera.conditioning import Condition
from tessera.settings import Settings, Size

# Settings that follow from the data, the codec and the diffusion process.
DATA_DEPENDENT = ("input_size", "in_channels", "out_channels", "num_classes")


class NetworkConfig(Settings, ABC):
    """The settings that all networks have: their inputs and outputs."""

    display_name: ClassVar[str]
    kind: str
    input_size: Size = Field(default=(32, 32), description="height and width of the input (latents or pixels)")
    in_channels: PositiveInt = Field(default=4, description="channels of the input")
    out_channels: PositiveInt = Field(
        default=8, description="raw output channels: twice in_channels if the variance is learned"
    )
    num_classes: int = Field(default=1000, ge=0, description="0: unconditional")
    learn_null_class: bool = Field(default=True, description="a learned null label, which guidance needs")

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """Height and width of an input must be multiples of this."""

    @property
    def grid(self) -> tuple[int, int]:
        """The input size over `size_multiple`: a DiT's token grid, a U-Net's deepest level."""
        return self.input_size[0] // self.size_multiple, self.input_size[1] // self.size_multiple

    @abstractmethod
    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ValueError unless the network accepts inputs of this size."""

    @abstractmethod
    def summary(self) -> str:
        """The architecture in one line, without inputs and outputs."""

    @abstractmethod
    def build(self) -> "Network":
        """The network with initial weights."""


class Network(nn.Module, ABC):
    """The interface that training, sampling and acceleration use.

    `blocks` hold most of the weights. Each is called as `block(x, context)`, and they are compiled, sharded,
    checkpointed and monitored one by one.
    """

    config: NetworkConfig
    blocks: nn.ModuleList

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x [B, C, H, W], t [B] in the units the network was trained in -> [B, O, H, W]

        H and W may differ from the configured size. Raises ValueError if the network does not accept the size, or if
        labels are missing.
        """

    @abstractmethod
    def macs(self, size: tuple[int, int] | None = None) -> int:
        """Multiply-adds of one forward pass of one image of `size` (by default the configured size).

        The paper calls these "Gflops". The number of floating-point operations is twice as large.
        """


def parameter_count(network: nn.Module) -> int:
    """The number of parameters, including frozen ones (DiT's position table), as in the paper."""
    return sum(parameter.numel() for parameter in network.parameters())
