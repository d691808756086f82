"""Adapters on a network: attached from outside, with a strength each; merged into the weights; removed.

In the state dict of the network, a layer of adapter `style` on `blocks.0.attn.qkv` has the names
`blocks.0.attn.qkv.adapters.style.lora.down`. With `lora_0` for `lora` it belongs to the first of the fused projections.
The names of an adapter's own state dict, and of its file, leave out `adapters.style`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from tessera.adapters.control import CONTROL_LAYERS, ControlLayer
from tessera.adapters.layers import CHANGES, AdapterLayer
from tessera.adapters.quantized_base import base_format_of, quantize_base
from tessera.errors import TesseraError, bullet_list
from tessera.models.network import Network
from tessera.settings import unknown_name

ATTRIBUTE = "adapters"
LAYERS: dict[str, type[AdapterLayer]] = {each.kind: each for each in (*CHANGES, *CONTROL_LAYERS)}
NETWORK_KINDS = {name for name, each in LAYERS.items() if issubclass(each, ControlLayer)}  # of the network as a whole
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

Layers = Mapping[str, Mapping[str, AdapterLayer]]  # by the name of the module, then by kind (and projection)


class _Adapters(nn.ModuleDict):
    """The adapters of a module. Their names may be those of attributes, such as `half`."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        self._modules[key] = module


def attach(network: Network, name: str, layers: Layers) -> None:
    """Add an adapter to a network, in place. Several may be attached; they act one after another.

    Raises TesseraError if the network has an adapter of this name.
    """
    if not NAME.fullmatch(name) or name == ATTRIBUTE:
        raise TesseraError(f"'{name}' cannot be the name of an adapter: use letters, digits, _ and -")
    if name in attached(network):
        raise TesseraError(f"there are two adapters with the name '{name}': give each its own, as in NAME=FILE:0.8")
    for module_name, by_kind in layers.items():
        module = network.get_submodule(module_name)
        if not hasattr(module, ATTRIBUTE):
            module.add_module(ATTRIBUTE, _Adapters())
            module.register_forward_hook(_apply)
        ordered = {kind: by_kind[kind] for kind in sorted(by_kind, key=lambda kind: _order(kind))}
        for layer in ordered.values():
            layer.adapter = name
        cast(nn.ModuleDict, module.adapters)[name] = nn.ModuleDict(ordered)


def _order(kind: str) -> int:
    return list(LAYERS).index(split_kind(kind)[0])


def _apply(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The forward hook of an adapted module. It holds no reference to it, so that copies of a network work, too."""
    for by_kind in cast(nn.ModuleDict, module.adapters).values():
        for layer in cast(nn.ModuleDict, by_kind).values():
            if cast(AdapterLayer, layer).strength:
                output = layer(module, inputs[0], output)
    return output


def adapted_modules(network: nn.Module) -> Iterator[tuple[str, nn.Module, nn.ModuleDict]]:
    """(name, module, its adapters) of each module that has adapters."""
    for name, module in list(network.named_modules()):
        adapters = getattr(module, ATTRIBUTE, None)
        if isinstance(adapters, nn.ModuleDict):
            yield name, module, adapters


def adapter_layers(network: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, str, AdapterLayer]]:
    """(name of the module, module, kind, layer) of each layer of an adapter."""
    for module_name, module, adapters in adapted_modules(network):
        if name in adapters:
            for kind, layer in cast(nn.ModuleDict, adapters[name]).items():
                yield module_name, module, kind, cast(AdapterLayer, layer)


def attached(network: nn.Module) -> dict[str, float]:
    """The strengths of the attached adapters, by name."""
    strengths: dict[str, float] = {}
    for _, _, adapters in adapted_modules(network):
        for name, by_kind in adapters.items():
            for layer in cast(nn.ModuleDict, by_kind).values():
                strengths.setdefault(name, cast(AdapterLayer, layer).strength)
    return strengths


def set_strengths(network: nn.Module, strengths: Mapping[str, float]) -> None:
    """Set the strengths of attached adapters, by name. Raises TesseraError for an unknown one."""
    known = attached(network)
    for name, strength in strengths.items():
        if name not in known:
            raise TesseraError(unknown_name("adapter", name, known))
        for _, _, _, layer in adapter_layers(network, name):
            layer.strength = strength


def detach(network: nn.Module, name: str | None = None) -> None:
    """Remove an adapter (default: all), in place. The weights of the network have not been changed by it."""
    for _, module, adapters in list(adapted_modules(network)):
        if name is not None and name in adapters:
            del adapters[name]
        if name is None or not adapters:
            delattr(module, ATTRIBUTE)
            hooks = module._forward_hooks
            for key in [key for key, hook in hooks.items() if hook is _apply]:
                del hooks[key]


@torch.no_grad()
def merge(network: nn.Module) -> dict[str, Tensor]:
    """Merge all adapters into the weights, in place, and remove them.

    Returns copies of the weights that were changed, by name: `unmerge` puts them back, bit for bit. Raises TesseraError
    if the weights are not in float32.
    """
    if isinstance(network, Network) and (base_format := base_format_of(network)) != "float32":
        raise TesseraError(f"an adapter cannot be merged into weights in {base_format}: load its base in float32")
    originals: dict[str, Tensor] = {}
    for module_name, module, adapters in list(adapted_modules(network)):
        base = {name: parameter.detach().clone() for name, parameter in module.named_parameters(recurse=False)}
        originals |= {f"{module_name}.{name}": tensor for name, tensor in base.items()}
        for by_kind in adapters.values():
            for layer in cast(nn.ModuleDict, by_kind).values():
                if cast(AdapterLayer, layer).strength:
                    cast(AdapterLayer, layer).merge(module, base)
    detach(network)
    return originals


@torch.no_grad()
def unmerge(network: nn.Module, originals: Mapping[str, Tensor]) -> None:
    """Put back the weights that `merge` returned, in place."""
    for name, tensor in originals.items():
        network.get_parameter(name).copy_(tensor)


def base_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network without its adapters."""
    return {name: tensor for name, tensor in network.state_dict().items() if f".{ATTRIBUTE}." not in f".{name}"}


def adapter_state(network: nn.Module, name: str) -> dict[str, Tensor]:
    """The state dict of an adapter, with the names of its file."""
    part = f".{ATTRIBUTE}.{name}."  # that of the network itself begins with its own kinds
    state = {f".{key}": tensor for key, tensor in network.state_dict().items()}
    return {key.replace(part, ".").removeprefix("."): tensor for key, tensor in state.items() if part in key}


def layers_from_state(network: Network, state: Mapping[str, Tensor], source: str) -> Layers:
    """The layers of an adapter from its state dict. Nothing is attached. Raises TesseraError that lists all faults."""
    grouped: dict[str, dict[str, dict[str, Tensor]]] = {}
    problems, damaged = [], set()
    modules = dict(network.named_modules())
    for key, tensor in state.items():
        module, kind, rest = _split_key(key)
        if module not in modules or not kind:
            problems.append(f"unexpected {key} {tuple(tensor.shape)}: the base has no such layer")
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            problems.append(f"{key} has numbers that are not finite")
            damaged.add((module, kind))
        else:
            grouped.setdefault(module, {}).setdefault(kind, {})[rest] = tensor
    layers: dict[str, dict[str, AdapterLayer]] = {}
    for module, by_kind in grouped.items():
        for kind, tensors in by_kind.items():
            if (module, kind) in damaged:
                continue
            name, projection = split_kind(kind)
            try:
                layers.setdefault(module, {})[kind] = LAYERS[name].from_tensors(modules[module], tensors, projection)
            except ValueError as error:
                problems.append(f"{module}.{kind} does not fit the base: {error}")
    if problems or not layers:
        raise TesseraError(
            f"{source} is not an adapter for this model:{bullet_list(problems or ['it holds no tensor'])}"
        )
    return layers


def _split_key(key: str) -> tuple[str, str, str]:
    """The module, the kind and the rest of a name in the state dict of an adapter; kind is empty if there is none."""
    first, _, rest = key.partition(".")
    if first in NETWORK_KINDS:
        return "", first, rest
    module, _, rest = key.rpartition(".")
    module, _, kind = module.rpartition(".")
    return module, kind if split_kind(kind)[0] in LAYERS else "", rest


def split_kind(kind: str) -> tuple[str, int | None]:
    """The kind of a layer and the number of its projection: lora_2 -> lora, 2"""
    name, _, number = kind.rpartition("_")
    return (name, int(number)) if name and number.isdigit() else (kind, None)


def build_like(network: Network) -> Network:
    """A network of the same structure, adapters included, without values (on the meta device)."""
    with torch.device("meta"):
        copy = network.config.build()
        quantize_base(copy, base_format_of(network))
    for name, strength in attached(network).items():
        grouped: dict[str, dict[str, AdapterLayer]] = {}
        for module_name, _, kind, layer in adapter_layers(network, name):
            tensors = {
                key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                for key, tensor in layer.state_dict().items()
            }
            target = copy.get_submodule(module_name)
            grouped.setdefault(module_name, {})[kind] = layer.from_tensors(target, tensors, split_kind(kind)[1])
        attach(copy, name, grouped)
        set_strengths(copy, {name: strength})
    return copy
