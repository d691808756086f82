"""Which recipe learns the digits? Train each variant for the same steps and classify its samples.

    python benchmarks/digit_recipes.py [--steps 600] ["override override" ...]

A variant is a list of overrides of recipes/digits.yaml; without any, the variants that were compared for that recipe
are run. A row has the fraction of 500 generated digits that a classifier reads as the requested digit, without and with
guidance, and the spread within a class (mean distance of two generated digits, pixels in 0..1). The first line has the
spread of real digits.
"""

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tessera import bundle, generation
from tessera.data.digits import DigitsConfig, DigitsDataset
from tessera.demo import spread
from tessera.evaluation.toy.digit_classifier import DigitClassifier
from tessera.monitoring.logger import read_log
from tessera.training import loop
from tessera.training.recipe import read_recipe

RECIPE = Path(__file__).parent.parent / "recipes" / "digits.yaml"
VARIANTS = (
    "",
    "diffusion.prediction=epsilon",
    "diffusion.prediction=x0",
    "diffusion.schedule=linear",
    "diffusion.schedule=linear diffusion.prediction=epsilon diffusion.variance=learned",
    "diffusion.variance=learned",
    "training.optimizer.learning_rate=0.001",
    "training.ema.decay=0.995",
    "network.depth=4 network.hidden_size=256 network.num_heads=8",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--each", type=int, default=50, help="generated images per digit")
    parser.add_argument("variants", nargs="*", default=VARIANTS)
    options = parser.parse_args()
    judge, real = DigitClassifier(), DigitsDataset(DigitsConfig())
    each_real = [real.images[real.labels == digit] for digit in range(10)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.steps} steps")
    print(
        f"classifier on held-out digits {judge.real_accuracy:.1%}; spread of real digits {mean_spread(each_real):.2f}\n"
    )
    print(
        "| overrides of digits.yaml | seconds | loss | read as requested: guidance 1 / 1.5 / 2 | spread: 1 / 1.5 / 2 |"
    )
    print("|---|---|---|---|---|")
    labels = [digit for digit in range(10) for _ in range(options.each)]
    for variant in options.variants:
        with tempfile.TemporaryDirectory() as scratch:
            every = 10 * options.steps
            settings = [f"run_dir={scratch}/run", f"training.steps={options.steps}", "training.tensorboard=false"]
            settings += [f"training.sample_every={every}", f"training.checkpoint_every={every}", *variant.split()]
            began = time.monotonic()
            with contextlib.redirect_stderr(io.StringIO()):
                folder = loop.train(read_recipe(RECIPE, settings))
            seconds = time.monotonic() - began
            model = bundle.load(bundle.checkpoints(folder)[0])
            loss = read_log(folder)[-1]["loss"]
            shares, spreads = [], []
            for guidance in (1.0, 1.5, 2.0):
                samples = generation.generate(
                    model, labels, list(range(options.each)) * 10, guidance_scale=guidance, batch_size=100
                )
                shares.append(f"{judge.accuracy(samples, labels):.1%}")
                spreads.append(f"{mean_spread(np.split(samples, 10)):.2f}")
            cells = (variant or "(none)", f"{seconds:.0f}", f"{loss:.4f}", " / ".join(shares), " / ".join(spreads))
            print("|", " | ".join(cells), "|", flush=True)


def mean_spread(classes: list) -> float:
    return sum(map(spread, classes)) / len(classes)


if __name__ == "__main__":
    main()
