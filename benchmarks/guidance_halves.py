"""Guidance evaluates a network with and without condition: both halves in one batch, or separately?

    python benchmarks/guidance_halves.py [--batches 1,4,16] [--seconds 3]

One process, interleaved, medians; a ratio above 1 means that one batch is faster. The networks are adaLN-Zero DiTs with
random weights and 6 blocks: only width, tokens and batch matter.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from tessera.conditioning import Condition
from tessera.models.dit import DiT, DiTConfig


def halves(network: DiT, batch: int) -> tuple[Callable, Callable]:
    """The two ways to compute the same numbers, as functions without arguments."""
    config = network.config
    x, t = torch.randn(batch, config.in_channels, *config.input_size), torch.full((batch,), 500.0)
    condition = Condition(label=torch.arange(batch) % config.num_classes)
    null = condition.null()
    both = Condition.cat((condition, null))

    def together() -> list[torch.Tensor]:
        return list(network(torch.cat((x, x)), torch.cat((t, t)), both).chunk(2))

    def apart() -> list[torch.Tensor]:
        return [network(x, t, condition), network(x, t, null)]

    return together, apart


def medians(works: tuple[Callable, ...], seconds: float) -> list[float]:
    """Milliseconds of each, measured alternately for a given time."""
    taken: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[0]) < 5:
        for work, times in zip(works, taken):
            begun = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - begun))
    return [statistics.median(times) for times in taken]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--widths", default="192,384")
    parser.add_argument("--sides", default="4,8,16", help="of the token grid")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32\n")
    print("| width | tokens | batch | one batch ms | separate ms | ratio |\n|---|---|---|---|---|---|")
    for width in map(int, options.widths.split(",")):
        for side in map(int, options.sides.split(",")):
            torch.manual_seed(0)
            network = DiT(
                DiTConfig(
                    input_size=(2 * side, 2 * side),
                    depth=6,
                    hidden_size=width,
                    num_heads=max(1, width // 64),
                    num_classes=10,
                )
            )
            for batch in map(int, options.batches.split(",")):
                works = halves(network.eval(), batch)
                for one, other in zip(works[0](), works[1]()):
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
                together, apart = medians(works, options.seconds)
                print(f"| {width} | {side**2} | {batch} | {together:.1f} | {apart:.1f} | {apart / together:.3f} |")


if __name__ == "__main__":
    main()
