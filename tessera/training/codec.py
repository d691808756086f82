"""Training a small KL autoencoder on your own images with L1 and KL losses (Rombach et al. 2022, section 3.1) and no
adversarial loss.

RUN/
    recipe.yaml             the recipe
    log.jsonl               losses, one record per line
    checkpoint.safetensors  the newest training state, from which the same command resumes exactly
    codec/                  the result, a diffusers folder: `codec: {kind: autoencoder-kl, source: RUN/codec}`
    scores.json             scores on held-out images
    reconstructions.png     rows of held-out images, each above the row of their reconstructions

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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tessera import __version__, images, randomness, runtime
from tessera.codecs import AutoencoderConfig
from tessera.codecs.autoencoder import AutoencoderShape, write
from tessera.data import AnyData, Batch, Loader
from tessera.data.loader import flip_mask
from tessera.errors import Interrupted, TesseraError, bullet_list
from tessera.evaluation.features import FeatureExtractor, load_extractor
from tessera.evaluation.reconstruction import WINDOW, Reconstruction, comparison_rows, reconstruct
from tessera.evaluation.toy.feature_network import Subset
from tessera.files import atomic_file, atomic_folder, atomic_write, exclusive_lock, remove_partials
from tessera.monitoring.logger import MetricLogger
from tessera.runtime import DeviceName, Precision
from tessera.settings import Settings, apply_overrides, diff, read_yaml, to_yaml, validate
from tessera.training.objective import POSTERIOR_STREAM
from tessera.training.optimizers import AdamWConfig, CosineDecay, Fraction, learning_rate, set_learning_rate
from tessera.training.signals import stop_signals

RECIPE, CHECKPOINT, CODEC = "recipe.yaml", "checkpoint.safetensors", "codec"
SCORES, RECONSTRUCTIONS = "scores.json", "reconstructions.png"
HELD_OUT_STREAM = 0x636F6465  # random stream that selects the held-out images
NUM_STATISTICS = 1024  # training images from which scale and shift of the latents are computed
CHANGEABLE = {  # settings that may change when a run is resumed
    "run_dir",
    "features",
    "training.log_every",
    "training.checkpoint_every",
    "training.num_workers",
    "training.device",
}


class CodecTrainingConfig(Settings):
    """How the autoencoder is trained. The defaults suit images of 64 pixels and two CPU cores."""

    steps: PositiveInt = 2_000
    global_batch_size: PositiveInt = 16
    optimizer: AdamWConfig = AdamWConfig(
        learning_rate=1e-3, betas=(0.9, 0.99), warmup_steps=100, lr_schedule=CosineDecay(), grad_clip_norm=1.0
    )
    kl_weight: float = Field(default=1e-4, ge=0, description="of the KL divergence, a mean over latents, beside L1")
    ema_decay: Fraction = Field(default=0.995, description="of the averaged weights, which are the result")
    num_held_out: PositiveInt = Field(default=256, description="images that are only used for the scores")
    precision: Precision = Field(default="auto", description="of convolutions; auto: bfloat16 on GPUs that have it")
    seed: NonNegativeInt = 0
    device: DeviceName = "auto"
    num_workers: PositiveInt = Field(default=2, description="threads that read data ahead")
    log_every: PositiveInt = 20
    checkpoint_every: PositiveInt = 200


class CodecRecipe(Settings):
    """The recipe of a codec: one YAML file."""

    run_dir: str = Field(description="folder of the run; by default runs/NAME")
    data: AnyData
    autoencoder: AutoencoderShape = AutoencoderShape()
    training: CodecTrainingConfig = CodecTrainingConfig()
    features: str | None = Field(
        default="shapes",
        description="of the Fréchet distance in the scores, as in `tessera evaluate --features`; null: no distance",
    )


def read_codec_recipe(path: Path, overrides: list[str]) -> CodecRecipe:
    """Read a recipe file and apply dotted overrides. `run_dir` defaults to runs/<name of the file>. TesseraError."""
    data = {"run_dir": f"runs/{path.stem}", **read_yaml(path, CodecRecipe)}
    return validate(CodecRecipe, apply_overrides(data, overrides, CodecRecipe), f"recipe {path}")


def train_codec(recipe: CodecRecipe) -> Path:
    """Train, save and score a codec, and return its folder. An interrupted run is resumed.

    Ctrl-C and SIGTERM save a checkpoint and raise Interrupted. Raises TesseraError.
    """
    trainer = CodecTrainer(recipe)
    run_dir = trainer.run_dir
    with exclusive_lock(run_dir):
        trainer.restore()
        remove_partials(run_dir)
        atomic_write(run_dir / RECIPE, to_yaml(recipe))
        logger = MetricLogger(run_dir, trainer.step, recipe.training.steps, tensorboard=False)
        try:
            with stop_signals() as signals:
                trainer.train(logger, signals)
            if not (run_dir / CODEC).exists():
                trainer.save_codec()
            if not (run_dir / SCORES).exists():
                logger.info(f"scoring {len(trainer.held_out)} held-out images")
                logger.info(trainer.score())
        finally:
            logger.close()
    return run_dir / CODEC


class CodecTrainer:
    """The training of a codec at some step."""

    def __init__(self, recipe: CodecRecipe) -> None:
        """Open the data and build the network. Raises TesseraError."""
        self.recipe, self.config, self.run_dir = recipe, recipe.training, Path(recipe.run_dir)
        _check_sizes(recipe)
        config = self.config
        self.device = runtime.choose_device(config.device)
        self.dtype = runtime.autocast_dtype(config.precision, self.device)
        self.extractor = load_extractor(recipe.features, self.device) if recipe.features else None
        self.dataset = recipe.data.open()
        count = len(self.dataset)
        if count < config.num_held_out + config.global_batch_size:
            raise TesseraError(
                f"{recipe.data.description} holds {count} images, which is too few for training.num_held_out="
                f"{config.num_held_out} and one batch of {config.global_batch_size}"
            )
        # The same images for every training seed, so that runs compare.
        order = randomness.permutation(0, HELD_OUT_STREAM, 0, count).numpy()
        self.held_out = np.sort(order[: config.num_held_out])
        self.training_indices = np.sort(order[config.num_held_out :])
        subset = Subset(self.dataset, self.training_indices)
        self.loader = Loader(subset, config.global_batch_size, config.seed, config.num_workers)
        torch.manual_seed(config.seed)
        self.network = recipe.autoencoder.build(recipe.data.channels).to(self.device)
        self.ema_network = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [{"params": list(self.network.parameters()), "lr_scale": 1.0}],
            lr=config.optimizer.learning_rate,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
        )
        self.step, self.seconds, self.cpu_seconds = 0, 0.0, 0.0

    def train(self, logger: MetricLogger, signals: list[int]) -> None:
        """Train until the last step. Saves and raises Interrupted once `signals` is not empty."""
        config = self.config
        logger.start(self.step)
        batches = self.loader.batches(self.step * config.global_batch_size)
        start, cpu_start = time.monotonic(), time.process_time()
        logged_step, sums = self.step, {"l1": 0.0, "kl": 0.0}
        try:
            while self.step < config.steps:
                for name, value in self.train_step(next(batches)).items():
                    sums[name] += value
                logger.advance(self.step)
                if self.step % config.log_every == 0 or self.step == config.steps:
                    seconds, steps = time.monotonic() - start, self.step - logged_step
                    means = {name: value / steps for name, value in sums.items()}
                    loss = means["l1"] + config.kl_weight * means["kl"]
                    rate = steps * config.global_batch_size / seconds
                    logger.record(self.step, **means, loss=loss, images_per_second=rate)
                    self.seconds += seconds
                    self.cpu_seconds += time.process_time() - cpu_start
                    start, cpu_start = time.monotonic(), time.process_time()
                    logged_step, sums = self.step, {"l1": 0.0, "kl": 0.0}
                last = self.step == config.steps
                if self.step % config.checkpoint_every == 0 or last or signals:
                    self.save()
                if signals and not last:
                    raise Interrupted(
                        f"stopped at step {self.step} of {config.steps}; the same command resumes from it"
                    )
        finally:
            batches.close()
        if self.loader.invalid_samples:
            names = [f"{name}: {reason}" for name, reason in self.loader.invalid_samples.items()]
            logger.info(f"{len(names)} images could not be used:{bullet_list(names)}")

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Update the weights and their average. Returns the mean L1 and KL of the batch."""
        config = self.config
        pixels, noise = self.prepare_batch(batch)
        set_learning_rate(self.optimizer, learning_rate(config.optimizer, self.step, config.steps))
        with runtime.autocast(self.dtype, self.device):
            posterior = self.network.encode(pixels).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            decoded = self.network.decode(mean + (0.5 * logvar).exp() * noise).sample
        l1 = (decoded.float() - pixels).abs().mean()
        # KL(N(mean, var) || N(0, 1)), in nats per latent.
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        self.optimizer.zero_grad()
        (l1 + config.kl_weight * kl).backward()
        if config.optimizer.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), config.optimizer.grad_clip_norm)
        if not torch.isfinite(l1 + kl):
            raise TesseraError(
                f"the loss is not finite at step {self.step}: lower training.optimizer.learning_rate "
                f"({config.optimizer.learning_rate:g}) and start again with another run_dir="
            )
        self.optimizer.step()
        self.step += 1
        decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, weight in zip(self.ema_network.parameters(), self.network.parameters()):
                average.lerp_(weight, 1 - decay)
        return {"l1": float(l1.detach()), "kl": float(kl.detach())}

    def prepare_batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """pixels [B, 3, H, W] in -1 .. 1, flipped as the data require, and noise [B, C, h, w], which depend only on the
        positions."""
        position = batch.position.to(self.device)
        pixels = batch.pixels.to(self.device).float() / 127.5 - 1
        if self.recipe.data.hflip:
            flip = flip_mask(self.config.seed, position)[..., None, None]
            pixels = torch.where(flip, pixels.flip(-1), pixels)
        shape = self.recipe.autoencoder
        size = (shape.latent_channels, *(side // shape.factor for side in pixels.shape[-2:]))
        return pixels, randomness.normal(self.config.seed, position, POSTERIOR_STREAM, size)

    def save(self) -> None:
        """Replace the checkpoint: tensors as safetensors, the rest as JSON in the header of the same file."""
        tensors = {f"network/{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"ema/{name}": tensor for name, tensor in self.ema_network.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{key}": tensor for key, tensor in state.items()}
        metadata = {
            "tessera_version": __version__,
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "recipe": self.recipe.model_dump(mode="json"),
        }
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_file(self.run_dir / CHECKPOINT) as partial:
            save_file(contiguous, partial, {name: json.dumps(value) for name, value in metadata.items()})

    def restore(self) -> None:
        """Restore the checkpoint of the run, if there is one. Raises TesseraError if it belongs to another recipe."""
        path = self.run_dir / CHECKPOINT
        if not path.exists():
            if (self.run_dir / "checkpoints").exists():
                raise TesseraError(f"{self.run_dir} holds a run of `tessera train`: choose another run_dir=")
            if (self.run_dir / "checkpoint.pt").exists():
                raise TesseraError(
                    f"{self.run_dir} was written by Tessera 0.6.0 or earlier, and Tessera {__version__} cannot resume "
                    "it: choose another run_dir="
                )
            return
        try:
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            before: dict[str, Any] = metadata["recipe"]
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise TesseraError(f"{path} is damaged ({error}): remove {self.run_dir} to start again") from None
        after = self.recipe.model_dump(mode="json")
        changes = [f"{name} was {old}, is {new}" for name, old, new in diff(before, after) if name not in CHANGEABLE]
        if changes:
            raise TesseraError(
                f"{self.run_dir} holds a run of another recipe:{bullet_list(changes)}\n"
                "undo the change, or start again with another run_dir="
            )
        self.step, self.seconds, self.cpu_seconds = (metadata[name] for name in ("step", "seconds", "cpu_seconds"))
        groups: dict[str, dict[str, Tensor]] = {"network": {}, "ema": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            groups[kind][rest] = tensor
        self.network.load_state_dict(groups["network"])
        self.ema_network.load_state_dict(groups["ema"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in groups["optimizer"].items():
            number, _, key = name.partition("/")
            state.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    @torch.no_grad()
    def save_codec(self) -> None:
        """Save the averaged weights as a codec whose latents have mean 0 and variance 1 in each channel."""
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        batch_size = self.config.global_batch_size
        for position in range(0, min(NUM_STATISTICS, len(self.training_indices)), batch_size):
            # Images of the training positions, flipped as in training: the data of a diffusion model.
            pixels, _ = self.prepare_batch(self.loader.load_batch(position))
            posterior = self.ema_network.encode(pixels).latent_dist
            mean, variance = posterior.mean.double(), posterior.var.double()
            count += mean.numel() // mean.shape[1]
            total = total + mean.sum(dim=(0, 2, 3)).cpu()
            squares = squares + (mean.square() + variance).sum(dim=(0, 2, 3)).cpu()
        shift = total / count
        deviation = (squares / count - shift.square()).sqrt()
        if not (deviation > 0).all():
            raise TesseraError(
                "a channel of the latents is constant: train with more steps, or with fewer autoencoder.latent_channels"
            )
        with atomic_folder(self.run_dir / CODEC) as partial:
            write(self.ema_network, partial, (1 / deviation)[:, None, None], shift[:, None, None])

    def score(self) -> str:
        """Write scores.json and reconstructions.png for the held-out images and the saved codec. Returns the scores."""
        codec = AutoencoderConfig(source=str(self.run_dir / CODEC)).build().to(self.device)
        result = reconstruct(codec, self.dataset, self.held_out.tolist(), self.device, self.extractor)
        images.save_png(self.run_dir / RECONSTRUCTIONS, images.grid(comparison_rows(result), columns=8, gap=2))
        scores = scores_to_json(result, self.extractor) | {
            "steps": self.step,
            "training_minutes": round(self.seconds / 60, 2),
            "cpu_minutes": round(self.cpu_seconds / 60, 2),
        }
        atomic_write(self.run_dir / SCORES, json.dumps(scores, indent=2) + "\n")
        return format_scores(result, self.extractor)


def scores_to_json(result: Reconstruction, extractor: FeatureExtractor | None) -> dict[str, Any]:
    """The scores with their intervals."""
    estimates = {"psnr": result.psnr, "ssim": result.ssim} | ({"fd": result.fd} if result.fd is not None else {})
    scores: dict[str, Any] = {"images": result.count}
    for name, estimate in estimates.items():
        scores[name] = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    if extractor is not None and result.fd is not None:
        scores["features"] = extractor.identity
    return scores | {"latents": {"mean": result.latent_mean, "std": result.latent_std}}


def format_scores(result: Reconstruction, extractor: FeatureExtractor | None) -> str:
    """The scores as lines of text."""
    rows = [
        ("psnr", f"{result.psnr.value:.2f} dB  ({result.psnr.low:.2f} to {result.psnr.high:.2f})"),
        ("ssim", f"{result.ssim.value:.4f}  ({result.ssim.low:.4f} to {result.ssim.high:.4f})"),
    ]
    if result.fd is not None and extractor is not None:
        fd, size = result.fd, extractor.size
        note = extractor.name + (f", images reduced to {size[0]} x {size[1]}" if size else "")
        rows.append(("fd", f"{fd.value:.4g}  ({fd.low:.4g} to {fd.high:.4g}; {note})"))
    rows.append(("latents", f"mean {result.latent_mean:.3f}, standard deviation {result.latent_std:.3f}"))
    return "\n".join([f"{result.count} images", *(f"{name:<9}{text}" for name, text in rows)])


def _check_sizes(recipe: CodecRecipe) -> None:
    height, width = recipe.data.size
    factor = recipe.autoencoder.factor
    if height % factor or width % factor:
        raise TesseraError(
            f"data.size {height} x {width} is not a multiple of {factor}, the factor of autoencoder.channels: "
            f"{len(recipe.autoencoder.channels)} resolutions, each half the previous one"
        )
    if min(height, width) < WINDOW:
        raise TesseraError(f"data.size is {height} x {width}, but SSIM, one of the scores, needs {WINDOW} or more")
    if recipe.data.frames is not None:
        raise TesseraError(
            "this codec is trained on images, and encodes each frame of a clip by itself: leave out data.frames, and "
            "give the frames as images"
        )
    if getattr(recipe.data, "buckets", None) is not None:
        raise TesseraError("a codec is trained on one size, but it works on any: leave out data.buckets")
