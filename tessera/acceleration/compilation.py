"""A network compiled from outside: as a whole, or each of its blocks."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from tessera.conditioning import NetworkFunction
from tessera.models.network import Network

CompileMode = Literal["off", "blocks", "whole"]
Sizes = Literal["fixed", "changing"]
SIZES_OF_A_MAKE = 8  # of a batch, for which blocks are compiled


def compiled(network: Network, how: CompileMode, sizes: Sizes = "fixed") -> tuple[NetworkFunction, str | None]:
    """What to call in place of a network; and, where this machine cannot compile, why, in one line.

    blocks: in place and one by one; of those of one make (all of a DiT's) the first is compiled, and the others take
    what was made for it. Whoever calls blocks by themselves (`tessera.acceleration.first_block_cache`) has them compiled, too. whole:
    one graph of everything, which takes longer to make. off: not compiled, whatever it was before. Names of weights
    stay in all.

    fixed: code for exactly the sizes that come, made anew for others, as in training. changing: code that serves all,
    once a second size has come, as in drawing.
    """
    _set_calls(network, [None] * len(network.blocks))
    if how == "off":
        return network, None
    if reason := _no_compiler(next(network.parameters()).device):
        return network, reason
    dynamic = False if sizes == "fixed" else None
    if how == "whole":
        return torch.compile(network, dynamic=dynamic), None
    # Beyond a limit PyTorch gives up and runs what is not compiled; its own is meant for sizes of one make.
    makes = {tuple(parameter.shape for parameter in block.parameters()) for block in network.blocks}
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SIZES_OF_A_MAKE * len(makes))
    for block in network.blocks:
        block.compile(dynamic=dynamic)
    return network, None


@dataclass(frozen=True)
class Trial:
    """How long each way took, and which could not be taken."""

    seconds: dict[CompileMode, float]
    failed: dict[CompileMode, str]

    @property
    def best(self) -> CompileMode:
        """The quickest way."""
        return min(self.seconds, key=self.seconds.__getitem__)

    def __str__(self) -> str:
        """In one line, for a log."""
        told = [
            f"{how} {self.seconds['off'] / seconds:.2f} times as fast as off"
            for how, seconds in self.seconds.items()
            if how != "off"
        ]
        told += [f"no {how}: {why}" for how, why in self.failed.items()]
        return f"compile: {self.best} ({'; '.join(told)})"


def fastest(
    network: Network, run_once: Callable[[NetworkFunction], None], synchronise: Callable[[], None], rounds: int = 5
) -> Trial:
    """Time the network as it is, with its blocks compiled, and compiled as a whole.

    Leaves it not compiled and without gradients. run_once: one forward and backward pass of what it is given, which
    changes no weights. Each way is warmed up by two calls, then all take turns for some rounds, so that whatever else
    the machine does weighs on all alike; medians count. synchronise: wait for the device. A way that fails is passed
    over, but for the network as it is.
    """
    failed: dict[CompileMode, str] = {}
    ways: dict[CompileMode, tuple[NetworkFunction, _Calls]] = {}
    for how in get_args(CompileMode):
        forward, reason = compiled(network, how)
        try:
            if reason is not None:
                raise RuntimeError(reason)
            for _ in range(2):
                network.zero_grad(set_to_none=True)
                run_once(forward)
            synchronise()
            ways[how] = forward, _calls(network)
        except Exception as error:  # whatever a compiler makes torch raise, or a lack of memory
            if how == "off":
                raise
            failed[how] = _first_line(error)
    seconds: dict[CompileMode, list[float]] = {how: [] for how in ways}
    for _ in range(rounds):
        for how, (forward, calls) in ways.items():
            _set_calls(network, calls)
            network.zero_grad(set_to_none=True)
            began = time.perf_counter()
            run_once(forward)
            synchronise()
            seconds[how].append(time.perf_counter() - began)
    compiled(network, "off")
    network.zero_grad(set_to_none=True)
    return Trial({how: statistics.median(taken) for how, taken in seconds.items()}, failed)


_Calls = list[Callable[..., Any] | None]  # of each block: what runs in its place


def _calls(network: Network) -> _Calls:
    return [block._compiled_call_impl for block in network.blocks]


def _set_calls(network: Network, calls: _Calls) -> None:
    # What Module.compile sets and Module.__call__ asks for; PyTorch has no way back.
    for block, call in zip(network.blocks, calls, strict=True):
        block._compiled_call_impl = call


def _no_compiler(device: torch.device) -> str | None:
    """Why this machine cannot compile for a device, in one line."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # whatever a compiler that is absent, old or broken makes torch raise
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
