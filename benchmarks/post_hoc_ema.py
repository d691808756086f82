"""Fréchet distances over the length of the averaged weights, all computed from one run on digits.

    python benchmarks/post_hoc_ema.py --out FOLDER [--steps 400] [--samples 1000] [--lengths 0.03,0.05,...]

The model is small and its learning rate constant, so that the weights keep their noise and averages matter.
"""

import argparse
from pathlib import Path

import torch

import tessera
from tessera import bundle, power_ema
from tessera.settings import RECIPES
from tessera.training import scores
from tessera.training.recipe import read_recipe

LENGTHS = "0.02,0.03,0.05,0.08,0.1,0.15,0.2,0.25"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--lengths", default=LENGTHS)
    options = parser.parse_args()
    changes = (
        f"run_dir={options.out / 'run'}", f"training.steps={options.steps}", "network.hidden_size=64",
        "network.depth=3", "network.num_heads=4", "training.optimizer.lr_schedule=constant", "training.device=cpu",
        "training.optimizer.warmup_steps=20", "training.sample_every=100000", "training.checkpoint_every=100000",
        "training.health_every=null", "sampling.num_steps=10", "training.ema.kind=power",
    )  # fmt: skip
    recipe = read_recipe(RECIPES / "digits.yaml", changes)
    newest = bundle.checkpoints(tessera.train(recipe))[0]
    config = bundle.load_config(newest)
    stored = list(bundle.stored_averages(newest, config))
    scorer = scores.Scorer(
        scores.EvaluationConfig(every=1, num_samples=options.samples), bundle.load(newest), recipe.data, options.out
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {len(stored)} stored averages\n")
    print("| length | error of the profile | FD | 95 % interval |\n|---|---|---|---|")
    for number, length in enumerate(map(float, options.lengths.split(","))):
        _, error = power_ema.fit(stored, power_ema.Profile(options.steps, length))
        metrics = scorer.score(number, bundle.load(newest, ema_length=length))
        values = list(metrics.values())
        print(f"| {length} | {error:.2%} | {values[0]:.4f} | {' to '.join(f'{value:.4f}' for value in values[1:3])} |")


if __name__ == "__main__":
    main()
