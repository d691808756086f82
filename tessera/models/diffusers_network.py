"""Any transformer of diffusers as a network: `kind: diffusers`. The table of classes is in `diffusers_classes`.

The weights are those of the class, under its own names after the prefix `transformer.`, as in LoRA files of diffusers.

Shapes: B batch, C channels, T frames, H W height and width, M text tokens, E channels of the text.
"""

import copy
import importlib
import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, ModelWrapValidatorHandler, model_validator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from tessera.conditioning import Condition
from tessera.errors import TesseraError
from tessera.models.diffusers_classes import CLASSES, Call, TextPart, TransformerClass
from tessera.models.network import Network, NetworkConfig, check_rows, check_times
from tessera.settings import unknown_name

PREFIX = "transformer."  # of the names of all weights


class DiffusersConfig(NetworkConfig):
    """A transformer class of diffusers with its config.json. `input_size` is that of the latents."""

    display_name: ClassVar[str] = "transformer of diffusers"
    kind: Literal["diffusers"] = "diffusers"  # pyright: ignore[reportIncompatibleVariableOverride]
    class_name: str = Field(description="the class, such as SD3Transformer2DModel")
    settings: dict[str, Any] = Field(default={}, description="its config.json; what is left out has its defaults")
    options: dict[str, float] = Field(
        default={}, description="numbers that its pipeline passes beside the inputs, such as guidance of FLUX"
    )
    num_classes: Literal[0] = 0  # pyright: ignore[reportIncompatibleVariableOverride]
    learn_null_class: Literal[False] = False  # pyright: ignore[reportIncompatibleVariableOverride]

    @model_validator(mode="wrap")
    @classmethod
    def _with_sizes(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Sizes that follow from the class, where they are left out; they do not count as given."""
        if not isinstance(data, dict) or data.get("class_name") not in CLASSES:
            return handler(data)
        row = CLASSES[data["class_name"]]
        try:
            settings = full_settings(data["class_name"], data.get("settings") or {})
        except TesseraError as error:
            raise ValueError(str(error)) from None
        channels, parts = row.channels(settings), row.text(settings)
        fixed = {"in_channels": channels, "out_channels": channels, "text_channels": max(part.width for part in parts)}
        for name, size in fixed.items():
            if data.get(name, size) not in (size, 0):
                raise ValueError(f"{name} is {data[name]}, and this {data['class_name']} has {size}")
        tokens = sum(part.rows or row.length for part in parts)
        options = {**row.options, **(data.get("options") or {})}
        sizes = {"input_size": row.size(settings), "text_tokens": tokens}
        config = handler({**sizes, **data, **fixed, "settings": settings, "options": options})
        config.__pydantic_fields_set__.intersection_update(data)
        return config

    @model_validator(mode="after")
    def _known_class(self) -> "DiffusersConfig":
        if self.class_name not in CLASSES:
            raise ValueError(unknown_class(self.class_name))
        for name, value in self.row.needs.items():
            if self.settings.get(name) != value:
                raise ValueError(
                    f"{self.class_name} with {name} {self.settings.get(name)} is not supported; expected {value}"
                )
        if unknown := sorted(self.options.keys() - self.row.options.keys()):
            raise ValueError(unknown_name("option", unknown[0], self.row.options))
        return self

    @property
    def row(self) -> TransformerClass:
        return CLASSES[self.class_name]

    @property
    def text_parts(self) -> tuple[TextPart, ...]:
        return self.row.text(self.settings)

    @property
    def condition_fields(self) -> tuple[str, ...]:
        return ("text", "text_mask")

    @property
    def null_fields(self) -> tuple[str, ...]:
        return ()  # the pipelines guide away from an empty prompt: sampling.null_text=empty

    @property
    def uses_text(self) -> bool:
        return True

    def frame_times_problem(self) -> str | None:
        return f"needs a network whose frames have times of their own, and {self.class_name} has one time"

    @property
    def size_multiple(self) -> int:
        return self.row.patch(self.settings)

    def check_size(self, size: Sequence[int]) -> None:
        super().check_size(size)
        if any(side % self.size_multiple or side < self.size_multiple for side in size[-2:]):
            raise ValueError(f"height and width {size[-2]} x {size[-1]} are not multiples of {self.size_multiple}")

        frames = None if self.row.frames is None else self.row.frames(self.settings)
        if frames is not None and (count := size[0] if len(size) == 3 else 1) not in frames:
            raise ValueError(f"{self.class_name} takes {' or '.join(map(str, frames))} frames, not {count}")

    def summary(self) -> str:
        names = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "patch_size")
        values = [f"{name} {self.settings[name]}" for name in names if self.settings.get(name) is not None]
        return f"{self.class_name} of diffusers, {', '.join(values)}"

    def build(self) -> "DiffusersNetwork":
        return DiffusersNetwork(self)


def unknown_class(name: str) -> str:
    """Message for a class that is not in the table."""
    return f"{unknown_name('transformer class of diffusers', name, CLASSES)}. All classes: {', '.join(sorted(CLASSES))}"


def transformer_type(class_name: str) -> Any:
    """A class of diffusers. Raises TesseraError if diffusers is missing, or too old for it."""
    try:
        models = importlib.import_module("diffusers")
        return getattr(models, class_name)
    except ImportError:
        raise TesseraError(f"{class_name} needs diffusers: pip install 'tessera[diffusers]'") from None
    except AttributeError:
        raise TesseraError(f"the installed diffusers has no {class_name}: pip install --upgrade diffusers") from None


def full_settings(class_name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a class with its defaults, without those that it does not know. Raises TesseraError."""
    parameters = inspect.signature(transformer_type(class_name).__init__).parameters
    if unknown := sorted(name for name in settings if name not in parameters and not name.startswith("_")):
        raise TesseraError(f"{class_name}: {unknown_name('setting', unknown[0], parameters)}")
    defaults = {name: each.default for name, each in parameters.items() if name not in ("self", "kwargs")}
    values = {name: settings.get(name, default) for name, default in defaults.items()}
    # Lists, as in a file.
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


class DiffusersNetwork(Network):
    """A transformer of diffusers behind `network(x, t, condition)`."""

    def __init__(self, config: DiffusersConfig) -> None:
        super().__init__()
        self.config: DiffusersConfig = config  # pyright: ignore[reportIncompatibleVariableOverride] (never assigned)
        self.row = config.row
        on_meta = torch.get_default_device().type == "meta"
        with torch.device("cpu"), _WeightsOnMeta() if on_meta else nullcontext():
            self.transformer: Any = transformer_type(config.class_name)(**config.settings)
        self.transformer.train()
        self.register_load_state_dict_post_hook(_follow_weights)

    @property
    def blocks(self) -> nn.ModuleList:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The blocks of all lists, one after the other. They belong to the transformer: this list has no weights."""
        return nn.ModuleList(block for name in self.row.blocks for block in getattr(self.transformer, name))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x [B, C, H, W] or [B, C, T, H, W], t [B] -> [B, C, H, W] or [B, C, T, H, W]"""
        self.config.check_size(x.shape[2:])
        t = check_times(t, x)
        if t.ndim > 1:
            raise ValueError(f"{self.config.class_name} has one time for a clip, not one for each frame")
        check_rows(condition, x)
        if condition.text is None:
            raise ValueError(f"{self.config.class_name} needs text: a condition with text [B, M, E] and text_mask")
        is_one_frame = x.ndim == 4 and len(self.row.size(self.config.settings)) == 3
        inputs = x.unsqueeze(2) if is_one_frame else x
        text, mask = self._text(condition, len(x))
        call = Call(self.config.settings, inputs, t, text, mask, self.config.options)
        raw = self.transformer(**self.row.arguments(call), return_dict=False)[0]
        out = self.row.unpack(call, raw) * self.row.sign
        return out.squeeze(2) if is_one_frame else out

    def _text(self, condition: Condition, num_rows: int) -> tuple[dict[str, Tensor], Tensor]:
        """The parts of the text, and the mask of the last one [B, M]."""
        text, mask = condition.text, condition.text_mask
        assert text is not None
        if text.ndim != 3 or text.shape[2] != self.config.text_channels:
            raise ValueError(f"the text is {list(text.shape)}; expected [{num_rows}, M, {self.config.text_channels}]")
        parts, start, rows, result = self.config.text_parts, 0, text, {}
        for part in parts:
            end = text.shape[1] if part.rows is None else start + part.rows
            if end <= start or end > text.shape[1]:
                first = sum(each.rows or 1 for each in parts)
                raise ValueError(f"the text has {text.shape[1]} tokens; {self.config.class_name} needs {first} or more")
            rows = text[:, start:end, : part.width].contiguous()  # some classes use `view`
            result[part.name] = rows.squeeze(1) if part.pooled else rows
            start = end
        last = rows.shape[1]
        mask = text.new_ones(len(text), last, dtype=torch.bool) if mask is None else mask[:, -last:]
        if not self.row.is_masked and mask.device.type == "cpu" and not bool(mask.all()):
            raise ValueError(
                f"{self.config.class_name} has no mask of the text: all rows need the same number of tokens"
            )
        return result, mask.expand(num_rows, -1)

    @torch.no_grad()
    def macs(self, size: Sequence[int] | None = None) -> int:
        """Counted in a forward pass of one image or clip without data, with as many text tokens as in training."""
        config = self.config
        network = copy.copy(self)
        network._modules = {"transformer": _on_meta(self.transformer)}
        with torch.device("meta"):
            x = torch.empty(1, config.in_channels, *(size or config.input_size))
            text = torch.empty(1, config.text_tokens, config.text_channels)
            t = torch.empty(1)
        condition = Condition(
            text=text, text_mask=torch.ones(1, config.text_tokens, dtype=torch.bool)
        )  # lengths are read from it
        with FlopCounterMode(display=False) as counter, _MetaWins():
            network(x, t, condition)
        return counter.get_total_flops() // 2


def _follow_weights(network: nn.Module, incompatible: Any) -> None:
    """Tables that no state dict holds are moved to the device of the weights that were loaded."""
    device = next(network.parameters()).device
    for module in network.modules():
        for name, table in module.named_buffers(recurse=False):
            if table.device != device:
                setattr(module, name, table.to(device))


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy whose weights have no data."""
    weights: dict[int, Any] = {
        id(each): nn.Parameter(each.detach().to("meta"), each.requires_grad) for each in module.parameters()
    }
    return copy.deepcopy(module, weights)


class _MetaWins(TorchFunctionMode):
    """An operation of tensors without data and others, such as tables of positions, has a result without data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values, structure = tree_flatten((args, kwargs or {}))
        if any(torch.is_tensor(each) and each.is_meta for each in values):
            values = [each.to("meta") if torch.is_tensor(each) and not each.is_meta else each for each in values]
        args, kwargs = tree_unflatten(values, structure)
        return func(*args, **kwargs)


class _WeightsOnMeta(TorchFunctionMode):
    """Weights are created on the device "meta", and whatever is computed at the start is not: tables of positions are
    no weights, and a state dict does not hold them. The modules of PyTorch create their weights by `torch.empty`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)
