"""Every problem has exactly its finding, on the files of artificial runs; a healthy run has none."""

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
from tessera.monitoring.doctor import as_text, diagnose, facts
from tessera.monitoring.history import Baselines
from tessera.settings import apply_overrides, to_yaml, validate
from tessera.training.recipe import Recipe

RECIPE: dict[str, Any] = {
    "run_dir": "run",
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
    "diffusion": {"kind": "flow"},
    "training": {
        "steps": 4000,
        "global_batch_size": 64,
        "optimizer": {"learning_rate": 1e-3, "grad_clip_norm": 1.0, "warmup_steps": 50},
    },
}
LATENTS = ("codec.kind=autoencoder-kl", "codec.source=somewhere")
BOTH = ("network.block={kind: rope-swiglu, text: keys}", "network.vocabulary_size=300")
CAPTIONS = (*BOTH, "network.num_classes=0")
Change = Callable[[int, dict[str, Any]], Any]


def record(step: int) -> dict[str, Any]:
    """The log of a healthy run: a loss that falls from 2 to 0.5, unevenly; the linear baseline is 1.57."""
    uneven = 0.02 * math.sin(step)
    loss = 0.5 + 1.5 * math.exp(-step / 150) + uneven
    return {
        "step": step, "loss": loss, "mse": loss,
        "grad_norm": 0.4 + math.exp(-step / 100) + uneven, "learning_rate": 1e-3, "images_per_second": 100.0,
        "mfu": 0.4, "data_wait": 0.01, "clipped": 0.0, "skipped_steps": 0, "rollbacks": 0, "invalid_samples": 0,
        "epoch": step * 64 / 1000, "memory": 1,
    }  # fmt: skip


def probe(step: int) -> dict[str, Any]:
    """The health record of a healthy run."""
    grown, uneven = 1 - math.exp(-step / 150), 0.02 * math.sin(step)
    loss = 2 - 1.5 * grown + uneven
    return {
        "step": step, "loss_by_timestep": [0.5 + 1.5 * math.exp(-step / 150)] * 10, "ema_distance": 0.03,
        "grad_norms": {"head": 0.4}, "attention_logits": [3 + 5 * grown, 4.0],
        "gates": [0.2 * grown, 0.3 * grown],
        "scales": [0.4 * grown, 0.3 * grown], "activations": [1.0, 1.2], "loss_probe": loss, "loss_ema": 0.99 * loss,
        "loss_wrong_labels": loss + 0.05 * grown + 0.01 * math.cos(step), "dead_patches": 0.0,
        "still_patches": 0.1, "data_mean": 0.0, "data_std": 1.0, "data_spread": 1.0,
    }  # fmt: skip


def values(**settings: Any) -> Change:
    """A change that sets values, each a constant or a function of the step."""

    def change(step: int, record: dict[str, Any]) -> None:
        record |= {name: value(step) if callable(value) else value for name, value in settings.items()}

    return change


def drop(*names: str) -> Change:
    def change(step: int, record: dict[str, Any]) -> None:
        for name in names:
            del record[name]

    return change


@pytest.fixture
def made(tmp_path) -> Callable[..., Path]:
    """The folder of a healthy run, with changes of the recipe, of log records and of health records."""

    def make(
        *changes: str,
        log: Change = lambda step, record: None,
        health: Change = lambda step, record: None,
        steps: int = 4000,
    ) -> Path:
        recipe = validate(Recipe, apply_overrides(RECIPE, list(changes)), "the test's recipe")
        (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
        for name, maker, change, every in (("log", record, log, 20), ("health", probe, health, 100)):
            lines = []
            for step in range(every, steps + 1, every):
                contents = maker(step)
                change(step, contents)
                lines.append(json.dumps(contents) + "\n")
            (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        return tmp_path

    return make


# Healthy runs


@pytest.mark.parametrize("steps", [0, 100, 200, 600, 1000, 2000, 4000])
def test_a_healthy_run_has_no_findings_at_any_age(made, steps):
    assert diagnose(made(steps=steps)) == []


@pytest.mark.parametrize(
    ("changes", "log", "health"),
    [
        ((), values(clipped=lambda step: float(step < 200)), values()),
        ((), values(grad_norm=lambda step: 0.4 + 20 * math.exp(-step / 20)), values()),
        (
            ("training.optimizer.warmup_steps=0",),
            values(grad_norm=lambda step: 0.4 + 20 * math.exp(-step / 20)),
            values(),
        ),
        ((), values(skipped_steps=lambda step: int(step > 900)), values()),
        ((), values(invalid_samples=9), values()),
        (LATENTS, values(), values(data_std=0.8, data_spread=0.7, data_mean=-0.3)),
        ((), values(), values(data_std=0.4, data_mean=0.8, data_spread=0.3)),  # pixels may be of any brightness
        (("training.condition_dropout=0", "sampling.guidance_scale=1"), values(), values()),
        ((*CAPTIONS, "training.condition_dropout=0", "sampling.guidance_scale=1"), values(), values()),
        ((*CAPTIONS, "sampling.guidance_scales={text: 3}"), values(), values()),
        ((*CAPTIONS, "training.condition_dropout=0", "training.field_dropout={text: 0.1}", "sampling.guidance_scale=4"),
         values(), values()),
        (("network.num_classes=0", "training.condition_dropout=0", "sampling.guidance_scale=4"), values(), values()),
        (("training.steps=400000", "training.ema.decay=0.9999"), values(), values(loss_ema=1.8)),  # still catching up
        (("network.num_classes=0",), values(), drop("loss_wrong_labels")),
        (
            (),
            values(),
            values(loss_wrong_labels=lambda step: probe(step)["loss_probe"] * (1.002 + 0.001 * math.sin(step))),
        ),
        ((), values(), drop("gates", "scales")),
        ((), values(), values(loss_wrong_captions=lambda step: 1.02 * probe(step)["loss_probe"])),
        ((), values(), values(attention_logits=[170.0, 60.0])),  # high, but steady
        ((), values(), values(loss_by_timestep=[None, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.6, None])),
        ((), values(), values(still_patches=0.5, dead_patches=0.05)),
        ((), values(), values(average_velocity_error=lambda step: {"1 to 0": 0.5 if step < 900 else 0.05})),
    ],
)  # fmt: skip
def test_unusual_but_correct_runs_have_no_findings(made, changes, log, health):
    assert diagnose(made(*changes, log=log, health=health)) == []


def test_a_run_without_health_records_is_judged_by_its_log(made):
    run = made()
    (run / "health.jsonl").unlink()
    assert diagnose(run) == []
    assert "training.health_every" in facts(run)["health"]


# Findings: name, changes, severity, part of the evidence, the key to change


def risen(step: int) -> float:
    return record(step)["mse"] + (0.4 if step > 3500 else 0)


def stuck(step: int) -> float:
    return 3.0 if step <= 100 else 1.55


FINDINGS = {
    "images hardly differ": ((), values(), values(data_spread=0.01), "error", "0.01", "data.path"),
    "most of each image is constant": ((), values(), values(still_patches=0.9), "warning", "0.90", "data.path"),
    "latents not normalized": (
        LATENTS, values(), values(data_std=5.0, data_spread=4.5), "error", "standard deviation 5", "multiply it by 0.2",
    ),
    "invalid images": ((), values(invalid_samples=300), values(), "error", "300 of about 1000", "data.upscale"),
    "learning rate too high": (
        (), values(mse=risen), values(), "error", "0.9", "training.optimizer.learning_rate=0.0001",
    ),
    "nothing learned": (
        (), values(mse=1.9), values(), "error", "1.9", "training.optimizer.learning_rate=0.003",
    ),
    "no warm-up": (
        ("training.optimizer.warmup_steps=0",),
        values(mse=lambda step: 9.0 if step == 20 else record(step)["mse"],
             grad_norm=lambda step: 90.0 if step == 20 else 0.4),
        values(), "error", "gradient norm 90 by step 20", "training.optimizer.warmup_steps=80",
    ),
    "attention logits grow": (
        (), values(), values(attention_logits=lambda step: [4.0, step / 20]), "error", "5 at step 100",
        "network.block=rope-swiglu",
    ),
    "guidance without label dropout": (
        ("training.condition_dropout=0", "sampling.guidance_scale=1.5"), values(), values(), "error", "1.5",
        "training.condition_dropout=0.1",
    ),
    "guidance without caption dropout": (
        (*CAPTIONS, "training.condition_dropout=0", "sampling.guidance_scale=4"), values(), values(), "error",
        "sampling.guidance_scale is 4", "training.condition_dropout=0.1",
    ),
    "guidance without label and caption dropout": (
        (*BOTH, "training.condition_dropout=0", "sampling.guidance_scale=4", "training.field_dropout.text=0.1"),
        values(), values(), "error", "training.condition_dropout is 0", "sampling.guidance_scale=1",
    ),
    "guidance without label dropout ": (
        (*BOTH, "sampling.guidance_scales={label: 2, text: 3}", "training.field_dropout.text=0.1"), values(), values(),
        "error", "training.field_dropout.label is 0, sampling.guidance_scales.label is 2",
        "training.field_dropout.label=0.1",
    ),
    "labels have no effect": (
        (), values(), values(loss_wrong_labels=lambda step: probe(step)["loss_probe"] + 1e-3 * math.cos(step)),
        "error", "probes", "data.classes=none",
    ),
    "captions have no effect": (
        (), values(), values(loss_wrong_captions=lambda step: probe(step)["loss_probe"] + 1e-3 * math.cos(step)),
        "error", "a wrong caption raises the loss by", "data.caption",
    ),
    "most labels dropped": (
        ("training.condition_dropout=0.8",), values(), values(), "warning", "0.8", "training.condition_dropout=0.1",
    ),
    "most captions dropped": (
        (*BOTH, "training.condition_dropout=0.2", "training.field_dropout.text=0.5"), values(), values(), "warning",
        "training.condition_dropout is 0.2, training.field_dropout.text is 0.5", "training.field_dropout.text=0.1",
    ),
    "EMA too slow": (
        ("training.ema.decay=0.9999",), values(), values(loss_ema=1.2), "error", "10000 steps",
        "training.ema.decay=0.995",
    ),
    "EMA too slow ": (
        ("training.ema.kind=power", "training.ema.lengths=[0.25]"), values(), values(loss_ema=1.2), "error",
        "the EMA averages about", "training.ema.lengths=[0.125]",
    ),
    "gradients grow": (
        (), values(grad_norm=lambda step: 0.1 + 4 * (step / 4000) ** 8), values(), "warning", "0.1",
        "training.optimizer.grad_clip_norm",
    ),
    "every gradient is clipped": (
        (), values(clipped=0.97, grad_norm=3.0), values(), "warning", "97%", "training.optimizer.grad_clip_norm=6",
    ),
    "high loss near the noise": (
        (), values(), values(loss_by_timestep=[0.5] * 9 + [2.0]), "warning", "0.9 to 1", "diffusion.shift above 1",
    ),
    "dead patches": ((), values(), values(dead_patches=0.4), "warning", "0.40", "training.optimizer.learning_rate"),
    "closed gates": ((), values(), values(gates=[0.2, 0.001]), "warning", "blocks 1", "network.depth=1"),
    "student far from its teacher": (
        ("training.optimizer=muon", "training.optimizer.adamw_learning_rate=0.004"), values(),
        values(average_velocity_error=lambda step: {"1 to 0": 0.05 if step < 900 else 0.4, "1 to 0.5": 0.1}), "error",
        "from 1 to 0 at step 4000: 0.4", "training.optimizer.adamw_learning_rate=0.002",
    ),
    "waiting for data": ((), values(data_wait=0.5), values(), "warning", "50%", "training.num_workers=4"),
}  # fmt: skip


@pytest.mark.parametrize("name", FINDINGS)
def test_a_problem_has_exactly_its_finding(made, name):
    changes, log, health, severity, evidence, change = FINDINGS[name]
    findings = diagnose(made(*changes, log=log, health=health))
    assert [finding.name for finding in findings] == [name.strip()]
    assert findings[0].severity == severity
    assert evidence in findings[0].evidence
    assert change in findings[0].change


def test_high_loss_near_the_data(made):
    findings = diagnose(made(health=values(loss_by_timestep=[2.0] + [0.5] * 9)))
    assert [finding.name for finding in findings] == ["high loss near the data"]


@pytest.mark.parametrize(
    "log",
    [
        values(rollbacks=2),
        values(skipped_steps=lambda step: step // 100),
        values(mse=stuck),
        values(mse=lambda step: 30.0 if step <= 100 else record(step)["mse"]),
    ],
)
def test_signs_of_a_learning_rate_that_is_too_high(made, log):
    """With huge tokens, where the loss alone would not be enough."""
    findings = diagnose(made(log=log, health=values(activations=[1.0, 2e3])))
    assert findings[0].name == "learning rate too high"
    assert "training.optimizer.learning_rate=0.0001" in findings[0].change


def test_the_first_skipped_batch_is_named(made):
    run = made(log=values(rollbacks=1))
    skipped = {
        "step": 700,
        "position": 44800,
        "outcome": "skipped",
        "reason": "the loss is not finite",
        "samples": ["a"],
    }
    (run / "skipped_steps.jsonl").write_text(json.dumps(skipped) + "\n")
    assert "step 700: the loss is not finite" in diagnose(run)[0].evidence


def test_both_rates_of_muon_are_lowered(made):
    overrides = ("training.optimizer.kind=muon", "training.optimizer.learning_rate=0.02")
    findings = diagnose(made(*overrides, "training.optimizer.adamw_learning_rate=0.01", log=values(rollbacks=1)))
    assert "learning_rate=0.002 and training.optimizer.adamw_learning_rate=0.001" in findings[0].change


def test_qk_norm_is_not_suggested_to_a_block_that_has_it(made):
    findings = diagnose(
        made("network.block=rope-swiglu", health=values(attention_logits=lambda step: [4.0, step / 20]))
    )
    assert [finding.name for finding in findings] == ["attention logits grow"]
    assert "qk_norm" not in findings[0].change


def test_one_hot_attention_is_found_without_growth(made):
    findings = diagnose(made(health=values(attention_logits=[4.0, 3e3])))
    assert [(finding.name, finding.severity) for finding in findings] == [("attention one-hot", "error")]


def test_memorized_labels_are_a_warning(made):
    cost = values(loss_wrong_labels=lambda step: probe(step)["loss_probe"] * (1.0005 + 1e-4 * math.cos(step)))
    findings = diagnose(made(health=cost))
    assert [(finding.name, finding.severity) for finding in findings] == [("labels have no effect", "warning")]


def costs(name: str, cost: float, error: float, change: float, norms: tuple[float, float] = (12.0, 0.35)) -> Change:
    """Records as `health.probe` writes them: what wrong labels, captions or controls change."""

    def apply(step: int, record: dict[str, Any]) -> None:
        loss = record["loss_probe"]
        record |= {f"loss_wrong_{name}": loss * (1 + cost), f"cost_wrong_{name}": cost, f"error_wrong_{name}": error}
        record |= {f"change_wrong_{name}": change, "norm_time": norms[0], "norm_labels": norms[1]}

    return apply


def test_two_probes_with_standard_errors_are_enough(made):
    """The run of 350 steps in which all classes had one image."""
    run = made("network.num_classes=9", health=costs("labels", 0.0, 0.0, 0.0), steps=350)
    (finding,) = diagnose(run)
    assert (finding.name, finding.severity) == ("labels have no effect", "warning")
    assert "raises the loss by 0.00%, +- 0.00% (2 probes" in finding.evidence
    assert "changes the output by 0.00%; norm of the vector of the time 12, of the label 0.35" in finding.evidence
    assert "the network does not use them yet" in finding.what
    assert diagnose(made("network.num_classes=9", health=costs("labels", 0.0, 0.0, 0.0), steps=250)) == []


@pytest.mark.parametrize(
    ("cost", "error", "severity"),
    [
        (0.0, 0.0, "error"),
        (0.0005, 0.0005, "error"),  # chance
        (0.0005, 0.0001, "warning"),  # small, but not chance
        (0.003, 0.0001, None),
        (0.0, 0.005, None),  # not known
        (0.4, 0.1, None),
    ],
)
def test_the_cost_of_a_wrong_condition_is_judged_by_its_standard_error(made, cost, error, severity):
    """The errors of records are those of means of 20 to 21 probes."""
    findings = diagnose(made(health=costs("labels", cost, error * math.sqrt(21), 0.0)))
    assert [finding.severity for finding in findings] == ([] if severity is None else [severity])


@pytest.mark.parametrize(
    ("name", "change"), [("captions", CAPTIONS), ("controls", ("network.num_classes=0",)), ("labels", ())]
)
def test_every_kind_of_condition_is_judged(made, name, change):
    (finding,) = diagnose(made(*change, health=costs(name, 0.0, 0.0, 0.0)))
    assert finding.name == f"{name} have no effect"
    assert diagnose(made(*change, health=costs(name, 0.05, 0.01, 0.3))) == []


def test_a_network_that_responds_to_wrong_labels_may_have_learned_them_by_heart(made):
    (finding,) = diagnose(made(health=costs("labels", 0.0, 1e-4, 0.2)))
    assert "learned by heart" in finding.what
    assert "changes the output by 20.00%" in finding.evidence


def test_larger_initial_labels_are_proposed_where_they_are_small(made):
    change = costs("labels", 0.0, 0.0, 0.0)
    assert diagnose(made(health=change))[0].change.endswith(
        "train longer, or set network.label_init_std=1 in a new run"
    )
    assert diagnose(made("network.label_init_std=1", health=change))[0].change.endswith("train longer")


def test_low_gpu_utilization_needs_a_checkpoint_from_a_gpu(made, make_model):
    from tessera import bundle

    run = made(log=values(mfu=0.05))
    assert diagnose(run) == []  # not known to be a GPU
    model = make_model()
    config = model.config.model_copy(update={"provenance": bundle.Provenance(device="cuda")})
    bundle.save(bundle.Model(config, model.network), run / "checkpoints/step-000004000")
    findings = diagnose(run)
    assert [finding.name for finding in findings] == ["low GPU utilization"]
    assert "training.global_batch_size=128" in findings[0].change


def test_errors_come_first_and_causes_before_consequences(made):
    run = made(
        *LATENTS,
        log=values(data_wait=0.5, clipped=1.0, rollbacks=3),
        health=values(data_std=5.0, data_spread=4.5, attention_logits=lambda step: [step, 1.0]),
    )
    names = [finding.name for finding in diagnose(run)]
    assert names == [
        "latents not normalized", "learning rate too high", "attention logits grow", "every gradient is clipped",
        "waiting for data",
    ]  # fmt: skip
    text = as_text(run)
    assert text.startswith("1. error: latents not normalized\n")
    assert "\n2. error: learning rate too high\n" in text


def test_values_that_are_not_finite_are_ignored(made):
    def broken(step, record):
        record |= dict.fromkeys(("loss_probe", "loss_ema", "loss_wrong_labels", "data_std"))
        record["activations"] = record["attention_logits"] = [None, None]

    run = made(log=values(grad_norm=math.nan), health=broken)
    assert diagnose(run) == []
    assert "largest attention logit" not in facts(run)


def test_damaged_lines_are_ignored(made):
    run = made(health=drop("loss_by_timestep", "attention_logits", "activations", "data_spread"))
    for name in ("log", "health", "skipped_steps"):
        with (run / f"{name}.jsonl").open("a") as file:
            file.write('3\n{"loss": 1}\n{"step": null}\n{"step": 41')
    assert diagnose(run) == []


def test_a_healthy_run_has_a_summary(made):
    text = as_text(made())
    assert text.startswith("no problems found\n")
    for piece in ("4000 of 4000", "linear baseline 1.57, zero baseline 2", "0.990 times the loss of the weights"):
        assert piece in text


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(TesseraError, match="is not a run"):
        diagnose(tmp_path)


# Baselines


@pytest.mark.parametrize(
    "config",
    [
        FlowMatchingConfig(),
        FlowMatchingConfig(prediction="x0", path="gvp", loss="x0", shift=2.0),
        GaussianDiffusionConfig(),
        GaussianDiffusionConfig(schedule={"kind": "cosine"}, prediction="v"),
    ],
)
def test_the_linear_baseline_is_that_of_least_squares(config):
    """Regress the target on x_t and a constant at several timesteps, for data of mean 0.5 and spread 0.6."""
    diffusion = config.build()
    t = diffusion.sample_timesteps((torch.arange(40) + 0.5) / 40)
    generator = torch.Generator().manual_seed(0)
    x0 = 0.5 + 0.6 * torch.randn(40, 20_000, generator=generator, dtype=torch.float64)
    noise = torch.randn(40, 20_000, generator=generator, dtype=torch.float64)
    x, target = diffusion.add_noise(x0, noise, t).numpy(), diffusion.training_target(x0, noise, t).numpy()
    errors = []
    for inputs, outputs in zip(x, target):
        columns = np.stack((inputs, np.ones_like(inputs)), axis=1)
        errors.append(np.mean((columns @ np.linalg.lstsq(columns, outputs, rcond=None)[0] - outputs) ** 2))
    baselines = Baselines.compute(diffusion, data_mean=0.5, data_std=0.6, spread=0.6)
    assert baselines.zero == pytest.approx(np.mean(target**2), rel=0.02)
    assert baselines.linear == pytest.approx(np.mean(errors), rel=0.04)


def test_baselines_by_timestep_average_to_the_whole():
    baselines = Baselines.compute(FlowMatchingConfig().build(), data_mean=0.0, data_std=1.0, spread=1.0)
    assert np.mean(baselines.linear_by_timestep) == pytest.approx(baselines.linear, rel=1e-6)
    assert baselines.zero_by_timestep == pytest.approx([2.0] * 10)


def test_timesteps_that_are_never_sampled_have_no_baseline():
    narrow = FlowMatchingConfig(timestep_sampling={"kind": "logit-normal", "std": 0.2}).build()
    baselines = Baselines.compute(narrow, data_mean=0.0, data_std=1.0, spread=1.0)
    assert baselines.linear_by_timestep[0] is None
    assert baselines.linear_by_timestep[5] is not None
