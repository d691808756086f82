"""One or a few steps instead of hundreds: distilled students against their teachers, and what each target costs.

    python benchmarks/few_steps.py run --out runs/few-steps [--data cifar10] [ARM ...]     # resumable
    python benchmarks/few_steps.py time --out runs/few-steps
    python benchmarks/few_steps.py report --out runs/few-steps
    python benchmarks/few_steps.py figure --out runs/few-steps [--data cifar10]      # writes figure.png

The teachers are "modern" of benchmarks/ablations.py, trained where they are missing; --teachers is a folder of its
runs. FD of 2,000 generated images, all classes equally often, against the training data, and of digits the share that a
classifier reads as the requested digit. The teacher is sampled with 25 DDIM steps, and with as many steps as the
students; its guidance scale is 1.5, which the students have learned.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import ablations
import numpy as np

GUIDANCE = 1.5
MEMBER = "modern (... + decaying rate)"
STEPS = (1, 2, 4, 8)
TEACHER = f"guidance_scale={GUIDANCE} sampler=ddim num_steps="
METRICS = {  # of each setting of benchmarks/ablations.py
    "digits": ("--metrics", "fd,oracle", "--reference", "digits"),
    "cifar10": ("--metrics", "fd", "--reference", "cifar10/train.npz", "--features", "cifar10/features"),
    "emoji": ("--metrics", "fd", "--reference", "emoji/train.npz", "--features", "emoji/features"),
}
ARMS = {
    "alpha-flow": "",
    "alpha-flow, current weights": "training.distillation.target_weights=current",
    "mean-flow": "training.distillation.target=mean-flow",
    "shortcut": "training.distillation.target=shortcut",
}


def tessera(*arguments: str) -> None:
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    command = [sys.executable, "-m", "tessera", *arguments]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def score(model: Path, out: Path, settings: str, count: int, data: str) -> None:
    if not (out / "scores.json").exists():
        policy = "data" if data == "emoji" else "balanced"  # its classes differ in size
        options = (*METRICS[data], "--num-samples", str(count), "--class-policy", policy, "--out", str(out))
        tessera("evaluate", "score", str(model), *options, *settings.split())


def folder(arm: str) -> str:
    return arm.replace(", ", "-").replace(" ", "-")


def teacher_of(teachers: Path, data: str, seed: int) -> Path:
    return teachers / ablations.folder(data, MEMBER, seed)


def run(
    out: Path, teachers: Path, data: str, arms: list[str], seeds: list[int], steps: int | None, count: int
) -> None:  # fmt: skip
    for seed in seeds:
        teacher = teacher_of(teachers, data, seed)
        if not (out / f"scores/teacher-{seed}/scores.json").exists():
            ablations.run(data, teachers, [seed], [MEMBER], (1, 1), steps)
        score(teacher, out / f"scores/teacher-{seed}", TEACHER + "25", count, data)
        for number in STEPS:
            score(teacher, out / f"scores/teacher-{seed}-{number}", TEACHER + str(number), count, data)
        for arm in arms:
            student = out / f"{folder(arm)}-{seed}"
            settings = (
                f"training.distillation.guidance_scale={GUIDANCE} training.seed={seed} training.tensorboard=false"
            )
            settings += f" evaluation.metrics=[fd] evaluation.num_samples=50 {ARMS[arm]}"
            tessera("distill", str(teacher), "--to", str(student), *settings.split())
            for number in STEPS:
                score(student, out / f"scores/{folder(arm)}-{seed}-{number}", f"num_steps={number}", count, data)


def measure_time(out: Path, teachers: Path, rounds: int = 3) -> None:
    """CPU time of an image: 250 guided ancestral steps and the student's steps in turns, medians of the ratios."""
    import time

    import torch

    from tessera import generate, load

    torch.set_num_threads(1)
    teacher, student = load(str(teacher_of(teachers, "digits", 0))), load(str(out / "alpha-flow-0"))
    seeds, classes = list(range(100)), list(range(10)) * 10
    ratios: dict[int, list[float]] = {steps: [] for steps in (1, 2)}

    def seconds(model, **settings) -> float:
        began = time.process_time()
        generate(model, classes, seeds, batch_size=100, **settings)
        return time.process_time() - began

    ways = {steps: {"num_steps": steps} for steps in ratios}
    for number in range(rounds + 1):
        slow = seconds(teacher, sampler="sde", num_steps=250, guidance_scale=GUIDANCE)
        for steps, settings in ways.items():
            if number:
                ratios[steps].append(slow / seconds(student, **settings))
            else:
                seconds(student, **settings)
    for steps, values in ratios.items():
        print(f"{steps} steps: {np.median(values):.0f} x less time than 250 guided steps")


def figure(out: Path, teachers: Path, data: str, per_class: int = 2) -> None:
    """Images of a teacher above those of its student, from equal seeds."""
    from PIL import Image, ImageDraw

    from tessera import generate, load

    teacher, student = load(str(teacher_of(teachers, data, 0))), load(str(out / "alpha-flow-0"))
    classes = [label for label in range(teacher.config.network.num_classes) for _ in range(per_class)]
    seeds = list(range(len(classes)))
    rows = {"25 guided": generate(teacher, classes, seeds, guidance_scale=GUIDANCE, sampler="ddim", num_steps=25)}
    rows |= {f"student, {steps}": generate(student, classes, seeds, num_steps=steps) for steps in (1, 2, 4)}
    side = rows["25 guided"].shape[1]
    scale, margin, gap = max(1, 64 // side), 90, 2
    cell = side * scale + gap
    image = Image.new("RGB", (margin + len(classes) * cell, len(rows) * cell), "white")
    for row, (name, images) in enumerate(rows.items()):
        ImageDraw.Draw(image).text((4, row * cell + cell // 2 - 6), name, fill="black")
        for column, pixels in enumerate(images):
            large = pixels.squeeze().repeat(scale, axis=0).repeat(scale, axis=1)
            image.paste(Image.fromarray(large), (margin + column * cell, row * cell))
    image.save(out / "figure.png")


def read(out: Path, name: str) -> dict[str, float] | None:
    path = out / "scores" / name / "scores.json"
    return {each["metric"]: each["value"] for each in json.loads(path.read_text())} if path.exists() else None


def report(out: Path) -> None:
    print("| model | steps | FD, each seed | more than its teacher | read as requested |\n|---|---|---|---|---|")
    teachers = {seed: scores for seed in range(10) if (scores := read(out, f"teacher-{seed}"))}
    best = {seed: scores["fd"] for seed, scores in teachers.items()}
    print(row("teacher", "25, guided", teachers, {}))
    for arm in ("teacher", *ARMS):
        for steps in STEPS:
            rows = {seed: scores for seed in teachers if (scores := read(out, f"{folder(arm)}-{seed}-{steps}"))}
            if rows:
                print(row(arm, f"{steps}, guided" if arm == "teacher" else str(steps), rows, best))


def row(name: str, steps: str, scores: dict[int, dict[str, float]], best: dict[int, float]) -> str:
    """A row of the table: the scores of each seed, and the difference from the best FD of the seed's teacher."""
    more = values([each["fd"] - best[seed] for seed, each in scores.items()]) if best else ""
    shares = [each["accuracy"] for each in scores.values() if "accuracy" in each]
    share = f"{np.mean(shares):.1%}" if shares else ""
    return f"| {name} | {steps} | {values([each['fd'] for each in scores.values()])} | {more} | {share} |"


def values(numbers: list[float]) -> str:
    return " / ".join(f"{number:.3f}" for number in numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "time", "report", "figure"))
    parser.add_argument("--out", type=Path, default=Path("runs/few-steps"))
    parser.add_argument("--data", choices=METRICS, default="digits")
    parser.add_argument("--teachers", type=Path, help="runs of benchmarks/ablations.py (OUT/teachers)")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, help="of the teachers (those of the ablations)")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("arms", nargs="*", default=[], help="some of the arms (all)")
    options = parser.parse_intermixed_args()
    teachers = options.teachers or options.out / "teachers"
    if options.verb == "run":
        seeds = [int(seed) for seed in options.seeds.split(",")]
        arms = options.arms or list(ARMS)
        return run(options.out, teachers, options.data, arms, seeds, options.steps, options.samples)
    if options.verb == "figure":
        return figure(options.out, teachers, options.data)
    return measure_time(options.out, teachers) if options.verb == "time" else report(options.out)


if __name__ == "__main__":
    main()
