"""Each fault is named, and nothing else: on the files of runs made up for it, and none of a healthy one."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tessera.diffusion import FlowMatchingConfig, GaussianDiffusionConfig
from tessera.errors import TesseraError
from tessera.monitoring.doctor import diagnose, facts, page
from tessera.monitoring.history import Guesses
from tessera.settings import override, validate, write_yaml
from tessera.training.recipe import Recipe

RECIPE: dict[str, Any] = {
    "output": "run",
    "data": {"kind": "digits"},
    "network": {
        "input_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "num_classes": 10,
        "patch_size": 2,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
    },
    "process": {"kind": "flow"},
    "training": {"steps": 4000, "batch": 64, "optimizer": {"learning_rate": 1e-3, "clip": 1.0, "warmup": 50}},
}
LATENTS = ("codec.kind=autoencoder-kl", "codec.source=somewhere")
Change = Callable[[int, dict[str, Any]], Any]


def record(step: int) -> dict[str, Any]:
    """What a healthy run logs: a loss that falls from 2 to 0.5, unevenly, where guessing number by number has 1.57."""
    uneven = 0.02 * math.sin(step)
    loss = 0.5 + 1.5 * math.exp(-step / 150) + uneven
    return {
        "step": step, "loss": loss, "mse": loss,
        "gradient_norm": 0.4 + math.exp(-step / 100) + uneven, "learning_rate": 1e-3, "images_per_second": 100.0,
        "utilisation": 0.4, "stalled": 0.01, "clipped": 0.0, "kept_out": 0, "rollbacks": 0, "skipped": 0,
        "epoch": step * 64 / 1000, "memory": 1,
    }  # fmt: skip


def look(step: int) -> dict[str, Any]:
    """What a look inside a healthy run finds."""
    grown, uneven = 1 - math.exp(-step / 150), 0.02 * math.sin(step)
    loss = 2 - 1.5 * grown + uneven
    return {
        "step": step, "loss_by_time": [0.5 + 1.5 * math.exp(-step / 150)] * 10, "ema_distance": 0.03,
        "gradient_norms": {"readout": 0.4}, "attention_logits": [3 + 5 * grown, 4.0],
        "gates": [0.2 * grown, 0.3 * grown],
        "scales": [0.4 * grown, 0.3 * grown], "activations": [1.0, 1.2], "loss_probe": loss, "loss_ema": 0.99 * loss,
        "loss_wrong_labels": loss + 0.05 * grown + 0.01 * math.cos(step), "dead_patches": 0.0,
        "still_patches": 0.1, "data_mean": 0.0, "data_std": 1.0, "data_spread": 1.0,
    }  # fmt: skip


def says(**told: Any) -> Change:
    """A change that sets values, each a constant or a function of the step."""

    def change(step: int, values: dict[str, Any]) -> None:
        values |= {name: value(step) if callable(value) else value for name, value in told.items()}

    return change


def drop(*names: str) -> Change:
    def change(step: int, values: dict[str, Any]) -> None:
        for name in names:
            del values[name]

    return change


@pytest.fixture
def made(tmp_path) -> Callable[..., Path]:
    """A run's folder: healthy, but for changes of the recipe, of records and of looks (step, values -> None)."""

    def make(
        *changes: str,
        log: Change = lambda step, values: None,
        health: Change = lambda step, values: None,
        steps: int = 4000,
    ) -> Path:
        recipe = validate(Recipe, override(RECIPE, list(changes)), "the test's recipe")
        (tmp_path / "recipe.yaml").write_text(write_yaml(recipe))
        for name, maker, change, every in (("log", record, log, 20), ("health", look, health, 100)):
            lines = []
            for step in range(every, steps + 1, every):
                values = maker(step)
                change(step, values)
                lines.append(json.dumps(values) + "\n")
            (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        return tmp_path

    return make


# Healthy runs


@pytest.mark.parametrize("steps", [0, 100, 200, 600, 1000, 2000, 4000])
def test_a_healthy_run_is_left_in_peace_at_every_age(made, steps):
    assert diagnose(made(steps=steps)) == []


@pytest.mark.parametrize(
    ("changes", "log", "health"),
    [
        ((), says(clipped=lambda step: float(step < 200)), says()),
        ((), says(gradient_norm=lambda step: 0.4 + 20 * math.exp(-step / 20)), says()),
        (("training.optimizer.warmup_steps=0",), says(gradient_norm=lambda step: 0.4 + 20 * math.exp(-step / 20)), says()),
        ((), says(kept_out=lambda step: int(step > 900)), says()),
        ((), says(skipped=9), says()),
        (LATENTS, says(), says(data_std=0.8, data_spread=0.7, data_mean=-0.3)),
        ((), says(), says(data_std=0.4, data_mean=0.8, data_spread=0.3)),  # pixels may be of any brightness
        (("training.label_dropout=0", "sampling.guidance_scale=1"), says(), says()),
        (("training.steps=400000", "training.ema.decay=0.9999"), says(), says(loss_ema=1.8)),  # still catching up
        (("network.num_classes=0",), says(), drop("loss_wrong_labels")),
        ((), says(), says(loss_wrong_labels=lambda step: look(step)["loss_probe"] * (1.002 + 0.001 * math.sin(step)))),
        ((), says(), drop("gates", "scales")),
        ((), says(), says(attention_logits=[170.0, 60.0])),  # high, but steady
        ((), says(), says(loss_by_time=[None, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.6, None])),
        ((), says(), says(still_patches=0.5, dead_patches=0.05)),
    ],
)  # fmt: skip
def test_what_is_unusual_but_right_is_no_fault(made, changes, log, health):
    assert diagnose(made(*changes, log=log, health=health)) == []


def test_a_run_that_was_never_looked_into_is_judged_by_its_log(made):
    run = made()
    (run / "health.jsonl").unlink()
    assert diagnose(run) == []
    assert "training.health_every" in facts(run)["health"]


# Faults: name, severity, a piece of the evidence, the key to change


def risen(step: int) -> float:
    return record(step)["mse"] + (0.4 if step > 3500 else 0)


def thrown(step: int) -> float:
    return 3.0 if step <= 100 else 1.55


FAULTS = {
    "pictures hardly differ": ((), says(), says(data_spread=0.01), "wrong", "0.01", "data.path"),
    "much of every picture is the same": ((), says(), says(still_patches=0.9), "watch", "0.90", "data.path"),
    "latents not scaled": (
        LATENTS, says(), says(data_std=5.0, data_spread=4.5), "wrong", "standard deviation 5", "multiply it by 0.2",
    ),
    "unusable images": ((), says(skipped=300), says(), "wrong", "300 of about 1000", "data.upscale"),
    "learning rate too high": (
        (), says(mse=risen), says(), "wrong", "0.9", "training.optimizer.learning_rate=0.0001",
    ),
    "nothing learned": (
        (), says(mse=1.9), says(), "wrong", "1.9", "training.optimizer.learning_rate=0.003",
    ),
    "no warm-up": (
        ("training.optimizer.warmup_steps=0",),
        says(mse=lambda step: 9.0 if step == 20 else record(step)["mse"],
             gradient_norm=lambda step: 90.0 if step == 20 else 0.4),
        says(), "wrong", "gradient norm 90 by step 20", "training.optimizer.warmup_steps=80",
    ),
    "attention logits grow": (
        (), says(), says(attention_logits=lambda step: [4.0, step / 20]), "wrong", "5 at step 100",
        "network.block=rope-swiglu",
    ),
    "guidance without label dropout": (
        ("training.label_dropout=0", "sampling.guidance_scale=1.5"), says(), says(), "wrong", "1.5",
        "training.label_dropout=0.1",
    ),
    "labels tell nothing": (
        (), says(), says(loss_wrong_labels=lambda step: look(step)["loss_probe"] + 1e-3 * math.cos(step)),
        "wrong", "probes", "data.classes=none",
    ),
    "most labels withheld": (
        ("training.label_dropout=0.8",), says(), says(), "watch", "0.8", "training.label_dropout=0.1",
    ),
    "average too slow": (
        ("training.ema.decay=0.9999",), says(), says(loss_ema=1.2), "wrong", "10000 steps", "training.ema.decay=0.995",
    ),
    "gradients grow": (
        (), says(gradient_norm=lambda step: 0.1 + 4 * (step / 4000) ** 8), says(), "watch", "0.1",
        "training.optimizer.grad_clip_norm",
    ),
    "every gradient is clipped": (
        (), says(clipped=0.97, gradient_norm=3.0), says(), "watch", "97%", "training.optimizer.grad_clip_norm=6",
    ),
    "off near the noise": (
        (), says(), says(loss_by_time=[0.5] * 9 + [2.0]), "watch", "0.9 to 1", "process.shift above 1",
    ),
    "dead patches": ((), says(), says(dead_patches=0.4), "watch", "0.40", "training.optimizer.learning_rate"),
    "gates never opened": ((), says(), says(gates=[0.2, 0.001]), "watch", "blocks 1", "network.depth=1"),
    "waiting for data": ((), says(stalled=0.5), says(), "watch", "50%", "training.num_workers=4"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_and_nothing_else(made, name):
    changes, log, health, severity, evidence, change = FAULTS[name]
    found = diagnose(made(*changes, log=log, health=health))
    assert [finding.name for finding in found] == [name]
    assert found[0].severity == severity
    assert evidence in found[0].evidence
    assert change in found[0].change


def test_off_near_the_data(made):
    found = diagnose(made(health=says(loss_by_time=[2.0] + [0.5] * 9)))
    assert [finding.name for finding in found] == ["off near the data"]


@pytest.mark.parametrize(
    "log",
    [
        says(rollbacks=2),
        says(kept_out=lambda step: step // 100),
        says(mse=thrown),
        says(mse=lambda step: 30.0 if step <= 100 else record(step)["mse"]),
    ],
)
def test_ways_to_see_that_a_rate_is_too_high(made, log):
    """With tokens that grew to a size no healthy network has, where the loss alone would not tell."""
    found = diagnose(made(log=log, health=says(activations=[1.0, 2e3])))
    assert found[0].name == "learning rate too high"
    assert "training.optimizer.learning_rate=0.0001" in found[0].change


def test_the_batches_left_out_are_named(made):
    run = made(log=says(rollbacks=1))
    left_out = {
        "step": 700,
        "position": 44800,
        "outcome": "skipped",
        "why": "the loss is not a number",
        "samples": ["a"],
    }
    (run / "passed.jsonl").write_text(json.dumps(left_out) + "\n")
    assert "step 700: the loss is not a number" in diagnose(run)[0].evidence


def test_both_rates_of_muon_are_lowered(made):
    words = ("training.optimizer.kind=muon", "training.optimizer.learning_rate=0.02")
    found = diagnose(made(*words, "training.optimizer.adamw_learning_rate=0.01", log=says(rollbacks=1)))
    assert "learning_rate=0.002 and training.optimizer.adamw_learning_rate=0.001" in found[0].change


def test_a_block_with_qk_norm_is_not_told_to_have_it(made):
    found = diagnose(made("network.block=rope-swiglu", health=says(attention_logits=lambda step: [4.0, step / 20])))
    assert [finding.name for finding in found] == ["attention logits grow"]
    assert "qk_norm" not in found[0].change


def test_attention_that_is_one_hot_need_not_grow(made):
    found = diagnose(made(health=says(attention_logits=[4.0, 3e3])))
    assert [(finding.name, finding.severity) for finding in found] == [("attention one-hot", "wrong")]


def test_labels_learned_by_heart_are_watched(made):
    cost = says(loss_wrong_labels=lambda step: look(step)["loss_probe"] * (1.0005 + 1e-4 * math.cos(step)))
    found = diagnose(made(health=cost))
    assert [(finding.name, finding.severity) for finding in found] == [("labels tell nothing", "watch")]


def test_an_idle_gpu_is_told_by_its_checkpoint(made, make_model):
    from tessera import bundle

    run = made(log=says(utilisation=0.05))
    assert diagnose(run) == []  # not known to be a GPU
    model = make_model()
    described = model.config.model_copy(update={"origin": {"trained by": "tessera 0, torch 2, on cuda"}})
    bundle.save(bundle.Model(described, model.network), run / "checkpoints/step-000004000")
    found = diagnose(run)
    assert [finding.name for finding in found] == ["GPU hardly busy"]
    assert "training.global_batch_size=128" in found[0].change


def test_the_cause_stands_first_and_the_grave_before_the_rest(made):
    run = made(
        *LATENTS,
        log=says(stalled=0.5, clipped=1.0, rollbacks=3),
        health=says(data_std=5.0, data_spread=4.5, attention_logits=lambda step: [step, 1.0]),
    )
    names = [finding.name for finding in diagnose(run)]
    assert names == [
        "latents not scaled", "learning rate too high", "attention logits grow", "every gradient is clipped",
        "waiting for data",
    ]  # fmt: skip
    told = page(run)
    assert told.startswith("1. wrong: latents not scaled\n")
    assert "\n2. wrong: learning rate too high\n" in told


def test_values_that_are_not_numbers_are_passed_by(made):
    def broken(step, values):
        values |= dict.fromkeys(("loss_probe", "loss_ema", "loss_wrong_labels", "data_std"))
        values["activations"] = values["attention_logits"] = [None, None]

    run = made(log=says(gradient_norm=math.nan), health=broken)
    assert diagnose(run) == []
    assert "largest attention logit" not in facts(run)


def test_damaged_lines_are_passed_by(made):
    run = made(health=drop("loss_by_time", "attention_logits", "activations", "data_spread"))
    for name in ("log", "health", "passed"):
        with (run / f"{name}.jsonl").open("a") as file:
            file.write('3\n{"loss": 1}\n{"step": null}\n{"step": 41')
    assert diagnose(run) == []


def test_a_healthy_run_is_told_in_numbers(made):
    told = page(made())
    assert told.startswith("nothing wrong found\n")
    for piece in ("4000 of 4000", "guessing each number by itself 1.57, answering zero 2", "0.990 of the weights'"):
        assert piece in told


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(TesseraError, match="holds no run"):
        diagnose(tmp_path)


# What losses are held against


@pytest.mark.parametrize(
    "process",
    [
        FlowMatchingConfig(),
        FlowMatchingConfig(prediction="x0", path="gvp", loss="x0", shift=2.0),
        GaussianDiffusionConfig(),
        GaussianDiffusionConfig(schedule={"kind": "cosine"}, prediction="v"),
    ],
)
def test_guesses_are_what_least_squares_finds(process):
    """Regress the target on x_t and a constant, at each of some times, on drawn data of mean 0.5 and spread 0.6."""
    built = process.build()
    t = built.sample_timesteps((torch.arange(40) + 0.5) / 40)
    drawn = torch.Generator().manual_seed(0)
    x0 = 0.5 + 0.6 * torch.randn(40, 20_000, generator=drawn, dtype=torch.float64)
    noise = torch.randn(40, 20_000, generator=drawn, dtype=torch.float64)
    x, target = built.mix(x0, noise, t).numpy(), built.target(x0, noise, t).numpy()
    errors = []
    for seen, wanted in zip(x, target):
        told = np.stack((seen, np.ones_like(seen)), axis=1)
        errors.append(np.mean((told @ np.linalg.lstsq(told, wanted, rcond=None)[0] - wanted) ** 2))
    guesses = Guesses.of(built, average=0.5, std=0.6, spread=0.6)
    assert guesses.nothing == pytest.approx(np.mean(target**2), rel=0.02)
    assert guesses.linear == pytest.approx(np.mean(errors), rel=0.04)


def test_guesses_by_time_are_parts_of_the_whole():
    guesses = Guesses.of(FlowMatchingConfig().build(), average=0.0, std=1.0, spread=1.0)
    assert np.mean(guesses.linear_by_time) == pytest.approx(guesses.linear, rel=1e-6)
    assert guesses.nothing_by_time == pytest.approx([2.0] * 10)


def test_times_that_are_never_drawn_have_no_guess():
    narrow = FlowMatchingConfig(timestep_sampling={"kind": "logit-normal", "std": 0.2}).build()
    guesses = Guesses.of(narrow, average=0.0, std=1.0, spread=1.0)
    assert guesses.linear_by_time[0] is None
    assert guesses.linear_by_time[5] is not None
