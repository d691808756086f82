"""Continuous batching: what does it cost to sample requests together, against one batch in the usual loop?

    python benchmarks/continuous.py [--model RUN] [--rows 16] [--rounds 7]

One process, one thread, the ways take turns; medians of CPU time and their ratio to the usual loop. Without a model, an
untrained network of the digits' size is used. Modulation is not computed ahead in any of the ways.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

import tessera
from tessera import generation
from tessera.bundle import BundleConfig
from tessera.generation import ContinuousSampler, SampleRequest, denoiser
from tessera.settings import read_yaml
from tessera.training.recipe import Recipe

SOLVERS = ["ddim", "dpm++", "unipc", "euler"]
ROOT = Path(__file__).resolve().parents[1]


def untrained_digits() -> tessera.Model:
    recipe = Recipe.model_validate({**read_yaml(ROOT / "recipes/digits.yaml"), "run_dir": "unused"})
    sizes = {"input_size": (8, 8), "in_channels": 1, "num_classes": 10, "out_channels": 1}
    network = recipe.network.model_copy(update=sizes)
    config = BundleConfig(network=network, diffusion=recipe.diffusion, codec={"kind": "pixels", "channels": 1})  # pyright: ignore[reportArgumentType]
    torch.manual_seed(0)
    return tessera.Model(config, network.build().eval())


def request(rows: range, steps: int, sampler: str = "ddim") -> SampleRequest:
    settings = {"num_steps": steps, "sampler": sampler}
    return SampleRequest(list(rows), {"label": [row % 10 for row in rows]}, 2.0, settings=settings)


def together(model: tessera.Model, requests: list[SampleRequest]) -> None:
    sampler = ContinuousSampler(model)
    for number, each in enumerate(requests):
        sampler.add(each, [(number, row) for row in range(len(each))])
    while sampler.batch.num_rows:
        sampler.step()


@torch.no_grad()
def usual(model: tessera.Model, one: SampleRequest) -> None:
    for _ in generation.sample_steps(model, one.resolve(model)):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a run or bundle of a class-conditional model")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    denoiser.MODULATION_TABLE_BYTES = -1
    model = tessera.load(options.model) if options.model else untrained_digits()
    rows, steps = options.rows, options.steps
    each = [range(row, row + 1) for row in range(rows)]
    ways = {
        "one batch, the usual loop": lambda: usual(model, request(range(rows), steps)),
        "one request": lambda: together(model, [request(range(rows), steps)]),
        f"{rows} requests": lambda: together(model, [request(row, steps) for row in each]),
        f"{rows} requests, 4 solvers": lambda: together(
            model, [request(row, steps, SOLVERS[number % 4]) for number, row in enumerate(each)]
        ),
        f"{rows} requests, one after the other": lambda: [usual(model, request(row, steps)) for row in each],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if number:  # the first round is a warm-up
                seconds[name].append(time.process_time() - start)
    first = statistics.median(seconds["one batch, the usual loop"])
    print(f"{model.config.network.summary()}, {rows} rows, {steps} steps, torch {torch.__version__}\n")
    print("| way | CPU ms | times the usual loop |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {1000 * statistics.median(values):.1f} | {statistics.median(values) / first:.3f} |")


if __name__ == "__main__":
    main()
