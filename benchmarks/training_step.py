"""One training step (network, loss, optimizer, EMA) against a plain loop of the same mathematics over diffusers' DiT.

    python benchmarks/training_step.py --model DiT-S/4 --batch 8 [--ways eager,blocks,whole] [--seconds 480]
    python benchmarks/training_step.py --model DiT-S/4 --batch 8 --profile

Tessera's step is `train_step` of tessera.training.step and the EMA update, as in a run. The plain loop is a typical
loop with diffusers and PyTorch: DiTTransformer2DModel with our weights, a few lines for the loss (epsilon, learned
variance), torch.optim.AdamW with its defaults, and an EMA over parameters in a Python loop. In diffusers every block
has its own embedding of time and class; ours has one. Here diffusers' blocks share one, too, so that both compute the
same and their losses can be compared step by step with the same random numbers; the script stops if they differ.
`--embedders each` leaves diffusers' model unchanged, which is more work for the plain loop.

Every way runs in a process of its own, and they take one step alternately while the others wait; a row has medians of
wall-clock and CPU time, and the median of the ratios to the plain loop's step of the same round
(above 1: Tessera is faster). Fraction of peak: 2 FLOPs per multiply-add, 3 forward passes per step, against the
best float32 product of two 2048 x 2048 matrices. MiB: the peak growth of the process over the steps (Linux).
--profile: where the time of our step goes instead.
"""

import argparse
import ctypes
import gc
import math
import multiprocessing
import platform
import statistics
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from against_diffusers import pair, peak_flops
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from tessera import randomness, runtime
from tessera.acceleration.compilation import compile_network
from tessera.conditioning import Condition
from tessera.data import Batch
from tessera.diffusion.gaussian import GaussianDiffusion, GaussianDiffusionConfig
from tessera.models.dit import DiT, DiTConfig
from tessera.training import objective
from tessera.training.ema import EMA
from tessera.training.objective import TrainingObjective
from tessera.training.optimizers import AdamWConfig
from tessera.training.parallel import ParallelContext
from tessera.training.recipe import EMAConfig
from tessera.training.step import MetricAccumulator, TrainState, train_step

RATE, DECAY, DROPPED, STEPS, WARM_UP = 1e-4, 0.9999, 0.1, 1000, 3
DIGITS = {
    "input_size": 8,
    "in_channels": 1,
    "out_channels": 2,
    "num_classes": 10,
    "patch_size": 2,
    "hidden_size": 192,
    "depth": 6,
    "num_heads": 6,
}


class Latents:
    """A codec that takes bytes as latents: the autoencoder is not part of a step."""

    stochastic = False

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        return pixels


def make_batch(config: DiTConfig, batch: int, number: int) -> Batch:
    """The number-th batch of synthetic images."""
    generator = torch.Generator().manual_seed(number)
    return Batch(
        torch.randint(0, 256, (batch, config.in_channels, *config.input_size), dtype=torch.uint8, generator=generator),
        Condition(torch.randint(0, config.num_classes, (batch,), generator=generator)),
        torch.arange(number * batch, (number + 1) * batch),
    )


class Ours:
    """Tessera's step, eager or compiled."""

    def __init__(self, network: DiT, way: str) -> None:
        config = AdamWConfig(learning_rate=RATE)
        self.average = EMA(network, EMAConfig(decay=DECAY))
        forward, reason = compile_network(network, "off" if way == "eager" else way)
        if reason:
            sys.exit(f"cannot compile here: {reason}")
        self.network, self.learner = (
            network,
            TrainState(network, forward, config.build(network), config, ParallelContext()),
        )
        self.tally = MetricAccumulator()
        self.task = TrainingObjective(
            diffusion=GaussianDiffusionConfig(num_timesteps=STEPS).build(), codec=Latents(), hflip=False,
            condition_dropout=DROPPED,
            null_fields=("label",), seed=0, dtype=None,
        )  # fmt: skip
        self.steps = 0

    def step(self, batch: Batch) -> Tensor:
        metrics = train_step(self.learner, batch, self.task, len(batch.position))
        self.tally.add(metrics)
        self.steps += 1
        self.average.update(self.steps)
        return metrics.values["loss"]


class Plain:
    """The same with diffusers' network and PyTorch alone."""

    def __init__(self, network: nn.Module, average: nn.Module, config: DiTConfig) -> None:
        self.network, self.average, self.config = network, average, config
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.0)
        betas = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
        self.bars = torch.cumprod(1 - betas, dim=0)
        self.bars_before = torch.cat((torch.ones(1), self.bars[:-1]))
        posterior = betas * (1 - self.bars_before) / (1 - self.bars)
        self.least = torch.cat((posterior[1:2], posterior[1:])).log()
        self.most = betas.log()
        self.of_x0 = betas * self.bars_before.sqrt() / (1 - self.bars)
        self.of_x = (1 - self.bars_before) * (1 - betas).sqrt() / (1 - self.bars)

    def step(self, batch: Batch, numbers: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """numbers: times [B], noise like the images and dropped labels [B]; None: PyTorch's own random numbers."""
        x0 = batch.pixels.float() / 127.5 - 1
        if numbers is None:
            t = torch.randint(0, STEPS, (len(x0),))
            noise = torch.randn_like(x0)
            dropped = torch.rand(len(x0)) < DROPPED
        else:
            t, noise, dropped = numbers
        label = torch.where(dropped, self.config.num_classes, batch.condition.label)
        x = at(self.bars.sqrt(), t) * x0 + at((1 - self.bars).sqrt(), t) * noise
        eps_hat, fraction = self.network(x, timestep=t, class_labels=label).sample.chunk(2, dim=1)
        loss = ((eps_hat - noise) ** 2).mean() + self.bound(eps_hat.detach(), fraction, x0, x, t).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for mean, weight in zip(self.average.parameters(), self.network.parameters()):
                mean.mul_(DECAY).add_(weight, alpha=1 - DECAY)
        return loss.detach()

    def bound(self, eps: Tensor, fraction: Tensor, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The variational bound's term of each image in bits per dimension, which trains the variance. [B]"""
        fraction = (fraction + 1) / 2
        log_variance = fraction * at(self.most, t) + (1 - fraction) * at(self.least, t)
        x0_hat = (x - at((1 - self.bars).sqrt(), t) * eps) / at(self.bars.sqrt(), t)
        mean = at(self.of_x0, t) * x0_hat + at(self.of_x, t) * x
        true_mean, true_log_variance = at(self.of_x0, t) * x0 + at(self.of_x, t) * x, at(self.least, t)
        kl = true_log_variance - log_variance
        kl = 0.5 * (-1 - kl + kl.exp() + (true_mean - mean) ** 2 * torch.exp(-log_variance))
        scale = torch.exp(-0.5 * log_variance)
        above, below = normal_cdf((x0 - mean + 1 / 255) * scale), normal_cdf((x0 - mean - 1 / 255) * scale)
        share = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
        likelihood = torch.log(share.clamp(min=1e-12))
        bits = torch.where((t == 0)[:, None, None, None], -likelihood, kl)
        return bits.mean(dim=(1, 2, 3)) / math.log(2)


def at(table: Tensor, t: Tensor) -> Tensor:
    return table[t].float()[:, None, None, None]


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def configured(model: str) -> DiTConfig:
    return DiTConfig.model_validate(settings(model))


def settings(model: str) -> dict[str, Any]:
    return DIGITS if model == "digits" else {"preset": model}


def ours_of(model: str, way: str) -> Ours:
    return Ours(pair(settings(model))[0].train(), way)


def plain_of(model: str, embedders: str) -> Plain:
    """The same weights as ours."""
    network, average = (pair(settings(model))[1] for _ in range(2))
    for each in (network, average):
        each.eval()  # in training mode diffusers drops labels in every block separately
        if embedders == "one":
            for block in each.transformer_blocks:
                block.norm1.emb = each.transformer_blocks[0].norm1.emb
    return Plain(network, average.requires_grad_(False), configured(model))


def numbers(batch: Batch, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """The random numbers of our step, as the plain loop takes them."""
    place, process = batch.position, GaussianDiffusionConfig(num_timesteps=STEPS).build()
    t = process.sample_timesteps(randomness.uniform(0, place, objective.TIMESTEP_STREAM)[:, 0])
    noise = randomness.normal(0, place, objective.NOISE_STREAM, tuple(shape[1:]))
    dropped = randomness.uniform(0, place, objective.CONDITION_DROPOUT_STREAM)[:, 0] < DROPPED
    return process.model_time(t).long(), noise, dropped


def work(options: argparse.Namespace, way: str, pipe: Connection) -> None:
    """A process that holds one way. A failure is sent to the parent, which ends with it."""
    try:
        take_steps(options, way, pipe)
    except BaseException:
        pipe.send(traceback.format_exc())


def take_steps(options: argparse.Namespace, way: str, pipe: Connection) -> None:
    """Take the steps that the parent requests and send the cost of each."""
    if way == "plain":
        one = plain_of(options.model, options.embedders)
        config = one.config
    else:
        runtime.keep_freed_memory()  # as a run does
        one = ours_of(options.model, way)
        config = one.network.config
    torch.manual_seed(0)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    resident_before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    while (request := pipe.recv()) is not None:
        number, same_numbers = request
        batch = make_batch(config, options.batch, number)
        extra = (numbers(batch, batch.pixels.shape),) if way == "plain" and same_numbers else ()
        wall, processor = time.perf_counter(), time.process_time()
        loss = one.step(batch, *extra)
        taken = time.perf_counter() - wall, time.process_time() - processor
        pipe.send((loss.item(), *taken, (resident("VmHWM") - resident_before) / 1024))


def measure(options: argparse.Namespace) -> None:
    """Print the table. Stops if losses differ."""
    began, ways = time.perf_counter(), ["plain", *options.ways.split(",")]
    context, pipes = multiprocessing.get_context("spawn"), {}
    for way in ways:
        pipes[way], end = context.Pipe()
        context.Process(target=work, args=(options, way, end), daemon=True).start()
        end.close()  # so that the end of the process ends `recv`

    def step(way: str, number: int, same_numbers: bool = False) -> tuple[float, float, float, float]:
        try:
            pipes[way].send((number, same_numbers))
            cost = pipes[way].recv()
        except (EOFError, OSError):
            sys.exit(f"the process of '{way}' has ended")
        if isinstance(cost, str):
            sys.exit(f"the process of '{way}' failed:\n{cost}")
        return cost

    for number in range(WARM_UP):  # compiles, too
        losses = {way: step(way, number, same_numbers=True)[0] for way in ways}
        print(f"loss of step {number}: " + ", ".join(f"{loss:.7f} {way}" for way, loss in losses.items()), flush=True)
        # Separate embeddings differ after the first update.
        allowed = 2e-5 if options.embedders == "one" or number == 0 else 1e-2
        if any(abs(loss - losses["plain"]) > allowed * losses["plain"] for loss in losses.values()):
            sys.exit("the losses part: nothing to compare")
    peak, order, number = peak_flops(), list(ways), WARM_UP
    taken: dict[str, list[tuple[float, float, float, float]]] = {way: [] for way in ways}
    while number < WARM_UP + 3 or time.perf_counter() - began < options.seconds:
        for way in order:
            taken[way].append(step(way, number))
        order.append(order.pop(0))  # so that the order changes
        number += 1
    peak = max(peak, peak_flops())
    print(f"\n| {options.model}, batch {options.batch} | ms | CPU ms | speedup | CPU speedup | of peak | MiB |")
    print("|---|---|---|---|---|---|---|")
    operations = 6 * configured(options.model).build().macs() * options.batch
    for way, times in taken.items():
        _, wall, processor, memory = (statistics.median(column) for column in zip(*times))
        ratios = [statistics.median(p[i] / w[i] for p, w in zip(taken["plain"], times)) for i in (1, 2)]
        print(
            f"| {way} | {1e3 * wall:.1f} | {1e3 * processor:.1f} | {ratios[0]:.3f} | {ratios[1]:.3f} | "
            f"{operations / wall / peak:.0%} | {memory:.0f} |"
        )
    print(f"\npeak {peak / 1e9:.0f} GFLOP/s, {number - WARM_UP} rounds")
    for pipe in pipes.values():
        pipe.send(None)


def resident(what: str) -> int:
    """KiB of this process: VmRSS now, VmHWM at its peak. Linux."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(what)).split()[1])


# Where the time goes

GROUPS = {  # by the beginning of an operation's name
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash", "aten::_efficient"),
    "GELU": ("aten::gelu",),
    "layer norm": ("aten::native_layer_norm",),
    "arithmetic by element": (
        "aten::mul",
        "aten::add",
        "aten::sub",
        "aten::div",
        "aten::silu",
        "aten::neg",
        "aten::lerp",
    ),
    "sums": ("aten::sum", "aten::mean"),
    "gradient norms": ("aten::_foreach_norm", "aten::linalg_vector_norm"),
    "copies": ("aten::copy_", "aten::cat", "aten::stack", "aten::fill_", "aten::zero_", "aten::clone"),
}
LABELS = ("random numbers", "loss", "EMA", "Optimizer.step")


def labelled(name: str, function: Callable) -> Callable:
    @wraps(function)
    def call(*inputs, **named):
        with record_function(name):
            return function(*inputs, **named)

    return call


def share_out(one: Ours, batch: int, repeats: int = 5) -> dict[str, float]:
    """CPU seconds of a step by group."""
    for name in ("uniform", "normal"):
        setattr(randomness, name, labelled("random numbers", getattr(randomness, name)))
    GaussianDiffusion.loss = labelled("loss", GaussianDiffusion.loss)
    one.average.update = labelled("EMA", one.average.update)
    batches = [make_batch(one.network.config, batch, number) for number in range(2 + repeats)]
    for each in batches[:2]:
        one.step(each)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for each in batches[2:]:
            one.step(each)
    seconds: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        seconds[group(event)] += event.self_cpu_time_total / 1e6 / repeats
    return seconds


def group(event) -> str:
    above = event
    while above is not None:
        for label in LABELS:
            if above.name.startswith(label):
                return "optimizer" if label == "Optimizer.step" else label
        above = above.cpu_parent
    if event.name.startswith(("Torch-Compiled", "## Call CompiledFx", "CompiledFunction")):
        return "compiled code"
    return next((name for name, starts in GROUPS.items() if event.name.startswith(starts)), "all else")


def print_shares(model: str, batch: int, way: str, one: Ours) -> None:
    seconds = share_out(one, batch)
    whole = sum(seconds.values())
    print(f"| {model}, batch {batch}, {way} | ms | share |")
    print("|---|---|---|")
    for name, taken in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"| {name} | {1e3 * taken:.1f} | {taken / whole:.1%} |")
    print(f"| all | {1e3 * whole:.1f} | |")


def main() -> None:
    import diffusers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-S/4", help="a preset, or digits")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--ways", default="eager,blocks,whole", help="compilation modes of Tessera")
    parser.add_argument("--embedders", choices=("one", "each"), default="one", help="of the plain loop's blocks")
    parser.add_argument("--seconds", type=float, default=480, help="of the whole call, compiling included")
    parser.add_argument("--profile", action="store_true", help="where the time of our step goes")
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}\n"
    )
    if not options.profile:
        return measure(options)
    runtime.keep_freed_memory()  # as a run does
    for way in options.ways.split(","):
        print_shares(options.model, options.batch, way, ours_of(options.model, way))


if __name__ == "__main__":
    main()
