"""Sampling with DPM-Solver++(2M): Tessera's whole loop against diffusers' scheduler and transformer of equal weights.

    python benchmarks/against_diffusers_solvers.py [--batches 1,16] [--steps 8] [--rounds 5]

diffusers' side is the loop of DiTPipeline, guidance included, around DPMSolverMultistepScheduler (dpmsolver++, order 2,
midpoint, trailing times, last sigma 0) and DiTTransformer2DModel; ours is the loop of `tessera.generate`, the solver
dpm++ on trailing times. Both start from the same noise and stop at the latents. The latents must agree to float error;
then both are timed alternately, and a row gives medians and their ratio (above 1: Tessera is faster). The rows
"none" replace the network by a function that returns at once: only the solver, guidance and the loop remain.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from tessera import generation
from tessera.bundle import BundleConfig, Model
from tessera.conditioning import Condition
from tessera.interop.diffusers import to_diffusers, transformer_config
from tessera.sampling import DPMSolver, sample_loop
from tessera.sampling.denoiser import Denoiser
from tessera.sampling.timesteps import Trailing, timestep_grid

GUIDANCE = 4.0


def pair(preset: str) -> tuple[Model, nn.Module]:
    """The same weights in both; non-zero where a fresh network is zero."""
    torch.manual_seed(0)
    config = BundleConfig.model_validate(
        {
            "network": {"preset": preset, "timestep_freq_divisor": 127, "mlp_norm_eps": 1e-5},
            "diffusion": {},
            "codec": {"kind": "autoencoder-kl", "source": "not loaded"},
            "sampling": {"sampler": "dpm++", "timestep_spacing": "trailing", "guidance_scale": GUIDANCE},
        }
    )
    network = config.network.build()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    theirs = DiTTransformer2DModel(**transformer_config(network.config).model_dump(exclude={"class_name"}))
    theirs.load_state_dict(to_diffusers(network.state_dict(), network.config))
    return Model(config, network.eval()), theirs.eval()


@torch.no_grad()
def loop_of_theirs(transformer: Callable[..., Tensor], start: Tensor, label: Tensor, steps: int) -> Tensor:
    """DiTPipeline's loop up to the latents: both halves of the guided batch are kept and stepped."""
    scheduler = DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, solver_order=2, timestep_spacing="trailing", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    latents = torch.cat((start, start))
    labels = torch.cat((label, torch.full_like(label, 1000)))
    for t in scheduler.timesteps:
        half = latents[: len(latents) // 2]
        latents = torch.cat((half, half), dim=0)
        raw = transformer(latents, t[None].expand(len(latents)), labels)
        eps, rest = raw[:, :4], raw[:, 4:]
        conditional, unconditional = torch.split(eps, len(eps) // 2, dim=0)
        guided = unconditional + GUIDANCE * (conditional - unconditional)
        raw = torch.cat((torch.cat((guided, guided), dim=0), rest), dim=1)
        latents = scheduler.step(torch.split(raw, 4, dim=1)[0], t, latents).prev_sample
    return latents.chunk(2, dim=0)[0]


def interleaved(first: Callable, second: Callable, rounds: int) -> tuple[float, float]:
    """Median seconds of two functions, called alternately after one warm-up each; the order alternates."""
    first(), second()
    seconds: dict[Callable, list[float]] = {first: [], second: []}
    for number in range(rounds):
        for function in (first, second) if number % 2 else (second, first):
            began = time.perf_counter()
            function()
            seconds[function].append(time.perf_counter() - began)
    return statistics.median(seconds[first]), statistics.median(seconds[second])


def cheap_network(x: Tensor, t: Tensor, condition: object) -> Tensor:
    """A network that returns at once."""
    return torch.cat((0.9 * x, x), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-S/4")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model, theirs = pair(options.model)
    print(
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, {options.model}, {options.steps} steps, {options.rounds} rounds\n"
    )
    print("| network | batch | Tessera, ms per image | diffusers, ms per image | ratio | latents differ by |")
    print("|---|---|---|---|---|---|")
    for name in (options.model, "none"):
        for batch in map(int, options.batches.split(",")):
            classes, seeds = [(7 * i) % 1000 for i in range(batch)], list(range(batch))
            start, label = (
                next(generation.generate_steps(model, classes, seeds, num_steps=options.steps)).x,
                torch.tensor(classes),
            )

            def sample_ours(name=name, classes=classes, seeds=seeds, start=start, label=label) -> Tensor:
                if name != "none":
                    *_, last = generation.generate_steps(model, classes, seeds, num_steps=options.steps)
                    return last.x
                denoise = Denoiser(cheap_network, model.diffusion, Condition(label=label), GUIDANCE)
                visited = timestep_grid(Trailing(), options.steps, model.diffusion)
                *_, last = sample_loop(DPMSolver(), denoise, start, visited, lambda: start)
                return last.x

            def transformer(x: Tensor, t: Tensor, labels: Tensor, name=name) -> Tensor:
                return (
                    cheap_network(x, t, labels) if name == "none" else theirs(x, timestep=t, class_labels=labels).sample
                )

            def sample_theirs(start=start, label=label, transformer=transformer) -> Tensor:
                return loop_of_theirs(transformer, start, label, options.steps)

            difference = float((sample_ours() - sample_theirs()).norm() / sample_theirs().norm())
            assert difference < 1e-3, f"the latents differ by {difference:.2e}: nothing to compare"
            rounds = options.rounds if name != "none" else 40 * options.rounds
            mine, other = (1e3 * one / batch for one in interleaved(sample_ours, sample_theirs, rounds))
            cells = f"{mine:.3g} | {other:.3g} | {other / mine:.3f}"
            print(f"| {name} | {batch} | {cells} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
