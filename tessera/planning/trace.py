"""The operators of a computation with their sizes, and the memory of its tensors, recorded without computing it.

A function runs on fake tensors, which have shapes and no data, or on real ones; the trace is the same.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from tessera.models.network import Network, NetworkConfig

aten = torch.ops.aten

Kind = Literal["matrix", "attention", "convolution", "elementwise"]


@dataclass(frozen=True)
class TensorSpec:
    """The properties of a tensor that decide its cost."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes in memory: an expanded axis counts once."""
        count = 1
        for length, stride in zip(self.shape, self.stride):
            count *= length if stride else 1
        return 0 if 0 in self.shape else count * self.dtype.itemsize


@dataclass(frozen=True)
class Operator:
    """A call of a PyTorch operator. Equal calls have equal cost."""

    name: str  # "aten.addmm.default"
    args: tuple[Any, ...]  # with a TensorSpec for each tensor and a tuple for each list
    kwargs: tuple[tuple[str, Any], ...]
    flops: int
    bytes: int  # read and written

    @property
    def kind(self) -> Kind:
        if "scaled_dot_product" in self.name:
            return "attention"
        if "convolution" in self.name:
            return "convolution"
        return "matrix" if self.flops else "elementwise"

    @property
    def dtype(self) -> torch.dtype:
        """The smallest floating-point type of its tensors."""
        dtypes = [spec.dtype for spec in iter_specs((self.args, self.kwargs)) if spec.dtype.is_floating_point]
        return min(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)


@dataclass
class Trace:
    """The operators and the memory of a part of a computation."""

    operators: Counter[Operator] = field(default_factory=Counter)  # number of calls
    views: int = 0  # calls that move no data
    live_bytes: int = 0  # of tensors created since the recording began and alive at the end of the part
    peak_bytes: int = 0  # the largest live_bytes during the part

    @property
    def flops(self) -> int:
        """FLOPs of matrix products, attention and convolutions."""
        return sum(operator.flops * count for operator, count in self.operators.items())

    @property
    def calls(self) -> int:
        return self.operators.total() + self.views


class StepMemory(NamedTuple):
    """Bytes of a training step on one device."""

    weights: int
    ema: int
    optimizer: int  # its state
    gradients: int
    activations: int  # alive after the forward pass, with the batch
    peak: int  # beside weights, EMA and optimizer state; includes the gradients
    shared: int = 0  # of the EMA: frozen weights, which a single process does not copy


@dataclass(frozen=True)
class StepTrace:
    """The phases of one training step."""

    forward: Trace  # up to the output of the first micro-batch
    backward: Trace  # from there to the update: loss, gradients, further micro-batches
    update: Trace  # optimizer and EMA
    memory: StepMemory


class Recorder(TorchDispatchMode):
    """Records what runs inside `with recorder:`. `lap` returns the trace since the previous lap."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: WeakIdKeyDictionary = WeakIdKeyDictionary()  # created while recording
        self._live_bytes = 0
        self._trace = Trace()

    def lap(self) -> Trace:
        trace, self._trace = self._trace, Trace(peak_bytes=self._live_bytes)
        trace.live_bytes = self._live_bytes
        return trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in ("prim", "profiler"):  # queries and annotations
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1  # fake tensors have no value to decide a branch; 1 takes the usual one
        inputs = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        created_bytes = 0
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in inputs and storage not in self._storages:
                self._add(storage)
                created_bytes += storage.nbytes()
        if func.is_view or func in _FREE:
            self._trace.views += 1
        else:
            self._trace.operators[_operator(func, args, kwargs, out, created_bytes)] += 1
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._storages[storage] = size
        self._live_bytes += size
        self._trace.peak_bytes = max(self._trace.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self._live_bytes -= size


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside, new tensors have shapes and no data, also those of `network.to_empty(device="cpu")`."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def meta_network(config: NetworkConfig) -> Network:
    """A network on the device "meta", where tensors have no data. Cached: do not modify it."""
    return _meta_network(type(config), config.model_dump_json())


@lru_cache(maxsize=32)
def _meta_network(config_class: type[NetworkConfig], config: str) -> Network:
    with torch.device("meta"), _SkipInitialization():
        return config_class.model_validate_json(config).build()


class _SkipInitialization(TorchDispatchMode):
    """Skips operators that fill meta tensors: they have no effect and take time."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in _FILL and args[0].is_meta else func(*args, **(kwargs or {}))


def iter_specs(nested: Any) -> Iterator[TensorSpec]:
    """All tensors of a recorded call."""
    if isinstance(nested, TensorSpec):
        yield nested
    elif isinstance(nested, tuple):
        for item in nested:
            yield from iter_specs(item)


def resolve_operator(operator: Operator) -> Any:
    """The PyTorch function of an operator."""
    function: Any = torch.ops
    for name in operator.name.split("."):
        function = getattr(function, name)
    return function


_FILL = {aten.uniform_.default, aten.normal_.default, aten.zero_.default, aten.fill_.Scalar, aten.copy_.default}
# Views that are not marked as views: they move no data.
_FREE = {aten._unsafe_view.default, aten.detach.default, aten.lift_fresh.default, aten.alias.default}


def _tensors(nested: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(nested) if isinstance(leaf, Tensor))


def _operator(func: Any, args: Any, kwargs: Any, out: Any, created_bytes: int) -> Operator:
    spec_args, spec_kwargs = tree_map_only(Tensor, _spec, (args, kwargs))
    spec_args, spec_kwargs = _freeze(spec_args), tuple((name, _freeze(value)) for name, value in spec_kwargs.items())
    read = sum(spec.bytes for spec in iter_specs((spec_args, spec_kwargs)))
    written = created_bytes + sum(
        spec.bytes
        for argument, value in zip(func._schema.arguments, spec_args)
        if argument.alias_info is not None and argument.alias_info.is_write
        for spec in iter_specs((value,))
    )
    return Operator(str(func), spec_args, spec_kwargs, _flops(func, args, kwargs, out), read + written)


def _spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list | tuple) else value


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    if (attention := _ATTENTION.get(str(func).split(".")[1])) is not None:
        query_index, products = attention
        q, k, v = args[query_index : query_index + 3]
        return products * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


# PyTorch's counter does not know the attention operators of CPUs: the index of the query among the arguments, and FLOPs
# per pair of tokens and channel (the backward pass has five matrix products, the forward pass two).
_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": (0, 2),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (1, 5),
}
