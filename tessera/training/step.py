"""One step of training: what is drawn at random, the loss, the update.

Everything random is a function of (seed, global position of the sample), so that ranks, restarts and micro-batches
change nothing. Shapes: B batch, C channels, H W height and width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tessera import randomness, runtime
from tessera.codecs.autoencoder import Autoencoder
from tessera.codecs.pixels import Pixels
from tessera.conditions import Condition
from tessera.data import Batch
from tessera.process import Process
from tessera.process.prediction import Losses
from tessera.sampling.denoiser import Network
from tessera.training.optimizers import Optimizer

# Streams of randomness: one for each use, never renumbered, or old runs could not be resumed.
TIME, NOISE, DROP, FLIP, POSTERIOR = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Task:
    """What a step needs beside weights and data."""

    process: Process
    codec: Pixels | Autoencoder
    flip: bool
    label_dropout: float
    classes: int
    seed: int
    dtype: torch.dtype | None  # of autocast


def prepare(batch: Batch, task: Task, device: torch.device) -> tuple[Tensor, Condition, Tensor]:
    """A batch on the device: latents [B, C, h, w] (scaled, flipped, encoded), condition , position [B]."""
    position = batch.position.to(device)
    pixels = batch.pixels.to(device, torch.float32, non_blocking=True) / 127.5 - 1
    if task.flip:
        mirrored = randomness.uniform(task.seed, position, FLIP) < 0.5
        pixels = torch.where(mirrored[..., None, None], pixels.flip(-1), pixels)
    if isinstance(task.codec, Autoencoder):
        shape = (task.codec.latent_channels, *(side // task.codec.factor for side in pixels.shape[-2:]))
        pixels = task.codec.encode(pixels, randomness.normal(task.seed, position, POSTERIOR, shape))
    condition = Condition()
    if task.classes:
        condition = Condition(label=batch.label.to(device))
        if task.label_dropout:
            condition = condition.drop(randomness.uniform(task.seed, position, DROP)[:, 0] < task.label_dropout)
    return pixels, condition, batch.position


def losses(network: Network, x0: Tensor, condition: Condition, position: Tensor, task: Task) -> Losses:
    """The process's training losses at times and noise drawn for these positions. x0 [B, C, h, w], position [B]"""
    t = task.process.draw_times(randomness.uniform(task.seed, position, TIME)[:, 0])
    noise = randomness.normal(task.seed, position.to(x0.device, non_blocking=True), NOISE, tuple(x0.shape[1:]))
    with runtime.autocast(task.dtype, x0.device):
        raw = network(
            task.process.mix(x0, noise, t), task.process.network_time(t).to(x0.device, non_blocking=True), condition
        )
    return task.process.loss(raw.float(), x0, noise, t)


def train_step(
    network: Network, optimizer: torch.optim.Optimizer, batch: Batch, task: Task, config: Optimizer, micro: int
) -> dict[str, Tensor]:
    """Gradients of the mean loss over a batch, `micro` samples at a time, and one update.

    Returns the means of the losses and the gradient's norm as tensors on the device: reading them is the caller's time
    to spend.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device, count = parameters[0].device, len(batch.position)
    told: dict[str, Tensor] = {}
    for start in range(0, count, micro):
        part = slice(start, start + micro)
        x0, condition, position = prepare(
            Batch(batch.pixels[part], batch.label[part], batch.position[part]), task, device
        )
        found = losses(network, x0, condition, position, task)
        (found.total.sum() / count).backward()
        for name, value in (("loss", found.total), ("mse", found.mse), ("vb", found.vb)):
            if value is not None:
                share = value.detach().sum() / count
                told[name] = told[name] + share if name in told else share
    told["gradient_norm"] = nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return told
