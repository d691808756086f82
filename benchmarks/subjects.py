"""A new class from 20 images: is it learned, and what is forgotten, with and without images of the base?

    tessera train recipes/digits.yaml
    python benchmarks/subjects.py runs/digits [--work FOLDER]

The new class is a mirrored 7, which begins as the mean of 7 and 4. Rows: its embedding trained alone; a LoRA with the
embedding on the 20 images alone, and with 20 images of each digit that the base generated, at two learning rates, the
better with several seeds. Columns: the share of 200 generated new symbols that an 11-class support vector machine reads
as such; the share of 500 generated digits that the digit classifier reads as the requested one; the mean absolute
difference of these digits from those of the base for the same seeds, of 255; and the seconds of training.
Finished runs are kept in FOLDER and not repeated.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.svm import SVC

import tessera
from tessera.data.digits import DigitsConfig, DigitsDataset
from tessera.evaluation.toy.digit_classifier import DigitClassifier
from tessera.training import loop
from tessera.training.recipe import read_recipe

ROOT = Path(__file__).parents[1]
NEW, DIGIT = "mirrored", 7
LORA = ("adapter={kind: lora, rank: 16, classes: [mirrored]}",)
METHODS = {  # overrides, whether the prior images are used, learning rates
    "the embedding alone": (("adapter={kind: classes, classes: [mirrored]}",), False, (3e-2, 1e-1)),
    "LoRA, the 20 images": (LORA, False, (1e-3, 3e-3)),
    "LoRA, with prior images": (LORA, True, (1e-3, 3e-3)),
}


def mirrored(split: str) -> np.ndarray:
    """Mirrored sevens of a split of the digits, uint8 [N, 8, 8]"""
    data = DigitsDataset(DigitsConfig(split=split))
    return data.images[data.labels == DIGIT][:, 0, :, ::-1]


def classifier() -> SVC:
    """Reads the ten digits and the new class, by images that no training has seen."""
    data = DigitsDataset(DigitsConfig(split="ceiling"))
    new = np.concatenate((mirrored("ceiling"), mirrored("judge")[20:]))
    pixels = np.concatenate((data.images[:, 0], new)).reshape(-1, 64) / 255.0
    return SVC(C=10).fit(pixels, np.concatenate((data.labels, np.full(len(new), 10))))


def run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "tessera", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def prepare(base: str, work: Path, prior: int) -> None:
    """The base with the new class, its 20 images, and the images of the base."""
    (work / "images" / NEW).mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(mirrored("judge")[:20]):
        Image.fromarray(image).save(work / "images" / NEW / f"{number}.png")
    if not (work / "base").exists():
        run("classes", base, work / "base", "--add", f"{NEW}=7,4")
    run(
        "sample", base, "--classes", "all", "--seeds", f"1000-{999 + prior}", "--device", "cpu", "--out", work / "prior"
    )


def train(
    work: Path, folder: Path, overrides: tuple[str, ...], prior: bool, rate: float, steps: int, seed: int
) -> None:
    if (folder / "seconds.json").exists():
        return
    paths = [str(work / "images"), str(work / "prior")]
    data = {"kind": "folder", "path": paths, "weights": [1, 1], "size": 8, "channels": 1}
    if not prior:
        data |= {"path": paths[:1], "weights": []}
    settings = [f"run_dir={folder}", f"training.init_from={work / 'base'}", ("data", data), *overrides]
    settings += [f"training.steps={steps}", f"training.global_batch_size={40 if prior else 20}"]
    settings += [f"training.optimizer.learning_rate={rate}", f"training.seed={seed}", "training.device=cpu"]
    settings += [f"training.checkpoint_every={steps}", "training.sample_every=100000", "training.health_every=null"]
    began = time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()):
        loop.train(read_recipe(ROOT / "recipes/subject.yaml", [*settings, "training.tensorboard=false"]))
    (folder / "seconds.json").write_text(json.dumps(time.monotonic() - began))


class Judge:
    def __init__(self, base: str, each: int) -> None:
        self.each, self.new, self.digits = each, classifier(), DigitClassifier()
        self.before = self.generate(tessera.load(base, "cpu"))

    def generate(self, model: tessera.Model) -> np.ndarray:
        """The same number of images of each digit, uint8 [N, 8, 8, 1]"""
        labels = [str(digit) for digit in range(10) for _ in range(self.each)]
        return tessera.generate(model, labels, list(range(self.each)) * 10, batch_size=100)

    def scores(self, model: tessera.Model) -> tuple[float, float, float]:
        """New class read as such, digits read as requested, change of the digits."""
        new = tessera.generate(model, [NEW] * 4 * self.each, list(range(4 * self.each)), batch_size=100)
        digits = self.generate(model)
        read = self.digits.accuracy(digits, [digit for digit in range(10) for _ in range(self.each)])
        change = np.abs(digits.astype(float) - self.before).mean()
        return float((self.new.predict(new.reshape(-1, 64) / 255.0) == 10).mean()), float(read), float(change)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the run of recipes/digits.yaml")
    parser.add_argument("--work", type=Path, default=Path("runs/subjects"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prior", type=int, default=20, help="images of each digit that the base generates")
    parser.add_argument("--each", type=int, default=50, help="generated images per digit")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    prepare(options.base, options.work, options.prior)
    judge = Judge(options.base, options.each)
    held_out = mirrored("model").reshape(-1, 64) / 255.0
    new, read, _ = judge.scores(tessera.load(str(options.work / "base"), "cpu"))
    print(f"real new symbols read as such: {(judge.new.predict(held_out) == 10).mean():.1%} of {len(held_out)}")
    print(f"before training: new symbol {new:.1%}, digits {read:.1%}; {options.steps} steps\n")
    print("| method | learning rate | new symbol | digits | change | seconds |\n|---|---|---|---|---|---|")
    for name, (overrides, prior, rates) in METHODS.items():
        results = {}
        for rate in rates:
            folder = options.work / f"{name.replace(', ', '-').replace(' ', '-')}-{rate:g}-0"
            train(options.work, folder, overrides, prior, rate, options.steps, 0)
            scores = judge.scores(tessera.load(folder, "cpu"))
            results[rate] = scores[0] * scores[1]
        rate = max(results, key=lambda each: results[each])
        rows, seconds = [], []
        for seed in range(options.seeds):
            folder = options.work / f"{name.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"
            train(options.work, folder, overrides, prior, rate, options.steps, seed)
            rows.append(judge.scores(tessera.load(folder, "cpu")))
            seconds.append(json.loads((folder / "seconds.json").read_text()))
        (new, read, change), (new_spread, read_spread, change_spread) = np.mean(rows, axis=0), np.std(rows, axis=0)
        cells = f"{new:.1%} ± {new_spread:.1%} | {read:.1%} ± {read_spread:.1%} | {change:.1f} ± {change_spread:.1f}"
        print(f"| {name} | {rate:g} | {cells} | {np.median(seconds):.0f} |", flush=True)


if __name__ == "__main__":
    main()
