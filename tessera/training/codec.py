"""A small KL autoencoder fitted to the user's own images: L1 and KL (Rombach et al. 2022, section 3.1), no adversary.

RUN/
    recipe.yaml           what was asked for
    log.jsonl             losses, a record a line
    checkpoint.pt         the newest; the same command goes on from it, exactly
    codec/                the outcome, a folder of diffusers: `codec: {kind: autoencoder-kl, source: RUN/codec}`
    scores.json           of held-out pictures
    reconstructions.png   rows of held-out pictures, each above the row of their reconstructions

Shapes: B batch, C latent channels, H W height and width, h w those of the latents.
"""

import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from tessera import images, randomness, runtime
from tessera.codecs import AutoencoderConfig
from tessera.codecs.autoencoder import AutoencoderShape, write
from tessera.data import AnyData, Batch, Loader
from tessera.data.loader import flip_mask
from tessera.errors import TesseraError, listed
from tessera.evaluation.features import Extractor, extractor
from tessera.evaluation.intervals import Estimate
from tessera.evaluation.reconstruction import WINDOW, Reconstruction, reconstruct, sheet
from tessera.evaluation.toy.feature_network import Part
from tessera.files import atomic_file, atomic_folder, atomic_write, exclusive_lock, remove_partials
from tessera.monitoring.logger import MetricLogger
from tessera.runtime import DeviceName, Precision
from tessera.settings import Settings, changes, override, read_yaml, validate, write_yaml
from tessera.training.loop import Interrupted, stop_signals
from tessera.training.objective import POSTERIOR
from tessera.training.optimizers import AdamWConfig, CosineDecay, Fraction, learning_rate, set_learning_rate

RECIPE, CHECKPOINT, CODEC, SCORES, SHEET = "recipe.yaml", "checkpoint.pt", "codec", "scores.json", "reconstructions.png"
HELD_OUT = 0x636F6465  # stream of randomness: which pictures are kept from training
MEASURED = 1024  # training pictures whose latents tell scale and shift
FREE = {
    "run_dir",
    "features",
    "training.log_every",
    "training.checkpoint_every",
    "training.num_workers",
    "training.device",
}


class FitConfig(Settings):
    """How the autoencoder learns. The defaults suit pictures of 64 pixels and two processor cores."""

    steps: PositiveInt = 2_000
    batch: PositiveInt = 16
    optimizer: AdamWConfig = AdamWConfig(
        learning_rate=1e-3, betas=(0.9, 0.99), warmup_steps=100, lr_schedule=CosineDecay(), grad_clip_norm=1.0
    )
    kl: float = Field(default=1e-4, ge=0, description="weight of the KL divergence, a mean over latents, beside L1")
    ema: Fraction = Field(default=0.995, description="decay of the average of the weights, which is what is saved")
    held_out: PositiveInt = Field(default=256, description="pictures kept from training, for the scores")
    precision: Precision = Field(default="auto", description="of convolutions; auto: bfloat16 on GPUs that have it")
    seed: NonNegativeInt = 0
    device: DeviceName = "auto"
    workers: PositiveInt = Field(default=2, description="threads that read data ahead")
    log_every: PositiveInt = 20
    checkpoint_every: PositiveInt = 200


class CodecRecipe(Settings):
    """A whole fit: one YAML file."""

    output: str = Field(description="the run's folder")
    data: AnyData
    autoencoder: AutoencoderShape = AutoencoderShape()
    training: FitConfig = FitConfig()
    features: str | None = Field(
        default="shapes", description="whose distance is told, as in `tessera evaluate --features`; null: none"
    )


def read(path: Path, overrides: list[str]) -> CodecRecipe:
    """A recipe file with dotted overrides; `output` is runs/<the file's name> where none is given. TesseraError."""
    return validate(
        CodecRecipe, override({"run_dir": f"runs/{path.stem}", **read_yaml(path)}, overrides), f"recipe {path}"
    )


def train(recipe: CodecRecipe) -> Path:
    """Fit, save and score as the recipe says, and return the folder of the codec. A run that was cut off goes on.

    Ctrl-C and SIGTERM save and end by Interrupted. Raises TesseraError.
    """
    fit = Fit(recipe)
    folder = Path(recipe.output)
    with exclusive_lock(folder):
        fit.restore()
        remove_partials(folder)
        atomic_write(folder / RECIPE, write_yaml(recipe))
        journal = MetricLogger(folder, fit.step, recipe.training.steps, tensorboard=False)
        try:
            with stop_signals() as stopping:
                fit.go(journal, stopping)
            if not (folder / CODEC).exists():
                fit.save_codec()
            if not (folder / SCORES).exists():
                journal.info(f"looking at {len(fit.held_out)} held-out pictures")
                journal.info(fit.score())
        finally:
            journal.close()
    return folder / CODEC


class Fit:
    """A fit in memory, at a step."""

    def __init__(self, recipe: CodecRecipe) -> None:
        """Open the data and build the network. Raises TesseraError."""
        self.recipe, self.config, self.folder = recipe, recipe.training, Path(recipe.output)
        _check_sizes(recipe)
        self.device = runtime.choose_device(self.config.device)
        self.dtype = runtime.autocast_dtype(self.config.precision, self.device)
        self.features: Extractor | None = extractor(recipe.features, self.device) if recipe.features else None
        source = recipe.data.open()
        if len(source) < self.config.held_out + self.config.batch:
            raise TesseraError(
                f"{recipe.data.where} holds {len(source)} pictures: too few to keep training.held_out="
                f"{self.config.held_out} of them from training and have a batch of {self.config.batch} left"
            )
        order = randomness.permutation(0, HELD_OUT, 0, len(source)).numpy()  # of no seed: runs compare
        self.source, self.held_out = source, np.sort(order[: self.config.held_out])
        self.learned_from = np.sort(order[self.config.held_out :])
        part = Part(source, self.learned_from)
        self.loader = Loader(part, self.config.batch, self.config.seed, self.config.workers)
        torch.manual_seed(self.config.seed)
        self.network = recipe.autoencoder.build(recipe.data.channels).to(self.device)
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [{"params": list(self.network.parameters()), "share": 1.0}],
            lr=self.config.optimizer.learning_rate,
            betas=self.config.optimizer.betas,
            weight_decay=self.config.optimizer.weight_decay,
        )
        self.step, self.seconds, self.processor_seconds = 0, 0.0, 0.0

    def go(self, journal: MetricLogger, stopping: list[int]) -> None:
        """Train to the last step. Raises Interrupted, having saved, once `stopping` holds a signal."""
        config = self.config
        journal.start(self.step)
        batches = self.loader.batches(self.step * config.batch)
        began, busy = time.monotonic(), time.process_time()
        marked, sums = self.step, {"l1": 0.0, "kl": 0.0}
        try:
            while self.step < config.steps:
                for name, value in self.train_step(next(batches)).items():
                    sums[name] += value
                journal.advance(self.step)
                if self.step % config.log_every == 0 or self.step == config.steps:
                    seconds, steps = time.monotonic() - began, self.step - marked
                    told = {name: value / steps for name, value in sums.items()}
                    told["loss"] = told["l1"] + config.kl * told["kl"]
                    journal.record(self.step, **told, images_per_second=steps * config.batch / seconds)
                    self.seconds += seconds
                    self.processor_seconds += time.process_time() - busy
                    began, busy = time.monotonic(), time.process_time()
                    marked, sums = self.step, {"l1": 0.0, "kl": 0.0}
                last = self.step == config.steps
                if self.step % config.checkpoint_every == 0 or last or stopping:
                    self.save()
                if stopping and not last:
                    raise Interrupted(
                        f"stopped at step {self.step} of {config.steps}; the same command goes on from there"
                    )
        finally:
            batches.close()
        if self.loader.skipped:
            names = [f"{name}: {reason}" for name, reason in self.loader.skipped.items()]
            journal.info(f"{len(names)} images could not be used:{listed(names)}")

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One update of the weights, and of their average: its mean L1 and KL."""
        config = self.config
        pixels, noise = self.prepared(batch)
        set_learning_rate(self.optimizer, learning_rate(config.optimizer, self.step, config.steps))
        with runtime.autocast(self.dtype, self.device):
            posterior = self.network.encode(pixels).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            again = self.network.decode(mean + (0.5 * logvar).exp() * noise).sample
        l1 = (again.float() - pixels).abs().mean()
        # KL(N(mean, var) || N(0, 1)), in nats for each number of the latents.
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        self.optimizer.zero_grad()
        (l1 + config.kl * kl).backward()
        if config.optimizer.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), config.optimizer.grad_clip_norm)
        if not torch.isfinite(l1 + kl):
            raise TesseraError(
                f"the loss is not finite at step {self.step}: lower training.optimizer.learning_rate "
                f"({config.optimizer.learning_rate:g}) and start afresh with another output="
            )
        self.optimizer.step()
        self.step += 1
        decay = min(config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, live in zip(self.average.parameters(), self.network.parameters()):
                average.lerp_(live, 1 - decay)
        return {"l1": float(l1.detach()), "kl": float(kl.detach())}

    def prepared(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """pixels [B, 3, H, W] in -1 .. 1, mirrored as the data say, and noise [B, C, h, w]; by position alone."""
        position = batch.position.to(self.device)
        pixels = batch.pixels.to(self.device).float() / 127.5 - 1
        if self.recipe.data.hflip:
            turned = flip_mask(self.config.seed, position)[..., None, None]
            pixels = torch.where(turned, pixels.flip(-1), pixels)
        shape = self.recipe.autoencoder
        size = (shape.latent_channels, *(side // shape.factor for side in pixels.shape[-2:]))
        return pixels, randomness.normal(self.config.seed, position, POSTERIOR, size)

    def save(self) -> None:
        """The checkpoint, whole, over the one before."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
            "recipe": self.recipe.model_dump(mode="json"),
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_file(self.folder / CHECKPOINT) as partial:
            torch.save(state, partial)

    def restore(self) -> None:
        """Go on from the folder's checkpoint, if there is one. Raises TesseraError if it is of another recipe."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            if (self.folder / "checkpoints").exists():
                raise TesseraError(f"{self.folder} holds a run of `tessera train`: choose another output=")
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            before: dict[str, Any] = state["recipe"]
        except Exception as error:  # a damaged archive raises anything
            raise TesseraError(f"{path} is damaged ({error}): remove {self.folder} to start afresh") from None
        now = self.recipe.model_dump(mode="json")
        differing = [f"{name} was {old}, is {new}" for name, old, new in changes(before, now) if name not in FREE]
        if differing:
            raise TesseraError(
                f"{self.folder} holds a fit of another recipe:{listed(differing)}\n"
                "undo the change, or start afresh with another output="
            )
        self.step, self.seconds, self.processor_seconds = (
            state[name] for name in ("step", "seconds", "processor_seconds")
        )
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def save_codec(self) -> None:
        """The average of the weights as a codec whose latents have mean 0 and variance 1, each channel for itself."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for start in range(0, min(MEASURED, len(self.learned_from)), self.config.batch):
            # Of positions that were seen, mirrored as they were: what a diffusion transformer will learn from.
            pixels, _ = self.prepared(self.loader.read(start))
            posterior = self.average.encode(pixels).latent_dist
            mean, variance = posterior.mean.double(), posterior.var.double()
            count += mean.numel() // mean.shape[1]
            total = total + mean.sum(dim=(0, 2, 3)).cpu()
            squares = squares + (mean.square() + variance).sum(dim=(0, 2, 3)).cpu()
        shift = total / count
        deviation = (squares / count - shift.square()).sqrt()
        if not (deviation > 0).all():
            raise TesseraError("a channel of the latents is always the same number: train longer, or with fewer")
        with atomic_folder(self.folder / CODEC) as partial:
            write(self.average, partial, (1 / deviation)[:, None, None], shift[:, None, None])

    def score(self) -> str:
        """Write scores and pictures of what was held out, as the saved codec reconstructs it; the scores in words."""
        codec = AutoencoderConfig(source=str(self.folder / CODEC)).build().to(self.device)
        found = reconstruct(codec, self.source, self.held_out.tolist(), self.device, self.features)
        images.save_png(self.folder / SHEET, images.grid(sheet(found), columns=8, gap=2))
        told = as_json(found, self.features) | {
            "steps": self.step,
            "minutes of training": round(self.seconds / 60, 2),
            "of all processors together": round(self.processor_seconds / 60, 2),
        }
        atomic_write(self.folder / SCORES, json.dumps(told, indent=2) + "\n")
        return in_words(found, self.features)


def as_json(found: Reconstruction, network: Extractor | None) -> dict[str, Any]:
    """Scores with their intervals."""

    def of(measured: Estimate) -> dict[str, float]:
        return {"value": measured.value, "low": measured.low, "high": measured.high}

    told: dict[str, Any] = {"pictures": found.count, "psnr": of(found.psnr), "ssim": of(found.ssim)}
    if found.fd is not None and network is not None:
        told |= {"fd": of(found.fd), "features": network.identity}
    return told | {"latents": {"mean": found.mean, "std": found.std}}


def in_words(found: Reconstruction, network: Extractor | None) -> str:
    """Scores as lines."""
    rows = [
        ("psnr", f"{found.psnr.value:.2f} dB  ({found.psnr.low:.2f} to {found.psnr.high:.2f})"),
        ("ssim", f"{found.ssim.value:.4f}  ({found.ssim.low:.4f} to {found.ssim.high:.4f})"),
    ]
    if found.fd is not None and network is not None:
        seen = f", pictures reduced to {network.size[0]} x {network.size[1]}" if network.size else ""
        rows.append(("fd", f"{found.fd.value:.4g}  ({found.fd.low:.4g} to {found.fd.high:.4g}; {network.name}{seen})"))
    rows.append(("latents", f"mean {found.mean:.3f}, standard deviation {found.std:.3f}"))
    return "\n".join([f"{found.count} pictures", *(f"{name:<9}{text}" for name, text in rows)])


def _check_sizes(recipe: CodecRecipe) -> None:
    height, width = recipe.data.size
    factor = recipe.autoencoder.factor
    if height % factor or width % factor:
        raise TesseraError(
            f"data.size {height} x {width} is not a multiple of {factor}, the factor of autoencoder.channels: "
            f"{len(recipe.autoencoder.channels)} resolutions, each half the one before"
        )
    if min(height, width) < WINDOW:
        raise TesseraError(f"data.size is {height} x {width}, but SSIM, which tells what is left, needs {WINDOW}")
    if getattr(recipe.data, "buckets", None) is not None:
        raise TesseraError("a codec is trained on one size: leave out data.buckets; it works on any size afterwards")
