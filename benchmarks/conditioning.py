"""How soon does a network use its class labels, and what delays it?

    python benchmarks/conditioning.py worth --data emoji --path train.parquet [--sizes 8 16]
    python benchmarks/conditioning.py train --data emoji --path train.parquet --size 16 [--out results.jsonl] [ARM ...]

`worth` needs no network: how much of the variance of the images lies between the classes, and how much lower the loss
of the best linear denoiser is if it knows the class. `train` trains recipes/modern.yaml at a small size, with one
change for each arm, and prints every few steps by how much wrong labels raise the loss: on the same images, noise and
times, as many of each class. Arms can be joined by "+", such as "std 1+balanced".
"""

import argparse
import contextlib
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tessera import randomness
from tessera.conditioning import Condition
from tessera.data.latents import LatentsDataset
from tessera.data.sampler import WeightedOrder
from tessera.monitoring.health import stratified_timesteps, wrong_labels
from tessera.training.optimizers import MuonAndAdamW, learning_rate, set_learning_rate
from tessera.training.recipe import Recipe, read_recipe
from tessera.training.run import TrainingRun, build_run
from tessera.training.step import train_step

RECIPE = Path(__file__).parent.parent / "recipes" / "modern.yaml"
STEPS = 20_000  # of the schedule: the rate is constant after the warm-up
MIN_MEASURED = 10  # images: a class with no more is not measured
NOISE_STREAM = 0x636F6E64


@dataclass(frozen=True)
class Arm:
    """One change: overrides of the recipe, or a change of the run before its first step."""

    overrides: tuple[str, ...] = ()
    change: Callable[[TrainingRun], None] = lambda run: None


def class_table(run: TrainingRun) -> nn.Parameter:
    return run.network.get_parameter("y_embedder.embedding_table.weight")


def table_rate(run: TrainingRun, factor: float) -> None:
    """A group of its own for the class rows, with a higher rate."""
    optimizer, weight = run.state.optimizer, class_table(run)
    group = next(each for each in optimizer.param_groups if any(parameter is weight for parameter in each["params"]))
    number = next(index for index, parameter in enumerate(group["params"]) if parameter is weight)
    own = {**group, "params": [group["params"].pop(number)], "param_names": [group["param_names"].pop(number)]}
    own["lr_scale"] = group["lr_scale"] * factor
    optimizer.param_groups.append(own)
    if isinstance(optimizer, MuonAndAdamW):
        optimizer.adamw.param_groups.append(own)
    run.state.__dict__.pop("parameter_groups", None)


def normalize(run: TrainingRun, modules: tuple[str, ...]) -> None:
    """Divide the outputs of these embeddings by their rms, which makes it 1."""

    def after(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return output * torch.rsqrt(output.square().mean(-1, keepdim=True) + 1e-12)

    for name in modules:
        run.network.get_submodule(name).register_forward_hook(after)


def balance(run: TrainingRun) -> None:
    """As many images of each class in every batch."""
    loader, labels = run.loader, class_labels(run)
    names = np.unique(labels)
    parts = np.searchsorted(names, labels)
    loader.order = WeightedOrder(parts, [1] * len(names), loader.batch_size, loader.seed)


RATES = "training.optimizer.learning_rate", "training.optimizer.adamw_learning_rate"
ARMS = {
    "modern": Arm(),
    "std 1": Arm(("network.label_init_std=1",)),
    "table rate x10": Arm(change=lambda run: table_rate(run, 10)),
    "normalized": Arm(change=lambda run: normalize(run, ("t_embedder", "y_embedder"))),
    "normalized time": Arm(change=lambda run: normalize(run, ("t_embedder",))),
    "balanced": Arm(change=balance),
    "no dropout": Arm(("training.condition_dropout=0",)),
    "rates x4": Arm((f"{RATES[0]}=0.012", f"{RATES[1]}=0.004")),
    "uniform times": Arm(("diffusion.timestep_sampling=uniform",)),
    "AdamW": Arm(("training.optimizer=adamw", f"{RATES[0]}=0.001")),
    "paper's block": Arm(("network.block=adaln-zero", "training.optimizer=adamw", f"{RATES[0]}=0.001")),
}


def class_labels(run: TrainingRun) -> np.ndarray:
    dataset = run.loader.dataset
    return np.array([dataset.label(sample) for sample in range(len(dataset))])


def data_overrides(options: argparse.Namespace, size: int) -> list[str]:
    if options.data == "digits":
        return ["data=digits"]
    return ["data=parquet", f"data.path={options.path}", "data.label=group", f"data.size={size}", "data.hflip=false"]


def small_recipe(options: argparse.Namespace, size: int, overrides: tuple[str, ...] = ()) -> Recipe:
    network = f"hidden_size={options.width} depth={options.depth} num_heads=4 patch_size={options.patch}".split()
    settings = [
        *data_overrides(options, size),
        "network.preset=null",
        "network.label_init_std=0.02",
        *(f"network.{each}" for each in network),
    ]
    settings += [f"training.seed={options.seed}", "training.device=cpu", "training.compile=off"]
    settings += [f"training.steps={STEPS}", f"training.global_batch_size={options.batch}", "run_dir=unused"]
    return read_recipe(RECIPE, [*settings, *overrides])


@dataclass(frozen=True)
class Batch:
    """Images that the labels are measured on, as many of each class."""

    x0: Tensor
    label: Tensor
    noise: Tensor
    num_classes: int

    @staticmethod
    def of(run: TrainingRun, count: int) -> "Batch":
        labels, size, dataset = class_labels(run), run.recipe.network.num_classes, run.loader.dataset
        assert not isinstance(dataset, LatentsDataset)
        classes = [label for label in range(size) if (labels == label).sum() > MIN_MEASURED]
        each = max(1, count // len(classes))
        rows = np.concatenate([np.flatnonzero(labels == label)[-each:] for label in classes])
        pixels = torch.stack([torch.as_tensor(dataset.pixels(int(row))) for row in rows])
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))  # times do not follow classes
        x0 = (pixels.float() / 127.5 - 1)[order]
        noise = randomness.normal(0, torch.arange(len(rows)), NOISE_STREAM, tuple(x0.shape[1:]))
        return Batch(x0, torch.from_numpy(labels[rows])[order], noise, size)

    @torch.no_grad()
    def costs(self, run: TrainingRun) -> tuple[float, float, float]:
        """The loss, by which fraction wrong labels raise it, and the standard error of this fraction."""
        diffusion, t = run.objective.diffusion, stratified_timesteps(len(self.x0), run.objective.diffusion)
        x, time = diffusion.add_noise(self.x0, self.noise, t), diffusion.model_time(t)

        def losses(label: Tensor) -> Tensor:
            return diffusion.loss(run.network(x, time, Condition(label)).float(), self.x0, self.noise, t).mse

        right = losses(self.label)
        cost = losses(wrong_labels(self.label, self.num_classes)) - right
        loss = right.mean().item()
        return loss, cost.mean().item() / loss, cost.std().item() / math.sqrt(len(cost)) / loss

    @torch.no_grad()
    def norms(self, run: TrainingRun) -> tuple[float, float]:
        """The mean norms of the vectors of the time and of the class, which are added."""
        time = run.objective.diffusion.model_time(stratified_timesteps(64, run.objective.diffusion))
        inputs = {"t_embedder": time, "y_embedder": torch.arange(self.num_classes)}
        vectors = [run.network.get_submodule(name)(value) for name, value in inputs.items()]
        return vectors[0].norm(dim=-1).mean().item(), vectors[1].norm(dim=-1).mean().item()


def train(options: argparse.Namespace) -> None:
    print("| arm | step | loss | wrong labels raise it by | +- 2 standard errors | norm: time | norm: class |")
    print("|---|---|---|---|---|---|---|")
    for name in options.arms or list(ARMS):
        parts = [ARMS[part] for part in name.split("+")]
        torch.manual_seed(options.seed)
        with contextlib.redirect_stderr(io.StringIO()):
            overrides = tuple(each for part in parts for each in part.overrides)
            run = build_run(small_recipe(options, options.size, overrides))
        for part in parts:
            part.change(run)
        measured, state, config = Batch.of(run, options.count), run.state, run.recipe.training
        position = 0
        for step, batch in enumerate(run.loader.batches(position), 1):
            set_learning_rate(state.optimizer, learning_rate(config.optimizer, step - 1, STEPS))
            train_step(state, batch, run.objective, config.global_batch_size)
            if step % options.every == 0 or step == options.steps:
                loss, cost, error = measured.costs(run)
                time, label = measured.norms(run)
                row = f"{loss:.4f} | {cost:.2%} | {2 * error:.2%} | {time:.2f} | {label:.2f}"
                print(f"| {name} | {step} | {row} |", flush=True)
                if options.out:
                    values = {"step": step, "loss": loss, "cost": cost, "error": error, "time": time, "label": label}
                    record = {"data": options.data, "size": options.size, "arm": name, "seed": options.seed, **values}
                    with Path(options.out).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
            if step == options.steps:
                break


def worth(options: argparse.Namespace) -> None:
    """What a class tells the best linear denoiser: of all images, and of each class around its mean.

    With x_t = (1 - t) x + t e and the velocity e - x, an eigenvalue l of the covariance has the loss
    l / ((1 - t)^2 l + t^2). A wrong mean adds the square of its distance times t^2 / ((1 - t)^2 l + t^2)^2.
    """
    print("| data | size | images | classes | largest class | variance between classes | loss: no label | label |"
          " gain of the label | cost of a wrong one |\n" + "|---" * 10 + "|")  # fmt: skip
    for size in options.sizes:
        dataset = read_recipe(RECIPE, [*data_overrides(options, size), "run_dir=unused"]).data.open()
        labels = torch.tensor([dataset.label(row) for row in range(len(dataset))])
        counts = torch.bincount(labels)
        rows = torch.arange(len(dataset))[counts[labels] > MIN_MEASURED]
        _, labels = labels[rows].unique(return_inverse=True)
        pixels = np.stack([dataset.pixels(int(row)) for row in rows])
        x, counts = torch.from_numpy(pixels).flatten(1).double() / 127.5 - 1, torch.bincount(labels)
        means = torch.stack([x[labels == label].mean(0) for label in range(len(counts))])
        inside, outside = x - means[labels], x - x.mean(0)
        t = torch.sigmoid(0.7 * torch.special.ndtri((torch.arange(40).double() + 0.5) / 40))  # as in the recipe
        no_label = linear_loss(torch.linalg.eigvalsh(outside.mT @ outside / len(x)), t).mean()
        values, basis = torch.linalg.eigh(inside.mT @ inside / (len(x) - len(counts)))
        label = linear_loss(values, t).mean()
        distances = ((means[:, None] - means) @ basis).square()  # [K, K, n]
        weights = (counts / len(x))[:, None] * (counts / (len(x) - counts[:, None])).fill_diagonal_(0)
        factor = t**2 / ((1 - t) ** 2 * values.clamp(min=0)[:, None] + t**2) ** 2
        wrong = ((weights[..., None] * distances).sum((0, 1))[:, None] * factor).mean()
        between = 1 - inside.square().mean() / outside.square().mean()
        cells = [options.data, size, len(x), len(counts), f"{counts.max() / len(x):.0%}", f"{between:.1%}"]
        cells += [f"{no_label:.4f}", f"{label:.4f}", f"{1 - label / no_label:.2%}", f"{wrong / label:.1%}"]
        print("|", " | ".join(map(str, cells)), "|", flush=True)


def linear_loss(eigenvalues: Tensor, t: Tensor) -> Tensor:
    """[n] and [T] -> [n, T]"""
    values = eigenvalues.clamp(min=0)[:, None]
    return values / ((1 - t) ** 2 * values + t**2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("worth", "train"))
    parser.add_argument("arms", nargs="*", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--data", choices=("digits", "emoji"), default="digits")
    parser.add_argument("--path", default="", help="the parquet file of the emoji")
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8], help="of worth")
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--count", type=int, default=160, help="images that the labels are measured on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="a file to append the numbers to, as lines of JSON")
    options = parser.parse_intermixed_args()
    {"train": train, "worth": worth}[options.what](options)


if __name__ == "__main__":
    main()
