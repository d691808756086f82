"""Plans of `tessera plan` against measurements, in one process: seconds per step, bytes held for the backward pass.

    python benchmarks/plan.py [--threads 1,2] [--rounds 9] [--only "NAME; ..."]
    python benchmarks/plan.py --threads 1 --clock process     # beside other work: processor time, for plan and run
    python benchmarks/plan.py --device cuda          # needs a GPU; for gpu.md

Every configuration is planned, then training steps are measured (loading data, `train_step`, EMA), then it is planned
again. The ratio is that of the mean of both plans to the median step; a change of the machine's load in between shows
as a difference of the two plans. Memory: bytes of unique storages, without parameters, that `saved_tensors_hooks`
counts in the real forward pass, against those of the trace. With activation checkpointing the hooks do not count
everything (outputs held for selective recomputation), so the bytes of all live tensors are counted instead. On a GPU
memory is torch.cuda.max_memory_allocated, which includes caches of libraries.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tessera import runtime
from tessera.planning.op_profiler import OpProfiler
from tessera.planning.plan import Plan
from tessera.planning.trace import Recorder
from tessera.settings import validate
from tessera.training import plan_recipe
from tessera.training.recipe import Recipe
from tessera.training.run import TrainingRun, build_run
from tessera.training.step import train_step

DIGITS: dict[str, Any] = {
    "data": {"kind": "digits"},
    "network": {"patch_size": 2, "hidden_size": 192, "depth": 6, "num_heads": 6},
    "diffusion": {"schedule": "cosine", "prediction": "v", "variance": "posterior"},
    "training": {
        "global_batch_size": 64,
        "optimizer": {"grad_clip_norm": 1.0},
        "ema": {"decay": 0.99},
        "tensorboard": False,
    },
}
# 32 x 32 color pixels: a step as large as for CIFAR-10, on synthetic images without files.
IMAGES: dict[str, Any] = DIGITS | {
    "data": {"kind": "shapes"},
    "network": {"patch_size": 4, "hidden_size": 256, "depth": 6, "num_heads": 4},
    "training": DIGITS["training"] | {"global_batch_size": 32},
}


def changed(base: dict[str, Any], network: dict[str, Any] | None = None, **training: Any) -> dict[str, Any]:
    defaults = {} if network is not None and "kind" in network else base["network"]
    return base | {"network": defaults | (network or {}), "training": base["training"] | training}


CPU = {
    "digits, DiT 192 x 6": DIGITS,
    "digits, batch 8": changed(DIGITS, global_batch_size=8),
    "digits, batch 256, checkpointed blocks": changed(DIGITS, global_batch_size=256, activation_checkpointing="blocks"),
    "digits, in-context, micro-batch 16": changed(DIGITS, {"block": "in-context"}, micro_batch_size=16),
    "32 px, DiT 256 x 6": IMAGES,
    "32 px, rope-swiglu, Muon": changed(IMAGES, {"block": "rope-swiglu"}, optimizer={"kind": "muon"}),
    "32 px, U-Net": changed(IMAGES, {"kind": "unet", "model_channels": 64}, global_batch_size=16),
    "32 px, DiT 384 x 4, patch 2": changed(
        IMAGES, {"patch_size": 2, "hidden_size": 384, "depth": 4, "num_heads": 6}, global_batch_size=4
    ),
}
LARGE: dict[str, Any] = {
    "data": {"kind": "shapes"},
    "network": {"preset": "DiT-B/4"},
    "training": {"global_batch_size": 128, "tensorboard": False, "precision": "bfloat16"},
}
CUDA = {
    "B/4, 32 px, batch 128": LARGE,
    "B/4, float32": changed(LARGE, precision="float32"),
    "B/4, checkpointed blocks": changed(LARGE, activation_checkpointing="blocks", global_batch_size=256),
    "L/4": changed(LARGE, {"preset": "DiT-L/4"}),
    "XL/4": changed(LARGE, {"preset": "DiT-XL/4"}, global_batch_size=64),
    "B/4, modern": changed(LARGE, {"block": "rope-swiglu"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", default="1,2", help="CPU threads, one table each")
    parser.add_argument("--rounds", type=int, default=9, help="steps measured")
    parser.add_argument("--only", help="configurations, by the beginnings of their names, separated by ;")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall")
    options = parser.parse_args()
    if options.clock == "process":
        time.perf_counter = time.process_time
    runtime.keep_freed_memory()
    chosen = CPU if options.device == "cpu" else CUDA
    prefixes = [name.strip() for name in options.only.split(";")] if options.only else [""]
    for threads in [int(number) for number in options.threads.split(",")] if options.device == "cpu" else [0]:
        if threads:
            torch.set_num_threads(threads)
        device = torch.device(options.device)
        what = f"{threads} thread{'s' * (threads > 1)}, " if threads else ""
        print(f"\n{runtime.device_name(device)}, {what}torch {torch.__version__}, {options.clock} clock\n")
        print(
            "| configuration | ms planned | measured | ratio | ratios of both plans | MiB planned | measured | ratio |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for name, settings in chosen.items():
            if any(name.startswith(start) for start in prefixes):
                print(row(name, settings, device, options.rounds), flush=True)


def row(name: str, settings: dict[str, Any], device: torch.device, rounds: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        data = settings | {"run_dir": f"{folder}/run"}
        data["training"] = data["training"] | {"device": device.type, "steps": 1000}
        recipe = validate(Recipe, data, name)
        before = planning(recipe, device, Path(folder) / "before")
        run = build_run(recipe)
        seconds, memory = measured(run, device, rounds)
        del run
        after = planning(recipe, device, Path(folder) / "after")
    plans = before.step_seconds, after.step_seconds
    mean = sum(plans) / 2
    planned_bytes = before.memory.peak if device.type == "cuda" else before.memory.activations
    return (
        f"| {name} | {1000 * mean:.4g} | {1000 * seconds:.4g} | {mean / seconds:.2f} | "
        f"{plans[0] / seconds:.2f}, {plans[1] / seconds:.2f} | {planned_bytes / 2**20:.4g} | {memory / 2**20:.4g} | "
        f"{planned_bytes / memory:.3f} |"
    )


def planning(recipe: Recipe, device: torch.device, folder: Path) -> Plan:
    """A plan with new measurements."""
    return plan_recipe.plan_for_recipe(recipe, device.type, profiler=OpProfiler(device, folder))


def measured(run: TrainingRun, device: torch.device, rounds: int) -> tuple[float, int]:
    """Median seconds of a step, and bytes: held for the backward pass, or on a GPU the peak allocation."""
    config, batches = run.recipe.training, run.loader.batches()
    taken = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        for step in range(3 + rounds):
            batch = next(batches)  # read ahead by other threads
            began = time.perf_counter()
            train_step(run.state, batch, run.objective, config.global_batch_size, run.accumulation_steps)
            run.ema.update(step + 1)
            runtime.synchronize(device)
            taken.append(time.perf_counter() - began)
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else saved_bytes(run, next(batches))
    finally:
        batches.close()
    return statistics.median(taken[3:]), memory


def saved_bytes(run: TrainingRun, batch: Any) -> int:
    """Bytes held for the backward pass at the end of the first forward pass of a step."""
    recorder, results = Recorder(), []
    saved: dict[int, torch.Tensor] = {}
    forward = run.state.forward
    again = run.recipe.training.activation_checkpointing != "none"

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def watched(*inputs: Any) -> torch.Tensor:
        if results:
            return forward(*inputs)
        if again:
            raw = forward(*inputs)
            results.append(recorder.lap().live_bytes)
            return raw
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            raw = forward(*inputs)
        own = {parameter.untyped_storage()._cdata for parameter in run.network.parameters()}
        results.append(sum(one.untyped_storage().nbytes() for key, one in saved.items() if key not in own))
        saved.clear()
        return raw

    object.__setattr__(run.state, "forward", watched)
    if again:
        with recorder:
            train_step(run.state, batch, run.objective, run.recipe.training.global_batch_size, run.accumulation_steps)
    else:
        train_step(run.state, batch, run.objective, run.recipe.training.global_batch_size, run.accumulation_steps)
    return results[0]


if __name__ == "__main__":
    main()
