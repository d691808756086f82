"""The training objective: how a batch becomes latents and a condition, what is sampled at random, and the loss.

All randomness is a function of (seed, global position of the sample), so the result does not depend on the number of
ranks, on restarts or on the micro batch size. Shapes: B batch, C channels, H W height and width, h w of the latents.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tessera import randomness, runtime
from tessera.codecs import Codec
from tessera.conditioning import Condition, NetworkFunction, dropout_stream
from tessera.data import Batch
from tessera.data.loader import flip_mask
from tessera.diffusion import DiffusionProcess
from tessera.diffusion.process import Losses
from tessera.models.dit import DiT
from tessera.monitoring import health
from tessera.training.alignment import Alignment
from tessera.training.distillation import Distillation
from tessera.training.frame_times import AnyFrameTimes, MixedTimes, SharedTimes
from tessera.training.token_routing import TokenRouting
from tessera.training.token_times import AnyTokenTimes, DualTokenTimes, SharedTokenTimes, times_of_pixels

SHARED_TIMES, SHARED_TOKEN_TIMES = SharedTimes(), SharedTokenTimes()
# Random streams, one for each use; `frame_times`, `token_times` and `distillation` have others. Never change a number:
# an old run could not be resumed exactly.
TIMESTEP_STREAM, NOISE_STREAM, CONDITION_DROPOUT_STREAM, POSTERIOR_STREAM = 1, 2, 3, 5  # 4: data.loader.FLIP_STREAM


@dataclass(frozen=True)
class TrainingObjective:
    """Everything that the loss of a batch depends on beside the weights and the batch."""

    diffusion: DiffusionProcess
    codec: Codec
    hflip: bool
    condition_dropout: float  # of all conditions together
    null_fields: tuple[str, ...]  # the fields of the condition that have a null value
    seed: int
    dtype: torch.dtype | None  # of autocast
    field_dropout: Mapping[str, float] = field(default_factory=dict)  # of single fields, each by itself
    uniform_numbers: int = 0  # that the network uses for each row
    frame_times: AnyFrameTimes = SHARED_TIMES  # of clips
    token_times: AnyTokenTimes = SHARED_TOKEN_TIMES  # of images
    patch_size: int = 1  # of the tokens that have times
    alignment: Alignment | None = None  # of features
    token_routing: TokenRouting | None = None
    distillation: Distillation | None = None  # of a teacher, in place of the data's own velocity
    empty_text: Condition | None = None  # an encoded empty prompt, one row, in place of null text


def prepare_batch(batch: Batch, objective: TrainingObjective, device: torch.device) -> tuple[Tensor, Condition, Tensor]:
    """A batch on the device: latents [B, C, h, w] or [B, C, T, h, w] (flipped, encoded, scaled), condition, position.

    A batch from a latent cache holds the raw moments of images that were flipped and encoded before.
    """
    position = batch.position.to(device, non_blocking=True)
    values = batch.pixels.to(device, torch.float32, non_blocking=True)
    cached, codec = batch.pixels.is_floating_point(), objective.codec
    if not cached:
        values = _model_pixels(values, position, objective)
    noise = None
    if codec.stochastic:
        size = tuple(values.shape[2:]) if cached else codec.latent_size(values.shape[2:])
        noise = randomness.normal(objective.seed, position, POSTERIOR_STREAM, (codec.latent_channels, *size))
    x0 = codec.latents(values, noise) if cached else codec.encode(values, noise)
    condition = batch.condition.to(device)
    if batch.control is not None:
        images = _model_pixels(batch.control.to(device, torch.float32, non_blocking=True), position, objective)
        condition = replace(condition, control=codec.encode(images)[:, None])
    if objective.condition_dropout:
        uniform = randomness.uniform(objective.seed, position, CONDITION_DROPOUT_STREAM)[:, 0]
        condition = condition.drop(uniform < objective.condition_dropout, objective.null_fields)
    for name, rate in objective.field_dropout.items():
        uniform = randomness.uniform(objective.seed, position, dropout_stream(name))[:, 0]
        condition = condition.drop(uniform < rate, [name])
    if objective.empty_text is not None:
        condition = condition.with_empty_text(objective.empty_text)
    if objective.uniform_numbers:
        stream, count = dropout_stream("uniform"), objective.uniform_numbers
        condition = replace(condition, uniform=randomness.uniform(objective.seed, position, stream, count))
    return x0, condition, batch.position


def _model_pixels(pixels: Tensor, position: Tensor, objective: TrainingObjective) -> Tensor:
    """Pixels 0..255 as -1..1, those of some positions flipped: [B, C, ...]"""
    pixels = pixels / 127.5 - 1
    if not objective.hflip:
        return pixels
    flipped = flip_mask(objective.seed, position).view(-1, *(1,) * (pixels.ndim - 1))
    return torch.where(flipped, pixels.flip(-1), pixels)


@torch.no_grad()
def probe_inputs(batch: Batch, objective: TrainingObjective, device: torch.device) -> tuple[Tensor, Condition, Tensor]:
    """The first samples of a batch for `health.probe`: latents and noise as in training, condition without dropout."""
    samples = batch[: health.probe_size(len(batch.position))]
    with torch.compiler.set_stance("force_eager"):  # another batch size would trigger recompilation
        without_dropout = replace(objective, condition_dropout=0.0, field_dropout={}, uniform_numbers=0)
        x0, condition, position = prepare_batch(samples, without_dropout, device)
    return x0, condition, sample_noise(x0, position, objective)


def sample_noise(x0: Tensor, position: Tensor, objective: TrainingObjective) -> Tensor:
    """The noise that belongs to these positions, like x0 [B, C, h, w]."""
    device_position = position.to(x0.device, non_blocking=True)
    return randomness.normal(objective.seed, device_position, NOISE_STREAM, tuple(x0.shape[1:]))


def compute_loss(
    network: NetworkFunction,
    x0: Tensor,
    condition: Condition,
    position: Tensor,
    objective: TrainingObjective,
    own_frames: Tensor | None = None,
) -> tuple[Losses, Tensor]:
    """The losses at the timesteps and noise that belong to these positions, and the timesteps [B], from 0 to 1: of
    clips, the means of the frames that have a loss.

    x0 [B, C, h, w] or [B, C, T, h, w], position [B]; own_frames [B]: frames in pixels that are no padding, which has no
    loss
    """
    if objective.distillation is not None:
        noise = sample_noise(x0, position, objective)
        return objective.distillation.loss(network, x0, noise, condition, position)
    t = objective.diffusion.sample_timesteps(randomness.uniform(objective.seed, position, TIMESTEP_STREAM)[:, 0])
    noise, frames = sample_noise(x0, position, objective), None
    if isinstance(objective.frame_times, MixedTimes) and x0.ndim == 5:
        frames = objective.frame_times.sample(t, x0.shape[2], position, objective.seed, objective.diffusion)
        t = frames.t
    network_t, mean_t = t, t if frames is None else frames.mean
    if isinstance(objective.token_times, DualTokenTimes):
        grid = x0.shape[2] // objective.patch_size, x0.shape[3] // objective.patch_size
        network_t = objective.token_times.sample(t, math.prod(grid), position, objective.seed, objective.diffusion)
        t, mean_t = times_of_pixels(network_t, grid, objective.patch_size), network_t.mean(dim=1)
    x = objective.diffusion.add_noise(x0, noise, t)
    time = objective.diffusion.model_time(network_t).to(x0.device, non_blocking=True)
    alignment, routing, features = objective.alignment, objective.token_routing, None
    with runtime.autocast(objective.dtype, x0.device):
        if alignment is None and routing is None:
            raw = network(x, time, condition)
        else:
            assert isinstance(network, DiT)
            block = None
            if alignment is not None and alignment.is_active(position):
                block = alignment.config.block_of(len(network.blocks))
            route = None if routing is None else routing.route(network, math.prod(network.grid(x)), position)
            raw, features = network.training_forward(x, time, condition, block, route)
    with_loss, loss_t = (None, t) if frames is None else (frames.loss_frames, frames.loss_t)
    if own_frames is not None and x0.ndim == 5:
        is_own = torch.arange(x0.shape[2]) * objective.codec.frame_factor < own_frames.cpu()[:, None]
        if not is_own.all():
            with_loss = is_own if with_loss is None else is_own & with_loss
            loss_t = loss_t if loss_t.ndim == 2 else loss_t[:, None].expand(-1, x0.shape[2])
    losses = objective.diffusion.loss(raw.float(), x0, noise, loss_t, with_loss)
    if alignment is not None:
        losses = alignment.add(losses, features, x0, noise, network_t, condition, position)
    return losses, mean_t
