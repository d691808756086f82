"""1,000 damaged recipes, studies and override words: every command ends in success or in one message, never in a
traceback. Commands only plan and check; nothing is trained."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

RECIPES = {
    "recipe": """
run_dir: run
data: {kind: digits}
network: {patch_size: 4, hidden_size: 16, depth: 1, num_heads: 2}
diffusion: {num_timesteps: 20, schedule: cosine, prediction: v}
sampling: {num_steps: 3}
training:
  steps: 4
  global_batch_size: 32
  optimizer: {learning_rate: 0.001}
  log_every: 1
  checkpoint_every: 1000
  tensorboard: false
  device: cpu
""",
    "files": """
run_dir: run
data: {path: images, size: 32, channels: 3, hflip: true, classes: auto}
codec: {kind: autoencoder-kl, source: nowhere}
network: {depth: 2, hidden_size: 32, num_heads: 2, patch_size: 4, block: rope-swiglu}
diffusion: {kind: flow, path: gvp, prediction: velocity, timestep_sampling: {kind: logit-normal, mean: 0.5}}
sampling: {sampler: {kind: dpm++, order: 3}, num_steps: 8, guidance_scale: 2.5, guidance_interval: [0.1, 0.9]}
training: {steps: 4, global_batch_size: 8, optimizer: {kind: muon}, lr_schedule: cosine, ema: [{decay: 0.99}]}
evaluation: {every: 2, num_samples: 10, metrics: [kid, fd]}
""",
    "study": """
question: Does width help?
recipe: recipe.yaml
output: study
axes:
  size:
    S: {network.hidden_size: 16}
    L: {network.hidden_size: 32}
  rate: {low: {training.optimizer.learning_rate: 1e-4}, high: {training.optimizer.learning_rate: 1e-3}}
set: {evaluation: {num_samples: 40, batch_size: 40, metrics: [kid]}}
budget: {steps: 2}
""",
}
VALUES = [
    "", "null", "~", "0", "-1", "1", "3", "0.5", "-0.0", "1e5", "1e400", ".inf", ".nan", "nan", "007", "0x1F",
    "1_000", "9" * 30, "9" * 5000, "12:30:45", "2024-11-28", "2024-13-45", "true", "yes", "off", "None", "text",
    "set #3", "[x]", "[1, 2]", "[a, b", "[[1], {a: 2}]", "{}", "{a: 1}", "{a: {b: {c: 1}}}", "{kind: x}",
    "{kind: [1]}", "{kind: null}", "{1: 2}", "{null: 1}", "{? [a] : 1}", "{a: 1, a: 2}", "key: value", "a: b: c",
    "- a", "- a\n- b", "'quoted'", '"quoted"', '"a\\0b"', "it's", "&a [*a]", "&a {x: *a}", "*a", "<<: 3", "!!int x",
    "!!int ''", "!!float x", "!!bool x", "!!timestamp x", "!!null x", "!!binary '*'", "!!set {a, b}", "!!omap [a: 1]",
    "!!python/object:os.system x", "!x 3", "%TAG", "@x", "`x`", "|", ">", "?", "=", "..", "/", "/dev/null", "C:\\new",
    "café/日本", "\x07", "\u2028", "a" * 5000, "[" * 2000, "{a: " * 500, "digits", "shapes", "files",
    "flow", "gaussian", "pixels", "adaln", "ddim", "unet", "dit", "DiT-XL/2", "UNet-S/8-gmacs", "muon",
]  # fmt: skip
SMALL = ["1", "2", "4", "8", "16", "32", "0.1", "0.5", "1e-3", "[0, 1]", "true", "null", "digits", "flow", "x"]
KEYS = [
    "run_dir", "data", "data.kind", "data.path", "data.size", "data.channels", "data.cache", "data.image",
    "data.classes", "data.split", "codec", "codec.kind", "codec.source", "codec.scale", "codec.shift", "network",
    "network.kind", "network.preset", "network.block", "network.block.kind", "network.depth", "network.hidden_size",
    "network.num_heads", "network.patch_size", "network.input_size", "network.num_classes", "network.class_dropout",
    "network.channel_mult", "diffusion", "diffusion.kind", "diffusion.schedule", "diffusion.prediction",
    "diffusion.num_timesteps", "diffusion.shift", "diffusion.timestep_sampling", "diffusion.network_times",
    "sampling", "sampling.sampler", "sampling.sampler.kind", "sampling.sampler.eta", "sampling.num_steps",
    "sampling.guidance_scale", "sampling.guidance_scales", "sampling.guidance_interval", "sampling.timestep_spacing",
    "sampling.caching", "training", "training.steps", "training.seed", "training.optimizer",
    "training.optimizer.learning_rate", "training.precision", "training.ema", "training.ema.decay",
    "training.compile", "training.device", "training.init_from", "training.fsdp", "training.global_batch_size",
    "training.micro_batch_size", "training.field_dropout", "training.stability", "evaluation", "evaluation.metrics",
    "evaluation.every", "evaluation.reference", "evaluation.features", "kind", "", ".", "a.b.c.d", "data.", ".data",
    "data..path", "Training.Steps", "training.stpes", "set", "set.network", "axes", "axes.size", "axes.size.S",
    "axes.size.S.network.depth", "axes.size.1.2", "budget", "budget.steps", "budget.flops", "seeds", "marks",
    "marks.steps", "law", "compare", "question", "recipe", "output", "limit_minutes",
]  # fmt: skip


def damage(text: str, numbers: random.Random) -> bytes:
    """A recipe with a few lines, values or characters changed, or cut off."""
    lines = text.splitlines()
    for _ in range(numbers.choice([0, 1, 1, 2])):
        row = numbers.randrange(len(lines))
        match numbers.randrange(7):
            case 0:
                lines.pop(row)
            case 1:
                lines.insert(row, lines[numbers.randrange(len(lines))])
            case 2:
                key, colon, _ = lines[row].rpartition(":")
                lines[row] = f"{key}{colon} {numbers.choice(VALUES)}"
            case 3:
                words = lines[row].split(" ")
                words[numbers.randrange(len(words))] = numbers.choice(VALUES)
                lines[row] = " ".join(words)
            case 4:
                position = numbers.randrange(len(lines[row]) + 1)
                lines[row] = lines[row][:position] + numbers.choice("{}[]:,#&*!|>'\"%@`\t\0 é-") + lines[row][position:]
            case 5:
                lines[row] = " " * numbers.randrange(4) + lines[row]
            case 6:
                lines[row] = f"{numbers.choice(KEYS).partition('.')[0]}: {numbers.choice(VALUES)}"
        lines = lines or [""]
    content = "\n".join(lines).encode("utf-8", "surrogateescape")
    if numbers.random() < 0.05:
        content = content[: numbers.randrange(len(content) + 1)]
    if numbers.random() < 0.03:
        content = content.replace(b"e", bytes([numbers.randrange(256)]), 1)
    return content


def make_command(seed: int, folder: Path, model: Path) -> tuple[list[Any], list[str]]:
    """A command and override words; the damaged file is written."""
    numbers, path = random.Random(seed), folder / "damaged.yaml"
    equals = ["="] * 10 + ["==", ""]
    words = [
        numbers.choice(KEYS) + numbers.choice(equals) + numbers.choice(numbers.choice([VALUES, SMALL]))
        for _ in range(numbers.choice([0, 1, 1, 2]))
    ]
    words = [word for word in words if not word.startswith("-")]
    verb = ("train", "plan", "study", "sample", "preset")[seed % 5]
    if verb == "preset":
        return ["plan", "DiT-S/8"], words
    if verb == "sample":
        command = ["sample", model, "--classes", numbers.choice(["3"] * 100 + VALUES), "--out", folder / "grid.png"]
        return command, [word.removeprefix("sampling.") for word in words]
    name = {"train": "recipe", "plan": numbers.choice(["recipe", "files"]), "study": "study"}[verb]
    path.write_bytes(damage(RECIPES[name], numbers))
    return [
        verb,
        path,
        *(["--dry-run"] if verb != "plan" else []),
        *(["--hardware", "h100"] if verb != "train" else []),
    ], words


@pytest.mark.slow
def test_1000_damaged_recipes_and_words_end_in_success_or_one_message(tessera, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in RECIPES.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    outcomes: Counter[tuple[str, int]] = Counter()
    for seed in range(1000):
        command, words = make_command(seed, tmp_path, trained)
        done = tessera(*command, *words)  # an unexpected error fails the test, because it is raised
        outcomes[str(command[0]), done.code] += 1
        case = f"seed {seed}: {command} {words}: {done.err[:2000]}"
        assert done.code in (0, 1, 2), case
        assert "Traceback" not in done.err, case
        assert "Warning" not in done.err, case
        if done.code == 1:
            lines = [line for line in done.err.splitlines() if not line.startswith(("note: ", "warning: ", "data: "))]
            assert lines[0].startswith("error: "), case
            assert all(line.startswith("  ") for line in lines[1:]), case  # one message; its lines list the faults
    for verb in ("train", "plan", "study", "sample"):
        assert outcomes[verb, 1] > 50, outcomes
    assert outcomes["train", 0] > 5, outcomes
    assert outcomes["plan", 0] > 5, outcomes
