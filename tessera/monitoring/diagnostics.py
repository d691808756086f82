"""The rules of `tessera doctor`: one function for each problem, which returns a Finding only if the metrics support it.

Losses are compared with baselines that need no network (see `history.Baselines`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Literal

from tessera import bundle, power_ema
from tessera.monitoring.health import BINS
from tessera.monitoring.history import LATE, History, Section, finite, series, series_max

EARLY = 0.1  # fraction of the steps so far in which a missing warm-up shows
MIN_STEPS = 200  # steps before a run is judged by what it has learned

# Data
LOW_SPREAD = 0.1  # standard deviation between samples over that of all values; digits have 0.7
FLAT = 0.05  # the same by itself, of pixels in -1 .. 1: six gray levels
STILL = 0.8  # fraction of an image that never changes; the borders of MNIST are half of it
MAX_SCALE = 2.0  # latents should have variance 1; a good scale measured on other images is within this factor
MAX_OFFSET = 1.0  # and their mean should be within one standard deviation of 0
INVALID, MANY_INVALID = 0.01, 0.1  # fraction of the images read

# Learning rate
OVERSHOOT = 1.3  # times the loss of a new network; no healthy run exceeds it except by chance
UNLEARNED = 0.85  # times the linear baseline; digits are at 0.6 after 400 steps
MIN_OF_ZERO = 0.3  # times the zero baseline: for images that hardly vary, few networks reach the linear baseline
SLOW = 2000  # steps after which every run must be below the linear baseline
RISEN = 1.15  # times the lowest loss (the mean of a tenth of the run)
HUGE = 300.0  # rms of tokens: 1 to 2 in healthy runs of digits, thousands at 10 to 30 times their learning rate
MIN_SKIPPED, SKIPPED = 5, 1e-3  # steps skipped, and their fraction: fewer are chance (bfloat16, an unusual image)
# At 10 times their learning rate, digits are never learned without warm-up, and as well as ever with 50 steps of it.
MIN_WARMUP = 10  # fewer steps count as no warm-up
SPIKE = 10.0  # largest early gradient norm over the median late one
GROWN = 5.0  # late gradient norms over those of the middle of the run
CLIPPED = 0.9  # fraction of late steps: a clip that is always active is a second learning rate

# Attention: a softmax of logits that differ by some tens is one-hot; its gradients vanish and training diverges
# (Dehghani et al. 2023, "Scaling vision transformers to 22 billion parameters", section 2). Growth is the problem:
# digits are learned well with logits between 100 and 260.
LOGITS, HIGH_LOGITS, ONE_HOT = 50.0, 100.0, 1000.0  # the last one is an error even without growth
GROWING = 1.3  # late logits over those of the middle of the run

# Labels and EMA
MIN_IMAGES_PER_CLASS = 1000  # on average, before labels are judged
MIN_CAPTIONED = 50_000  # images, before captions are judged
MIN_CONTROLLED = 50_000  # images, before control images are judged
MIN_PROBES, FEW_PROBES = 5, 2  # late probes; so few are enough if each has the standard error of its cost
# The cost of a wrong label, as a fraction of the loss. Labels have no effect if it is below GAIN (by two standard
# errors) and no more than chance. If it is small but more than chance, random labels may have been memorized. For
# digits it is 1 % with noise prediction, 40 % with velocity prediction.
GAIN, SMALL_GAIN = 0.003, 0.001
RESPONSE = 0.01  # change of the output with wrong labels, relative to the output: the network responds to them
HIGH_DROPOUT = 0.5  # of the labels or captions; 0.1 is usual
CONDITIONS = {"label": "label", "text": "caption"}  # the fields of a condition that are dropped, in words
MIN_MEMORIES = 3  # a run should be this many times longer than the memory of its EMA
BEHIND = 1.1  # the loss of the EMA over that of the weights; a good EMA is below 1

# Inactive parts
DEAD = 0.1  # fraction of the token positions
GATE_STEPS, CLOSED = 1000, 0.01  # steps after which the rms of a gate should be above this; for digits 0.13 to 0.25
EXCESS = (
    1.3,
    0.05,
)  # a timestep bin is poor above this times the linear baseline plus this fraction of the zero baseline

# The squared error of a student's average velocity relative to the square of the teacher's: 0.003 to 0.03 for good
# students of digits, 0.9 after a divergence. The loss does not show it.
FAR, FAR_FROM = 0.3, 0.25  # from this part of the run on

# Speed
WAITING = 0.2  # fraction of the time
LOW_MFU = 0.2  # of a GPU's peak: below it most of the time goes elsewhere


@dataclass(frozen=True)
class Finding:
    """One problem of a run."""

    name: str
    severity: Literal["error", "warning"]
    what: str
    evidence: str  # the measured values and steps
    change: str  # what to change, with the recipe's keys

    def __str__(self) -> str:
        return f"{self.severity}: {self.name}\n  {self.what}\n  evidence: {self.evidence}\n  change:   {self.change}"


def _values(history: History, name: str) -> list[float]:
    return [value for _, value in series(history.health, name)]


# Data


def low_image_variety(history: History) -> Finding | None:
    spreads, stds = _values(history, "data_spread"), _values(history, "data_std")
    if not spreads or not stds:
        return None
    spread, std = median(spreads), median(stds)
    if spread >= LOW_SPREAD * std and (_has_latents(history) or spread >= FLAT):
        still = _values(history, "still_patches")
        if not still or median(still) < STILL:
            return None
        return Finding(
            "most of each image is constant",
            "warning",
            f"{median(still):.0%} of each image never changes, so most of the computation is wasted.",
            f"still_patches {median(still):.2f} in {len(still)} records up to step {history.step}",
            "crop the images behind data.path to their content",
        )
    return Finding(
        "images hardly differ",
        "error",
        "The images of a batch are nearly equal or nearly blank, so there is nothing to learn.",
        f"standard deviation between images {spread:.3g}, of all values {std:.3g} ({len(spreads)} records of up to 16 "
        "images)",
        "check the files behind data.path, and how data.size, data.channels and data.background convert them",
    )


def unscaled_latents(history: History) -> Finding | None:
    stds, means = _values(history, "data_std"), _values(history, "data_mean")
    if not _has_latents(history) or not stds:
        return None
    std, center, codec = median(stds), median(means), history.recipe.codec
    if 1 / MAX_SCALE <= std <= MAX_SCALE and abs(center) <= MAX_OFFSET * std:
        return None
    scale = f"from {codec.source}" if codec.scale is None else codec.scale
    return Finding(
        "latents not normalized",
        "error",
        "The latents are far from mean 0 and variance 1, which the noise schedule assumes."
        if std > 0
        else "The latents are constant.",
        f"standard deviation {std:.3g} (expected about 1), mean {center:.3g} (expected about 0), over {len(stds)} "
        "records",
        f"codec.scale (now {scale}): multiply it by {1 / std if std > 0 else math.nan:.3g}; codec.shift is the mean of "
        "the latents before scaling",
    )


def many_invalid_images(history: History) -> Finding | None:
    epoch, invalid = history.last("epoch"), history.last("invalid_samples")
    if not epoch or not invalid:
        return None
    images = history.step * history.recipe.training.global_batch_size / epoch * min(epoch, 1.0)
    if invalid < INVALID * images:
        return None
    samples = history.invalid_samples
    example = f", for example {samples[0].replace(chr(9), ': ')}" if samples else ""
    return Finding(
        "invalid images",
        "error" if invalid >= MANY_INVALID * images else "warning",
        "Many images cannot be used; others are repeated in their place.",
        f"{invalid:.0f} of about {images:.0f} images read by step {history.step}{example}",
        f"see the reasons in {history.run_dir / 'skipped_samples.txt'}; data.upscale=true accepts images that are too "
        "small",
    )


# Learning rate


def learning_rate_too_high(history: History) -> Finding | None:
    """Skipped steps, or a loss that rises or does not fall."""
    optimizer = history.recipe.training.optimizer
    skipped = sum(record.get("outcome") == "skipped" for record in history.skipped_steps)
    skipped = max([skipped, *(value for _, value in series(history.log, "skipped_steps"))])
    rollbacks = max((value for _, value in series(history.log, "rollbacks")), default=0)
    signs = [f"rolled back to a checkpoint {rollbacks:.0f} times"] if rollbacks else []
    if skipped >= max(MIN_SKIPPED, SKIPPED * history.step):
        signs.append(f"{skipped:.0f} steps skipped up to step {history.step}")
    rise = _rise(history)
    signs += [rise] if rise else []
    weak_signs = [*_overshoot(history.loss, history), *_huge_tokens(history)] if no_warmup(history) is None else []
    loss, baseline = history.late_loss, history.baselines.linear
    if weak_signs and history.step >= MIN_STEPS and loss is not None and loss >= UNLEARNED * baseline:
        signs.append(f"mean squared error {loss:.3g} late, linear baseline {baseline:.3g}")
    conclusive = (
        history.step >= MIN_STEPS or optimizer.warmup_steps >= MIN_WARMUP
    )  # else warm-up may be what is missing
    if not signs and not (conclusive and len(weak_signs) >= 2):
        return None
    first = history.skipped_steps[0] if history.skipped_steps else None
    reason = f"; the first skipped batch was at step {first['step']}: {first.get('reason')}" if first else ""
    change = f"{_lower_rate(history)}, with training.optimizer.grad_clip_norm=1"
    if optimizer.warmup_steps < _warmup(history):
        change += f" and training.optimizer.warmup_steps={_warmup(history)}"
    return Finding(
        "learning rate too high",
        "error",
        "The updates overshoot, and the loss does not settle.",
        "; ".join([*signs, *weak_signs]) + reason,
        change,
    )


def _rise(history: History) -> str | None:
    """Evidence if the loss has risen from its lowest value beyond chance, as means of tenths of the run."""
    tenths: list[list[tuple[int, float]]] = [[] for _ in range(10)]
    for step, value in history.loss:
        tenths[min(9, 10 * step // (history.step + 1))].append((step, value))
    parts = [part for part in tenths if len(part) >= 2]
    if len(parts) < 5 or parts[-1] is not tenths[-1]:
        return None
    means = [mean(value for _, value in part) for part in parts]
    lowest = min(range(len(parts)), key=lambda index: means[index])
    error = max(stdev(value for _, value in part) / math.sqrt(len(part)) for part in (parts[lowest], parts[-1]))
    if means[-1] < RISEN * means[lowest] or means[-1] - means[lowest] < 4 * error:
        return None
    return (
        f"mean squared error {means[lowest]:.3g} around step {parts[lowest][0][0]}, {means[-1]:.3g} by step "
        f"{parts[-1][-1][0]}"
    )


def _overshoot(losses: list[tuple[int, float]], history: History) -> list[str]:
    step, worst = max(losses, key=lambda pair: pair[1], default=(0, 0.0))
    if worst < OVERSHOOT * history.baselines.zero:
        return []
    return [f"mean squared error {worst:.3g} at step {step}, zero baseline {history.baselines.zero:.3g}"]


def _huge_tokens(history: History) -> list[str]:
    step, rms = max(series_max(history.health, "activations"), key=lambda pair: pair[1], default=(0, 0.0))
    return [f"tokens of rms {rms:.3g} at step {step}"] if rms >= HUGE else []


def no_learning(history: History) -> Finding | None:
    """A loss that needs no network, without signs of a learning rate that is too high."""
    loss, baselines = history.late_loss, history.baselines
    if history.step < SLOW or loss is None or loss < max(baselines.linear, MIN_OF_ZERO * baselines.zero):
        return None
    if learning_rate_too_high(history) is not None:
        return None
    rate = history.recipe.training.optimizer.learning_rate
    return Finding(
        "nothing learned",
        "error",
        "The loss is no better than the linear baseline: the network has learned no image structure.",
        f"mean squared error {loss:.3g} up to step {history.step}; linear baseline {baselines.linear:.3g}, zero "
        f"baseline {baselines.zero:.3g}",
        f"training.optimizer.learning_rate={rate * 3:.2g} (now {rate:.2g}; 1e-4 to 1e-3 is usual for AdamW); check in "
        "the first grid of samples that the data are images",
    )


def no_warmup(history: History) -> Finding | None:
    """A bad start, from which a run may never recover, and which a warm-up would prevent."""
    training = history.recipe.training
    until = max(EARLY * history.step, training.log_every)
    norms, late = series(history.log, "grad_norm"), history.late(history.log, "grad_norm")
    step, worst = max((pair for pair in norms if pair[0] <= until), key=lambda pair: pair[1], default=(0, 0.0))
    overshoot = _overshoot([pair for pair in history.loss if pair[0] <= until], history)
    if training.optimizer.warmup_steps >= MIN_WARMUP or not late or worst < SPIKE * median(late) or not overshoot:
        return None
    return Finding(
        "no warm-up",
        "error",
        "The first updates were too large, because the optimizer had no estimate of the gradients yet.",
        f"gradient norm {worst:.3g} by step {step}, {median(late):.3g} late in the run; {overshoot[0]}",
        f"training.optimizer.warmup_steps={_warmup(history)} (now {training.optimizer.warmup_steps}), from the start",
    )


def growing_gradients(history: History) -> Finding | None:
    norms = series(history.log, "grad_norm")
    middle = [value for step, value in norms if history.step / 3 < step <= history.step * 2 / 3]
    late = history.late(history.log, "grad_norm")
    if history.step < MIN_STEPS or len(middle) < 3 or len(late) < 3 or median(late) < GROWN * median(middle):
        return None
    return Finding(
        "gradients grow",
        "warning",
        "The gradient norm grows, which often happens before a run diverges.",
        f"gradient norm {median(middle):.3g} in the middle of the run, {median(late):.3g} up to step {history.step}",
        f"{_lower_rate(history)}, or training.optimizer.grad_clip_norm=1",
    )


def always_clipped(history: History) -> Finding | None:
    clip, fractions = history.recipe.training.optimizer.grad_clip_norm, history.late(history.log, "clipped")
    if clip is None or history.step < MIN_STEPS or not fractions or mean(fractions) < CLIPPED:
        return None
    norms = history.late(history.log, "grad_norm")
    norm = median(norms) if norms else clip
    return Finding(
        "every gradient is clipped",
        "warning",
        "Nearly every gradient norm is above the clip, so the clip sets the size of the updates.",
        f"{mean(fractions):.0%} of late steps up to step {history.step}, gradient norm {norm:.3g}, clip {clip:g}",
        f"training.optimizer.grad_clip_norm={2 * norm:.2g}, and a lower learning rate if the loss is uneven",
    )


def attention_logits(history: History) -> Finding | None:
    """Attention that becomes one-hot."""
    logits = series_max(history.health, "attention_logits")
    late = [value for step, value in logits if step > history.step * (1 - LATE)]
    middle = [value for step, value in logits if history.step * LATE < step <= history.step * (1 - LATE)]
    if history.step < MIN_STEPS or not late or not middle:
        return None
    grows = median(late) >= LOGITS and median(late) >= GROWING * median(middle)
    if not grows and median(late) < ONE_HOT:
        return None
    network, rate = history.recipe.network, history.recipe.training.optimizer.learning_rate
    has_qk_norm = network.kind != "dit" or (network.block.kind == "rope-swiglu" and network.block.qk_norm)
    lower_rate = f"training.optimizer.learning_rate={rate / 3:.2g}"
    step, first = logits[0]
    return Finding(
        "attention logits grow" if grows else "attention one-hot",
        "error" if median(late) >= HIGH_LOGITS else "warning",
        "Attention becomes one-hot: each token attends to one other token, and gradients through the softmax vanish.",
        f"largest logit {first:.3g} at step {step}, {median(middle):.3g} in the middle of the run, {median(late):.3g} "
        f"late up to step {history.step}",
        lower_rate
        if has_qk_norm
        else f"network.block=rope-swiglu in a new run: its qk_norm bounds the logits; in this run {lower_rate}",
    )


# Labels and EMA


def _conditions(history: History) -> list[str]:
    """The conditions of a network that training can drop."""
    network = history.recipe.network
    has_text = network.text_channels or network.vocabulary_size
    return [*(["label"] if network.num_classes else []), *(["text"] if has_text else [])]


def guidance_without_condition_dropout(history: History) -> Finding | None:
    """Guidance away from an output without a condition, or without all, that was not trained."""
    training, sampling, conditions = history.recipe.training, history.recipe.sampling, _conditions(history)
    dropped = {name for name, rate in training.field_dropout.items() if rate}
    scales = {name: scale for name, scale in sampling.guidance_scales.items() if scale != 1 and name not in dropped}
    if sampling.guidance_scale != 1 and not training.condition_dropout and not dropped.issuperset(conditions):
        names, setting = conditions, "training.condition_dropout"
        evidence = f"{setting} is 0, sampling.guidance_scale is {sampling.guidance_scale:g}"
        change = f"{setting}=0.1, or sampling.guidance_scale=1"
    elif scales and not (training.condition_dropout and len(conditions) == 1):
        names = list(scales)
        evidence = "; ".join(
            f"training.field_dropout.{name} is 0, sampling.guidance_scales.{name} is {scale:g}"
            for name, scale in scales.items()
        )
        change = " ".join(f"training.field_dropout.{name}=0.1" for name in names) + ", or no sampling.guidance_scales"
    else:
        return None
    words = [CONDITIONS.get(name, name) for name in names]
    return Finding(
        f"guidance without {' and '.join(words)} dropout",
        "error",
        f"Guidance needs the output without {' and '.join(words)}, which was never trained.",
        evidence,
        change,
    )


def labels_without_effect(history: History) -> Finding | None:
    """Wrong labels that do not raise the loss."""
    network = history.recipe.network
    classes, small = network.num_classes, network.kind == "dit" and network.get("label_init_std", 0.02) < 1
    if classes < 2:
        return None
    return _condition_without_effect(
        history,
        "label",
        MIN_IMAGES_PER_CLASS * classes,
        "check the labels behind data.path (data.classes): are the folders or columns correct? To train without "
        "labels: data.classes=none. If they are right, train longer"
        + (", or set network.label_init_std=1 in a new run" if small else ""),
    )


def captions_without_effect(history: History) -> Finding | None:
    """Wrong captions that do not raise the loss."""
    return _condition_without_effect(
        history,
        "caption",
        MIN_CAPTIONED,
        "check the captions behind data.path (data.caption), and that the text encoder reads their words: "
        "tessera data check. If they are right, train longer or raise training.optimizer.learning_rate",
    )


def controls_without_effect(history: History) -> Finding | None:
    """Wrong control images that do not raise the loss."""
    return _condition_without_effect(
        history,
        "control",
        MIN_CONTROLLED,
        "check adapter.image: is each control image that of its image? If it is, train longer",
    )


def _condition_without_effect(history: History, name: str, min_images: int, change: str) -> Finding | None:
    """A finding if wrong labels, captions or control images do not raise the loss.

    min_images: seen in training before a probe counts.
    """
    cost = _cost_of_wrong(history, name, min_images)
    if cost is None or not _has_learned(history):
        return None
    mean_cost, error, probes = cost
    by_chance = mean_cost <= 3 * error
    if mean_cost + 2 * error >= GAIN or (not by_chance and mean_cost > SMALL_GAIN):
        return None
    evidence = (
        f"a wrong {name} raises the loss by {mean_cost:.2%}, +- {2 * error:.2%} ({probes} probes, steps "
        f"{history.step // 2} to {history.step}); informative {name}s raise it by 1 % or more"
    )
    response = history.late(history.health, f"change_wrong_{name}s")
    responds = bool(response) and mean(response) >= RESPONSE
    if response:
        evidence += f"; it changes the output by {mean(response):.2%}"
    norms = [history.late(history.health, f"norm_{part}") for part in ("time", f"{name}s")]
    if all(norms):
        evidence += f"; norm of the vector of the time {mean(norms[0]):.3g}, of the {name} {mean(norms[1]):.3g}"
    reason = (
        f"the {name}s do not match the images, or are learned by heart"
        if responds
        else f"the {name}s do not match the images, or the network does not use them yet"
    )
    return Finding(
        f"{name}s have no effect",
        "error" if by_chance and probes >= MIN_PROBES else "warning",
        f"Wrong {name}s do not raise the loss: {reason}.",
        evidence,
        change,
    )


def _cost_of_wrong(history: History, name: str, min_images: int) -> tuple[float, float, int] | None:
    """By which fraction of the loss wrong labels, captions or controls raise it late in the run, the standard error,
    and the number of probes; None if it is not known.

    Every probe measures both losses on the same samples, timesteps and noise. min_images: seen in training before a
    probe counts.
    """
    records = [
        record
        for record in history.health
        if record["step"] > history.step / 2
        and record["step"] * history.recipe.training.global_batch_size >= min_images
        and len(finite(record.get(key) for key in (f"loss_wrong_{name}s", "loss_probe"))) == 2
    ]
    errors = [finite((record.get(f"cost_wrong_{name}s"), record.get(f"error_wrong_{name}s"))) for record in records]
    if records and all(len(each) == 2 for each in errors):
        costs = [cost for cost, _ in errors]
        error = math.sqrt(sum(error**2 for _, error in errors)) / len(errors)
        needed = FEW_PROBES
    else:  # a run of an earlier version
        loss = mean(record["loss_probe"] for record in records) if records else 1.0
        costs, error = [(record[f"loss_wrong_{name}s"] - record["loss_probe"]) / loss for record in records], 0.0
        needed = MIN_PROBES
    if len(costs) < needed:
        return None
    if len(costs) >= MIN_PROBES:
        error = max(error, stdev(costs) / math.sqrt(len(costs)))
    return mean(costs), error, len(costs)


def high_condition_dropout(history: History) -> Finding | None:
    training = history.recipe.training
    rates = {
        name: 1 - (1 - training.condition_dropout) * (1 - training.field_dropout.get(name, 0.0))
        for name in _conditions(history)
    }
    names = [name for name, rate in rates.items() if rate > HIGH_DROPOUT]
    if not names:
        return None
    words = " and ".join(f"{CONDITIONS[name]}s" for name in names)
    single = {f"training.field_dropout.{name}": training.field_dropout.get(name) for name in names}
    settings = {"training.condition_dropout": training.condition_dropout, **single}
    return Finding(
        f"most {words} dropped",
        "warning",
        f"Fewer than half of the images are trained with their {words}.",
        ", ".join(f"{key} is {rate:g}" for key, rate in settings.items() if rate),
        " ".join(f"{key}=0.1" for key, rate in settings.items() if rate),
    )


def slow_ema(history: History) -> Finding | None:
    """An EMA, which is used for sampling, far behind the weights."""
    ema, steps = history.recipe.training.ema, history.recipe.training.steps
    averages, weights = history.late(history.health, "loss_ema"), history.late(history.health, "loss_probe")
    if history.step < MIN_STEPS or not averages or not weights or mean(averages) < BEHIND * mean(weights):
        return None
    memory, shorter = _ema_memory(ema, history.step), _shorter_ema(ema, steps)
    if history.step < 5 * memory <= 5 * steps / MIN_MEMORIES:
        return None  # it will still catch up
    distances = history.late(history.health, "ema_distance")
    distance = f", relative distance {mean(distances):.2g}" if distances else ""
    return Finding(
        "EMA too slow",
        "error",
        "The averaged weights, which are used for sampling, are far behind the weights.",
        f"late loss of the EMA {mean(averages):.3g}, of the weights {mean(weights):.3g}{distance}; the EMA averages "
        f"about {memory:.0f} steps, and the run has {steps}",
        shorter,
    )


def _ema_memory(ema: Section, step: int) -> float:
    """About how many steps the first average covers after a step."""
    if ema.get("kind") == "power":
        return step / (power_ema.gamma(ema.lengths[0]) + 1)
    return min(1 / (1 - ema.decay), (10 + step) / 9) if ema.warmup else 1 / (1 - ema.decay)


def _shorter_ema(ema: Section, steps: int) -> str:
    """The settings of an average that suits a run of some steps, where this one is too long."""
    if ema.get("kind") == "power":
        return f"training.ema.lengths=[{', '.join(f'{length / 2:.3g}' for length in ema.lengths)}]"
    # a memory of a twentieth of the run, in round numbers: 0.99, 0.998, 0.9995
    decay = f"training.ema.decay={1 - float(f'{min(0.1, 20 / steps):.1g}'):.6g}"
    return decay if ema.warmup else f"{decay} and training.ema.warmup=true"


# Inactive parts


def dead_patches(history: History) -> Finding | None:
    """Token positions whose output does not depend on the input."""
    fractions = history.late(history.health, "dead_patches")
    if not fractions or median(fractions) <= DEAD or not _has_learned(history):
        return None
    return Finding(
        "dead patches",
        "warning",
        "At some positions the output hardly depends on the image.",
        f"dead_patches {median(fractions):.2f} of the token positions, late up to step {history.step}",
        f"look for constant positions in the samples; {_lower_rate(history)}",
    )


def student_far_from_teacher(history: History) -> Finding | None:
    """The average velocity of a student is not that of its teacher's path."""
    records = [record for record in history.health if isinstance(record.get("average_velocity_error"), dict)]
    optimizer, steps = history.recipe.training.optimizer, history.recipe.training.steps
    if not records or records[-1]["step"] < FAR_FROM * steps:
        return None
    errors = {name: value for name, value in records[-1]["average_velocity_error"].items() if finite([value])}
    name = max(errors, key=lambda name: errors[name], default=None)
    if name is None or errors[name] < FAR:
        return None
    names = [key for key in ("learning_rate", "adamw_learning_rate") if optimizer.get(key) is not None]
    rates = [f"training.optimizer.{key}={optimizer[key] / 2:.2g}" for key in names]
    return Finding(
        "student far from its teacher",
        "error",
        "The student's steps do not end where its teacher's path does: a student that diverged looks like this, and "
        "the loss does not show it, because the target is the student's own output.",
        f"squared error of the average velocity from {name} at step {records[-1]['step']}: {errors[name]:.2g} of the "
        "square of the teacher's",
        f"{' '.join(rates)} in a new run",
    )


def closed_gates(history: History) -> Finding | None:
    """Blocks that add nothing, late in a run."""
    records = [finite(record.get("gates")) for record in history.health if record["step"] > history.step * (1 - LATE)]
    records = [gates for gates in records if gates]
    if history.step < max(GATE_STEPS, history.recipe.training.steps / 2) or not records:
        return None
    gates = [median(values) for values in zip(*records)]
    closed = [block for block, gate in enumerate(gates) if gate < CLOSED]
    if not closed:
        return None
    rate = history.recipe.training.optimizer.learning_rate
    return Finding(
        "closed gates",
        "warning",
        "Some blocks add almost nothing to the tokens: their gates are still at their initial value of zero.",
        f"blocks {', '.join(map(str, closed))}: gates of rms below {CLOSED:g} up to step {history.step}, the median is "
        f"{median(gates):.2g}",
        f"network.depth={len(gates) - len(closed)} in a new run"
        if len(closed) < len(gates)
        else f"training.optimizer.learning_rate={3 * rate:.2g}",
    )


def poor_end_of_schedule(history: History) -> Finding | None:
    """A loss above the linear baseline near the data or near the noise, while the rest is learned."""
    records = [
        record.get("loss_by_timestep") for record in history.health if record["step"] > history.step * (1 - LATE)
    ]
    if not _has_learned(history) or not records:
        return None
    for index, end in ((0, "data"), (BINS - 1, "noise")):
        values = finite(record[index] for record in records if isinstance(record, list) and len(record) == BINS)
        linear, zero = history.baselines.linear_by_timestep[index], history.baselines.zero_by_timestep[index]
        if not values or linear is None or zero is None or mean(values) < EXCESS[0] * linear + EXCESS[1] * zero:
            continue
        shift = f"diffusion.timestep_sampling=uniform, or diffusion.shift {'above' if end == 'noise' else 'below'} 1"
        return Finding(
            f"high loss near the {end}",
            "warning",
            f"At timesteps near the {end} the loss is above the linear baseline: the network hardly learns there.",
            f"mean squared error {mean(values):.3g} at timesteps {index / BINS:g} to {(index + 1) / BINS:g}, linear "
            f"baseline {linear:.3g} (up to step {history.step})",
            shift
            if history.recipe.diffusion.kind == "flow"
            else "diffusion.prediction=v, or diffusion.schedule=cosine, in a new run",
        )
    return None


# Speed


def waiting_for_data(history: History) -> Finding | None:
    fractions, workers = history.late(history.log, "data_wait"), history.recipe.training.num_workers
    if not fractions or mean(fractions) < WAITING:
        return None
    return Finding(
        "waiting for data",
        "warning",
        "The device is idle while images are read and decoded.",
        f"{mean(fractions):.0%} of the time, late up to step {history.step}; training.num_workers is {workers}",
        f"training.num_workers={2 * workers}, if there are free CPU cores; or store the images at data.size beforehand",
    )


def low_gpu_utilization(history: History) -> Finding | None:
    """A GPU far below its peak, although data are available."""
    fractions, config = history.late(history.log, "mfu"), history.recipe.training
    if not fractions or mean(fractions) >= LOW_MFU or waiting_for_data(history) is not None or not _on_gpu(history):
        return None
    changes = [] if config.compile not in (False, "off") else ["training.compile=auto"]
    changes += [] if config.precision != "float32" else ["training.precision=auto"]
    if config.micro_batch_size and config.micro_batch_size < config.global_batch_size:
        changes.append(f"training.micro_batch_size={min(2 * config.micro_batch_size, config.global_batch_size)}")
    else:
        changes.append(f"training.global_batch_size={2 * config.global_batch_size}")
    return Finding(
        "low GPU utilization",
        "warning",
        "The GPU is far below its peak performance.",
        f"{mean(fractions):.0%} MFU, late up to step {history.step}: {history.last('images_per_second'):.4g} images/s",
        ", ".join(changes),
    )


# Shared by several rules


def _on_gpu(history: History) -> bool:
    """Whether the latest checkpoint was trained on CUDA."""
    checkpoints = bundle.checkpoints(history.run_dir)
    return bool(checkpoints) and bundle.load_config(checkpoints[0]).provenance.device == "cuda"


def _has_latents(history: History) -> bool:
    return history.recipe.codec.kind != "pixels"


def _has_learned(history: History) -> bool:
    """Whether the loss is clearly below the linear baseline; before that, no part of the network can be judged."""
    loss = history.late_loss
    return history.step >= MIN_STEPS and loss is not None and loss < UNLEARNED * history.baselines.linear


def _warmup(history: History) -> int:
    """A suitable number of warm-up steps: a fiftieth of the run, at least 50."""
    return max(50, history.recipe.training.steps // 50)


def _lower_rate(history: History) -> str:
    """The learning rate settings, divided by ten."""
    optimizer = history.recipe.training.optimizer
    settings = f"training.optimizer.learning_rate={optimizer.learning_rate / 10:.2g}"
    if optimizer.kind == "muon" and optimizer.adamw_learning_rate:
        settings += f" and training.optimizer.adamw_learning_rate={optimizer.adamw_learning_rate / 10:.2g}"
    return settings


Rule = Callable[[History], Finding | None]
# Causes before their consequences.
RULES: tuple[Rule, ...] = (
    low_image_variety, unscaled_latents, many_invalid_images, no_warmup, learning_rate_too_high, no_learning,
    attention_logits, guidance_without_condition_dropout, labels_without_effect, captions_without_effect,
    controls_without_effect, slow_ema, growing_gradients, always_clipped, poor_end_of_schedule, dead_patches,
    closed_gates, student_far_from_teacher, high_condition_dropout, waiting_for_data, low_gpu_utilization,
)  # fmt: skip
