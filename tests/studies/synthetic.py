"""Synthetic results of studies, from a known law. Loaded by the fixture `synthetic`."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tessera import images
from tessera.evaluation.protocol import Protocol, Score
from tessera.reporting.estimates import Estimate
from tessera.studies.results import MemberResult, SamplingPoint, TrainingPoint
from tessera.studies.study import Study, members

SIZES = {"S": 0.05, "B": 0.2, "L": 0.7, "XL": 1.2}  # GMACs at patch 2
PATCHES = {"4": 0.25, "2": 1.0}
BATCH = 64


@cache
def _score(metric: str, steps: int, features: str) -> Score:
    protocol = Protocol(
        definition={"metric": metric},
        features={"name": "digits", "weights": features},
        reference={"hash": "ef01", "count": 1797},
        samples=1000,
        size=(8, 8),
        channels=1,
        sampling={"sampler": {"kind": "ddim"}, "num_steps": steps, "guidance_scale": 1.0, "seeds": "0-999"},
    )
    return Score.from_estimate(metric, Estimate(1, 1, 1), protocol, {}, "cpu")


def score(metric: str, value: float, steps: int = 50, features: str = "abcd") -> Score:
    """A score with an interval of 3 % to each side."""
    numbers = {"value": value, "low": 0.97 * value, "high": 1.03 * value}
    return _score(metric, steps, features).model_copy(update=numbers)


def scaling_study(**changes: Any) -> Study:
    settings: dict[str, Any] = {
        "question": "Does more compute mean a lower Fréchet distance?",
        "recipe": "digits.yaml",
        "output": "runs/scaling",
        "axes": {
            "size": {size: {"network.depth": depth} for depth, size in enumerate(SIZES, start=1)},
            "patch_size": {patch: {"network.patch_size": int(patch)} for patch in PATCHES},
        },
        "budget": {"steps": 2000},
        "marks": {"steps": [500]},
        "sampling_steps": [4, 16, 64],
        "law": {"held_out": 1},
    }
    return Study.model_validate(settings | changes)


def scaling_results(
    study: Study, exponent: float = 0.4, noise: float = 0.02, grids: Path | None = None, seed: int = 0
) -> list[MemberResult]:
    """fd = (2 GMACs^-exponent) (steps / 2000)^-0.3, with noise in its logarithm."""
    random, results = np.random.default_rng(seed), []
    for number, member in enumerate(members(study)):
        macs = SIZES[member.values["size"]] * PATCHES[member.values["patch_size"]] * 1e9

        def fd(steps: int, macs: float = macs) -> float:
            factor = float(np.exp(noise * random.standard_normal()))
            return 2 * (macs / 1e9) ** -exponent * (steps / 2000) ** -0.3 * factor

        points = [
            TrainingPoint(
                step, step * BATCH, 6 * macs * step * BATCH, step * macs / 2e9 + step * 0.01,
                {"fd": score("fd", fd(step)), "kid": score("kid", fd(step) / 100)},
            )
            for step in (250, 500, 1000, 2000)
        ]  # fmt: skip
        final = points[-1].scores["fd"].value
        sampling_points = [
            SamplingPoint(n, n * macs, {"fd": score("fd", final * (1 + 4 / n), steps=n)}) for n in study.sampling_steps
        ]
        grid = grids / f"{member.name}.png" if grids else None
        if grid:
            images.save_png(grid, images.grid(random.integers(0, 255, (40, 32, 32, 1), np.uint8), 10))
        results.append(
            MemberResult(
                member.name, member.values, member.seed, "done", None, 10_000 * (number + 1), macs,
                points[-1].seconds * 0.9, points, sampling_points, grid,
            )
        )  # fmt: skip
    return results


def design_study(**changes: Any) -> Study:
    settings: dict[str, Any] = {
        "question": "Which block design is best?",
        "recipe": "digits.yaml",
        "output": "runs/blocks",
        "axes": {"design": {name: {"network.block": name} for name in ("in-context", "cross-attention", "adaln-zero")}},
        "seeds": [0, 1, 2],
        "budget": {"steps": 1000},
        "marks": {"steps": [250, 500]},
        "compare": {"axis": "design", "baseline": "in-context"},
    }
    return Study.model_validate(settings | changes)


def design_results(study: Study, noise: float = 0.03) -> list[MemberResult]:
    """adaln-zero is far better; cross-attention is equal at more compute; seeds shift all designs equally."""
    random, results = np.random.default_rng(0), []
    level = {"in-context": (3.0, 0.10), "cross-attention": (3.0, 0.12), "adaln-zero": (1.5, 0.10)}
    shift = {seed: 1 + 0.2 * random.standard_normal() for seed in study.seeds}
    for member in members(study):
        value, gmacs = level[member.values["design"]]
        points = []
        for step in (250, 500, 1000):
            fd = value * shift[member.seed] * (step / 1000) ** -0.5 * (1 + noise * random.standard_normal())
            flops = 6 * gmacs * 1e9 * step * BATCH
            points.append(TrainingPoint(step, step * BATCH, flops, step * gmacs, {"fd": score("fd", fd)}))
        results.append(
            MemberResult(
                member.name, member.values, member.seed, "done", None, 50_000, gmacs * 1e9,
                100.0, points, [], None,
            )
        )  # fmt: skip
    return results


def equal_flops_study(**changes: Any) -> Study:
    settings: dict[str, Any] = {
        "question": "Which size is best at equal training FLOPs?",
        "recipe": "digits.yaml",
        "output": "runs/sizes",
        "axes": {"size": {name: {"network.depth": depth} for depth, name in enumerate(SIZES, start=1)}},
        "seeds": [0, 1],
        "budget": {"flops": 1e15},
        "marks": {"flops": [1e13, 1e14, 2e14]},
    }
    return Study.model_validate(settings | changes)


def equal_flops_results(study: Study, metric: str = "fd") -> list[MemberResult]:
    """fd has its minimum at 0.4 (FLOPs / 1e15)^0.5 GMACs; seeds shift it by 2 %."""
    results = []
    for member in members(study):
        gmacs = SIZES[member.values["size"]]
        per_step = 6 * gmacs * 1e9 * BATCH
        points = []
        for flops in (*study.marks.flops, study.budget.flops):
            step = max(1, round(flops / per_step))
            distance = np.log(gmacs / (0.4 * (flops / 1e15) ** 0.5))
            value = (flops / 1e15) ** -0.3 * float(np.exp(0.3 * distance**2)) * (1 + 0.02 * member.seed)
            points.append(TrainingPoint(step, step * BATCH, step * per_step, 1.0, {metric: score(metric, value)}))
        results.append(
            MemberResult(
                member.name, member.values, member.seed, "done", None, 50_000, gmacs * 1e9, 1.0, points, [], None
            )
        )
    return results
