"""`tessera demo`: samples of shipped models; then a training on digits, with a grid, an animation and a score."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

import tessera
from tessera import bundle, clips, files, generation, images, model_card, pretrained
from tessera.data.digits import DigitsConfig, DigitsDataset
from tessera.evaluation.toy.digit_classifier import DigitClassifier
from tessera.monitoring.logger import read_log
from tessera.reporting.estimates import Estimate
from tessera.reporting.text import format_duration
from tessera.settings import RECIPES
from tessera.training import loop
from tessera.training.dry_run import dry_run
from tessera.training.recipe import Recipe, read_recipe
from tessera.training.run import RECIPE

ROWS = 8  # of the grid, one seed each
CLIP_STEPS, CLIP_FPS = 16, 8  # fewer steps than the model's own 40, for a first look
PER_CLASS = 100  # scored samples of each class
COUNT = 10 * PER_CLASS
PROMPTS = (
    "smiling cat with heart-eyes", "red apple", "blue heart", "fire engine", "snowman", "full moon",
    "birthday cake", "soccer ball", "sunflower", "hamburger", "purple octopus", "blue apple",
)  # fmt: skip
MOTIONS = ("walk left", "walk front", "walk right", "spellcard left", "spellcard front", "slash right")
FEWEST = 300  # steps, also where the machine was busy while its speed was measured: digits of fewer cannot be read


def run(out: Path, seconds: float = 60) -> float:
    """Train for about `seconds`, and return the accuracy of the samples.

    Writes emoji.png, sprites.webp, grid.png, denoising.gif, loss.png and report.md into out. An interrupted demo in the
    same folder resumes. Raises TesseraError.
    """
    out.mkdir(parents=True, exist_ok=True)
    emoji = generation.generate(bundle.load(pretrained.FOLDER / "emoji"), prompts=PROMPTS, seeds=[0] * len(PROMPTS))
    images.save_png(out / "emoji.png", images.grid(emoji, len(PROMPTS) // 2, gap=4))
    print(f"emoji of a model that comes with Tessera, from their names: {out / 'emoji.png'}", flush=True)
    sprites = generation.generate(
        bundle.load(pretrained.FOLDER / "sprites"), MOTIONS, range(len(MOTIONS)), num_steps=CLIP_STEPS
    )
    frames = [images.grid(frame, len(MOTIONS), gap=4, zoom=2) for frame in sprites.swapaxes(0, 1)]
    clips.save_clip(out / "sprites.webp", np.stack(frames), CLIP_FPS)
    print(f"clips of another, {', '.join(MOTIONS)}: {out / 'sprites.webp'}", flush=True)
    classifier = DigitClassifier()
    recipe, duration = _read_recipe(out, seconds)
    run_dir = Path(recipe.run_dir)
    loop.train(recipe)
    model = bundle.load(bundle.checkpoints(run_dir)[0])
    print(f"sampling {COUNT} digits to be scored", flush=True)
    labels = [digit for digit in range(10) for _ in range(PER_CLASS)]
    seeds = [1000 + seed for seed in range(PER_CLASS)] * 10  # not those of the grid
    parts = []
    for start in range(0, COUNT, PER_CLASS):
        part = slice(start, start + PER_CLASS)
        parts.append(generation.generate(model, labels[part], seeds[part], batch_size=PER_CLASS))
        print(f"sampled {start + PER_CLASS} of {COUNT}", flush=True)
    samples = np.concatenate(parts)
    accuracy = classifier.accuracy(samples, labels)
    _sample_grid(model, out / "grid.png")
    frames = [
        images.grid(_upscale(generation.decode(model, state.x)), 10, gap=4)
        for state in generation.generate_steps(model, list(range(10)), [0])
    ]
    images.save_gif(out / "denoising.gif", frames, milliseconds=90)
    _plot_loss(out / "loss.png", run_dir)
    summary = _summary(accuracy, classifier)
    files.atomic_write(out / "report.md", _report(recipe, model, duration, summary, classifier, samples))
    print(f"\n{summary}\n")
    for name in ("emoji.png", "sprites.webp", "grid.png", "denoising.gif", "loss.png", "report.md"):
        print(out / name)
    print(f"more samples:  tessera sample {run_dir} --classes 3,7 --per-class 4")
    print(f"in a browser:  tessera serve {run_dir} --runs {out}, then open http://127.0.0.1:7860")
    return accuracy


def _read_recipe(out: Path, seconds: float) -> tuple[Recipe, str]:
    """The recipe, and its training time as text: that of an earlier demo in `out`, or as many steps as fit the time."""
    overrides, saved = [f"run_dir={out / 'run'}"], out / "run" / RECIPE
    if saved.exists():
        recipe = read_recipe(saved, overrides)
        duration = f"{recipe.training.steps} steps, as started before"
        print(f"resuming the demo in {out}: {duration}; give another --out for a new one", flush=True)
        return recipe, duration
    path = RECIPES / "pretrained/dit-digits.yaml"
    recipe = read_recipe(path, overrides)
    print("measuring the speed of this machine", flush=True)
    estimate = dry_run(recipe, steps=10)
    steps = max(round(seconds / estimate.seconds_per_step), FEWEST)
    duration = f"{steps} steps of {estimate.seconds_per_step * 1000:.0f} ms, measured on this machine"
    print(
        f"training a DiT of {estimate.parameters:,} parameters for about "
        f"{format_duration(steps * estimate.seconds_per_step)}: {duration}",
        flush=True,
    )
    return read_recipe(path, [*overrides, f"training.steps={steps}"]), duration


def _sample_grid(model: bundle.Model, path: Path) -> None:
    """Write ten classes as columns and a seed in each row."""
    labels, seeds = list(range(10)) * ROWS, [row for row in range(ROWS) for _ in range(10)]
    grid = generation.generate(model, labels, seeds, batch_size=10 * ROWS)
    images.save_png(path, images.grid(_upscale(grid), 10, gap=4))


def _summary(accuracy: float, classifier: DigitClassifier) -> str:
    interval = Estimate.proportion(accuracy * COUNT, COUNT)
    return (
        f"{accuracy:.1%} of {COUNT} samples are classified as their class (95 % interval {interval.low:.1%} to "
        f"{interval.high:.1%});\nthe accuracy of the same classifier on {classifier.num_real} other real digits is "
        f"{classifier.real_accuracy:.1%}."
    )


def _upscale(digits: np.ndarray, factor: int = 6) -> np.ndarray:
    """uint8 [B, 8, 8, 1] -> [B, 48, 48, 1], dark on white, with bicubic interpolation."""
    side = digits.shape[1] * factor
    upscaled = [images.to_pil(255 - digit).resize((side, side), Image.Resampling.BICUBIC) for digit in digits]
    return np.stack([np.asarray(image)[..., None] for image in upscaled])


def _plot_loss(path: Path, run_dir: Path) -> None:
    from matplotlib.figure import Figure

    records = read_log(run_dir)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([record["step"] for record in records], [record["loss"] for record in records])
    axes.set(xlabel="step", ylabel="loss (mean squared error)", yscale="log")
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    files.atomic_write(path, buffer.getvalue())


def _report(
    recipe: Recipe, model: bundle.Model, duration: str, summary: str, classifier: DigitClassifier, samples: np.ndarray
) -> str:
    training, held_out = DigitsDataset(DigitsConfig(split="model")), DigitsDataset(DigitsConfig(split="ceiling"))
    real = training.images.transpose(0, 2, 3, 1)
    facts = "\n".join(f"| {name} | {value} |" for name, value in model_card.describe(model).items())
    loss = read_log(Path(recipe.run_dir))[-1]["loss"]
    rows = "\n".join(
        f"| {digit} | {classifier.accuracy(part, [digit] * PER_CLASS):.0%} | {spread(part):.2f} | "
        f"{spread(real[training.labels == digit]):.2f} |"
        for digit, part in enumerate(samples.reshape(10, PER_CLASS, *samples.shape[1:]))
    )
    return f"""# Handwritten digits by a diffusion transformer

{summary}

![a grid of digits: ten classes, eight seeds](grid.png)
![denoising](denoising.gif)
![loss](loss.png)

## Model
| | |
|---|---|
{facts}

Trained on {len(training)} scans: {duration}; batch {recipe.training.global_batch_size}, final loss {loss:.4f}, tessera
{tessera.__version__}. The recipe is `run/recipe.yaml`.

## Classes
Spread is the mean distance between two digits of a class (pixels in 0..1). A value far below that of real digits would
mean mode collapse.

| digit | accuracy | spread of samples | spread of real digits |
|---|---|---|---|
{rows}

## Memorization
Mean distance to the nearest training scan: samples {_nearest(samples, real):.2f}, held-out real digits
{_nearest(held_out.images.transpose(0, 2, 3, 1), real):.2f}. Copies would have 0.
"""


def spread(digits: np.ndarray) -> float:
    """Mean distance between two digits; uint8 [B, ...], distances of pixels in 0 .. 1."""
    return float(np.mean(_distances(digits, digits)[np.triu_indices(len(digits), 1)]))


def _nearest(digits: np.ndarray, real: np.ndarray) -> float:
    return float(_distances(digits, real).min(axis=1).mean())


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (array.reshape(len(array), -1) / 255.0 for array in (a, b))
    return np.sqrt(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0))
