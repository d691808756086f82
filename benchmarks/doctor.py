"""Does `tessera doctor` name what is wrong, and nothing else? Diagnose broken and healthy runs.

    python benchmarks/doctor.py [--out runs/doctor] [NAME ...]

Each run is trained by `tessera train` from a recipe and overrides, then diagnosed by `tessera doctor --json`. A row has
the change, the first finding, and all others. The last line counts the broken runs whose fault is the first finding
and the healthy runs without a finding.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tessera import randomness
from tessera.data.digits import DigitsConfig, DigitsDataset

RECIPES = Path(__file__).parent.parent / "recipes"
SMALL = (
    "network.hidden_size=96", "network.depth=4", "network.num_heads=4", "training.log_every=10",
    "training.health_every=20", "training.sample_every=1000", "training.checkpoint_every=1000",
    "training.sample_seeds=1", "training.tensorboard=false", "training.optimizer.warmup_steps=20",
    "training.device=cpu",
    "training.ema.decay=0.97",
)  # fmt: skip
FOLDER = ("data.kind=folder", "data.size=8", "data.channels=1", "data.hflip=false")
MODERN = (
    "network.block=rope-swiglu", "diffusion.kind=flow", "diffusion.timestep_sampling.kind=logit-normal",
    "diffusion.timestep_sampling.std=0.7",
    "training.optimizer.kind=muon", "training.optimizer.learning_rate=0.01", "training.optimizer.warmup_steps=20",
    "training.optimizer.adamw_learning_rate=0.004", "training.optimizer.lr_schedule=wsd",
    "training.optimizer.grad_clip_norm=1.0",
)  # fmt: skip
SPREAD = 5.0  # of latents that are not normalized


@dataclass(frozen=True)
class Case:
    """A run: the change, and the expected first finding (None: nothing is wrong)."""

    name: str
    done: str
    expected: str | None
    changes: tuple[str, ...] = ()
    prepare: Callable[[Path], tuple[str, ...]] = lambda folder: ()
    recipe: str = "digits.yaml"


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [N, 8, 8] and labels [N]"""
    source = DigitsDataset(DigitsConfig())
    return source.images[:, 0], source.labels


def as_folder(folder: Path, pixels: np.ndarray, labels: np.ndarray) -> tuple[str, ...]:
    """Images as PNG files, one folder per class."""
    for number, (image, label) in enumerate(zip(pixels, labels)):
        place = folder / "data" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number:04d}.png")
    return (*FOLDER, f"data.path={folder / 'data'}")


def as_they_are(folder: Path) -> tuple[str, ...]:
    return as_folder(folder, *digits())


def shuffled_labels(folder: Path) -> tuple[str, ...]:
    pixels, labels = digits()
    return as_folder(folder, pixels, labels[randomness.permutation(0, 0, 1, len(labels)).numpy()])


def one_image(folder: Path) -> tuple[str, ...]:
    pixels, labels = digits()
    return as_folder(folder, np.broadcast_to(pixels[:1], pixels.shape), labels)


def autoencoder(folder: Path, spread: float) -> tuple[str, ...]:
    """An untrained autoencoder with a narrow posterior. spread: the standard deviation of the digits' latents."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    pixels, labels = digits()
    torch.manual_seed(0)
    codec: Any = AutoencoderKL(
        in_channels=1, out_channels=1, down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, sample_size=8,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16), norm_num_groups=4, scaling_factor=1.0,
    )  # fmt: skip
    with torch.no_grad():
        codec.quant_conv.weight[4:] = 0  # the logarithm of the posterior's variance
        codec.quant_conv.bias[4:] = -12
        raw = codec.encode(torch.from_numpy(pixels[:, None]).float() / 127.5 - 1).latent_dist.sample()
        codec.register_to_config(scaling_factor=spread / raw.std().item(), shift_factor=raw.mean().item())
    with contextlib.redirect_stderr(io.StringIO()):
        codec.save_pretrained(folder / "autoencoder")
    settings = as_folder(folder, pixels, labels)
    return (*settings, "codec.kind=autoencoder-kl", f"codec.source={folder / 'autoencoder'}", "network.patch_size=1")


CASES = (
    Case("digits", "nothing: recipes/digits.yaml, small", None),
    Case("rope-swiglu", "nothing: the rope-swiglu block, flow matching, Muon", None, MODERN),
    Case("paper", "nothing: the paper's process (epsilon, learned variance)", None,
         ("diffusion.prediction=epsilon", "diffusion.variance=learned", "diffusion.schedule=linear")),
    Case("latents", "nothing: an autoencoder with its scale", None, prepare=lambda folder: autoencoder(folder, 1.0)),
    Case("unscaled", f"latents of standard deviation {SPREAD:g}", "latents not normalized",
         prepare=lambda folder: autoencoder(folder, SPREAD)),
    Case("rate", "learning rate x30", "learning rate too high", ("training.optimizer.learning_rate=0.06",)),
    Case("rate-modern", "learning rates x30, rope-swiglu and Muon", "learning rate too high",
         (*MODERN, "training.optimizer.learning_rate=0.3", "training.optimizer.adamw_learning_rate=0.12")),
    Case("warm-up", "learning rate x10, no warm-up", "no warm-up",
         ("training.optimizer.learning_rate=0.02", "training.optimizer.warmup_steps=0")),
    Case("quick", "nothing: learning rate x10, with a warm-up", None,
         ("training.optimizer.learning_rate=0.02", "training.optimizer.warmup_steps=50")),
    Case("labels", "labels shuffled", "labels have no effect", prepare=shuffled_labels),
    Case("ema", "EMA frozen", "EMA too slow", ("training.ema.decay=0.999999", "training.ema.warmup=false")),
    Case("constant", "one image a thousand times", "images hardly differ", prepare=one_image),
    Case("no-dropout", "guidance without label dropout", "guidance without label dropout",
         ("training.condition_dropout=0",)),
)  # fmt: skip


def train(recipe: Path, overrides: list[str]) -> str:
    """`tessera train`; returns the error message if it fails."""
    words = [sys.executable, "-m", "tessera", "train", str(recipe), *overrides]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def findings(run: Path) -> list[dict]:
    """`tessera doctor --json`."""
    words = [sys.executable, "-m", "tessera", "doctor", str(run), "--json"]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)["findings"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/doctor"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("names", nargs="*", help=", ".join(case.name for case in CASES))
    options = parser.parse_args()
    cases = [case for case in CASES if not options.names or case.name in options.names]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| run | change | seconds | first finding | others |\n|---|---|---|---|---|")
    right = 0
    for case in cases:
        folder = options.out / case.name
        if not (folder / "run").exists():
            folder.mkdir(parents=True)
            overrides = [
                *SMALL,
                f"training.steps={options.steps}",
                *case.changes,
                *case.prepare(folder),
                f"run_dir={folder / 'run'}",
            ]
            began = time.monotonic()
            ended = train(RECIPES / case.recipe, overrides)
            (folder / "made.json").write_text(json.dumps({"seconds": time.monotonic() - began, "ended": ended}))
        made = json.loads((folder / "made.json").read_text())
        names = [f"{finding['severity']}: {finding['name']}" for finding in findings(folder / "run")]
        first, others = (names or ["nothing"])[0], ", ".join(names[1:]) or "none"
        right += first == (f"error: {case.expected}" if case.expected else "nothing")
        change = f"{case.done}{'; ended: ' + made['ended'] if made['ended'] else ''}"
        print(f"| {case.name} | {change} | {made['seconds']:.0f} | {first} | {others} |", flush=True)
    print(f"\n{right} of {len(cases)} as expected")


if __name__ == "__main__":
    main()
