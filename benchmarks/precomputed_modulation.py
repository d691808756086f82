"""Modulation looked up in a table computed once per sampling run, against computed from time and class in every step.

    python benchmarks/precomputed_modulation.py [--models digits,DiT-S/4] [--batches 1,2,4,32] [--seconds 9]

Single calls of a network at the times of 20 sampling steps with two classes and the null label, in one process,
alternately (in alternating order), medians; a ratio above 1 means that the table is faster. Computing the table, once
per sampling run, is listed separately. With guidance one image is a batch of two. Weights are random: only the shapes
matter.
"""

import argparse
import statistics
import time

import torch

from tessera.acceleration.modulation_cache import PrecomputedModulation
from tessera.conditioning import Condition
from tessera.models.dit import DiT, DiTConfig

DIGITS = {"input_size": 8, "in_channels": 1, "patch_size": 2, "depth": 6, "hidden_size": 192, "num_heads": 6}
STEPS = 20


def network_of(name: str) -> DiT:
    torch.manual_seed(0)
    shape = DIGITS if name == "digits" else {"preset": name, "input_size": 32, "in_channels": 4}
    return DiTConfig.model_validate({**shape, "out_channels": shape["in_channels"], "num_classes": 10}).build().eval()


@torch.no_grad()
def compared(network: DiT, rows: int, seconds: float) -> tuple[float, list[float], int]:
    """Milliseconds of the table, of a call with it and of one without, and how many calls were timed."""
    x = torch.randn(rows, network.config.in_channels, *network.config.input_size)
    times, label = torch.linspace(999, 0, STEPS), torch.arange(rows) % 3 - 1
    begun = time.perf_counter()
    table = PrecomputedModulation(network, times, Condition(label), network.grid(x))
    made = 1000 * (time.perf_counter() - begun)
    taken: list[list[float]] = [[], []]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[0]) < 8:
        done = len(taken[0])
        t = times[done % STEPS].expand(rows)
        for which in (0, 1) if done % 2 else (1, 0):
            begun = time.perf_counter()
            (table, network)[which](x, t, Condition(label))
            taken[which].append(1000 * (time.perf_counter() - begun))
    return made, [statistics.median(each) for each in taken], len(taken[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default="digits,DiT-S/4")
    parser.add_argument("--batches", default="1,2,4,32")
    parser.add_argument("--seconds", type=float, default=9)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32\n")
    print("| model | batch | table MiB | table ms | with ms | without ms | ratio | calls |\n" + "|---" * 8 + "|")
    for name in options.models.split(","):
        network = network_of(name)
        for rows in map(int, options.batches.split(",")):
            size = PrecomputedModulation.table_bytes(network, STEPS, Condition(list(range(min(rows, 3))))) / 2**20
            made, (looked_up, plain), calls = compared(network, rows, options.seconds)
            facts = f"{size:.1f} | {made:.1f} | {looked_up:.2f} | {plain:.2f} | {plain / looked_up:.3f} | {calls}"
            print(f"| {name} | {rows} | {facts} |", flush=True)


if __name__ == "__main__":
    main()
