"""Adapter files of other programs <-> the state dict of an adapter here. `lora_export` writes them.

Read: PEFT, diffusers, kohya (sd-scripts), the official script of PixArt, ai-toolkit, SimpleTuner, and LyCORIS.

Shapes: I input features, O output features, r rank.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tessera.adapters.network import layers_from_state, split_kind
from tessera.errors import TesseraError, bullet_list
from tessera.interop import lora_keys
from tessera.interop.lora_export import write
from tessera.interop.lora_keys import PEFT_ALPHA, StoredAdapter
from tessera.interop.lora_names import PEFT, Finder, Place, rows_of
from tessera.layers.fused_linear import FusedLinear
from tessera.models.network import Network

__all__ = ["read", "summary", "write"]

State = dict[str, Tensor]
KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "weight": "weights", "bias": "biases"}
STRICT = "every tensor of the file must belong to a layer of the model"


def read(path: str | Path, network: Network, alpha: float | None = None) -> State:
    """The state dict of an adapter for a network, from the file or folder of another program.

    alpha: if the file does not state it. Raises TesseraError that lists everything that does not belong to the network
    or is contradictory.
    """
    path = Path(path).expanduser()
    if alpha is not None and not alpha > 0:
        raise TesseraError(f"alpha is {alpha:g}; expected a positive number")
    stored = lora_keys.read(path)
    finder, problems = Finder(network), []
    by_place: dict[Place, list[tuple[str, State]]] = {}
    for key in stored.other:
        problems.append(f"unexpected {key}: Tessera reads no such tensor")
    for name in stored.layers:
        place_and_prefix = finder.find(name)
        if place_and_prefix is None:
            problems.append(f"unexpected {', '.join(stored.layers[name].keys.values())}: the base has no such layer")
            continue
        place, prefix = place_and_prefix
        module = network.get_submodule(place.module)
        try:
            tensors = dict(_read_layer(stored, name, prefix, module, place, alpha))
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        by_place.setdefault(place, []).append((name, tensors))
    problems += _copies(by_place)
    if problems:
        raise TesseraError(f"{path} does not fit this model, and {STRICT}:{bullet_list(problems)}")
    layers: dict[str, dict[int | None, State]] = {}
    for place, entries in by_place.items():
        layers.setdefault(place.module, {})[place.projection] = entries[0][1]
    state = {}
    for module_name, parts in layers.items():
        module = network.get_submodule(module_name)
        state |= {f"{module_name}.{key}": tensor for key, tensor in _module_state(module, parts).items()}
    layers_from_state(network, state, str(path))
    return state


def _read_layer(
    stored: StoredAdapter, name: str, prefix: str, module: nn.Module, place: Place, alpha: float | None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one layer, by kind and name: lora.down. Raises ValueError."""
    tensors, keys = dict(stored.layers[name].tensors), stored.layers[name].keys
    assert isinstance(module, nn.Linear)
    parts = module.num_projections if isinstance(module, FusedLinear) and place.projection is not None else 1
    size, width = module.out_features // parts, module.in_features
    for role, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{keys[role]} is {tensor.dtype}, expected floating-point numbers")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{keys[role]} has numbers that are not finite")
        tensors[role] = tensor.detach().float().clone()
    kinds = {role.partition(".")[0] for role in tensors} & {"loha", "lokr", "weight"}
    kinds |= {"lora"} if tensors.keys() & {"down", "up", "up_bias"} else set()
    scaled = kinds - {"weight"}
    if len(scaled) > 1:
        raise ValueError(f"it has the tensors of {' and '.join(sorted(scaled))}")
    if not scaled and (extra := tensors.keys() & {"alpha", "magnitude"}):
        raise ValueError(f"{', '.join(keys[role] for role in sorted(extra))} is there without a change of the weight")
    if scaled and "magnitude" not in tensors and stored.config is not None and stored.config.use_dora:
        raise ValueError("the configuration of the file states DoRA, and it has no magnitude")
    for role in ("weight.values", "bias.values"):
        expected = (size, width) if role[0] == "w" else (size,)
        if role in tensors and tensors[role].shape != expected:
            raise ValueError(f"{keys[role]} is {tuple(tensors[role].shape)}, expected {expected}")
    if "weight" in kinds:
        yield "weight.values", tensors["weight.values"]
        yield "weight.scale", torch.tensor(1.0)
    bias = tensors.get("bias.values")
    if scaled:
        kind = scaled.pop()
        rank = _rank(kind, tensors, keys, size, width)
        scale = 1.0 if rank is None else _scale(stored, name, prefix, rank, tensors.get("alpha"), alpha)
        yield f"{kind}.scale", torch.tensor(scale)
        if kind == "lora":
            down, up = _without_zeros(tensors["down"], tensors["up"])
            if "up_bias" in tensors:
                bias = scale * tensors["up_bias"] + (0 if bias is None else bias)
            yield "lora.down", down
            yield "lora.up", up
        yield from ((role, tensor) for role, tensor in tensors.items() if role.startswith(f"{kind}."))
        if "magnitude" in tensors:
            yield f"{kind}.magnitude", _magnitude(tensors["magnitude"], keys["magnitude"], size, width)
    if bias is not None:
        if module.bias is None:
            raise ValueError("it changes the bias, and the layer of the base has none")
        yield "bias.values", bias


def _rank(kind: str, tensors: State, keys: Mapping[str, str], size: int, width: int) -> int | None:
    """The rank of a layer; None where alpha has no effect. Raises ValueError if its tensors do not belong together."""
    needed = {"lora": ("down", "up"), "loha": tuple(f"loha.{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b"))}
    if missing := [role for role in needed.get(kind, ()) if role not in tensors]:
        raise ValueError(f"it has no {missing[0]} to its {', '.join(sorted(keys.values()))}")
    if kind == "lora":
        down, up = tensors["down"], tensors["up"]
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not len(down):
            raise ValueError(f"its {tuple(down.shape)} and {tuple(up.shape)} do not have one rank")
        if (up.shape[0], down.shape[1]) != (size, width):
            raise ValueError(f"it changes a map of {up.shape[0]} x {down.shape[1]}, and the base has {size} x {width}")
        if "up_bias" in tensors and tensors["up_bias"].shape != (size,):
            raise ValueError(f"{keys['up_bias']} is {tuple(tensors['up_bias'].shape)}, expected {(size,)}")
        return len(down)
    for role, tensor in tensors.items():
        if role.startswith(f"{kind}.") and (tensor.ndim != 2 or not tensor.numel()):
            raise ValueError(f"{keys[role]} is {tuple(tensor.shape)}, expected a matrix")
    if kind == "loha":
        return tensors["loha.w1_b"].shape[0]
    for factor in ("w1", "w2"):  # as in LyCORIS: the first that is not stored whole
        if (product := tensors.get(f"lokr.{factor}_b")) is not None:
            return product.shape[0]
    return None


def _scale(
    stored: StoredAdapter, name: str, prefix: str, rank: int, tensor: Tensor | None, alpha: float | None
) -> float:
    """The factor of a layer's change: alpha from its tensor, then the header, then the user. Raises ValueError."""
    stated = stored.stated_scale(name[len(prefix) :], rank)
    if tensor is not None:
        if tensor.numel() != 1:
            raise ValueError(f"its alpha is {tuple(tensor.shape)}, expected one number")
        own = float(tensor)
        if stored.config is not None and stated is not None and stated[1] != own / rank:
            raise ValueError(
                f"its alpha is {own:g} as a tensor (scale {own / rank:g}) and {stated[0]:g} in the header or "
                f"configuration (scale {stated[1]:g}): remove the wrong one"
            )
        stated = own, own / rank
    if stated is None:
        if alpha is None and prefix in PEFT:
            raise ValueError(
                f"alpha stands nowhere in the file. The official script of PixArt trains with PEFT's default, "
                f"{PEFT_ALPHA}: pass alpha={PEFT_ALPHA} (--alpha {PEFT_ALPHA}), a strength of {PEFT_ALPHA / rank:g} at "
                f"this rank; other scripts often set alpha to the rank: alpha={rank} (--alpha {rank}), a strength of 1"
            )
        return 1.0 if alpha is None else alpha / rank
    if stated[0] <= 0:
        raise ValueError(f"its alpha is {stated[0]:g}, expected a positive number")
    if alpha is not None and alpha != stated[0]:
        raise ValueError(f"the file states alpha {stated[0]:g}, not {alpha:g}: leave out alpha (--alpha)")
    return stated[1]


def _without_zeros(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Without the part of the rank that is zero in both, with which a file is filled up."""
    used = down.any(dim=1) | up.any(dim=0)
    used[0] |= not used.any()
    return (down, up) if used.all() else (down[used], up[:, used])


def _magnitude(tensor: Tensor, key: str, size: int, width: int) -> Tensor:
    """Of DoRA: the lengths of rows [O] or of columns [1, I], by its shape."""
    if tensor.shape in ((size,), (size, 1)):
        return tensor.flatten()
    if tensor.shape == (1, width):
        return tensor
    raise ValueError(f"{key} is {tuple(tensor.shape)}, expected lengths of rows ({size}, 1) or columns (1, {width})")


def _copies(by_place: Mapping[Place, list[tuple[str, State]]]) -> Iterator[str]:
    """What is wrong with several layers of a file for one place: they must be all copies of it, and equal."""
    for place, entries in by_place.items():
        if len(entries) != place.copies:
            names = ", ".join(name for name, _ in entries[:3])
            yield f"{names}: {len(entries)} layers for {place.module} of the base, expected {place.copies}"
        first = entries[0][1]
        for name, tensors in entries[1:]:
            if tensors.keys() != first.keys() or not all(torch.equal(tensors[key], first[key]) for key in first):
                yield f"{name} differs from {entries[0][0]}, and the base has one layer for both"


def _module_state(module: nn.Module, parts: dict[int | None, State]) -> State:
    """The tensors of all layers of one module, from those of the map and of its projections."""
    count = module.num_projections if isinstance(module, FusedLinear) else 1
    biases = {number: tensors.pop("bias.values") for number, tensors in parts.items() if "bias.values" in tensors}
    if None not in parts:
        parts = _fused(parts, count)
    elif len(parts) == 1 and count > 1:
        parts = _split(parts[None], count)
    state = {}
    for projection, tensors in parts.items():
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            state[f"{kind if projection is None else f'{kind}_{projection}'}.{name}"] = tensor.contiguous()
    if biases:
        assert isinstance(module, nn.Linear)
        bias = torch.zeros(module.out_features)
        for projection, values in biases.items():
            bias[rows_of(module, projection)] += values
        state["bias.values"] = bias
    return state


def _fused(parts: dict[int | None, State], count: int) -> dict[int | None, State]:
    """Projections with the same `down` are one layer."""
    first = next(iter(parts.values()))
    shared = ("lora.down", "lora.scale")
    if len(parts) < count or any(tensors.keys() != first.keys() for tensors in parts.values()):
        return parts
    if not all(name in first for name in shared) or first.keys() - {*shared, "lora.up", "lora.magnitude"}:
        return parts
    if any(not torch.equal(tensors[name], first[name]) for tensors in parts.values() for name in shared):
        return parts
    if first.get("lora.magnitude", torch.empty(0)).ndim != 1:
        return parts
    return {
        None: {
            key: tensor if key in shared else torch.cat([parts[number][key] for number in range(count)])
            for key, tensor in first.items()
        }
    }


def _split(tensors: State, count: int) -> dict[int | None, State]:
    """Where each part of the rank changes one projection, as in a file made from split layers, each has its own."""
    if tensors.keys() != {"lora.down", "lora.up", "lora.scale"}:
        return {None: tensors}
    used = torch.stack([part.any(dim=0) for part in tensors["lora.up"].chunk(count)])  # [projections, r]
    if not (used.sum(dim=0) == 1).all():
        return {None: tensors}
    ups = tensors["lora.up"].chunk(count)
    return {
        number: {
            "lora.down": tensors["lora.down"][used[number]],
            "lora.up": ups[number][:, used[number]],
            "lora.scale": tensors["lora.scale"],
        }
        for number in range(count)
        if used[number].any()
    }


def summary(state: Mapping[str, Tensor]) -> str:
    """What an adapter read by `read` holds, in one line."""
    layers: dict[str, set[str]] = {}
    for key in state:
        module, kind, name = key.rsplit(".", 2)
        names = layers.setdefault(f"{module}.{kind}", set())
        names.add(name)
    counts: Counter[str] = Counter()
    for layer, names in layers.items():
        kind = KINDS[split_kind(layer.rpartition(".")[2])[0]]
        kind = f"{kind} with DoRA" if "magnitude" in names else kind
        counts[f"{kind} of rank {len(state[f'{layer}.down'])}" if "down" in names else kind] += 1
    return ", ".join(f"{kind} ({count} layers)" for kind, count in counts.items())
