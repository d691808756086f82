"""A training step (forward and backward) of each block design on this CPU, and of variants of `rope-swiglu`.

    OMP_NUM_THREADS=1 python benchmarks/block_speed.py [--grid 8] [--rounds 9]

Designs are measured alternately, so that other work on the machine affects all equally. The table has medians of CPU
time.
"""

import argparse
import statistics
import time

import torch

from tessera.conditioning import Condition
from tessera.models.dit import DiTConfig
from tessera.models.network import parameter_count

DESIGNS = {
    "adaln-zero": {"kind": "adaln-zero"},
    "adaln-single": {"kind": "adaln-single"},
    "rope-swiglu": {"kind": "rope-swiglu"},
    "rope-swiglu, gelu": {"kind": "rope-swiglu", "mlp": "gelu"},
    "rope-swiglu, layer norm": {"kind": "rope-swiglu", "norm": "layer"},
    "rope-swiglu, sincos": {"kind": "rope-swiglu", "positions": "sincos"},
    "rope-swiglu, per-block modulation": {"kind": "rope-swiglu", "modulation": "per-block"},
    "rope-swiglu, no qk_norm": {"kind": "rope-swiglu", "qk_norm": False},
    "rope-swiglu, no value_residual": {"kind": "rope-swiglu", "value_residual": False},
    "rope-swiglu, bias": {"kind": "rope-swiglu", "bias": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=int, default=8, help="tokens along a side")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    size = 2 * options.grid
    sizes = {
        "input_size": size,
        "in_channels": 1,
        "out_channels": 1,
        "num_classes": 10,
        "depth": 6,
        "hidden_size": 192,
        "num_heads": 6,
    }
    networks = {name: DiTConfig.model_validate({**sizes, "block": block}).build() for name, block in DESIGNS.items()}
    x, t = torch.randn(options.batch, 1, size, size), torch.rand(options.batch) * 1000
    condition = Condition(torch.arange(options.batch) % 10)
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(options.rounds + 1):  # the first warms up
        for name, network in networks.items():
            network.zero_grad(set_to_none=True)
            start = time.process_time()
            network(x, t, condition).square().mean().backward()
            seconds[name].append(time.process_time() - start)
    base = statistics.median(seconds["adaln-zero"][1:])
    print(f"| {options.grid**2} tokens, batch {options.batch} | ms | ratio to adaln-zero | parameters | MMACs |")
    print("|---|---|---|---|---|")
    for name, network in networks.items():
        median = statistics.median(seconds[name][1:])
        row = f"{1000 * median:.0f} | {median / base:.2f} | {parameter_count(network):,} | {network.macs() / 1e6:.1f}"
        print(f"| {name} | {row} |")


if __name__ == "__main__":
    main()
