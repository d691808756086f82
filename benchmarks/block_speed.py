"""A training step (forward and backward) of each block design on this CPU, and of variants of `rope-swiglu`.

    OMP_NUM_THREADS=1 python benchmarks/block_speed.py [--grid 8] [--rounds 9]
    OMP_NUM_THREADS=1 python benchmarks/block_speed.py --text 32 --grid 16 --width 384 --batch 8   # text designs

Designs are measured alternately, so that other work on the machine affects all equally. The table has medians of CPU
time.
"""

import argparse
import statistics
import time
from dataclasses import replace

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


TEXT_DESIGNS = {
    "no text": {"kind": "rope-swiglu"},
    **{f"text={text}": {"kind": "rope-swiglu", "text": text} for text in ("keys", "cross", "sequence")},
    "text=keys, no layers over the text": {"kind": "rope-swiglu", "text": "keys", "text_layers": 0},
}
TEXT_CHANNELS = 384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=int, default=8, help="tokens along a side")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--text", type=int, help="text tokens: compare text designs instead, with no text as the base")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    size = 2 * options.grid
    sizes = {
        "input_size": size,
        "in_channels": 1,
        "out_channels": 1,
        "num_classes": 10,
        "depth": options.depth,
        "hidden_size": options.width,
        "num_heads": options.width // 32,
    }
    designs = TEXT_DESIGNS if options.text else DESIGNS
    text = {"text_channels": TEXT_CHANNELS, "text_tokens": options.text} if options.text else {}
    networks = {
        name: DiTConfig.model_validate({**sizes, **text, "block": block}).build() for name, block in designs.items()
    }
    x, t = torch.randn(options.batch, 1, size, size), torch.rand(options.batch) * 1000
    labels = Condition(torch.arange(options.batch) % 10)
    texts = labels
    if options.text:
        mask = torch.arange(options.text) < torch.randint(options.text // 2, options.text + 1, (options.batch, 1))
        texts = replace(labels, text=torch.randn(options.batch, options.text, TEXT_CHANNELS), text_mask=mask)
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(options.rounds + 1):  # the first warms up
        for name, network in networks.items():
            network.zero_grad(set_to_none=True)
            start = time.process_time()
            network(x, t, texts if network.config.uses_text else labels).square().mean().backward()
            seconds[name].append(time.process_time() - start)
    first = next(iter(designs))
    base = statistics.median(seconds[first][1:])
    print(f"| {options.grid**2} tokens, batch {options.batch} | ms | ratio to {first} | parameters | MMACs |")
    print("|---|---|---|---|---|")
    for name, network in networks.items():
        median = statistics.median(seconds[name][1:])
        row = f"{1000 * median:.0f} | {median / base:.2f} | {parameter_count(network):,} | {network.macs() / 1e6:.1f}"
        print(f"| {name} | {row} |")


if __name__ == "__main__":
    main()
