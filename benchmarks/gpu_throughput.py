"""DiT-XL/2 at 256 px (32 x 32 x 4 latents) on one GPU: training and drawing rates, and model-FLOPs utilisation.

    python benchmarks/gpu_throughput.py --train [--model DiT-XL/2] [--micro 32,64,128] [--seconds 40]
        [--block modern] [--optimizer muon]
    python benchmarks/gpu_throughput.py --sample [--batch 64]

Weights are random and the latents made up: rates do not depend on them. One table to standard output; finishes inside
nine minutes. Utilisation = operations of the model (2 a multiply-add; training 3 forward passes) / time / peak,
against the data sheet of the H100 (989 TFLOP/s dense bf16) and against this card's measured peak. Runs on a CPU too,
for a dry trial with a small --model, where the peak is that of the CPU.
"""

import argparse
import time

import torch

from tessera import drawing, runtime
from tessera.bundle import BundleConfig, Model
from tessera.codecs import PixelsConfig
from tessera.data import Batch
from tessera.models.dit import DiT, DiTConfig
from tessera.process.gaussian import GaussianConfig
from tessera.training.ema import Average
from tessera.training.optimizers import Adam, AnyOptimizer, Muon
from tessera.training.recipe import EMA
from tessera.training.step import Task, train_step

DATA_SHEET = 989e12


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(20):
        runtime.synchronise(device)
        began = time.perf_counter()
        a @ b
        runtime.synchronise(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best


def train(
    model: str, micros: list[int], seconds: float, device: torch.device, block: str, optimizer: AnyOptimizer
) -> None:
    dtype = runtime.autocast_dtype("auto", device)
    highest = peak(device, dtype or torch.float32)
    print(f"measured peak {highest / 1e12:.1f} TFLOP/s ({dtype or torch.float32})\n")
    print("| model | micro-batch | compiled | images/s | of the data sheet | of the measured peak | peak memory GiB |")
    print("|---|---|---|---|---|---|---|")
    config = DiTConfig.model_validate({"preset": model, "block": block})
    for compiled in (False, True):
        for micro in micros:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            network = config.build().to(device)
            try:
                rate = training_rate(network, micro, compiled, seconds, dtype, optimizer)
            except torch.OutOfMemoryError:
                print(f"| {model} | {micro} | {'yes' if compiled else 'no'} | out of memory | | | |", flush=True)
                del network
                torch.cuda.empty_cache()
                continue
            operations = 6 * network.macs() * rate
            print(
                f"| {model} | {micro} | {'yes' if compiled else 'no'} | {rate:.4g} | {operations / DATA_SHEET:.1%} | "
                f"{operations / highest:.1%} | {runtime.peak_memory(device) / 2**30:.1f} |",
                flush=True,
            )


def training_rate(
    network: DiT, micro: int, compiled: bool, seconds: float, dtype: torch.dtype | None, config: AnyOptimizer
) -> float:
    """Images a second of whole training steps: forward, backward, optimizer, EMA."""
    device, classes = next(network.parameters()).device, network.config.classes
    average, optimizer = Average(network, EMA()), config.build(network)
    torch._dynamo.reset()  # a fresh compilation for each size, never a dynamic one
    forward = torch.compile(network, dynamic=False) if compiled else network
    # The codec is the identity, as on cached latents: the autoencoder is no part of the step.
    task = Task(GaussianConfig().build(), PixelsConfig().build(), False, 0.1, classes, 0, dtype)
    pixels = torch.randint(0, 256, (micro, 4, 32, 32), dtype=torch.uint8)
    label = torch.randint(0, classes, (micro,))

    def step(number: int) -> None:
        batch = Batch(pixels, label, torch.arange(micro) + number * micro)
        train_step(forward, optimizer, batch, task, config, micro)
        average.update(number + 1)

    for warm in range(3):
        step(warm)
    runtime.synchronise(device)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(5):
            step(3 + done)
            done += 1
        runtime.synchronise(device)
    return done * micro / (time.perf_counter() - began)


def sample(model: str, batch: int, device: torch.device) -> None:
    print("| model | batch | sampler | guidance | precision | compiled | images/s |")
    print("|---|---|---|---|---|---|---|")
    config = DiTConfig.model_validate({"preset": model})
    network = config.build().to(device).eval()
    described = BundleConfig(network=config, process=GaussianConfig(), codec=PixelsConfig())
    eager, compiled = Model(described, network), Model(described, torch.compile(network))
    for sampler, steps in (("ddim", 20), ("ddim", 50), ("ancestral", 250)):
        for guidance in (1.0, 4.0):
            for precision, chosen in (("float32", eager), ("bfloat16", eager), ("bfloat16", compiled)):
                if steps == 250 and precision == "float32":
                    continue  # known from the others; it would not fit the nine minutes
                settings = {"sampler": sampler, "guidance": guidance, "precision": precision}
                drawing_seconds(chosen, batch, {**settings, "steps": 3})  # warms up, and compiles
                rate = batch / drawing_seconds(chosen, batch, {**settings, "steps": steps})
                print(
                    f"| {model} | {batch} | {sampler} {steps} | {guidance:g} | {precision} | "
                    f"{'no' if chosen is eager else 'yes'} | {rate:.4g} |",
                    flush=True,
                )


def drawing_seconds(model: Model, batch: int, settings: dict) -> float:
    """Seconds to draw one batch of latents."""
    began = time.perf_counter()
    classes = [row % model.config.network.classes for row in range(batch)]
    for _ in drawing.walk(model, classes, list(range(batch)), **settings):
        pass
    runtime.synchronise(model.device)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--model", default="DiT-XL/2")
    parser.add_argument("--micro", default="32,64,128")
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--block", default="adaln-zero", help="design of the blocks, for --train")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    options = parser.parse_args()
    device = runtime.choose_device("auto")
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}")
    if options.train:
        optimizer = Adam() if options.optimizer == "adamw" else Muon()
        micros = [int(micro) for micro in options.micro.split(",")]
        train(options.model, micros, options.seconds, device, options.block, optimizer)
    if options.sample:
        sample(options.model, options.batch, device)


if __name__ == "__main__":
    main()
