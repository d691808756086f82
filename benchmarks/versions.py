"""Two versions of Tessera, in turns: a training step, and the generation of digits.

    git worktree add ../before v0.6.0
    python benchmarks/versions.py step --before ../before [--batch 8] [--rounds 15]
    python benchmarks/versions.py generate --before ../before [--count 1000] [--rounds 5]

Each version runs in its own process, with its checkout on the path. The parent requests work of them in turns: one
training step of DiT-S/4 on 32 x 32 images (64 tokens), or `--count` generated digits (the network of
`recipes/digits.yaml`, 25 DDIM steps, guidance 1.5, batches of 100). A row gives the medians of CPU time, and the median
and range of the ratios of each round (above 1: the second is faster).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def images(folder: Path) -> Path:
    """256 noise images of 32 x 32 pixels in four classes."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(256):
        path = folder / f"class {number % 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    return folder


def build_step(folder: Path, batch: int) -> Callable[[], None]:
    """A function that takes one training step, in whichever version is on the path."""
    import tessera

    settings = ["network.preset=DiT-S/4", f"data.path={images(folder)}", "data.size=32", "codec=pixels"]
    settings += ["training.device=cpu", "training.precision=float32"]
    recipe = Path(tessera.__file__).parents[1] / "recipes" / "paper.yaml"
    if tessera.__version__ < "0.7":
        from tessera.training.recipe import read  # pyright: ignore[reportAttributeAccessIssue]
        from tessera.training.run import set_up  # pyright: ignore[reportAttributeAccessIssue]
        from tessera.training.step import train_step

        settings += [f"training.batch={batch}", f"training.micro_batch={batch}", f"output={folder / 'run'}"]
        run = set_up(read(recipe, settings))
        state, objective, ema = run.learner, run.task, run.average
    else:
        from tessera.training.recipe import read_recipe
        from tessera.training.run import build_run
        from tessera.training.step import train_step

        settings += [f"training.global_batch_size={batch}", f"training.micro_batch_size={batch}"]
        run = build_run(read_recipe(recipe, [*settings, f"run_dir={folder / 'run'}"]))
        state, objective, ema = run.state, run.objective, run.ema
    batches, steps = run.loader.batches(), 0

    def step() -> None:
        nonlocal steps
        steps += 1
        train_step(state, next(batches), objective, batch)
        ema.update(steps)

    return step


def build_generate(folder: Path, count: int) -> Callable[[], None]:
    """A function that generates `count` digits with an untrained network of the digits' size."""
    import tessera

    recipe = Path(tessera.__file__).parents[1] / "recipes" / "digits.yaml"
    old = tessera.__version__ < "0.7"
    settings = [
        "training.steps=1", "training.checkpoint_every=1", "training.sample_every=1000", "training.tensorboard=false",
        "training.device=cpu", f"{'output' if old else 'run_dir'}={folder / 'run'}",
    ]  # fmt: skip
    from tessera.training import loop

    if old:
        from tessera.training.recipe import read as read_recipe  # pyright: ignore[reportAttributeAccessIssue]
    else:
        from tessera.training.recipe import read_recipe
    loop.train(read_recipe(recipe, settings))
    model = tessera.load(folder / "run", "cpu")
    classes = [number % 10 for number in range(count)]
    size = {"batch" if old else "batch_size": 100}

    def generate() -> None:
        tessera.generate(model, classes, list(range(count)), **size)

    return generate


def serve(what: str, amount: int) -> None:
    """The child: for each line of standard input, work once and print the CPU and wall-clock seconds."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = (build_step if what == "step" else build_generate)(Path(folder), amount)
        work()
        for _ in sys.stdin:
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            print(json.dumps([time.process_time() - cpu, time.perf_counter() - wall]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "generate"))
    parser.add_argument("--before", type=Path, required=True, help="checkout of the earlier version")
    parser.add_argument("--after", type=Path, default=ROOT, help="checkout of the later version")
    parser.add_argument("--batch", type=int, default=8, help="of a training step")
    parser.add_argument("--count", type=int, default=1000, help="of generated digits")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    amount = options.batch if options.what == "step" else options.count
    if options.serve:
        serve(options.what, amount)
        return
    words = [sys.executable, str(Path(__file__).resolve()), options.what, "--before", str(options.before), "--serve"]
    words += ["--batch", str(options.batch), "--count", str(options.count)]
    children = {}
    for name in ("before", "after"):
        checkout = getattr(options, name).resolve()
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        children[name] = subprocess.Popen(
            words, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    seconds: dict[str, list[list[float]]] = {name: [] for name in children}
    for number in range(options.rounds):
        for name in list(children) if number % 2 else list(children)[::-1]:
            child = children[name]
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                child.stdin.write("\n")
                child.stdin.flush()
            except BrokenPipeError:
                sys.exit(f"the process of '{name}' has ended")
            line = child.stdout.readline()
            while line and not line.startswith("["):  # what a training run prints
                line = child.stdout.readline()
            if not line:
                sys.exit(f"the process of '{name}' has ended")
            seconds[name].append(json.loads(line))
    for child in children.values():
        child.communicate("")
    ratios = [before[0] / after[0] for before, after in zip(seconds["before"], seconds["after"])]
    cpu = {name: statistics.median(each[0] for each in rows) for name, rows in seconds.items()}
    title = f"training step, DiT-S/4, batch {amount}" if options.what == "step" else f"{amount} generated digits"
    print("| work | before, CPU ms | after, CPU ms | before / after | lowest, highest | rounds |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {title} | {1000 * cpu['before']:.1f} | {1000 * cpu['after']:.1f} | {statistics.median(ratios):.3f} | "
        f"{min(ratios):.3f}, {max(ratios):.3f} | {options.rounds} |"
    )


if __name__ == "__main__":
    main()
