"""Memory of each rank in distributed training, against the plan.

    OMP_NUM_THREADS=1 python benchmarks/sharding.py [--width 384] [--depth 12] [--steps 3]

Total: the bytes of this rank's own tensors in the middle of a step, with gradients: weights, gradients, AdamW's two
moments, one EMA. Plan: 4 bytes per parameter for each of weights, gradients and EMA and 8 for the moments, divided by
the ranks that share one copy. Gathered: the largest amount of weights that FSDP gathers from other ranks, measured at
every block in the forward and backward pass. Resident: the peak of the process during the steps, less that of the same
process training a network of one narrow block (Linux; it includes the activations of `--batch` samples over all ranks,
and buffers of the gradient reduction). MB are 10^6 bytes; the rank with the most memory counts. Times are not
meaningful with all processes on two cores, so they are not reported.
"""

import argparse
import multiprocessing
import os
import re
import socket
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tessera import runtime
from tessera.settings import apply_overrides, validate
from tessera.training import parallel
from tessera.training.recipe import Recipe
from tessera.training.run import build_run
from tessera.training.step import train_step

LAYOUTS = [(1, 1), (2, 1), (2, "full"), (4, 1), (4, 2), (4, "full")]  # ranks, and how many share one copy


def recipe(shard: int | str, width: int, depth: int, batch: int) -> Recipe:
    settings = {
        "run_dir": str(Path(tempfile.gettempdir(), "never-written")),
        "data": {"kind": "digits"},
        "network": {"patch_size": 2, "hidden_size": width, "depth": depth, "num_heads": max(1, width // 64)},
        "training": {"global_batch_size": batch, "fsdp": shard, "device": "cpu"},
    }
    return validate(Recipe, apply_overrides(settings, []), "the benchmark's recipe")


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of this rank's tensors, by storage."""
    storages = (parallel.local_tensor(tensor).untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def size(tensors: list[Tensor]) -> int:
    return sum(storages(tensors).values())


def resident() -> int:
    """Peak resident bytes of this process."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match.group(1)) * 1024 if match else 0


def measure(settings: Recipe, steps: int) -> dict[str, int]:
    """Bytes of this rank, by kind."""
    with runtime.distributed_session() as ranks:
        run = build_run(settings, world=ranks)
        network, optimizer = run.network, run.state.optimizer
        parameters = list(network.parameters())
        sizes = {"parameters": sum(parameter.numel() for parameter in parameters), "gathered": 0}
        own = storages(parameters)

        def look(*_: Any) -> None:
            """Gathered parameters are plain tensors in the network."""
            together = [tensor.detach() for tensor in network.parameters() if not isinstance(tensor, DTensor)]
            others = {place: count for place, count in storages(together).items() if place not in own}
            sizes["gathered"] = max(sizes["gathered"], sum(others.values()))

        def count(*_: Any) -> None:
            parameters_of_optimizer = [one for group in optimizer.param_groups for one in group["params"]]
            sizes["gradients"] = size([one.grad for one in parameters_of_optimizer])

        for block in network.blocks:
            block.attn.register_forward_pre_hook(look)
            block.attn.register_full_backward_hook(look)
        optimizer.register_step_pre_hook(count)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        for step in range(steps):
            train_step(
                run.state,
                run.loader.load_batch(step * settings.training.global_batch_size),
                run.objective,
                settings.training.global_batch_size,
            )
            run.ema.update(step + 1)
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return {
            **sizes,
            "weights": sum(own.values()),
            "optimizer": size(moments),
            "average": size(list(run.ema.network.parameters())),
            "resident": resident(),
        }


def work(rank: int, count: int, port: int, settings: Recipe, steps: int) -> dict[str, int]:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in place.items()})
    return measure(settings, steps)


def together(count: int, settings: Recipe, steps: int) -> dict[str, int]:
    """The sizes of the rank with the most memory."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # so that freed memory is returned (glibc)
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(count, context) as pool:  # raises the exceptions of the processes
        sizes = list(pool.map(work, range(count), repeat(count), repeat(port), repeat(settings), repeat(steps)))
    return {name: max(size[name] for size in sizes) for name in sizes[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8, help="samples per step over all ranks")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--max-processes", type=int, default=4, help="leave out layouts with more processes")
    options = parser.parse_args()
    parts = ("weights", "gradients", "optimizer", "average")
    for count, shard in [layout for layout in LAYOUTS if layout[0] <= options.max_processes]:
        sizes = together(count, recipe(shard, options.width, options.depth, options.batch), options.steps)
        small = together(count, recipe(shard, 64, 1, options.batch), options.steps)
        if count == 1:
            print(f"\n{sizes['parameters']:,} parameters, MB per rank\n")
            print(
                f"| ranks | `training.fsdp` | {' | '.join(parts)} | total | plan | total / plan | gathered | resident |"
            )
            print("|---|" + "---|" * 9)
        total = sum(sizes[part] for part in parts)
        shards = count if shard == "full" else int(shard)
        plan = 20 * sizes["parameters"] / shards
        values = [*(sizes[part] for part in parts), total, plan]
        row = " | ".join(f"{value / 1e6:.1f}" for value in values)
        rest = (
            f"{total / plan:.3f} | {sizes['gathered'] / 1e6:.1f} | {(sizes['resident'] - small['resident']) / 1e6:.0f}"
        )
        print(f"| {count} | {shard} | {row} | {rest} |", flush=True)


if __name__ == "__main__":
    main()
