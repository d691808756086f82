"""The interface of all networks: `network(x, t, condition) -> raw`, built from its settings.

Shapes: B batch, C channels, O raw output channels, T frames, H W height and width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tessera.conditioning import Condition
from tessera.settings import InputSize, Settings
from tessera.times import shared_time

# Settings that follow from the data, the codec, the text encoder and the diffusion process.
DATA_DEPENDENT = (
    "input_size", "in_channels", "out_channels", "num_classes", "text_channels", "vocabulary_size", "text_tokens",
)  # fmt: skip


class NetworkConfig(Settings, ABC):
    """The settings that all networks have: their inputs and outputs."""

    display_name: ClassVar[str]
    condition_type: ClassVar[type[Condition]] = Condition
    kind: str
    input_size: InputSize = Field(
        default=(32, 32), description="height and width of the input (latents or pixels); of clips: with frames first"
    )
    in_channels: PositiveInt = Field(default=4, description="channels of the input")
    out_channels: PositiveInt = Field(
        default=8, description="raw output channels: twice in_channels if the variance is learned"
    )
    num_classes: int = Field(default=1000, ge=0, description="0: unconditional")
    learn_null_class: bool = Field(default=True, description="a learned null label, which guidance needs")
    text_channels: int = Field(default=0, ge=0, description="channels of the text encoder; 0: no text, or ids")
    vocabulary_size: int = Field(
        default=0,
        ge=0,
        description="token ids of a text encoder that is trained with the network; 0: no text, or channels",
    )
    text_tokens: int = Field(default=0, ge=0, description="most text tokens of an image in training")

    @property
    def condition_fields(self) -> tuple[str, ...]:
        """The fields of its condition that the network uses, and needs."""
        return (*(("label",) if self.num_classes else ()), *(("text", "text_mask") if self.uses_text else ()))

    @property
    def uses_text(self) -> bool:
        """Whether the network is conditioned on text."""
        return False

    @property
    def null_fields(self) -> tuple[str, ...]:
        """Those of them that have a null value, which dropout and guidance need."""
        return tuple(
            name for name in self.condition_fields if name != "text_mask" and (name != "label" or self.learn_null_class)
        )

    @property
    def uniform_numbers(self) -> int:
        """How many random numbers the network uses for each row in training: see `Condition.uniform`."""
        return 0

    @property
    def is_temporal(self) -> bool:
        """Whether the network is for clips. A network for clips takes images, too: a clip with one frame."""
        return len(self.input_size) == 3

    @property
    def is_causal(self) -> bool:
        """Whether a frame depends on itself and earlier frames alone, whose keys and values may be kept."""
        return False

    @property
    def takes_step_size(self) -> bool:
        """Whether the network predicts the average velocity over a step whose length it is given."""
        return False

    def frame_times_problem(self) -> str | None:
        """Why frames cannot have times of their own, as the end of a sentence about them; None if they can"""
        return None if self.is_temporal else "needs a network for clips, and this one is for images"

    def token_times_problem(self) -> str | None:
        """Why tokens of an image cannot have times of their own, as the end of a sentence about them"""
        return "needs a DiT: the network has one time for all pixels"

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """Height and width of an input must be multiples of this."""

    @property
    def grid(self) -> tuple[int, ...]:
        """The token grid of the configured input size."""
        return self.token_grid(self.input_size)

    def token_grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """A DiT's grid of patches, a U-Net's deepest level: (h, w) of an input (H, W), (t, h, w) of (T, H, W)."""
        return *size[:-2], *(side // self.size_multiple for side in size[-2:])

    def check_size(self, size: Sequence[int]) -> None:
        """Raise ValueError unless the network accepts inputs of this size, (H, W) or (T, H, W)."""
        if len(size) not in (2, 3):
            raise ValueError(f"an input has the size (height, width) or (frames, height, width), not {tuple(size)}")
        if len(size) == 3 and size[0] > 1 and not self.is_temporal:
            raise ValueError(
                f"this network is for images, and the input is a clip of {size[0]} frames: a network for clips has an "
                f"input_size of (frames, height, width)"
            )

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

        A network for clips takes x [B, C, T, H, W], and t [B] or, for frames with their own times, [B, T]. An image and
        a clip of one frame have the same output, bit for bit, and so have a time t [B] and the same time for all frames
        (on the CPU; on a GPU up to rounding).
        T, H and W may differ from the configured size. Raises ValueError if the network does not accept the size or the
        times, or if labels are missing.
        """

    @property
    def controls(self) -> dict[str, Any]:
        """The controls that are attached to the network (see `tessera.models.dit.Control`), by the names of their
        adapters."""
        adapters = getattr(self, "adapters", {})
        return {name: layer for name, layers in adapters.items() for layer in layers.values()}

    def prepare(self, condition: Condition) -> Condition:
        """The condition with everything that does not depend on x and t computed ahead, for many calls with it."""
        return condition

    @abstractmethod
    def macs(self, size: Sequence[int] | None = None) -> int:
        """Multiply-adds of one forward pass of one image or clip of `size` (by default the configured size).

        The paper calls these "Gflops". The number of floating-point operations is twice as large. Times are those of
        the whole image or clip.
        """


def check_times(t: Tensor, x: Tensor, tokens: int | None = None) -> Tensor:
    """Times t [B], or [B, T] for a clip x [B, C, T, H, W]; equal times of all frames of every clip become [B].

    On a GPU they stay as they are, because the host would wait for their values. tokens: of an image in a network that
    also takes times [B, N], one for each of them. Raises ValueError for other shapes.
    """
    if t.shape == x.shape[:1] or (x.ndim == 4 and t.shape == (x.shape[0], tokens)):
        return t
    if x.ndim != 5 or t.shape != (x.shape[0], x.shape[2]):
        frames = f", or [{x.shape[0]}, {x.shape[2]}] for frames with their own times" if x.ndim == 5 else ""
        raise ValueError(
            f"the times have the shape {list(t.shape)}; expected [{x.shape[0]}]{frames}, for inputs {list(x.shape)}"
        )
    return shared_time(t) if t.device.type == "cpu" and not torch.compiler.is_compiling() else t


def check_rows(condition: Condition, x: Tensor) -> None:
    """Raise ValueError unless each condition has as many rows as x; a single row would be broadcast."""
    if torch.compiler.is_compiling():
        return
    for name, value in condition.present.items():
        if len(value) != len(x):
            raise ValueError(f"the condition {name} has {len(value)} rows, and the input has {len(x)}")


def self_initialized(network: nn.Module) -> Iterator[Any]:
    """The modules of a network that have their own initial weights: each defines `reset_parameters` itself.

    Modules of PyTorch are left out, as are those that inherit the method from one.
    """
    for module in network.modules():
        own = type(module).__dict__.get("reset_parameters")
        if module is not network and own is not None and own.__module__.partition(".")[0] != "torch":
            yield module


def parameter_count(network: nn.Module) -> int:
    """The number of parameters, including frozen ones (DiT's position table), as in the paper."""
    return sum(parameter.numel() for parameter in network.parameters())
