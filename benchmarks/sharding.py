"""What each of several processes holds in memory while they train one network together, against the plan.

    OMP_NUM_THREADS=1 python benchmarks/sharding.py [--width 384] [--depth 12] [--steps 3]

Held: the bytes of this process's own tensors in the middle of a step, when gradients are there: weights, gradients,
AdamW's two moments, one average. Plan: 4 bytes a parameter for each of weights, gradients and average and 8 for the
moments, divided by the processes that hold one copy between them. Gathered: what FSDP puts together of the weights of
others, at the most, seen at every block on the way forward and back; a copy that is not divided has nothing to gather.
Resident: the process at its largest during the steps, less the same process training a network of one narrow block
(Linux; activations are in it, those of `--batch` samples between all processes, and what the averaging of gradients
holds meanwhile). MB are 10^6 bytes; the process that holds most counts. Times mean nothing where processes share two
cores, so none are told.
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

LAYOUTS = [(1, 1), (2, 1), (2, "full"), (4, 1), (4, 2), (4, "full")]  # processes, and how many hold one copy


def recipe(shard: int | str, width: int, depth: int, batch: int) -> Recipe:
    told = {
        "run_dir": str(Path(tempfile.gettempdir(), "never-written")),
        "data": {"kind": "digits"},
        "network": {"patch_size": 2, "hidden_size": width, "depth": depth, "num_heads": max(1, width // 64)},
        "training": {"global_batch_size": batch, "fsdp": shard, "device": "cpu"},
    }
    return validate(Recipe, apply_overrides(told, []), "the benchmark's recipe")


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of what this process has of tensors, by where they lie."""
    found = (parallel.local_tensor(tensor).untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def size(tensors: list[Tensor]) -> int:
    return sum(storages(tensors).values())


def resident() -> int:
    """Bytes of this process that were in memory at the most."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else 0


def measure(told: Recipe, steps: int) -> dict[str, int]:
    """Bytes that this process holds, by what they are."""
    with runtime.distributed_session() as ranks:
        run = build_run(told, world=ranks)
        network, optimizer = run.network, run.state.optimizer
        parameters = list(network.parameters())
        seen = {"parameters": sum(parameter.numel() for parameter in parameters), "gathered": 0}
        own = storages(parameters)

        def look(*_: Any) -> None:
            """Parameters that are put together stand in the network as plain tensors."""
            together = [tensor.detach() for tensor in network.parameters() if not isinstance(tensor, DTensor)]
            others = {place: count for place, count in storages(together).items() if place not in own}
            seen["gathered"] = max(seen["gathered"], sum(others.values()))

        def count(*_: Any) -> None:
            held = [one for group in optimizer.param_groups for one in group["params"]]
            seen["gradients"] = size([one.grad for one in held])

        for block in network.blocks:
            block.attn.register_forward_pre_hook(look)
            block.attn.register_full_backward_hook(look)
        optimizer.register_step_pre_hook(count)
        Path("/proc/self/clear_refs").write_text("5")  # the highest begins anew
        for step in range(steps):
            train_step(
                run.state,
                run.loader.load_batch(step * told.training.global_batch_size),
                run.objective,
                told.training.global_batch_size,
            )
            run.ema.update(step + 1)
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return {
            **seen,
            "weights": sum(own.values()),
            "optimizer": size(moments),
            "average": size(list(run.ema.network.parameters())),
            "resident": resident(),
        }


def work(rank: int, count: int, port: int, told: Recipe, steps: int) -> dict[str, int]:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in place.items()})
    return measure(told, steps)


def together(count: int, told: Recipe, steps: int) -> dict[str, int]:
    """What the process that holds most holds."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # so that what is freed is given back (glibc)
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(count, context) as pool:  # raises what a process raises
        sizes = list(pool.map(work, range(count), repeat(count), repeat(port), repeat(told), repeat(steps)))
    return {name: max(size[name] for size in sizes) for name in sizes[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8, help="samples a step over all processes")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--max-processes", type=int, default=4, help="leave out layouts of more processes")
    options = parser.parse_args()
    parts = ("weights", "gradients", "optimizer", "average")
    for count, shard in [layout for layout in LAYOUTS if layout[0] <= options.max_processes]:
        found = together(count, recipe(shard, options.width, options.depth, options.batch), options.steps)
        small = together(count, recipe(shard, 64, 1, options.batch), options.steps)
        if count == 1:
            print(f"\n{found['parameters']:,} parameters, MB a process\n")
            print(f"| processes | shard | {' | '.join(parts)} | held | plan | held / plan | gathered | resident |")
            print("|---|" + "---|" * 9)
        held = sum(found[part] for part in parts)
        shards = count if shard == "full" else int(shard)
        plan = 20 * found["parameters"] / shards
        values = [*(found[part] for part in parts), held, plan]
        row = " | ".join(f"{value / 1e6:.1f}" for value in values)
        rest = (
            f"{held / plan:.3f} | {found['gathered'] / 1e6:.1f} | {(found['resident'] - small['resident']) / 1e6:.0f}"
        )
        print(f"| {count} | {shard} | {row} | {rest} |", flush=True)


if __name__ == "__main__":
    main()
