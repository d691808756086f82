"""Adapters: small changes of a trained network, attached from outside, that are trained, stored and merged apart."""

from tessera.adapters.config import (
    AdapterConfig,
    AnyAdapter,
    ClassesConfig,
    ControlConfig,
    DiffFitConfig,
    LoRAConfig,
    WordsConfig,
)
from tessera.adapters.layers import AdapterLayer
from tessera.adapters.network import (
    ATTRIBUTE,
    LAYERS,
    adapter_layers,
    adapter_state,
    attach,
    attached,
    base_state,
    build_like,
    detach,
    layers_from_state,
    merge,
    set_strengths,
    unmerge,
)
from tessera.adapters.quantized_base import BaseFormat, quantize_base

__all__ = [
    "ATTRIBUTE", "LAYERS", "AdapterConfig", "AdapterLayer", "AnyAdapter", "BaseFormat", "ClassesConfig",
    "ControlConfig", "DiffFitConfig", "LoRAConfig", "WordsConfig", "adapter_layers", "adapter_state", "attach",
    "attached", "base_state", "build_like", "detach", "layers_from_state", "merge", "quantize_base", "set_strengths",
    "unmerge",
]  # fmt: skip
