"""What a computation asks of a machine, found without computing it: every operator with its sizes, and the memory that
lives from one to the next.

A function runs on fake tensors, which have shapes and no contents, or on real ones; both ask for the same.
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
class Spec:
    """A tensor as far as cost depends on it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """That are held: an expanded axis is held once."""
        count = 1
        for length, step in zip(self.shape, self.stride):
            count *= length if step else 1
        return 0 if 0 in self.shape else count * self.dtype.itemsize


@dataclass(frozen=True)
class Operator:
    """One call of an operator of PyTorch, as far as its cost depends on it; equal calls cost the same."""

    name: str  # "aten.addmm.default"
    arguments: tuple[Any, ...]  # Specs in the place of tensors, tuples in that of lists
    named: tuple[tuple[str, Any], ...]
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
        """Of the tensors that are multiplied."""
        found = [spec.dtype for spec in specs((self.arguments, self.named)) if spec.dtype.is_floating_point]
        return min(found, key=lambda dtype: dtype.itemsize, default=torch.float32)


@dataclass
class Trace:
    """What a part of a computation asks for."""

    operators: Counter[Operator] = field(default_factory=Counter)  # how often each is called
    views: int = 0  # calls that move no data
    kept: int = 0  # bytes of tensors made since recording began and still held at the end of the part
    peak: int = 0  # most bytes so held at any moment of the part

    @property
    def flops(self) -> int:
        """Floating-point operations of matrix products, attention and convolutions."""
        return sum(operator.flops * count for operator, count in self.operators.items())

    @property
    def bytes(self) -> int:
        """Read and written."""
        return sum(operator.bytes * count for operator, count in self.operators.items())

    @property
    def calls(self) -> int:
        return self.operators.total() + self.views


class Sizes(NamedTuple):
    """Bytes of a step of training on one device."""

    weights: int
    averages: int
    moments: int  # what the optimizer remembers
    gradients: int
    kept: int  # held at the end of a forward pass, for the backward pass: activations, and the batch
    peak: int  # most at once beside weights, averages and moments; gradients are among them


@dataclass(frozen=True)
class Step:
    """One step of training in its phases, over all its rounds."""

    forward: Trace  # until the first round's output
    backward: Trace  # all between that and the update: the loss, the gradients, further rounds
    update: Trace  # optimizer and averages
    sizes: Sizes

    @property
    def flops(self) -> int:
        """Of matrix products, attention and convolutions."""
        return self.forward.flops + self.backward.flops + self.update.flops


class Recorder(TorchDispatchMode):
    """Records what runs inside `with recorder:`; `lap` hands out what came since the last lap."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of storages made here
        self._live = 0
        self._part = Trace()

    def lap(self) -> Trace:
        done = self._part
        done.kept = self._live
        self._part = Trace(peak=self._live)
        return done

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in ("prim", "profiler"):  # asks what a tensor is, or takes a note
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1  # whether to go on: yes
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        made = 0
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage not in self._sizes:
                self._hold(storage)
                made += storage.nbytes()
        if func.is_view or func in _FREE:
            self._part.views += 1
        else:
            self._part.operators[_operator(func, args, kwargs, out, made)] += 1
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._sizes[storage] = size
        self._live += size
        self._part.peak = max(self._part.peak, self._live)
        weakref.finalize(storage, self._let_go, size)

    def _let_go(self, size: int) -> None:
        self._live -= size


@contextmanager
def fake() -> Iterator[None]:
    """Inside, tensors that are made have shapes and no contents, also those of `network.to_empty(device="cpu")`."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def outline(config: NetworkConfig) -> Network:
    """A network on the device "meta", where tensors have no contents. It is kept: not to be changed."""
    return _outline(type(config), config.model_dump_json())


@lru_cache(maxsize=32)
def _outline(kind: type[NetworkConfig], config: str) -> Network:
    with torch.device("meta"), _NoValues():
        return kind.model_validate_json(config).build()


class _NoValues(TorchDispatchMode):
    """Leaves out what would fill tensors: on the device "meta" there is nothing to fill, but it takes its time."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in _FILLING and args[0].is_meta else func(*args, **(kwargs or {}))


def specs(nested: Any) -> Iterator[Spec]:
    """All tensors of a recorded call."""
    if isinstance(nested, Spec):
        yield nested
    elif isinstance(nested, tuple):
        for one in nested:
            yield from specs(one)


def function(operator: Operator) -> Any:
    """What PyTorch calls it by."""
    found: Any = torch.ops
    for name in operator.name.split("."):
        found = getattr(found, name)
    return found


_FILLING = {aten.uniform_.default, aten.normal_.default, aten.zero_.default, aten.fill_.Scalar, aten.copy_.default}
# Views by another name: none of them moves data.
_FREE = {aten._unsafe_view.default, aten.detach.default, aten.lift_fresh.default, aten.alias.default}


def _tensors(nested: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(nested) if isinstance(leaf, Tensor))


def _operator(func: Any, args: Any, kwargs: Any, out: Any, made: int) -> Operator:
    seen = tree_map_only(Tensor, _spec, (args, kwargs))
    arguments, named = _frozen(seen[0]), tuple((name, _frozen(value)) for name, value in seen[1].items())
    read = sum(spec.bytes for spec in specs((arguments, named)))
    written = made + sum(
        spec.bytes
        for told, value in zip(func._schema.arguments, arguments)
        if told.alias_info is not None and told.alias_info.is_write
        for spec in specs((value,))
    )
    return Operator(str(func), arguments, named, _flops(func, args, kwargs, out), read + written)


def _spec(tensor: Tensor) -> Spec:
    return Spec(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(one) for one in value) if isinstance(value, list | tuple) else value


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    if (attention := _ATTENTION.get(str(func).split(".")[1])) is not None:
        place, passes = attention
        q, k, v = args[place : place + 3]
        return passes * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


# PyTorch's own counter knows nothing of attention on processors: where query, key and value stand among the arguments,
# and how many operations a product of two tokens takes a channel (the backward pass makes five products, not two).
_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": (0, 2),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (1, 5),
}
