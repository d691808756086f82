"""The weights of one network in what a program saved: nested dictionaries, wrappers, other networks beside it."""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from tessera.errors import TesseraError

# Left in names by DistributedDataParallel, torch.compile, FSDP, activation checkpointing, fairscale and Fabric.
WRAPPERS = {
    "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module", "_forward_module",
}  # fmt: skip
AVERAGED = re.compile(r"(?<![a-z])(ema|swa|avg|averaged|shadow)(?![a-z])")  # names of averaged weights
MAX_DEPTH = 8  # of nested dictionaries


class Weights(NamedTuple):
    """The weights of one network."""

    tensors: dict[str, Tensor]
    part: str  # where they were
    left_out: list[str]  # what was beside them, one phrase each


class _Candidate(NamedTuple):
    part: str
    tensors: dict[str, Tensor]
    others: list[str]  # names of the same dictionary that belong to no candidate


def find_weights(stored: Any, required: Collection[str], source: str) -> Weights:
    """The network that has most of the `required` names, under any prefix in any dictionary; averaged weights (EMA)
    first, then the first. Wrappers are removed from its names. Raises TesseraError if there are no tensors at all.
    """
    mappings = [(path, unwrapped(tensors, source)) for path, tensors in _mappings(stored, ())]
    if not mappings:
        raise TesseraError(
            f"{source} holds no weights: expected a state dict, or a training checkpoint with one, such as 'ema' or "
            "'model'"
        )
    counts = {
        (number, prefix): count
        for number, (_, tensors) in enumerate(mappings)
        for prefix, count in _prefixes(tensors, required).items()
    }
    if not counts:  # not this network: the caller reports what is missing
        path, tensors = max(mappings, key=lambda mapping: len(mapping[1]))
        return Weights(tensors, _part(path, ""), [])
    best = max(counts.values())
    candidates = [
        _candidate(
            *mappings[number], prefix, [other for n, other in counts if n == number and counts[n, other] == best]
        )
        for (number, prefix), count in counts.items()
        if count == best
    ]
    chosen = next((each for each in candidates if AVERAGED.search(each.part)), candidates[0])
    left_out = [f"other weights of the same network: {each.part}" for each in candidates if _rivals(chosen, each)]
    for other in candidates:
        if names := sorted(other.tensors.keys() - chosen.tensors.keys()):
            left_out.append(f"what only {other.part} has: {', '.join(names[:3])}{', …' * (len(names) > 3)}")
    incomplete = {_part(mappings[n][0], prefix) for (n, prefix), count in counts.items() if best > count > best / 2}
    left_out += [f"incomplete weights: {part}" for part in sorted(incomplete)]
    left_out += [f"weights without names: {'.'.join(path)}" for path in _unnamed(stored, ())]
    groups = Counter(name.partition(".")[0] for name in chosen.others)
    left_out += [f"{name} ({count} tensor{'s' * (count > 1)})" for name, count in groups.items()]
    return Weights(chosen.tensors, chosen.part, left_out)


def _mappings(stored: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every dictionary that holds tensors, by the keys that lead to it."""
    if len(path) > MAX_DEPTH or not isinstance(stored, dict | list | tuple):
        return
    if isinstance(stored, dict) and (
        tensors := {
            str(name): value.detach()
            for name, value in stored.items()
            if isinstance(value, Tensor) and not value.is_meta  # which has a shape and no numbers
        }
    ):
        yield path, tensors
    for name, value in stored.items() if isinstance(stored, dict) else enumerate(stored):
        yield from _mappings(value, (*path, str(name)))


def _unnamed(stored: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Averaged weights that are a list of tensors, as diffusers' and timm's EMAModel may save them."""
    if isinstance(stored, dict) and len(path) <= MAX_DEPTH:
        for name, value in stored.items():
            yield from _unnamed(value, (*path, str(name)))
    elif isinstance(stored, list | tuple) and any(isinstance(value, Tensor) for value in stored):
        yield from [path] * bool(AVERAGED.search(".".join(path)))


def unwrapped(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors by names without the parts that wrappers add. Raises TesseraError if two become one."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if plain in result and not (result[plain].shape == tensor.shape and bool((result[plain] == tensor).all())):
            raise TesseraError(f"{source} holds two tensors named {plain} beside its wrappers' names, one is {name}")
        result[plain] = tensor
    return result


def _prefixes(tensors: dict[str, Tensor], required: Collection[str]) -> Counter[str]:
    """How many of the required names there are under each prefix."""
    return Counter(
        name[: len(name) - len(end)] for name in tensors for end in required if name == end or name.endswith(f".{end}")
    )


def _candidate(path: tuple[str, ...], tensors: dict[str, Tensor], prefix: str, prefixes: list[str]) -> _Candidate:
    """The tensors whose names begin with a prefix, and not with a longer one of `prefixes`."""

    def owner(name: str) -> str | None:
        return max((each for each in prefixes if name.startswith(each)), key=len, default=None)

    owners = {name: owner(name) for name in tensors}
    own = {name[len(prefix) :]: tensors[name] for name, each in owners.items() if each == prefix}
    return _Candidate(_part(path, prefix), own, [name for name, each in owners.items() if each is None])


def _part(path: tuple[str, ...], prefix: str) -> str:
    return ": ".join(filter(None, (".".join(path) or ("" if prefix else "state dict"), f"{prefix}*" if prefix else "")))


def _rivals(chosen: _Candidate, other: _Candidate) -> bool:
    """Whether choosing one of two candidates needs a remark: averaged weights are always preferred to the others."""
    return chosen is not other and bool(AVERAGED.search(chosen.part)) == bool(AVERAGED.search(other.part))
