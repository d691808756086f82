"""Health metrics that are cheap to measure during training; `tessera doctor` reads them later.

A probe waits for the device once, at its end. Shapes: B samples, C channels, L tokens (with condition tokens, if they
are appended), D width, K heads, H channels of a head, P parameters.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from tessera import runtime
from tessera.conditioning import Condition
from tessera.diffusion import DiffusionProcess
from tessera.layers.embeddings import LabelEmbedder, TimestepEmbedder
from tessera.layers.modulation import Modulation, ScaleShiftTable
from tessera.layers.patches import patchify
from tessera.models.dit import DiT
from tessera.models.network import Network

BINS = 10  # of the timestep, of equal width
MAX_PROBE = 16  # samples of a probe
STILL = 0.02  # patches whose standard deviation between samples is below this hardly vary; that of the noise is 1
DEAD = 0.1  # the same for the output, as a fraction of the standard deviation of its target
MAX_LOGITS = 2**23  # attention logits held in memory at a time
GROUPS = {
    "x_embedder": "patches",
    "t_embedder": "time",
    "step_size_embedder": "step size",
    "feature_head": "features",
    "y_embedder": "labels",
    "final_layer": "head",
}
EMBEDDERS = {"t_embedder": "norm_time", "y_embedder": "norm_labels"}  # and the metrics of their outputs


def bin_by_timestep(mse: Tensor, t: Tensor) -> Tensor:
    """Sums of the losses mse [B] by the timesteps t [B] in 0 .. 1, and the number of samples in each bin: [2, BINS]"""
    bins = (t * BINS).to(torch.int64).clamp(max=BINS - 1).to(mse.device, non_blocking=True)
    pairs = torch.stack((mse.detach().float(), torch.ones_like(mse, dtype=torch.float32)))
    return pairs.new_zeros(2, BINS).index_add_(1, bins, pairs)


def parameter_group(name: str) -> str:
    """The part of the network that a parameter belongs to: patches, time, labels, shared, blocks.0, .., head."""
    first, _, rest = name.partition(".")
    return f"blocks.{rest.partition('.')[0]}" if first == "blocks" else GROUPS.get(first, first)


def parameter_groups(names: Iterable[str]) -> tuple[list[str], Tensor]:
    """The groups in order of appearance, and the group index of each parameter: int64 [P]

    `zeros(len(groups)).index_add(0, indices, squared norms)` gives the squared norms of the groups.
    """
    group_of_each = [parameter_group(name) for name in names]
    groups = list(dict.fromkeys(group_of_each))
    return groups, torch.tensor([groups.index(group) for group in group_of_each], dtype=torch.int64)


@torch.no_grad()
def squared_distance(weights: list[Tensor], averages: list[Tensor]) -> Tensor:
    """(sum |average - weight|^2, sum |weight|^2): float32 [2]. The relative distance is the root of their ratio.

    Ranks that hold shards of the tensors can add up these sums.
    """
    sums = torch.zeros(2, device=weights[0].device) if weights else torch.zeros(2)
    for start in range(0, len(weights), 32):  # avoids a copy of the whole network
        part = weights[start : start + 32]
        delta = torch._foreach_sub(averages[start : start + 32], part)  # pyright: ignore[reportPrivateImportUsage]
        for index, tensors in enumerate((delta, part)):
            norms = torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateImportUsage]
            sums[index] += torch.stack(norms).float().square().sum()
    return sums


def probe_size(batch_size: int) -> int:
    """The number of samples of a probe: of a small batch half, so that a probe costs less than a step."""
    return min(MAX_PROBE, max(4, batch_size // 2))


def probe(
    network: Network,
    ema_network: Network,
    x0: Tensor,
    condition: Condition,
    noise: Tensor,
    diffusion: DiffusionProcess,
    num_classes: int,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Losses and internal statistics of a network for latents x0 and noise [B, C, h, w], with their condition.

    Every probe uses the same timesteps. dtype: of autocast.

    Lists with one value per block: attention_logits (the largest |q.k| / sqrt(H)), activations (rms of the tokens after
    the block) and, in designs that have them, gates and scales (rms). Mean squared errors: loss_probe of the weights,
    loss_ema of the averaged weights. For labels, captions and controls: cost_wrong_labels and the other values of
    `wrong_metrics`, if every label is that of another sample. norm_time and norm_labels: mean norms of the vectors of
    timesteps and labels, which most designs add up. Of x0: data_mean, data_std and data_spread (the standard deviation
    between samples). still_patches and dead_patches are the fractions of token positions at which the data or the
    output hardly vary between samples.

    Values that need more samples or classes are absent. Values that are not finite are None, and so are the logits of
    blocks without attention. Token positions of a U-Net are those of its deepest level.
    """
    # Run eagerly: forward hooks do not fire in compiled code, and another batch size would trigger recompilation.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        t = stratified_timesteps(len(x0), diffusion)
        x, time = diffusion.add_noise(x0, noise, t), diffusion.model_time(t).to(x0.device, non_blocking=True)

        def predict(network: Network, condition: Condition) -> Tensor:
            with runtime.autocast(dtype, x0.device):
                return network(x, time, condition).float()

        def mse(raw: Tensor) -> Tensor:
            return diffusion.loss(raw, x0, noise, t).mse

        with instrument(network) as statistics:
            raw = predict(network, condition)
        losses = mse(raw)
        metrics: dict[str, Tensor] = {name: torch.stack(values) for name, values in statistics.items() if values}
        metrics |= {name: metrics[name].mean() for name in EMBEDDERS.values() if name in metrics}
        metrics |= {"loss_probe": losses.mean(), "loss_ema": mse(predict(ema_network, condition)).mean()}
        for name, wrong in wrong_conditions(condition, num_classes).items():
            changed, wrong_raw = changed_rows(condition, wrong), predict(network, wrong)
            metrics |= {
                f"{key}_wrong_{name}": value
                for key, value in wrong_metrics(raw, losses, wrong_raw, mse(wrong_raw), changed).items()
            }
        metrics |= {"data_mean": x0.mean(), "data_std": x0.std(correction=0)}
        if len(x0) > 1:
            patch_size, target = network.config.size_multiple, diffusion.training_target(x0, noise, t)
            data_std, target_std, output_std = (
                _patch_std(tensor, patch_size) for tensor in (x0, target, raw[:, : x0.shape[1]])
            )
            metrics["data_spread"] = x0.var(dim=0).mean().sqrt()
            metrics["still_patches"] = (data_std < STILL).float().mean()
            metrics["dead_patches"] = (output_std < DEAD * target_std).float().mean()
        return _to_numbers(metrics)


def stratified_timesteps(count: int, diffusion: DiffusionProcess) -> Tensor:
    """The centers of equal parts of 0 to 1; of a process in discrete steps, the steps there. float32 [count]"""
    centers = (torch.arange(count, dtype=torch.float32) + 0.5) / count
    return centers if diffusion.num_timesteps is None else diffusion.sample_timesteps(centers)


def wrong_conditions(condition: Condition, num_classes: int) -> dict[str, Condition]:
    """The condition with wrong values in one field, by the name of the values in data: labels, captions, controls."""
    rules, present, result = condition.rules(), condition.present, {}
    for name, value in present.items():
        changes = {}
        if rules[name].discrete and num_classes > 1:
            changes = {name: wrong_labels(value, num_classes)}
        elif not rules[name].discrete and len(value) > 1:
            rows = other_rows(value)
            changes = {each: present[each][rows] for each in (name, *rules[name].companions) if each in present}
        if rules[name].data_name and changes:
            result[rules[name].data_name] = replace(condition, **changes)
    return result


def changed_rows(condition: Condition, wrong: Condition) -> Tensor:
    """Which rows of two conditions differ: bool [B]"""
    pairs = [(value, wrong.present[name]) for name, value in condition.present.items()]
    differ = [(_flat_rows(a) != _flat_rows(b)).any(dim=1) for a, b in pairs if a is not b]
    return torch.stack(differ).any(dim=0)


def wrong_metrics(
    raw: Tensor, losses: Tensor, wrong_raw: Tensor, wrong_losses: Tensor, changed: Tensor
) -> dict[str, Tensor]:
    """What wrong conditions change, from the outputs raw [B, C, ...] and the losses [B] with the right condition and
    with a wrong one, at the same times and noise. changed [B]: which rows have a wrong condition

    loss: the mean with wrong conditions. cost: by which fraction of the loss they raise it, the mean over the changed
    rows, and error, its standard error. change: the rms change of the output, relative to the rms of the output. The
    last three are NaN if no row has a wrong condition, and error is if only one has.
    """
    weights = changed.float()
    count, rises = weights.sum(), wrong_losses - losses
    mean, loss = ((weights * values).sum() / count for values in (rises, losses))
    variance = (weights * (rises - mean).square()).sum() / (count - 1)
    squares = [(weights * values.flatten(1).square().sum(dim=1)).sum() for values in (wrong_raw - raw, raw)]
    return {
        "loss": wrong_losses.mean(),
        "cost": mean / loss,
        "error": (variance / count).sqrt() / loss,
        "change": (squares[0] / squares[1]).sqrt(),
    }


def _flat_rows(value: Tensor) -> Tensor:
    """[B, ...] -> [B, n] float32, without NaN"""
    return value.reshape(len(value), -1).float().nan_to_num()


def other_rows(value: Tensor) -> Tensor:
    """A permutation of the rows of [B, ...] in which each row is replaced by a different one, if no value is in more
    than half of them: int64 [B]"""
    flat = _flat_rows(value)
    order = torch.argsort((flat * torch.linspace(1, 2, flat.shape[1], device=flat.device)).sum(1), stable=True)
    return torch.empty_like(order).index_copy_(0, order, order.roll(len(order) // 2))


def wrong_labels(label: Tensor, num_classes: int) -> Tensor:
    """A permutation of the labels [B] without a correct one; the next class where there are too few other labels."""
    order = torch.argsort(label, stable=True)
    # Rolled by half of a sorted list, equal labels meet only if they are more than half of it.
    permuted = torch.empty_like(label).index_copy_(0, order, label[order].roll(len(label) // 2))
    return torch.where(permuted == label, (label + 1) % num_classes, permuted)


@contextmanager
def instrument(network: Network) -> Iterator[dict[str, list[Tensor]]]:
    """Record statistics of a network during one forward pass: lists with one scalar tensor per block, by name.

    attention_logits, activations, gates, scales; a list stays empty in designs without them. The mean norms of the
    vectors of timesteps and labels, norm_time and norm_labels, are lists with one element.
    """
    names = "attention_logits", "gates", "scales", "activations", *EMBEDDERS.values()
    statistics: dict[str, list[Tensor]] = {name: [] for name in names}
    attention, width = _AttentionRecorder(), network.config.hidden_size if isinstance(network, DiT) else 0

    def after_block(module: nn.Module, inputs: Any, output: Any) -> None:
        tokens = output[-1] if isinstance(output, tuple) else output  # of text and image, in blocks of diffusers
        statistics["activations"].append(_rms(tokens))
        # A block can have several attentions or none.
        logits = torch.stack(attention.largest).amax() if attention.largest else tokens.new_tensor(math.nan)
        statistics["attention_logits"].append(logits)
        attention.largest.clear()

    def after_modulation(module: nn.Module, inputs: Any, vectors: Tensor) -> None:
        parts = vectors.unflatten(-1, (2, -1, width))  # shift, scale and perhaps gate, of attention and of the MLP
        statistics["scales"].append(_rms(parts[..., 1, :]))
        if parts.shape[-2] == 3:
            statistics["gates"].append(_rms(parts[..., 2, :]))

    def after_embedder(name: str, module: nn.Module, inputs: Any, vectors: Tensor) -> None:
        statistics[name].append(torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float32).mean())

    hooks = []
    try:
        for attribute, name in EMBEDDERS.items():
            embedder = getattr(network, attribute, None)
            if isinstance(embedder, LabelEmbedder | TimestepEmbedder):
                hooks.append(embedder.register_forward_hook(partial(after_embedder, name)))
        for block in network.blocks:
            hooks.append(block.register_forward_hook(after_block))
            modulation = getattr(block, "adaLN_modulation", None)
            if isinstance(modulation, Modulation | ScaleShiftTable):
                hooks.append(modulation.register_forward_hook(after_modulation))
        with attention:
            yield statistics
    finally:
        for hook in hooks:
            hook.remove()


class _AttentionRecorder(TorchFunctionMode):
    """Records the largest logit magnitude of each call of scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            inputs = {**dict(zip(("query", "key"), args)), **(kwargs or {})}
            self.largest.append(largest_logit(inputs["query"], inputs["key"]))
        return func(*args, **(kwargs or {}))


def largest_logit(q: Tensor, k: Tensor) -> Tensor:
    """The largest |q.k| / sqrt(H) of queries [B, K, L, H] and keys [B, K, M, H], computed some samples at a time."""
    logits_per_sample = q.shape[1] * q.shape[2] * k.shape[2]
    rows = max(1, MAX_LOGITS // logits_per_sample)
    extremes = [torch.aminmax(a @ b.mT) for a, b in zip(q.split(rows), k.split(rows))]
    return torch.stack([end.float().abs() for pair in extremes for end in pair]).amax() / math.sqrt(q.shape[-1])


def _rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float32) / math.sqrt(x.numel())


def _patch_std(x: Tensor, patch_size: int) -> Tensor:
    """The standard deviation between samples of each patch of x [B, C, h p, w p]: [h w]"""
    return patchify(x.float(), patch_size).var(dim=0).mean(dim=-1).sqrt()


def _to_numbers(metrics: Mapping[str, Tensor]) -> dict[str, Any]:
    """Scalars and vectors as numbers and lists, in one transfer; None for values that are not finite."""
    values = iter(torch.cat([value.float().flatten() for value in metrics.values()]).tolist())
    finite = (value if math.isfinite(value) else None for value in values)
    return {
        name: next(finite) if value.ndim == 0 else [next(finite) for _ in range(len(value))]
        for name, value in metrics.items()
    }
