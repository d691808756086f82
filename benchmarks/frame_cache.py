"""A clip frame by frame: keys and values of earlier frames kept, or all frames, or the frames so far, computed again?

    python benchmarks/frame_cache.py [--frames 24] [--steps 10] [--rounds 3]

One process, alternately, medians of its CPU time. The network is a causal DiT with random weights. All ways make the
same clip.
"""

import argparse
import statistics
import time
from functools import partial

import torch

from tessera.bundle import BundleConfig, Model
from tessera.generation import generate_steps


def model(frames: int, side: int, width: int, depth: int) -> Model:
    network = {
        "input_size": (frames, side, side), "in_channels": 3, "out_channels": 3, "num_classes": 3, "patch_size": 4,
        "hidden_size": width, "depth": depth, "num_heads": width // 32, "attention": "causal", "block": "rope-swiglu",
    }  # fmt: skip
    config = {"network": network, "diffusion": {"kind": "flow"}, "codec": {"kind": "pixels", "channels": 3}}
    settings = BundleConfig.model_validate({**config, "class_names": ("a", "b", "c")})
    torch.manual_seed(0)
    network = settings.network.build().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return Model(settings, network)


@torch.no_grad()
def frames_so_far(model: Model, steps: int) -> torch.Tensor:
    """The same clip by the network alone, which gets the frames so far and none that is still noise."""
    x = next(generate_steps(model, [1], [3], num_steps=steps)).x
    condition = model.config.network.condition_type(torch.tensor([1]))
    for frame in range(x.shape[2]):
        for step in range(steps, 0, -1):
            t = torch.zeros(1, frame + 1)
            t[:, frame] = 1000 * step / steps
            velocity = model.network(x[:, :, : frame + 1], t, condition)[:, :, frame]
            x[:, :, frame] -= velocity / steps
    return x


def clip(model: Model, schedule: dict[str, object], steps: int) -> torch.Tensor:
    *_, last = generate_steps(model, [1], [3], num_steps=steps, sampler="euler", frame_schedule=schedule)
    return last.x


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", default="16,32", help="height and width in pixels, patches of 4")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=6)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, {options.frames} frames\n")
    print("| tokens of a frame | all frames s | frames so far s | kept s | ratios | largest difference |")
    print("|---|---|---|---|---|---|")
    for side in (int(each) for each in options.sides.split(",")):
        network = model(options.frames, side, options.width, options.depth)
        ways = {
            "all": partial(clip, network, {"kind": "autoregressive", "cache": False}, options.steps),
            "so far": partial(frames_so_far, network, options.steps),
            "kept": partial(clip, network, {"kind": "autoregressive"}, options.steps),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        clips: dict[str, torch.Tensor] = {}
        for _ in range(options.rounds):
            for name, make in ways.items():
                begun = time.process_time()
                clips[name] = make()
                seconds[name].append(time.process_time() - begun)
        whole, so_far, kept = (statistics.median(seconds[name]) for name in ways)
        difference = max(float((clips[name] - clips["kept"]).abs().max()) for name in ("all", "so far"))
        row = (f"{whole:.1f}", f"{so_far:.1f}", f"{kept:.1f}", f"{whole / kept:.1f}, {so_far / kept:.1f}")
        print("| " + " | ".join((str((side // 4) ** 2), *row, f"{difference:.0e}")) + " |", flush=True)


if __name__ == "__main__":
    main()
