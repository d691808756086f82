"""Forward pass and training step of Tessera's DiT against diffusers' DiTTransformer2DModel of equal weights.

    python benchmarks/against_diffusers.py [--models DiT-S/4,DiT-S/2,DiT-B/4] [--batches 1,8,32] [--compile]

Both run in one process, interleaved, on the same inputs; a row gives medians and their ratio (above 1: Tessera is
faster). "step" is forward, backward and one update: fused AdamW here, torch.optim.AdamW's default there, as in
diffusers' training scripts. "fwd+bwd" leaves the optimizers out. Share of peak counts 2 operations a multiply-add,
3 forward passes a training step, against a 2048 x 2048 matrix product measured in the same process. Peak memory is
the growth of a fresh process over one step.
"""

import argparse
import copy
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tessera.conditions import Condition
from tessera.interop.diffusers import to_diffusers, transformer_of
from tessera.models.dit import DiT, DiTConfig
from tessera.training.optimizers import Adam


def pair(settings: dict[str, Any]) -> tuple[DiT, nn.Module]:
    """The same weights in both networks; non-zero where a fresh network is zero."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    torch.manual_seed(0)
    ours = DiT(DiTConfig.model_validate({**settings, "time_divisor": 127, "mlp_norm_eps": 1e-5}))
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    theirs = DiTTransformer2DModel(**transformer_of(ours.config).model_dump(exclude={"class_name"}))
    theirs.load_state_dict(to_diffusers(ours.state_dict(), ours.config))
    return ours, theirs


def calls(ours: DiT, theirs: nn.Module, batch: int, compiled: bool) -> dict[str, tuple[Callable, Callable]]:
    """What is timed: a pair of functions without arguments, ours first, for each kind of work."""
    x, t, label = torch.randn(batch, 4, 32, 32), torch.randint(0, 1000, (batch,)), torch.randint(0, 1000, (batch,))
    condition, time_ = Condition(label=label), t.to(torch.float32)
    if compiled:
        torch._dynamo.reset()  # else the limit of compilations a process is reached, and the last rows run eagerly
        theirs = copy.deepcopy(ours)
    network = torch.compile(ours, dynamic=False) if compiled else ours

    def run_ours():
        return network(x, time_, condition)

    def run_theirs():
        return theirs(x, time_, condition) if compiled else theirs(x, timestep=t, class_labels=label).sample

    plain = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-6)
    fused = Adam(learning_rate=1e-6).build(ours)

    def forward(run: Callable) -> Callable:
        def work():
            with torch.no_grad():
                run()

        return work

    def gradients(run: Callable, network: nn.Module) -> Callable:
        def work():
            run().square().mean().backward()
            network.zero_grad(set_to_none=True)

        return work

    def step(run: Callable, optimizer: torch.optim.Optimizer) -> Callable:
        def work():
            run().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return work

    # diffusers drops labels at random in training mode; eval mode keeps the work equal, there is no other dropout.
    ours.eval(), theirs.eval()
    difference = (forward_value(run_ours) - forward_value(run_theirs)).norm() / forward_value(run_theirs).norm()
    assert difference < 1e-4, f"the networks differ by {difference:.2e}: nothing to compare"
    return {
        "forward": (forward(run_ours), forward(run_theirs)),
        "fwd+bwd": (gradients(run_ours, ours), gradients(run_theirs, theirs)),
        "step": (step(run_ours, fused), step(run_theirs, plain)),
    }


def forward_value(run: Callable) -> torch.Tensor:
    with torch.no_grad():
        return run()


def interleaved(first: Callable, second: Callable, rounds: int) -> tuple[float, float]:
    """Median seconds of two functions, called in turn after one warm-up each."""
    first(), second()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, seconds in zip((first, second), times):
            began = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def peak_flops() -> float:
    """Floating-point operations a second of a 2048 x 2048 float32 product, the best of ten."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = math.inf
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def memory_of(preset: str, batch: int, which: str) -> float:
    """MiB that one training step adds to a fresh process that holds the network."""
    command = [sys.executable, __file__, "--memory-of", f"{preset},{batch},{which}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def report_memory(preset: str, batch: int, which: str) -> None:
    ours, theirs = pair({"preset": preset})
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    network = ours if which == "ours" else theirs
    x, t, label = torch.randn(batch, 4, 32, 32), torch.randint(0, 1000, (batch,)), torch.randint(0, 1000, (batch,))
    network.eval()
    raw = (
        ours(x, t.to(torch.float32), Condition(label=label))
        if which == "ours"
        else theirs(x, timestep=t, class_labels=label).sample
    )
    raw.square().mean().backward()
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = Adam().build(ours) if which == "ours" else torch.optim.AdamW(parameters)
    optimizer.step()
    print((memory("VmHWM") - before) / 1024)


def memory(what: str) -> int:
    """KiB of this process: VmRSS now, VmHWM at its highest. Linux."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(what)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="DiT-S/4,DiT-S/2,DiT-B/4")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="Tessera compiled against Tessera eager instead")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        preset, batch, which = options.memory_of.split(",")
        report_memory(preset, int(batch), which)
        return
    import diffusers

    peak = peak_flops()
    print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, peak {peak / 1e9:.0f} GFLOP/s, {options.rounds} rounds"
        "\n"
    )
    names = ("Tessera compiled", "Tessera eager") if options.compile else ("Tessera", "diffusers")
    print(f"| model | batch | work | {names[0]} ms | {names[1]} ms | ratio | share of peak | memory MiB, ratio |")
    print("|---|---|---|---|---|---|---|---|")
    ratios: dict[str, list[float]] = {}
    for preset in options.models.split(","):
        for batch in map(int, options.batches.split(",")):
            ours, theirs = pair({"preset": preset})  # anew: the steps of the last batch have moved the weights
            memory = "" if options.compile else [memory_of(preset, batch, which) for which in ("ours", "theirs")]
            for work, (first, second) in calls(ours, theirs, batch, options.compile).items():
                mine, other = interleaved(first, second, options.rounds)
                ratios.setdefault(work, []).append(other / mine)
                operations = 2 * ours.macs() * batch * (1 if work == "forward" else 3)
                shown = f"{memory[0]:.0f}, {memory[1] / memory[0]:.2f}" if memory and work == "step" else ""
                print(
                    f"| {preset} | {batch} | {work} | {mine * 1e3:.1f} | {other * 1e3:.1f} | {other / mine:.3f} | "
                    f"{operations / mine / peak:.0%} | {shown} |",
                    flush=True,
                )
    print()
    for work, found in ratios.items():
        print(f"geometric mean, {work}: {statistics.geometric_mean(found):.3f} (lowest {min(found):.3f})")


if __name__ == "__main__":
    main()
