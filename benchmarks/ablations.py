"""What does each part of the modern recipe contribute? One network size, equal training FLOPs, several seeds.

    python benchmarks/ablations.py run --data digits --out runs/ablations [--shard 1/2] [--seeds 0,1,2] [MEMBER ...]
    python benchmarks/ablations.py run --data cifar10 --out runs/ablations --rates 0.5,1,2 paper    # a search
    python benchmarks/ablations.py report --data digits --out runs/ablations > table.md      # and
    runs/ablations/digits.png

A member is a list of overrides of one recipe. Each run is a `tessera train` with evaluations at fixed intervals. To
resume after an interruption, run the same command again. Members whose steps have other FLOPs, including the
optimizer's matrix products, take fewer or more steps, so that all use the same FLOPs. `--shard i/n` takes every n-th
run: for two processes, or an array of jobs. `--rates` runs the members with their learning rates multiplied, with a
part of the FLOPs (--budget 0.25); the best factor belongs into `Setting.rates`.
"""

import argparse
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    rate: float = 1.0  # a factor of the members' learning rates, which suit the digits' network
    rates: Mapping[str, float] = field(default_factory=dict)  # of some members, instead, as the search found them


GAUSSIAN = (
    "diffusion=gaussian", "diffusion.schedule=linear", "diffusion.prediction=epsilon", "diffusion.variance=learned",
)  # fmt: skip
FLOW = ("diffusion=flow",)
BLOCK = ("network.block=adaln-zero",)
MODERN = ("network.block=rope-swiglu",)
TIMES = (
    "diffusion.timestep_sampling=logit-normal",
    "diffusion.timestep_sampling.std=0.7",
)  # 0.7 of 0.5, 0.7, 1 and 1.4
# Rates tried with seed 0 and less than the budget: AdamW 0.001, 0.002, 0.004, 0.008; Muon 0.004, 0.012, 0.024.
ADAM = ("training.optimizer=adamw", "training.optimizer.learning_rate=0.004")
MUON = (
    "training.optimizer=muon", "training.optimizer.learning_rate=0.012", "training.optimizer.adamw_learning_rate=0.004",
    "training.optimizer.newton_schulz_steps=3",
)  # fmt: skip
STEADY = ("training.optimizer.lr_schedule=constant", "training.optimizer.warmup_steps=0")
FALLING = (
    "training.optimizer.lr_schedule=wsd",
    "training.optimizer.warmup_steps=0",
)  # a warm-up of 20 steps only delayed
PAPER = (*GAUSSIAN, *BLOCK, *ADAM, *STEADY)
MOST = (*FLOW, *TIMES, *MODERN, *MUON)  # all but the decaying rate

MEMBERS: dict[str, tuple[str, ...]] = {
    "paper": PAPER,
    # one change at a time
    "paper + min-SNR": (*PAPER, "diffusion.weighting=min-snr"),
    "paper + v": (*PAPER, "diffusion.prediction=v"),
    "paper + adaLN-single": (*GAUSSIAN, "network.block=adaln-single", *ADAM, *STEADY),
    "paper + rope-swiglu block": (*GAUSSIAN, *MODERN, *ADAM, *STEADY),
    "paper + Muon": (*GAUSSIAN, *BLOCK, *MUON, *STEADY),
    "paper + decaying rate": (*GAUSSIAN, *BLOCK, *ADAM, *FALLING),
    "paper + flow": (*FLOW, *BLOCK, *ADAM, *STEADY),
    # in sequence
    "flow + logit-normal": (*FLOW, *TIMES, *BLOCK, *ADAM, *STEADY),
    "... + rope-swiglu block": (*FLOW, *TIMES, *MODERN, *ADAM, *STEADY),
    "... + Muon": (*MOST, *STEADY),
    "modern (... + decaying rate)": (*MOST, *FALLING),
    "modern, a quarter": (*MOST, *FALLING),
    "modern, an eighth": (*MOST, *FALLING),
    # beside it
    "modern, label_init_std 1": (*MOST, *FALLING, "network.label_init_std=1"),  # of recipes/modern.yaml, not 0.02
    "modern + dual token times": (*MOST, *FALLING, "training.token_times=dual"),
    "modern + dual token times, half": (
        *MOST, *FALLING, "training.token_times=dual", "training.token_times.fraction=0.5",
    ),
    "modern + self-alignment": (*MOST, *FALLING, "training.alignment=self"),
    "modern + self-alignment, half": (*MOST, *FALLING, "training.alignment=self", "training.alignment.until=0.5"),
    "modern + dual token times + self-alignment": (  # Self-Flow: the features at the cleaner time
        *MOST, *FALLING, "training.token_times=dual", "training.alignment=self", "training.alignment.time_gap=0",
    ),
    # REPA with a pretrained encoder, of which benchmarks/imagenet_encoder.py makes a folder
    "modern + encoder alignment": (
        *MOST, *FALLING, "training.alignment={kind: encoder, source: runs/efficientnet-lite0, size: 128}",
    ),
    "modern + token routing": (*MOST, *FALLING, "training.token_routing={}"),  # for 256 tokens or more
    # other changes, and parts of the rope-swiglu block: "... + Muon" with one thing changed
    "x0 prediction": (*MOST, *STEADY, "diffusion.prediction=x0"),
    "shift by dimension": (*MOST, *STEADY, "diffusion.shift=dimension"),
    "without rope-swiglu block": (*FLOW, *TIMES, *BLOCK, *MUON, *STEADY),
    "without rotary": (*MOST, *STEADY, "network.block.positions=sincos"),
    "without qk-norm": (*MOST, *STEADY, "network.block.qk_norm=false"),
    "without SwiGLU": (*MOST, *STEADY, "network.block.mlp=gelu"),
    "without value residual": (*MOST, *STEADY, "network.block.value_residual=false"),
    "without shared modulation": (*MOST, *STEADY, "network.block.modulation=per-block"),
}  # fmt: skip
BUDGETS = {"modern, a quarter": 0.25, "modern, an eighth": 0.125}  # of the FLOPs; the rate decays within them


@dataclass(frozen=True)
class Trial:
    """A run of the search for learning rates: a factor of them, and the share of the FLOPs."""

    rate: float
    budget: float = 0.25


WIDTH_128 = (  # of 64 tokens
    "network.label_init_std=0.02", "network.hidden_size=128", "network.depth=4", "network.num_heads=4",
    "sampling.guidance_scale=1", "sampling.sampler=ddim", "sampling.num_steps=25",
    "training.optimizer.grad_clip_norm=null", "training.ema.decay=0.995", "training.global_batch_size=64",
    "evaluation.num_samples=1000",
)  # fmt: skip
SETTINGS = {
    "digits": Setting(
        "digits.yaml",
        (
            "network.hidden_size=96", "network.depth=4", "network.num_heads=3", "sampling.guidance_scale=1",
            "sampling.num_steps=25",
            "training.optimizer.grad_clip_norm=null", "training.ema.decay=0.995", "evaluation.num_samples=1000",
            "evaluation.reference=digits",
        ),
        steps=1500, every=250, seeds=(0, 1, 2),
    ),
    # Expects cifar10/train.parquet, and of it cifar10/features and cifar10/train.npz (docs/explanation/ablations.md).
    "cifar10": Setting(
        "modern.yaml",
        (
            *WIDTH_128, "data=parquet", "data.path=cifar10/train.parquet", "data.size=32", "network.patch_size=4",
            "evaluation.features=cifar10/features", "evaluation.reference=cifar10/train.npz",
        ),
        steps=3000, every=500, seeds=(0, 1),
    ),
    # Expects emoji/latents, emoji/features and emoji/train.npz (docs/explanation/ablations.md).
    "emoji": Setting(
        "modern.yaml",
        (
            *WIDTH_128, "data=parquet", "data.path=../shared/data/emoji/train.parquet", "data.label=group",
            "data.size=64", "data.hflip=false", "data.cache=emoji/latents", "codec=autoencoder-tiny",
            "codec.source=../shared/data/taef2", "network.patch_size=1",
            "evaluation.features=emoji/features", "evaluation.reference=emoji/train.npz",
            "evaluation.class_policy=data",
        ),
        steps=1500, every=250, seeds=(0, 1), rate=2,
    ),
    "cifar10-gpu": Setting(  # one member is a call of some minutes on an H100
        "modern.yaml",
        (
            "data=parquet", "data.path=cifar10/train.parquet", "data.size=32", "network.label_init_std=0.02",
            "network.patch_size=2",
            "network.hidden_size=384",
            "network.depth=8", "network.num_heads=6", "sampling.guidance_scale=1", "sampling.sampler=ddim",
            "sampling.num_steps=25",
            "training.optimizer.grad_clip_norm=null", "training.ema.decay=0.999", "training.global_batch_size=256",
            "evaluation.num_samples=5000",
            "evaluation.features=cifar10/features", "evaluation.reference=cifar10/train.npz",
            "evaluation.batch_size=500",
        ),
        steps=6000, every=1500, seeds=(0,), rate=0.25,
    ),
}  # fmt: skip


def overrides(data: str, member: str, seed: int, out: Path, trial: Trial | None = None) -> list[str]:
    """All settings of a run, with the number of steps that uses the budget."""
    setting = SETTINGS[data]
    settings = [
        *setting.common,
        *MEMBERS[member],
        f"training.seed={seed}",
        f"run_dir={out / folder(data, member, seed, trial)}",
    ]
    settings += ["training.sample_every=1000000", "training.tensorboard=false", "training.log_every=100"]
    # Optimizer settings that belong to every kind follow the kind that a member chooses.
    settings.sort(
        key=lambda line: not line.startswith(("data=", "network.block=", "training.optimizer=", "diffusion="))
    )
    factor = setting.rates.get(member, setting.rate) if trial is None else trial.rate
    settings = [_scaled(line, factor) for line in settings]
    share = flops_of_a_step(recipe_of(data, settings)) / flops_of_a_step(recipe_of(data, [*setting.common, *PAPER]))
    every = round(setting.every / share)
    budget = BUDGETS.get(member, 1) if trial is None else trial.budget
    steps = round(every * setting.steps / setting.every * budget)
    return [*settings, f"training.steps={steps}", f"evaluation.every={every}", f"training.checkpoint_every={every}"]


def _scaled(line: str, rate: float) -> str:
    """An override of a learning rate, multiplied."""
    key, _, value = line.partition("=")
    return f"{key}={float(value) * rate:g}" if key.endswith("learning_rate") else line


def recipe_of(data: str, overrides: list[str]):
    """The recipe with overrides, its sizes filled in."""
    from tessera.training.recipe import infer_pixel_channels, read_recipe, resolve_recipe

    settings = [line for line in overrides if not line.startswith("run_dir")]
    recipe = infer_pixel_channels(read_recipe(RECIPES / SETTINGS[data].recipe, settings))
    return resolve_recipe(recipe, recipe.data.open().class_names, recipe.codec.build())


def folder(data: str, member: str, seed: int, trial: Trial | None = None) -> str:
    words = re.findall(r"[\w-]+", member)
    suffix = "" if trial is None else f"-rate-{trial.rate:g}-budget-{trial.budget:g}"
    return f"{data}/{'-'.join(words)}-seed-{seed}{suffix}"


def run(
    data: str, out: Path, seeds: list[int], members: list[str], shard: tuple[int, int], steps: int | None = None,
    trials: Sequence[Trial | None] = (None,), added: tuple[str, ...] = (),
) -> None:  # fmt: skip
    from tessera.training import loop
    from tessera.training.recipe import read_recipe

    # All members of a seed before the next seed.
    jobs = [(seed, member, trial) for seed in seeds for member in members for trial in trials]
    for number, (seed, member, trial) in enumerate(jobs):
        if number % shard[1] == shard[0] - 1:
            print(f"--- {member}, seed {seed}" + (f", rates x {trial.rate:g}" if trial is not None else ""), flush=True)
            settings = [*overrides(data, member, seed, out, trial), *added]
            if steps is not None:
                settings += [f"training.steps={steps}", f"evaluation.every={steps}", "evaluation.num_samples=50"]
            loop.train(read_recipe(RECIPES / SETTINGS[data].recipe, settings))


@dataclass(frozen=True)
class Curve:
    """One run: steps and training FLOPs, and the metric with its interval at each."""

    steps: np.ndarray
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
    """The scores of a run, if it is done."""
    from tessera.bundle import checkpoints, load_config
    from tessera.training.scores import history

    scored, saved = history(run), checkpoints(run)
    if not scored or not saved:
        return None
    from tessera.training.recipe import Recipe

    recipe = Recipe.model_validate(load_config(saved[0]).recipe)
    steps = np.array(sorted(scored))
    if steps[-1] < recipe.training.steps:
        return None
    scores = [scored[step][metric] for step in steps]
    flops = steps * float(flops_of_a_step(recipe))
    return Curve(
        steps, flops, *(np.array([getattr(score, name) for score in scores]) for name in ("value", "low", "high"))
    )


def flops_of_a_step(recipe) -> float:
    """Forward, backward (twice the forward pass) and the optimizer's matrix products; two FLOPs per multiply-add."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tessera.layers.embeddings import TimestepEmbedder
    from tessera.layers.modulation import Modulation
    from tessera.training.recipe import training_macs

    network = recipe.network.build()
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer = recipe.training.optimizer.build(network)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    macs = training_macs(recipe.training, network)
    if recipe.training.token_times.kind == "dual":  # a time embedding and a modulation vector for each token
        per_time = [part.macs() for part in network.modules() if isinstance(part, (Modulation, TimestepEmbedder))]
        macs += (math.prod(recipe.network.grid) - 1) * sum(per_time)
    return 6 * recipe.training.global_batch_size * macs + counter.get_total_flops()


def report(data: str, out: Path) -> None:
    setting, results = SETTINGS[data], {}
    for member in MEMBERS:
        runs = [curve(out / folder(data, member, seed), "fd") for seed in setting.seeds]
        kids = [curve(out / folder(data, member, seed), "kid") for seed in setting.seeds]
        pairs = [(fd, kid) for fd, kid in zip(runs, kids) if fd is not None and kid is not None]
        if pairs:
            results[member] = pairs
    if "paper" not in results:
        raise SystemExit(f"no run of the paper's recipe in {out / data} is done: the others are compared with it")
    paper = float(np.mean([fd.value[-1] for fd, _ in results["paper"]]))
    spent = results["paper"][0][0].flops[-1]
    print(f"Training FLOPs of a run: {spent:.3g}. The paper's recipe ends at FD {paper:.3g}.\n")
    print("| recipe | seeds | FD | KID | FLOPs per step | FLOPs to the paper's final FD |")
    print("|---|---|---|---|---|---|")
    for member, pairs in results.items():
        needed = [fd.reaches(paper) / spent for fd, _ in pairs]
        fractions = "never" if all(map(math.isinf, needed)) else ", ".join(f"{share:.2f}" for share in sorted(needed))
        fd, kid = (mean([pair[i] for pair in pairs]) for i in (0, 1))
        step = pairs[0][0].flops[0] / pairs[0][0].steps[0] / (spent / results["paper"][0][0].steps[-1])
        print(f"| {member} | {len(pairs)} | {fd} | {kid} | {step:.2f} | {fractions} |")
    plot(results, paper, out / f"{data}.png")
    searched = list(rate_search(data, out))
    if searched:
        print("\nFD by the factor of the learning rates, one seed:\n")
        print("| recipe | share of the FLOPs | factor: FD |\n|---|---|---|")
        for member, budget, scores in searched:
            results = ", ".join(f"{rate:g}: {fd:.3g}" for rate, fd in sorted(scores.items()))
            print(f"| {member} | {budget:g} | {results} |")


def rate_search(data: str, out: Path) -> Iterator[tuple[str, float, dict[float, float]]]:
    """The members whose learning rates were searched, the shares of the FLOPs, and the FD by factor."""
    for member in MEMBERS:
        start = folder(data, member, SETTINGS[data].seeds[0])
        scores: dict[float, dict[float, float]] = {}
        for path in out.glob(start + "-rate-*-budget-*"):
            rate, budget = map(float, path.name.rpartition("-rate-")[2].split("-budget-"))
            if fd := curve(path, "fd"):
                scores.setdefault(budget, {})[rate] = float(fd.value[-1])
        for budget, values in sorted(scores.items()):
            yield member, budget, values


def mean(runs: list[Curve]) -> str:
    """The mean of the seeds' last scores and its 95 % interval; of one seed, the interval of its own sampling."""
    last = np.array([run.value[-1] for run in runs])
    if len(runs) == 1:
        return f"{last[0]:.3g} ({runs[0].low[-1]:.3g} to {runs[0].high[-1]:.3g})"
    half = T95[len(runs)] * last.std(ddof=1) / math.sqrt(len(runs))
    return f"{last.mean():.3g} ± {half:.2g}"


def plot(results: dict, paper: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for member, pairs in results.items():
        length = min(len(fd.flops) for fd, _ in pairs)
        values = np.stack([fd.value[:length] for fd, _ in pairs])
        (line,) = axes.plot(
            pairs[0][0].flops[:length],
            values.mean(0),
            label=member,
            linewidth=2.5 if member == "paper" or member.startswith("modern (") else 1,
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
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--seeds", default=None, help="as in 0,1,2")
    parser.add_argument("--shard", default="1/1", help="i/n: part i of n, from 1")
    parser.add_argument("--rates", help="factors of the learning rates, as in 0.5,1,2: a search with less FLOPs")
    parser.add_argument("--budget", type=float, default=Trial.budget, help="share of the FLOPs in a search")
    parser.add_argument("--steps", type=int, help="of the paper's network (the setting's)")
    parser.add_argument("--compile", default="off", help="as training.compile: faster, the same results to rounding")
    parser.add_argument("members", nargs="*", default=[], help="some of the members (all)")
    options = parser.parse_intermixed_args()
    if options.verb == "report":
        return report(options.data, options.out)
    seeds = SETTINGS[options.data].seeds if options.seeds is None else [int(seed) for seed in options.seeds.split(",")]
    index, count = map(int, options.shard.split("/"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rates = options.rates.split(",") if options.rates else []
    trials = [Trial(float(rate), options.budget) for rate in rates] or [None]
    members = options.members or list(MEMBERS)
    added = (f"training.compile={options.compile}",)
    return run(options.data, options.out, list(seeds), members, (index, count), options.steps, trials, added)


if __name__ == "__main__":
    main()
