"""One or a few steps instead of hundreds: distilled students against their teachers, and what each target costs.

    python benchmarks/few_steps.py run --out runs/few-steps [ARM ...]     # resumable
    python benchmarks/few_steps.py time --out runs/few-steps
    python benchmarks/few_steps.py report --out runs/few-steps

The teachers are "modern" of benchmarks/ablations.py on digits, trained where they are missing. FD of 2,000 generated
images, ten classes equally often, against all digits, and the share that a classifier reads as the requested digit. The
teacher is sampled with 25 DDIM steps and guidance 1.5, which the students have learned.
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
TEACHER = f"guidance_scale={GUIDANCE} num_steps=25 sampler=ddim"
SLOW = "training.optimizer.learning_rate=0.003 training.optimizer.adamw_learning_rate=0.001"  # they fail at 0.006
ARMS = {
    "alpha-flow": "",
    "mean-flow": f"training.distillation.target=mean-flow {SLOW}",
    "shortcut": f"training.distillation.target=shortcut {SLOW}",
}


def tessera(*arguments: str) -> None:
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    command = [sys.executable, "-m", "tessera", *arguments]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def score(model: Path, out: Path, settings: str, count: int) -> None:
    if not (out / "scores.json").exists():
        options = ("--metrics", "fd,oracle", "--reference", "digits", "--num-samples", str(count))
        tessera(
            "evaluate",
            "score",
            str(model),
            *options,
            "--class-policy",
            "balanced",
            "--out",
            str(out),
            *settings.split(),
        )


def folder(arm: str) -> str:
    return arm.replace(", ", "-").replace(" ", "-")


def teacher_of(out: Path, seed: int) -> Path:
    return out / "teachers" / ablations.folder("digits", MEMBER, seed)


def run(out: Path, arms: list[str], seeds: list[int], steps: int | None, count: int) -> None:
    for seed in seeds:
        teacher = teacher_of(out, seed)
        if not (out / f"scores/teacher-{seed}/scores.json").exists():
            ablations.run("digits", out / "teachers", [seed], [MEMBER], (1, 1), steps)
        score(teacher, out / f"scores/teacher-{seed}", TEACHER, count)
        for arm in arms:
            student = out / f"{folder(arm)}-{seed}"
            settings = (
                f"training.distillation.guidance_scale={GUIDANCE} training.seed={seed} training.tensorboard=false"
            )
            settings += f" evaluation.metrics=[fd] evaluation.num_samples=50 {ARMS[arm]}"
            tessera("distill", str(teacher), "--to", str(student), *settings.split())
            for number in STEPS:
                score(student, out / f"scores/{folder(arm)}-{seed}-{number}", f"num_steps={number}", count)


def measure_time(out: Path, rounds: int = 3) -> None:
    """CPU time of an image: 250 guided ancestral steps and the student's steps in turns, medians of the ratios."""
    import time

    import torch

    from tessera import generate, load

    torch.set_num_threads(1)
    teacher, student = load(str(teacher_of(out, 0))), load(str(out / "alpha-flow-0"))
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


def read(out: Path, name: str) -> dict[str, float] | None:
    path = out / "scores" / name / "scores.json"
    return {each["metric"]: each["value"] for each in json.loads(path.read_text())} if path.exists() else None


def report(out: Path) -> None:
    print("| model | steps | FD, each seed | more than its teacher | read as requested |\n|---|---|---|---|---|")
    teachers = {seed: scores for seed in range(10) if (scores := read(out, f"teacher-{seed}"))}
    fds = [scores["fd"] for scores in teachers.values()]
    shares = [scores["accuracy"] for scores in teachers.values()]
    print(f"| teacher | 25, guided | {values(fds)} | | {np.mean(shares):.1%} |")
    for arm in ARMS:
        for steps in STEPS:
            rows = {seed: scores for seed in teachers if (scores := read(out, f"{folder(arm)}-{seed}-{steps}"))}
            if rows:
                more = [scores["fd"] - teachers[seed]["fd"] for seed, scores in rows.items()]
                shares = [scores["accuracy"] for scores in rows.values()]
                fds = [scores["fd"] for scores in rows.values()]
                print(f"| {arm} | {steps} | {values(fds)} | {values(more)} | {np.mean(shares):.1%} |")


def values(numbers: list[float]) -> str:
    return " / ".join(f"{number:.3f}" for number in numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "time", "report"))
    parser.add_argument("--out", type=Path, default=Path("runs/few-steps"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, help="of the teachers (those of the ablations)")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("arms", nargs="*", default=[], help="some of the arms (all)")
    options = parser.parse_intermixed_args()
    if options.verb == "run":
        seeds = [int(seed) for seed in options.seeds.split(",")]
        return run(options.out, options.arms or list(ARMS), seeds, options.steps, options.samples)
    return measure_time(options.out) if options.verb == "time" else report(options.out)


if __name__ == "__main__":
    main()
