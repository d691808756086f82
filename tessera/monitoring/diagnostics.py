"""What can be wrong with a run: a rule for each kind of fault, which says nothing unless the numbers do.

Losses are held against those of answers that need no network (see `history.Guesses`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Literal

from tessera import bundle
from tessera.codecs import StoredConfig
from tessera.models.blocks import RoPESwiGLU
from tessera.models.dit import DiTConfig
from tessera.monitoring.health import BINS
from tessera.monitoring.history import LATE, History, finite, largest, series
from tessera.training.optimizers import MuonConfig

EARLY = 0.1  # of the steps so far: "early", where a missing warm-up shows
BEGUN = 200  # steps before which no run is judged by what it has learned

# The data
SAME = 0.1  # spread between samples over that of all their numbers; digits have 0.7
FLAT = 0.05  # the same in itself, of pixels in -1 .. 1: six grey levels
STILL = 0.8  # share of a picture that never changes: the borders of MNIST are half of it
LARGE_SCALE = 2.0  # latents are meant to have variance 1; a good scale taken from other pictures is within this factor
OFF_CENTRE = 1.0  # and their mean within one standard deviation of 0
UNUSABLE, MANY_UNUSABLE = 0.01, 0.1  # share of the images seen

# The learning rate
OVERSHOT = 1.3  # times the loss a fresh network has, which no healthy run rises above by more than chance
UNLEARNED = 0.85  # times the loss of guessing each number by itself; digits are at 0.6 after 400 steps
WORTHLESS = 0.3  # and times that of zero: of pictures that hardly vary the guess is so good that few networks reach it
SLOW = 2000  # steps after which a run must be below that guess, however large and careful
RISEN = 1.15  # times the lowest loss (a mean of a tenth of the run)
HUGE = 300.0  # rms of tokens: 1 to 2 in healthy runs of digits, thousands and more at ten or thirty times their rate
LEFT_OUT = 5, 1e-3  # steps kept out of the weights, and their share: fewer are chance (bfloat16, a strange image)
# At ten times their rate digits are never learned without a warm-up, and as well as ever with one of 50 steps.
WARMUP = 10  # steps that are none yet
SPIKE = 10.0  # an early gradient over the late ones
GROWN = 5.0  # late gradients over those of the middle of the run
CLIPPED = 0.9  # share of late steps: a clip that always bites is a second learning rate

# Attention: softmax of logits some tens apart is one-hot, where gradients vanish and training breaks off (Dehghani et
# al. 2023, "Scaling vision transformers to 22 billion parameters", section 2). What harms is that they keep growing:
# digits are learned well with logits between 100 and 260.
LOGITS, HIGH_LOGITS, ONE_HOT = 50.0, 100.0, 1000.0  # the last is wrong whether they grow or not
GROWING = 1.3  # late over those of the middle of the run

# Conditions and average
SEEN = 1000  # images of each class on average before labels are judged
PROBES = 5  # late records at least
# What a wrong label costs, as a share of the loss: less than GAIN, to two standard errors, and no more than chance, is
# nothing. If it is more than chance, but little, a network may have learned by heart what means nothing. Of digits it
# costs 1 % where noise is predicted, 40 % where velocity is.
GAIN, LITTLE_GAIN = 0.003, 0.001
DROPPED = 0.5  # of the labels: the usual share is 0.1
LENGTHS = 3  # of the average's memory that a run should last
BEHIND = 1.1  # the average's loss over that of the weights; a good average is below 1

# Parts that do nothing
DEAD = 0.1  # share of the token positions
OPENED, SHUT = 1000, 0.01  # steps after which a gate's rms is to be above this; of digits it is 0.13 to 0.25
EXCESS = 1.3, 0.05  # an end of the times is off above this times the guess, and this share of the target's variance

# Speed
STALLED = 0.2  # share of the time
IDLE = 0.2  # of a GPU's matrix products at their fastest: below it something else takes most of the time


@dataclass(frozen=True)
class Finding:
    """One fault of a run, for people."""

    name: str
    severity: Literal["wrong", "watch"]
    what: str  # in plain words
    evidence: str  # numbers and steps
    change: str  # what to change, with the recipe's keys

    def __str__(self) -> str:
        return f"{self.severity}: {self.name}\n  {self.what}\n  seen:   {self.evidence}\n  change: {self.change}"


# The data


def same_pictures(history: History) -> Finding | None:
    """Pictures that are all alike."""
    spreads, stds = ([value for _, value in series(history.health, name)] for name in ("data_spread", "data_std"))
    if not spreads or not stds:
        return None
    spread, std = median(spreads), median(stds)
    latents = isinstance(history.recipe.codec, StoredConfig)
    if spread >= SAME * std and (latents or spread >= FLAT):
        still = [value for _, value in series(history.health, "still_patches")]
        if not still or median(still) < STILL:
            return None
        return Finding(
            "much of every picture is the same",
            "watch",
            f"{median(still):.0%} of each picture never change, so most of the work is spent on nothing.",
            f"still_patches {median(still):.2f} in {len(still)} records up to step {history.step}",
            "crop the pictures behind data.path closer to what they show",
        )
    return Finding(
        "pictures hardly differ",
        "wrong",
        "The pictures of a batch are nearly one and the same, or nearly blank: there is nothing to learn from them.",
        f"standard deviation between pictures {spread:.3g}, of all their numbers {std:.3g} ({len(spreads)} records of "
        f"up to 16 pictures)",
        "look at the files behind data.path, and at what data.size, data.channels and data.background make of them",
    )


def unscaled_latents(history: History) -> Finding | None:
    """Latents that are far from unit variance."""
    codec = history.recipe.codec
    stds, means = ([value for _, value in series(history.health, name)] for name in ("data_std", "data_mean"))
    if not isinstance(codec, StoredConfig) or not stds:
        return None
    std, centre = median(stds), median(means)
    if 1 / LARGE_SCALE <= std <= LARGE_SCALE and abs(centre) <= OFF_CENTRE * std:
        return None
    return Finding(
        "latents not scaled",
        "wrong",
        "The latents are far from unit variance and mean 0, for which the noise is made: noise hides too little of "
        "them, or too much."
        if std > 0
        else "The latents are all the same number.",
        f"standard deviation {std:.3g} (expected about 1), mean {centre:.3g} (expected about 0), over {len(stds)} "
        "records",
        f"codec.scale (now {'as ' + codec.source + ' says' if codec.scale is None else codec.scale}): multiply it by "
        f"{1 / std if std > 0 else math.nan:.3g}; codec.shift is the mean of latents before they are scaled",
    )


def unusable_images(history: History) -> Finding | None:
    """Images that cannot be read."""
    epoch, bad = history.last("epoch"), history.last("skipped")
    if not epoch or not bad:
        return None
    images = history.step * history.recipe.training.global_batch_size / epoch
    seen = images * min(epoch, 1.0)
    if bad < UNUSABLE * seen:
        return None
    example = f", for example {history.unusable[0].replace(chr(9), ': ')}" if history.unusable else ""
    return Finding(
        "unusable images",
        "wrong" if bad >= MANY_UNUSABLE * seen else "watch",
        "Many images cannot be used; others are shown more often in their place.",
        f"{bad:.0f} of about {seen:.0f} images seen by step {history.step}{example}",
        f"{history.folder / 'skipped.txt'} names them with the reason; data.upscale=true takes those too small",
    )


# The learning rate


def learning_rate_too_high(history: History) -> Finding | None:
    """Weights that are thrown about: steps kept out of them, a loss that rises or does not come down."""
    lost = sum(record.get("outcome") == "skipped" for record in history.passed)
    lost = max([lost, *(value for _, value in series(history.log, "kept_out"))])
    returns = max((value for _, value in series(history.log, "rollbacks")), default=0)
    signs = [f"went back to a checkpoint {returns:.0f} times"] if returns else []
    if lost >= max(LEFT_OUT[0], LEFT_OUT[1] * history.step):
        signs.append(f"{lost:.0f} steps up to step {history.step} kept out of the weights")
    rises = _rise(history)
    signs += [rises] if rises else []
    thrown = [*_overshoot(history.loss, history), *_huge(history)] if no_warmup(history) is None else []
    loss, guess = history.late_loss, history.guesses.linear
    if thrown and history.step >= BEGUN and loss is not None and loss >= UNLEARNED * guess:
        signs.append(f"mean squared error {loss:.3g} late, where guessing each number by itself has {guess:.3g}")
    begun = (
        history.step >= BEGUN or history.recipe.training.optimizer.warmup_steps >= WARMUP
    )  # or it may be the lack of one
    if not signs and not (begun and len(thrown) >= 2):
        return None
    first = history.passed[0] if history.passed else None
    why = f"; the first batch left out was that of step {first['step']}: {first.get('why')}" if first else ""
    change = f"{_lower_rate(history)}, with training.optimizer.grad_clip_norm=1"
    if history.recipe.training.optimizer.warmup_steps < _warmup(history):
        change += f" and training.optimizer.warmup_steps={_warmup(history)}"
    return Finding(
        "learning rate too high",
        "wrong",
        "The steps are so long that the weights are thrown about instead of settling.",
        "; ".join([*signs, *thrown]) + why,
        change,
    )


def _rise(history: History) -> str | None:
    """The loss now against its lowest, as means of tenths of the run: words, if it has risen beyond chance."""
    parts: list[list[tuple[int, float]]] = [[] for _ in range(10)]
    for step, value in history.loss:
        parts[min(9, 10 * step // (history.step + 1))].append((step, value))
    told = [part for part in parts if len(part) >= 2]
    if len(told) < 5 or told[-1] is not parts[-1]:
        return None
    centres = [mean(value for _, value in part) for part in told]
    lowest = min(range(len(told)), key=lambda place: centres[place])
    error = max(stdev(value for _, value in part) / math.sqrt(len(part)) for part in (told[lowest], told[-1]))
    if centres[-1] < RISEN * centres[lowest] or centres[-1] - centres[lowest] < 4 * error:
        return None
    return (
        f"mean squared error {centres[lowest]:.3g} around step {told[lowest][0][0]}, {centres[-1]:.3g} by step "
        f"{told[-1][-1][0]}"
    )


def _overshoot(losses: list[tuple[int, float]], history: History) -> list[str]:
    step, worst = max(losses, key=lambda pair: pair[1], default=(0, 0.0))
    if worst < OVERSHOT * history.guesses.nothing:
        return []
    return [f"mean squared error {worst:.3g} at step {step}, where answering zero has {history.guesses.nothing:.3g}"]


def _huge(history: History) -> list[str]:
    step, rms = max(largest(history.health, "activations"), key=lambda pair: pair[1], default=(0, 0.0))
    return [f"tokens of rms {rms:.3g} at step {step}"] if rms >= HUGE else []


def nothing_learned(history: History) -> Finding | None:
    """A loss that no network is needed for, without signs of a rate that is too high."""
    loss, guesses = history.late_loss, history.guesses
    if history.step < SLOW or loss is None or loss < max(guesses.linear, WORTHLESS * guesses.nothing):
        return None
    if learning_rate_too_high(history) is not None:
        return None
    rate = history.recipe.training.optimizer.learning_rate
    return Finding(
        "nothing learned",
        "wrong",
        "The network does no better than a guess of each number by itself: it has not begun to see pictures.",
        f"mean squared error {loss:.3g} up to step {history.step}; the guess has {guesses.linear:.3g}, answering zero "
        f"{guesses.nothing:.3g}",
        f"training.optimizer.learning_rate={rate * 3:.2g} (it is {rate:.2g}; 1e-4 to 1e-3 is usual for AdamW); look at "
        "the first grid of samples whether the data are pictures at all",
    )


def no_warmup(history: History) -> Finding | None:
    """A bad beginning, from which a run may never recover, and which a warm-up would have softened."""
    training = history.recipe.training
    until = max(EARLY * history.step, training.log_every)
    norms, late = series(history.log, "gradient_norm"), history.late(history.log, "gradient_norm")
    step, worst = max((pair for pair in norms if pair[0] <= until), key=lambda pair: pair[1], default=(0, 0.0))
    overshoot = _overshoot([pair for pair in history.loss if pair[0] <= until], history)
    if training.optimizer.warmup_steps >= WARMUP or not late or worst < SPIKE * median(late) or not overshoot:
        return None
    return Finding(
        "no warm-up",
        "wrong",
        "The first steps were too long and threw the weights about, before the optimizer knew how large gradients are.",
        f"gradient norm {worst:.3g} by step {step}, {median(late):.3g} late in the run; {overshoot[0]}",
        f"training.optimizer.warmup_steps={_warmup(history)} (it is {training.optimizer.warmup_steps}), from the start",
    )


def growing_gradients(history: History) -> Finding | None:
    """Gradients that become longer while the loss no longer falls."""
    norms = series(history.log, "gradient_norm")
    middle = [value for step, value in norms if history.step / 3 < step <= history.step * 2 / 3]
    late = history.late(history.log, "gradient_norm")
    if history.step < BEGUN or len(middle) < 3 or len(late) < 3 or median(late) < GROWN * median(middle):
        return None
    return Finding(
        "gradients grow",
        "watch",
        "Gradients become longer, which often comes before a run diverges.",
        f"gradient norm {median(middle):.3g} in the middle of the run, {median(late):.3g} up to step {history.step}",
        f"{_lower_rate(history)}, or training.optimizer.grad_clip_norm=1",
    )


def always_clipped(history: History) -> Finding | None:
    """A clip that bites on nearly every step."""
    clip, shares = history.recipe.training.optimizer.grad_clip_norm, history.late(history.log, "clipped")
    if clip is None or history.step < BEGUN or not shares or mean(shares) < CLIPPED:
        return None
    norms = history.late(history.log, "gradient_norm")
    norm = median(norms) if norms else clip
    return Finding(
        "every gradient is clipped",
        "watch",
        "Nearly every gradient is longer than the clip, so that the clip, not the gradient, sets how it counts.",
        f"{mean(shares):.0%} of late steps up to step {history.step}, gradient norm {norm:.3g}, clip {clip:g}",
        f"training.optimizer.grad_clip_norm={2 * norm:.2g}, and a lower learning rate if the loss is uneven",
    )


def attention_logits(history: History) -> Finding | None:
    """Attention that comes to look at one token only."""
    found = largest(history.health, "attention_logits")
    late = [value for step, value in found if step > history.step * (1 - LATE)]
    middle = [value for step, value in found if history.step * LATE < step <= history.step * (1 - LATE)]
    if history.step < BEGUN or not late or not middle:
        return None
    grown = median(late) >= LOGITS and median(late) >= GROWING * median(middle)
    if not grown and median(late) < ONE_HOT:
        return None
    network, rate = history.recipe.network, history.recipe.training.optimizer.learning_rate
    boundless = isinstance(network, DiTConfig) and not (isinstance(network.block, RoPESwiGLU) and network.block.qk_norm)
    step, first = found[0]
    return Finding(
        "attention logits grow" if grown else "attention one-hot",
        "wrong" if median(late) >= HIGH_LOGITS else "watch",
        "Attention becomes one-hot: each token looks at one other, and what it looks at can no longer be learned.",
        f"largest logit {first:.3g} at step {step}, {median(middle):.3g} in the middle of the run, {median(late):.3g} "
        f"late up to step {history.step}",
        "network.block=rope-swiglu, in a new run: its qk_norm keeps queries and keys at one length; in this one "
        f"training.optimizer.learning_rate={rate / 3:.2g}"
        if boundless
        else f"training.optimizer.learning_rate={rate / 3:.2g}",
    )


# Labels and averages


def untold_guidance(history: History) -> Finding | None:
    """Guidance by a network that never learned to be told nothing."""
    recipe = history.recipe
    if not recipe.network.num_classes or recipe.training.label_dropout or recipe.sampling.guidance_scale == 1:
        return None
    return Finding(
        "guidance without label dropout",
        "wrong",
        "Guidance leads away from what the network draws when it is told nothing, but it was never told nothing.",
        f"training.label_dropout is 0, sampling.guidance_scale is {recipe.sampling.guidance_scale:g}",
        "training.label_dropout=0.1, or sampling.guidance_scale=1",
    )


def labels_tell_nothing(history: History) -> Finding | None:
    """Wrong labels that cost nothing: measured on the same samples, times and noise, again and again."""
    recipe = history.recipe
    classes = recipe.network.num_classes
    pairs = [
        (record["loss_wrong_labels"], record["loss_probe"])
        for record in history.health
        if record["step"] > history.step / 2
        and len(finite((record.get("loss_wrong_labels"), record.get("loss_probe")))) == 2
        and record["step"] * recipe.training.global_batch_size >= SEEN * classes
    ]
    if classes < 2 or len(pairs) < PROBES or not _has_learned(history):
        return None
    costs, loss = [wrong - right for wrong, right in pairs], mean(right for _, right in pairs)
    error = stdev(costs) / math.sqrt(len(costs))
    if mean(costs) + 2 * error >= GAIN * loss:
        return None
    by_chance = mean(costs) < 3 * error
    if not by_chance and mean(costs) > LITTLE_GAIN * loss:
        return None
    return Finding(
        "labels tell nothing",
        "wrong" if by_chance else "watch",
        "Told wrong labels, the network does as well as told the right ones: they do not go with the pictures.",
        f"a wrong label costs {mean(costs) / loss:.2%} of the loss, +- {2 * error / loss:.2%} ({len(pairs)} probes, "
        f"steps {history.step // 2} to {history.step}); labels that tell something cost 1 % and more",
        "check the labels behind data.path (data.classes): do folders or columns hold what they say? Without labels: "
        "data.classes=none",
    )


def much_label_dropout(history: History) -> Finding | None:
    """Labels that are mostly withheld."""
    share = history.recipe.training.label_dropout
    if not history.recipe.network.num_classes or share <= DROPPED:
        return None
    return Finding(
        "most labels withheld",
        "watch",
        "The network sees a label on fewer than half of the pictures.",
        f"training.label_dropout is {share:g}",
        "training.label_dropout=0.1",
    )


def slow_average(history: History) -> Finding | None:
    """An average of the weights that is far behind them; it is what is drawn with."""
    ema, steps = history.recipe.training.ema, history.recipe.training.steps
    means, weights = history.late(history.health, "loss_ema"), history.late(history.health, "loss_probe")
    if history.step < BEGUN or not means or not weights or mean(means) < BEHIND * mean(weights):
        return None
    memory = 1 / (1 - ema.decay)
    if ema.warmup:
        memory = min(memory, (10 + history.step) / 9)
    catching_up = history.step < 5 * memory <= 5 * steps / LENGTHS
    if catching_up:
        return None
    apart = history.late(history.health, "ema_distance")
    far = f", {mean(apart):.2g} of the weights' length away from them" if apart else ""
    return Finding(
        "average too slow",
        "wrong",
        "The average of the weights, with which the model draws, is far behind the weights.",
        f"late in the run the average's loss is {mean(means):.3g}, the weights' {mean(weights):.3g}{far}; it remembers "
        f"about {memory:.0f} steps, and the run has {steps}",
        f"training.ema.decay={_decay(steps)}" + ("" if ema.warmup else " and training.ema.warmup=true"),
    )


def _decay(steps: int) -> str:
    """That of a memory of a twentieth of a run, in round numbers: 0.99, 0.998, 0.9995."""
    return f"{1 - float(f'{min(0.1, 20 / steps):.1g}'):.6g}"


# Parts that do nothing


def dead_patches(history: History) -> Finding | None:
    """Places at which the network says the same whatever it sees."""
    shares = history.late(history.health, "dead_patches")
    if not shares or median(shares) <= DEAD or not _has_learned(history):
        return None
    return Finding(
        "dead patches",
        "watch",
        "At some places the output hardly depends on the picture.",
        f"dead_patches {median(shares):.2f} of the token positions, late up to step {history.step}",
        f"look at the samples for places that stay the same; {_lower_rate(history)}",
    )


def shut_gates(history: History) -> Finding | None:
    """Blocks that add nothing, late in a run."""
    records = [finite(record.get("gates")) for record in history.health if record["step"] > history.step * (1 - LATE)]
    records = [gates for gates in records if gates]
    if history.step < max(OPENED, history.recipe.training.steps / 2) or not records:
        return None
    gates = [median(each) for each in zip(*records)]
    shut = [place for place, gate in enumerate(gates) if gate < SHUT]
    if not shut:
        return None
    rate = history.recipe.training.optimizer.learning_rate
    return Finding(
        "gates never opened",
        "watch",
        "Some blocks add next to nothing to the tokens: their gates, which begin at zero, have stayed there.",
        f"blocks {', '.join(map(str, shut))}: gates of rms below {SHUT:g} up to step {history.step}, the median is "
        f"{median(gates):.2g}",
        f"network.depth={len(gates) - len(shut)} in a new run"
        if len(shut) < len(gates)
        else f"training.optimizer.learning_rate={3 * rate:.2g}",
    )


def off_at_one_end(history: History) -> Finding | None:
    """A loss that is worse than a guess near the data or near the noise, while the rest is learned."""
    records = [record.get("loss_by_time") for record in history.health if record["step"] > history.step * (1 - LATE)]
    if not _has_learned(history) or not records:
        return None
    for place, end in ((0, "data"), (BINS - 1, "noise")):
        values = finite(record[place] for record in records if isinstance(record, list) and len(record) == BINS)
        guess, nothing = history.guesses.linear_by_time[place], history.guesses.nothing_by_time[place]
        if not values or guess is None or nothing is None:
            continue
        if mean(values) < EXCESS[0] * guess + EXCESS[1] * nothing:
            continue
        kind = history.recipe.diffusion.kind
        flow = f"diffusion.timestep_sampling=uniform, or process.shift {'above' if end == 'noise' else 'below'} 1"
        return Finding(
            f"off near the {end}",
            "watch",
            f"At times near the {end} the network does worse than a guess of each number by itself: it hardly learns "
            "there.",
            f"mean squared error {mean(values):.3g} at times {place / BINS:g} to {(place + 1) / BINS:g}, the guess has "
            f"{guess:.3g} (up to step {history.step})",
            flow if kind == "flow" else "diffusion.prediction=v, or diffusion.schedule=cosine, in a new run",
        )
    return None


# Speed


def waiting_for_data(history: History) -> Finding | None:
    """A device that waits for images."""
    shares, workers = history.late(history.log, "stalled"), history.recipe.training.num_workers
    if not shares or mean(shares) < STALLED:
        return None
    return Finding(
        "waiting for data",
        "watch",
        "The device waits while images are read and decoded.",
        f"{mean(shares):.0%} of the time, late up to step {history.step}; training.num_workers is {workers}",
        f"training.num_workers={2 * workers}, if processor cores are left; or store the images at data.size beforehand",
    )


def idle_device(history: History) -> Finding | None:
    """A GPU that does little of what it can, though data are there."""
    shares, config = history.late(history.log, "utilisation"), history.recipe.training
    if not shares or mean(shares) >= IDLE or waiting_for_data(history) is not None or not _on_gpu(history):
        return None
    changes = [] if config.compile not in (False, "off") else ["training.compile=auto"]
    changes += [] if config.precision != "float32" else ["training.precision=auto"]
    if config.micro_batch_size and config.micro_batch_size < config.global_batch_size:
        changes.append(f"training.micro_batch_size={min(2 * config.micro_batch_size, config.global_batch_size)}")
    else:
        changes.append(f"training.global_batch_size={2 * config.global_batch_size}")
    return Finding(
        "GPU hardly busy",
        "watch",
        "The GPU does little of what it can.",
        f"{mean(shares):.0%} of its peak, late up to step {history.step}: {history.last('images_per_second'):.4g} "
        "images/s",
        ", ".join(changes),
    )


def _on_gpu(history: History) -> bool:
    """Whether the newest checkpoint was trained on CUDA."""
    saved = bundle.checkpoints(history.folder)
    return bool(saved) and str(bundle.load_config(saved[0]).origin.get("trained by", "")).endswith("on cuda")


# What several rules ask


def _has_learned(history: History) -> bool:
    """Whether the network knows more than a guess number by number: before, no part of it can be judged."""
    loss = history.late_loss
    return history.step >= BEGUN and loss is not None and loss < UNLEARNED * history.guesses.linear


def _warmup(history: History) -> int:
    """Steps of a warm-up that suits the run: a fiftieth, though at least 50."""
    return max(50, history.recipe.training.steps // 50)


def _lower_rate(history: History) -> str:
    """The keys of the learning rate with a tenth of their values."""
    optimizer = history.recipe.training.optimizer
    told = f"training.optimizer.learning_rate={optimizer.learning_rate / 10:.2g}"
    if isinstance(optimizer, MuonConfig) and optimizer.adamw_learning_rate:
        told += f" and training.optimizer.adamw_learning_rate={optimizer.adamw_learning_rate / 10:.2g}"
    return told


Rule = Callable[[History], Finding | None]
# A cause stands before what may follow from it.
RULES: tuple[Rule, ...] = (
    same_pictures, unscaled_latents, unusable_images, no_warmup, learning_rate_too_high, nothing_learned,
    attention_logits, untold_guidance, labels_tell_nothing, slow_average, growing_gradients, always_clipped,
    off_at_one_end, dead_patches, shut_gates, much_label_dropout, waiting_for_data, idle_device,
)  # fmt: skip
