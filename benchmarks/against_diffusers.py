"""Forward pass of Tessera's DiT against diffusers' DiTTransformer2DModel of equal weights.

    python benchmarks/against_diffusers.py [--models DiT-S/4,DiT-S/2,DiT-B/4] [--batches 1,8,32] [--compile]

Both run in one process, interleaved, on the same inputs; a row gives medians and their ratio (above 1: Tessera is
faster). Share of peak counts 2 operations per multiply-add, against a 2048 x 2048 matrix product measured in the same
process. A training step is compared in `training_step.py`.
"""

import argparse
import copy
import math
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tessera.conditioning import Condition
from tessera.interop.diffusers import to_diffusers, transformer_config
from tessera.models.dit import DiT, DiTConfig


def pair(settings: dict[str, Any]) -> tuple[DiT, nn.Module]:
    """The same weights in both networks; non-zero where a fresh network is zero."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    torch.manual_seed(0)
    ours = DiT(DiTConfig.model_validate({**settings, "timestep_freq_divisor": 127, "mlp_norm_eps": 1e-5}))
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    theirs = DiTTransformer2DModel(**transformer_config(ours.config).model_dump(exclude={"class_name"}))
    theirs.load_state_dict(to_diffusers(ours.state_dict(), ours.config))
    return ours, theirs


def calls(ours: DiT, theirs: nn.Module, batch: int, compiled: bool) -> tuple[Callable, Callable]:
    """The two timed functions, without arguments, Tessera's first."""
    x, t, label = torch.randn(batch, 4, 32, 32), torch.randint(0, 1000, (batch,)), torch.randint(0, 1000, (batch,))
    condition, time_ = Condition(label=label), t.to(torch.float32)
    if compiled:
        torch._dynamo.reset()  # otherwise the last rows run eagerly, after the limit of compilations
        theirs = copy.deepcopy(ours)
    network = torch.compile(ours, dynamic=False) if compiled else ours

    @torch.no_grad()
    def run_ours():
        return network(x, time_, condition)

    @torch.no_grad()
    def run_theirs():
        return theirs(x, time_, condition) if compiled else theirs(x, timestep=t, class_labels=label).sample

    # diffusers drops labels at random in training mode; eval mode keeps the work equal, there is no other dropout.
    ours.eval(), theirs.eval()
    difference = (run_ours() - run_theirs()).norm() / run_theirs().norm()
    assert difference < 1e-4, f"the networks differ by {difference:.2e}: nothing to compare"
    return run_ours, run_theirs


def interleaved(first: Callable, second: Callable, rounds: int) -> tuple[float, float]:
    """Median seconds of two functions, called alternately after one warm-up each."""
    first(), second()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, seconds in zip((first, second), times):
            began = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def peak_flops() -> float:
    """Floating-point operations per second of a 2048 x 2048 float32 product, the best of ten."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = math.inf
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def main() -> None:
    import diffusers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="DiT-S/4,DiT-S/2,DiT-B/4")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="Tessera compiled against Tessera eager instead")
    options = parser.parse_args()
    peak = peak_flops()
    print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, peak {peak / 1e9:.0f} GFLOP/s, {options.rounds} rounds"
        "\n"
    )
    names = ("Tessera compiled", "Tessera eager") if options.compile else ("Tessera", "diffusers")
    print(f"| model | batch | {names[0]} ms | {names[1]} ms | ratio | share of peak |")
    print("|---|---|---|---|---|---|")
    ratios = []
    for preset in options.models.split(","):
        ours, theirs = pair({"preset": preset})
        for batch in map(int, options.batches.split(",")):
            mine, other = interleaved(*calls(ours, theirs, batch, options.compile), options.rounds)
            ratios.append(other / mine)
            print(
                f"| {preset} | {batch} | {mine * 1e3:.1f} | {other * 1e3:.1f} | {other / mine:.3f} | "
                f"{2 * ours.macs() * batch / mine / peak:.0%} |",
                flush=True,
            )
    print(f"\ngeometric mean: {statistics.geometric_mean(ratios):.3f} (lowest {min(ratios):.3f})")


if __name__ == "__main__":
    main()
