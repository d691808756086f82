"""Control by images: how well do channels, copied blocks and tokens follow edges, masks and low resolution?

    tessera train recipes/shapes-text.yaml
    python benchmarks/control.py runs/shapes-text [--work FOLDER] [--only edges ...] [--how copy ...] [--seeds 3]

Each kind is trained with the same training FLOPs (6 times the multiply-adds of a forward pass, the control included,
times the samples), so the cheapest takes the most steps. Then it samples the captions of test scenes with control
images of these scenes. Their content is known exactly. An object is right if the reader finds one of its shape, color
and size within a pixel of its place; the control error is the fraction of objects that are not. The mask error is 1
minus the intersection over union of the pixels that are not background. Without a control, the caption states all but
the place. Finished runs are kept in FOLDER and not repeated.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

import tessera
from tessera import adapters, bundle
from tessera.adapters import ControlConfig
from tessera.conditioning.control import Mask
from tessera.data.shapes import ShapesConfig, ShapesDataset
from tessera.evaluation.toy.shape_reader import detect
from tessera.model import Model

IMAGES: dict[str, dict[str, Any]] = {
    "edges": {"kind": "edges"},
    "mask": {"kind": "mask", "threshold": 215},  # the lightest color is below, the darkest background above
    "low resolution": {"kind": "low-resolution", "factor": 8},  # 4 x 4 pixels
}
RATES = {"channels": 6e-3, "copy": 6e-3, "tokens": 6e-3}  # not searched for each kind
PLACE = 1.0  # pixels that a centroid may be away


def recipe(base: str, folder: Path, image: str, how: str, seed: int, steps: int, arguments: Any) -> dict[str, Any]:
    """The recipe of one run. Nothing is dropped: a control has no effect on rows without an image."""
    training = {"init_from": base, "steps": steps, "global_batch_size": arguments.batch, "seed": seed, "log_every": 50}
    training |= {"condition_dropout": 0.0, "sample_every": steps, "checkpoint_every": steps, "sample_seeds": 1}
    training |= {"compile": "off", "device": "cpu", "precision": "float32", "tensorboard": False}
    training |= {"sample_prompts": ["a small red circle"], "ema": {"decay": 0.98}}
    training |= {"optimizer": {"kind": "adamw", "learning_rate": arguments.rate or RATES[how], "warmup_steps": 20}}
    return {
        "run_dir": str(folder),
        "data": {"kind": "shapes", "count": 20_000, "combinations": "known"},
        "codec": {"kind": "pixels", "channels": 3},
        "diffusion": {"kind": "flow"},
        "adapter": {"kind": "control", "image": IMAGES[image], "how": how},
        "training": training,
    }


def steps_of(model: Model, how: str, most: int) -> int:
    """How many steps have the training FLOPs of `most` steps of the cheapest kind."""
    macs = {}
    for kind in RATES:
        adapters.attach(model.network, "control", ControlConfig(how=kind).layers(model.network, ()))
        macs[kind] = model.network.macs()
        adapters.detach(model.network)
    return round(most * min(macs.values()) / macs[how])


def errors(generated: np.ndarray, data: ShapesDataset) -> dict[str, float]:
    """The control error and the mask error of images uint8 [B, H, W, 3] of the first scenes."""
    wrong, objects = 0, 0
    for number, image in enumerate(generated):
        places = [(each.shape, each.color, each.size, each.x, each.y) for each in detect(image).objects]
        for each in data.scene(number).objects:
            near = [
                place
                for place in places
                if place[:3] == (each.shape, each.color, each.size)
                and max(abs(place[3] - each.x), abs(place[4] - each.y)) <= PLACE
            ]
            wrong, objects = wrong + (not near), objects + 1
    mask = Mask(threshold=215)
    masks = [mask(np.moveaxis(each, -1, 1))[:, 0] > 0 for each in (generated, photos(data, len(generated)))]
    union = np.logical_or(*masks).sum(axis=(1, 2))
    overlap = np.logical_and(*masks).sum(axis=(1, 2)) / np.maximum(union, 1)
    return {"control": wrong / objects, "mask": 1 - float(overlap.mean())}


def photos(data: ShapesDataset, count: int) -> np.ndarray:
    return np.stack([np.moveaxis(data.pixels(number), 0, -1) for number in range(count)])


def evaluate(model: Model, count: int, control: bool) -> dict[str, float]:
    """The errors of samples of test scenes, with the control of the model or without."""
    data = ShapesConfig(split="test", count=count, combinations="known").open()
    captions = [data.caption(number) for number in range(count)]
    controls = {"control": photos(data, count)} if control else {}
    options: dict[str, Any] = {"num_steps": 10, "batch_size": 32, "controls": controls}
    return errors(tessera.generate(model, prompts=captions, seeds=list(range(count)), **options), data)


def run(base: str, image: str, how: str, seed: int, arguments: Any) -> dict[str, Any]:
    """Train and score one control, unless that was done."""
    rate = "" if arguments.rate is None else f"-{arguments.rate:g}"
    folder = arguments.work / f"{image.replace(' ', '-')}-{how}-{seed}-{arguments.steps}{rate}"
    result = folder / "result.json"
    if not result.exists():
        steps, start = steps_of(tessera.load(base, "cpu"), how, arguments.steps), time.perf_counter()
        tessera.train(recipe(base, folder, image, how, seed, steps, arguments))
        seconds = time.perf_counter() - start
        model = tessera.load(base, "cpu", adapters=[f"control={folder}"])
        weights = sum(tensor.numel() for tensor in adapters.adapter_state(model.network, "control").values())
        scores = evaluate(model, arguments.count, control=True)
        flops = 6 * model.network.macs() * steps * arguments.batch
        file = next(bundle.checkpoints(folder)[0].glob("adapters/*/*.safetensors")).stat().st_size
        facts = {"steps": steps, "seconds": seconds, "weights": weights, "flops": flops, "bytes": file}
        result.write_text(json.dumps({**scores, **facts}))
    return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a model of shapes that reads captions")
    parser.add_argument("--work", type=Path, default=Path("runs/control"))
    parser.add_argument("--only", nargs="*", choices=IMAGES, default=list(IMAGES))
    parser.add_argument("--how", nargs="*", choices=RATES, default=list(RATES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of the cheapest kind")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--count", type=int, default=128, help="test scenes")
    parser.add_argument("--rate", type=float, help="another learning rate for all kinds")
    arguments = parser.parse_args()
    rows = {
        (seed, image, how): run(arguments.base, image, how, seed, arguments)
        for seed in range(arguments.seeds)  # so that an early stop has compared all kinds
        for image in arguments.only
        for how in arguments.how
    }
    without = evaluate(tessera.load(arguments.base, "cpu"), arguments.count, control=False)
    print("| condition | kind | steps | TFLOPs | trained weights | control error % | mask error % | s |")
    print("|---|---|---|---|---|---|---|---|")
    print(f"| none | | | | | {100 * without['control']:.1f} | {100 * without['mask']:.1f} | |")
    for image in arguments.only:
        for how in arguments.how:
            results = [rows[seed, image, how] for seed in range(arguments.seeds)]
            texts = []
            for name in ("control", "mask"):
                values = [100 * each[name] for each in results]
                texts.append(f"{np.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})")
            first = results[0]
            seconds = np.mean([each["seconds"] for each in results])
            print(
                f"| {image} | {how} | {first['steps']} | {first['flops'] / 1e12:.1f} | {first['weights']:,} | "
                f"{' | '.join(texts)} | {seconds:.0f} |"
            )


if __name__ == "__main__":
    main()
