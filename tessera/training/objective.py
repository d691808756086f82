"""What a network is set to do: what becomes of a batch, what is drawn at random, the loss.

Everything random is a function of (seed, global position of the sample), so that ranks, restarts and micro-batches
change nothing. Shapes: B batch, C channels, H W height and width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera import randomness, runtime
from tessera.codecs import Codec
from tessera.conditioning import Condition, NetworkFunction
from tessera.data import Batch
from tessera.data.loader import flip_mask
from tessera.diffusion import DiffusionProcess
from tessera.diffusion.prediction import Losses

# Streams of randomness: one for each use, never renumbered, or old runs could not be resumed.
TIME, NOISE, DROP, POSTERIOR = 1, 2, 3, 5  # 4: flips, in data.loader


@dataclass(frozen=True)
class TrainingObjective:
    """What a step needs beside weights and data."""

    diffusion: DiffusionProcess
    codec: Codec
    hflip: bool
    label_dropout: float
    num_classes: int
    seed: int
    dtype: torch.dtype | None  # of autocast


def prepare_batch(batch: Batch, task: TrainingObjective, device: torch.device) -> tuple[Tensor, Condition, Tensor]:
    """A batch on the device: latents [B, C, h, w] (flipped, encoded, scaled), condition, position [B].

    Where the batch holds raw moments, it was encoded and flipped before.
    """
    position = batch.position.to(device, non_blocking=True)
    given = batch.pixels.to(device, torch.float32, non_blocking=True)
    cached, codec = batch.pixels.is_floating_point(), task.codec
    if not cached:
        given = given / 127.5 - 1
        if task.hflip:
            given = torch.where(flip_mask(task.seed, position)[..., None, None], given.flip(-1), given)
    noise = None
    if codec.stochastic:
        factor = 1 if cached else codec.factor
        shape = (codec.latent_channels, *(side // factor for side in given.shape[-2:]))
        noise = randomness.normal(task.seed, position, POSTERIOR, shape)
    x0 = codec.latents(given, noise) if cached else codec.encode(given, noise)
    condition = Condition()
    if task.num_classes:
        condition = Condition(label=batch.label.to(device, non_blocking=True))
        if task.label_dropout:
            condition = condition.drop(randomness.uniform(task.seed, position, DROP)[:, 0] < task.label_dropout)
    return x0, condition, batch.position


def compute_loss(
    network: NetworkFunction, x0: Tensor, condition: Condition, position: Tensor, task: TrainingObjective
) -> tuple[Losses, Tensor]:
    """The process's training losses at times and noise drawn for these positions, and the times [B], in 0 .. 1.

    x0 [B, C, h, w], position [B]
    """
    t = task.diffusion.sample_timesteps(randomness.uniform(task.seed, position, TIME)[:, 0])
    noise = randomness.normal(task.seed, position.to(x0.device, non_blocking=True), NOISE, tuple(x0.shape[1:]))
    with runtime.autocast(task.dtype, x0.device):
        raw = network(
            task.diffusion.add_noise(x0, noise, t),
            task.diffusion.model_time(t).to(x0.device, non_blocking=True),
            condition,
        )
    return task.diffusion.loss(raw.float(), x0, noise, t), t
