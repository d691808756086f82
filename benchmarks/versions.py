"""Two versions of Tessera do the same work: is the later one slower?

    git worktree add ../before COMMIT
    python benchmarks/versions.py step --before ../before --batch 8        # a training step of DiT-S/4
    python benchmarks/versions.py forward --before ../before               # a forward pass of DiT-S/4 of one image
    python benchmarks/versions.py generate --before ../before --count 1000 # digits, 25 guided DDIM steps

Each version runs in a process of its own, from its own checkout, with one thread. The two take turns: in every round
each does the work once, in alternating order. The table gives medians and the ratio before / after of each round: above
1 means that the later version is faster. Versions before 0.7 have other names.
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

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
FORWARDS = 10  # passes of a round


def images(folder: Path) -> Path:
    """Four classes of small PNGs."""
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(256):
        path = folder / f"class {number % 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    return folder


def recipe_path(name: str) -> Path:
    """A recipe of the version on the path."""
    import tessera

    return Path(tessera.__file__).parents[1] / "recipes" / name


def build_step(folder: Path, batch: int) -> Callable[[], None]:
    """A function that takes one training step."""
    from tessera.training.recipe import read_recipe
    from tessera.training.run import build_run
    from tessera.training.step import train_step

    settings = ["network.preset=DiT-S/4", f"data.path={images(folder)}", "data.size=32", "codec=pixels"]
    settings += ["training.device=cpu", "training.precision=float32", f"run_dir={folder / 'run'}"]
    settings += [f"training.global_batch_size={batch}", f"training.micro_batch_size={batch}"]
    run = build_run(read_recipe(recipe_path("paper.yaml"), settings))
    batches, steps = run.loader.batches(), 0

    def step() -> None:
        nonlocal steps
        steps += 1
        train_step(run.state, next(batches), run.objective, batch)
        run.ema.update(steps)

    return step


def build_forward(folder: Path, batch: int) -> Callable[[], None]:
    """A function that evaluates DiT-S/4 a few times without gradients."""
    import torch

    from tessera import Condition
    from tessera.models import DiTConfig

    network = DiTConfig.model_validate({"preset": "DiT-S/4"}).build().eval()
    x, t = torch.randn(batch, 4, 32, 32), torch.full((batch,), 500.0)
    condition = Condition(label=torch.arange(batch))

    def forward() -> None:
        with torch.no_grad():
            for _ in range(FORWARDS):
                network(x, t, condition)

    return forward


def build_generate(folder: Path, count: int) -> Callable[[], None]:
    """A function that generates `count` digits with an untrained network of the digits' size."""
    import tessera
    from tessera.training import loop
    from tessera.training.recipe import read_recipe

    settings = [
        "training.steps=1", "training.checkpoint_every=1", "training.sample_every=1000", "training.tensorboard=false",
        "training.device=cpu", f"run_dir={folder / 'run'}",
    ]  # fmt: skip
    loop.train(read_recipe(recipe_path("digits.yaml"), settings))
    model = tessera.load(folder / "run", "cpu")
    classes = [number % 10 for number in range(count)]

    def generate() -> None:
        tessera.generate(model, classes, list(range(count)), batch_size=100)

    return generate


WORKS = {"step": build_step, "forward": build_forward, "generate": build_generate}


def serve(what: str, amount: int) -> None:
    """The child: for each line of standard input, work once and print the CPU and wall-clock seconds."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = WORKS[what](Path(folder), amount)
        work()
        for _ in sys.stdin:
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            print(json.dumps([time.process_time() - cpu, time.perf_counter() - wall]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WORKS)
    parser.add_argument("--before", type=Path, required=True, help="checkout of the earlier version")
    parser.add_argument("--after", type=Path, default=ROOT, help="checkout of the later version")
    parser.add_argument("--batch", type=int, help="of a training step (8) or of a forward pass (1)")
    parser.add_argument("--count", type=int, default=1000, help="of generated digits")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    batch = options.batch or (8 if options.what == "step" else 1)
    if options.serve:
        serve(options.what, options.count if options.what == "generate" else batch)
        return
    words = [sys.executable, str(Path(__file__).resolve()), options.what, "--before", str(options.before), "--serve"]
    words += ["--batch", str(batch), "--count", str(options.count)]
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
    titles = {
        "step": f"training step, DiT-S/4, batch {batch}",
        "forward": f"{FORWARDS} forward passes, DiT-S/4, batch {batch}",
        "generate": f"{options.count} generated digits",
    }
    print("| work | before, CPU ms | after, CPU ms | before / after | lowest, highest | rounds |")
    print("|---|---|---|---|---|---|")
    before, after, ratio = 1000 * cpu["before"], 1000 * cpu["after"], statistics.median(ratios)
    interval = f"{min(ratios):.3f}, {max(ratios):.3f}"
    print(f"| {titles[options.what]} | {before:.1f} | {after:.1f} | {ratio:.3f} | {interval} | {options.rounds} |")


if __name__ == "__main__":
    main()
