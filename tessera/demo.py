"""The demo: digits to a trained model, a grid, an animation, a loss curve and one honest score."""

from pathlib import Path

import numpy as np
from PIL import Image

import tessera
from tessera import bundle, files, images
from tessera.data.digits import DigitsConfig, DigitsSource
from tessera.evaluation.intervals import wilson
from tessera.evaluation.toy.digit_classifier import DigitClassifier
from tessera.generation import pipeline
from tessera.monitoring.logger import format_duration, read_log
from tessera.training import loop
from tessera.training.dry_run import dry_run
from tessera.training.recipe import Recipe
from tessera.training.recipe import read_recipe as read_recipe
from tessera.training.run import RECIPE as RECIPE_OF_RUN

RECIPE = "digits.yaml"
SEEDS = 8  # rows of the grid
JUDGED = 100  # drawings of each class that the score is made of


def run(out: Path, seconds: float = 120) -> float:
    """Train for about `seconds`, write grid.png, denoising.gif, loss.png and report.md into out, and return the share.

    An interrupted demo in the same folder goes on where it stopped. Raises TesseraError.
    """
    judge = DigitClassifier()
    recipe, estimate = _recipe(out, seconds)
    loop.train(recipe)
    model = bundle.load(bundle.checkpoints(Path(recipe.run_dir))[0])
    print(f"drawing {10 * JUDGED} digits to be judged", flush=True)
    asked = [digit for digit in range(10) for _ in range(JUDGED)]
    # Seeds apart from those of the grid, so that the score is of digits nobody has picked.
    drawn = pipeline.generate(model, asked, [1000 + seed for seed in range(JUDGED)] * 10, batch=100)
    share = judge.share(drawn, asked)
    classes, seeds = [c for _ in range(SEEDS) for c in range(10)], [s for s in range(SEEDS) for _ in range(10)]
    shown = pipeline.generate(model, classes, seeds, batch=len(seeds))
    images.save_png(out / "grid.png", images.grid(_enlarged(shown), 10, gap=4))
    frames = [
        images.grid(_enlarged(pipeline.decode(model, state.x)), 10, gap=4)
        for state in pipeline.generate_steps(model, list(range(10)), [0])
    ]
    images.save_gif(out / "denoising.gif", frames, milliseconds=90)
    _plot_loss(out / "loss.png", Path(recipe.run_dir))
    files.atomic_write(out / "report.md", _report(recipe, model, estimate, judge, share, drawn))
    print(f"\n{_score(share, judge)}\n")
    for name in ("grid.png", "denoising.gif", "loss.png", "report.md"):
        print(out / name)
    print(f"draw more:  tessera sample {recipe.run_dir} --classes 3,7 --count 4")
    return share


def _recipe(out: Path, seconds: float) -> tuple[Recipe, str]:
    """The recipe with as many steps as fit the time on this machine, or that of the demo already begun in `out`."""
    here, begun = [f"output={out / 'run'}"], out / "run" / RECIPE_OF_RUN
    if begun.exists():
        recipe = read_recipe(begun, here)
        told = f"{recipe.training.steps} steps, as begun before"
        print(f"going on with the demo in {out}: {told}; give another --out for a new one", flush=True)
        return recipe, told
    installed = Path(__file__).parent / "recipes"  # beside the package in a checkout, inside it when installed
    recipes = installed if installed.is_dir() else Path(__file__).parents[1] / "recipes"
    recipe = read_recipe(recipes / RECIPE, here)
    print("measuring this machine", flush=True)
    estimate = dry_run(recipe, steps=10)
    steps = max(round(seconds / estimate.seconds_per_step), 20)
    recipe = read_recipe(recipes / RECIPE, [*here, f"training.steps={steps}"])
    told = f"{steps} steps of {estimate.seconds_per_step * 1000:.0f} ms, measured on this machine"
    print(
        f"training a DiT of {estimate.parameters:,} parameters for about {format_duration(seconds)}: {told}", flush=True
    )
    return recipe, told


def _score(share: float, judge: DigitClassifier) -> str:
    low, high = wilson(share, 10 * JUDGED)
    return (
        f"{share:.1%} of {10 * JUDGED} drawn digits are read as the digit that was asked for "
        f"(95 % interval {low:.1%} to {high:.1%});\nthe same judge reads {judge.ceiling:.1%} of {judge.held_out} "
        "real digits that neither it nor the model has seen."
    )


def _enlarged(drawn: np.ndarray, zoom: int = 6) -> np.ndarray:
    """uint8 [B, 8, 8, 1] -> [B, 48, 48, 1], ink dark on white, smoothed as a scanner would."""
    side = drawn.shape[1] * zoom
    enlarged = [images.to_image(255 - digit).resize((side, side), Image.Resampling.BICUBIC) for digit in drawn]
    return np.stack([np.asarray(image)[..., None] for image in enlarged])


def _plot_loss(path: Path, folder: Path) -> None:
    import io

    from matplotlib.figure import Figure

    records = read_log(folder)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([record["step"] for record in records], [record["loss"] for record in records])
    axes.set(xlabel="step", ylabel="loss (mean squared error)", yscale="log")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    files.atomic_write(path, buffer.getvalue())


def _report(
    recipe: Recipe, model: bundle.Model, estimate: str, judge: DigitClassifier, share: float, drawn: np.ndarray
) -> str:
    learned, unseen = DigitsSource(DigitsConfig(split="model")), DigitsSource(DigitsConfig(split="ceiling"))
    real = learned.images.transpose(0, 2, 3, 1)
    facts = "\n".join(f"| {name} | {value} |" for name, value in bundle.describe(model).items())
    records = read_log(Path(recipe.run_dir))
    rows = "\n".join(
        f"| {digit} | {judge.share(drawn[part], [digit] * JUDGED):.0%} | {spread(drawn[part]):.2f} | "
        f"{spread(real[learned.labels == digit]):.2f} |"
        for digit, part in ((digit, slice(digit * JUDGED, (digit + 1) * JUDGED)) for digit in range(10))
    )
    return f"""# Handwritten digits by a diffusion transformer

{_score(share, judge)}

![a grid of digits: ten classes, eight seeds](grid.png)
![denoising](denoising.gif)
![loss](loss.png)

## The model
| | |
|---|---|
{facts}

Trained on {len(learned)} scans: {estimate}; batch {recipe.training.global_batch_size}, final loss {records[-1]["loss"]:.4f},
tessera {tessera.__version__}. The recipe is in `run/recipe.yaml`.

## Digit by digit
Spread is the mean distance between two digits of the class (pixels in 0..1): far below the real one would mean that
the model draws one digit over and over.

| digit | read as asked | spread drawn | spread real |
|---|---|---|---|
{rows}

## Is it copying?
Mean distance to the nearest scan the model learned from: drawn digits {_nearest(drawn, real):.2f}, real digits it never
saw {_nearest(unseen.images.transpose(0, 2, 3, 1), real):.2f}. Copies would be at 0.
"""


def spread(digits: np.ndarray) -> float:
    """Mean distance of two digits of one class; uint8 [B, ...], distances of pixels in 0 .. 1."""
    return float(np.mean(_distances(digits, digits)[np.triu_indices(len(digits), 1)]))


def _nearest(digits: np.ndarray, real: np.ndarray) -> float:
    return float(_distances(digits, real).min(axis=1).mean())


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (array.reshape(len(array), -1) / 255.0 for array in (a, b))
    return np.sqrt(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0))
