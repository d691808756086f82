"""DiT-XL/2 at 256 px (32 x 32 x 4 latents) on one GPU: training and sampling rates, and model FLOPs utilization.

    python benchmarks/gpu_throughput.py --train [--model DiT-XL/2] [--micro 32,64,96] [--compile off,blocks,whole]
        [--recompute none,selective,blocks] [--rounds 1] [--within 24] [--block rope-swiglu] [--optimizer muon]
    python benchmarks/gpu_throughput.py --sample [--batch 64]

Weights are random and latents synthetic: rates do not depend on them. Prints one table; rows that would exceed
--minutes are left out, so that a call ends within nine minutes. --rounds: micro-batches per step; --within: GiB of
memory that the process may use, to show that a run fits on a smaller card. Utilization = FLOPs of the model (2 per
multiply-add; training 3 forward passes, whatever is recomputed) / time / peak, against the data sheet of the H100 (989
TFLOP/s dense bf16) and against this card's measured peak. Also runs on a CPU, to try it with a small --model.
"""

import argparse
import itertools
import sys
import time

import torch

from tessera import generation, runtime
from tessera.acceleration.activation_checkpointing import CheckpointingMode, checkpoint_activations
from tessera.acceleration.compilation import CompileMode, compile_network
from tessera.bundle import BundleConfig, Model
from tessera.codecs import PixelsConfig
from tessera.conditioning import Condition
from tessera.data import Batch
from tessera.diffusion.gaussian import GaussianDiffusionConfig
from tessera.models.dit import DiT, DiTConfig
from tessera.training.ema import EMA
from tessera.training.objective import TrainingObjective
from tessera.training.optimizers import AdamWConfig, MuonConfig
from tessera.training.parallel import ParallelContext
from tessera.training.recipe import EMAConfig
from tessera.training.step import MetricAccumulator, TrainState, train_step

DATA_SHEET = 989e12


def train(options: argparse.Namespace, device: torch.device) -> None:
    dtype = runtime.autocast_dtype("auto", device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as a run does
        if options.within is not None:
            share = options.within * 2**30 / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(share)
    highest = runtime.peak_flops(device, dtype or torch.float32)
    print(f"measured peak {highest / 1e12:.4g} TFLOP/s ({dtype or torch.float32})\n")
    print(f"| {options.model} | recomputed | micro-batch | images/s | of the data sheet | of the measured peak | GiB |")
    print("|---|---|---|---|---|---|---|")
    config = DiTConfig.model_validate({"preset": options.model, "block": options.block})
    operations = 6 * config.build().macs()  # per image
    began = time.perf_counter()
    for how, what in itertools.product(options.compile.split(","), options.recompute.split(",")):
        for micro in map(int, options.micro.split(",")):
            row = f"| {how} | {what} | {micro} |"
            if time.perf_counter() - began > 60 * options.minutes:
                print(f"{row} left out: no time left | | | |", flush=True)
                continue
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                rate = training_rate(config.build().to(device), options, how, what, micro, dtype)
            except torch.OutOfMemoryError:
                print(f"{row} out of memory | | | |", flush=True)
                break  # more would not fit either
            print(
                f"{row} {rate:.4g} | {operations * rate / DATA_SHEET:.1%} | {operations * rate / highest:.1%} | "
                f"{runtime.peak_memory(device) / 2**30:.1f} |",
                flush=True,
            )


def training_rate(
    network: DiT,
    options: argparse.Namespace,
    how: CompileMode,
    what: CheckpointingMode,
    micro: int,
    dtype: torch.dtype | None,
) -> float:
    """Images per second of whole training steps: forward, backward, optimizer, EMA."""
    device, classes = next(network.parameters()).device, network.config.num_classes
    config = AdamWConfig() if options.optimizer == "adamw" else MuonConfig()
    average = EMA(network, EMAConfig())
    checkpoint_activations(network, what)
    torch._dynamo.reset()  # a fresh compilation for each size
    forward, reason = compile_network(network, how)
    if reason is not None:
        sys.exit(f"cannot compile here: {reason}")
    learner = TrainState(network, forward, config.build(network), config, ParallelContext())
    learner.optimizer.register_step_pre_hook(lambda *_: average.synchronize())
    # The codec is the identity, as on cached latents: the autoencoder is not part of the step.
    diffusion, codec = GaussianDiffusionConfig().build(), PixelsConfig().build()
    task = TrainingObjective(diffusion, codec, False, 0.1, ("label",), 0, dtype)
    batch = micro * options.rounds
    pixels = torch.randint(0, 256, (batch, 4, 32, 32), dtype=torch.uint8)
    pixels = pixels.pin_memory() if device.type == "cuda" else pixels
    label = torch.randint(0, classes, (batch,))
    tally = MetricAccumulator()

    def step(number: int) -> None:
        samples = Batch(pixels, Condition(label), torch.arange(batch) + number * batch)
        tally.add(train_step(learner, samples, task, batch, options.rounds))
        average.update(number + 1)

    for warm in range(3):
        step(warm)
    runtime.synchronize(device)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < options.seconds:
        for _ in range(5 if device.type == "cuda" else 1):
            step(3 + done)
            done += 1
        runtime.synchronize(device)
    return done * batch / (time.perf_counter() - began)


def sample(model: str, batch: int, device: torch.device, samplers: list[tuple[str, int]]) -> None:
    print("| model | batch | sampler | guidance | precision | compiled | images/s |")
    print("|---|---|---|---|---|---|---|")
    config = DiTConfig.model_validate({"preset": model})
    network = config.build().to(device).eval()
    described = BundleConfig(network=config, diffusion=GaussianDiffusionConfig(), codec=PixelsConfig())
    eager, whole = Model(described, network), Model(described, torch.compile(network))
    for sampler, steps in samplers:
        for guidance in (1.0, 4.0):
            for precision, chosen in (("float32", eager), ("bfloat16", eager), ("bfloat16", whole)):
                if steps == 250 and precision == "float32":
                    continue  # follows from the others, and would exceed nine minutes
                settings = {"sampler": sampler, "guidance_scale": guidance, "precision": precision}
                sampling_seconds(chosen, batch, {**settings, "num_steps": 3})  # warms up, and compiles
                rate = batch / sampling_seconds(chosen, batch, {**settings, "num_steps": steps})
                print(
                    f"| {model} | {batch} | {sampler} {steps} | {guidance:g} | {precision} | "
                    f"{'no' if chosen is eager else 'yes'} | {rate:.4g} |",
                    flush=True,
                )


def sampling_seconds(model: Model, batch: int, settings: dict) -> float:
    """Seconds to sample one batch of latents."""
    began = time.perf_counter()
    classes = [row % model.config.network.num_classes for row in range(batch)]
    for _ in generation.generate_steps(model, classes, list(range(batch)), **settings):
        pass
    runtime.synchronize(model.device)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--model", default="DiT-XL/2")
    parser.add_argument("--micro", default="32,64,96", help="samples per forward pass, increasing")
    parser.add_argument("--compile", default="off,blocks")
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--within", type=float)
    parser.add_argument("--seconds", type=float, default=15, help="measuring time of a row")
    parser.add_argument("--minutes", type=float, default=6, help="no row starts after this time")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--samplers", default="ddim:20,ddim:50,ancestral:250", help="solver:steps, for --sample")
    parser.add_argument("--block", default="adaln-zero", help="design of the blocks, for --train")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    options = parser.parse_args()
    device = runtime.choose_device("auto")
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}")
    if options.train:
        train(options, device)
    if options.sample:
        samplers = [
            (name, int(steps)) for name, _, steps in (word.partition(":") for word in options.samplers.split(","))
        ]
        sample(options.model, options.batch, device, samplers)


if __name__ == "__main__":
    main()
