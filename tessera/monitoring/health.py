"""What is measured cheaply while a run goes on, for `tessera doctor` to read later.

Nothing here waits for the device but the end of a probe, once. Shapes: B samples, C channels, L tokens (with those of
the condition, where they are appended), D width, K heads, H channels of a head, P parameters.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from tessera import randomness, runtime
from tessera.conditioning import Condition
from tessera.data import Batch
from tessera.diffusion import DiffusionProcess
from tessera.layers.modulation import Modulation, ScaleShiftTable
from tessera.layers.patches import patchify
from tessera.models.dit import DiT
from tessera.models.network import Network
from tessera.training.objective import NOISE, TrainingObjective, prepare_batch

BINS = 10  # of time, of equal width
PROBE = 16  # samples of a probe at most; of a small batch half, so that a probe costs less than a step
STILL = 0.02  # a place of the data whose spread between samples is less hardly varies; the noise's is 1
DEAD = 0.1  # a place of the output that varies less than this share of what it is trained towards hardly varies
LOGITS = 2**23  # attention logits held at once
GROUPS = {"x_embedder": "patches", "t_embedder": "time", "y_embedder": "labels", "final_layer": "readout"}


def bin_by_timestep(mse: Tensor, t: Tensor) -> Tensor:
    """Losses mse [B] summed by the time t [B] of their samples, 0 to 1, and how many there were: [2, BINS]"""
    place = (t * BINS).to(torch.int64).clamp(max=BINS - 1).to(mse.device, non_blocking=True)
    pairs = torch.stack((mse.detach().float(), torch.ones_like(mse, dtype=torch.float32)))
    return pairs.new_zeros(2, BINS).index_add_(1, place, pairs)


def group_of(name: str) -> str:
    """Which part of the network a parameter belongs to: patches, time, labels, shared, blocks.0, .., readout."""
    first, _, rest = name.partition(".")
    return f"blocks.{rest.partition('.')[0]}" if first == "blocks" else GROUPS.get(first, first)


def groups(names: Iterable[str]) -> tuple[list[str], Tensor]:
    """The parts in the order in which they come, and the place in that list of each parameter: int64 [P]

    So that `zeros(len(list)).index_add(0, places, squared norms)` are the squared norms of the parts.
    """
    of_each = [group_of(name) for name in names]
    found = list(dict.fromkeys(of_each))
    return found, torch.tensor([found.index(group) for group in of_each], dtype=torch.int64)


@torch.no_grad()
def distance(lives: list[Tensor], means: list[Tensor]) -> Tensor:
    """How far averages are from their weights, as (sum |mean - live|^2, sum |live|^2): float32 [2]

    Sums, so that ranks that hold shards of the tensors can add theirs; the distance is the root of their ratio.
    """
    sums = torch.zeros(2, device=lives[0].device) if lives else torch.zeros(2)
    for first in range(0, len(lives), 32):  # not a copy of the whole network at once
        part = lives[first : first + 32]
        apart = torch._foreach_sub(means[first : first + 32], part)  # pyright: ignore[reportPrivateImportUsage]
        for place, tensors in enumerate((apart, part)):
            norms = torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateImportUsage]
            sums[place] += torch.stack(norms).float().square().sum()
    return sums


def probe(network: Network, averaged: Network, batch: Batch, task: TrainingObjective) -> dict[str, Any]:
    """What a network does inside with the first samples of a batch, and how well it and its average do, as numbers.

    The same times in every probe, noise as in training of these positions, no label withheld.

    Of each block, in a list: attention_logits (the largest q.k / sqrt(H) in magnitude), activations (rms of the tokens
    behind it) and, in designs that have them, gates and scales (rms of both). Mean squared errors: loss_probe of the
    weights, loss_ema of the average, loss_wrong_labels of the weights told labels of which each is wrong. Of x0:
    data_mean, data_std and, between samples, data_spread; still_patches and dead_patches are the shares of token
    positions at which the data or the output hardly vary between samples.

    What cannot be said of so few samples or of no classes is absent; what is not finite is None, as are the logits of
    blocks that do not attend. A U-Net has positions as wide as its deepest level sees them.
    """
    count = min(PROBE, max(4, len(batch.position) // 2))
    samples = replace(batch, **{name: getattr(batch, name)[:count] for name in ("pixels", "label", "position")})
    device = next(network.parameters()).device
    # Whatever is compiled runs as it is written: compiled code is blind to hooks, and other shapes would compile anew.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        x0, condition, position = prepare_batch(samples, replace(task, label_dropout=0.0), device)
        t = stratified(len(x0), task.diffusion)
        noise = randomness.normal(task.seed, position.to(device, non_blocking=True), NOISE, tuple(x0.shape[1:]))
        x, time = task.diffusion.add_noise(x0, noise, t), task.diffusion.model_time(t).to(device, non_blocking=True)

        def answer(asked: Network, told: Condition) -> Tensor:
            with runtime.autocast(task.dtype, device):
                return asked(x, time, told).float()

        def mse(raw: Tensor) -> Tensor:
            return task.diffusion.loss(raw, x0, noise, t).mse.mean()

        with watched(network) as seen:
            raw = answer(network, condition)
        found: dict[str, Tensor] = {name: torch.stack(values) for name, values in seen.items() if values}
        found |= {"loss_probe": mse(raw), "loss_ema": mse(answer(averaged, condition))}
        if condition.label is not None and task.num_classes > 1:
            wrong = wrong_labels(condition.label, task.num_classes)
            found["loss_wrong_labels"] = mse(answer(network, replace(condition, label=wrong)))
        found |= {"data_mean": x0.mean(), "data_std": x0.std(correction=0)}
        if len(x0) > 1:
            patch, target = network.config.size_multiple, task.diffusion.training_target(x0, noise, t)
            data, wanted, said = (_variation(each, patch) for each in (x0, target, raw[:, : x0.shape[1]]))
            found["data_spread"] = x0.var(dim=0).mean().sqrt()
            found["still_patches"] = (data < STILL).float().mean()
            found["dead_patches"] = (said < DEAD * wanted).float().mean()
        return _numbers(found)


def stratified(count: int, process: DiffusionProcess) -> Tensor:
    """Times in the middles of equal parts of 0 to 1; of a process in steps, the steps there. float32 [count]"""
    middles = (torch.arange(count, dtype=torch.float32) + 0.5) / count
    return middles if process.steps is None else process.sample_timesteps(middles)


def wrong_labels(label: Tensor, classes: int) -> Tensor:
    """The labels [B] dealt out anew so that each is wrong; where too few others are to be had, the next class is."""
    order = torch.argsort(label, stable=True)
    # Half the way round a sorted list equal labels meet only where they are more than half of it.
    dealt = torch.empty_like(label).index_copy_(0, order, label[order].roll(len(label) // 2))
    return torch.where(dealt == label, (label + 1) % classes, dealt)


@contextmanager
def watched(network: Network) -> Iterator[dict[str, list[Tensor]]]:
    """Instruments on a network while it runs once: lists of one number (a tensor) for each block, by name.

    attention_logits, activations, gates, scales; a list stays empty in designs that have no such thing.
    """
    seen: dict[str, list[Tensor]] = {"attention_logits": [], "gates": [], "scales": [], "activations": []}
    attention, width = _Attention(), network.config.hidden_size if isinstance(network, DiT) else 0

    def after_block(module: nn.Module, given: Any, tokens: Tensor) -> None:
        seen["activations"].append(_rms(tokens))
        # Of one or two attentions in a block; of a block that does not attend, none.
        logits = torch.stack(attention.largest).amax() if attention.largest else tokens.new_tensor(math.nan)
        seen["attention_logits"].append(logits)
        attention.largest.clear()

    def after_steering(module: nn.Module, given: Any, vectors: Tensor) -> None:
        # shift, scale, gate twice, or without gates
        parts = vectors.unflatten(-1, (2, -1, width))
        seen["scales"].append(_rms(parts[..., 1, :]))
        if parts.shape[-2] == 3:
            seen["gates"].append(_rms(parts[..., 2, :]))

    hooks = []
    try:
        for block in network.blocks:
            hooks.append(block.register_forward_hook(after_block))
            steering = getattr(block, "adaLN_modulation", None)
            if isinstance(steering, Modulation | ScaleShiftTable):
                hooks.append(steering.register_forward_hook(after_steering))
        with attention:
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


class _Attention(TorchFunctionMode):
    """Sees each attention's queries and keys, whoever calls it, and notes the largest logit in magnitude."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            self.largest.append(largest_logit(args[0], args[1]))
        return func(*args, **(kwargs or {}))


def largest_logit(q: Tensor, k: Tensor) -> Tensor:
    """The largest |q.k| / sqrt(H) of queries [B, K, L, H] and keys [B, K, M, H], some samples at a time."""
    each = q.shape[1] * q.shape[2] * k.shape[2]
    rows = max(1, LOGITS // each)
    ends = [torch.aminmax(a @ b.mT) for a, b in zip(q.split(rows), k.split(rows))]
    return torch.stack([end.float().abs() for both in ends for end in both]).amax() / math.sqrt(q.shape[-1])


def _rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float32) / math.sqrt(x.numel())


def _variation(x: Tensor, patch: int) -> Tensor:
    """How much each patch of x [B, C, h p, w p] varies between samples, a standard deviation: [h w]"""
    return patchify(x.float(), patch).var(dim=0).mean(dim=-1).sqrt()


def _numbers(found: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors of no or one dimension as numbers and lists of them, in one transfer; None for what is not finite."""
    told = iter(torch.cat([value.float().flatten() for value in found.values()]).tolist())
    finite = (value if math.isfinite(value) else None for value in told)
    return {
        name: next(finite) if value.ndim == 0 else [next(finite) for _ in range(len(value))]
        for name, value in found.items()
    }
