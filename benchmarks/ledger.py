"""What is each part of the modern recipe worth? One network size, equal training FLOPs, several seeds.

    python benchmarks/ledger.py run --data digits --out runs/ledger [--shard 0/2] [--seeds 0,1,2] [MEMBER ...]
    python benchmarks/ledger.py report --data digits --out runs/ledger > table.md      # and runs/ledger/digits.png

A member is a list of overrides of one recipe. Each run is a `tessera train` that scores itself on a fixed schedule:
kill it and run the same command again to go on. Members whose network costs other multiply-adds take fewer or more
steps, so that all spend the same FLOPs. `--shard i/n` takes every n-th run: two processes, or an array of jobs.
"""

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RECIPES = Path(__file__).parent.parent / "recipes"
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t for the mean of so many seeds


@dataclass(frozen=True)
class Setting:
    """The data, the network's size and the budget, the same for all members."""

    recipe: str
    common: tuple[str, ...]
    steps: int  # of the paper's network; others get as many FLOPs
    every: int  # steps of the paper's network between scores
    seeds: tuple[int, ...]


GAUSSIAN = (
    "process=gaussian", "process.schedule=linear", "process.prediction=epsilon", "process.variance=learned",
)  # fmt: skip
FLOW = ("process=flow",)
BLOCK = ("network.block=adaln-zero",)
MODERN = ("network.block=modern",)
ADAM, MUON = ("training.optimizer=adamw",), ("training.optimizer=muon",)
RATE = ("training.optimizer.learning_rate=0.004", "training.optimizer.decay=constant", "training.optimizer.warmup=0")
FALLING = (*RATE, "training.optimizer.decay=cosine", "training.optimizer.warmup=50")
PAPER = (*GAUSSIAN, *BLOCK, *ADAM, *RATE)

MEMBERS: dict[str, tuple[str, ...]] = {
    "paper": PAPER,
    # one change at a time
    "paper + min-SNR": (*PAPER, "process.weighting=min-snr"),
    "paper + v": (*PAPER, "process.prediction=v"),
    "paper + adaLN-single": (*GAUSSIAN, "network.block=adaln-single", *ADAM, *RATE),
    "paper + modern block": (*GAUSSIAN, *MODERN, *ADAM, *RATE),
    "paper + Muon": (*GAUSSIAN, *BLOCK, *MUON, *RATE),
    "paper + falling rate": (*GAUSSIAN, *BLOCK, *ADAM, *FALLING),
    "paper + flow": (*FLOW, *BLOCK, *ADAM, *RATE),
    # in sequence
    "flow + logit-normal": (*FLOW, "process.times=logit-normal", *BLOCK, *ADAM, *RATE),
    "flow + x0 prediction": (*FLOW, "process.prediction=x0", *BLOCK, *ADAM, *RATE),
    "flow + modern block": (*FLOW, *MODERN, *ADAM, *RATE),
    "flow + Muon": (*FLOW, *BLOCK, *MUON, *RATE),
    "flow + modern block + Muon": (*FLOW, *MODERN, *MUON, *RATE),
    "modern": (*FLOW, *MODERN, *MUON, *FALLING),
    "modern, a quarter": (*FLOW, *MODERN, *MUON, *FALLING),
    "modern, a tenth": (*FLOW, *MODERN, *MUON, *FALLING),
    # what of the modern block matters: the last but one without a part
    "without rotary": (*FLOW, *MODERN, *MUON, *RATE, "network.block.positions=sincos"),
    "without qk-norm": (*FLOW, *MODERN, *MUON, *RATE, "network.block.qk_norm=false"),
    "without SwiGLU": (*FLOW, *MODERN, *MUON, *RATE, "network.block.mlp=gelu"),
    "without value residual": (*FLOW, *MODERN, *MUON, *RATE, "network.block.value_residual=false"),
    "without shared modulation": (*FLOW, *MODERN, *MUON, *RATE, "network.block.modulation=own"),
}
BUDGETS = {"modern, a quarter": 0.25, "modern, a tenth": 0.1}  # of the FLOPs; a falling rate falls within them
SETTINGS = {
    "digits": Setting(
        "digits.yaml",
        (
            "network.width=96", "network.depth=4", "network.heads=3", "sampling.guidance=1", "sampling.steps=25",
            "training.optimizer.clip=null", "training.ema.decay=0.995", "evaluation.count=1000",
            "evaluation.reference=digits",
        ),
        steps=1500, every=250, seeds=(0, 1, 2),
    ),
    "cifar10": Setting(  # expects cifar10/train.parquet, and of it cifar10/features and cifar10/train.npz (ledger.md)
        "your-images.yaml",
        (
            "data=parquet", "data.path=cifar10/train.parquet", "data.size=32", "network.patch=4", "network.width=128",
            "network.depth=4", "network.heads=4", "sampling.guidance=1", "sampling.steps=25",
            "training.optimizer.clip=null", "training.ema.decay=0.995", "training.batch=64", "evaluation.count=1000",
            "evaluation.features=cifar10/features", "evaluation.reference=cifar10/train.npz",
        ),
        steps=1600, every=200, seeds=(0,),
    ),
}  # fmt: skip


def overrides(data: str, member: str, seed: int, out: Path) -> list[str]:
    """All of a run's settings, with the steps that spend the budget."""
    setting = SETTINGS[data]
    told = [*setting.common, *MEMBERS[member], f"training.seed={seed}", f"output={out / folder(data, member, seed)}"]
    told += ["training.sample_every=1000000", "training.tensorboard=false", "training.log_every=100"]
    # Optimizer settings that belong to every kind follow the kind that a member chooses.
    told.sort(key=lambda line: not line.startswith(("data=", "network.block=", "training.optimizer=", "process=")))
    share = macs(setting, told) / macs(setting, [*setting.common, *PAPER])
    steps, every = round(setting.steps * BUDGETS.get(member, 1) / share), round(setting.every / share)
    return [*told, f"training.steps={steps}", f"evaluation.every={every}", f"training.checkpoint_every={every}"]


def macs(setting: Setting, told: list[str]) -> int:
    """Multiply-adds of one forward pass of the network that a recipe asks for."""
    import torch

    from tessera.training.recipe import pixels_like_data, read, resolve

    recipe = pixels_like_data(read(RECIPES / setting.recipe, [line for line in told if not line.startswith("output")]))
    recipe = resolve(recipe, recipe.data.open(), recipe.codec.build())
    with torch.device("meta"):
        return recipe.network.build().macs()


def folder(data: str, member: str, seed: int) -> str:
    return f"{data}/{member.replace(' ', '-')}-seed-{seed}"


def run(data: str, out: Path, seeds: list[int], members: list[str], shard: tuple[int, int]) -> None:
    from tessera.training import loop
    from tessera.training.recipe import read

    jobs = [(seed, member) for seed in seeds for member in members]  # all members of a seed before the next seed
    for number, (seed, member) in enumerate(jobs):
        if number % shard[1] == shard[0]:
            print(f"--- {member}, seed {seed}", flush=True)
            loop.train(read(RECIPES / SETTINGS[data].recipe, overrides(data, member, seed, out)))


@dataclass(frozen=True)
class Curve:
    """One run: training FLOPs, and the metric with its interval at each."""

    flops: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def reaches(self, target: float) -> float:
        """FLOPs at which the metric first falls to a target, between scores in logarithms; infinite if never."""
        for i in range(len(self.value)):
            if self.value[i] <= target:
                if i == 0:
                    return float(self.flops[0])
                a, b = math.log(self.value[i - 1]), math.log(self.value[i])
                share = (a - math.log(target)) / (a - b)
                return float(np.exp(np.log(self.flops[i - 1]) * (1 - share) + np.log(self.flops[i]) * share))
        return math.inf


def curve(run: Path, metric: str) -> Curve | None:
    """What a run has scored so far."""
    from tessera.bundle import checkpoints, load_config
    from tessera.training.scores import history

    scored, saved = history(run), checkpoints(run)
    if not scored or not saved:
        return None
    import torch

    config = load_config(saved[0])
    with torch.device("meta"):
        each = config.network.build().macs()
    batch = (config.recipe or {})["training"]["batch"]
    steps = np.array(sorted(scored))
    told = [scored[step][metric] for step in steps]
    flops = steps * batch * each * 2 * 3  # two operations a multiply-add; backward costs twice the forward pass
    return Curve(flops, *(np.array([getattr(score, name) for score in told]) for name in ("value", "low", "high")))


def report(data: str, out: Path) -> None:
    setting, found = SETTINGS[data], {}
    for member in MEMBERS:
        runs = [curve(out / folder(data, member, seed), "fd") for seed in setting.seeds]
        kids = [curve(out / folder(data, member, seed), "kid") for seed in setting.seeds]
        pairs = [(fd, kid) for fd, kid in zip(runs, kids) if fd is not None and kid is not None]
        if pairs:
            found[member] = pairs
    paper = float(np.mean([fd.value[-1] for fd, _ in found["paper"]]))
    spent = found["paper"][0][0].flops[-1]
    print(f"Training FLOPs of a run: {spent:.3g}. The paper's recipe ends at FD {paper:.3g}.\n")
    print("| member | seeds | FD | KID | FLOPs to the paper's final FD |")
    print("|---|---|---|---|---|")
    for member, pairs in found.items():
        needed = [fd.reaches(paper) / spent for fd, _ in pairs]
        told = "never" if all(map(math.isinf, needed)) else ", ".join(f"{share:.2f}" for share in sorted(needed))
        fd, kid = (mean([pair[i] for pair in pairs]) for i in (0, 1))
        print(f"| {member} | {len(pairs)} | {fd} | {kid} | {told} |")
    plot(found, paper, out / f"{data}.png")


def mean(runs: list[Curve]) -> str:
    """The mean of the seeds' last scores and its 95 % interval; of one seed, the interval of its own sampling."""
    last = np.array([run.value[-1] for run in runs])
    if len(runs) == 1:
        return f"{last[0]:.3g} ({runs[0].low[-1]:.3g} to {runs[0].high[-1]:.3g})"
    half = T95[len(runs)] * last.std(ddof=1) / math.sqrt(len(runs))
    return f"{last.mean():.3g} ± {half:.2g}"


def plot(found: dict, paper: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for member, pairs in found.items():
        length = min(len(fd.flops) for fd, _ in pairs)
        values = np.stack([fd.value[:length] for fd, _ in pairs])
        (line,) = axes.plot(
            pairs[0][0].flops[:length],
            values.mean(0),
            label=member,
            linewidth=2.5 if member in ("paper", "modern") else 1,
        )
        axes.fill_between(pairs[0][0].flops[:length], values.min(0), values.max(0), alpha=0.1, color=line.get_color())
    axes.axhline(paper, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="FD (lower is better)")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "report"))
    parser.add_argument("--data", choices=SETTINGS, default="digits")
    parser.add_argument("--out", type=Path, default=Path("runs/ledger"))
    parser.add_argument("--seeds", default=None, help="as in 0,1,2")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th run")
    parser.add_argument("members", nargs="*", default=[], help="some of the members (all)")
    options = parser.parse_intermixed_args()
    if options.verb == "report":
        return report(options.data, options.out)
    seeds = SETTINGS[options.data].seeds if options.seeds is None else [int(seed) for seed in options.seeds.split(",")]
    index, count = map(int, options.shard.split("/"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return run(options.data, options.out, list(seeds), options.members or list(MEMBERS), (index, count))


if __name__ == "__main__":
    main()
