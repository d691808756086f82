"""Memory of LoRA fine-tuning, measured and planned: DiT-XL/2 with random weights on latents of 256 px images.

    python benchmarks/adapter_memory.py --out runs/adapter-memory        # finished rows are not measured again
    python benchmarks/adapter_memory.py --out ... --only "+ base in nf4" --batch 2
    python benchmarks/adapter_memory.py --out ... --device cuda --steps 20

Each row is a process of its own that trains twice with the trainer's loop, two steps each
(--steps): first a network of one block
32 wide, so that everything is imported and every library has its buffers, then the network of the row. "Measured" is
the largest resident size (VmHWM of Linux) of the second run since its base is loaded, minus the resident size before
this run. "Loading" is the largest size until then, minus the same: the base is mapped from its file in float32, and the
system can drop these pages. "Planned" is the peak and what loading needs, as `tessera plan` prints them.

On a GPU all of these are the bytes that PyTorch has allocated there, and the last column is the rate of the last step.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

MODEL, SMALL = "model", "small"
FULL = "full fine-tuning"
COLUMNS = ("planned", "measured", "planned loading", "loading", "checkpoint")
ROWS: dict[str, dict[str, Any]] = {  # each row has the settings of those above it, too
    "LoRA of rank 16": {},
    "+ checkpointed blocks": {"training.activation_checkpointing": "blocks"},
    "+ base in bfloat16": {"adapter.base_weights": "bfloat16"},
    "+ base in int8": {"adapter.base_weights": "int8"},
    "+ base in nf4": {"adapter.base_weights": "nf4"},
    "+ micro-batches of one": {"training.micro_batch_size": 1},
}
ALONE: dict[str, dict[str, Any]] = {  # without those above
    FULL: {"adapter": None},
    "full, checkpointed blocks": {"adapter": None, "training.activation_checkpointing": "blocks"},
    "LoRA, base in nf4 only": {"adapter.base_weights": "nf4"},
}


def settings(name: str, options: argparse.Namespace, model: str = MODEL) -> dict[str, Any]:
    """The recipe of a row."""
    out: Path = options.out
    recipe: dict[str, Any] = {
        "run_dir": str(out / f"run-{model}"),
        "data": {"kind": "folder", "path": str(out / "images"), "size": 256, "cache": str(out / "cache")},
        "adapter": {"kind": "lora", "rank": 16},
        "training": {
            "init_from": str(out / model), "steps": options.steps, "global_batch_size": options.batch,
            "device": options.device,
            "sample_seeds": 1, "sample_every": 1000, "checkpoint_every": 1000, "log_every": 1, "tensorboard": False,
            "optimizer": {"grad_clip_norm": 1.0},
        },
    }  # fmt: skip
    names = list(ROWS)[: list(ROWS).index(name) + 1] if name in ROWS else []
    for changes in [ROWS[each] for each in names] or [ALONE[name]]:
        for key, value in changes.items():
            section, _, last = key.rpartition(".")
            (recipe[section] if section else recipe)[last] = value
    return recipe


def prepare(options: argparse.Namespace) -> None:
    """A model with random weights, a codec, images, and their latents."""
    import numpy as np
    import torch
    import yaml
    from PIL import Image

    from tessera import bundle
    from tessera.codecs.tiny import Pair
    from tessera.model import BundleConfig, Model
    from tessera.models import DiTConfig
    from tessera.models.presets import PRESETS

    out: Path = options.out
    if (out / MODEL).exists():
        return
    (out / "images").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(random.integers(0, 256, (256, 256, 3), np.uint8)).save(out / f"images/{number}.png")
    torch.manual_seed(0)
    (out / "codec").mkdir(exist_ok=True)
    Pair(4, pool=False).save(out / "codec")
    codec = {"kind": "autoencoder-tiny", "source": str((out / "codec").resolve())}
    data = {"kind": "folder", "path": str(out / "images"), "size": 256, "cache": str(out / "cache")}
    (out / "cache.yaml").write_text(yaml.safe_dump({"data": data, "codec": codec}))
    subprocess.run(
        [sys.executable, "-m", "tessera", "data", "cache", str(out / "cache.yaml")], check=True, capture_output=True
    )
    for name, preset in (
        (SMALL, PRESETS[options.model] | {"depth": 1, "hidden_size": 32, "num_heads": 2}),
        (MODEL, PRESETS[options.model]),
    ):
        network = DiTConfig(**{**preset, "num_classes": 1}).build().eval()
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.02)
        config = BundleConfig.model_validate(
            {
                "network": network.config.model_dump(), "diffusion": {"kind": "gaussian"}, "class_names": ("image",),
                "codec": codec, "sampling": {"num_steps": 1},
            }
        )  # fmt: skip
        bundle.save(Model(config, network), out / name)


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS, the resident size; VmHWM, its maximum."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def allocated(device: str) -> int:
    """Bytes in use: resident, or of a GPU."""
    import torch

    return status("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()


def peak(device: str) -> int:
    """The largest number of bytes in use since the last call, which begins again."""
    import torch

    if device == "cpu":
        size = status("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")
        return size
    size = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return size


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Train a row in this process."""
    from tessera.monitoring.logger import MetricLogger, read_log
    from tessera.training import loop
    from tessera.training.checkpoint import TrainerState
    from tessera.training.recipe import read_recipe
    from tessera.training.run import build_run, prepare_folder, set_memory_policy

    set_memory_policy(read_recipe(settings(name, options)))  # as `tessera train` does
    before, peaks, rate = 0, (0, 0), 0.0
    for model in (SMALL, MODEL):  # the first run loads what the second one needs
        before = allocated(options.device)
        recipe = read_recipe(settings(name, options, model))
        peak(options.device)
        run = build_run(recipe)
        prepare_folder(run)
        loading = peak(options.device)
        logger = MetricLogger(run.run_dir, 0, recipe.training.steps, False)  # a silent one writes no log
        loop.Trainer(run, TrainerState(0, 0), logger).train(None)
        logger.close()
        peaks = loading, peak(options.device)
        rate = next((each["images_per_second"] for each in reversed(read_log(run.run_dir)) if "loss" in each), 0.0)
        del run
    return {"before": before, "loading": peaks[0] - before, "measured": peaks[1] - before, "images/s": rate}


def planned(name: str, options: argparse.Namespace) -> dict[str, float]:
    from tessera.planning.hardware import find
    from tessera.training.plan_recipe import plan_for_recipe
    from tessera.training.recipe import read_recipe

    machine = find("rtx4090").model_copy(update={"device": options.device})  # only memory is read; nothing is measured
    plan = plan_for_recipe(read_recipe(settings(name, options)), machine)
    return {"planned": plan.memory_bytes, "planned loading": plan.memory.loading, "checkpoint": plan.checkpoint_bytes}


def row(name: str, options: argparse.Namespace) -> str:
    words = [*name.replace(",", "").split(), str(options.batch), *([] if options.device == "cpu" else [options.device])]
    path: Path = options.out / f"{'-'.join(words)}.json"
    values = planned(name, options)
    if name not in options.plan_only.split("; "):
        if not path.exists():
            for folder in options.out.glob("run-*"):
                shutil.rmtree(folder)
            words = ["--row", name, "--out", str(options.out), "--batch", str(options.batch)]
            words += ["--steps", str(options.steps), "--device", options.device]
            done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr[-2000:]}")
            path.write_text(done.stdout.splitlines()[-1])
        values |= json.loads(path.read_text())
    cells = [f"{values[key] / 2**30:.2f}" if values.get(key) else "" for key in COLUMNS]
    ratio = f"{values['planned'] / values['measured']:.3f}" if "measured" in values else ""
    return f"| {name} | {cells[0]} | {cells[1]} | {ratio} | {cells[2]} | {cells[3]} | {cells[4]} |" + (
        "" if options.device == "cpu" else f" {values.get('images/s', 0):.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model, the run and the finished rows")
    parser.add_argument("--model", default="DiT-XL/2", help="preset")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", help="rows, separated by ;")
    parser.add_argument("--plan-only", default=FULL, help="rows that are not measured, separated by ;")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--row", help="measure this row in this process")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(options.row, options)))
        return
    prepare(options)
    names = [name.strip() for name in options.only.split(";")] if options.only else [*ROWS, *ALONE]
    print("GiB\n")
    more = "" if options.device == "cpu" else " images/s |"
    print("| run | planned | measured | ratio | loading, planned | measured | a checkpoint |" + more)
    print("|---|---|---|---|---|---|---|" + "---|" * bool(more))
    for name in names:
        print(row(name, options), flush=True)


if __name__ == "__main__":
    main()
