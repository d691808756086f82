"""Compilation of a network with torch.compile: as a whole, or block by block."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from tessera.conditioning import NetworkFunction
from tessera.models.network import Network

CompileMode = Literal["off", "blocks", "whole"]
RECOMPILES_PER_SHAPE = 8  # batch sizes for which blocks with the same parameter shapes may be compiled


def compile_network(
    network: Network, mode: CompileMode, dynamic_shapes: bool = False
) -> tuple[NetworkFunction, str | None]:
    """The function to call instead of a network and, if this machine cannot compile, the reason in one line.

    blocks: compile each block in place. Blocks with the same parameter shapes (all blocks of a DiT) share the code of
    the first. Callers of single blocks, such as `tessera.acceleration.first_block_cache`, use the compiled blocks, too.
    whole: compile one graph of the whole network, which takes longer. off: do not compile, and remove the compiled code
    of an earlier call. The names of the weights do not change.

    dynamic_shapes: if false, compile for the exact shapes of each input and recompile for others, as in training. If
    true, the second shape leads to code for all shapes, as in sampling.
    """
    _set_compiled_calls(network, [None] * len(network.blocks))
    if mode == "off":
        return network, None
    if reason := _reason_not_to_compile(next(network.parameters()).device):
        return network, reason
    dynamic = None if dynamic_shapes else False
    if mode == "whole":
        return torch.compile(network, dynamic=dynamic), None
    # Above this limit PyTorch does not compile the function. The default is too low for blocks of several shapes.
    shapes = {tuple(parameter.shape for parameter in block.parameters()) for block in network.blocks}
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILES_PER_SHAPE * len(shapes))
    for block in network.blocks:
        block.compile(dynamic=dynamic)
    return network, None


@dataclass(frozen=True)
class CompileTimings:
    """The seconds of each compile mode, and the error of each mode that failed."""

    seconds: dict[CompileMode, float]
    errors: dict[CompileMode, str]

    @property
    def fastest(self) -> CompileMode:
        return min(self.seconds, key=self.seconds.__getitem__)

    def __str__(self) -> str:
        """One line for a log."""
        parts = [
            f"{mode} {self.seconds['off'] / seconds:.2f} times as fast as off"
            for mode, seconds in self.seconds.items()
            if mode != "off"
        ]
        parts += [f"{mode} failed: {error}" for mode, error in self.errors.items()]
        return f"compile: {self.fastest} ({'; '.join(parts)})"


def time_modes(
    network: Network, run_once: Callable[[NetworkFunction], None], synchronize: Callable[[], None], rounds: int = 5
) -> CompileTimings:
    """Measure the time of every compile mode. Afterwards the network is not compiled and has no gradients.

    run_once: one forward and backward pass of its argument, without a change of weights. Each mode has two warm-up
    calls. Then the modes take turns, so that other load on the machine affects all of them alike, and the median
    counts. synchronize: wait for the device. A mode that fails is recorded in `errors`; an error without compilation is
    raised.
    """
    errors: dict[CompileMode, str] = {}
    functions: dict[CompileMode, tuple[NetworkFunction, _CompiledCalls]] = {}
    for mode in get_args(CompileMode):
        forward, reason = compile_network(network, mode)
        try:
            if reason is not None:
                raise RuntimeError(reason)
            for _ in range(2):
                network.zero_grad(set_to_none=True)
                run_once(forward)
            synchronize()
            functions[mode] = forward, _compiled_calls(network)
        except Exception as error:  # any error of a compiler, or too little memory
            if mode == "off":
                raise
            errors[mode] = _first_line(error)
    seconds: dict[CompileMode, list[float]] = {mode: [] for mode in functions}
    for _ in range(rounds):
        for mode, (forward, calls) in functions.items():
            _set_compiled_calls(network, calls)
            network.zero_grad(set_to_none=True)
            start = time.perf_counter()
            run_once(forward)
            synchronize()
            seconds[mode].append(time.perf_counter() - start)
    compile_network(network, "off")
    network.zero_grad(set_to_none=True)
    return CompileTimings({mode: statistics.median(times) for mode, times in seconds.items()}, errors)


_CompiledCalls = list[Callable[..., Any] | None]  # for each block, the compiled function that Module.__call__ uses


def _compiled_calls(network: Network) -> _CompiledCalls:
    return [block._compiled_call_impl for block in network.blocks]


def _set_compiled_calls(network: Network, calls: _CompiledCalls) -> None:
    # Module.compile sets this attribute and Module.__call__ reads it. PyTorch has no function that undoes it.
    for block, call in zip(network.blocks, calls, strict=True):
        block._compiled_call_impl = call


def _reason_not_to_compile(device: torch.device) -> str | None:
    """The first line of the error if a small function cannot be compiled for a device."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # any error of a missing, old or broken compiler
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
